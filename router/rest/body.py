"""Request bodies: read within bounds, decoded into structs, refused by the name of the field."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ..errors import InvalidRequest, PayloadTooLarge

_Body = TypeVar("_Body", bound=msgspec.Struct)
_PATH: Final = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)`$")


async def read_body(request: web.Request, body_type: type[_Body]) -> _Body:
    """The body as a struct. Unknown fields are ignored.

    Raises PayloadTooLarge, or InvalidRequest for what is not JSON or has a field of another type.
    """
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise PayloadTooLarge(
            f"The body is larger than {request.client_max_size} bytes: send less at once."
        ) from error
    except (HttpProcessingError, aiohttp.ClientPayloadError, web.RequestPayloadError) as error:
        raise InvalidRequest("The body cannot be read: its encoding is broken.") from error
    return decode_body(raw, body_type)


def decode_body(raw: bytes, body_type: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(raw, type=body_type)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not valid UTF-8.") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from error


def _wrong_field(message: str) -> InvalidRequest:
    """From msgspec's "Expected `int`, got `str` - at `$.n`"."""
    match = _PATH.search(message)
    path = match[1] if match else ""
    problem = message[: match.start()] if match else message
    if not path:
        return InvalidRequest(f"The body is malformed: {problem[0].lower()}{problem[1:]}")
    return InvalidRequest(f"{path}: {problem[0].lower()}{problem[1:]}", param=re.split(r"[.\[]", path)[0])
