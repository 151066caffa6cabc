"""Fetching from S3 with boto3, from a server that speaks its protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.shard.adapters.directory_cache import DirectoryCache
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.manifest import AdapterRequest, Snapshot, Source
from loraplex.shard.adapters.progress import ProgressMeter
from loraplex.shard.adapters.sources.retry import RetryPolicy
from loraplex.shard.adapters.sources.s3 import S3Fetcher
from loraplex.shard.adapters.worker import AdapterWorker
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected

from ....fakes.s3 import FakeS3
from ..conftest import FAST
from ..layouts import NO_WEIGHTS, TOY, toy_files

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "bucket/team/adapter"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeS3]:
    """An S3 that the environment's credentials open, with the toy adapter at PREFIX."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    with FakeS3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.put(PREFIX, toy_files())
        yield server


@pytest.fixture
def fetcher(s3: FakeS3, tmp_path: Path) -> S3Fetcher:
    limits = FileLimits(config=10_000)
    return S3Fetcher(
        limits, RetryPolicy(base_delay=0.001, max_delay=0.01), DirectoryCache(tmp_path / "cache")
    )


def fetch(
    fetcher: S3Fetcher,
    prefix: str = PREFIX,
    revision: str = "",
    progress: list[tuple[int, int]] | None = None,
) -> Snapshot:
    seen = progress if progress is not None else []
    meter = ProgressMeter(lambda done, total: seen.append((done, total)), interval=0)
    return fetcher.fetch(AdapterRequest(Source.S3, f"s3://{prefix}", revision), meter)


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.directory.iterdir() if path.name[0] != "."}


def cached(tmp_path: Path) -> list[str]:
    """The directories that were finished, and any that were not."""
    return [path.name for path in (tmp_path / "cache").glob("*/*")]


def test_the_expected_files_are_fetched_and_no_other(s3: FakeS3, fetcher: S3Fetcher) -> None:
    s3.put(PREFIX, {"tokenizer.json": b"{}", "README.md": b"no", "adapter_model.bin": b"nor this"})
    progress: list[tuple[int, int]] = []
    snapshot = fetch(fetcher, progress=progress)
    assert contents(snapshot) == toy_files() | {"tokenizer.json": b"{}"}
    total = sum(map(len, contents(snapshot).values()))
    assert progress[-1] == (total, total)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    asked = {path for _, path in s3.requests}
    assert not any("README" in path for path in asked)
    assert s3.count("adapter_model.bin", "HEAD") == s3.count("adapter_model.bin") == 0
    assert s3.count("/bucket") == s3.count("/bucket/") == 0, "nothing is listed"


def test_what_is_on_disk_is_not_fetched_again_while_its_etag_is_the_same(
    s3: FakeS3, fetcher: S3Fetcher, tmp_path: Path
) -> None:
    first = fetch(fetcher)
    progress: list[tuple[int, int]] = []
    assert fetch(fetcher, progress=progress) == first
    assert s3.count(WEIGHTS) == 1
    assert progress[-1][0] == progress[-1][1] > 0
    s3.put(PREFIX, toy_files(seed=1))
    second = fetch(fetcher)
    assert second.revision != first.revision
    assert contents(second) == toy_files(seed=1)
    assert contents(first) == toy_files(), "whoever uses the old version keeps it"
    assert sorted(cached(tmp_path)) == sorted([first.revision, second.revision])


def test_a_revision_is_what_it_was_or_is_not_found(s3: FakeS3, fetcher: S3Fetcher, tmp_path: Path) -> None:
    old = fetch(fetcher).revision
    assert fetch(fetcher, revision=old).revision == old
    s3.put(PREFIX, toy_files(seed=1))
    before = sum(s3.requests.values())
    assert contents(fetch(fetcher, revision=old)) == toy_files()
    assert sum(s3.requests.values()) == before, "a revision on disk needs no server"
    elsewhere = S3Fetcher(FileLimits(), RetryPolicy(), DirectoryCache(tmp_path / "another-host"))
    with pytest.raises(AdapterNotFound, match=f"revision '{old}' is no longer there"):
        fetch(elsewhere, revision=old)
    with pytest.raises(AdapterNotFound, match="no longer there"):
        fetch(elsewhere, revision="../../etc")


def test_mlx_weights_are_found(s3: FakeS3, fetcher: S3Fetcher) -> None:
    files = toy_files()
    s3.put("bucket/mlx", {CONFIG: files[CONFIG], "adapters.safetensors": files[WEIGHTS]})
    assert sorted(contents(fetch(fetcher, "bucket/mlx"))) == [CONFIG, "adapters.safetensors"]


def test_what_is_missing_is_named(s3: FakeS3, fetcher: S3Fetcher) -> None:
    files = toy_files()
    s3.put("bucket/bin", {CONFIG: files[CONFIG], "adapter_model.bin": b"pickle"})
    s3.put("bucket/bare", {CONFIG: files[CONFIG]})
    with pytest.raises(AdapterNotFound, match=r"no adapter_config\.json at this prefix, or the credentials"):
        fetch(fetcher, "bucket/nothing")
    with pytest.raises(AdapterRejected, match=r"no adapter_model\.safetensors at this prefix"):
        fetch(fetcher, "bucket/bare")
    with pytest.raises(AdapterRejected, match=r"a pickle, which is never opened.*loraplex adapters convert"):
        fetch(fetcher, "bucket/bin")
    assert s3.count("adapter_model.bin") == 0


def test_denied_is_not_found_and_asked_once(
    s3: FakeS3, fetcher: S3Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODYELSE")
    with pytest.raises(AdapterNotFound, match="credentials"):
        fetch(fetcher)
    assert s3.count(CONFIG, "HEAD") == 1


def test_an_object_that_vanishes_half_way_is_not_found(
    s3: FakeS3, fetcher: S3Fetcher, tmp_path: Path
) -> None:
    s3.break_(WEIGHTS, status=404)
    with pytest.raises(AdapterNotFound, match="404"):
        fetch(fetcher)
    assert cached(tmp_path) == []


def test_without_credentials_it_says_so(
    s3: FakeS3, fetcher: S3Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AdapterFetchFailed, match=r"NoCredentialsError.*AWS_ACCESS_KEY_ID"):
        fetch(fetcher)


def test_files_over_the_limit_are_not_fetched(s3: FakeS3, fetcher: S3Fetcher) -> None:
    s3.put(PREFIX, {CONFIG: bytes(10_001)})
    with pytest.raises(
        AdapterRejected, match=r"adapter_config\.json has 10001 bytes; at most 10000 are fetched"
    ):
        fetch(fetcher)
    assert s3.count(CONFIG) == 0


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_server_is_asked_again(s3: FakeS3, fetcher: S3Fetcher, status: int) -> None:
    s3.break_(CONFIG, status=status, times=2, methods=("HEAD",))
    s3.break_(WEIGHTS, status=status, times=3)
    assert contents(fetch(fetcher)) == toy_files()
    assert s3.count(CONFIG, "HEAD") == 3
    assert s3.count(WEIGHTS) == 4


def test_a_server_that_keeps_failing_is_given_up(s3: FakeS3, fetcher: S3Fetcher, tmp_path: Path) -> None:
    s3.break_(WEIGHTS, status=503, times=100)
    with pytest.raises(AdapterFetchFailed, match="S3 answered 503"):
        fetch(fetcher)
    assert s3.count(WEIGHTS) == 4
    assert cached(tmp_path) == []


def test_an_unreachable_server_is_a_failed_fetch(
    s3: FakeS3, fetcher: S3Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(AdapterFetchFailed, match="EndpointConnectionError"):
        fetch(fetcher)


def test_a_cut_stream_is_completed_from_where_it_broke(s3: FakeS3, fetcher: S3Fetcher) -> None:
    s3.break_(WEIGHTS, cut_after=100, times=2)
    assert contents(fetch(fetcher)) == toy_files()
    assert s3.count(WEIGHTS) == 3
    assert s3.ranges[-1] == "bytes=200-"


def test_a_damaged_object_is_fetched_once_more(s3: FakeS3, fetcher: S3Fetcher) -> None:
    s3.break_(WEIGHTS, corrupt=True)
    assert contents(fetch(fetcher)) == toy_files()
    assert s3.count(WEIGHTS) == 2


def test_an_object_that_stays_damaged_is_not_kept(s3: FakeS3, fetcher: S3Fetcher, tmp_path: Path) -> None:
    s3.break_(WEIGHTS, corrupt=True, times=2)
    with pytest.raises(AdapterFetchFailed, match=f"{WEIGHTS} arrived damaged twice"):
        fetch(fetcher)
    assert cached(tmp_path) == []
    assert contents(fetch(fetcher)) == toy_files()


@pytest.mark.parametrize("how", [{"parts": 3}, {"encryption": "aws:kms"}])
def test_an_etag_that_is_no_checksum_is_not_taken_for_one(
    s3: FakeS3, fetcher: S3Fetcher, how: dict[str, int]
) -> None:
    s3.put(PREFIX, toy_files(), **how)
    first = fetch(fetcher)
    assert contents(first) == toy_files()
    s3.put(PREFIX, toy_files(seed=1), **how)
    assert fetch(fetcher).revision != first.revision


def test_an_object_replaced_while_it_is_fetched_fails(s3: FakeS3, fetcher: S3Fetcher) -> None:
    s3.replace_on_get(f"{PREFIX}/{WEIGHTS}", toy_files(seed=1)[WEIGHTS])
    with pytest.raises(AdapterFetchFailed, match="changed while it was fetched; try again"):
        fetch(fetcher)
    assert contents(fetch(fetcher))[WEIGHTS] == toy_files(seed=1)[WEIGHTS]


def test_a_damaged_copy_on_disk_is_fetched_again(s3: FakeS3, fetcher: S3Fetcher) -> None:
    weights = fetch(fetcher).directory / WEIGHTS
    weights.write_bytes(bytes(weights.stat().st_size))
    assert contents(fetch(fetcher)) == toy_files()
    assert s3.count(WEIGHTS) == 2


@pytest.mark.parametrize(
    "address",
    [
        "bucket/key",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/key/",
        "s3://bucket//key",
        "s3://bucket/a/../b",
        "s3://bucket/./a",
        "s3://bucket/a?versionId=1",
        "s3://bucket/a#b",
        "s3://bucket/a\0",
        "s3://../bucket",
        "http://bucket/key",
    ],
)
def test_an_address_that_is_none_is_not_found(s3: FakeS3, fetcher: S3Fetcher, address: str) -> None:
    with pytest.raises(AdapterNotFound, match="not an S3 address"):
        fetcher.fetch(AdapterRequest(Source.S3, address), ProgressMeter(lambda done, total: None))
    assert not s3.requests


def test_without_boto3_the_extra_is_named(fetcher: S3Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(AdapterRejected, match=r"pip install 'loraplex\[s3\]'"):
        fetch(fetcher)


async def test_a_worker_serves_it(s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    worker = AdapterWorker(TOY, NO_WEIGHTS, settings=FAST)
    try:
        downloaded = await worker.download(
            AdapterRequest(Source.S3, f"s3://{PREFIX}"), lambda done, total: None
        )
        assert downloaded.manifest.modules == 2
        assert len(downloaded.manifest.revision) == 40
        assert (tmp_path / "hf" / "loraplex" / "s3") in downloaded.directory.parents
        with pytest.raises(AdapterNotFound, match="adapter 's3://bucket/other': there is no adapter_config"):
            await worker.download(AdapterRequest(Source.S3, "s3://bucket/other"), lambda done, total: None)
    finally:
        await worker.stop()
