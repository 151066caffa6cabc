"""The kernels under the sanitizers of memory and of alignment, and a kernel that breaks out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .emulation.launcher import missing

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import torch
from loraplex.kernels.side_stream import InOrder
from tests.kernels.checks import CHECKS
from tests.kernels.emulation.launcher import SANITIZED, EmulatedLauncher
from tests.kernels.target import Target
torch.set_num_threads(1)
CHECKS["{file}"](Target(EmulatedLauncher(flags=SANITIZED), torch.device("cpu"), InOrder()))
print("clean")
"""
FILES = (
    *("lora_shrink.cu", "lora_expand.cu", "lora_plain.cu", "rms_norm.cu", "silu_mul.cu", "rope_kv.cu"),
    *("paged_attention.cu", "plain_attention.cu"),
)

BROKEN = """
import pathlib, torch
from loraplex.kernels import source
from loraplex.kernels.cuda_decoder import CudaDecoderOps
from tests.kernels.emulation.launcher import SANITIZED, EmulatedLauncher
text = (pathlib.Path(source.__file__).parent / "silu_mul.cu").read_text()
changed = pathlib.Path("{folder}") / "silu_mul.cu"
changed.write_text(text.replace("i < vectors", "i <= vectors"))
out, gates = torch.empty(4, 8).bfloat16(), torch.randn(4, 16).bfloat16()
launcher = EmulatedLauncher(flags=SANITIZED, replacements={{"silu_mul.cu": changed}})
CudaDecoderOps(launcher).silu_mul(out, gates)
print("unnoticed")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process whose every allocation has the sanitizer's margins."""
    if (why := missing()) is not None:
        pytest.skip(why)
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("needs the sanitizers of g++")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("file", FILES)
def test_kernels_stay_within_their_memory(file: str) -> None:
    answer = run(CHECK.format(file=file))
    assert answer.stdout.endswith("clean\n"), answer.stderr[-4000:]


def test_a_write_beyond_the_output_is_found_with_its_line(tmp_path: Path) -> None:
    answer = run(BROKEN.format(folder=tmp_path))
    assert "unnoticed" not in answer.stdout
    assert "heap-buffer-overflow" in answer.stderr
    assert "silu_mul.cu:" in answer.stderr
