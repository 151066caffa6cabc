"""`adapter_config.json` of PEFT's families other than LORA: typed fields, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from ...errors import AdapterRejected
from ..matching import Selection, layer_patterns, module_filter

_REFUSED = {
    "modules_to_save": "whole modules in place of the base's are served with LORA only",
    "trainable_token_indices": "trained token embeddings are served with LORA only",
    "target_parameters": "adapters on expert parameters are served with LORA only",
    "alora_invocation_tokens": "invocation tokens are served with LORA only",
    "layer_replication": "a base with replicated layers is not served",
}
"""Fields of any family that change the forward pass, when set."""

_INFORMATIONAL = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
        "peft_version", "fan_in_fan_out",
    }
)  # fmt: skip
"""Fields of any family that do not change the forward pass, or that the base's layout settles."""

_NAMED = 5
"""How many unknown fields a warning lists."""


class PeftFields(msgspec.Struct):
    """What every family's config may have. Any field may be absent or null."""

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str | None = None

    def selection(self) -> Selection:
        """The modules that this config applies to."""
        targets = self.target_modules
        # Absent: PEFT's choice for the architecture, which the tensors show as well.
        everything = targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")
        layers = self.layers_to_transform
        return Selection(
            targets=None if everything or targets is None else module_filter("target_modules", targets),
            excluded=module_filter("exclude_modules", self.exclude_modules) if self.exclude_modules else None,
            layers=frozenset(() if layers is None else [layers] if isinstance(layers, int) else layers),
            layer_patterns=layer_patterns(self.layers_pattern),
        )


Fields = TypeVar("Fields", bound=PeftFields)


def read_fields(
    raw: Mapping[str, Any], fields: type[Fields], training: Iterable[str]
) -> tuple[Fields, tuple[str, ...]]:
    """The typed fields of a decoded config, and warnings for the user.

    `training`: names of the family's fields that do not change the forward pass. Raises AdapterRejected
    naming a field that does and that is not served, or that has the wrong type.
    """
    for name, reason in _REFUSED.items():
        if raw.get(name):
            raise AdapterRejected(f"{name} is set: {reason}; train or export the adapter without it")
    try:
        typed = msgspec.convert(raw, fields)
    except msgspec.ValidationError as error:
        raise AdapterRejected(f"adapter_config.json: {error}") from error
    if typed.bias not in (None, "none"):
        raise AdapterRejected(
            f"bias is {typed.bias[:40]!r}: trained biases are served with LORA only; train or export the "
            "adapter without them"
        )
    known = {*fields.__struct_fields__, *training, *_INFORMATIONAL, *_REFUSED}
    return typed, _unknown([name for name, value in raw.items() if value and name not in known])


def _unknown(names: list[str]) -> tuple[str, ...]:
    for name in names:
        if name.startswith("use_") or name.endswith("_config"):
            raise AdapterRejected(
                f"{name[:60]} is set and not known here; merge the adapter into its base, "
                "or remove the field if it has no effect"
            )
    if not names:
        return ()
    listed = ", ".join(repr(name[:60]) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (f"unknown fields of adapter_config.json were ignored: {listed}{more}",)
