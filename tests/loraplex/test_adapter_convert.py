"""`loraplex adapters convert`: what it writes, what it refuses, and what its process may not do."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex import cli
from loraplex.adapter_tools import unpickle

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

Pickled = Callable[..., Path]


class Attack:
    """Unpickled by anything but a weights-only reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def pickled(tmp_path: Path) -> Pickled:
    """Writes an adapter whose weights are `state`, saved by torch; answers its directory."""

    def write(state: object, name: str = "adapter_model.bin", **options: Any) -> Path:
        directory = tmp_path / "pickled"
        directory.mkdir()
        (directory / "adapter_config.json").write_text(json.dumps(CONFIG))
        torch.save(state, directory / name, **options)
        return directory

    return write


def convert(source: Path, target: Path) -> int:
    return cli.run(["adapters", "convert", str(source), str(target)])


@pytest.mark.parametrize(("name", "zipped"), [("adapter_model.bin", True), ("pytorch_model.bin", False)])
def test_every_layout_of_pickled_weights_becomes_the_same_tensors(
    pickled: Pickled, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, zipped: bool
) -> None:
    state = {KEY: torch.randn(4, 64), "other": torch.randn(3).bfloat16()}
    source = pickled(state, name, _use_new_zipfile_serialization=zipped)
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_text("not wanted")
    assert convert(source, tmp_path / "new" / "there") == 0
    assert "2 tensors, " in capsys.readouterr().out
    found = load_file(tmp_path / "new/there/adapter_model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert json.loads((tmp_path / "new/there/adapter_config.json").read_text()) == CONFIG
    names = sorted(path.name for path in (tmp_path / "new/there").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]


def test_tensors_that_share_memory_and_wrapped_ones_are_written_apart(
    pickled: Pickled, tmp_path: Path
) -> None:
    whole = torch.randn(4, 8)
    assert convert(pickled({"state_dict": {"a": whole, "b": whole, "c": whole.t()}}), tmp_path / "out") == 0
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert torch.equal(found["a"], whole)
    assert torch.equal(found["b"], whole)
    assert torch.equal(found["c"], whole.t())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_never_run(
    pickled: Pickled, tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    trace = tmp_path / "trace"
    source = pickled({KEY: Attack(trace)}, _use_new_zipfile_serialization=zipped)
    assert convert(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert (
        "adapter_model.bin is refused: its pickle asks for posix.mkdir, which is code, not weights" in error
    )
    assert not trace.exists()
    assert not (tmp_path / "out").exists()
    torch.load(source / "adapter_model.bin", weights_only=False)
    assert trace.exists(), "the attack itself should work, or this test shows nothing"


def test_a_bare_pickle_is_refused_and_never_run(pickled: Pickled, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    source = pickled({})
    (source / "adapter_model.bin").write_bytes(pickle.dumps(Attack(trace)))
    assert convert(source, tmp_path / "out") == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([torch.zeros(1)], "it holds no dictionary of tensors"),
        ({}, "it holds no dictionary of tensors"),
        ({KEY: 3}, f"{KEY} is no tensor with a name"),
        ({KEY: torch.eye(3).to_sparse()}, f"{KEY} is a sparse or quantised tensor"),
    ],
    ids=["list", "empty", "number", "sparse"],
)
def test_what_is_not_plain_weights_is_refused(state: object, reason: str) -> None:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with pytest.raises(unpickle.Refused, match=re.escape(reason)):
        unpickle.convert(file)


def test_a_refusal_is_one_line_and_leaves_nothing_behind(
    pickled: Pickled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(pickled({KEY: torch.zeros(3, dtype=torch.int64)}), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("loraplex: ")
    assert error.count("\n") == 1
    assert f"{KEY}: dtype I64 is not served" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "pickled"]


def test_a_cut_off_file_is_refused(
    pickled: Pickled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pickled({KEY: torch.randn(4, 640)})
    whole = (source / "adapter_model.bin").read_bytes()
    (source / "adapter_model.bin").write_bytes(whole[: len(whole) // 2])
    assert convert(source, tmp_path / "out") == 1
    assert "cannot be read as weights" in capsys.readouterr().err


def test_what_cannot_be_tried_is_exit_code_2(
    pickled: Pickled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = pickled({KEY: torch.randn(4, 8)})
    assert convert(tmp_path / "nowhere", tmp_path / "out") == 2
    assert convert(tmp_path, tmp_path / "out") == 2
    assert convert(source, source) == 2
    (source / "adapter_model.safetensors").write_text("")
    assert convert(source, tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(str(tmp_path))[2] for line in lines] == [
        "/nowhere",
        " has no adapter_model.bin",
        "/pickled is there already; name a new directory",
        "/pickled has adapter_model.safetensors already; there is nothing to convert",
    ]
    assert not (tmp_path / "out").exists()


FORBIDDEN = {
    "open a file": "open('/etc/hostname').read()",
    "write a file": "open(sys.argv[1], 'w').close()",
    "open a socket": "socket.socket().close()",
    "start a process": "subprocess.run(['/bin/true'])",
    "take memory": "mmap.mmap(-1, 8 * 1024**3).close()",
}


def test_without_rights_code_in_that_process_could_do_little(tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, mmap, socket, subprocess, sys
spec = importlib.util.spec_from_file_location("unpickle", {unpickle.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
def succeeds(act):
    try:
        exec(act)
    except (OSError, MemoryError):
        return False
    return True
acts = {FORBIDDEN!r}
before = {{name: succeeds(act) for name, act in acts.items()}}
module.give_up_rights(1000)
after = {{name: succeeds(act) for name, act in acts.items()}}
print(json.dumps([before, after]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = json.loads(answer.stdout)
    assert before == dict.fromkeys(FORBIDDEN, True)
    assert after == dict.fromkeys(FORBIDDEN, False)
