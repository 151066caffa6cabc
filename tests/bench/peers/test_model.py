"""The generated model and adapters: what transformers and PEFT make of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.peers import model, tokenizer
from bench.peers.model import parse_ranks, projections, write_adapter, write_all


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.*")}


def test_the_shape_is_the_one_that_the_measurements_name() -> None:
    with torch.device("meta"):
        made = LlamaForCausalLM(model.SHAPE)
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e6, 1) == 87.8
    assert model.SHAPE.max_position_embeddings == 2048
    assert not model.SHAPE.tie_word_embeddings


def test_transformers_loads_the_base(generated: Path) -> None:
    made = AutoModelForCausalLM.from_pretrained(generated / "base")
    assert made.dtype == torch.bfloat16
    logits = made(torch.arange(10, 30)[None]).logits
    assert logits.shape == (1, 20, 400)
    assert logits.isfinite().all()


def test_every_id_of_the_tokenizer_has_a_text_of_its_own(generated: Path, config: LlamaConfig) -> None:
    made = AutoTokenizer.from_pretrained(generated / "base")
    assert len(made) == config.vocab_size
    assert len(set(made.convert_ids_to_tokens(range(config.vocab_size)))) == config.vocab_size
    for text in ("Hello, world!", "naïve 🙂\n"):
        assert made.decode(made.encode(text)) == text
    assert min(made.encode("Hello")) >= len(tokenizer.SPECIALS)


@pytest.mark.parametrize("size", [tokenizer.SMALLEST - 1, tokenizer.LARGEST + 1])
def test_a_vocabulary_that_cannot_be_filled_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"not {size}"):
        tokenizer.build(size, 128)


def test_peft_applies_adapters_of_the_ranks_in_turn_to_every_projection(generated: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(generated / "base")
    ids = torch.arange(10, 30)[None]
    with torch.inference_mode():
        plain = base(ids).logits.float()
        adapted = PeftModel.from_pretrained(base, generated / "a0", adapter_name="a0")
        for name in ("a1", "a2"):
            adapted.load_adapter(generated / name, adapter_name=name)
        outputs = [plain]
        for name, rank in (("a0", 2), ("a1", 4), ("a2", 2)):
            adapted.set_adapter(name)
            layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
            assert len(layers) == 2 * 7
            assert {layer.r[name] for layer in layers} == {rank}
            assert {layer.scaling[name] for layer in layers} == {2.0}
            assert all(bool(layer.lora_B[name].weight.any()) for layer in layers)
            outputs.append(adapted(ids).logits.float())
    assert all(logits.isfinite().all() for logits in outputs)
    for index, logits in enumerate(outputs):
        assert all((logits - other).norm() > 0.01 * logits.norm() for other in outputs[:index])


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(
    generated: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    write_all(tmp_path / "again", 3, (2, 4), config)
    assert contents(tmp_path / "again") == contents(generated)
    write_all(tmp_path / "other", 3, (2, 4), config, seed=1)
    for name in ("base/model.safetensors", "a0/adapter_model.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() != (generated / name).read_bytes()


def test_what_is_there_stays_and_what_is_missing_is_made(
    generated: Path, config: LlamaConfig, tmp_path: Path
) -> None:
    write_all(tmp_path, 1, (2, 4), config)
    before = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    write_all(tmp_path, 3, (2, 4), config)
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(generated)


def test_an_adapter_holds_its_true_rank(config: LlamaConfig, tmp_path: Path) -> None:
    write_adapter(tmp_path, config, 8, seed=0)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wanted = 2 * 8 * sum(inputs + outputs for inputs, outputs in projections(config).values())
    assert sum(tensor.numel() for tensor in tensors.values()) == wanted
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_command_line_says_what_it_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(model, "write_all", lambda *arguments: asked.append(arguments))
    assert model.main([str(tmp_path), "--adapters", "2", "--ranks", "8"]) == 0
    assert asked == [(tmp_path, 2, (8,))]
    assert "base and 2 adapters" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "write_base", lambda directory, *_: directory.mkdir(parents=True))
    assert model.main(["/dev/null/x"]) == 1
    assert capsys.readouterr().err == "model: /dev/null/x cannot be written: Not a directory\n"


@pytest.mark.parametrize("text", ["", "8,", "0", "8,x"])
def test_ranks_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="8,16,32,64"):
        parse_ranks(text)
