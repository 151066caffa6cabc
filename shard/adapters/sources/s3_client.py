"""Objects of S3, or of what speaks its protocol, through boto3: its errors turned into ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected
from .retry import TransientFailure

Result = TypeVar("Result")

_CHUNK = 1024 * 1024
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_DENIED_STATUS = frozenset({401, 403, 404})
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHANGED_STATUS = 412
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object as it was listed."""

    bucket: str
    key: str
    size: int
    etag: str
    """As the server says it, quotes included."""
    md5: str
    """Of its content, where the ETag is that; else empty."""

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


class S3Client:
    """Reads objects with the environment's credentials (`AWS_…`), at `AWS_ENDPOINT_URL_S3` if that is set.

    Every method raises AdapterFetchFailed for what will not pass by itself, TransientFailure for what may.
    """

    def __init__(self) -> None:
        """Raises AdapterRejected without boto3. Contacts nobody."""
        try:
            import boto3
            import botocore.config
        except ImportError as error:
            raise AdapterRejected(
                "adapters from S3 need boto3 on the server; install it with `pip install 'loraplex[s3]'`"
            ) from error
        # Retries are the caller's, so that they are bounded and reported like those of every source.
        config = botocore.config.Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": 1},
        )
        self._client: Any = _translated(lambda: boto3.session.Session().client("s3", config=config))

    @property
    def endpoint(self) -> str:
        return str(self._client.meta.endpoint_url)

    def head(self, bucket: str, key: str) -> S3Object | None:
        """What an object is; None if there is none, or none that the credentials open."""
        try:
            reply = _translated(lambda: self._client.head_object(Bucket=bucket, Key=key))
        except AdapterNotFound:
            return None
        return S3Object(bucket, key, reply["ContentLength"], reply["ETag"], _md5_of(bucket, reply))

    def read(self, wanted: S3Object, offset: int) -> tuple[int, Iterator[bytes]]:
        """Where the answer begins (`offset`, or where the server chose), and the content from there on.

        Raises AdapterFetchFailed where the object is no longer the one that was listed.
        """
        span = {"Range": f"bytes={offset}-"} if offset else {}
        asked = {"Bucket": wanted.bucket, "Key": wanted.key, "IfMatch": wanted.etag} | span
        reply = _translated(lambda: self._client.get_object(**asked))
        return (offset if "ContentRange" in reply else 0), _chunks(reply["Body"])


def _chunks(body: Any) -> Iterator[bytes]:
    with body:
        while chunk := _translated(lambda: body.read(_CHUNK)):
            yield chunk


def _md5_of(bucket: str, reply: Mapping[str, Any]) -> str:
    """The content's MD5 if the ETag is that: not of an upload in parts, of an object that is encrypted with
    a customer's key, or in a directory bucket."""
    etag = str(reply["ETag"]).strip('"').lower()
    encrypted = reply.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in reply
    is_md5 = _MD5.fullmatch(etag) is not None and not encrypted and not bucket.endswith("--x-s3")
    return etag if is_md5 else ""


def _translated(operation: Callable[[], Result]) -> Result:
    """Run one exchange, with the errors of botocore turned into ours."""
    from botocore import exceptions

    try:
        return operation()
    except exceptions.ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        raise _translate_status(status) from error
    except (
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
    ) as error:
        kind = type(error).__name__
        raise TransientFailure(AdapterFetchFailed(f"S3 did not deliver ({kind})")) from error
    except (exceptions.BotoCoreError, ValueError) as error:
        raise AdapterFetchFailed(
            f"S3 cannot be used as the server's environment has it ({type(error).__name__}); check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and AWS_ENDPOINT_URL_S3"
        ) from error


def _translate_status(status: int) -> Exception:
    if status in _DENIED_STATUS:
        return AdapterNotFound(
            f"S3 answered {status}: no such object, or the credentials of the environment do not open it"
        )
    if status == _CHANGED_STATUS:
        return AdapterFetchFailed("it changed while it was fetched; try again")
    failed = AdapterFetchFailed(f"S3 answered {status}")
    return TransientFailure(failed) if status in _TRANSIENT_STATUS else failed
