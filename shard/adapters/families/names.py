"""Finding the base's modules under whatever names an adapter's file has for them."""

from __future__ import annotations

from collections.abc import Mapping

from ..changes import AnyTarget
from ..layout import AdapterLayout

PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""

_TEXT_MODEL = frozenset({"base_model", "model", "language_model", "text_model"})
"""Leading segments that lead to the text model, in an order that differs between releases of transformers."""
_OLD_EXPERTS, _EXPERTS = ".block_sparse_moe.", ".mlp."
"""Where older transformers had the routers and experts of some models, and where they are."""
_TOWERS = frozenset(
    {
        "vision_tower", "vision_model", "vision_encoder", "vision", "visual", "image_encoder", "embed_vision",
        "audio_tower", "audio_model", "audio_encoder", "embed_audio", "multi_modal_projector", "mm_projector",
    }
)  # fmt: skip


class BaseNames:
    """What an adapter can change in the base, by name."""

    def __init__(self, layout: AdapterLayout) -> None:
        targets: tuple[AnyTarget, ...] = (
            *layout.aliases,
            *layout.linears,
            *layout.embeddings,
            *layout.modules,
            *layout.experts,
        )
        self._targets: dict[str, AnyTarget] = {target.name: target for target in targets}
        self._by_text_name = _by_text_name(self._targets)
        self._others = frozenset(layout.other_modules)

    def find(self, module: str) -> AnyTarget | None:
        """The target that a path means: of this very name, or else of this name within the text model."""
        exact = self._targets.get(module)
        return exact or self._by_text_name.get(_text_name(module.replace(_OLD_EXPERTS, _EXPERTS)))

    def why_unknown(self, module: str) -> str:
        """Why `find` finds nothing there."""
        if module in self._others:
            return "adapters on this kind of module are not served; train without it"
        return "the base has no such module; the adapter was made for another model"

    def in_other_tower(self, module: str) -> bool:
        """Whether a path leads into a vision or audio model, which text never reaches."""
        return not _TOWERS.isdisjoint(module.split(".")) and module not in self._targets


def _by_text_name(targets: Mapping[str, AnyTarget]) -> dict[str, AnyTarget]:
    """Targets by their name within the text model, where only one has it."""
    found: dict[str, list[AnyTarget]] = {}
    for name, target in targets.items():
        found.setdefault(_text_name(name), []).append(target)
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def _text_name(module: str) -> str:
    segments = module.split(".")
    start = 0
    while start < len(segments) - 1 and segments[start] in _TEXT_MODEL:
        start += 1
    return ".".join(segments[start:])
