"""LoRA on experts: served as PEFT computes it, in both of its forms, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file, save
from torch import nn
from transformers import AutoModelForCausalLM

from loraplex.kernels.cpu import CpuLoraOps
from loraplex.kernels.ops import Entries
from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.assemble import assemble
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.layout import AdapterLayout, ExpertsParameter, ExpertsTarget, Target
from loraplex.shard.adapters.parse import parse_adapter
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.adapters.weights import ExpertWeights, PackedAdapter
from loraplex.shard.attention import PagedAttention
from loraplex.shard.batch import build_batch
from loraplex.shard.errors import AdapterRejected
from loraplex.shard.kv import KvCache
from loraplex.shard.model import specialise
from loraplex.shard.rows import Row, RowTable
from loraplex.shard.trace import trace

pytestmark = [
    # PEFT uses what transformers is about to rename, and looks for patterns of parameters among modules.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

CPU = torch.device("cpu")
PROMPT = (5, 71, 204, 33, 9, 150, 12, 88, 240, 3, 17)
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
DOWN = ("mlp.experts.down_proj",)

CASES: Mapping[str, Mapping[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "down": {"target_parameters": DOWN},
    "gate_up with rslora": {"target_parameters": BOTH[:1], "use_rslora": True},
    "router": {
        "target_parameters": (*DOWN, "mlp.gate.weight"),
        "rank_pattern": {"gate.weight": 2},
        "alpha_pattern": {"gate.weight": 9, "gate": 40},
    },
    "with attention": {"target_parameters": DOWN, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 1, "layers.1.mlp.experts.gate_up_proj": 5},
        "alpha_pattern": {"gate_up_proj": -3, "layers.2.*": 20},
    },
}


def fresh(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")


def make(base: Path, directory: Path, seed: int, **fields: Any) -> Path:
    """An adapter of PEFT's on this base, with random values."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": [], "task_type": "CAUSAL_LM"} | fields
    settings["target_parameters"] = list(settings["target_parameters"])
    model = get_peft_model(fresh(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    model.save_pretrained(directory)
    return directory


@torch.inference_mode()
def logits_of(model: nn.Module) -> torch.Tensor:
    """[tokens, vocabulary] of the prompt."""
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([PROMPT])).logits[0]
    return logits


class Served:
    """A model as a shard serves it."""

    def __init__(self, directory: Path) -> None:
        model = fresh(directory)
        seen = trace(model)
        kv = KvCache(seen.layers, blocks=16, block_size=16, dtype=torch.float32, device=CPU)
        special = specialise(model, seen, attention=PagedAttention(kv), ops=CpuLoraOps(), max_rank=64)
        self._model = special.model
        self.layout = special.layout
        self._base = BaseTensors(special.parameters)
        self._pool = AdapterPool(special.sites, slots=16, budget=1 << 30)

    def load(self, slot: int, directory: Path) -> PackedAdapter:
        config = (directory / "adapter_config.json").read_bytes()
        weights = memoryview((directory / "adapter_model.safetensors").read_bytes())
        adapter = pack(config, weights, self.layout, self._base)
        self._pool.load(slot, str(slot), adapter)
        return adapter

    def logits(self, rows: Sequence[Entries]) -> list[torch.Tensor]:
        """The prompt with each of these adapters, all in one step."""
        table, plan = RowTable(len(rows), 4), pb.StepPlan()
        for index, entries in enumerate(rows):
            span = pb.AdapterSpan(entries=[pb.AdapterEntry(slot=s, weight=w) for s, w in entries])
            start = pb.RowStart(
                row=index, prompt_length=len(PROMPT), output=pb.RowStart.PROMPT_LOGPROBS, spans=[span]
            )
            table.start(Row.from_proto(start))
            table.extend(index, [index + 1])
            plan.chunks.add(row=index, start=0, tokens=PROMPT)
        logits = self._model.forward(build_batch(plan, table, block_size=16))
        # Rows with the same adapters are laid side by side: find each row's place again.
        order = sorted(range(len(rows)), key=lambda index: table[index].last_entries())
        parts = dict(zip(order, logits.split(len(PROMPT)), strict=True))
        return [parts[index] for index in range(len(rows))]


def pack(
    config: bytes, weights: memoryview, layout: AdapterLayout, base: BaseTensors | None = None
) -> PackedAdapter:
    parsed = parse_adapter(config, weights, layout, base or BaseTensors({}))
    file = BytesIO()
    index = assemble(parsed, file, layout.dtype)
    return PackedAdapter(index, torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_logits_equal_peft(kind: str, name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_model(kind)
    directory = make(base, tmp_path / "adapter", 1, **CASES[name])
    served = Served(base)
    served.load(3, directory)
    expected = logits_of(PeftModel.from_pretrained(fresh(base), directory))
    plain = logits_of(fresh(base))
    assert (expected - plain).abs().max() > 0.01
    adapted, unadapted = served.logits([((3, 1.0),), ()])
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(unadapted, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_one_batch_of_adapters_sums_and_the_base(
    kind: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model(kind)
    first = make(base, tmp_path / "first", 1, target_parameters=BOTH)
    second = make(base, tmp_path / "second", 2, target_parameters=BOTH, r=5, use_rslora=True)
    down = make(base, tmp_path / "down", 3, **CASES["with attention"])
    served = Served(base)
    for slot, directory in enumerate((first, second, down)):
        served.load(slot, directory)
    rows: list[Entries] = [
        (), ((0, 1.0),), ((1, 1.0),), ((0, 0.5),), ((0, 0.5), (1, 0.5)), ((2, 1.0),), ((0, 0.5), (1, 0.5)),
    ]  # fmt: skip
    got = served.logits(rows)
    half = PeftModel.from_pretrained(fresh(base), first)
    weigh(half, 0.5)
    both = PeftModel.from_pretrained(fresh(base), first, adapter_name="first")
    both.load_adapter(second, "second")
    both.base_model.set_adapter(["first", "second"])
    weigh(both, 0.5)
    summed = logits_of(both)
    expected = [
        logits_of(fresh(base)),
        *(logits_of(PeftModel.from_pretrained(fresh(base), path)) for path in (first, second)),
        logits_of(half),
        summed,
        logits_of(PeftModel.from_pretrained(fresh(base), down)),
        summed,
    ]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def weigh(model: nn.Module, weight: float) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: weight * scale for name, scale in module.scaling.items()}


def write_single(
    directory: Path, model: nn.Module, parent: str, names: tuple[str, str, str], chosen: Mapping[int, str]
) -> None:
    """An adapter of transformers 4's form: for each expert, its linears "g" (gate), "u" (up) and "d" (down).

    Gate has rank 3 and alpha 6, or 9 for expert 2; up has rank 2 and alpha 4. Merges it into `model`.
    """
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        experts = layer.mlp.experts
        inner = experts.down_proj.shape[2]
        for expert, linears in chosen.items():
            places = {
                "g": (
                    names[0],
                    3,
                    9 / 3 if expert == 2 else 6 / 3,
                    experts.gate_up_proj.data[expert, :inner],
                ),
                "u": (names[1], 2, 4 / 2, experts.gate_up_proj.data[expert, inner:]),
                "d": (names[2], 3, 6 / 3, experts.down_proj.data[expert]),
            }
            for linear in linears:
                name, rank, scale, weight = places[linear]
                a = torch.randn(rank, weight.shape[1], generator=generator) * 0.15
                b = torch.randn(weight.shape[0], rank, generator=generator) * 0.15
                key = f"base_model.model.model.layers.{index}.{parent}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.numpy(), b.numpy()
                weight += scale * b @ a
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": list(names),
        "rank_pattern": {names[1]: 2},
        "alpha_pattern": {names[1]: 4, rf"experts\.2\.{names[0]}": 9},
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(save(tensors))


@pytest.mark.parametrize(
    ("kind", "parent", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(dict.fromkeys(range(4), "gud"), id="all"),
        pytest.param({0: "g", 2: "gu", 3: "d"}, id="some"),
        pytest.param({1: "u"}, id="one"),
    ],
)
def test_linears_of_single_experts_equal_merged_weights(
    kind: str,
    parent: str,
    names: tuple[str, str, str],
    chosen: dict[int, str],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base = tiny_model(kind)
    merged = fresh(base)
    write_single(tmp_path / "adapter", merged, parent, names, chosen)
    served = Served(base)
    served.load(0, tmp_path / "adapter")
    adapted, unadapted = served.logits([((0, 1.0),), ()])
    expected, plain = logits_of(merged), logits_of(fresh(base))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(unadapted, plain, rtol=0, atol=1e-4)


def test_a_router_of_older_transformers_equals_merged_weights(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model("mixtral")
    merged, tensors, generator = fresh(base), {}, torch.Generator().manual_seed(5)
    for index, layer in enumerate(merged.model.layers):
        a, b = torch.randn(2, 64, generator=generator), torch.randn(4, 2, generator=generator)
        key = f"base_model.model.model.layers.{index}.block_sparse_moe.gate"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.numpy(), b.numpy()
        layer.mlp.gate.weight.data += 0.5 * b @ a
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["gate"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(save(tensors))
    served = Served(base)
    served.load(0, tmp_path)
    adapted, unadapted = served.logits([((0, 1.0),), ()])
    expected, plain = logits_of(merged), logits_of(fresh(base))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(unadapted, plain, rtol=0, atol=1e-4)


def test_experts_are_packed_at_their_true_size(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_model("mixtral")
    write_single(tmp_path / "adapter", fresh(base), "block_sparse_moe", ("w1", "w3", "w2"), {0: "gu", 1: "g"})
    adapter = Served(base).load(0, tmp_path / "adapter")
    for weights in adapter.site_weights().values():
        assert isinstance(weights, ExpertWeights)
        shapes = {name: (a.shape, b.shape) for name, (a, b) in weights.parameters.items()}
        assert shapes == {"gate_proj": ((4, 3, 64), (4, 3, 96)), "up_proj": ((4, 2, 64), (4, 2, 96))}
    assert adapter.nbytes < 3 * 4 * 4 * (3 + 2) * (64 + 96) + 12 * 128


def test_older_peft_had_in_and_out_the_other_way_round(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """What PEFT 0.17 called A is over an expert's outputs, what it called B over its inputs."""
    base = tiny_model("mixtral")
    directory = make(base, tmp_path / "adapter", 1, target_parameters=BOTH)
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    swapped = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            by_expert = b.reshape(len(b), 3, 4).transpose(2, 1, 0)
            swapped[key] = np.ascontiguousarray(by_expert.reshape(12, len(b)))
            by_column = a.reshape(4, 3, -1).transpose(2, 1, 0)
            swapped[key.replace("lora_A", "lora_B")] = np.ascontiguousarray(by_column.reshape(-1, 12))
    expected = logits_of(PeftModel.from_pretrained(fresh(base), directory))
    weights.write_bytes(save(swapped))
    served = Served(base)
    served.load(0, directory)
    torch.testing.assert_close(served.logits([((0, 1.0),)])[0], expected, rtol=0, atol=1e-4)


TOY = AdapterLayout(
    linears=(Target("model.layers.0.self_attn.q_proj", 0, 8, 8, 0),),
    experts=(
        ExpertsTarget(
            "model.layers.0.mlp.experts",
            1,
            2,
            (
                ExpertsParameter("gate_up_proj", 8, 8, False, ("gate_proj", "up_proj")),
                ExpertsParameter("down_proj", 4, 8, False),
            ),
        ),
    ),
    other_modules=("model.layers.0.mlp.gate",),
    dtype="float32",
    max_rank=4,
)
"""Two experts, whose gate and up together are as wide as high."""

EXPERTS = "base_model.model.model.layers.0.mlp.experts"
OLD = "base_model.model.model.layers.0.block_sparse_moe.experts"


def tensors_of(*pairs: tuple[str, tuple[int, ...], tuple[int, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    """A and B of these modules, by their shapes; an empty shape leaves one out."""
    random = np.random.default_rng(0)
    tensors = {}
    for module, *shapes in pairs:
        for side, shape in zip("AB", shapes, strict=True):
            if shape:
                tensors[f"{module}.lora_{side}.weight"] = random.standard_normal(shape, np.float32)
    return tensors


def pack_toy(*pairs: tuple[str, tuple[int, ...], tuple[int, ...]], **fields: Any) -> ExpertWeights:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "peft_version": "0.19.1",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    weights = memoryview(save(tensors_of(*pairs)))
    adapter = pack(json.dumps(config | fields).encode(), weights, TOY)
    found = adapter.site_weights()[1]
    assert isinstance(found, ExpertWeights)
    return found


DOWN_PAIR = (EXPERTS, (4, 4), (8, 4))
SQUARE_PAIR = (EXPERTS, (4, 8), (8, 4))


def test_the_shape_tells_the_parameter() -> None:
    assert list(pack_toy(DOWN_PAIR).parameters) == ["down_proj"]
    nested = pack_toy(DOWN_PAIR, (f"{EXPERTS}.base_layer", (4, 8), (8, 4)))
    assert {name: a.shape for name, (a, _) in nested.parameters.items()} == {
        "down_proj": (2, 2, 4),
        "gate_up_proj": (2, 2, 8),
    }
    [(name, (a, b))] = pack_toy((EXPERTS, (4, 8), (4, 4))).parameters.items()
    assert (name, a.shape, b.shape) == ("down_proj", (2, 2, 4), (2, 2, 8))


@pytest.mark.parametrize(
    ("pairs", "fields", "words"),
    [
        pytest.param([(EXPERTS, (4, 4), ())], {}, "lora_A.weight has no lora_B", id="without B"),
        pytest.param([(EXPERTS, (), (8, 4))], {}, "lora_B.weight has no lora_A", id="without A"),
        pytest.param([(EXPERTS, (4,), (8, 4))], {}, "a matrix is needed", id="flat"),
        pytest.param([(EXPERTS, (4, 6), (8, 4))], {}, "in=6 out=8.*gate_up_proj in=8 out=8", id="width"),
        pytest.param([(EXPERTS, (3, 4), (8, 3))], {}, "3 rows .* base's 2 experts", id="experts"),
        pytest.param([(EXPERTS, (4, 4), (8, 2))], {}, "4 rows and .* 2 columns", id="sides"),
        pytest.param([DOWN_PAIR], {"r": 4}, "has rank 2, its config .* says 4", id="config rank"),
        pytest.param([(EXPERTS, (16, 4), (8, 16))], {"r": 8}, "rank 8; .*--max-rank 4", id="rank limit"),
        pytest.param([DOWN_PAIR], {"target_parameters": None}, "target_parameters", id="no parameters"),
        pytest.param(
            [DOWN_PAIR],
            {"target_parameters": ["experts.gate_up_proj"]},
            "not select .*down_proj",
            id="another",
        ),
        pytest.param(
            [DOWN_PAIR, (OLD, (4, 4), (8, 4))], {"target_parameters": ["down_proj"]}, "keep one", id="twice"
        ),
        pytest.param([SQUARE_PAIR], {"peft_version": "0.18.1"}, "as wide as high.*0.19", id="square, old"),
        pytest.param([SQUARE_PAIR], {"peft_version": None}, "as wide as high.*0.19", id="square, unknown"),
        pytest.param([(f"{EXPERTS}.2.w2", (2, 4), (8, 2))], {}, "base has 2 experts", id="expert"),
        pytest.param([(f"{EXPERTS}.1.w9", (2, 4), (8, 2))], {}, "no such linear.*up_proj", id="linear"),
        pytest.param([(f"{EXPERTS}.1.w1", (2, 8), (8, 2))], {}, "in=8 out=8.*in=8 out=4", id="half's width"),
        pytest.param([(f"{EXPERTS}.1.w2", (2, 4), (8, 1))], {}, "rank 2, .* has 1", id="single's sides"),
        pytest.param([(f"{EXPERTS}.1.w2", (1, 4), (8, 1))], {}, "rank 1, its config", id="single's rank"),
        pytest.param(
            [(f"{EXPERTS}.1.w2", (2, 4), (8, 2))],
            {"target_modules": ["w1"]},
            "target_modules",
            id="unselected",
        ),
        pytest.param(
            [(f"{EXPERTS}.1.w2", (2, 4), (8, 2)), (f"{EXPERTS}.1.down_proj", (2, 4), (8, 2))],
            {},
            "mean the same tensor",
            id="one linear twice",
        ),
        pytest.param([DOWN_PAIR], {"init_lora_weights": "pissa"}, "PiSSA.* on experts", id="pissa"),
        pytest.param(
            [("base_model.model.model.layers.0.mlp.gate", (2, 8), (2, 2))],
            {},
            "this kind of module",
            id="router",
        ),
    ],
)
def test_refused_by_name(
    pairs: list[tuple[str, tuple[int, ...], tuple[int, ...]]], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterRejected, match=words):
        pack_toy(*pairs, **fields)


def test_a_parameter_as_wide_as_high_is_read_as_current_peft_has_it() -> None:
    tensors = tensors_of(SQUARE_PAIR)
    a, b = pack_toy(SQUARE_PAIR).parameters["gate_up_proj"]
    stored_a, stored_b = tensors[f"{EXPERTS}.lora_A.weight"], tensors[f"{EXPERTS}.lora_B.weight"]
    for expert in range(2):
        for rank in range(2):
            assert np.array_equal(a[expert, rank], stored_a[expert * 2 + rank])
            assert np.array_equal(b[expert, rank], stored_b[:, rank * 2 + expert])


def test_values_that_are_not_finite_are_refused() -> None:
    tensors = tensors_of(DOWN_PAIR)
    tensors[f"{EXPERTS}.lora_B.weight"][0, 0] = np.nan
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["experts.down_proj"]}
    with pytest.raises(AdapterRejected, match=r"experts\.lora_B\.weight holds NaN"):
        pack(json.dumps(config).encode(), memoryview(save(tensors)), TOY)
