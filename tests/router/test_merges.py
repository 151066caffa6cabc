"""Adapters made of others: recipes, what is fetched for them, and how they are served."""

from __future__ import annotations

import asyncio

import pytest

from loraplex.proto import shard_pb2
from loraplex.router.client import AdapterQuery, AdapterState
from loraplex.router.downloads import downloads_of
from loraplex.router.errors import AdapterNotFound, AdapterRejected, InvalidRequest
from loraplex.router.merges import METHODS, Merge, MergePart, MergeRecipe, check_part_count
from loraplex.router.request import AdapterChoice
from loraplex.router.sources import Source, SourceKind
from loraplex.router.sums import uses_in
from loraplex.router.versions import Adapter

from ..fakes.polling import until
from ..fakes.shard import FakeAdapter, FakeShards, generate
from .served import Served, hub, query, serving, tokens_of

MERGED = shard_pb2.DownloadAdapterRequest.MERGED
LINEAR = MergeRecipe.checked("linear")


def parts(*names: str, recipe: MergeRecipe = LINEAR, tenant: str = "", token: str = "") -> AdapterQuery:
    choices = [AdapterChoice(name, 0.5 + index) for index, name in enumerate(names)]
    return AdapterQuery(choices=choices, tenant=tenant, token=token, merge=recipe)


async def one_off(served: Served, asked: AdapterQuery) -> tuple[str, list[int]]:
    """The digest of the merge that a request asks for, and what the request gets."""
    async with served.engine.prepare(asked) as adapters:
        (adapter,) = adapters
        assert adapter.weight == 1
        request = served.submit([1], *uses_in([1], adapters))
    return adapter.manifest.digest, await tokens_of(request)


# Recipes.


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_taken_with_what_it_reads(method: str) -> None:
    recipe = MergeRecipe.checked(method, density=0.3, majority_sign_method="frequency", seed=7, rank=9)
    plain = method.removesuffix("_svd")
    assert recipe.method == method
    assert recipe.density == (None if plain in ("linear", "cat", "svd") else 0.3)
    assert recipe.majority_sign_method == ("frequency" if plain.endswith("ties") else "total")
    assert recipe.seed == (7 if plain.startswith("dare") else 0)
    assert recipe.rank == (9 if method.endswith("svd") else 0)


def test_the_methods_are_pefts() -> None:
    plain = {"linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"}
    assert plain | {f"{m}_svd" for m in plain - {"linear", "cat", "svd"}} == METHODS


@pytest.mark.parametrize(
    ("method", "fields", "param"),
    [
        ("sum", {}, "method"),
        ("linear_svd", {}, "method"),
        ("ties", {}, "density"),
        ("dare_ties_svd", {"density": 0.0}, "density"),
        ("magnitude_prune", {"density": 1.1}, "density"),
        ("dare_linear", {"density": float("nan")}, "density"),
        ("ties", {"density": 0.5, "majority_sign_method": "vote"}, "majority_sign_method"),
        ("dare_linear", {"density": 0.5, "seed": -1}, "seed"),
        ("dare_linear", {"density": 0.5, "seed": 2**64}, "seed"),
        ("svd", {"rank": -1}, "rank"),
        ("svd", {"rank": 2**32}, "rank"),
    ],
)
def test_a_bad_recipe_is_refused_by_field(method: str, fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        MergeRecipe.checked(method, **fields)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_how_many_adapters_are_merged() -> None:
    check_part_count(1, MergeRecipe("cat"))
    check_part_count(8, MergeRecipe("ties", 0.5))
    for count, recipe in ((0, LINEAR), (9, LINEAR), (1, MergeRecipe("ties", 0.5))):
        with pytest.raises(InvalidRequest, match=rf"not {count}"):
            check_part_count(count, recipe)


# Downloads.


def part(digest: str, source: Source | Merge | None = None) -> MergePart:
    return MergePart(
        digest, 0.5, digest, source or Source(SourceKind.HUB, f"org/{digest}"), "c0ffee", "token"
    )


def test_missing_parts_are_fetched_at_their_digests_before_the_merge() -> None:
    inner = Merge((part("a"), part("b")), LINEAR)
    merge = Merge((part("inner", inner), part("a"), part("c"), part("there")), MergeRecipe("ties", 0.5))
    adapter = Adapter("name#1", "name", merge, None, True)
    downloads = downloads_of(adapter, lambda: {"there"})
    assert [d.part for d in downloads] == ["a", "b", "inner", "c", ""]
    fetch, last = downloads[0].request, downloads[-1].request
    assert (fetch.id, fetch.revision, fetch.token, fetch.expect_digest) == ("org/a", "c0ffee", "token", "a")
    assert (downloads[2].request.source, downloads[2].request.expect_digest) == (MERGED, "inner")
    assert (last.source, last.id, last.expect_digest, last.merge.method) == (MERGED, "name", "", "ties")
    assert [(p.digest, p.weight) for p in last.merge.parts] == [
        ("inner", 0.5),
        ("a", 0.5),
        ("c", 0.5),
        ("there", 0.5),
    ]
    assert last.merge.density == 0.5
    assert not downloads[2].request.merge.HasField("density")


# Named merges.


async def test_a_merge_is_resident_under_its_name() -> None:
    shards = FakeShards(sources=hub(2, revision="c0ffee"))
    async with serving(shards) as served:
        await served.load("half", "org/a1", scaling=0.5)
        recipe = MergeRecipe.checked("dare_ties_svd", density=0.25, seed=5, rank=3)
        status = await served.engine.merge_adapters("merged", parts("org/a0", "half", recipe=recipe))
        assert (status.name, status.state, status.kind) == ("merged", AdapterState.RESIDENT, "merged LoRA")
        assert status.source == "merge:dare_ties_svd(0.5 org/a0, 0.75 half)"
        request = shards.requests[-1]
        assert (request.source, request.id) == (MERGED, "merged")
        assert [(p.digest, p.weight) for p in request.merge.parts] == [
            ("sha-org/a0", 0.5),
            ("sha-org/a1", 0.75),
        ]
        assert (request.merge.method, request.merge.density) == ("dare_ties_svd", 0.25)
        assert (request.merge.seed, request.merge.rank) == (5, 3)
        tokens = await tokens_of(await served.ask([1], "merged"))
        assert tokens == generate([1], 8, entries=((status.digest, 1.0),))
        assert status.digest.startswith("sha-merge-dare_ties_svd")
        await served.at_baseline()


async def test_a_merge_survives_a_lost_group_and_its_parts_names() -> None:
    shards = FakeShards(sources=hub(2, revision="c0ffee"))
    async with serving(shards) as served:
        await served.load("part", "org/a0")
        status = await served.engine.merge_adapters("merged", parts("part", "org/a1"))
        await served.engine.unload_adapter("part", tenant="")
        before = len(shards.requests)
        shards.lose()
        assert len(await tokens_of(await served.ask([1], "merged"))) == 8
        again = shards.requests[before:]
        assert [(r.id, r.revision, r.expect_digest) for r in again] == [
            ("org/a0", "c0ffee", "sha-org/a0"),
            ("org/a1", "c0ffee", "sha-org/a1"),
            ("merged", "", status.digest),
        ]
        await served.at_baseline()


async def test_a_part_whose_bytes_are_gone_is_named() -> None:
    shards = FakeShards(sources=hub(2))
    async with serving(shards) as served:
        await served.engine.merge_adapters("merged", parts("org/a0", "org/a1"))
        shards.sources["org/a1"].content = "other"
        shards.lose()
        with pytest.raises(AdapterRejected, match=r"merged: its part org/a1: its files have changed"):
            await tokens_of(await served.ask([1], "merged"))
        await served.at_baseline()


async def test_a_merge_replaces_a_name_as_a_load_does() -> None:
    shards = FakeShards(sources=hub(2))
    async with serving(shards) as served:
        first = await served.load("name", "org/a0")
        merged = await served.engine.merge_adapters("name", parts("org/a0", "org/a1"))
        again = await served.engine.merge_adapters("name", parts("org/a0", "org/a1"))
        assert first.digest != merged.digest == again.digest == served.status("name").digest
        with pytest.raises(InvalidRequest, match="base"):
            await served.engine.merge_adapters("base", parts("org/a0", "org/a1"))
        with pytest.raises(AdapterNotFound):
            await served.engine.merge_adapters("name", parts("org/a0", "nothing"))
        assert served.status("name").digest == merged.digest
        await until(lambda: len(shards.device.slots) == 1)
        assert await served.engine.unload_adapter("name", tenant="") == 100
        with pytest.raises(AdapterNotFound):
            await served.ask([1], "name")
        await served.at_baseline()


@pytest.mark.parametrize("facts", [{"alone": "DoRA"}, {"invocation_tokens": [1]}])
async def test_what_cannot_be_merged_is_refused(facts: dict[str, object]) -> None:
    sources = {"org/odd": FakeAdapter(manifest=facts)} | hub(1)
    async with serving(FakeShards(sources=sources)) as served:
        with pytest.raises(InvalidRequest, match="org/odd"):
            await served.engine.merge_adapters("merged", parts("org/a0", "org/odd"))
        with pytest.raises(InvalidRequest, match="org/odd"):
            await one_off(served, parts("org/a0", "org/odd"))
        with pytest.raises(InvalidRequest, match="not 1"):
            await served.engine.merge_adapters(
                "merged", parts("org/a0", recipe=MergeRecipe.checked("ties", density=0.5))
            )
        assert [status.name for status in served.engine.adapters(tenant="")] == ["org/a0", "org/odd"]
        await served.at_baseline()


async def test_a_merge_of_a_private_part_is_private() -> None:
    async with serving(FakeShards(sources=hub(2))) as served:
        async with served.engine.prepare(query("org/a0", tenant="one", token="secret")):
            pass
        await served.engine.merge_adapters("merged", parts("org/a0", "org/a1", tenant="one"))
        assert "merged" in [status.name for status in served.engine.adapters(tenant="one")]
        assert served.engine.adapters(tenant="two")[0].name == "org/a1"
        with pytest.raises(AdapterNotFound):
            async with served.engine.prepare(query("merged", tenant="two")):
                pass


# Merges of a request.


async def test_equal_requests_share_one_merge_and_nobody_can_name_it() -> None:
    shards = FakeShards(sources=hub(2))
    async with serving(shards) as served:
        answers = await asyncio.gather(*(one_off(served, parts("org/a0", "org/a1")) for _ in range(5)))
        assert len({digest for digest, _ in answers}) == 1
        assert len({tuple(tokens) for _, tokens in answers}) == 1
        other, _ = await one_off(served, parts("org/a1", "org/a0"))
        assert other != answers[0][0]
        assert [r.source for r in shards.requests].count(MERGED) == 2
        assert [status.name for status in served.engine.adapters(tenant="")] == ["org/a0", "org/a1"]
        for adapter in served.engine._core.registry:
            if isinstance(adapter.source, Merge):
                with pytest.raises(AdapterNotFound):
                    await served.ask([1], adapter.name)
        await served.at_baseline()


async def test_a_request_that_goes_while_its_merge_is_made_leaves_nothing_behind() -> None:
    shards = FakeShards(sources=hub(2, fetch_seconds=0.05))
    async with serving(shards) as served:
        for seconds in (0.01, 0.06):
            task = asyncio.create_task(one_off(served, parts("org/a0", "org/a1")))
            await asyncio.sleep(seconds)
            task.cancel()
        await asyncio.sleep(0.1)
        await served.at_baseline()
