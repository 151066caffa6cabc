"""From the engine's tokens to what a caller is shown: text, without eos and cut before a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .detokenizer import IncrementalDetokenizer
from .request import FinishReason, TokenEvent, TokenLogprobs


@dataclass(slots=True)
class TextEvent:
    """What one token adds to a choice. The last event of a choice has `finish`."""

    index: int
    text: str = ""
    token: int | None = None
    """None where text comes late, after its token, and for prompt logprobs."""
    logprobs: TokenLogprobs | None = None
    offset: int = 0
    """Characters of this choice's text before this token."""
    hidden: bool = False
    """The token only ended the choice: it is neither in its text nor in its usage."""
    finish: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or the stop id that ended the choice."""
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None


class StopStrings:
    """Finds the first of several strings in text that comes in pieces."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(dict.fromkeys(strings))
        self._first = frozenset(string[0] for string in self._strings)
        self._longest = max(map(len, self._strings), default=0)

    def __bool__(self) -> bool:
        return bool(self._strings)

    def find(self, text: str) -> tuple[int, str] | None:
        """Where the leftmost stop string begins, and which it is."""
        found = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        return min(found, key=lambda match: match[0], default=None)

    def safe_length(self, text: str) -> int:
        """How many characters of a text without stop strings cannot become part of one, whatever follows."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first and any(string.startswith(text[at:]) for string in self._strings):
                return at
        return len(text)


@dataclass(slots=True)
class _Held:
    """A token some of whose text may yet turn out to belong to a stop string."""

    token: int
    logprobs: TokenLogprobs | None
    start: int
    """Where its text begins in the held text."""


class Choice:
    """The state of one sequence on its way to the caller.

    Args:
        stop_ids: ids that end the sequence and are not shown.
        min_tokens: stop strings that end before this many tokens do not count.
        scoring: only the prompt is wanted: the one token that the engine must sample is not shown.
    """

    __slots__ = (
        "_detokenizer",
        "_held",
        "_held_text",
        "_length",
        "_min_tokens",
        "_sampled",
        "_scoring",
        "_stop_ids",
        "_stops",
        "done",
        "index",
        "tokens",
    )

    def __init__(
        self,
        index: int,
        detokenizer: IncrementalDetokenizer,
        *,
        stops: StopStrings,
        stop_ids: frozenset[int],
        min_tokens: int = 0,
        scoring: bool = False,
    ) -> None:
        self.index = index
        self.tokens = 0
        """Tokens shown so far: what is billed."""
        self.done = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._scoring = scoring
        self._sampled = 0
        self._length = 0
        self._held_text = ""
        self._held: list[_Held] = []

    def feed(self, event: TokenEvent) -> list[TextEvent]:
        """What an engine event lets the caller see, maybe nothing yet. `done` once that is the last."""
        out: list[TextEvent] = []
        if event.prompt_logprobs is not None:
            out.append(TextEvent(self.index, prompt_logprobs=event.prompt_logprobs))
        if self._scoring:
            if event.finish is not None:
                self._finish(out, FinishReason.LENGTH)
            return out
        logprobs = event.logprobs
        for position, token in enumerate(event.tokens):
            if self.done:
                return out
            ends = event.finish is FinishReason.STOP and position == len(event.tokens) - 1
            token_logprobs = logprobs[position] if logprobs else None
            if ends and token in self._stop_ids:
                self._finish(out, FinishReason.STOP, token=token, logprobs=token_logprobs)
            elif self._stops:
                self._hold(out, token, token_logprobs)
            else:
                self._show(out, token, token_logprobs)
        if event.finish is not None and not self.done:
            self._finish(out, event.finish)
        return out

    def _show(self, out: list[TextEvent], token: int, logprobs: TokenLogprobs | None) -> None:
        text = self._detokenizer.step(token)
        out.append(TextEvent(self.index, text, token, logprobs, self._length))
        self._length += len(text)
        self.tokens += 1

    def _hold(self, out: list[TextEvent], token: int, logprobs: TokenLogprobs | None) -> None:
        """Take a token in, look for stop strings, and show what is certain not to begin one."""
        self._held.append(_Held(token, logprobs, len(self._held_text)))
        self._held_text += self._detokenizer.step(token)
        self._sampled += 1
        if self._sampled < self._min_tokens:
            self._release(out, len(self._held_text))
        elif (match := self._stops.find(self._held_text)) is not None:
            self._cut(out, *match)
        else:
            self._release(out, self._stops.safe_length(self._held_text))

    def _release(self, out: list[TextEvent], length: int) -> None:
        """Show the first `length` held characters, and every token whose text begins among them."""
        everything = length == len(self._held_text)
        shown = [held for held in self._held if everything or held.start < length]
        text, self._held_text = self._held_text[:length], self._held_text[length:]
        if text and (not shown or shown[0].start > 0):
            late = text[: shown[0].start] if shown else text
            out.append(TextEvent(self.index, late, offset=self._length))
        ends = [held.start for held in shown[1:]] + [length]
        for held, end in zip(shown, ends, strict=False):
            offset = self._length + held.start
            out.append(TextEvent(self.index, text[held.start : end], held.token, held.logprobs, offset))
        self._held = [_Held(h.token, h.logprobs, h.start - length) for h in self._held[len(shown) :]]
        self._length += length
        self.tokens += len(shown)

    def _cut(self, out: list[TextEvent], at: int, stop: str) -> None:
        """End the choice before the stop string that begins at held character `at`."""
        last = self._held[-1]
        self._held = [held for held in self._held if held.start < at]
        self._held_text = self._held_text[:at]
        shows_last = bool(self._held) and self._held[-1] is last
        self._release(out, at)
        if shows_last:
            self._end(out, FinishReason.STOP, stop=stop)
        else:
            self._end(out, FinishReason.STOP, stop=stop, token=last.token, logprobs=last.logprobs)

    def _finish(
        self,
        out: list[TextEvent],
        reason: FinishReason,
        *,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """The engine ended the sequence, perhaps with a token that is not shown: show all that was held."""
        self._held_text += self._detokenizer.flush()
        self._release(out, len(self._held_text))
        self._end(out, reason, stop=token, token=token, logprobs=logprobs)

    def _end(
        self,
        out: list[TextEvent],
        reason: FinishReason,
        *,
        stop: str | int | None,
        token: int | None = None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Make the last event: one of its own for a hidden token, else the last that is about to be sent."""
        if token is not None or not out:
            hidden = token is not None
            out.append(TextEvent(self.index, "", token, logprobs, self._length, hidden=hidden))
        out[-1].finish = reason
        out[-1].stop = stop
        self.done = True
