"""Tensor names of adapter files: which module and side a key means, or why it cannot be served."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .layout import AdapterLayout

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FULL_WEIGHT = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.weight")

_REASONS: tuple[tuple[str, str], ...] = (
    (r"\.lora_embedding_[AB]", "LoRA on embeddings is not served yet"),
    (r"\.lora_magnitude_vector", "DoRA is not served yet"),
    (r"\.lora_B(\.[^.]+)?\.bias$", "biases of LoRA's own are not served yet"),
    (r"\.modules_to_save\.|\.original_module\.", "whole modules in place of the base's are not served yet"),
    (r"\.trainable_tokens_", "trained token embeddings are not served yet"),
    (r"\.lora_E(\.|$)|\.ranknum(\.|$)", "AdaLoRA is not served yet"),
    (r"\.lora_diag", "KaSA is not served"),
    (r"\.(hada_|lokr_|vera_|ia3_|oft_|boft_|randlora_|hra_)", "only LoRA is served"),
    (r"\.lora_[ab]$", "this is MLX's format; convert it to PEFT's"),
    (r"lora_unet_|\.lora_(down|up)\.", "this is a diffusion adapter's format"),
    (
        r"(linear_qkv|linear_fc[12]|\.adapter\.linear_(in|out))",
        "this is Megatron's format; export it to PEFT's",
    ),
    (r"\.bias$", "biases in place of the base's are not served yet"),
)


@dataclass(frozen=True, slots=True)
class LoraKey:
    """A tensor that is A or B of one base module."""

    module: str
    side: str
    """"A" or "B"."""
    adapter: str
    """The adapter's name inside the file, for example `default`; usually empty."""


def parse_lora_key(key: str) -> LoraKey | None:
    """Read `[base_model.model.]MODULE.lora_A[.NAME].weight`; None for any other key."""
    match = _LORA.fullmatch(key.removeprefix(_PREFIX))
    return LoraKey(match["module"], match["side"], match["adapter"] or "") if match else None


def full_weight_module(key: str) -> str | None:
    """The module whose whole weight this key holds (`MODULE.weight`, `MODULE.base_layer.weight`), if any."""
    match = _FULL_WEIGHT.fullmatch(key.removeprefix(_PREFIX))
    return match["module"] if match else None


def why_refused(key: str, layout: AdapterLayout) -> str:
    """Why a key that is not LoRA on one of the layout's targets cannot be served."""
    for pattern, reason in _REASONS:
        if re.search(pattern, key):
            return reason
    if lora := parse_lora_key(key):
        if lora.module in layout.other_modules:
            return "adapters on this kind of module are not served yet"
        return "the base has no such linear"
    if full_weight_module(key) is not None:
        return "whole weights in place of the base's are not served yet"
    return "not a LoRA tensor"
