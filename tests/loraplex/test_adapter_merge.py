"""`loraplex adapters merge`: into a new adapter; and into a base, where PEFT's own merge must equal it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex import cli

from .. import tiny

Base = Callable[[str], Path]
Make = Callable[..., Path]
State = Mapping[str, torch.Tensor]

TOKENS = torch.arange(3, 43)[None]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def make(tiny_model: Base, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a LoRA adapter for a kind of base; equal ones once."""
    root = tmp_path_factory.mktemp("adapters")
    made: dict[str, Path] = {}

    def build(kind: str, seed: int = 1, rank: int = 4, targets: Any = "all-linear", **extra: Any) -> Path:
        key = repr((kind, seed, rank, targets, extra))
        if key not in made:
            recipe = tiny.AdapterRecipe(rank, targets=targets, extra=extra)
            made[key] = tiny.build_adapter(tiny_model(kind), root / str(len(made)), recipe, seed=seed)
        return made[key]

    return build


def merge(*arguments: object) -> int:
    return cli.run(["adapters", "merge", *map(str, arguments)])


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def merged_by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    values: torch.Tensor = model(TOKENS).logits
    return values


def assert_same_weights(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=TOLERANCE), name


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "qwen2"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_merged_base_equals_peft(
    kind: str, dora: bool, make: Make, tiny_model: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(kind, use_dora=dora)
    assert merge(tmp_path / "out", adapter, "--into", tiny_model(kind)) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    found, expected = load(tmp_path / "out"), merged_by_peft(tiny_model(kind), adapter)
    assert_same_weights(found.state_dict(), expected.state_dict())
    assert torch.allclose(logits(found), logits(expected), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(found), logits(load(tiny_model(kind))), rtol=0, atol=0.1)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids == tiny.tokenizer()("abc").input_ids
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    before = json.loads((tiny_model(kind) / "config.json").read_text())
    assert config == before


def test_ia3_is_merged_too(tiny_model: Base, tmp_path: Path) -> None:
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(tiny_model("llama")), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + torch.randn(parameter.shape) * 0.3
    model.save_pretrained(tmp_path / "ia3")
    assert merge(tmp_path / "out", tmp_path / "ia3", "--into", tiny_model("llama")) == 0
    expected = merged_by_peft(tiny_model("llama"), tmp_path / "ia3")
    assert_same_weights(load(tmp_path / "out").state_dict(), expected.state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_merged_too(kind: str, make: Make, tiny_model: Base, tmp_path: Path) -> None:
    adapter = make(
        kind, targets=("q_proj",), target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    assert merge(tmp_path / "out", adapter, "--into", tiny_model(kind)) == 0
    found, expected = load(tmp_path / "out"), merged_by_peft(tiny_model(kind), adapter)
    assert_same_weights(found.state_dict(), expected.state_dict())
    assert not torch.allclose(logits(found), logits(load(tiny_model(kind))), rtol=0, atol=0.1)


def test_norms_and_biases_of_its_own_are_merged_too(make: Make, tiny_model: Base, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(make("qwen2", modules_to_save=["norm"], bias="all"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = [key for key in tensors if "lora_" not in key]
    assert {key.rpartition(".")[2] for key in changed} == {"weight", "bias"}
    save_file(
        {key: value * (1.5 if key in changed else 1) for key, value in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    assert merge(tmp_path / "out", adapter, "--into", tiny_model("qwen2")) == 0
    expected = merged_by_peft(tiny_model("qwen2"), adapter)
    assert_same_weights(load(tmp_path / "out").state_dict(), expected.state_dict())


def test_several_are_summed_with_their_weights(make: Make, tiny_model: Base, tmp_path: Path) -> None:
    base = tiny_model("llama")
    one, two = (
        make("llama", seed=1),
        make("llama", seed=2, rank=7, use_rslora=True, targets=("q_proj", "up_proj")),
    )
    assert merge(tmp_path / "out", f"{one}=0.7", f"{two}=-0.4", "--into", base) == 0
    found, plain = load(tmp_path / "out").state_dict(), load(base).state_dict()
    merged = [merged_by_peft(base, adapter).state_dict() for adapter in (one, two)]
    expected = {
        name: tensor + 0.7 * (merged[0][name] - tensor) - 0.4 * (merged[1][name] - tensor)
        for name, tensor in plain.items()
    }
    assert_same_weights(found, expected)


def test_weights_are_rounded_once_to_the_bases_dtype(make: Make, tiny_model: Base, tmp_path: Path) -> None:
    exact = tiny_model("llama")
    half = tiny.build_model("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = make("llama")
    assert merge(tmp_path / "out", adapter, "--into", half) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    rounded = load(half).float()
    delta = merged_by_peft(exact, adapter).state_dict()
    for name, tensor in load(exact).state_dict().items():
        expected = (rounded.state_dict()[name] + (delta[name] - tensor)).bfloat16()
        assert found[name].dtype == torch.bfloat16
        assert torch.allclose(found[name].float(), expected.float(), rtol=2**-7, atol=1e-6), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_embedding_unties_from_the_head(make: Make, tiny_model: Base, tmp_path: Path) -> None:
    base = tiny_model("llama_tied")
    adapter = make("llama_tied", targets=("q_proj", "embed_tokens"))
    assert merge(tmp_path / "out", adapter, "--into", base) == 0
    found = load(tmp_path / "out")
    served = PeftModel.from_pretrained(load(base), adapter).eval()
    assert torch.allclose(logits(found), logits(served), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(found.lm_head.weight, load(base).lm_head.weight)
    assert not torch.equal(found.model.embed_tokens.weight, found.lm_head.weight)


def test_a_tied_base_stays_tied_where_nothing_touches_it(
    make: Make, tiny_model: Base, tmp_path: Path
) -> None:
    base = tiny_model("llama_tied")
    adapter = make("llama_tied")
    assert merge(tmp_path / "out", adapter, "--into", base) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is no dictionary
    assert_same_weights(load(tmp_path / "out").state_dict(), merged_by_peft(base, adapter).state_dict())


def test_more_token_ids_make_a_larger_model(tiny_model: Base, tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = load(base)
    model.resize_token_embeddings(tiny.VOCAB + 5)
    adapter = tmp_path / "adapter"
    resized = tmp_path / "resized"
    model.save_pretrained(resized)
    tiny.tokenizer().save_pretrained(resized)
    tiny.build_adapter(
        resized, adapter, tiny.AdapterRecipe(4, targets=("q_proj", "lm_head", "embed_tokens")), seed=3
    )
    text = (resized / "tokenizer.json").read_text().replace('"version": "1.0"', '"version": "1.0" ')
    (adapter / "tokenizer.json").write_text(text)
    assert merge(tmp_path / "out", adapter, "--into", base) == 0
    found, expected = load(tmp_path / "out"), merged_by_peft(resized, adapter)
    assert found.config.vocab_size == tiny.VOCAB + 5
    assert_same_weights(found.state_dict(), expected.state_dict())
    assert (tmp_path / "out/tokenizer.json").read_text() == text


def test_a_tied_base_that_grows_stays_tied(make: Make, tiny_model: Base, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(make("llama_tied", targets=("q_proj",)), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    rows = torch.randn(tiny.VOCAB + 5, 64)
    tensors["base_model.model.model.embed_tokens.weight"] = rows
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert merge(tmp_path / "out", adapter, "--into", tiny_model("llama_tied")) == 0
    found = load(tmp_path / "out")
    assert found.config.tie_word_embeddings is True
    assert found.config.vocab_size == tiny.VOCAB + 5
    assert torch.equal(found.model.embed_tokens.weight, rows)
    assert torch.equal(found.lm_head.weight, rows)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([({"use_dora": True}, ""), ({}, "")], "cannot be weighted or merged with others"),
        ([({"use_dora": True}, "=0.5")], "cannot be weighted or merged with others"),
        ([({"lora_bias": True}, "")], "adds a bias, and the base has none there"),
        ([({"alora_invocation_tokens": [5, 6]}, "")], "aLoRA"),
    ],
    ids=["dora in company", "dora with a weight", "bias", "alora"],
)
def test_what_weights_cannot_hold_is_refused_by_name(
    parts: list[tuple[dict[str, Any], str]],
    reason: str,
    make: Make,
    tiny_model: Base,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = [f"{make('llama', **options)}{weight}" for options, weight in parts]
    assert merge(tmp_path / "out", *named, "--into", tiny_model("llama")) == 1
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_base_with_the_linears_in_another_form_is_refused(
    dora: bool, make: Make, tiny_model: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make("llama", targets=("q_proj",), use_dora=dora)
    assert merge(tmp_path / "out", adapter, "--into", tiny_model("phi3")) == 1
    assert "q_proj: the base has this linear in another form" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_vocabulary_is_refused(
    tiny_model: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_model("llama"))
    model.resize_token_embeddings(290)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    assert merge(tmp_path / "out", tmp_path / "adapter", "--into", tiny_model("llama")) == 1
    assert "290 token ids, the base 300" in capsys.readouterr().err


def test_two_heads_are_refused_one_is_merged(
    make: Make, tiny_model: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = []
    for seed in (1, 2):
        adapter = tmp_path / f"adapter{seed}"
        shutil.copytree(make("llama", seed=seed, modules_to_save=["lm_head"]), adapter)
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.weight"] *= 1 + seed
        save_file(tensors, adapter / "adapter_model.safetensors")
        adapters.append(adapter)
    assert merge(tmp_path / "out", *adapters, "--into", tiny_model("llama")) == 1
    assert "both replace lm_head" in capsys.readouterr().err
    assert merge(tmp_path / "out", adapters[0], "--into", tiny_model("llama")) == 0
    expected = merged_by_peft(tiny_model("llama"), adapters[0])
    assert_same_weights(load(tmp_path / "out").state_dict(), expected.state_dict())


def product(directory: Path, module: str) -> torch.Tensor:
    """s · B A of one module, scale 1 or the config's."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def test_cat_is_the_exact_sum(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make("llama", seed=1), make("llama", seed=2, rank=7)
    assert merge(tmp_path / "out", f"{one}=0.5", f"{two}=-2", "--method", "cat") == 0
    assert "cat of 2, " in capsys.readouterr().out
    module = "model.layers.1.mlp.up_proj"
    expected = 0.5 * product(one, module) - 2 * product(two, module)
    assert torch.allclose(product(tmp_path / "out", module), expected, atol=1e-5)


def test_the_parameters_of_a_method_reach_it(make: Make, tmp_path: Path) -> None:
    parts = [make("llama", seed=1), make("llama", seed=2)]
    options = ["--method", "dare_ties", "--density", "0.5", "--majority-sign", "frequency"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert merge(tmp_path / name, *parts, *options, "--seed", seed) == 0
    assert merge(tmp_path / "d", *parts, "--method", "svd", "--rank", "2") == 0
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]
    assert json.loads((tmp_path / "d/adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--method", "bat"], 2, "there is no merge method 'bat'"),
        (["--method", "ties"], 2, "density is missing"),
        (["--method", "cat", "--rank", "3"], 2, "leave rank out"),
        (["--into", "x", "--method", "cat"], 2, "--into adds the adapters to the base; it takes no method"),
        (["--method", "linear"], 1, "needs one (cat does not)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    options: list[str],
    code: int,
    message: str,
    make: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = [make("llama", seed=1), make("llama", seed=2, rank=7)]
    assert merge(tmp_path / "out", *parts, *options) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_weight_must_be_finite(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(tmp_path / "out", f"{make('llama')}=nan") == 2
    assert "a weight must be finite" in capsys.readouterr().err
    assert merge(tmp_path / "out", tmp_path / "a=b") == 2
    assert "a=b' is neither a directory" in capsys.readouterr().err
