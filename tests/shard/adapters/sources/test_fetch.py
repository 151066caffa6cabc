"""Local directories: which of them hold an adapter, where its files may lie; requests without sense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loraplex.shard.adapters.directory_cache import DirectoryCache
from loraplex.shard.adapters.files import FileLimits, find_weights
from loraplex.shard.adapters.manifest import AdapterRequest, Snapshot, Source
from loraplex.shard.adapters.sources.fetch import Fetcher
from loraplex.shard.adapters.sources.retry import RetryPolicy
from loraplex.shard.errors import AdapterFetchFailed, AdapterNotFound, AdapterRejected

from ..layouts import toy_files
from ..test_worker import write_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    write_adapter(root / "team" / "adapter")
    return root


def fetch(directory: Path | str, root: Path | str = "") -> Snapshot:
    request = AdapterRequest(Source.LOCAL, str(directory), root=str(root))
    return Fetcher(FileLimits(), RetryPolicy()).fetch(request, lambda done, total: None)


def relink(path: Path, target: Path | str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["missing", "file", "nu\0l"])
def test_no_directory_is_not_found(root: Path, name: str) -> None:
    (root / "file").touch()
    with pytest.raises(AdapterNotFound, match="no such directory"):
        fetch(f"{root}/{name}")


def test_sub_folders_beside_an_adapter_do_not_matter(root: Path) -> None:
    adapter = root / "team" / "adapter"
    write_adapter(adapter / "checkpoint-100", toy_files(seed=1))
    write_adapter(adapter / "ref", toy_files(seed=2))
    assert fetch(adapter) == Snapshot(adapter)
    assert fetch(adapter / "ref") == Snapshot(adapter / "ref")


def test_a_directory_of_adapters_says_what_to_name(root: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        write_adapter(root / "runs" / f"checkpoint-{step}")
    (root / "runs" / "logs").mkdir()
    with pytest.raises(AdapterRejected) as refused:
        fetch(root / "runs")
    message = str(refused.value)
    assert "no adapter_config.json at its top level" in message
    assert "(checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4, checkpoint-5 and 1 more)" in message
    assert f"such as {root}/runs/checkpoint-1" in message


def test_a_directory_without_any_adapter_is_left_to_the_parser(root: Path) -> None:
    (root / "empty" / "deep" / "deeper").mkdir(parents=True)
    assert fetch(root / "empty").directory == root / "empty"


@pytest.mark.parametrize(
    "name", [CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja", "adapters.safetensors"]
)
def test_a_link_out_of_the_root_is_refused_by_name(root: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"{}")
    adapter = root / "team" / "adapter"
    relink(adapter / name, outside)
    with pytest.raises(AdapterRejected, match=f"^{name} is a link that leads out of the allowed directories"):
        fetch(adapter, root)
    assert fetch(adapter).directory == adapter, "the operator's own source may link to anywhere"
    relink(adapter / name, "../../../outside")
    with pytest.raises(AdapterRejected, match=name):
        fetch(adapter, root)
    relink(adapter / name, tmp_path / "nowhere")
    with pytest.raises(AdapterRejected, match=name):
        fetch(adapter, root)


def test_a_directory_that_is_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterRejected, match="its directory is a link that leads out"):
        fetch(root / "link", root)
    assert fetch(root / "link").directory == tmp_path / "outside"


def test_a_link_below_the_root_is_followed(root: Path) -> None:
    write_adapter(root / "store")
    relink(root / "team" / "adapter" / WEIGHTS, "../../store/adapter_model.safetensors")
    assert fetch(root / "team" / "adapter", root).directory == root / "team" / "adapter"


def hub_snapshot(cache: Path, subfolder: str = "") -> Path:
    """An adapter as the hub's cache holds it: links into the repository's blobs."""
    repository = cache / "models--org--name"
    folder = repository / "snapshots" / ("c" * 40) / subfolder
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, data in toy_files().items():
        (repository / "blobs" / name[::-1]).write_bytes(data)
        (folder / name).symlink_to(os.path.relpath(repository / "blobs" / name[::-1], folder))
    return folder


@pytest.mark.parametrize("subfolder", ["", "ref"])
@pytest.mark.parametrize("root", [".", "models--org--name", "models--org--name/snapshots"])
def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(
    tmp_path: Path, root: str, subfolder: str
) -> None:
    folder = hub_snapshot(tmp_path / "hub", subfolder)
    assert fetch(folder, tmp_path / "hub" / root).directory == folder
    secret = tmp_path / "secret"
    secret.write_bytes(b"{}")
    relink(folder / CONFIG, secret)
    with pytest.raises(AdapterRejected, match=CONFIG):
        fetch(folder, tmp_path / "hub" / root)


def test_blobs_that_are_themselves_a_link_are_no_way_out(tmp_path: Path) -> None:
    folder = hub_snapshot(tmp_path / "hub")
    blobs = tmp_path / "hub" / "models--org--name" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterRejected, match=CONFIG):
        fetch(folder, tmp_path / "hub")


def test_weights_have_either_name(tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").touch()
    assert find_weights(tmp_path).name == "adapters.safetensors"
    (tmp_path / WEIGHTS).touch()
    (tmp_path / "adapter_model.bin").touch()
    assert find_weights(tmp_path).name == WEIGHTS


def test_a_pickle_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match=r"there is no adapter_model\.safetensors in its directory"):
        find_weights(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin, a pickle.*loraplex adapters convert"):
        find_weights(tmp_path)


@pytest.mark.parametrize("source", [Source.LOCAL, Source.S3])
def test_only_the_hub_has_sub_folders(source: Source, root: Path) -> None:
    request = AdapterRequest(source, str(root / "team"), subfolder="adapter")
    with pytest.raises(AdapterRejected, match="only hub repositories have sub-folders"):
        Fetcher(FileLimits(), RetryPolicy()).fetch(request, lambda done, total: None)


def test_a_merge_of_nothing_is_refused() -> None:
    with pytest.raises(AdapterRejected, match="nothing says of what"):
        Fetcher(FileLimits(), RetryPolicy()).fetch(
            AdapterRequest(Source.MERGED, "mix"), lambda done, total: None
        )


def test_a_cached_directory_is_whole_or_absent(tmp_path: Path) -> None:
    cache = DirectoryCache(tmp_path / "cache")
    assert cache.find("a/b") is None

    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise AdapterFetchFailed("broken off")

    with pytest.raises(AdapterFetchFailed, match="broken off"):
        cache.put("a/b", fail)
    assert list((tmp_path / "cache" / "a").iterdir()) == []
    made = cache.put("a/b", lambda directory: (directory / "whole").touch())
    assert cache.find("a/b") == made == tmp_path / "cache" / "a" / "b"
    again = cache.put("a/b", lambda directory: (directory / "other").touch())
    assert again == made
    assert (made / "whole").exists(), "who was first stays"
    (made / "whole").write_bytes(b"damaged")
    assert cache.find("a/b") is None
    assert not made.exists()


def test_a_cache_that_cannot_be_written_is_a_failed_fetch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterFetchFailed, match="the cache of adapters cannot be written: Not a directory"):
        DirectoryCache(tmp_path / "file" / "cache").put("a", lambda directory: None)
