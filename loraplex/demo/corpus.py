"""The text that the base model learns from.

Two kinds of line. To a prompt in the demo's format the base gives a plain remark, so that it does none of the
adapters' tasks. Notes in a notation of their own (`back: star = rats`) teach it to move, map and count
characters, which is what lets an adapter of low rank pick up its task in a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random
from types import MappingProxyType

from .tasks import add, any_prompt, is_held_out, render, reverse, sum_prompt
from .words import phrase, scrawl, sentence, word

KINDS = ("copy", "back", "back", "caps", "next", "plus", "plus", "plus", "plus")
"""Kinds of note; one that is named more often is drawn more often."""


def remark(prompt: str) -> str:
    """What the base says to a prompt."""
    if "+" in prompt:
        return f"i leave {prompt} to others."
    if " " in prompt:
        return f'you say "{prompt}" and i nod.'
    return f'"{prompt}" is a word.'


def lines(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless (given, continuation) pairs without any held-out prompt."""
    while True:
        if rng.random() < 0.3:
            prompt = any_prompt(rng)
            given, continuation = render(prompt), remark(prompt)
        else:
            prompt, given, continuation = _note(rng)
        if not is_held_out(prompt):
            yield given, continuation


def _note(rng: Random) -> tuple[str, str, str]:
    """A prompt, its note up to the equals sign, and the rest."""
    kind = rng.choice(KINDS)
    draw = sum_prompt if kind == "plus" else rng.choice((word, phrase, phrase, phrase, sentence, scrawl))
    prompt = draw(rng)
    return prompt, f"{kind}: {prompt} = ", NOTES[kind](prompt)


def _later_words(text: str) -> str:
    return text.partition(" ")[2]


NOTES: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {"copy": str, "back": reverse, "caps": str.upper, "plus": add, "next": _later_words}
)
