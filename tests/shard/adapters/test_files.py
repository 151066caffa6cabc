from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from loraplex.shard.adapters.digest import adapter_digest
from loraplex.shard.adapters.files import FileLimits, file_sha256, git_blob_id, open_regular, read_regular
from loraplex.shard.adapters.pack import Packer
from loraplex.shard.errors import AdapterNotFound, AdapterRejected

from .layouts import NO_WEIGHTS, TOY, config_bytes, toy_files, toy_tensors, weights_bytes
from .test_worker import write_adapter


def refusal(directory: Path, limits: FileLimits | None = None) -> str:
    target = directory.parent / "packed"
    with pytest.raises(AdapterRejected) as refused:
        Packer(TOY, limits or FileLimits()).pack(directory, target, NO_WEIGHTS)
    assert not target.exists()
    return str(refused.value)


def test_links_to_regular_files_are_followed(tmp_path: Path) -> None:
    blobs = write_adapter(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in toy_files():
        (snapshot / name).symlink_to(blobs / name)
    assert Packer(TOY, FileLimits()).pack(snapshot, tmp_path / "packed", NO_WEIGHTS).modules == 2


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "loop", "dangling", "absent"])
def test_anything_but_a_regular_file_is_refused_at_once(name: str, kind: str, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    path = directory / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
    assert name in refusal(directory)


def test_files_over_the_limit_are_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    assert "adapter_model.safetensors has" in refusal(directory, FileLimits(weights=100))
    assert "adapter_config.json has" in refusal(directory, FileLimits(config=10))


def test_a_pickle_alone_is_refused_unopened(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    assert "a pickle, which is never opened; turn it into safetensors" in refusal(directory)


def test_a_pickle_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", toy_files() | {"adapter_model.bin": b"junk"})
    assert Packer(TOY, FileLimits()).pack(directory, tmp_path / "packed", NO_WEIGHTS).modules == 2


def test_no_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound):
        Packer(TOY, FileLimits()).pack(tmp_path / "none", tmp_path / "packed", NO_WEIGHTS)


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    tensors = toy_tensors()
    list(tensors.values())[-1][0, 0] = float("nan")
    files = {"adapter_config.json": config_bytes(), "adapter_model.safetensors": weights_bytes(tensors)}
    assert "NaN" in refusal(write_adapter(tmp_path / "a", files))


def test_reading_is_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"before")
    data = read_regular(path, 100)
    path.write_bytes(b"after!")
    assert bytes(data) == b"before"
    (tmp_path / "empty").touch()
    assert bytes(read_regular(tmp_path / "empty", 100)) == b""
    with open_regular(path, 6) as file:
        assert file.read() == b"after!"


def test_checksums_are_those_of_the_tools(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"some text\n" * 200_000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    git = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True)
    assert git_blob_id(path) == git.stdout.strip()


def test_the_digest_covers_config_and_weights_apart() -> None:
    digests = {
        adapter_digest(config, memoryview(weights))
        for config, weights in ((b"ab", b"c"), (b"a", b"bc"), (b"ab", b"d"), (b"", b"abc"), (b"c", b"ab"))
    }
    assert len(digests) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
