"""What a shard refuses or fails with, and how each is said over gRPC.

ShardError
├── BadPlan              the router broke the contract; nothing was run
├── EpochEnded           a gap, a lost stream or a failed step; the group starts a new epoch
├── AdapterNotFound      no such repository, directory or downloaded digest
├── AdapterRejected      fetched, but cannot be served; says which tensor or field and why
├── AdapterFetchFailed   the source did not deliver; worth another try later
├── AdapterMemoryFull    the byte budget of the pool is used up
├── SlotBusy             the slot holds another adapter
├── ModelRefused         the base model cannot be served exactly; raised at start only
└── RanksLost            the other ranks did not come, or have gone; the process ends
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class ShardError(Exception):
    """Base of everything a shard says no with. `reason` travels in google.rpc.ErrorInfo."""

    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    reason: ClassVar[str] = "INTERNAL"


class BadPlan(ShardError):
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 500
    reason = "BAD_PLAN"


class EpochEnded(ShardError):
    grpc_code = grpc.StatusCode.ABORTED
    http_status = 503
    reason = "EPOCH_ENDED"


class AdapterNotFound(ShardError):
    grpc_code = grpc.StatusCode.NOT_FOUND
    http_status = 404
    reason = "ADAPTER_NOT_FOUND"


class AdapterRejected(ShardError):
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 422
    reason = "ADAPTER_REJECTED"


class AdapterFetchFailed(ShardError):
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 502
    reason = "ADAPTER_FETCH_FAILED"


class AdapterMemoryFull(ShardError):
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 503
    reason = "ADAPTER_MEMORY_FULL"


class SlotBusy(ShardError):
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 500
    reason = "SLOT_BUSY"


class ModelRefused(ShardError):
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 500
    reason = "MODEL_REFUSED"


class RanksLost(ShardError):
    grpc_code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    reason = "RANKS_LOST"
