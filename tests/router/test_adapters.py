"""Who may name which adapter, what a name stands for, and how failures are remembered."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loraplex.router import adapters
from loraplex.router.adapters import AdapterRegistry
from loraplex.router.client import AdapterState, Manifest
from loraplex.router.config import AdapterSpec
from loraplex.router.errors import (
    AdapterFetchFailed,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    Overloaded,
)
from loraplex.router.merges import Merge, MergePart, MergeRecipe
from loraplex.router.sources import Source, SourceKind, SourcePolicy
from loraplex.router.versions import Adapter

DISK = Manifest(digest="d1", bytes=9)


def registry(*specs: AdapterSpec, roots: tuple[str, ...] = ()) -> AdapterRegistry:
    return AdapterRegistry(SourcePolicy(roots, ("hub:*",)), base="base", specs=specs, jitter=random.Random(0))


def served(known: AdapterRegistry, name: str = "name", *, tenant: str = "", token: str = "") -> Adapter:
    """A name whose first version is on disk."""
    adapter = known.register(name, "org/a", tenant=tenant, token=token)
    known.fetched(adapter, 0, DISK, 0.0)
    return adapter


def merge(digest: str = "d1", weight: float = 1.0, *, source: str = "org/a") -> Merge:
    part = MergePart(digest, weight, source, Source(SourceKind.HUB, source), "", "")
    return Merge((part,), MergeRecipe())


def test_a_hub_id_is_registered_on_first_use_and_shared() -> None:
    known = registry()
    adapter = known.resolve("org/a", tenant="one")
    assert known.resolve("org/a", tenant="two") is adapter
    assert known.resolve("org/a@v2", tenant="one") is not adapter
    assert [a.name for a in known.visible("three")] == ["org/a", "org/a@v2"]


def test_a_token_makes_an_adapter_its_tenants_own() -> None:
    known = registry()
    private = known.resolve("org/a", tenant="one", token="secret")
    assert known.resolve("org/a", tenant="one") is private
    public = known.resolve("org/a", tenant="two")
    assert public is not private
    assert public.token == ""
    assert known.resolve("org/a", tenant="one") is private
    assert known.visible("two") == [public]
    with pytest.raises(AdapterNotFound):
        registry().find("org/a", "two")
    assert "secret" not in repr(private)


def test_another_token_gets_another_try() -> None:
    known = registry()
    adapter = known.resolve("org/a", tenant="one", token="wrong")
    known.failed(adapter, 0, AdapterFetchFailed("401"), 0.0)
    known.resolve("org/a", tenant="one", token="wrong")
    assert adapter.state is AdapterState.FAILED
    known.resolve("org/a", tenant="one", token="right")
    assert (adapter.state, adapter.token) == (AdapterState.ABSENT, "right")


def test_a_registered_name_comes_first(tmp_path: Path) -> None:
    known = registry(AdapterSpec("org/a", str(tmp_path), 0.5))
    adapter = known.resolve("org/a", tenant="one", token="secret")
    assert isinstance(adapter.source, Source)
    assert (adapter.source.id, adapter.scaling) == (str(tmp_path), 0.5)


def test_a_load_before_anything_is_known_joins_the_one_under_way() -> None:
    known = registry()
    first = known.register("name", "org/a", tenant="")
    assert known.register("name", "org/a", tenant="") is first
    assert known.register("name", "hub:org/a", tenant="") is first
    assert known.resolve("name", tenant="any") is first
    assert not first.candidate


def test_first_use_then_registration_is_one_adapter() -> None:
    known = registry()
    adapter = known.resolve("org/a", tenant="")
    assert known.register("org/a", "org/a", tenant="") is adapter
    assert adapter.registered


@pytest.mark.parametrize(("source", "scaling"), [("org/a", 1.0), ("org/b", 1.0), ("org/a", 0.5)])
def test_a_load_of_a_served_name_is_a_candidate_until_it_is_promoted(source: str, scaling: float) -> None:
    known = registry()
    old = served(known)
    old.pinned = True
    new = known.register("name", source, tenant="", scaling=scaling)
    assert new is not old
    assert new.candidate
    assert known.resolve("name", tenant="") is old
    assert known.visible("") == [old]
    assert known.promote(new) is old
    assert known.resolve("name", tenant="") is known.find("name", "") is new
    assert known.visible("") == [new]
    assert (new.candidate, new.pinned, old.pinned, old.closing) == (False, True, False, True)


def test_a_candidate_with_the_same_bytes_only_changes_what_the_load_said() -> None:
    known = registry()
    old = served(known)
    new = known.register("name", "org/b", tenant="", scaling=-2.0)
    new.pinned = True
    known.fetched(new, 0, DISK, 1.0)
    assert known.adopt(new, 1.0) is old
    assert (old.scaling, old.pinned, str(old.source), old.key) == (-2.0, True, "hub:org/b", old.key)
    assert known.get(new.key) is None
    assert known.resolve("name", tenant="") is old


def test_only_a_load_replaces_a_name_and_only_for_its_owner() -> None:
    known = registry()
    public = served(known)
    again = known.register("name", "org/a", tenant="one", token="secret")
    assert (again.candidate, again.owner, again.token) == (True, None, ""), "nobody else gets its bytes"
    private = known.register("name", "org/b", tenant="one", token="secret")
    assert (private.candidate, private.owner, private.token) == (False, "one", "secret")
    assert known.find("name", "one") is private
    assert known.resolve("name", tenant="two") is public
    assert known.resolve("name", tenant="one", token="secret") is public, "a registered public name is first"


def test_an_operators_source_may_be_loaded_again_though_requests_may_not_name_it(tmp_path: Path) -> None:
    known = registry(AdapterSpec("cli", str(tmp_path)))
    adapter = known.find("cli", "")
    known.fetched(adapter, 0, DISK, 0.0)
    again = known.register("cli", str(tmp_path), tenant="")
    assert again.candidate
    assert again.source == adapter.source
    with pytest.raises(AdapterNotFound):
        known.register("other", str(tmp_path), tenant="")


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), 100.5])
def test_bad_registrations_are_refused(tmp_path: Path, scaling: float) -> None:
    known = registry()
    with pytest.raises(InvalidRequest, match="base"):
        known.register("base", "org/a", tenant="")
    with pytest.raises(InvalidRequest):
        known.register("a b", "org/a", tenant="")
    with pytest.raises(AdapterNotFound):
        known.register("name", str(tmp_path), tenant="")
    with pytest.raises(InvalidRequest, match="scaling") as caught:
        known.register("name", "org/a", tenant="", scaling=scaling)
    assert caught.value.param == "scaling"
    assert len(known) == 0


def test_an_unloaded_name_is_unknown_until_it_is_loaded_again() -> None:
    known = registry()
    old = known.resolve("org/a", tenant="one")
    assert known.close("org/a", "one") == [old]
    for tenant, token in (("one", ""), ("two", ""), ("one", "secret")):
        with pytest.raises(AdapterNotFound):
            known.resolve("org/a", tenant=tenant, token=token)
    with pytest.raises(AdapterNotFound):
        known.find("org/a", "one")
    assert known.visible("") == []
    new = known.register("org/a", "org/a", tenant="two")
    assert new.key != old.key
    known.forget(old)
    assert known.get(old.key) is None
    assert known.resolve("org/a", tenant="one") is new


def test_unloading_a_private_name_leaves_the_others_theirs() -> None:
    known = registry()
    private = known.resolve("org/a", tenant="one", token="secret")
    public = known.resolve("org/a", tenant="two")
    assert known.close("org/a", "one") == [private]
    assert known.resolve("org/a", tenant="two") is public
    with pytest.raises(AdapterNotFound):
        known.resolve("org/a", tenant="one")
    assert known.resolve("org/a@v2", tenant="one").name == "org/a@v2"


def test_unloading_closes_every_version() -> None:
    known = registry()
    old = served(known)
    current = known.register("name", "org/b", tenant="")
    known.fetched(current, 0, Manifest(digest="d2"), 0.0)
    known.promote(current)
    candidate = known.register("name", "org/c", tenant="")
    other = served(known, "other")
    assert known.close("name", "") == [old, current, candidate]
    assert [a.closing for a in (old, current, candidate, other)] == [True, True, True, False]
    assert not candidate.candidate


def test_unloaded_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_UNLOADED", 2)
    known = registry()
    for index in range(3):
        known.resolve(f"org/a{index}", tenant="")
        known.close(f"org/a{index}", "")
    assert known.resolve("org/a0", tenant="").name == "org/a0"
    for name in ("org/a1", "org/a2"):
        with pytest.raises(AdapterNotFound):
            known.resolve(name, tenant="")


def test_what_was_fetched_stays_known_without_a_group() -> None:
    known = registry()
    adapter = served(known)
    assert (adapter.on_disk, adapter.digest, adapter.bytes) == (True, "d1", 9)
    assert known.digests_on_disk(0) == {"d1"}
    known.lost(0)
    assert (adapter.state, adapter.digest) == (AdapterState.ABSENT, "d1")
    assert adapter.prepared
    assert known.digests_on_disk(0) == set()


@pytest.mark.parametrize("ships", ["own_tokenizer", "own_chat_template"])
def test_what_ships_text_is_prepared_only_on_disk(ships: str) -> None:
    known = registry()
    adapter = known.resolve("org/a", tenant="")
    assert not adapter.prepared
    known.fetched(adapter, 0, Manifest(digest="d", **{ships: True}), 0.0)
    assert adapter.prepared
    known.lost(0)
    assert not adapter.prepared


def test_equal_merges_are_one_adapter_without_a_name() -> None:
    known = registry()
    adapter = known.merged(merge(), None)
    assert known.merged(merge(source="org/elsewhere"), None) is adapter, "the digest is what counts"
    assert known.merged(merge("d2"), None) is not adapter
    assert known.merged(merge(weight=0.5), None) is not adapter
    assert known.merged(merge(), "one") is not adapter
    assert known.visible("one") == []
    known.forget(adapter)
    assert known.merged(merge(), None) is not adapter


def test_a_named_merge_replaces_and_is_replaced_like_any_other() -> None:
    known = registry()
    old = served(known)
    new = known.register_merge("name", merge(), None)
    assert new.candidate
    known.promote(new)
    assert known.find("name", "").source == merge()
    assert old.closing
    again = known.register("name", "org/a", tenant="")
    assert again.candidate
    assert known.promote(again) is new


def test_backoff_doubles_up_to_a_bound_and_keeps_the_error() -> None:
    known = registry()
    adapter = known.resolve("org/a", tenant="")
    delays = []
    for _ in range(12):
        known.failed(adapter, 0, AdapterRejected("tensor x", param="model"), 100.0)
        delays.append(adapter.retry_at - 100.0)
    for index, delay in enumerate(delays):
        centre = min(adapters.BACKOFF_MOST, 2.0**index)
        assert 0.75 * centre <= delay <= 1.25 * centre
    error = adapter.error(100.0)
    assert isinstance(error, AdapterRejected)
    assert error is not adapter.failure
    assert (error.message, error.param) == ("tensor x", "model")
    assert error.retry_after == pytest.approx(delays[-1])
    known.lost(0)
    assert adapter.state is AdapterState.FAILED


def test_what_requests_name_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_UNREGISTERED", 3)
    known = registry()
    kept = known.register("kept", "org/kept", tenant="")
    named = [known.resolve(f"org/a{i}", tenant="") for i in range(4)]
    merged = known.merged(merge(), None)
    named[1].leases = 1
    with pytest.raises(Overloaded):
        known.resolve("org/b", tenant="")
    with pytest.raises(Overloaded):
        known.merged(merge("d2"), None)
    known.trim(lambda key: key == named[0].key)
    assert list(known) == [kept, named[0], named[1]]
    assert known.merged(merge(), None) is not merged
    assert known.resolve("org/a3", tenant="") is not named[3]
