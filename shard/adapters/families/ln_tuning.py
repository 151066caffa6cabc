"""LN tuning: norms with trained parameters of their own."""

from __future__ import annotations

from ..changes import ModuleChange, ParsedAdapter, Placed, Traits
from ..layout import ModuleTarget
from .files import AdapterFiles
from .modules import KeyForm, ModuleTensors, expect_shape, modules_of
from .peft_fields import PeftFields, read_fields

_LAYERS = "ln_tuning_layers"


def read_ln_tuning(files: AdapterFiles) -> ParsedAdapter:
    """Read an LN_TUNING adapter. Raises AdapterRejected also where a norm is there in part only."""
    fields, warnings = read_fields(files.config, PeftFields, ())
    names = sorted({name for target in files.layout.modules for name, _ in target.parameters})
    # The adapter's name, where there is one, stands before the parameter's.
    form = KeyForm("LN tuning", ModuleTarget, (rf"{_LAYERS}(?:\.[^.]+)?\.(?:{'|'.join(names)})",))
    modules = modules_of(files, form, fields.selection())
    placed = tuple(_placed(files, module) for module in modules)
    return ParsedAdapter(placed, Traits(kind="LN tuning", alone="LN tuning", warnings=warnings))


def _placed(files: AdapterFiles, module: ModuleTensors[ModuleTarget]) -> Placed:
    given = {part.rpartition(".")[2]: tensor for part, tensor in module.parts.items()}
    by_name = ModuleTensors(module.target, module.path, given)
    keys = {}
    for name, shape in module.target.parameters:
        expect_shape(by_name[name], *shape)
        keys[name] = by_name[name].key

    def build() -> ModuleChange:
        return ModuleChange({name: files.tensors.read(key) for name, key in keys.items()})

    return Placed(module.target, 0, build)
