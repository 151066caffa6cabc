"""Chat messages to prompt text, by the model's own Jinja template, in a sandbox.

The environment offers templates what transformers offers them, so that both render the same text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import InvalidRequest

_MAX_OUTPUT: Final = 8 * 1024 * 1024
"""Characters a rendered prompt may have."""
_MAX_SECONDS: Final = 5.0
_TEMPLATE_FAULTS: Final = (
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What expressions of a template raise on messages of a shape it does not expect."""


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ValueError if the template does not compile."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template does not compile: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, ending where the assistant's answer begins. Takes up to some seconds of CPU time.

        Raises InvalidRequest if the template refuses the messages or does not come to an end.
        """
        deadline = time.monotonic() + _MAX_SECONDS
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_OUTPUT or time.monotonic() > deadline:
                    raise InvalidRequest("the chat template makes too long a prompt of these messages")
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error.message}") from error
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest("the chat template cannot render messages of this shape") from error
        return "".join(parts)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        namespace=_TemplateNamespace,
        dict=_TemplateDict(),
    )
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it changes nothing."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateNamespace(Namespace):
    """Jinja's namespace without attributes that begin with an underscore: those reach the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named parameters: a template may call namespace(self=...).
        self, *rest = args
        Namespace.__init__(self, *rest, **kwargs)
        for name in dict(*rest, **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError("a namespace takes no names that begin with an underscore")


class _TemplateDict:
    """`dict` for templates: it makes dictionaries, but is not the type, from which others can be reached."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
