"""A small S3 over HTTP, for `AWS_ENDPOINT_URL_S3`: objects from memory, faults on demand.

Answers HEAD and GET with path-style addresses, byte ranges and If-Match, to anyone who signs as its owner.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from .faulty import Fault, FaultyServer

_ERRORS = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange"}


@dataclass(frozen=True)
class _Object:
    data: bytes
    etag: str
    encryption: str


class FakeS3(FaultyServer):
    """Serves the objects that were put into it."""

    key_id = "AKIDEXAMPLE"
    """The only access key that may read."""

    def __init__(self) -> None:
        super().__init__(_handler(self))
        self.ranges: list[str] = []
        """The byte ranges that were asked for."""
        self._replacements: dict[str, bytes] = {}
        self._objects: dict[str, _Object] = {}

    def put(
        self, prefix: str, files: Mapping[str, bytes], *, parts: int = 0, encryption: str = "AES256"
    ) -> None:
        """Store files below `bucket/prefix`; `parts`: as an upload in so many parts, whose ETag is no MD5."""
        with self._lock:
            for name, data in files.items():
                etag = hashlib.md5(data).hexdigest() + (f"-{parts}" if parts else "")
                if encryption != "AES256":
                    etag = hashlib.md5(etag.encode()).hexdigest()
                self._objects[f"/{prefix}/{name}"] = _Object(data, f'"{etag}"', encryption)

    def replace_on_get(self, path: str, data: bytes) -> None:
        """Have an object replaced just before it is read the next time."""
        with self._lock:
            self._replacements[f"/{path}"] = data

    def begin(self, method: str, path: str, span: str) -> Fault | None:
        """As `note`; also keeps the byte range, and replaces the object if that is due."""
        replacement = self._replacements.pop(path, None) if method == "GET" else None
        if replacement is not None:
            prefix, _, name = path[1:].rpartition("/")
            self.put(prefix, {name: replacement})
        if span:
            self.ranges.append(span)
        return self.note(method, path)

    def find(self, path: str) -> _Object | None:
        with self._lock:
            return self._objects.get(path)


def _handler(s3: FakeS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            fault = s3.begin(self.command, path, self.headers.get("Range", ""))
            found = s3.find(path)
            if fault is not None and fault.status:
                self._refuse(fault.status)
            elif f"Credential={s3.key_id}/" not in self.headers.get("Authorization", ""):
                self._refuse(403)
            elif found is None or url.query:
                self._refuse(404)
            elif self.headers.get("If-Match", found.etag) != found.etag:
                self._refuse(412)
            else:
                self._send_object(found, fault or Fault("", 0))

        def _send_object(self, found: _Object, fault: Fault) -> None:
            body, status = found.data, 200
            headers = {"ETag": found.etag, "x-amz-server-side-encryption": found.encryption}
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                begin, status = int(match[1]), 206
                if begin >= len(body):
                    self._refuse(416)
                    return
                headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
                body = body[begin:]
            if fault.corrupt:
                body = bytes(byte ^ 0xFF for byte in body)
            self._send(status, body, headers, fault.cut_after)

        def _refuse(self, status: int) -> None:
            code = _ERRORS.get(status, "InternalError")
            body = (
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            )
            self._send(status, body, {"Content-Type": "application/xml"})

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str], cut_after: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body[:cut_after])
            if cut_after is not None:
                self.close_connection = True

    return Handler
