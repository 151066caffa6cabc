"""Two ranks give what one process gives: real processes, real collectives, adapters on every projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ... import tiny
from ...tiny import AdapterRecipe
from .rank_main import Done, Job, Runner
from .rank_pool import RankPool
from .recipes import recipes

ARCHITECTURES = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "mixtral", "qwen3_moe")
PROMPTS = [
    [7, 9, 200, 3, 45, 12, 288, 5],
    [1, 2, 3],
    list(range(30, 60)),
    [250, 100, 4, 9, 9],
    [17] * 11,
    [299, 0, 150],
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def alone(job: Job) -> Done:
    return Runner(job, 0).run()


def assert_same(got: Done, want: Done) -> None:
    for row, (mine, other) in enumerate(zip(got.logprobs, want.logprobs, strict=True)):
        torch.testing.assert_close(
            torch.tensor(mine), torch.tensor(other), rtol=0, atol=1e-4, msg=lambda m, r=row: f"row {r}: {m}"
        )  # type: ignore[misc]
    assert got.tokens == want.tokens


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_ranks_give_what_one_process_gives(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path, pool: RankPool
) -> None:
    base = tiny_model(kind)
    adapters: list[str | None] = [None]
    for seed, (name, recipe) in enumerate(recipes(kind).items()):
        adapters.append(str(tiny.build_adapter(base, tmp_path / name, recipe, seed=seed)))
    rows = [*adapters, adapters[1]]
    job = Job(str(base), PROMPTS[: len(rows)], rows)
    ranks, whole = pool.run(job), alone(job)
    assert_same(ranks[0], whole)
    assert ranks[1].tokens == ranks[0].tokens
    assert len({tuple(tokens) for tokens in ranks[0].tokens}) > 1
    for rank in ranks:
        assert rank.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=0.05)
        sizes = zip(rank.adapter_bytes, whole.adapter_bytes, strict=True)
        assert all(own < 0.9 * size for own, size in sizes)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "gemma2"])
def test_every_kind_of_change_on_two_ranks(
    kind: str, tiny_model: Callable[[str], Path], pool: RankPool
) -> None:
    rows: list[str | None] = [None, *(f"every:{number}" for number in range(8))]
    job = Job(str(tiny_model(kind)), [PROMPTS[row % len(PROMPTS)] for row in range(len(rows))], rows)
    assert_same(pool.run(job)[0], alone(job))


@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_vocabularies_of_several_sizes_on_two_ranks(
    kind: str, tiny_model: Callable[[str], Path], pool: RankPool
) -> None:
    rows: list[str | None] = [None, "vocabulary:320", "vocabulary:280", "vocabulary:100", "vocabulary:320"]
    prompts = [PROMPTS[0], [310, 5, 319, 2], [1, 279, 3], [99, 1, 2, 3], [7, 8]]
    for case in (rows, rows[2:4] + rows[:1]):
        start = rows.index(case[0])
        chosen = prompts[: len(case)] if start == 0 else [*prompts[2:4], prompts[0]]
        job = Job(str(tiny_model(kind)), chosen, case)
        assert_same(pool.run(job)[0], alone(job))


def test_ranks_share_kv_heads_where_there_are_fewer(
    tiny_model: Callable[[str], Path], tmp_path: Path, pool: RankPool
) -> None:
    """Four ranks, two KV heads."""
    base = tiny_model("llama")
    adapter = str(tiny.build_adapter(base, tmp_path / "dora", recipes("llama")["dora"], seed=1))
    job = Job(str(base), PROMPTS[:3], [None, adapter, "every:0"])
    assert_same(pool.run(job, size=4)[0], alone(job))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "llama_tied"])
def test_magnitudes_of_the_embedding_on_two_ranks(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path, pool: RankPool
) -> None:
    base = tiny_model(kind)
    recipe = AdapterRecipe(4, targets=("embed_tokens", "down_proj"), extra={"use_dora": True})
    adapter = str(tiny.build_adapter(base, tmp_path / "embedding", recipe, seed=2))
    job = Job(str(base), PROMPTS[:3], [None, adapter, adapter])
    ranks, whole = pool.run(job), alone(job)
    assert_same(ranks[0], whole)
    assert whole.tokens[1] != alone(replace(job, adapters=[None, None, None])).tokens[1]


def test_adapters_add_no_collective(tiny_model: Callable[[str], Path], pool: RankPool) -> None:
    base = str(tiny_model("llama"))
    plain = pool.run(Job(base, PROMPTS[:2], [None, None]))[0]
    adapted = pool.run(Job(base, PROMPTS[:2], ["every:0", "every:1"]))[0]
    # Of each layer the attention's output and the MLP's; of the model its embeddings, logits and tokens.
    expected = {"sum": 2 * plain.layers + 1, "join": 1, "from_first": 1}
    assert plain.prefill_calls == plain.decode_calls == expected
    assert adapted.prefill_calls == adapted.decode_calls == expected
