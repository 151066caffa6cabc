"""The template worker: a child process that renders chat templates which nobody vouches for.

    python -m loraplex.router.template_worker

A line of JSON in, a line of JSON out. A template can take no more memory or time than this process, which
its parent replaces. Ends when its input does, or when a template takes too long.
"""

from __future__ import annotations

import resource
import signal
import sys
from functools import lru_cache
from typing import Any, BinaryIO, Final

import msgspec

from .chat_template import ChatTemplate
from .errors import InvalidRequest

MEMORY: Final = 1 << 30
"""Bytes of address space, the interpreter's own among them."""


class Conversation(msgspec.Struct):
    """What is to be rendered."""

    template: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    seconds: float
    """From the template's source to the text, after which this process ends."""


class Rendered(msgspec.Struct):
    """Its text, or why there is none."""

    text: str = ""
    refusal: str = ""


def serve(lines: BinaryIO, answers: BinaryIO) -> None:
    """Answer line by line until there are no more; the first line out only says that this process is up."""
    _answer(answers, Rendered())
    for line in lines:
        conversation = msgspec.json.decode(line, type=Conversation)
        signal.setitimer(signal.ITIMER_REAL, conversation.seconds)
        rendered = render(conversation)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answers, rendered)


def render(conversation: Conversation) -> Rendered:
    try:
        special_tokens = tuple(sorted(conversation.special_tokens.items()))
        template = _compiled(conversation.template, special_tokens)
        return Rendered(template.render(conversation.messages))
    except InvalidRequest as error:
        return Rendered(refusal=error.message)
    except ValueError as error:
        return Rendered(refusal=str(error))
    except (MemoryError, RecursionError, ArithmeticError):
        return Rendered(refusal="the chat template cannot be compiled")


@lru_cache(maxsize=64)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _answer(answers: BinaryIO, rendered: Rendered) -> None:
    answers.write(msgspec.json.encode(rendered) + b"\n")
    answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    serve(sys.stdin.buffer, sys.stdout.buffer)
