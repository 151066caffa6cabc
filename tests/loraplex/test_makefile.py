"""`make setup` against fake Pythons, and the stubs against a fresh run of their generator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = next(
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
)

PYTHON = """#!/bin/sh
# A stand-in for python: notes what it is asked, makes environments of stand-ins, lacks what it is told to.
case "$*" in
    *ensurepip*) exit ${CANNOT_MAKE_VENV:-0} ;;
    *"-m venv"*)
        echo "${0##*/} makes .venv" >>"$JOURNAL"
        mkdir -p .venv/bin && cp "$0" .venv/bin/python
        exit ;;
esac
echo "$*" | sed 's/-m pip --disable-pip-version-check --no-input/pip/' >>"$JOURNAL"
case "$*" in
    *--dry-run*) echo "Would install torch-2.13.0${LOCAL_TORCH:-}" ;;
    *"-m uv"*) exit ${UV_FAILS:-0} ;;
    *"-e ."*) exit ${REST_FAILS:-0} ;;
esac
"""


class Checkout:
    """A copy of what set-up reads, with fake Pythons and nothing else of that name on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.bin = folder / "bin"
        self.journal = folder / "journal"
        self.bin.mkdir()
        for name in ("Makefile", "constraints.txt", "pyproject.toml", "deploy/setup.sh"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        for tool in ("sh", "make", "cat", "cp", "dirname", "env", "grep", "mkdir", "rm", "sed"):
            found = shutil.which(tool)
            assert found is not None, tool
            (self.bin / tool).symlink_to(found)

    def add_python(self, name: str, *, cannot_make_venv: bool = False) -> None:
        text = PYTHON.replace("${CANNOT_MAKE_VENV:-0}", "1") if cannot_make_venv else PYTHON
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.journal.write_text("")
        environment = {"PATH": str(self.bin), "JOURNAL": str(self.journal), **variables}
        return subprocess.run(
            [str(self.bin / "make"), *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def steps(self) -> list[str]:
        """What the Pythons were asked, one line each."""
        return self.journal.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


REST = [
    "pip install --quiet --no-warn-conflicts -c constraints.txt setuptools",
    "pip install --quiet -c constraints.txt --no-build-isolation -e .[dev]",
]
LOOK = f"pip install --dry-run --no-index --no-deps {TORCH}"
ASK_UV = [
    "pip install --quiet --no-warn-conflicts -c constraints.txt uv",
    f"-m uv pip install --python .venv/bin/python --torch-backend cpu --no-deps {TORCH}",
]


def test_takes_a_local_cpu_build_of_torch_first_and_alone(checkout: Checkout) -> None:
    checkout.add_python("python3")
    assert checkout.make("setup", LOCAL_TORCH="+cpu").returncode == 0
    assert checkout.steps == ["python3 makes .venv", LOOK, f"pip install --no-index --no-deps {TORCH}", *REST]


def test_asks_uv_where_no_local_build_is_found(checkout: Checkout) -> None:
    checkout.add_python("python3")
    assert checkout.make("setup").returncode == 0
    assert checkout.steps == ["python3 makes .venv", LOOK, *ASK_UV, *REST]


def test_announces_the_big_download_before_it_begins(checkout: Checkout) -> None:
    checkout.add_python("python3")
    outcome = checkout.make("setup", UV_FAILS="1")
    assert outcome.returncode == 0
    assert checkout.steps == ["python3 makes .venv", LOOK, *ASK_UV, f"pip install {TORCH}", *REST]
    assert "about 2.7 GB" in outcome.stderr


def test_cuda_takes_the_default_build_and_stays(checkout: Checkout) -> None:
    checkout.add_python("python3")
    rest = [REST[0], REST[1].replace("[dev]", "[dev,cuda]")]
    assert checkout.make("setup", LOCAL_TORCH="+cpu").returncode == 0
    assert checkout.make("setup", "CUDA=1", LOCAL_TORCH="+cpu").returncode == 0
    assert checkout.steps == ["python3 makes .venv", f"pip install --no-deps {TORCH}", *rest]
    assert checkout.make("setup").stdout.startswith("make: Nothing to be done")
    os.utime(checkout.folder / "pyproject.toml", (4e9, 4e9))
    assert checkout.make("setup").returncode == 0
    assert checkout.steps == [f"pip install --no-deps {TORCH}", *rest]


def test_is_done_once_until_what_it_reads_changes(checkout: Checkout) -> None:
    checkout.add_python("python3")
    assert checkout.make("setup").returncode == 0
    assert checkout.make("setup").returncode == 0
    assert checkout.steps == []
    os.utime(checkout.folder / "constraints.txt", (4e9, 4e9))
    assert checkout.make("setup").returncode == 0
    assert "python3 makes .venv" not in checkout.steps
    assert checkout.steps[-2:] == REST


def test_an_interrupted_set_up_is_made_afresh(checkout: Checkout) -> None:
    checkout.add_python("python3")
    assert checkout.make("setup", REST_FAILS="1").returncode != 0
    assert checkout.make("setup").returncode == 0
    assert checkout.steps[0] == "python3 makes .venv"


def test_takes_the_first_python_that_can_make_an_environment(checkout: Checkout) -> None:
    checkout.add_python("python3", cannot_make_venv=True)
    checkout.add_python("python3.12")
    checkout.add_python("python3.11")
    assert checkout.make("setup").returncode == 0
    assert checkout.steps[0] == "python3.12 makes .venv"


@pytest.mark.parametrize("pythons", [[], ["python3"]])
def test_without_a_python_one_line_names_the_remedy(checkout: Checkout, pythons: list[str]) -> None:
    for name in pythons:
        checkout.add_python(name, cannot_make_venv=True)
    outcome = checkout.make("setup")
    assert outcome.returncode != 0
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("make:")]
    assert len(said) == 1
    assert "apt install python3-venv" in said[0]


def test_too_old_a_python_is_passed_over(checkout: Checkout) -> None:
    old = "import sys\nsys.version_info = (3, 10)\nexec(sys.argv[2])\n"
    (checkout.bin / "old.py").write_text(old)
    (checkout.bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "{checkout.bin}/old.py" "$@"\n')
    (checkout.bin / "python3").chmod(0o755)
    assert "apt install python3-venv" in checkout.make("setup").stderr
    checkout.add_python("python3.13")
    assert checkout.make("setup").returncode == 0
    assert checkout.steps[0] == "python3.13 makes .venv"


@pytest.mark.parametrize("target", ["demo", "test", "test-gpu", "lint", "types", "proto", "bench"])
def test_every_target_sets_up_what_it_needs(checkout: Checkout, target: str) -> None:
    outcome = checkout.make("--dry-run", target)
    assert outcome.returncode == 0
    assert "deploy/setup.sh" in outcome.stdout


@pytest.fixture
def prompt_of_demo(checkout: Checkout) -> Callable[..., str]:
    """What `make demo` hands to `loraplex demo`."""
    checkout.add_python("python3")
    assert checkout.make("setup").returncode == 0
    demo = checkout.folder / ".venv/bin/loraplex"
    demo.write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    demo.chmod(0o755)
    return lambda *arguments: checkout.make("demo", *arguments).stdout


def test_a_prompt_reaches_the_demo_as_typed(prompt_of_demo: Callable[..., str]) -> None:
    assert prompt_of_demo() == "demo\n"
    for prompt in ("hello there", 'it\'s $5 `here` "now"', "--odd"):
        assert prompt_of_demo(f"PROMPT={prompt}") == f"demo\n--prompt={prompt}\n"


def test_the_committed_stubs_are_what_the_generator_makes(tmp_path: Path) -> None:
    outcome = subprocess.run(
        ["sh", str(ROOT / "deploy/proto.sh"), sys.executable, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "No matching distribution" in outcome.stderr or "connection" in outcome.stderr.lower():
        pytest.skip("the package index cannot be reached, so the generator cannot be installed")
    assert outcome.returncode == 0, outcome.stderr
    made = sorted(tmp_path.rglob("*_pb2*.py*"))
    assert [path.name for path in made] == sorted(path.name for path in (ROOT / "proto").glob("*_pb2*.py*"))
    for path in made:
        assert path.read_text() == (ROOT / "proto" / path.name).read_text(), path.name
