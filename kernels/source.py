"""The text of a kernel, its includes put in their places, so that what is compiled is known whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

_INCLUDE = re.compile(r'\s*#include "([^"]+)"\s*')
_NONE: Mapping[str, Path] = {}


def read_source(name: str, replacements: Mapping[str, Path] = _NONE) -> str:
    """The text of a file of this folder with the files that it includes, each once.

    Lines say where they come from, for compilers and sanitizers. A file named in `replacements` is read from
    there instead. Raises FileNotFoundError naming an include that is missing, and the line that wants it.
    """
    return "".join(_lines(name, replacements, set()))


def _lines(name: str, replacements: Mapping[str, Path], seen: set[str]) -> Iterator[str]:
    seen.add(name)
    yield f'#line 1 "{name}"\n'
    for number, line in enumerate(_read(name, replacements).splitlines(), start=1):
        found = _INCLUDE.fullmatch(line)
        if line.strip() == "#pragma once" or (found and found[1] in seen):
            yield "\n"
        elif found:
            try:
                yield from _lines(found[1], replacements, seen)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{name}:{number}: {error}") from error
            yield f'#line {number + 1} "{name}"\n'
        else:
            yield f"{line}\n"


def _read(name: str, replacements: Mapping[str, Path]) -> str:
    if name in replacements:
        return replacements[name].read_text(encoding="utf-8")
    path = resources.files(__package__) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} among the kernels")
    return path.read_text(encoding="utf-8")
