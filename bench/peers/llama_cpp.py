"""llama.cpp's own server, compiled from the source that the package llama-cpp-python carries."""

from __future__ import annotations

import importlib.metadata
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from ..server import Launch
from .environment import CPU_TORCH, Environment, run

VERSION = "0.3.36"
TOOLS = ("cmake", "ninja", "numpy", "sentencepiece")
SWITCHES = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
SLOTS, CONTEXT = 16, 256
"""Sequences at once, and tokens of each: the load needs 128, and its cache is reserved in full."""

CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""
"""Their converter knows pre-tokenizers by a hash of what they do; it is told what a home-made one is like."""


class LlamaCpp:
    """Serves /completion; adapters are numbered in the order of the command line."""

    name = "llama.cpp"
    style = "llama.cpp"
    contents = f"llama-cpp-python {VERSION}, torch {CPU_TORCH}"

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._source = environment.directory / f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
        self._build = environment.directory / "build"

    @property
    def is_installed(self) -> bool:
        return self._environment.is_complete(self.contents)

    def install(self) -> None:
        """Compiles for some eight minutes on two cores. Raises BenchFailed."""
        if self.is_installed:
            return
        environment = self._environment
        environment.create()
        environment.install_torch()
        transformers = f"transformers=={importlib.metadata.version('transformers')}"
        environment.pip("install", f"torch=={CPU_TORCH}", transformers, *TOOLS)
        self._unpack()
        self._compile(environment.python.parent)
        environment.finish(self.contents)

    def _compile(self, tools: Path) -> None:
        """With the cmake and ninja of the environment."""
        log, cmake = self._environment.log, tools / "cmake"
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
        run([cmake, *generator, *SWITCHES, "-S", self._source, "-B", self._build], log=log)
        jobs = str(os.cpu_count() or 1)
        run([cmake, "--build", self._build, "--target", "llama-server", "--parallel", jobs], log=log)

    def _unpack(self) -> None:
        environment = self._environment
        package = f"llama-cpp-python=={VERSION}"
        environment.pip("download", "--no-deps", "--no-binary", ":all:", "-d", environment.directory, package)
        with tarfile.open(environment.directory / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(environment.directory, filter="data")

    def launch(self, base: Path, adapters: Mapping[str, Path], port: int, threads: int) -> Launch:
        """Converts what has not been converted before, into `gguf` beside the base."""
        converted = base.with_name("gguf")
        converted.mkdir(exist_ok=True)
        model = self._convert_base(base, converted / "base.gguf")
        command = [
            str(self._build / "bin/llama-server"),
            *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("--threads", str(threads), "--threads-batch", str(threads)),
            *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT), "--cont-batching"),
        ]
        if adapters:
            files = [
                self._convert_adapter(base, path, converted / f"{name}.gguf")
                for name, path in adapters.items()
            ]
            command += ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"]
        return Launch(tuple(command), "/health")

    def _convert_base(self, base: Path, target: Path) -> Path:
        arguments = [str(base), "--outfile", str(target), "--outtype", "bf16"]
        return self._once(target, ["-c", CONVERT, str(self._source), *arguments])

    def _convert_adapter(self, base: Path, adapter: Path, target: Path) -> Path:
        arguments = [str(adapter), "--base", str(base), "--outfile", str(target), "--outtype", "bf16"]
        return self._once(target, [str(self._source / "convert_lora_to_gguf.py"), *arguments])

    def _once(self, target: Path, arguments: list[str]) -> Path:
        """Run a converter unless what it makes is there; half a file is never left under its name."""
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            command = [str(unfinished) if part == str(target) else part for part in arguments]
            run([self._environment.python, *command], log=self._environment.log)
            unfinished.rename(target)
        return target
