"""MiSS: inputs summed in groups, then one small matrix."""

from __future__ import annotations

import numpy as np

from ...errors import AdapterRejected
from ..changes import LinearChange, ParsedAdapter, Placed, Traits
from ..floats import Float32
from ..layout import Target
from .files import AdapterFiles
from .modules import KeyForm, ModuleTensors, expect_rank, expect_shape, modules_of
from .peft_fields import PeftFields, read_fields

_FORM = KeyForm("MiSS", Target, ("miss_block",))
_TRAINING = ("miss_dropout",)
_DEFAULT_RANK = 64


class _Fields(PeftFields):
    r: int | None = None
    mini_r: int | None = None
    init_weights: bool | str | None = None


def read_miss(files: AdapterFiles) -> ParsedAdapter:
    """Read a MISS adapter as LoRA of its rank.

    Raises AdapterRejected for the variant `bat`, whose change to a weight has that weight's full rank.
    """
    fields, warnings = read_fields(files.config, _Fields, _TRAINING)
    if fields.init_weights == "bat":
        raise AdapterRejected(
            "init_weights is 'bat', a variant of MiSS of full rank, which is not served; merge it into its "
            "base, or convert it with peft.convert_to_lora"
        )
    modules = modules_of(files, _FORM, fields.selection())
    placed = tuple(_placed(files, module, fields) for module in modules)
    return ParsedAdapter(placed, Traits(kind="MiSS as LoRA", warnings=warnings))


def _placed(files: AdapterFiles, module: ModuleTensors[Target], fields: _Fields) -> Placed:
    target, tensors, block = module.target, files.tensors, module["miss_block"]
    rank = _DEFAULT_RANK if fields.r is None else fields.r
    width = target.out_features
    if fields.init_weights == "mini":
        width = 1 if fields.mini_r is None else fields.mini_r
        if width < 1 or target.out_features % width:
            raise AdapterRejected(
                f"mini_r is {width}, which does not divide the {target.out_features} outputs of {target.name}"
            )
    expect_shape(block, rank, width)
    expect_rank(block.key, rank, files.layout.max_rank)

    def build() -> LinearChange:
        values = tensors.read(block.key)
        return LinearChange(
            a=_group_sums(rank, target.in_features),
            b=np.tile(values, (1, target.out_features // width)).T,
        )

    return Placed(target, rank, build)


def _group_sums(rank: int, in_features: int) -> Float32:
    """[rank, in]: row j adds up the inputs j, j + rank, j + 2 rank …"""
    groups = np.arange(in_features) % rank
    sums: Float32 = (groups == np.arange(rank)[:, None]).astype(np.float32)
    return sums
