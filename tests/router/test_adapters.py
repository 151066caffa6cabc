"""Who may name which adapter, and how failures are remembered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loraplex.proto import shard_pb2
from loraplex.router import adapters
from loraplex.router.adapters import Adapter, AdapterRegistry
from loraplex.router.client import AdapterState
from loraplex.router.config import AdapterSpec
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    Overloaded,
)
from loraplex.router.sources import SourcePolicy


def registry(*specs: AdapterSpec, roots: tuple[str, ...] = ()) -> AdapterRegistry:
    return AdapterRegistry(SourcePolicy(roots, ("hub:*",)), base="base", specs=specs, jitter=random.Random(0))


def at(known: AdapterRegistry, key: str) -> Adapter:
    adapter = known.get(key)
    assert adapter is not None
    return adapter


def test_a_hub_id_is_registered_on_first_use_and_shared() -> None:
    known = registry()
    key = known.resolve("org/a", tenant="one")
    assert known.resolve("org/a", tenant="two") == key
    assert known.resolve("org/a@v2", tenant="one") != key
    assert [a.name for a in known.visible("three")] == ["org/a", "org/a@v2"]


def test_a_token_makes_an_adapter_its_tenants_own() -> None:
    known = registry()
    private = known.resolve("org/a", tenant="one", token="secret")
    assert known.resolve("org/a", tenant="one") == private
    public = known.resolve("org/a", tenant="two")
    assert public != private
    assert at(known, public).token == ""
    assert known.resolve("org/a", tenant="one") == private
    assert known.visible("two") == [at(known, public)]
    with pytest.raises(AdapterNotFound):
        registry().find("org/a", "two")
    assert "secret" not in repr(at(known, private))


def test_another_token_gets_another_try() -> None:
    known = registry()
    adapter = at(known, known.resolve("org/a", tenant="one", token="wrong"))
    known.failed(adapter, AdapterFetchFailed("401"), 0.0)
    known.resolve("org/a", tenant="one", token="wrong")
    assert adapter.state is AdapterState.FAILED
    known.resolve("org/a", tenant="one", token="right")
    assert (adapter.state, adapter.token) == (AdapterState.ABSENT, "right")


def test_a_registered_name_comes_first(tmp_path: Path) -> None:
    known = registry(AdapterSpec("org/a", str(tmp_path)))
    key = known.resolve("org/a", tenant="one", token="secret")
    assert at(known, key).source.id == str(tmp_path)


def test_registering_again_is_idempotent_but_not_for_another_source() -> None:
    known = registry()
    first = known.register("name", "org/a", tenant="")
    assert known.register("name", "org/a", tenant="") is first
    assert known.register("name", "hub:org/a", tenant="") is first
    assert known.resolve("name", tenant="any") == first.key
    with pytest.raises(InvalidRequest, match="another source") as caught:
        known.register("name", "org/b", tenant="")
    assert caught.value.param == "lora_name"


def test_first_use_then_registration_is_one_adapter() -> None:
    known = registry()
    key = known.resolve("org/a", tenant="")
    assert known.register("org/a", "org/a", tenant="").key == key
    assert at(known, key).registered


def test_bad_registrations_are_refused(tmp_path: Path) -> None:
    known = registry()
    with pytest.raises(InvalidRequest, match="base"):
        known.register("base", "org/a", tenant="")
    with pytest.raises(InvalidRequest):
        known.register("a b", "org/a", tenant="")
    with pytest.raises(AdapterNotFound):
        known.register("name", str(tmp_path), tenant="")
    assert len(known) == 0


def test_a_closed_name_is_unknown_and_a_new_one_is_another_adapter() -> None:
    known = registry()
    old = known.register("name", "org/a", tenant="")
    known.close(old)
    with pytest.raises(AdapterNotFound):
        known.find("name", "")
    assert known.visible("") == []
    new = known.register("name", "org/b", tenant="")
    assert new.key != old.key
    known.forget(old)
    assert known.get(old.key) is None
    assert known.find("name", "") is new


def test_a_manifest_is_taken_in() -> None:
    known = registry()
    adapter = at(known, known.resolve("org/a", tenant=""))
    known.fetching(adapter)
    manifest = shard_pb2.AdapterManifest(
        digest="d", rank_bytes=[5, 9], max_rank=16, modules=7, warnings=["odd"]
    )
    known.fetched(adapter, manifest, 3.0)
    assert adapter.on_disk
    assert (adapter.digest, adapter.bytes, adapter.max_rank, adapter.modules) == ("d", 9, 16, 7)
    assert adapter.warnings == ("odd",)
    known.reset()
    assert adapter.state is AdapterState.ABSENT


def test_backoff_doubles_up_to_a_bound_and_keeps_the_error() -> None:
    known = registry()
    adapter = at(known, known.resolve("org/a", tenant=""))
    delays = []
    for _ in range(12):
        known.failed(adapter, AdapterRejected("tensor x", param="model"), 100.0)
        delays.append(adapter.retry_at - 100.0)
    for index, delay in enumerate(delays):
        centre = min(adapters.BACKOFF_MOST, 2.0**index)
        assert 0.75 * centre <= delay <= 1.25 * centre
    error = adapter.error(100.0)
    assert isinstance(error, AdapterRejected)
    assert error is not adapter.failure
    assert (error.message, error.param) == ("tensor x", "model")
    assert error.retry_after == pytest.approx(delays[-1])
    known.reset()
    assert adapter.state is AdapterState.FAILED


def test_what_requests_name_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_UNREGISTERED", 3)
    known = registry()
    kept = known.register("kept", "org/kept", tenant="")
    keys = [known.resolve(f"org/a{i}", tenant="") for i in range(5)]
    with pytest.raises(Overloaded):
        known.resolve("org/b", tenant="")
    known.trim(lambda key: key == keys[0])
    assert [a.key for a in known] == [kept.key, keys[0], keys[4]]
    known.resolve("org/b", tenant="")
