"""Kernels with one operator changed: each is built, run by the check of its file, and expected to fail.

    python -m tests.kernels.mutants [--every] [--files NAME…]

By default a fixed one of each file; with `--every` all of them, which takes twenty minutes. Prints what
should not be, one a line, and ends with 1 then: a mutant that no check tells, a file that fails as it is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from loraplex.kernels import source

from .checks import CHECKS

SAMPLE = 1
"""Mutants of each file."""
TRAPS = ("-fsanitize=bounds-strict,alignment,object-size", "-fsanitize-undefined-trap-on-error")
"""What goes over an array's end by one dies, whether it takes a value there or an address."""
PATIENCE = 90.0
"""Seconds until a mutant that does not end counts as told."""
OTHERS = {
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "&&": "||",
    "||": "&&",
    "+=": "-=",
    "*=": "+=",
    "<<": ">>",
    ">>": "<<",
}
_OPERATOR = re.compile(r"(?<= )(\+=|\*=|<<|>>|<=|>=|==|&&|\|\||[-+*/%<>])(?= )")
_IDLE = re.compile(r"^\s*(//|#)|gridDim|template|__launch_bounds__|__shared__")
"""Lines whose operators only spread the work, or are no arithmetic."""


EQUIVALENT = {
    "work whose result is not written": (
        ("lora_expand.cu", "(columns + STRIP - 1) ", " STRIP) {"),
        ("lora_expand.cu", "(columns + STRIP ", " 1) / STRIP"),
        ("lora_expand.cu", "if (unit.top ", " unit.list->count"),
        ("lora_expand.cu", "if (unit.top ", " list->count"),
        ("lora_plain.cu", "task.slot < 0 || row ", " task.count"),
        ("lora_shrink.cu", "|| top ", " task.count"),
        ("lora_shrink.cu", "if (first ", " a_rows) {"),
        ("lora_shrink.cu", "= index ", " rows ?"),
        ("lora_strip.cuh", "pairs[TILES][2];\n#pragma unroll\n        for (int tile = 0; tile ", " TILES"),
        ("lora_strip.cuh", "is_in = begin ", " column"),
        ("lora_strip.cuh", "column + STRIP ", " end > column"),
        ("lora_strip.cuh", "&& end ", " column;"),
        ("paged_attention.cu", "HALVES ", " 1 ? pack"),
        ("paged_attention.cu", "HEADS ", " 8 && g"),
        ("paged_attention.cu", "        }\n#pragma unroll\n        for (int strip = 0; strip ", " STRIPS"),
        ("paged_attention.cu", "int first = start + warp * 16; first ", " end; first"),
        ("rms_norm.cu", "+ eps);\n#pragma unroll\n    for (int i = 0; i ", " VECTORS"),
        ("plain_attention.cu", "&& length ", " 0; ++w"),
        ("plain_attention.cu", "    }\n#pragma unroll\n    for (int i = 0; i ", " COLUMNS"),
        ("plain_attention.cu", "score = 0.0f;\n#pragma unroll\n        for (int i = 0; i ", " COLUMNS"),
        ("paged_attention.cu", "if (g ", " row * 8 < group && at < OUT"),
        ("paged_attention.cu", "if (g + row * 8 ", " group && at < OUT"),
    ),
    "memory that is sent for": (
        ("lora_strip.cuh", "i = 0; i ", " 4; ++i) {\n            if (has"),
        ("lora_strip.cuh", "prefetch_16(row(rank ", " i)"),
        ("lora_strip.cuh", "later = first ", " 16; first"),
        ("lora_strip.cuh", "16; first ", " 0 && later"),
        ("lora_strip.cuh", "0 && later ", " ranks"),
        ("lora_strip.cuh", "send_for(later ", " own)"),
    ),
    "sums of zeros": (
        ("lora_plain.cu", "&& list->length ", " 0; column"),
        ("lora_shrink.cu", "round = begin; round ", " end"),
        ("lora_strip.cuh", "first = -skipped; first ", " ranks"),
    ),
    "the same value, written twice": (
        ("lora_plain.cu", "if (lane ", " 0) {"),
        ("lora_shrink.cu", "i += WARPS ", " 32"),
        ("paged_attention.cu", "i += WARPS ", " 32"),
        ("paged_attention.cu", "blockIdx.x ", " pieces &&"),
        ("paged_attention.cu", "if (t ", " 0) {\n            tops"),
        ("paged_attention.cu", "at += WARPS ", " 32"),
        ("paged_attention.cu", "if (at ", " 0 && column == 0"),
        ("plain_attention.cu", "at += WARPS ", " 32"),
        ("plain_attention.cu", "if (lane ", " 0) {"),
        ("rms_norm.cu", "if (threadIdx.x % 32 ", " 0) {\n        warps"),
    ),
}
"""By what they bring about, operators that no check can tell: file, what stands before, what behind."""


@dataclass(frozen=True, slots=True)
class Mutant:
    file: str
    line: int
    column: int
    operator: str

    def text(self) -> str:
        lines = original(self.file).splitlines(keepends=True)
        line = lines[self.line]
        end = self.column + len(self.operator)
        lines[self.line] = line[: self.column] + OTHERS[self.operator] + line[end:]
        return "".join(lines)

    def __str__(self) -> str:
        return f"{self.file}:{self.line + 1}:{self.column + 1}: {self.operator} -> {OTHERS[self.operator]}"


def original(file: str) -> str:
    """The text of a kernel file, its includes left as they are."""
    return (Path(source.__file__).parent / file).read_text(encoding="utf-8")


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """Every operator that can be changed, in the order of the file."""
    passed = ""
    for number, line in enumerate(text.splitlines(keepends=True)):
        if not _IDLE.search(line):
            code = line.partition("//")[0]
            for found in _OPERATOR.finditer(code):
                if not _is_equivalent(
                    file, passed + code[: found.start()], text[len(passed) + found.end() :]
                ):
                    yield Mutant(file, number, found.start(), found[0])
        passed += line


def _is_equivalent(file: str, before: str, after: str) -> bool:
    return any(
        file == name and before.endswith(left) and after.startswith(right)
        for places in EQUIVALENT.values()
        for name, left, right in places
    )


def chosen(files: Sequence[str], *, every: bool) -> list[Mutant]:
    """All mutants of these files, or the same ones each time."""
    result = []
    for file in files:
        found = list(mutants_of(file, original(file)))
        result += found if every else random.Random(file).sample(found, min(SAMPLE, len(found)))
    return result


def passing(texts: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (file, text), whether the file's check passes with that text. Each runs in a process of its
    own: it may crash, or never end."""
    results = [False] * len(texts)
    waiting = deque(enumerate(texts))
    running: dict[ForkServerProcess, tuple[int, float]] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            index, job = waiting.popleft()
            child = _CONTEXT.Process(target=_check, args=job)
            child.start()
            running[child] = index, time.monotonic() + PATIENCE
        wait([child.sentinel for child in running], timeout=1.0)
        for child, (index, deadline) in list(running.items()):
            if not child.is_alive() or time.monotonic() > deadline:
                child.kill()
                child.join()
                results[index] = child.exitcode == 0
                del running[child]
    return results


def _check(file: str, text: str) -> None:
    import torch

    from loraplex.kernels.side_stream import InOrder

    from .emulation.launcher import PLAIN, EmulatedLauncher, EmulationFailed
    from .target import Target

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / file
        changed.write_text(text)
        launcher = EmulatedLauncher(flags=(*PLAIN, *TRAPS), replacements={file: changed})
        try:
            CHECKS[file](Target(launcher, torch.device("cpu"), InOrder()))
        except (AssertionError, EmulationFailed):
            os._exit(1)
    os._exit(0)


_CONTEXT = multiprocessing.get_context("forkserver")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--files", nargs="*", default=list(CHECKS))
    options = parser.parse_args()
    _CONTEXT.set_forkserver_preload(["tests.kernels.checks"])
    found = chosen(options.files, every=options.every)
    originals = passing([(file, original(file)) for file in options.files])
    failing = [file for file, passes in zip(options.files, originals, strict=True) if not passes]
    alive = passing([(mutant.file, mutant.text()) for mutant in found])
    left = [mutant for mutant, is_alive in zip(found, alive, strict=True) if is_alive]
    for file in failing:
        print(f"{file} itself fails")
    for mutant in left:
        print(mutant)
    print(f"{len(found) - len(left)} of {len(found)} mutants are told from the original")
    return 1 if left or failing else 0


if __name__ == "__main__":
    sys.exit(main())
