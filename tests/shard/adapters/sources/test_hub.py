"""Fetching from a hub, through a real worker process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loraplex.shard.adapters.digest import adapter_digest
from loraplex.shard.adapters.manifest import AdapterRequest, Source
from loraplex.shard.adapters.weights import LinearWeights
from loraplex.shard.adapters.worker import AdapterWorker, DownloadedAdapter
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected

from ....fakes.hub import FakeHub
from ..conftest import FAST
from ..layouts import NO_WEIGHTS, TOY, mentions, toy_files

pytestmark = pytest.mark.asyncio(loop_scope="module")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


async def fetch(
    worker: AdapterWorker, repo: str, revision: str = "", token: str = "", subfolder: str = ""
) -> tuple[DownloadedAdapter, list[tuple[int, int]]]:
    progress: list[tuple[int, int]] = []
    request = AdapterRequest(Source.HUB, repo, revision, token, subfolder=subfolder)
    downloaded = await worker.download(request, lambda done, total: progress.append((done, total)))
    return downloaded, progress


def digest_of(files: dict[str, bytes]) -> str:
    return adapter_digest(files[CONFIG], memoryview(files[WEIGHTS]))


def paths_below(directory: Path) -> list[str]:
    return [str(path) for path in directory.rglob("*")]


def damage(downloaded: DownloadedAdapter) -> None:
    """Overwrite the weights in the cache with as many zeros."""
    blob = (downloaded.directory / WEIGHTS).resolve()
    blob.write_bytes(bytes(blob.stat().st_size))


async def test_fetches_verifies_and_packs(worker: AdapterWorker, hub: FakeHub, hub_home: Path) -> None:
    files = toy_files() | {"README.md": b"not fetched", "adapter_model.bin": b"nor this"}
    commit = hub.add("org/plain", files)
    downloaded, progress = await fetch(worker, "org/plain")
    manifest = downloaded.manifest
    assert (manifest.digest, manifest.revision) == (digest_of(files), commit)
    assert (manifest.modules, manifest.max_rank, manifest.traits.warnings) == (2, 2, ())
    assert manifest.rank_bytes == (downloaded.packed.nbytes,)
    assert (manifest.own_tokenizer, manifest.own_chat_template) == (False, False)
    assert progress[-1] == (len(files[CONFIG]) + len(files[WEIGHTS]),) * 2
    assert hub_home in downloaded.directory.parents
    assert hub.count("README.md") == hub.count("adapter_model.bin") == 0
    weights = downloaded.packed.site_weights()[0]
    assert isinstance(weights, LinearWeights)
    assert weights.lora is not None
    assert [part.b.shape for part in weights.lora.parts] == [(2, 8), (2, 4)]


async def test_what_is_on_disk_is_not_fetched_again(worker: AdapterWorker, hub: FakeHub) -> None:
    hub.add("org/twice", toy_files())
    first, _ = await fetch(worker, "org/twice")
    second, progress = await fetch(worker, "org/twice")
    assert first.manifest == second.manifest
    assert hub.count(f"org/twice/resolve/{first.manifest.revision}/{WEIGHTS}") == 1
    assert progress[-1][0] == progress[-1][1] > 0


async def test_a_moving_name_is_resolved_and_a_commit_kept(worker: AdapterWorker, hub: FakeHub) -> None:
    old = hub.add("org/moving", toy_files(seed=1))
    assert (await fetch(worker, "org/moving"))[0].manifest.revision == old
    new = hub.add("org/moving", toy_files(seed=2))
    branch = hub.add("org/moving", toy_files(seed=3), revision="refs/pr/1")
    assert (await fetch(worker, "org/moving"))[0].manifest.revision == new
    assert (await fetch(worker, "org/moving", "main"))[0].manifest.revision == new
    assert (await fetch(worker, "org/moving", "refs/pr/1"))[0].manifest.revision == branch
    pinned = (await fetch(worker, "org/moving", old))[0].manifest
    assert (pinned.revision, pinned.digest) == (old, digest_of(toy_files(seed=1)))


async def test_own_tokenizer_and_template_come_along(worker: AdapterWorker, hub: FakeHub) -> None:
    hub.add(
        "org/own",
        toy_files()
        | {"tokenizer.json": b'{"model": {}}', "chat_template.jinja": b"{{ x }}", "vocab.txt": b""},
    )
    downloaded, _ = await fetch(worker, "org/own")
    assert downloaded.manifest.own_tokenizer
    assert downloaded.manifest.own_chat_template
    assert (downloaded.directory / "chat_template.jinja").read_bytes() == b"{{ x }}"
    assert hub.count("vocab.txt") == 0


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
async def test_a_corrupt_file_is_fetched_again(worker: AdapterWorker, hub: FakeHub, name: str) -> None:
    repo = f"org/corrupt-{name.rpartition('.')[2]}"
    commit = hub.add(repo, toy_files())
    hub.break_(f"{repo}/resolve/{commit}/{name}", corrupt=True)
    downloaded, _ = await fetch(worker, repo)
    assert downloaded.manifest.digest == digest_of(toy_files())
    assert hub.count(f"{repo}/resolve/{commit}/{name}") == 2


async def test_a_file_that_stays_corrupt_is_given_up_and_not_kept(
    worker: AdapterWorker, hub: FakeHub, hub_home: Path
) -> None:
    commit = hub.add("org/rotten", toy_files())
    hub.break_(f"org/rotten/resolve/{commit}/{WEIGHTS}", times=2, corrupt=True)
    with pytest.raises(
        AdapterFetchFailed, match=r"'org/rotten': adapter_model.safetensors arrived damaged twice"
    ):
        await fetch(worker, "org/rotten")
    assert not any(
        f"models--org--rotten/snapshots/{commit}/{WEIGHTS}" in path for path in paths_below(hub_home)
    )
    assert (await fetch(worker, "org/rotten"))[0].manifest.digest == digest_of(toy_files())


async def test_a_damaged_copy_on_disk_is_fetched_again(worker: AdapterWorker, hub: FakeHub) -> None:
    commit = hub.add("org/bitrot", toy_files())
    first, _ = await fetch(worker, "org/bitrot")
    damage(first)
    second, _ = await fetch(worker, "org/bitrot")
    assert second.manifest == first.manifest
    assert hub.count(f"org/bitrot/resolve/{commit}/{WEIGHTS}") == 2


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_failing_hub_is_asked_again(worker: AdapterWorker, hub: FakeHub, status: int) -> None:
    repo = f"org/shaky-{status}"
    commit = hub.add(repo, toy_files())
    hub.break_(f"api/models/{repo}", status=status, times=2)
    hub.break_(f"{repo}/resolve/{commit}/{WEIGHTS}", status=status, times=3)
    assert (await fetch(worker, repo))[0].manifest.digest == digest_of(toy_files())
    assert hub.count(f"api/models/{repo}") == 3
    assert hub.count(f"{repo}/resolve/{commit}/{WEIGHTS}") == 4


async def test_a_hub_that_keeps_failing_is_given_up(worker: AdapterWorker, hub: FakeHub) -> None:
    hub.add("org/down", toy_files())
    hub.break_("api/models/org/down", status=503, times=100)
    with pytest.raises(AdapterFetchFailed, match="adapter 'org/down': the hub answered 503"):
        await fetch(worker, "org/down")
    assert hub.count("api/models/org/down") == 4


async def test_the_pause_that_a_hub_asks_for_is_kept_within_bounds(
    worker: AdapterWorker, hub: FakeHub
) -> None:
    hub.add("org/patient", toy_files())
    hub.break_("api/models/org/patient", status=429, retry_after=9999)
    began = time.monotonic()
    await fetch(worker, "org/patient")
    assert 0.5 <= time.monotonic() - began < 5


async def test_a_cut_stream_is_completed(worker: AdapterWorker, hub: FakeHub) -> None:
    commit = hub.add("org/cut", toy_files())
    hub.break_(f"org/cut/resolve/{commit}/{WEIGHTS}", cut_after=100)
    assert (await fetch(worker, "org/cut"))[0].manifest.digest == digest_of(toy_files())


async def test_the_hub_away_is_no_matter_for_what_is_on_disk(worker: AdapterWorker, hub: FakeHub) -> None:
    hub.add("org/kept", toy_files())
    first, _ = await fetch(worker, "org/kept")
    hub.break_("api/models/org/kept", status=503, times=4)
    second, _ = await fetch(worker, "org/kept")
    assert second.manifest.digest == first.manifest.digest
    assert second.manifest.revision == first.manifest.revision
    assert mentions(second.manifest.traits.warnings[0], "copy on disk", "503")


async def test_unknown_repositories_and_revisions_are_not_found(worker: AdapterWorker, hub: FakeHub) -> None:
    with pytest.raises(AdapterNotFound, match=r"adapter 'org/missing': the hub answered 401"):
        await fetch(worker, "org/missing")
    hub.add("org/known", toy_files())
    with pytest.raises(AdapterNotFound, match="404"):
        await fetch(worker, "org/known", "nowhere")
    assert hub.count("api/models/org/missing") == 1, "asked once: it will not appear by asking again"


@pytest.mark.parametrize("repo", ["../../etc", "a/b/c", "org/..", "", "org/na me", "/etc/passwd", "-x/y"])
async def test_a_name_that_is_none_is_not_found(worker: AdapterWorker, hub: FakeHub, repo: str) -> None:
    before = sum(hub.requests.values())
    with pytest.raises(AdapterNotFound, match="not the name of a hub repository"):
        await fetch(worker, repo)
    assert sum(hub.requests.values()) == before


@pytest.mark.parametrize("revision", ["../main", "a/../../b", "/etc", "-d", "x" * 300, "a b"])
async def test_a_revision_that_is_none_is_not_found(worker: AdapterWorker, revision: str) -> None:
    with pytest.raises(AdapterNotFound, match="is not a revision"):
        await fetch(worker, "org/plain", revision)


async def test_a_private_repository_opens_to_its_token_only(
    worker: AdapterWorker, hub: FakeHub, hub_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/private", toy_files(), token="hf_secret_of_one_tenant")
    with pytest.raises(AdapterNotFound, match="token"):
        await fetch(worker, "org/private")
    with pytest.raises(AdapterNotFound, match="401"):
        await fetch(worker, "org/private", token="hf_wrong")
    downloaded, _ = await fetch(worker, "org/private", token="hf_secret_of_one_tenant")
    assert downloaded.manifest.digest == digest_of(toy_files())
    # Out of reach of everybody else, also while the hub cannot be asked.
    hub.break_("api/models/org/private", status=503, times=8)
    with pytest.raises(AdapterFetchFailed):
        await fetch(worker, "org/private")
    with pytest.raises(AdapterFetchFailed):
        await fetch(worker, "org/private", token="hf_wrong")
    assert not any("secret" in path for path in paths_below(hub_home))
    assert "hf_secret" not in "".join(capfd.readouterr())


async def test_a_gated_repository_is_not_found(worker: AdapterWorker, hub: FakeHub) -> None:
    hub.add("org/gated", toy_files())
    hub.break_("api/models/org/gated", status=403)
    with pytest.raises(AdapterNotFound, match=r"403.*gated"):
        await fetch(worker, "org/gated")
    assert hub.count("api/models/org/gated") == 1


async def test_a_repository_without_an_adapter_is_rejected(worker: AdapterWorker, hub: FakeHub) -> None:
    files = toy_files()
    hub.add("org/no-config", {WEIGHTS: files[WEIGHTS]})
    hub.add("org/pickled", {CONFIG: files[CONFIG], "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterRejected, match=f"no {CONFIG}"):
        await fetch(worker, "org/no-config")
    hub.add("org/no-weights", {CONFIG: files[CONFIG]})
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin, a pickle.*loraplex adapters convert"):
        await fetch(worker, "org/pickled")
    with pytest.raises(AdapterRejected, match=f"no {WEIGHTS} at its top level"):
        await fetch(worker, "org/no-weights")


async def test_a_sub_folder_is_an_adapter_of_its_own(
    worker: AdapterWorker, hub: FakeHub, hub_home: Path
) -> None:
    top, ref, step = toy_files(seed=1), toy_files(seed=2), toy_files(seed=3)
    files = top | {f"ref/{name}": data for name, data in ref.items()}
    commit = hub.add("org/nested", files | {f"runs/checkpoint-9/{name}": data for name, data in step.items()})
    for subfolder, expected in (("", top), ("ref", ref), ("runs/checkpoint-9", step)):
        manifest = (await fetch(worker, "org/nested", subfolder=subfolder))[0].manifest
        assert (manifest.digest, manifest.revision) == (digest_of(expected), commit)
    pinned, _ = await fetch(worker, "org/nested", commit, subfolder="ref")
    assert pinned.manifest.digest == digest_of(ref)
    assert pinned.directory.name == "ref"
    hub.break_("api/models/org/nested", status=503, times=8)
    for subfolder, expected in (("runs/checkpoint-9", step), ("ref", ref)):
        kept, _ = await fetch(worker, "org/nested", subfolder=subfolder)
        assert (kept.manifest.digest, kept.manifest.revision) == (digest_of(expected), commit)


async def test_a_repository_of_adapters_says_what_to_name(worker: AdapterWorker, hub: FakeHub) -> None:
    files = {
        f"{folder}/{name}": data
        for folder in ("checkpoint-1", "runs/checkpoint-2")
        for name, data in toy_files().items()
    }
    hub.add("org/checkpoints", files)
    with pytest.raises(
        AdapterRejected, match=r"\(checkpoint-1, runs/checkpoint-2\).*such as org/checkpoints/checkpoint-1"
    ):
        await fetch(worker, "org/checkpoints")
    with pytest.raises(AdapterRejected, match=r"\(checkpoint-2\).*such as org/checkpoints/runs/checkpoint-2"):
        await fetch(worker, "org/checkpoints", subfolder="runs")
    with pytest.raises(AdapterNotFound, match="no folder 'ref'"):
        await fetch(worker, "org/checkpoints", subfolder="ref")


@pytest.mark.parametrize("subfolder", ["..", "a/../b", "/etc", "a//b", "a/", ".git", "-a", "a b", "x" * 200])
async def test_a_sub_folder_that_is_none_is_not_found(worker: AdapterWorker, subfolder: str) -> None:
    with pytest.raises(AdapterNotFound, match="is not a folder"):
        await fetch(worker, "org/nested", subfolder=subfolder)


async def test_the_weights_are_safetensors_of_either_name(worker: AdapterWorker, hub: FakeHub) -> None:
    files = toy_files()
    hub.add("org/both", files | {"adapters.safetensors": b"", "adapter_model.bin": b"pickle"})
    assert (await fetch(worker, "org/both"))[0].manifest.digest == digest_of(files)
    commit = hub.add("org/mlx", {CONFIG: files[CONFIG], "adapters.safetensors": files[WEIGHTS]})
    assert (await fetch(worker, "org/mlx"))[0].manifest.digest == digest_of(files)
    assert hub.count(f"org/mlx/resolve/{commit}/adapters.safetensors") == 1


async def test_a_file_over_the_limit_is_not_fetched(worker: AdapterWorker, hub: FakeHub) -> None:
    commit = hub.add("org/huge", toy_files() | {CONFIG: bytes(10_001)})
    with pytest.raises(AdapterRejected, match=r"adapter_config.json has 10001 bytes; at most 10000"):
        await fetch(worker, "org/huge")
    assert hub.count(f"org/huge/resolve/{commit}/{CONFIG}") == 0


async def test_a_broken_adapter_is_rejected_by_name(worker: AdapterWorker, hub: FakeHub) -> None:
    files = toy_files()
    hub.add("org/short", files | {WEIGHTS: files[WEIGHTS][:-1]})
    with pytest.raises(AdapterRejected, match="adapter 'org/short': the weights file is cut short"):
        await fetch(worker, "org/short")


async def test_progress_is_reported_while_bytes_arrive(worker: AdapterWorker, hub: FakeHub) -> None:
    size = 25_000_000
    files = toy_files() | {"tokenizer.json": b"{" + b" " * (size - 2) + b"}"}
    commit = hub.add("org/slow", files)
    hub.break_(f"org/slow/resolve/{commit}/tokenizer.json", seconds=0.5)
    began = time.monotonic()
    _, progress = await fetch(worker, "org/slow")
    elapsed = time.monotonic() - began
    total = sum(map(len, files.values()))
    assert progress[-1] == (total, total)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert any(total - size < done < total for done, _ in progress)
    assert len(progress) <= 10 * elapsed + len(files) + 1


async def test_offline_serves_what_is_on_disk(
    worker: AdapterWorker, hub: FakeHub, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/offline", toy_files())
    online, _ = await fetch(worker, "org/offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sum(hub.requests.values())
    offline = AdapterWorker(TOY, NO_WEIGHTS, settings=FAST)
    try:
        by_name, _ = await fetch(offline, "org/offline")
        by_commit, _ = await fetch(offline, "org/offline", commit)
        assert by_name.manifest.digest == by_commit.manifest.digest == online.manifest.digest
        assert by_name.manifest.revision == commit
        with pytest.raises(AdapterNotFound, match="HF_HUB_OFFLINE"):
            await fetch(offline, "org/never-seen")
        damage(online)
        with pytest.raises(AdapterFetchFailed, match="damaged"):
            await fetch(offline, "org/offline")
    finally:
        await offline.stop()
    assert sum(hub.requests.values()) == before


async def test_an_unreachable_hub_is_a_failed_fetch(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    worker = AdapterWorker(TOY, NO_WEIGHTS, settings=FAST)
    try:
        with pytest.raises(AdapterFetchFailed, match="'org/any': the hub could not be reached"):
            await fetch(worker, "org/any")
    finally:
        await worker.stop()
