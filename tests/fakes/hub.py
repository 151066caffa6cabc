"""A small Hugging Face hub over HTTP, for `HF_ENDPOINT`: repositories from memory, faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .faulty import Fault, FaultyServer

LARGE_FILE_SUFFIXES = (".safetensors", ".bin")
"""Files that the hub keeps as LFS objects, identified by SHA-256."""

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def checksum(name: str, data: bytes) -> str:
    """What the hub identifies a file by: SHA-256 if it is large, git's blob id if not."""
    if name.endswith(LARGE_FILE_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class _Repo:
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str = ""
    """Who does not show it gets 401."""


class FakeHub(FaultyServer):
    """Serves what was added to it, as the hub would."""

    def __init__(self) -> None:
        super().__init__(_handler(self))
        self._repos: dict[str, _Repo] = {}

    def add(
        self, repo: str, files: Mapping[str, bytes] | Path, *, revision: str = "main", token: str = ""
    ) -> str:
        """Commit files (a mapping, or a directory's) to a repository. Returns the commit."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        listing = "".join(f"{name}:{checksum(name, data)}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        with self._lock:
            entry = self._repos.setdefault(repo, _Repo())
            entry.commits[commit] = dict(files)
            entry.refs[revision] = commit
            entry.token = token
        return commit

    def find(self, repo: str, revision: str, token: str) -> tuple[str, Mapping[str, bytes]] | tuple[int, str]:
        """(commit, files), or (status, the hub's error code)."""
        with self._lock:
            entry = self._repos.get(repo)
            if entry is None or (entry.token and token != entry.token):
                return 401, "RepoNotFound"
            commit = entry.refs.get(revision, revision)
            if commit not in entry.commits:
                return 404, "RevisionNotFound"
            return commit, entry.commits[commit]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *_args: object) -> None:
            pass

        def _answer(self) -> None:
            path = urlsplit(self.path).path
            fault = hub.note(self.command, unquote(path))
            if fault is not None and fault.status:
                headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                self._send(fault.status, b"", headers)
            elif match := _INFO.fullmatch(path):
                self._send_info(match["repo"], unquote(match["revision"] or "main"))
            elif match := _FILE.fullmatch(path):
                self._send_file(match["repo"], unquote(match["revision"]), unquote(match["file"]), fault)
            else:
                self._send(404, b"", {})

        def _find(self, repo: str, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            first, second = hub.find(repo, revision, token)
            if isinstance(first, int):
                self._send(first, b"", {"X-Error-Code": str(second)})
                return None
            assert not isinstance(second, str)
            return first, second

        def _send_info(self, repo: str, revision: str) -> None:
            if found := self._find(repo, revision):
                commit, files = found
                siblings = [_sibling(name, data) for name, data in files.items()]
                body = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
                self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _send_file(self, repo: str, revision: str, name: str, fault: Fault | None) -> None:
            found = self._find(repo, revision)
            if found is None:
                return
            commit, files = found
            if name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            data, etag = files[name], checksum(name, files[name])
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
            if name.endswith(LARGE_FILE_SUFFIXES):
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            status = 200
            if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                begin, status = int(match[1]), 206
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                data = data[begin:]
            self._send(status, data, headers, fault)

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                self._write(body, fault or Fault("", 0))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has left

        def _write(self, body: bytes, fault: Fault) -> None:
            if fault.corrupt:
                body = bytes(byte ^ 0xFF for byte in body)
            if fault.cut_after is not None:
                self.wfile.write(body[: fault.cut_after])
                self.close_connection = True
                return
            pieces = 20 if fault.seconds else 1
            size = -(-len(body) // pieces) or 1
            for begin in range(0, len(body), size):
                self.wfile.write(body[begin : begin + size])
                self.wfile.flush()
                time.sleep(fault.seconds / pieces)

    return Handler


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE_FILE_SUFFIXES):
        sibling["lfs"] = {"sha256": checksum(name, data), "size": len(data), "pointerSize": 134}
    else:
        sibling["blobId"] = checksum(name, data)
    return sibling
