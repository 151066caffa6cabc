"""Every way a request can end other than well, with its HTTP and gRPC status.

RouterError
├── RequestError             the caller's to mend
│   ├── InvalidRequest       400, names the field
│   ├── Unauthenticated      401
│   ├── AdapterNotFound      404, unknown and forbidden look the same
│   ├── PayloadTooLarge      413
│   ├── AdapterRejected      422, fetched but cannot be served
│   └── TooManyRequests      429, this caller's or this adapter's share is used up
└── ServiceError             ours or the world's; a retry may help
    ├── AdapterFetchFailed   502, the adapter's source did not deliver
    ├── Overloaded           503, every queue is full
    ├── Draining             503, the server is going down
    ├── ShardLost            503, the shard died after the first token
    ├── NumericalError       500, this row's logits were not finite
    └── InternalError        500
        └── RanksDiffer      the ranks of a group do not fit each other, or this router
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class RouterError(Exception):
    """Base of every typed error. `kind` and `code` go into OpenAI's error object.

    Args:
        message: one sentence for the caller: what is wrong and what to do about it.
        param: the request field at fault, if one is.
        retry_after: seconds after which another try makes sense, if it ever does.
    """

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class RequestError(RouterError):
    http_status = 400
    grpc_code = grpc.StatusCode.INVALID_ARGUMENT
    kind = "invalid_request_error"
    code = "invalid_request"


class InvalidRequest(RequestError):
    pass


class Unauthenticated(RequestError):
    http_status = 401
    grpc_code = grpc.StatusCode.UNAUTHENTICATED
    kind = "authentication_error"
    code = "invalid_api_key"


class AdapterNotFound(RequestError):
    http_status = 404
    grpc_code = grpc.StatusCode.NOT_FOUND
    code = "model_not_found"


class PayloadTooLarge(RequestError):
    http_status = 413
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    code = "payload_too_large"


class AdapterRejected(RequestError):
    http_status = 422
    grpc_code = grpc.StatusCode.FAILED_PRECONDITION
    code = "adapter_rejected"


class TooManyRequests(RequestError):
    http_status = 429
    grpc_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    kind = "rate_limit_error"
    code = "too_many_requests"


class ServiceError(RouterError):
    http_status = 503
    grpc_code = grpc.StatusCode.UNAVAILABLE
    kind = "service_unavailable"


class AdapterFetchFailed(ServiceError):
    http_status = 502
    code = "adapter_fetch_failed"


class Overloaded(ServiceError):
    code = "overloaded"


class Draining(ServiceError):
    code = "draining"


class ShardLost(ServiceError):
    code = "shard_lost"


class NumericalError(ServiceError):
    http_status = 500
    grpc_code = grpc.StatusCode.INTERNAL
    kind = "server_error"
    code = "numerical_error"


class InternalError(ServiceError):
    http_status = 500
    grpc_code = grpc.StatusCode.INTERNAL
    kind = "server_error"
    code = "internal_error"


class RanksDiffer(InternalError):
    """Seen when connecting. Another try cannot help unless somebody starts the ranks differently."""
