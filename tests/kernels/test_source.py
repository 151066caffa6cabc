"""How a kernel's text is put together, and what may stand in it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from loraplex.kernels.catalogue import source_files
from loraplex.kernels.source import read_source


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels in place of ours."""
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "c.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "c.cuh"\nint b;\n')
    (tmp_path / "c.cuh").write_text("#pragma once\nint c;")
    return tmp_path


def places(text: str) -> dict[str, str]:
    """Each declaration's file and line, as a compiler tells them."""
    found, file, number = {}, "", 0
    for line in text.splitlines():
        if marked := re.fullmatch(r'#line (\d+) "(.+)"', line):
            number, file = int(marked[1]), marked[2]
            continue
        if line.startswith("int "):
            assert line not in found
            found[line] = f"{file}:{number}"
        number += 1
    return found


def test_each_file_is_included_once_and_lines_keep_their_places(folder: Path) -> None:
    text = read_source("a.cu")
    assert places(text) == {"int a;": "a.cu:3", "int b;": "b.cuh:3", "int c;": "c.cuh:2"}
    assert "#include" not in text
    assert "#pragma once" not in text


def test_a_replacement_is_read_in_a_files_stead(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other") / "own.cuh"
    other.write_text("\nint own;\n")
    assert places(read_source("a.cu", {"c.cuh": other})) == {
        "int a;": "a.cu:3",
        "int b;": "b.cuh:3",
        "int own;": "c.cuh:2",
    }


def test_a_missing_include_is_told_with_the_lines_that_want_it(folder: Path) -> None:
    (folder / "c.cuh").unlink()
    with pytest.raises(FileNotFoundError, match=r"^a\.cu:1: b\.cuh:2: there is no c\.cuh among the kernels$"):
        read_source("a.cu")


@pytest.mark.parametrize("name", source_files())
def test_a_file_keeps_to_what_every_compiler_of_ours_takes(name: str) -> None:
    text = (resources.files("loraplex.kernels") / name).read_text(encoding="ascii")
    code = re.sub(r"//[^\n]*", "", text)
    included = re.findall(r"#\s*include\s*([^\n]*)", code)
    assert {file.strip() for file in included} <= {f'"{file}"' for file in source_files()}
    assert ("asm" in re.findall(r"\w+", code)) == (name == "ptx.cuh")
    assert not re.search(r"extern\s+__shared__|\batomic\w*|cooperative_groups|\bprintf\b", code)
    assert ("#pragma once" in code) == name.endswith(".cuh")
