"""`loraplex adapters check`: the exit code says whether a shard would serve it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex import cli

from .. import tiny

Base = Callable[[str], Path]


@pytest.fixture(scope="module")
def lora(tiny_model: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of rank 5, for llama."""
    directory = tmp_path_factory.mktemp("adapters") / "lora"
    return tiny.build_adapter(tiny_model("llama"), directory, tiny.AdapterRecipe(5), seed=1)


def check(*arguments: object) -> int:
    return cli.run(["adapters", "check", *map(str, arguments)])


def test_what_would_be_served_is_shown(
    lora: Path, tiny_model: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    (lora / "tokenizer.json").write_text("{}")
    assert check(lora, "--base", tiny_model("llama"), "--dtype", "bfloat16") == 0
    (lora / "tokenizer.json").unlink()
    output, errors = capsys.readouterr()
    first, _, *lines = output.splitlines()
    assert first == f"{lora} would be served on {tiny_model('llama')}"
    facts = dict(line.split("  ", 1) for line in lines)
    assert facts["kind"].strip() == "LoRA"
    assert facts["modules"].strip() == "21"
    assert facts["largest rank"].strip() == "5"
    assert facts["on the device"].strip().endswith("KiB as bfloat16")
    assert facts["ships its own"].strip() == "tokenizer"
    assert errors == ""


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        ("gpt2", [], "model.layers.0."),
        ("llama", ["--max-rank", "4"], "rank 5"),
    ],
    ids=["another base", "rank limit"],
)
def test_what_would_be_refused_is_exit_code_1_and_one_line(
    lora: Path,
    tiny_model: Base,
    capsys: pytest.CaptureFixture[str],
    base: str,
    options: list[str],
    reason: str,
) -> None:
    assert check(lora, "--base", tiny_model(base), *options) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"loraplex: adapter {lora} is refused: ")
    assert error.count("\n") == 1
    assert reason in error


def test_what_cannot_be_found_out_is_exit_code_2(
    lora: Path, tiny_model: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(lora, "--base", tmp_path) == 2
    assert "holds no .safetensors weights" in capsys.readouterr().err
    assert check(tmp_path / "nowhere", "--base", tiny_model("llama")) == 2
    assert "is neither a directory" in capsys.readouterr().err
    assert check(lora, "--base", tiny_model("llama"), "--dtype", "int8") == 2
    assert "dtype must be float32, bfloat16 or float16" in capsys.readouterr().err
    assert check(lora) == 2
    assert "Missing option '--base'" in capsys.readouterr().err
