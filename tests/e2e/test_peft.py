"""The whole server against PEFT: eight adapters and the base in one batch, over REST."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..tiny import AdapterRecipe, build_adapter
from .server import Server, serving

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"]
TOKENS = 12
"""Output tokens that are compared. The server is asked for more, so that all rows run together."""
ROUNDS = 10
"""At most so many times are all cases asked at once until one step held every adapter: on a busy machine the
last request may arrive when the first has ended."""
BASE = "base"

SOME = {
    "phi3": ("qkv_proj", "o_proj", "lm_head"),
    "gemma2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}
"""Attention, and the output head where it is not tied to the embeddings."""
FIRST = {"phi3": "qkv_proj", "gpt2": "c_attn"}


def recipes(kind: str) -> dict[str, AdapterRecipe]:
    """Ranks 1 to 64, rsLoRA, rank and alpha patterns, partial targets."""
    first = FIRST.get(kind, "q_proj")
    last = "mlp.c_proj" if kind == "gpt2" else "down_proj"
    layer = "h.1" if kind == "gpt2" else "layers.1"
    return {
        "rank1": AdapterRecipe(1),
        "rank3": AdapterRecipe(3, alpha=7.5),
        "rank8": AdapterRecipe(8),
        "rank16": AdapterRecipe(16, extra={"use_rslora": True}),
        "rank64": AdapterRecipe(64, alpha=64),
        "some": AdapterRecipe(8, targets=SOME.get(kind, ("q_proj", "v_proj", "lm_head"))),
        "ranks": AdapterRecipe(4, extra={"rank_pattern": {first: 11, last: 2}}),
        "alphas": AdapterRecipe(
            8, extra={"alpha_pattern": {rf"{layer}\..*{first}": 3.0, last: 40.0}, "use_rslora": True}
        ),
    }


@dataclass(frozen=True)
class Case:
    """One row of the batch, and PEFT's answer to it."""

    model: str
    prompt: list[int]
    logprobs: torch.Tensor
    """[prompt tokens - 1]: of each prompt token but the first."""
    output: list[int]


def oracle(base: Path, adapters: Mapping[str, Path], prompts: Mapping[str, list[list[int]]]) -> list[Case]:
    """Every prompt through PEFT, one adapter and one prompt at a time. Attention is the plain one: others
    leave Gemma's soft cap out."""
    names = list(adapters)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"),
        adapters[names[0]],
        adapter_name=names[0],
    )
    for name in names[1:]:
        model.load_adapter(adapters[name], name)
    model.eval()
    cases = []
    for name in names:
        model.set_adapter(name)
        cases += [_ask(model, name, prompt) for prompt in prompts[name]]
    with model.disable_adapter():
        cases += [_ask(model, BASE, prompt) for prompt in prompts[BASE]]
    return cases


@torch.inference_mode()
def _ask(model: torch.nn.Module, name: str, prompt: list[int]) -> Case:
    ids = torch.tensor([prompt])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    picked = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return Case(name, prompt, picked, output[0, len(prompt) :].tolist())


@dataclass(frozen=True)
class World:
    """A server with its eight adapters, and what PEFT says about them."""

    server: Server
    adapters: Mapping[str, Path]
    cases: list[Case]


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    root = tmp_path_factory.mktemp(request.param)
    base = tiny_model(request.param)
    adapters = {
        name: build_adapter(base, root / name, recipe, seed=seed)
        for seed, (name, recipe) in enumerate(recipes(request.param).items())
    }
    dice = random.Random(5)
    prompts = {
        name: [[dice.randrange(256) for _ in range(length)] for length in (1 + dice.randrange(6), 19)]
        for name in [*adapters, BASE]
    }
    roots = ["--adapter-root", str(root.parent)]
    with serving([*arguments(base), *roots, *named(adapters)], root / "log") as server:
        yield World(server, adapters, oracle(base, adapters, prompts))


def arguments(base: Path) -> list[str]:
    """A small step budget: the long prompts take several chunks."""
    return [str(base), "--served-model-name", BASE, "--dtype", "float32", "--kv-memory", "64MiB"]


def named(adapters: Mapping[str, Path]) -> list[str]:
    return [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]


def answers(server: Server, cases: list[Case]) -> list[tuple[torch.Tensor, list[int]]]:
    """All cases at once: the prompts' logprobs and the greedy tokens of each."""

    def ask(case: Case) -> tuple[torch.Tensor, list[int]]:
        choice = server.complete(
            case.model,
            case.prompt,
            max_tokens=4 * TOKENS,
            echo=True,
            logprobs=0,
            ignore_eos=True,
            return_token_ids=True,
        )["choices"][0]
        scores = choice["logprobs"]["token_logprobs"][1 : len(case.prompt)]
        return torch.tensor(scores, dtype=torch.float64), choice["token_ids"][:TOKENS]

    with ThreadPoolExecutor(len(cases)) as pool:
        return list(pool.map(ask, cases))


def worst_difference(server: Server, cases: list[Case]) -> float:
    pairs = zip(cases, answers(server, cases), strict=True)
    return max(float((got - case.logprobs).abs().max()) for case, (got, _) in pairs if len(case.prompt) > 1)


@pytest.mark.parametrize("world", ARCHITECTURES, indirect=True)
def test_a_mixed_batch_equals_peft_row_by_row(world: World) -> None:
    answers(world.server, world.cases)  # from here on every adapter is resident
    for _ in range(ROUNDS):
        for case, (logprobs, tokens) in zip(world.cases, answers(world.server, world.cases), strict=True):
            torch.testing.assert_close(
                logprobs, case.logprobs, rtol=0, atol=1e-4, msg=lambda m, c=case: f"{c.model}: {m}"
            )  # type: ignore[misc]
            assert tokens == case.output, case.model
        if world.server.metrics()["loraplex_step_adapters_max"] == len(world.adapters):
            break
    metrics = world.server.metrics()
    assert metrics["loraplex_step_adapters_max"] == len(world.adapters)
    assert metrics["loraplex_step_rows_max"] > len(world.adapters)


@pytest.mark.parametrize("world", ARCHITECTURES, indirect=True)
def test_every_adapter_moves_some_logprob(world: World) -> None:
    by_model = {case.model: case for case in world.cases if len(case.prompt) == 19}
    for name in world.adapters:
        mine = by_model[name]
        as_base = Case(BASE, mine.prompt, mine.logprobs, mine.output)
        assert worst_difference(world.server, [as_base]) > 0.1, name


@pytest.mark.parametrize("world", ["llama", "gpt2"], indirect=True)
def test_the_comparison_sees_a_scale_off_by_a_hundredth_and_swapped_slots(
    world: World, tmp_path: Path
) -> None:
    """The test of the test: PEFT's answers against adapters that are almost, or elsewhere, right."""
    for name, path in world.adapters.items():
        scaled = tmp_path / f"{name}-scaled"
        scaled.mkdir()
        tensors = load_file(path / "adapter_model.safetensors")
        for key in tensors:
            if "lora_B" in key:
                tensors[key] = tensors[key] * 1.01
        save_file(tensors, scaled / "adapter_model.safetensors")
        (scaled / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
        world.server.post("/v1/load_lora_adapter", {"lora_name": f"{name}-scaled", "lora_path": str(scaled)})
        mine = [case for case in world.cases if case.model == name]
        moved = [Case(f"{name}-scaled", case.prompt, case.logprobs, case.output) for case in mine]
        assert worst_difference(world.server, moved) > 1e-4, name
    others = dict(zip(world.adapters, [*list(world.adapters)[1:], next(iter(world.adapters))], strict=True))
    for case in world.cases:
        if case.model != BASE and len(case.prompt) == 19:
            swapped = Case(others[case.model], case.prompt, case.logprobs, case.output)
            assert worst_difference(world.server, [swapped]) > 1e-2, case.model
