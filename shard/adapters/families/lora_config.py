"""`adapter_config.json` of a LORA adapter: read it, refuse by name what is not served, keep what decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...errors import AdapterRejected
from ..matching import (
    ModuleFilter,
    PatternTable,
    Selection,
    layer_patterns,
    module_filter,
    pattern_table,
)

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
DEFAULT_QALORA_GROUP = 16
"""What PEFT takes where the config says nothing."""

_LARGEST_RANK = 2**20
_LARGEST_ALPHA = 1e30
_LARGEST_TOKEN = 2**31 - 1
"""Bounds that only a damaged config exceeds."""

_CONVERT = "save it converted (path_initial_model_for_weight_conversion) or merge it into plain LoRA"
_MERGE = "merge it into plain LoRA weights first"

_REFUSED: Mapping[str, tuple[str, str]] = {
    "layer_replication": (
        "it runs on a deeper model, made of the base's layers; that is not served",
        "merge it and the replicated base into a model of its own",
    ),
    "arrow_config": ("Arrow routes between other adapters", "name those adapters in the request instead"),
    "enable_lora": ("grouped (merged-linear) LoRA is not served", "export it with a current version of PEFT"),
}
"""Fields that change the forward pass in a way that is not served, when set: reason and remedy."""

_INFORMATIONAL = frozenset(
    {
        "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version",
        "lora_dropout", "fan_in_fan_out", "merge_weights", "megatron_config", "megatron_core",
        "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "monteclora_config", "velora_config",
    }
)  # fmt: skip
"""Fields that do not change the forward pass: how it was trained, or settled by other fields."""

_EXCLUSIVE = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "alora_invocation_tokens")

_PLAIN_INITS = frozenset({"", "true", "false", "gaussian", "orthogonal", "eva", "mica", "lora_ga"})
_RESIDUAL_INITS = {"pissa": "pissa", "olora": "olora"}
_KINDS = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}

_LORA_GA = (
    "it was trained with LoRA-GA, which changes the base's weights; served are A and B on the unchanged "
    "base, as PEFT loads it, and its answers may be poor: save it converted "
    "(path_initial_model_for_weight_conversion)"
)
_RANDOMISED = (
    "it was initialised with a randomised SVD (pissa_niter); the exact SVD is used, which differs slightly"
)


class _BlockDiagonal(msgspec.Struct):
    """`use_bdlora`. Which side has blocks is what the tensors show."""

    nblocks: int = 1


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
    use_dora: bool | None = None
    lora_bias: bool | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool | None = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool | None = None
    qalora_group_size: int | None = None
    use_bdlora: _BlockDiagonal | None = None
    kasa_config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """What a config decides: rank and scale of each module, which modules it applies to, the variant."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    selection: Selection
    kind: str
    warnings: tuple[str, ...]
    dora: bool
    lora_bias: bool
    residual: str
    """"pissa", "olora" or "kasa": A and B go with a base that lacks a part of its own. Else empty."""
    qalora_group: int
    """Columns of the base that share one column of A; 1 without QA-LoRA."""
    blocks: int
    """Blocks on the diagonal of A or B; 1 without BD-LoRA."""
    saved: tuple[str, ...]
    """`modules_to_save`: ends of the paths of modules that were trained as a whole."""
    tokens: Mapping[str, tuple[int, ...]]
    """Trained token rows: indices by the end of a module's path; "" stands for the embedding."""
    tied: bool
    """`ensure_weight_tying`: what is done to the embedding is done to a head that shares its weight."""
    invocation_tokens: tuple[int, ...]
    parameters: tuple[str, ...]
    """`target_parameters`: ends of the paths of experts' parameters."""

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.lookup(module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, with the module's own alpha and r."""
        rank = self.rank_of(module)
        return self.alpha_pattern.lookup(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module. PEFT compares ends, not whole segments."""
        return module.endswith(self.saved)


def parse_config(raw: Mapping[str, Any]) -> LoraSpec:
    """Read a decoded `adapter_config.json`. Raises AdapterRejected naming field, reason and remedy."""
    _refuse_variants(raw)
    fields = _convert(raw)
    _check_values(fields)
    residual, init_warnings = _initialisation(fields)
    return LoraSpec(
        rank=DEFAULT_RANK if fields.r is None else fields.r,
        alpha=DEFAULT_ALPHA if fields.lora_alpha is None else fields.lora_alpha,
        rslora=bool(fields.use_rslora),
        rank_pattern=pattern_table("rank_pattern", fields.rank_pattern),
        alpha_pattern=pattern_table("alpha_pattern", fields.alpha_pattern),
        selection=_selection(fields),
        kind=_kind(fields, residual),
        warnings=init_warnings + _unknown_fields(raw),
        dora=bool(fields.use_dora),
        lora_bias=bool(fields.lora_bias),
        residual=residual,
        qalora_group=(fields.qalora_group_size or DEFAULT_QALORA_GROUP) if fields.use_qalora else 1,
        blocks=fields.use_bdlora.nblocks if fields.use_bdlora else 1,
        saved=tuple(fields.modules_to_save or ()),
        tokens=_tokens(fields.trainable_token_indices),
        tied=bool(fields.ensure_weight_tying),
        invocation_tokens=tuple(fields.alora_invocation_tokens or ()),
        parameters=tuple(fields.target_parameters or ()),
    )


def _convert(raw: Mapping[str, Any]) -> _Fields:
    # A variant that is off may be written as false or as an empty container.
    known = {name: value for name, value in raw.items() if value or name not in ("use_bdlora", "kasa_config")}
    try:
        return msgspec.convert(known, _Fields)
    except msgspec.ValidationError as error:
        raise AdapterRejected(f"adapter_config.json: {error}") from error


def _refuse_variants(raw: Mapping[str, Any]) -> None:
    for name, (reason, remedy) in _REFUSED.items():
        if raw.get(name):
            raise AdapterRejected(f"{name} is set: {reason}; {remedy}")
    known = _INFORMATIONAL | _Fields.__annotations__.keys()
    for name, value in raw.items():
        if value and name not in known and (name.startswith("use_") or name.endswith("_config")):
            raise AdapterRejected(
                f"{name[:60]} is set and not known here; {_MERGE}, or remove it if it has no effect"
            )


def _check_values(fields: _Fields) -> None:
    ranks = {"r": fields.r, "qalora_group_size": fields.qalora_group_size}
    ranks |= {f"rank_pattern[{key!r}]": value for key, value in (fields.rank_pattern or {}).items()}
    if fields.use_bdlora:
        ranks["use_bdlora.nblocks"] = fields.use_bdlora.nblocks
    for name, value in ranks.items():
        if value is not None and not 1 <= value <= _LARGEST_RANK:
            raise AdapterRejected(
                f"{name} is {str(value)[:40]}; it is at least 1 and at most {_LARGEST_RANK}; "
                "correct adapter_config.json"
            )
    alphas = {"lora_alpha": fields.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": value for key, value in (fields.alpha_pattern or {}).items()}
    for name, alpha in alphas.items():
        if alpha is not None and abs(alpha) > _LARGEST_ALPHA:
            raise AdapterRejected(f"{name} is {alpha:g}, beyond any scale; correct adapter_config.json")
    if fields.bias not in (None, "none", "all", "lora_only"):
        raise AdapterRejected(f"bias is {fields.bias[:40]!r}; PEFT knows none, all and lora_only")
    _check_tokens("alora_invocation_tokens", fields.alora_invocation_tokens or ())
    _check_variants(fields)


def _check_tokens(name: str, tokens: Sequence[int]) -> None:
    if any(not 0 <= token <= _LARGEST_TOKEN for token in tokens):
        raise AdapterRejected(f"{name} has a number that is no token id; correct adapter_config.json")


def _check_variants(fields: _Fields) -> None:
    variants = [name for name in _EXCLUSIVE if getattr(fields, name)]
    if fields.use_dora and fields.lora_bias:
        variants.append("lora_bias")
    if len(variants) > 1:
        raise AdapterRejected(
            f"{' and '.join(variants)} are set at once, which PEFT does not combine; "
            "correct adapter_config.json"
        )


def _initialisation(fields: _Fields) -> tuple[str, tuple[str, ...]]:
    """Which part of the base A and B go without, and what to warn of."""
    if fields.kasa_config:
        return "kasa", ()
    init = fields.init_lora_weights
    name = "" if init is None else str(init).lower()
    if name in _PLAIN_INITS:
        return "", (_LORA_GA,) if name == "lora_ga" else ()
    if name.startswith("pissa_niter_"):
        return "pissa", (_RANDOMISED,)
    if name in _RESIDUAL_INITS:
        return _RESIDUAL_INITS[name], ()
    raise AdapterRejected(
        f"init_lora_weights is {name[:40]!r}, which changes the base's weights in a way that cannot be "
        f"repeated; {_CONVERT}"
    )


def _kind(fields: _Fields, residual: str) -> str:
    if fields.alora_invocation_tokens:
        return "aLoRA"
    if fields.use_dora:
        return "DoRA"
    if residual:
        return f"{_KINDS[residual]} as LoRA"
    if fields.use_qalora:
        return "QA-LoRA as LoRA"
    if fields.use_bdlora:
        return "BD-LoRA as LoRA"
    return "rsLoRA" if fields.use_rslora else "LoRA"


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


def _tokens(value: Sequence[int] | Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Raises AdapterRejected where an index is no token id or there twice."""
    tokens = dict(value) if isinstance(value, Mapping) else {"": value} if value else {}
    for indices in tokens.values():
        _check_tokens("trainable_token_indices", indices)
        if len(set(indices)) < len(indices):
            raise AdapterRejected("trainable_token_indices names a token twice; correct adapter_config.json")
    return {module: tuple(indices) for module, indices in tokens.items()}
