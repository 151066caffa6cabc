"""One adapter directory to one packed file, with its digest and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import AdapterNotFound, AdapterRejected
from .assemble import assemble
from .base_weights import BaseWeights
from .changes import Traits
from .digest import adapter_digest
from .files import CONFIG, FileLimits, find_weights, read_regular
from .layout import AdapterLayout
from .packed import PackedIndex
from .parse import parse_adapter


class PackedFile(msgspec.Struct, frozen=True):
    """A packed adapter on disk. Whoever receives it deletes it."""

    path: str
    index: PackedIndex


@dataclass(frozen=True, slots=True)
class PackedDirectory:
    """What packing a directory gives."""

    digest: str
    modules: int
    max_rank: int
    traits: Traits
    file: PackedFile


class Packer:
    """Parses adapter directories for one base model and writes packed files."""

    def __init__(self, layout: AdapterLayout, limits: FileLimits) -> None:
        self._layout = layout
        self._limits = limits

    def pack(
        self, directory: Path, target: Path, base: BaseWeights, expect_digest: str = ""
    ) -> PackedDirectory:
        """Read, check and parse `directory`; write the packed form to `target`, which is new.

        Raises AdapterNotFound without a directory, AdapterRejected where it cannot be served or has another
        digest than expected. Leaves no file behind then.
        """
        config, weights = self._snapshot(directory)
        digest = adapter_digest(config, weights)
        if expect_digest and digest != expect_digest:
            raise AdapterRejected(
                f"its files have changed: they had digest {expect_digest}, now {digest}; load it anew"
            )
        parsed = parse_adapter(config, weights, self._layout, base)
        try:
            with target.open("xb") as file:
                index = assemble(parsed, file, self._layout.dtype)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return PackedDirectory(
            digest, parsed.modules, parsed.max_rank, parsed.traits, PackedFile(str(target), index)
        )

    def _snapshot(self, directory: Path) -> tuple[bytes, memoryview]:
        """The bytes of config and weights, read once: what is hashed is what is parsed."""
        if not directory.is_dir():
            raise AdapterNotFound(f"there is no directory {directory}")
        config = bytes(read_regular(directory / CONFIG, self._limits.config))
        return config, read_regular(find_weights(directory), self._limits.weights)
