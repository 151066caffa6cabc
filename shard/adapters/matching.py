"""PEFT's rules for module names: which modules a config selects, which pattern a module falls under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import AdapterRejected

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class PatternTable(Generic[Value]):
    """`rank_pattern` or `alpha_pattern`: the first key that matches the end of a module path decides."""

    entries: tuple[tuple[re.Pattern[str], Value], ...]
    literal: Mapping[str, Value]

    def lookup(self, module: str, default: Value) -> Value:
        """The value for `module`, a path without `base_model.model.`."""
        for pattern, value in self.entries:
            if pattern.match(module):
                return value
        return self.literal.get(module, default)


def pattern_table(field: str, patterns: Mapping[str, Value] | None) -> PatternTable[Value]:
    """Compile the keys of `field`. Raises AdapterRejected where a key is no regular expression."""
    patterns = patterns or {}
    entries = tuple(
        (compile_regex(field, key, rf"(.*\.)?({key})$"), value) for key, value in patterns.items()
    )
    return PatternTable(entries, patterns)


@dataclass(frozen=True, slots=True)
class ModuleFilter:
    """A module list (exact path, or suffix after a dot) or one regular expression for the whole path."""

    names: frozenset[str]
    regex: re.Pattern[str] | None

    def matches(self, module: str) -> bool:
        if self.regex is not None:
            return self.regex.fullmatch(module) is not None
        return self.names_exactly(module) or any(module.endswith(f".{name}") for name in self.names)

    def names_exactly(self, module: str) -> bool:
        return module in self.names


def module_filter(field: str, value: str | list[str]) -> ModuleFilter:
    """Build a filter from a config field. Raises AdapterRejected where it is no regular expression."""
    if isinstance(value, str):
        return ModuleFilter(frozenset(), compile_regex(field, value, value))
    return ModuleFilter(frozenset(value), None)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules an adapter's config applies to. What it does not select, PEFT ignores in silence."""

    targets: ModuleFilter | None
    """None: every module."""
    excluded: ModuleFilter | None
    layers: frozenset[int]
    """Layer indices; empty: every layer."""
    layer_patterns: tuple[re.Pattern[str], ...]

    def selects(self, module: str) -> bool:
        if self.excluded is not None and self.excluded.matches(module):
            return False
        if self.targets is None:
            return True
        if self.targets.regex is not None or self.targets.names_exactly(module):
            # The layer filter applies to names found by suffix only.
            return self.targets.matches(module)
        return self.targets.matches(module) and self._in_selected_layer(module)

    def _in_selected_layer(self, module: str) -> bool:
        if not self.layers:
            return True
        for pattern in self.layer_patterns:
            if match := pattern.match(module):
                return int(match["layer"]) in self.layers
        return False


def layer_patterns(value: str | list[str] | None) -> tuple[re.Pattern[str], ...]:
    """`layers_pattern` as expressions whose group `layer` is the layer's index."""
    if not value:
        return (re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\."),)
    names = [value] if isinstance(value, str) else value
    return tuple(compile_regex("layers_pattern", name, rf".*?\.{name}\.(?P<layer>\d+)\.") for name in names)


def compile_regex(field: str, given: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterRejected(
            f"{field}: {given[:100]!r} is not a regular expression ({error}); correct adapter_config.json"
        ) from error
