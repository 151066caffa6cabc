"""`loraplex adapters check`: would an adapter be served on this base? The shard's own code answers."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..shard.adapters.files import FileLimits
from ..shard.adapters.own_tokenizer import read_own_tokenizer
from ..shard.adapters.pack import PackedDirectory, Packer
from ..shard.config import ShardConfig
from ..shard.load import LoadedModel, load_model
from .errors import UNUSABLE, ToolFailed, reported
from .sources import bring
from .text import facts, printable, size


def check(source: str, base: str, *, dtype: str | None, max_rank: int | None) -> None:
    """Print what serving `source` on `base` would take. Raises ToolFailed where it would be refused."""
    directory = bring(source).directory
    model = load_base(base, dtype=dtype, max_rank=max_rank)
    with reported(source), tempfile.TemporaryDirectory(prefix="loraplex-check-") as scratch:
        packer = Packer(model.layout, FileLimits())
        packed = packer.pack(directory, Path(scratch) / "packed", model.base)
        own = read_own_tokenizer(directory, FileLimits())
    print(f"{printable(source)} would be served on {printable(base)}\n")
    ships = [
        name
        for name, value in (("tokenizer", own.tokenizer_json), ("chat template", own.chat_template))
        if value
    ]
    print(facts([*_figures(packed, model.dtype), ("ships its own", ", ".join(ships))]))
    for warning in packed.traits.warnings:
        print(printable(f"warning: {warning}"))


def load_base(name: str, *, dtype: str | None = None, max_rank: int | None = None) -> LoadedModel:
    """The base as a shard on CPU loads it, with the least room for sequences.

    Raises ToolFailed where it cannot be served.
    """
    try:
        config = ShardConfig(model=name, device="cpu", dtype=dtype, max_num_seqs=1)
        if max_rank is not None:
            config = replace(config, max_rank=max_rank)
    except ValueError as error:
        raise ToolFailed(UNUSABLE, str(error)) from error
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with reported(f"base {name}"):
        return load_model(config)


def _figures(packed: PackedDirectory, dtype: str) -> list[tuple[str, str]]:
    traits = packed.traits
    return [
        ("kind", traits.kind),
        ("version", packed.digest),
        ("modules", str(packed.modules)),
        ("largest rank", str(packed.max_rank)),
        ("on the device", f"{size(packed.file.index.nbytes)} as {dtype}"),
        ("replaces", ", ".join(traits.owns)),
        ("cannot be weighted or summed", traits.alone),
        ("invocation tokens", ", ".join(map(str, traits.invocation_tokens))),
        ("vocabulary", str(traits.vocab_size) if traits.vocab_size else ""),
    ]
