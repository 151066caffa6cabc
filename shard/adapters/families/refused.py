"""The types of PEFT that are not served: why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

_MERGE = "merge it into its base with PEFT and serve the merged model"
_CONVERT = "convert it with peft.convert_to_lora, or merge it into its base"
_RETRAIN = "train it as LORA"

_PROMPT = ("it puts trained embeddings before the prompt", _RETRAIN)
_CACHE = ("it puts trained keys and values before the prompt", _RETRAIN)
_NOT_ADDED = ("it transforms the base's weights instead of adding to them", _MERGE)
_FULL_RANK = ("what it adds to a weight has that weight's full rank", _MERGE)
_OTHER_FORM = ("what it adds to a weight is low-rank, but not written as LoRA", _CONVERT)

_REASONS: dict[str, tuple[str, str]] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": _CACHE,
    "CARTRIDGE": _CACHE,
    "ADAPTION_PROMPT": ("LLaMA-Adapter adds trained prompts inside attention", _RETRAIN),
    "OFT": _NOT_ADDED,
    "BOFT": _NOT_ADDED,
    "HRA": _NOT_ADDED,
    "ROAD": _NOT_ADDED,
    "HIRA": _NOT_ADDED,
    "GLORA": _NOT_ADDED,
    "DEFT": _NOT_ADDED,
    "PEANUT": _NOT_ADDED,
    "OSF": _NOT_ADDED,
    "RANDLORA": _FULL_RANK,
    "FOURIERFT": _FULL_RANK,
    "C3A": _FULL_RANK,
    "SHIRA": _FULL_RANK,
    "WAVEFT": _FULL_RANK,
    "FROD": _FULL_RANK,
    "SUPERTUNING": _FULL_RANK,
    "ADAMSS": _FULL_RANK,
    "DELORA": _OTHER_FORM,
    "GRALORA": _OTHER_FORM,
    "VBLORA": _OTHER_FORM,
    "UNILORA": _OTHER_FORM,
    "TINYLORA": _OTHER_FORM,
    "PSOFT": _OTHER_FORM,
    "PVERA": ("it draws at random what it adds to a weight", "train it as VERA or LORA"),
    "BEFT": ("it trains biases only", "train it as LORA with bias"),
    "TRAINABLE_TOKENS": (
        "trained token embeddings are served as a part of LORA",
        "train it as LORA with trainable_token_indices",
    ),
    "XLORA": (
        "it weighs its LoRA adapters anew for every token",
        "name those adapters, with fixed weights, in the request instead",
    ),
    "POLY": ("it mixes its LoRA adapters by task", "train one LORA adapter for each task"),
    "LILY": ("it mixes shared matrices anew for every token", _RETRAIN),
    "SHADOW": ("it runs a network of its own beside the base", _RETRAIN),
    "BONE": (
        "PEFT has replaced this type by MISS",
        "convert it to MISS with PEFT's script for that, or train it as MISS or LORA",
    ),
}


def refusal(peft_type: str, served: Iterable[str]) -> str:
    """Why an adapter of this type is not served, and what to do instead. `served`: the types that are."""
    name = peft_type.upper()[:40]
    if name in _REASONS:
        reason, remedy = _REASONS[name]
        return f"peft_type {name} is not served: {reason}; {remedy}"
    return (
        f"peft_type {name!r} is not known here (served: {', '.join(sorted(served))}); {_MERGE}, or {_RETRAIN}"
    )
