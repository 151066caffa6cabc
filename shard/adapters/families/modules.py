"""The tensors of an adapter by the base module they are for, or the reason why one cannot be applied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...errors import AdapterRejected
from ..layout import ModuleTarget, Target
from ..matching import Selection
from ..safetensors_header import TensorInfo
from .files import AdapterFiles
from .names import PREFIX, BaseNames

_KEYS_NAMED = 5
"""How many unusable keys an error lists."""
_REMEDY = "remove what does not belong to the adapter, or export it again for this base"

OneTarget = TypeVar("OneTarget", Target, ModuleTarget)


@dataclass(frozen=True, slots=True)
class KeyForm(Generic[OneTarget]):
    """How a family names its tensors: `[base_model.model.]MODULE.PART[.ADAPTER]`."""

    family: str
    """For messages, for example "LoHa"."""
    on: type[OneTarget]
    """The kind of module that it changes."""
    parts: tuple[str, ...]
    """Regular expressions, for example `hada_w1_a`."""
    shared: tuple[str, ...] = ()
    """Keys that belong to no module."""

    def parse(self, key: str) -> re.Match[str] | None:
        """Groups `module`, `part` and `adapter`; None for any other key."""
        pattern = rf"(?P<module>.+)\.(?P<part>{'|'.join(self.parts)})(?:\.(?P<adapter>[^.]+))?"
        return re.fullmatch(pattern, key.removeprefix(PREFIX))


@dataclass(frozen=True, slots=True)
class ModuleTensors(Generic[OneTarget]):
    """One module's tensors, by part."""

    target: OneTarget
    path: str
    """As the file names the module: what the config's patterns are matched with."""
    parts: Mapping[str, TensorInfo]

    def __getitem__(self, part: str) -> TensorInfo:
        """Raises AdapterRejected where the file lacks this part."""
        if part not in self.parts:
            key = next(iter(self.parts.values())).key
            raise AdapterRejected(f"{key} has no {part} beside it; save the adapter again")
        return self.parts[part]

    def __contains__(self, part: str) -> bool:
        return part in self.parts


def modules_of(
    files: AdapterFiles, form: KeyForm[OneTarget], selection: Selection
) -> list[ModuleTensors[OneTarget]]:
    """Every tensor but the shared ones in its module.

    At least one module. Raises AdapterRejected naming the keys that are not of this form, that the config
    does not select, or that are for no such module of the base.
    """
    names = BaseNames(files.layout)
    found: dict[str, tuple[OneTarget, str, dict[str, TensorInfo]]] = {}
    unusable: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for key, tensor in files.tensors.items():
        if key in form.shared:
            continue
        place = _place(key, form, selection, names)
        if isinstance(place, str):
            unusable[key] = place
            continue
        target, match = place
        adapters.setdefault(match["adapter"] or "", key)
        parts = found.setdefault(target.name, (target, match["module"], {}))[2]
        if other := parts.get(match["part"]):
            raise AdapterRejected(f"{key} and {other.key} mean the same tensor; keep one")
        parts[match["part"]] = tensor
    if unusable:
        raise AdapterRejected(describe_unusable(unusable, len(files.tensors)))
    if len(adapters) > 1:
        raise AdapterRejected(
            f"its weights file holds more than one adapter ({', '.join(adapters.values())}); "
            "save each to a directory of its own"
        )
    if not found:
        raise AdapterRejected(
            f"its weights file has {form.family} tensors for no module of the base; save the adapter again"
        )
    return [ModuleTensors(*module) for module in found.values()]


def describe_unusable(unusable: Mapping[str, str], total: int) -> str:
    """An error that names the first keys and why each cannot be applied."""
    listed = [f"{key[:200]} ({why})" for key, why in list(unusable.items())[:_KEYS_NAMED]]
    more = f"; and {len(unusable) - len(listed)} more" if len(unusable) > len(listed) else ""
    return f"{len(unusable)} of its {total} tensors cannot be applied: {'; '.join(listed)}{more}; {_REMEDY}"


def expect_shape(tensor: TensorInfo, *shape: int) -> None:
    """Raises AdapterRejected naming both shapes where the tensor has another one, or an empty one."""
    if tensor.shape != shape or 0 in shape:
        raise AdapterRejected(
            f"{tensor.key} has shape {list(tensor.shape)}; the base and the adapter's config need "
            f"{list(shape)}: it was made for another base, or saved incompletely"
        )


def expect_rank(key: str, rank: int, max_rank: int) -> None:
    """Raises AdapterRejected naming both where a rank is above what the server allows."""
    if rank > max_rank:
        raise AdapterRejected(
            f"{key} has rank {rank}; the server was started with --max-rank {max_rank}: raise it"
        )


def _place(
    key: str, form: KeyForm[OneTarget], selection: Selection, names: BaseNames
) -> tuple[OneTarget, re.Match[str]] | str:
    """Where a tensor belongs, or why nowhere."""
    match = form.parse(key)
    if match is None:
        return f"not a {form.family} tensor"
    target = names.find(match["module"])
    if target is None:
        return names.why_unknown(match["module"])
    if not isinstance(target, form.on):
        return f"{form.family} on this kind of module is not served"
    if not any(selection.selects(name) for name in (match["module"], target.name)):
        return "its config does not select this module (target_modules, layers, exclusions)"
    return target, match
