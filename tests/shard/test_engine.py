"""Steps of the real engine on tiny models, against transformers' own generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.changes import EmbeddingChange, LinearChange, Rows
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.config import ShardConfig
from loraplex.shard.engine import StepEngine
from loraplex.shard.errors import BadPlan
from loraplex.shard.load import load_model
from loraplex.shard.rows import RowTable
from loraplex.shard.sampling import Sampler

from .dense import Changes, packed

GREEDY = pb.SamplingParams(top_p=1.0, repetition_penalty=1.0)


class Driver:
    """Plays the router: one row a prompt, blocks handed out in order."""

    def __init__(self, directory: Path, *, block_size: int = 4) -> None:
        config = ShardConfig(model=str(directory), device="cpu", kv_memory=1 << 21, block_size=block_size)
        loaded = load_model(config)
        self.layout = loaded.layout
        self.pool = AdapterPool(loaded.sites, slots=8, budget=1 << 30)
        self.rows = RowTable(16, 64)
        self.block_size = block_size
        self.engine = StepEngine(
            loaded.model,
            loaded.kv,
            self.rows,
            Sampler(),
            slot_is_resident=lambda slot: slot == 7,
        )
        self.next_block, self.seq = 1, 0
        self.lengths: dict[int, int] = {}

    def plan(self) -> pb.StepPlan:
        self.seq += 1
        return pb.StepPlan(epoch=1, seq=self.seq)

    def start(self, plan: pb.StepPlan, row: int, prompt_length: int, tokens: int, **more: object) -> None:
        plan.starts.add(row=row, prompt_length=prompt_length, **({"sampling": GREEDY} | more))  # type: ignore[arg-type]
        count = -(-tokens // self.block_size)
        delta = plan.block_tables.add()
        delta.rows.add(row=row, blocks=range(self.next_block, self.next_block + count))
        self.next_block += count


def tokens_of(result: pb.StepResult) -> dict[int, int]:
    return {row.row: row.tokens[0] for row in result.rows if row.tokens}


def reference(directory: Path, prompt: list[int], count: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mistral", "mixtral", "qwen3_moe"])
def test_mixed_steps_generate_what_transformers_generates(
    kind: str, tiny_model: Callable[[str], Path]
) -> None:
    """One prompt in three chunks beside another that already decodes."""
    directory = tiny_model(kind)
    driver = Driver(directory)
    long, short = list(range(40, 63)), [9, 8, 7]
    got: dict[int, list[int]] = {0: [], 1: []}

    def run(plan: pb.StepPlan) -> None:
        for row, token in tokens_of(driver.engine.run(plan)).items():
            got[row].append(token)

    plan = driver.plan()
    driver.start(plan, 0, len(short), len(short) + 12)
    plan.chunks.add(row=0, start=0, tokens=short, last=True)
    run(plan)
    plan = driver.plan()
    driver.start(plan, 1, len(long), len(long) + 12)
    plan.chunks.add(row=1, start=0, tokens=long[:10])
    plan.decode_rows.append(0)
    run(plan)
    for start, end in ((10, 16), (16, 23)):
        plan = driver.plan()
        plan.chunks.add(row=1, start=start, tokens=long[start:end], last=end == 23)
        plan.decode_rows.append(0)
        run(plan)
    for _ in range(6):
        plan = driver.plan()
        plan.decode_rows.extend([1, 0])
        run(plan)
    assert got[0] == reference(directory, short, 10)
    assert got[1] == reference(directory, long, 7)


def test_prompt_logprobs_over_chunks_equal_one_forward(tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model("llama")
    driver = Driver(directory)
    prompt = list(range(100, 113))
    lines: dict[int, pb.TokenLogprobs] = {}
    for start, end in ((0, 5), (5, 6), (6, 13)):
        plan = driver.plan()
        if start == 0:
            driver.start(plan, 0, 13, 14, output=pb.RowStart.PROMPT_LOGPROBS, prompt_logprobs=2)
        plan.chunks.add(row=0, start=start, tokens=prompt[start:end], last=end == 13)
        for row in driver.engine.run(plan).rows:
            lines.update({row.prompt_start + i: line for i, line in enumerate(row.prompt_logprobs)})
    model = AutoModelForCausalLM.from_pretrained(directory)
    expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].detach(), -1)
    assert sorted(lines) == list(range(1, 13))
    for position, line in lines.items():
        assert line.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), abs=1e-4)
        assert list(line.top_ids) == expected[position - 1].topk(2).indices.tolist()


SLOT_7 = pb.AdapterEntry(slot=7, weight=1.0)


def with_taller_head(directory: Path) -> Driver:
    """Slot 7 has 310 tokens, of which the ten that the base does not have are by far the likeliest."""
    own = np.random.default_rng(0).standard_normal((310, 64), np.float32)
    own[:300] *= 1e-3
    driver = Driver(directory)
    tall: Changes = {
        "lm_head": LinearChange(rows=Rows(None, own)),
        "model.embed_tokens": EmbeddingChange(rows=Rows(None, own)),
    }
    driver.pool.load(7, "tall", packed(driver.layout, tall))
    return driver


def test_prompt_logprobs_do_not_depend_on_the_width_of_a_neighbours_head(
    tiny_model: Callable[[str], Path],
) -> None:
    """A base row scores its prompt in chunks: alone, beside a row that draws what only it can, and alone."""
    driver = with_taller_head(tiny_model("gemma2"))
    prompt = list(range(100, 112))
    lines: dict[int, pb.TokenLogprobs] = {}
    for start, end in ((0, 4), (4, 8), (8, 12)):
        plan = driver.plan()
        if start == 0:
            driver.start(plan, 0, 12, 14, output=pb.RowStart.PROMPT_LOGPROBS, prompt_logprobs=2)
        if start == 4:
            driver.start(plan, 1, 3, 8, spans=[pb.AdapterSpan(start=0, entries=[SLOT_7])])
            plan.chunks.add(row=1, start=0, tokens=[1, 2, 309], last=True)
        plan.chunks.add(row=0, start=start, tokens=prompt[start:end], last=end == 12)
        result = driver.engine.run(plan)
        if start == 4:
            assert tokens_of(result)[1] >= 300
        for row in result.rows:
            if row.row == 0:
                lines.update({row.prompt_start + i: line for i, line in enumerate(row.prompt_logprobs)})
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gemma2"))
    expected = torch.log_softmax(model(torch.tensor([prompt])).logits[0].detach(), -1)
    assert sorted(lines) == list(range(1, 12))
    for position, line in lines.items():
        assert line.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), abs=1e-4)
        assert list(line.top_ids) == expected[position - 1].topk(2).indices.tolist()


def test_a_prompt_token_that_the_base_does_not_know_is_impossible_before_its_adapters_span(
    tiny_model: Callable[[str], Path],
) -> None:
    driver = with_taller_head(tiny_model("gemma2"))
    plan = driver.plan()
    spans = [pb.AdapterSpan(start=2, entries=[SLOT_7])]
    driver.start(plan, 0, 3, 4, spans=spans, output=pb.RowStart.PROMPT_LOGPROBS, prompt_logprobs=0)
    plan.chunks.add(row=0, start=0, tokens=[5, 6])
    (known,) = driver.engine.run(plan).rows[0].prompt_logprobs
    plan = driver.plan()
    plan.chunks.add(row=0, start=2, tokens=[305], last=True)
    result = driver.engine.run(plan)
    (unknown,) = result.rows[0].prompt_logprobs
    assert math.isfinite(known.logprob)
    assert unknown.logprob == -math.inf
    assert tokens_of(result)[0] >= 300


def test_a_prompt_may_hold_tokens_that_only_the_adapters_embedding_has(
    tiny_model: Callable[[str], Path],
) -> None:
    """The head has no logit for them: they are impossible to predict, and no penalty reaches them."""
    driver = Driver(tiny_model("llama"))
    own = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    rows = Rows(np.arange(300, 304), own)
    added: Changes = {"model.embed_tokens": EmbeddingChange(rows=rows)}
    driver.pool.load(7, "added", packed(driver.layout, added))
    plan = driver.plan()
    driver.start(
        plan,
        0,
        3,
        4,
        spans=[pb.AdapterSpan(start=0, entries=[SLOT_7])],
        sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.5, frequency_penalty=0.5),
        output=pb.RowStart.PROMPT_LOGPROBS,
    )
    plan.chunks.add(row=0, start=0, tokens=[5, 303, 6], last=True)
    result = driver.engine.run(plan)
    unknown, known = result.rows[0].prompt_logprobs
    assert unknown.logprob == -math.inf
    assert math.isfinite(known.logprob)
    assert tokens_of(result)[0] < 300


def test_recomputed_output_is_sampled_under_its_old_index(tiny_model: Callable[[str], Path]) -> None:
    """A row that starts again with its output in the chunk goes on as if never interrupted."""
    driver = Driver(tiny_model("llama"))
    warm = pb.SamplingParams(temperature=1.5, top_p=1.0, repetition_penalty=1.3, presence_penalty=0.5)
    prompt, whole = [5, 6, 7], []
    plan = driver.plan()
    driver.start(plan, 0, 3, 12, sampling=warm, seed=42)
    plan.chunks.add(row=0, start=0, tokens=prompt, last=True)
    whole.append(tokens_of(driver.engine.run(plan))[0])
    for _ in range(6):
        plan = driver.plan()
        plan.decode_rows.append(0)
        whole.append(tokens_of(driver.engine.run(plan))[0])
    plan = driver.plan()
    plan.ends.append(0)
    driver.start(plan, 0, 3, 12, sampling=warm, seed=42)
    plan.chunks.add(row=0, start=0, tokens=prompt + whole[:4], last=True)
    again = [tokens_of(driver.engine.run(plan))[0]]
    for _ in range(2):
        plan = driver.plan()
        plan.decode_rows.append(0)
        again.append(tokens_of(driver.engine.run(plan))[0])
    assert again == whole[4:]


def test_a_row_is_masked_after_its_stop_id(tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model("llama")
    first, second = reference(directory, [5, 6, 7], 2)
    driver = Driver(directory)
    plan = driver.plan()
    driver.start(
        plan, 0, 3, 12, sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0, stop_ids=[second])
    )
    plan.chunks.add(row=0, start=0, tokens=[5, 6, 7], last=True)
    assert tokens_of(driver.engine.run(plan)) == {0: first}
    for expected in ({0: second}, {}, {}):
        plan = driver.plan()
        plan.decode_rows.append(0)
        result = driver.engine.run(plan)
        assert tokens_of(result) == expected
        if expected:
            assert result.rows[0].finish == pb.STOP_ID
    assert result.row_count == 0


def test_plans_that_break_the_contract_are_refused(tiny_model: Callable[[str], Path]) -> None:
    driver = Driver(tiny_model("llama"))
    plan = driver.plan()
    spans = [pb.AdapterSpan(entries=[pb.AdapterEntry(slot=3, weight=1.0)])]
    driver.start(plan, 0, 3, 4, spans=spans)
    with pytest.raises(BadPlan, match="slot 3"):
        driver.engine.run(plan)
    with pytest.raises(BadPlan, match="not running"):
        driver.engine.run(pb.StepPlan(ends=[5]))


def test_a_plan_with_ends_only_frees_rows(tiny_model: Callable[[str], Path]) -> None:
    driver = Driver(tiny_model("llama"))
    plan = driver.plan()
    driver.start(plan, 0, 3, 4)
    plan.chunks.add(row=0, start=0, tokens=[1, 2, 3])
    driver.engine.run(plan)
    assert len(driver.rows) == 1
    result = driver.engine.run(pb.StepPlan(epoch=1, seq=9, ends=[0]))
    assert len(driver.rows) == 0
    assert (result.seq, result.last, result.row_count) == (9, True, 0)
