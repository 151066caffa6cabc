"""Errors as gRPC statuses: google.rpc.Status with ErrorInfo, BadRequest and RetryInfo."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from .errors import InternalError, RouterError

_log = logging.getLogger(__name__)

DOMAIN: Final = "loraplex"


@asynccontextmanager
async def answering_errors(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """The outermost edge of a call: what is raised inside ends it with a status. Bugs are logged."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except RouterError as error:
        await abort(context, error)
    except Exception as error:  # noqa: BLE001 - the process's edge: logged and typed
        incident = secrets.token_hex(12)
        _log.error("gRPC call %s failed unexpectedly", incident, exc_info=error)
        mistake = InternalError(f"The server made a mistake; its log has details under id {incident}.")
        await abort(context, mistake)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RouterError) -> None:
    """End the call with the error's status. Always raises."""
    status = rpc_status.to_status(error_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def error_status(error: RouterError) -> status_pb2.Status:
    """The rich form of a typed error."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN)]
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.param, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        details.append(retry)
    return status_pb2.Status(
        code=error.grpc_code.value[0], message=error.message, details=[_pack(detail) for detail in details]
    )


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
