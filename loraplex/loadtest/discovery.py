"""Ask a server which of its models is the base."""

from __future__ import annotations

from typing import Any

import aiohttp

from ..adapter_tools.errors import REFUSED, ToolFailed
from ..adapter_tools.text import printable
from .naming import ByModel, ByScale, Naming
from .plan import Target


async def naming_of(session: aiohttp.ClientSession, target: Target) -> Naming:
    """How to name adapters and base there. Raises ToolFailed where nobody answers, or names no base."""
    listed = await _models(session, target)
    base = target.model or next(
        (str(model["id"]) for model in listed if "id" in model and not model.get("parent")), None
    )
    if base is None:
        raise ToolFailed(
            REFUSED, f"{target.url}/v1/models lists no base model; name it: --model {target.name}=MODEL"
        )
    if target.style == "llama.cpp":
        return ByScale(base, len(target.adapters))
    return ByModel(base, target.adapters)


async def _models(session: aiohttp.ClientSession, target: Target) -> list[dict[str, Any]]:
    """The entries of the server's list of models; none where it has no list and the base is named anyway."""
    url = f"{target.url}/v1/models"
    try:
        async with session.get(url) as response:
            if response.status != 200:
                if target.model:
                    return []
                raise ToolFailed(
                    REFUSED, f"{url} answers HTTP {response.status}: {_short(await response.text())}"
                )
            content = await response.json(content_type=None)
    except aiohttp.ClientConnectorError as error:
        raise ToolFailed(REFUSED, f"no server answers at {target.url} ({error.strerror})") from error
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise ToolFailed(
            REFUSED, f"{url} broke off ({_short(str(error)) or type(error).__name__})"
        ) from error
    entries = content.get("data") if isinstance(content, dict) else None
    return [entry for entry in entries or () if isinstance(entry, dict)]


def _short(text: str) -> str:
    return printable(text).strip()[:200]
