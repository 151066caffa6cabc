"""From an adapter's files to changes of the base: the family's reader is found and does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import AdapterRejected
from .base_weights import BaseWeights
from .changes import ParsedAdapter
from .families.adalora import read_adalora
from .families.files import AdapterFiles, Reader
from .families.ia3 import read_ia3
from .families.ln_tuning import read_ln_tuning
from .families.loha import read_loha
from .families.lokr import read_lokr
from .families.lora import read_lora
from .families.miss import read_miss
from .families.mlx import read_mlx
from .families.refused import refusal
from .families.vera import read_vera
from .layout import AdapterLayout
from .tensors import Tensors

READERS: Mapping[str, Reader] = {
    "LORA": read_lora,
    "ADALORA": read_adalora,
    "VERA": read_vera,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "MISS": read_miss,
    "IA3": read_ia3,
    "LN_TUNING": read_ln_tuning,
}
"""By `peft_type`, upper case."""

_MLX_FIELDS = frozenset({"fine_tune_type", "lora_parameters"})


def parse_adapter(
    config: bytes, weights: memoryview, layout: AdapterLayout, base: BaseWeights
) -> ParsedAdapter:
    """Place every tensor of an adapter. Raises AdapterRejected naming what is wrong and what to do."""
    raw = decode_config(config)
    reader = find_reader(raw)
    tensors = Tensors(weights)
    if not tensors:
        raise AdapterRejected("its weights file holds no tensors; save the adapter again, from all processes")
    return reader(AdapterFiles(raw, tensors, layout, base))


def decode_config(data: bytes) -> dict[str, Any]:
    """`adapter_config.json` as an object. Raises AdapterRejected where it is none."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterRejected(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterRejected("adapter_config.json is not a JSON object")
    return raw


def find_reader(raw: Mapping[str, Any]) -> Reader:
    """The reader of an adapter with this config. Raises AdapterRejected where its type is not served."""
    peft_type = raw.get("peft_type")
    if peft_type is None and not _MLX_FIELDS.isdisjoint(raw):
        return read_mlx
    if peft_type is None:
        raise AdapterRejected(
            f"adapter_config.json has no peft_type; served are {', '.join(READERS)}: "
            "save the adapter with PEFT, or add the type it was trained as"
        )
    reader = READERS.get(str(peft_type).upper())
    if reader is None:
        raise AdapterRejected(refusal(str(peft_type), READERS))
    return reader
