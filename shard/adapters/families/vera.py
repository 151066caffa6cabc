"""VeRA: one pair of random projections for all modules, and two trained vectors for each."""

from __future__ import annotations

import numpy as np

from ..changes import LinearChange, ParsedAdapter, Placed, Traits
from ..layout import Target
from .files import AdapterFiles
from .modules import KeyForm, ModuleTensors, expect_rank, expect_shape, modules_of
from .peft_fields import PeftFields, read_fields
from .vera_projections import KEYS, Projections, projections_of

_FORM = KeyForm("VeRA", Target, ("vera_lambda_b", "vera_lambda_d"), shared=KEYS)
_TRAINING = ("save_projection", "vera_dropout", "d_initial", "init_weights")
_DEFAULT_RANK = 256


class _Fields(PeftFields):
    r: int | None = None
    projection_prng_key: int | None = None


def read_vera(files: AdapterFiles) -> ParsedAdapter:
    """Read a VERA adapter as LoRA of its rank."""
    fields, warnings = read_fields(files.config, _Fields, _TRAINING)
    modules = modules_of(files, _FORM, fields.selection())
    rank = _DEFAULT_RANK if fields.r is None else fields.r
    expect_rank("the adapter", rank, files.layout.max_rank)
    targets = [module.target for module in modules]
    projections = projections_of(files.tensors, targets, rank, fields.projection_prng_key or 0)
    placed = tuple(_placed(files, module, projections, rank) for module in modules)
    return ParsedAdapter(placed, Traits(kind="VeRA as LoRA", warnings=warnings))


def _placed(
    files: AdapterFiles, module: ModuleTensors[Target], projections: Projections, rank: int
) -> Placed:
    target, tensors = module.target, files.tensors
    by_output, by_rank = module["vera_lambda_b"], module["vera_lambda_d"]
    expect_shape(by_output, target.out_features)
    expect_shape(by_rank, rank)

    def build() -> LinearChange:
        with np.errstate(over="ignore"):
            return LinearChange(
                a=projections.read_a()[:, : target.in_features] * tensors.read(by_rank.key)[:, None],
                b=projections.read_b()[: target.out_features] * tensors.read(by_output.key)[:, None],
            )

    return Placed(target, rank, build)
