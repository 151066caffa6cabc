"""An operator changed in any kernel file makes the check of that file fail."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from loraplex.kernels.catalogue import source_files

from .checks import CHECKS
from .emulation.launcher import missing
from .mutants import EQUIVALENT, OTHERS, mutants_of, original

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_but_the_instructions_has_a_check() -> None:
    assert {*CHECKS, "ptx.cuh"} == set(source_files())


def test_every_file_has_operators_to_change() -> None:
    for file in CHECKS:
        assert len(list(mutants_of(file, original(file)))) > 4, file


def test_what_is_left_out_stands_in_its_file() -> None:
    for file, before, after in chain.from_iterable(EQUIVALENT.values()):
        assert any(f"{before}{operator}{after}" in original(file) for operator in OTHERS), (file, before)


def test_checks_tell_mutants_from_the_original() -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    answer = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutants"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr[-2000:]
