"""IA3: one trained vector a module, multiplied to its output or, in feed-forward modules, to its input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from ...errors import AdapterRejected
from ..changes import LinearChange, ParsedAdapter, Placed, Traits
from ..layout import AdapterLayout, Target
from ..matching import compile_regex
from ..tensors import Tensors
from .files import AdapterFiles
from .modules import KeyForm, ModuleTensors, expect_shape, modules_of
from .peft_fields import PeftFields, read_fields

_FORM = KeyForm("IA3", Target, ("ia3_l",))


class _Fields(PeftFields):
    feedforward_modules: str | list[str] | None = None


def read_ia3(files: AdapterFiles) -> ParsedAdapter:
    """Read an IA3 adapter.

    Raises AdapterRejected also where linears that share one input would each need an input of their own.
    """
    fields, warnings = read_fields(files.config, _Fields, ("init_ia3_weights",))
    modules = modules_of(files, _FORM, fields.selection())
    on_input = [module for module in modules if _is_on_input(module, fields)]
    names = {module.target.name for module in on_input}
    _check_shared_inputs(on_input, files.layout, files.tensors)
    placed = tuple(_placed(files.tensors, module, module.target.name in names) for module in modules)
    return ParsedAdapter(placed, Traits(kind="IA3", alone="IA3", warnings=warnings))


def _is_on_input(module: ModuleTensors[Target], fields: _Fields) -> bool:
    """As the config says; where it says nothing, as the tensor's shape does."""
    vector = module["ia3_l"]
    named = fields.feedforward_modules
    if named is None:
        return vector.shape == (1, module.target.in_features)
    if isinstance(named, str):
        regex = compile_regex("feedforward_modules", named, named)
        return re.fullmatch(regex, module.path) is not None
    # PEFT compares plain endings here, without a dot before them.
    return any(module.path.endswith(name) for name in named)


def _placed(tensors: Tensors, module: ModuleTensors[Target], on_input: bool) -> Placed:
    vector, target = module["ia3_l"], module.target
    if on_input:
        expect_shape(vector, 1, target.in_features)
        return Placed(target, 0, lambda: LinearChange(input_scale=tensors.read(vector.key)[0]))
    expect_shape(vector, target.out_features, 1)
    return Placed(target, 0, lambda: LinearChange(scale=tensors.read(vector.key)[:, 0]))


def _check_shared_inputs(
    on_input: Iterable[ModuleTensors[Target]], layout: AdapterLayout, tensors: Tensors
) -> None:
    """Linears that share an input are run on it together: all of them are given one vector, or none."""
    by_name = {module.target.name: module for module in on_input}
    for site in {module.target.site for module in by_name.values()}:
        together = [target.name for target in layout.linears if target.site == site]
        keys = [by_name[name]["ia3_l"].key for name in together if name in by_name]
        if len(keys) < len(together) or not _are_equal(keys, tensors):
            raise AdapterRejected(
                f"IA3 scales the input of {', '.join(keys)}, but {', '.join(together)} share one input here "
                "and would need one vector for all; train with feedforward_modules that have an input of "
                "their own (such as down_proj)"
            )


def _are_equal(keys: Sequence[str], tensors: Tensors) -> bool:
    return all(np.array_equal(tensors.read(key), tensors.read(keys[0])) for key in keys[1:])
