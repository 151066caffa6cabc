"""AdaLoRA: LoRA whose factors meet in a vector of singular values, some of them pruned in training."""

from __future__ import annotations

import numpy as np

from ...errors import AdapterRejected
from ..changes import LinearChange, ParsedAdapter, Placed, Traits
from ..layout import Target
from .files import AdapterFiles
from .modules import KeyForm, ModuleTensors, expect_rank, expect_shape, modules_of
from .peft_fields import PeftFields, read_fields

_FORM = KeyForm("AdaLoRA", Target, ("lora_A", "lora_B", "lora_E"))
_DEFAULT_RANK = 12
_DEFAULT_ALPHA = 8
_PRUNED_PART = ".lora_E"
"""`rank_pattern` has the module's vector in its keys."""

_TRAINING = (
    "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "use_rslora", "alpha_pattern", "init_lora_weights", "lora_dropout", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
)  # fmt: skip
"""PEFT shares LORA's config with AdaLoRA but reads neither `r`, `use_rslora` nor `alpha_pattern`."""


class _Fields(PeftFields):
    init_r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, list[bool]] | None = None


def read_adalora(files: AdapterFiles) -> ParsedAdapter:
    """Read an ADALORA adapter as LoRA of the ranks that are left."""
    fields, warnings = read_fields(files.config, _Fields, _TRAINING)
    modules = modules_of(files, _FORM, fields.selection())
    kept = _kept_ranks(fields)
    placed = [
        placed
        for module in modules
        if (placed := _placed(files, module, fields, kept.get(module.path))) is not None
    ]
    if not placed:
        raise AdapterRejected(
            "training has pruned all of it (rank_pattern): it changes nothing; use the base"
        )
    return ParsedAdapter(tuple(placed), Traits(kind="AdaLoRA as LoRA", warnings=warnings))


def _kept_ranks(fields: _Fields) -> dict[str, int]:
    """The rank that pruning has left to each module that `rank_pattern` names."""
    ranks = {}
    for key, mask in (fields.rank_pattern or {}).items():
        module, found, _ = key.removeprefix("base_model.model.").rpartition(_PRUNED_PART)
        if not found:
            raise AdapterRejected(
                f"rank_pattern names {key[:200]!r}, which is no lora_E; save the adapter again"
            )
        ranks[module] = sum(mask)
    return ranks


def _placed(
    files: AdapterFiles, module: ModuleTensors[Target], fields: _Fields, kept: int | None
) -> Placed | None:
    """One module; None where pruning has left nothing of it."""
    initial = _DEFAULT_RANK if fields.init_r is None else fields.init_r
    rank = initial if kept is None else kept
    a, b, e = module["lora_A"], module["lora_B"], module["lora_E"]
    if kept == 0 and a.shape[:1] == e.shape[:1] == b.shape[1:2] == (0,):
        return None
    target, tensors = module.target, files.tensors
    expect_shape(a, rank, target.in_features)
    expect_shape(b, target.out_features, rank)
    expect_shape(e, rank, 1)
    expect_rank(a.key, rank, files.layout.max_rank)
    alpha = _DEFAULT_ALPHA if fields.lora_alpha is None else fields.lora_alpha
    # PEFT divides by the rank before pruning, plus a term that keeps it from zero.
    scale = np.float32((alpha if alpha > 0 else rank) / (initial + 1e-5))

    def build() -> LinearChange:
        with np.errstate(over="ignore"):
            values = tensors.read(e.key)[:, 0] * scale
            return LinearChange(a=tensors.read(a.key), b=tensors.read(b.key) * values)

    return Placed(target, rank, build)
