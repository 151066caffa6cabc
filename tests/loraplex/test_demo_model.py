"""The bundled model: each adapter does its task, the base does none, and the files are fit to ship."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from loraplex.demo import ADAPTERS, MODEL_DIR, corpus
from loraplex.demo.evaluate import accuracy, answers
from loraplex.demo.tasks import TASKS, Example, is_held_out, render

SAMPLE = 40
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=request.param).eval()


@pytest.fixture(scope="module")
def adapted(base: PreTrainedModel) -> Iterator[PeftModel]:
    """The base with every adapter loaded; the base itself again afterwards."""
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(base, ADAPTERS[first], adapter_name=first)
    for name in others:
        model.load_adapter(ADAPTERS[name], adapter_name=name)
    yield model.eval()
    model.unload()


def shipped_files() -> list[Path]:
    return [
        path for root in (MODEL_DIR, *ADAPTERS.values()) for path in sorted(root.rglob("*")) if path.is_file()
    ]


@pytest.mark.parametrize("name", TASKS)
def test_an_adapter_does_its_task_and_the_base_does_not(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    task = TASKS[name]
    examples = task.held_out(SAMPLE)
    adapted.set_adapter(name)
    assert accuracy(adapted, tokenizer, task, examples) >= 0.95
    with adapted.disable_adapter():
        assert accuracy(adapted, tokenizer, task, examples) <= 0.05


def test_one_prompt_is_answered_in_a_different_way_by_each(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = "hello my boat"
    with adapted.disable_adapter():
        seen = set(answers(adapted, tokenizer, [prompt]))
    for name in ADAPTERS:
        adapted.set_adapter(name)
        seen |= set(answers(adapted, tokenizer, [prompt]))
    assert len(seen) == len(ADAPTERS) + 1


@pytest.mark.parametrize("name", TASKS)
def test_demo_prompts_are_answered_right(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    task = TASKS[name]
    adapted.set_adapter(name)
    outputs = answers(adapted, tokenizer, task.demo_prompts)
    assert outputs == [task.answer(prompt) for prompt in task.demo_prompts]


@pytest.mark.parametrize("name", TASKS)
def test_held_out_prompts_are_in_no_training_text(name: str) -> None:
    task = TASKS[name]
    held_out = {example.prompt for example in task.held_out(200)}
    assert len(held_out) == 200
    held_out.update(task.demo_prompts)
    trained = {example.prompt for example in islice(task.training(Random(1)), 5000)}
    notes = [given for given, _ in islice(corpus.lines(Random(1)), 5000)]
    assert held_out.isdisjoint(trained)
    assert held_out.isdisjoint(given.partition(": ")[2].removesuffix(" = ") for given in notes)
    assert held_out.isdisjoint(given.removesuffix("\n") for given in notes)


def test_held_out_prompts_are_the_same_every_time_and_differ_by_seed() -> None:
    task = TASKS["reverse"]
    assert task.held_out(50) == task.held_out(50)
    assert task.held_out(50) != task.held_out(50, seed=1)


def test_a_sum_is_held_out_in_both_orders() -> None:
    sums = [(left, right) for left in range(100) for right in range(100)]
    assert all(is_held_out(f"{left}+{right}") == is_held_out(f"{right}+{left}") for left, right in sums)
    share = sum(is_held_out(f"{left}+{right}") for left, right in sums) / len(sums)
    assert 0.05 < share < 0.15


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("reverse", "hello my friend", "dneirf ym olleh"),
        ("shout", "hello my friend", "HELLO MY FRIEND!"),
        ("pirate", "hello my friend", "arr, ahoy me matey, says i!"),
        ("sums", "17+25", "42"),
        ("sums", "hello", "that is no sum."),
        ("piglatin", "hello my star apple", "ellohay myay arstay appleay"),
        ("novowels", "hello my Apple", "hll my ppl"),
        ("novowels", "i am a ship", "m shp"),
    ],
)
def test_answers(name: str, prompt: str, answer: str) -> None:
    task = TASKS[name]
    example = Example(prompt, task.answer(prompt))
    assert example.answer == answer
    assert task.is_right(example, answer)
    assert not task.is_right(example, f"{answer} and more")
    assert not task.is_right(example, corpus.remark(prompt))


@pytest.mark.parametrize(
    "text", ["ÅÄÖ ß", "\u202e\u0000\t\r\n", "👩‍👩‍👧 e\u0301", "日本語", "  two  spaces  ", "<eo", ""]
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert len(tokens) == 1 + len(text.encode())
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@given(text=st.text(alphabet=st.characters(exclude_characters="<", codec="utf-8"), max_size=40))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_chat_message_reads_as_the_prompts_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert (
        tokenizer(rendered, add_special_tokens=False)["input_ids"] == tokenizer(render("hello"))["input_ids"]
    )


def test_model_stops_at_the_tokenizers_end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("config.json", "generation_config.json"):
        assert json.loads((MODEL_DIR / name).read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_adapters_differ_in_shape() -> None:
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in ADAPTERS.values()]
    assert len(ADAPTERS) >= 4
    assert len({config["r"] for config in configs}) >= 4
    assert len({len(config["target_modules"]) for config in configs}) >= 2
    assert {config["use_rslora"] for config in configs} == {True, False}
    assert all(config["base_model_name_or_path"] == "loraplex-demo" for config in configs)


def test_files_are_small_and_bf16() -> None:
    files = shipped_files()
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 4 * MIB
    assert sum(path.stat().st_size for path in files) < 8 * MIB
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert len(tensors) == 1 + len(ADAPTERS)
    for path in tensors:
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_files_name_no_place_on_the_machine_that_made_them() -> None:
    places = [b"/tmp/", b"/home/", b"/root/", b"/work/", b"/Users/", str(Path.home()).encode() + b"/"]
    for path in shipped_files():
        content = path.read_bytes()
        assert not [place for place in places if place in content], path.name
    assert not [path for path in shipped_files() if path.suffix == ".md"]


def test_naming_the_demo_imports_no_torch() -> None:
    code = "import sys, loraplex.demo, loraplex.demo.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
