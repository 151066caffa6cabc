"""What a shard's refusal means: google.rpc.ErrorInfo's reason becomes one of the router's typed errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TypeVar

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from .errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    InternalError,
    Overloaded,
    RouterError,
    ShardLost,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class AdapterMemoryFull(Overloaded):
    """A shard has fewer adapter bytes left than the router counted."""


_REASONS: dict[str, type[RouterError]] = {
    "ADAPTER_NOT_FOUND": AdapterNotFound,
    "ADAPTER_REJECTED": AdapterRejected,
    "ADAPTER_FETCH_FAILED": AdapterFetchFailed,
    "ADAPTER_MEMORY_FULL": AdapterMemoryFull,
    "EPOCH_ENDED": ShardLost,
}

_LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def typed_error(error: grpc.aio.AioRpcError) -> RouterError:
    """What a shard's refusal means to a caller; a shard that does not answer is lost, the rest is a bug."""
    kind = _REASONS.get(_reason(error))
    if kind is not None:
        return kind(error.details() or "The shard gave no reason.")
    if error.code() in _LOST_CODES:
        return ShardLost("The model's process does not answer; it is being restarted.", retry_after=5.0)
    log.error("unexpected error from a shard: %s %s", error.code(), error.details())
    return InternalError("A shard refused a command of the router.")


def _reason(error: grpc.aio.AioRpcError) -> str:
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        return ""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            return str(info.reason)
    return ""


async def typed(call: Awaitable[_T]) -> _T:
    """Await a call to a shard; its RPC error becomes a typed one."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise typed_error(error) from error


def cause_of(error: RouterError) -> str:
    """One line for the operator: what gRPC says below a typed error; without gRPC, the error itself."""
    below = error.__cause__
    if not isinstance(below, grpc.aio.AioRpcError):
        return error.message
    return " ".join(f"{below.code().name}: {below.details()}".split())
