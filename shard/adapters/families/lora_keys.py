"""Tensor names of LORA adapters: which part of which module a key means, or why it means none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .names import PREFIX, BaseNames

A = "lora_A"
B = "lora_B"
B_BIAS = "lora_B.bias"
EMBEDDING_A = "lora_embedding_A"
EMBEDDING_B = "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
DIAGONAL = "lora_diag"
TOKENS = "trainable_tokens_delta"
WEIGHT = "weight"
BIAS = "bias"

LORA_PARTS = frozenset({A, B, B_BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, DIAGONAL})
"""Parts that LoRA adds to a module; any other is one of the module's own parameters, or rows of it."""

_NAME = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"
_ADDED = re.compile(
    rf"(?P<module>.+)\.(?:(?P<matrix>lora_[AB]){_NAME}\.(?P<parameter>weight|bias)"
    rf"|(?P<bare>lora_embedding_[AB]|lora_magnitude_vector|lora_diag|trainable_tokens_delta)"
    rf"{_NAME.replace('adapter', 'bare_adapter')}(?:\.weight)?)"
)
_SAVED = "modules_to_save"
_WRAPPERS = frozenset({"token_adapter", "base_layer", _SAVED})
_UNUSED = re.compile(r".*(\.original_module\..*|\.lora_monteclora_sampler\..*|\.lora_velora_embed(\..*)?)")
"""What a saved module replaced, and state of the training."""

_REASONS: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)(score|classifier|classification_head|qa_outputs)\.",
        "a classification head; only models that generate text are served",
    ),
    (r"(^|\.)v_head\.", "the value head of a training run; remove it"),
    (r"\.lora_E(\.|$)|\.ranknum(\.|$)", "AdaLoRA's, but peft_type says LORA; correct adapter_config.json"),
    (
        r"\.(hada_|lokr_|vera_|ia3_|oft_|boft_|randlora_|hra_|miss_)|(^|\.)(vera|randlora)_",
        "not LoRA's, but peft_type says LORA; correct adapter_config.json",
    ),
    (r"internal_xlora", "X-LoRA's router; name its adapters in the request instead"),
    (r"^blk\.\d+\.|\.weight\.lora_[ab]$", "llama.cpp's name for it; use the adapter it was converted from"),
    (r"\.lora_[ab](\.weight)?$", "MLX's name for it; convert it to PEFT's format"),
    (r"lora_unet_|lora_te\d?_|\.lora_(down|up)\.", "a diffusion adapter's name; serve it with its own kind"),
    (
        r"linear_qkv|linear_fc[12]|linear_proj|\.adapter\.linear_(in|out)",
        "Megatron's name for it; export it to PEFT's format",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraKey:
    """What a tensor's name says."""

    modules: tuple[str, ...]
    """The path of its module as the file has it; a second one where a segment may be an adapter's name."""
    part: str
    """One of LORA_PARTS, TOKENS, or the name of a parameter of the module itself."""
    adapter: str
    """The adapter's name inside the file, for example `default`; usually empty."""


def parse_key(key: str) -> LoraKey | None:
    """Read `[base_model.model.]MODULE.PART`; None for a name without a module."""
    path = key.removeprefix(PREFIX)
    if match := _ADDED.fullmatch(path):
        if bare := match["bare"]:
            modules = _unwrap(match["module"]) if bare == TOKENS else (match["module"],)
            return LoraKey(modules, bare, match["bare_adapter"] or "")
        part = match["matrix"] if match["parameter"] == "weight" else f"{match['matrix']}.bias"
        return LoraKey((match["module"],), part, match["adapter"] or "")
    module, _, parameter = path.rpartition(".")
    if not module:
        return None
    return LoraKey(_unwrap(module), parameter, "")


def is_unused(key: str) -> bool:
    """Whether a tensor of PEFT's takes no part in the forward pass."""
    return _UNUSED.fullmatch(key) is not None


def why_refused(key: str, names: BaseNames) -> str:
    """Why a key that names no part of a module of the base, or one that it cannot have, is not served."""
    for pattern, reason in _REASONS:
        if re.search(pattern, key):
            return reason
    parsed = parse_key(key)
    if parsed is None or (parsed.part not in LORA_PARTS | {TOKENS, WEIGHT, BIAS}):
        return "not a LoRA tensor"
    if any(names.find(module) is not None for module in parsed.modules):
        return f"{parsed.part} on this kind of module is not served"
    return names.why_unknown(parsed.modules[0])


def _unwrap(module: str) -> tuple[str, ...]:
    """A path without PEFT's wrappers. After `modules_to_save` may come an adapter's name."""
    segments = module.split(".")
    paths = [segments]
    if _SAVED in segments:
        after = segments.index(_SAVED) + 1
        paths.append(segments[:after] + segments[after + 1 :])
    plain = (".".join(segment for segment in path if segment not in _WRAPPERS) for path in paths)
    return tuple(dict.fromkeys(plain))
