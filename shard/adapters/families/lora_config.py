"""`adapter_config.json`: read it, refuse by name what is not served, keep what decides rank and scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import AdapterRejected
from .matching import (
    ModuleFilter,
    PatternTable,
    Selection,
    layer_patterns,
    module_filter,
    pattern_table,
)

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
"""What PEFT takes where the config says nothing."""

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_CONVERT = "save it converted (path_initial_model_for_weight_conversion) or merge it into plain LoRA"
_MERGE = "merge it into plain LoRA weights first"
_RETRAIN = "train or export it without"

_REFUSED: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA is not served yet", _MERGE),
    "lora_bias": ("biases of LoRA's own are not served yet", f"{_RETRAIN} lora_bias"),
    "modules_to_save": (
        "whole modules in place of the base's are not served yet",
        f"{_RETRAIN} modules_to_save",
    ),
    "target_parameters": ("LoRA on expert parameters is not served yet", f"{_RETRAIN} target_parameters"),
    "trainable_token_indices": (
        "trained token embeddings are not served yet",
        f"{_RETRAIN} trainable_token_indices",
    ),
    "ensure_weight_tying": ("LoRA on tied embeddings is not served yet", f"{_RETRAIN} ensure_weight_tying"),
    "layer_replication": ("a base with replicated layers is not served", f"{_RETRAIN} layer_replication"),
    "alora_invocation_tokens": ("activated LoRA (aLoRA) is not served yet", f"{_RETRAIN} invocation tokens"),
    "use_qalora": ("QA-LoRA is not served yet", _MERGE),
    "use_bdlora": ("block-diagonal LoRA is not served yet", _MERGE),
    "kasa_config": ("KaSA edits the base's weights", _CONVERT),
    "arrow_config": ("Arrow routes between other adapters", "name those adapters in the request instead"),
    "enable_lora": ("grouped (merged-linear) LoRA is not served", "export it with a current version of PEFT"),
}
"""Fields that change the forward pass in a way that is not served, when set: reason and remedy."""

_INFORMATIONAL = frozenset(
    {
        "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version",
        "lora_dropout", "fan_in_fan_out", "merge_weights", "megatron_config", "megatron_core",
        "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "monteclora_config", "velora_config", "qalora_group_size",
    }
)  # fmt: skip
"""Fields that do not change the forward pass: how it was trained, or settled by another field."""


class _Fields(msgspec.Struct):
    """The fields that are used, typed. Any of them may be absent or null."""

    peft_type: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What a config decides: expected rank and scale of each module, and which modules it applies to."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    selection: Selection
    warnings: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.lookup(module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, with the module's own alpha and r."""
        rank = self.rank_of(module)
        return self.alpha_pattern.lookup(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def parse_config(data: bytes) -> LoraSpec:
    """Read `adapter_config.json`. Raises AdapterRejected naming the field, the reason and the remedy."""
    raw = _decode(data)
    _check_type(raw)
    fields = _convert(raw)
    _refuse_variants(raw, fields)
    rank = DEFAULT_RANK if fields.r is None else fields.r
    alpha = DEFAULT_ALPHA if fields.lora_alpha is None else fields.lora_alpha
    rank_patterns, alpha_patterns = fields.rank_pattern or {}, fields.alpha_pattern or {}
    for name, value in [
        ("r", rank),
        *((f"rank_pattern[{key!r}]", value) for key, value in rank_patterns.items()),
    ]:
        if value < 1:
            raise AdapterRejected(f"{name} is {value}; a rank is at least 1")
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        rslora=bool(fields.use_rslora),
        rank_pattern=pattern_table("rank_pattern", rank_patterns),
        alpha_pattern=pattern_table("alpha_pattern", alpha_patterns),
        selection=_selection(fields),
        warnings=_unknown_fields(raw),
    )


def _decode(data: bytes) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterRejected(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterRejected("adapter_config.json is not a JSON object")
    return raw


def _check_type(raw: Mapping[str, Any]) -> None:
    peft_type = raw.get("peft_type")
    if isinstance(peft_type, str) and peft_type.upper() == "LORA":
        return
    if peft_type is None and ("fine_tune_type" in raw or "lora_parameters" in raw):
        raise AdapterRejected("this is an MLX adapter, which is not served yet; convert it to PEFT's format")
    if peft_type is None:
        raise AdapterRejected("adapter_config.json has no peft_type; LORA is served")
    raise AdapterRejected(f"peft_type {str(peft_type)[:40]!r} is not served; convert it to LORA")


def _convert(raw: Mapping[str, Any]) -> _Fields:
    try:
        return msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise AdapterRejected(f"adapter_config.json: {error}") from error


def _refuse_variants(raw: Mapping[str, Any], fields: _Fields) -> None:
    for name, (reason, remedy) in _REFUSED.items():
        if raw.get(name):
            raise AdapterRejected(f"{name} is set: {reason}; {remedy}")
    if fields.bias not in (None, "none"):
        raise AdapterRejected(
            f"bias is {fields.bias!r}: biases in place of the base's are not served yet; {_RETRAIN} bias"
        )
    init = fields.init_lora_weights
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterRejected(
            f"init_lora_weights is {init[:40]!r}, which edits the base's weights; {_CONVERT}"
        )
    known = _INFORMATIONAL | _Fields.__annotations__.keys()
    for name, value in raw.items():
        if value and name not in known and (name.startswith("use_") or name.endswith("_config")):
            raise AdapterRejected(
                f"{name[:60]} is set and not known here; {_MERGE}, or remove it if it has no effect"
            )


def _unknown_fields(raw: Mapping[str, Any]) -> tuple[str, ...]:
    known = _INFORMATIONAL | _REFUSED.keys() | _Fields.__annotations__.keys()
    names = [repr(name[:60]) for name, value in raw.items() if value and name not in known]
    if not names:
        return ()
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (f"unknown fields of adapter_config.json were ignored: {', '.join(names[:5])}{more}",)


def _selection(fields: _Fields) -> Selection:
    layers = fields.layers_to_transform
    return Selection(
        targets=_targets(fields.target_modules),
        excluded=module_filter("exclude_modules", fields.exclude_modules) if fields.exclude_modules else None,
        layers=frozenset(() if layers is None else [layers] if isinstance(layers, int) else layers),
        layer_patterns=layer_patterns(fields.layers_pattern),
    )


def _targets(value: str | list[str] | None) -> ModuleFilter | None:
    # Absent: PEFT's choice for the architecture, which the tensors show as well.
    if value is None or (isinstance(value, str) and value.lower() == "all-linear"):
        return None
    return module_filter("target_modules", value)
