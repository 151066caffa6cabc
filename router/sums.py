"""Which adapters may serve one request together, and where in its prompt each begins."""

from __future__ import annotations

from collections.abc import Sequence

from .client import PreparedAdapter
from .errors import InvalidRequest
from .request import AdapterUse


def check_sum(adapters: Sequence[PreparedAdapter], param: str) -> None:
    """Raises InvalidRequest, naming the adapters, for a sum or a weight that cannot be served."""
    owners: dict[str, str] = {}
    for adapter in adapters:
        manifest = adapter.manifest
        if manifest.alone and len(adapters) > 1:
            others = ", ".join(other.name for other in adapters if other is not adapter)
            raise InvalidRequest(
                f"{adapter.name} ({manifest.alone}) cannot be summed with {others}: use it alone", param=param
            )
        if manifest.alone and adapter.weight != 1:
            raise InvalidRequest(
                f"{adapter.name} ({manifest.alone}) takes no weight but 1, not {adapter.weight:g}",
                param=param,
            )
        for module in manifest.owns:
            first = owners.setdefault(module, adapter.name)
            if first != adapter.name:
                raise InvalidRequest(
                    f"{first} and {adapter.name} both replace {module}: a sum may hold only one of them",
                    param=param,
                )


def check_parts(parts: Sequence[PreparedAdapter], param: str = "adapters") -> None:
    """Raises InvalidRequest, naming it, for an adapter whose effect a merge cannot carry."""
    for part in parts:
        if part.manifest.alone:
            raise InvalidRequest(
                f"{part.name} ({part.manifest.alone}) cannot be merged: use it alone", param=param
            )
        if part.manifest.invocation_tokens:
            raise InvalidRequest(
                f"{part.name} applies from its invocation tokens on only, so it cannot be merged", param=param
            )


def uses_in(prompt: Sequence[int], adapters: Sequence[PreparedAdapter]) -> tuple[AdapterUse, ...]:
    """What of these adapters applies to a prompt, and from which position. One whose invocation tokens the
    prompt does not hold does not apply at all."""
    uses = []
    for adapter in adapters:
        invocation = adapter.manifest.invocation_tokens
        start = last_occurrence(prompt, invocation) if invocation else 0
        if start is not None:
            uses.append(AdapterUse(adapter.key, adapter.weight, start))
    return tuple(uses)


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted`, which is not empty, begins for the last time; None if it does not occur."""
    found, first = list(wanted), wanted[0]
    for start in range(len(tokens) - len(found), -1, -1):
        if tokens[start] == first and list(tokens[start : start + len(found)]) == found:
            return start
    return None
