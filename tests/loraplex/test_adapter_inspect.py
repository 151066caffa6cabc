"""`loraplex adapters inspect`: what it says of an adapter without its base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplex import cli
from loraplex.adapter_tools.modules import grouped, modules_of
from loraplex.shard.adapters.safetensors_header import TensorInfo

from ..fakes.hub import FakeHub

LAYER = "base_model.model.model.layers.{}.self_attn.{}"
Written = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> Written:
    """Writes an adapter from shapes by key and config fields; answers its directory."""

    def write(shapes: Mapping[str, tuple[int, ...]], **config: Any) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir()
        tensors = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return directory

    return write


def lora(module: str, rank: int, layers: range = range(1)) -> dict[str, tuple[int, ...]]:
    return {
        f"{LAYER.format(layer, module)}.lora_{side}.weight": shape
        for layer in layers
        for side, shape in (("A", (rank, 8)), ("B", (8, rank)))
    }


def lines_of(capsys: pytest.CaptureFixture[str], directory: Path) -> list[str]:
    assert cli.run(["adapters", "inspect", str(directory)]) == 0
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str], module: str) -> list[str]:
    """One row of the table."""
    [row] = [line for line in lines if line.startswith(module)]
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


def test_modules_are_grouped_by_layer_with_rank_and_scale(
    adapter: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = lora("q_proj", 16, range(12)) | lora("v_proj", 4, range(3)) | lora("v_proj", 4, range(8, 9))
    lines = lines_of(
        capsys,
        adapter(
            shapes,
            peft_type="LORA",
            base_model_name_or_path="org/base",
            r=16,
            lora_alpha=32,
            rank_pattern={"v_proj": 4},
            alpha_pattern={"v_proj": 2},
        ),
    )
    assert cells(lines, "type")[1] == "LORA"
    assert cells(lines, "base")[1] == "org/base"
    assert cells(lines, "file")[1].endswith("32 tensors, float32")
    assert len(cells(lines, "digest")[1]) == 64
    q_proj = cells(lines, "model.layers.*.self_attn.q_proj")
    assert q_proj[1:] == ["0-11", "A, B", "16", "2", "12.0 KiB"]
    assert cells(lines, "model.layers.*.self_attn.v_proj")[1:] == ["0-2, 8", "A, B", "4", "0.5", "1.0 KiB"]
    assert "- rank_pattern: ranks of their own: v_proj=4" in lines
    assert "- alpha_pattern: alphas of their own: v_proj=2" in lines
    assert len([line for line in lines if line.startswith("- ")]) == 2


def test_rslora_has_its_own_scale(adapter: Written, capsys: pytest.CaptureFixture[str]) -> None:
    directory = adapter(lora("q_proj", 16), peft_type="LORA", r=16, lora_alpha=8, use_rslora=True)
    lines = lines_of(capsys, directory)
    assert cells(lines, "model.layers.*")[4] == "2"
    assert "- use_rslora: rsLoRA: the scale is alpha / sqrt(r)" in lines


def test_everything_unusual_is_named(adapter: Written, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = LAYER.format(0, "q_proj")
    shapes = {
        f"{prefix}.lora_A.weight": (4, 8),
        f"{prefix}.lora_magnitude_vector": (8,),
        "base_model.model.lm_head.weight": (40, 8),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": (8, 0),
        "something": (1,),
    }
    directory = adapter(
        shapes,
        peft_type="LORA",
        base_model_name_or_path="org/base-bnb-4bit",
        r=8,
        use_dora=True,
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 2],
        layers_to_transform=0,
        bias="lora_only",
        init_lora_weights="pissa",
        target_modules=".*q_proj",
        alora_invocation_tokens=[7, 8],
        use_new_thing=True,
    )
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("")
    (directory / "adapter_model.bin").write_text("")
    notes = [line[2:] for line in lines_of(capsys, directory) if line.startswith("- ")]
    assert notes == [
        "use_dora: DoRA: each output is rescaled by a trained magnitude",
        "alora_invocation_tokens: aLoRA: applies from its invocation tokens on",
        "modules_to_save: modules replaced as a whole: lm_head",
        "trainable_token_indices: trained token embeddings: 1, 2",
        "layers_to_transform: only in layers: 0",
        "bias 'lora_only': brings its own biases",
        "init_lora_weights 'pissa'",
        "target_modules is a regular expression: .*q_proj",
        "trained on a base in 4 bits; on the whole base its outputs differ slightly",
        "fields of its config that are not known: use_new_thing",
        "A without B or B without A: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj",
        "empty tensors, as ungathered training leaves them: "
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
        "brings whole weights for lm_head",
        "tensors of no known kind: something",
        "model.layers.0.self_attn.q_proj has rank 4, its config says 8",
        "tokenizer.json: a tokenizer of its own",
        "chat_template.jinja: a chat template of its own",
        "adapter_model.bin: a pickle beside the safetensors, which is never opened",
    ]


@pytest.mark.parametrize(
    ("peft_type", "shapes", "rank", "scale"),
    [
        ("LOHA", {"hada_w1_a": (8, 3), "hada_w1_b": (3, 8)}, "3", "4"),
        ("IA3", {"ia3_l": (8, 1)}, "", ""),
        ("VERA", {"vera_lambda_b": (8,), "vera_lambda_d": (5,)}, "5", ""),
    ],
)
def test_other_types_are_shown_as_far_as_their_tensors_say(
    adapter: Written,
    capsys: pytest.CaptureFixture[str],
    peft_type: str,
    shapes: dict[str, tuple[int, ...]],
    rank: str,
    scale: str,
) -> None:
    named = {f"{LAYER.format(2, 'q_proj')}.{part}": shape for part, shape in shapes.items()}
    lines = lines_of(capsys, adapter(named, peft_type=peft_type, r=3, alpha=12))
    row = cells(lines, "model.layers.*.self_attn.q_proj")
    assert row[1] == "2"
    assert row[2] == ", ".join(sorted(shapes))
    assert row[3:-1] == [value for value in (rank, scale) if value]


def test_mlx_has_a_scale_of_its_own(
    adapter: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        "model.layers.3.self_attn.q_proj.lora_a": (8, 2),
        "model.layers.3.self_attn.q_proj.lora_b": (2, 8),
    }
    directory = adapter(
        keys, fine_tune_type="lora", model="org/base", lora_parameters={"rank": 2, "scale": 20.0}
    )
    (directory / "adapter_model.safetensors").rename(directory / "adapters.safetensors")
    lines = lines_of(capsys, directory)
    assert cells(lines, "type")[1] == "MLX"
    assert cells(lines, "base")[1] == "org/base"
    assert cells(lines, "model.layers.*")[1:5] == ["3", "A, B", "2", "20"]


def test_experts_in_one_tensor_have_the_rank_of_each(
    adapter: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    directory = adapter(
        {key.format("A"): (16, 8), key.format("B"): (8, 16)},
        peft_type="LORA",
        r=4,
        target_parameters=["mlp.experts.down_proj"],
    )
    lines = lines_of(capsys, directory)
    assert cells(lines, "model.layers.*.mlp.experts")[3] == "4"
    assert not any("its config says" in line for line in lines)


def test_names_that_terminals_obey_are_shown_harmless(
    adapter: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = adapter(lora("q_proj\x1b[2J", 2), peft_type="LORA", base_model_name_or_path="a\x1bb\nc")
    output = "\n".join(lines_of(capsys, directory))
    assert "\x1b" not in output
    assert "a?b c" in output


def test_what_cannot_be_read_says_why(
    adapter: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = adapter(lora("q_proj", 2), peft_type="LORA")
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.run(["adapters", "inspect", str(directory)]) == 1
    assert "the weights file is cut short" in capsys.readouterr().err
    path.rename(directory / "adapter_model.bin")
    assert cli.run(["adapters", "inspect", str(directory)]) == 1
    assert "loraplex adapters convert" in capsys.readouterr().err
    assert cli.run(["adapters", "inspect", "no such thing"]) == 2
    assert "is neither a directory" in capsys.readouterr().err


def test_a_repository_is_fetched_first(adapter: Written, tmp_path: Path) -> None:
    directory = adapter(lora("q_proj", 2), peft_type="LORA", r=2)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    with FakeHub() as hub:
        commit = hub.add("org/sql", files)
        code = "import sys; from loraplex.cli import run; sys.exit(run(sys.argv[1:]))"
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        answer = subprocess.run(
            [sys.executable, "-c", code, "adapters", "inspect", "org/sql"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert answer.stdout.splitlines()[0] == f"source  org/sql@{commit}"


def test_layers_are_listed_as_ranges() -> None:
    tensors = {
        f"model.layers.{layer}.q.lora_A.weight": TensorInfo(
            f"model.layers.{layer}.q.lora_A.weight", "F32", (2, 4), 0, 32
        )
        for layer in (7, 0, 1, 2, 5)
    }
    [group] = grouped((module, 1.0) for module in modules_of(tensors))
    assert group.layer_ranges == "0-2, 5, 7"
    assert group.nbytes == 5 * 32
