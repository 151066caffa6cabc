"""transformers' `generate` with PEFT's adapters in a mixed batch. There is no server: a process takes turns.

    python -m bench.peers.transformers_peft BASE [--threads 2] [--adapter NAME=DIR]…

reads one load a line from its input, as JSON with the fields of `Load`, and answers each with `Done`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex.loadtest.workloads import prompt

from .load import Load

RUN = 1
"""The number under which the load client draws the prompts of its first run: both have the same."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a load came to: output tokens, and seconds from the first batch to the end of the last."""

    tokens: int
    seconds: float


def load_model(base: Path, adapters: Mapping[str, Path]) -> Any:
    """The base in bfloat16, wrapped by PEFT where there are adapters. It never ends by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for index, (name, path) in enumerate(adapters.items()):
        if index == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batches(load: Load, adapters: Sequence[str]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Prompts [rows, prompt_tokens] with each row's adapter, in turn; without adapters no names."""
    for start in range(0, load.requests, load.concurrency):
        indices = range(start, min(start + load.concurrency, load.requests))
        rows = [prompt(load.seed, RUN, index, load.prompt_tokens, load.vocabulary) for index in indices]
        yield torch.tensor(rows), [adapters[index % len(adapters)] for index in indices] if adapters else []


@torch.inference_mode()
def run(model: Any, load: Load, adapters: Sequence[str]) -> Done:
    """Greedy, to the very number of output tokens."""
    tokens, began = 0, time.perf_counter()
    for ids, names in batches(load, adapters):
        mixed = {"adapter_names": names} if names else {}
        mask = torch.ones_like(ids)
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=load.output_tokens, do_sample=False, **mixed
        )
        tokens += int(made[:, ids.shape[1] :].numel())
    return Done(tokens, time.perf_counter() - began)


def serve(model: Any, adapters: Sequence[str], lines: Iterable[str]) -> None:
    """Answer each line. The first answer is empty: it says that the model is loaded."""
    print(json.dumps({}), flush=True)
    for line in lines:
        print(json.dumps(asdict(run(model, Load(**json.loads(line)), adapters))), flush=True)


def command(base: Path, adapters: Mapping[str, Path], threads: int) -> tuple[str, ...]:
    """The command line of such a process."""
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    return (sys.executable, "-m", __name__, str(base), f"--threads={threads}", *named)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    adapters = {name: Path(path) for name, _, path in (text.partition("=") for text in options.adapter)}
    serve(load_model(options.base, adapters), list(adapters), sys.stdin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
