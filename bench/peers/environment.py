"""A virtual environment of a peer's own, filled from the package index."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BenchFailed

CPU_TORCH = "2.13.0"
"""The version that every environment has, in its build without CUDA."""


def run(command: Sequence[str | Path], *, log: Path) -> None:
    """Run a command at low priority with its output in `log`. Raises BenchFailed where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        code = subprocess.run(["nice", *command], stdout=output, stderr=output, check=False).returncode
    if code != 0:
        raise BenchFailed(f"{' '.join(map(str, command[:6]))} … exited with {code}; see {log}")


@dataclass(frozen=True, slots=True)
class Environment:
    """One directory: a virtual environment, the log of its making and a stamp that says it is complete."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "venv/bin/python"

    @property
    def log(self) -> Path:
        return self.directory / "install.log"

    @property
    def stamp(self) -> Path:
        return self.directory / "complete"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.directory / "venv/lib" / version / "site-packages"

    def is_complete(self, contents: str) -> bool:
        """Whether it was finished with these contents."""
        return self.stamp.exists() and self.stamp.read_text() == contents

    def finish(self, contents: str) -> None:
        self.stamp.write_text(contents)

    def create(self) -> None:
        """Make the environment anew with the Python that runs this."""
        self.stamp.unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "venv", "--clear", self.directory / "venv"], log=self.log)

    def pip(self, *arguments: str | Path) -> None:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        run(command, log=self.log)

    def install_torch(self) -> None:
        """A wheel on this disk if pip knows one, else what uv finds."""
        torch = f"torch=={CPU_TORCH}"
        if self._pip_finds_locally(torch):
            self.pip("install", "--no-index", "--no-deps", torch)
        else:
            self.pip("install", "uv")
            into: list[str | Path] = ["--python", self.python, "--torch-backend", "cpu", "--no-deps"]
            run([self.python, "-m", "uv", "pip", "install", *into, torch], log=self.log)

    def _pip_finds_locally(self, torch: str) -> bool:
        only_here = ["--dry-run", "--no-index", "--no-deps"]
        dry_run: list[str | Path] = [self.python, "-m", "pip", "install", *only_here, torch]
        return "+cpu" in subprocess.run(dry_run, capture_output=True, text=True, check=False).stdout
