"""Rows 37 to 46, 56 and 67: inits, experts, activation, the other types of PEFT, and MLX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file

from .bench import (
    PROMPT,
    WEIGHTS,
    Bench,
    Made,
    Maker,
    Reference,
    Saved,
    Tensors,
    altered,
    build,
    change_config,
    lora,
    peft,
    quiet,
    relabelled,
    write_adapter,
)
from .case import refused, served

_CONVERT = "path_initial_model_for_weight_conversion|convert"
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EVERY = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
_EXPERT_COUNT = 4
_CAUSAL = {"task_type": "CAUSAL_LM"}
_CALL = (33, 71)
_TWICE = (5, 33, 71, 204, 9, 150, 33, 71, 12, 88, 240, 3)
_NEVER = (5, 33, 204, 71, 9, 150, 12, 88, 240, 3)


def _experts(*names: str, **fields: Any) -> Maker:
    return lora(**{"target_modules": [], "target_parameters": [f"experts.{name}" for name in names]} | fields)


def _axes_swapped(version: str | None) -> Maker:
    """As PEFT before 0.19 stored it: A reads what the experts give, B gives what they read."""

    def swap(tensors: Tensors) -> Tensors:
        swapped = dict(tensors)
        for key, a in tensors.items():
            if key.endswith("experts.lora_A.weight"):
                other = key.replace("lora_A", "lora_B")
                b = tensors[other]
                rank = a.shape[0] // _EXPERT_COUNT
                by_expert = b.reshape(-1, rank, _EXPERT_COUNT).permute(2, 1, 0)
                swapped[key] = by_expert.reshape(rank * _EXPERT_COUNT, -1)
                by_rank = a.reshape(_EXPERT_COUNT, rank, -1).permute(2, 1, 0)
                swapped[other] = by_rank.reshape(-1, rank * _EXPERT_COUNT)
        return swapped

    return relabelled(altered(_experts("down_proj"), swap), peft_version=version)


def _per_expert(parent: str, names: tuple[str, ...]) -> Maker:
    """Keys as transformers 4 has them: one linear for each projection of each expert."""

    def make(bench: Bench) -> Made:
        random = torch.Generator().manual_seed(bench.seed)
        hidden = bench.base.fresh().config.hidden_size  # type: ignore[union-attr]
        inner = _expert_width(bench)
        tensors: Tensors = {}
        for layer in range(3):
            for expert in range(_EXPERT_COUNT):
                for name in names:
                    down = name in ("w2", "down_proj")
                    key = f"base_model.model.model.layers.{layer}.{parent}.experts.{expert}.{name}"
                    sizes = (inner, hidden) if down else (hidden, inner)
                    tensors[f"{key}.lora_A.weight"] = torch.randn(4, sizes[0], generator=random) * 0.1
                    tensors[f"{key}.lora_B.weight"] = torch.randn(sizes[1], 4, generator=random) * 0.3
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*names], **_CAUSAL}
        write_adapter(bench.directory, config, tensors)
        return Made(((bench.directory, 1.0),), Reference(bench.reload))

    return make


def _expert_width(bench: Bench) -> int:
    config = bench.base.fresh().config
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)  # type: ignore[union-attr]


def _called(prompt: tuple[int, ...]) -> Maker:
    make = lora(alora_invocation_tokens=list(_CALL))
    return lambda bench: replace(make(bench), prompt=prompt)


def _pruned_adalora(bench: Bench) -> Made:
    """AdaLoRA after its rank allocator: every module keeps another number of its six ranks."""
    config = AdaLoraConfig(init_r=6, lora_alpha=8, target_modules=_ATTENTION, total_step=10, **_CAUSAL)
    with quiet():
        model = build(bench, config, Saved())
        names = [name for name, _ in model.named_parameters() if "lora_E" in name]
        kept = {
            name.removeprefix("base_model.model."): [rank <= index % 6 for rank in range(6)]
            for index, name in enumerate(names)
        }
        model.peft_config["default"].rank_pattern = kept
        model.save_pretrained(bench.directory)
    return Made(((bench.directory, 1.0),), Reference(bench.reload))


def _qalora(bench: Bench) -> Made:
    """A reads the means of groups of 16 inputs. PEFT says what the same as plain LoRA computes."""
    group = 16
    make = lora(target_modules=["q_proj", "down_proj"])
    make(bench)
    grouped = load_file(bench.directory / WEIGHTS)
    plain = dict(grouped)
    for key, a in grouped.items():
        if "lora_A" in key:
            width = a.shape[1] // group
            grouped[key] = a[:, :width].contiguous()
            plain[key] = grouped[key].repeat_interleave(group, dim=1) * (width / group)
    twin = bench.part("plain")
    make(twin)
    save_file(plain, twin.directory / WEIGHTS)
    save_file(grouped, bench.directory / WEIGHTS)
    change_config(bench.directory, use_qalora=True, qalora_group_size=group)
    return Made(((bench.directory, 1.0),), Reference(twin.reload))


def _mlx(*, dora: bool = False) -> Maker:
    """What mlx_lm writes for an adapter that PEFT made."""

    def make(bench: Bench) -> Made:
        twin = bench.part("peft")
        made = lora(r=4, lora_alpha=10, use_dora=dora, target_modules=["q_proj", "up_proj"])(twin)
        tensors = {}
        for key, value in load_file(twin.directory / WEIGHTS).items():
            module, _, side = key.removeprefix("base_model.model.").partition(".lora_")
            ours = {"A.weight": ".lora_a", "B.weight": ".lora_b", "magnitude_vector": ".m"}[side]
            tensors[module + ours] = value if ours == ".m" else value.t().contiguous()
        keys = ["self_attn.q_proj", "mlp.up_proj"]
        config = {
            "fine_tune_type": "dora" if dora else "lora",
            "num_layers": 3,
            "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys},
        }
        write_adapter(bench.directory, config, {})
        (bench.directory / WEIGHTS).unlink()
        save_file(tensors, bench.directory / "adapters.safetensors")
        return replace(made, adapters=((bench.directory, 1.0),))

    return make


def _of(cls: type[PeftConfig], **fields: Any) -> Maker:
    """An adapter of another type."""
    with quiet():
        return peft(cls(**_CAUSAL, **fields))


def _retyped(name: Any) -> Maker:
    return relabelled(lora(target_modules=["q_proj"]), peft_type=name)


_INITS = (
    *(
        refused(37, f"init-{name}", relabelled(lora(), init_lora_weights=name), name, _CONVERT)
        for name in ("corda", "loftq")
    ),
    *(served(38, f"init-{name}", lora(init_lora_weights=name)) for name in ("gaussian", "orthogonal")),
    served(38, "init-mica", lora(init_lora_weights="mica")),
    served(38, "init-eva", relabelled(lora(), init_lora_weights="eva")),
    served(38, "init-lora-ga", relabelled(lora(), init_lora_weights="lora_ga"), warns="LoRA-GA"),
)

_EXPERTS = (
    served(39, "mixtral-gate-up-and-down", _experts("gate_up_proj", "down_proj"), base="mixtral"),
    served(39, "mixtral-down", _experts("down_proj", target_modules=["q_proj"]), base="mixtral"),
    served(39, "mixtral-gate-up", _experts("gate_up_proj", r=1), base="mixtral"),
    served(39, "qwen3-moe-both", _experts("gate_up_proj", "down_proj", use_rslora=True), base="qwen3_moe"),
    served(39, "qwen3-moe-down", _experts("down_proj"), base="qwen3_moe"),
    served(39, "mixtral-all-linear", lora(), base="mixtral"),
    served(39, "qwen3-moe-all-linear", lora(), base="qwen3_moe"),
    served(39, "axes-swapped-before-peft-0.19", _axes_swapped("0.18.1"), base="mixtral"),
    served(39, "axes-swapped-of-unknown-version", _axes_swapped(None), base="mixtral"),
    refused(
        39,
        "axes-unknown-of-a-square",
        relabelled(_experts("gate_up_proj"), peft_version="0.18.1"),
        r"experts\.lora_A",
        "gate_up_proj",
        r"0\.19",
        base="qwen3_moe",
    ),
    served(40, "mixtral-w1-w2-w3", _per_expert("block_sparse_moe", ("w1", "w2", "w3")), base="mixtral"),
    served(40, "mixtral-w2", _per_expert("block_sparse_moe", ("w2",)), base="mixtral"),
    served(40, "qwen3-moe", _per_expert("mlp", ("gate_proj", "up_proj", "down_proj")), base="qwen3_moe"),
)

_FORWARDS = (
    served(41, "activated-once", _called(PROMPT), kind="aLoRA"),
    served(41, "activated-by-the-last-of-two", _called(_TWICE)),
    served(41, "not-activated", _called(_NEVER), moves=False),
    refused(
        42,
        "layer-replication-refused",
        lora(layer_replication=[[0, 2], [1, 3]]),
        "layer_replication",
        "merge",
    ),
    served(
        43,
        "block-diagonal",
        lora(
            target_modules=_EVERY,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
                target_modules_bd_b=["o_proj", "down_proj"],
                nblocks=2,
            ),
        ),
        kind="BD-LoRA as LoRA",
    ),
    served(43, "kasa", lora(kasa_config=KasaConfig()), kind="KaSA as LoRA"),
    refused(
        56,
        "enable-lora",
        relabelled(lora(), enable_lora=[True, False, True]),
        "enable_lora",
        "export|convert",
    ),
    served(56, "qalora-converted", _qalora, kind="QA-LoRA as LoRA"),
    refused(56, "arrow", relabelled(lora(), arrow_config={"top_k": 2}), "arrow_config", "name|request"),
)

_TYPES = (
    served(
        44,
        "adalora",
        _of(AdaLoraConfig, init_r=6, lora_alpha=8, target_modules=_EVERY, total_step=10),
        kind="AdaLoRA as LoRA",
    ),
    served(44, "adalora-rank-pattern", _pruned_adalora),
    served(44, "vera", _of(VeraConfig, r=8, target_modules=["q_proj", "o_proj"]), kind="VeRA as LoRA"),
    served(
        44,
        "vera-without-projections",
        _of(VeraConfig, r=8, target_modules=["q_proj", "down_proj"], save_projection=False),
    ),
    served(44, "loha", _of(LoHaConfig, r=4, alpha=8, target_modules=_EVERY), kind="LoHa as LoRA, rank 16"),
    served(44, "lokr", _of(LoKrConfig, r=3, alpha=6, target_modules=_EVERY), kind="LoKr as LoRA"),
    served(
        44,
        "lokr-both-decomposed",
        _of(LoKrConfig, r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=_ATTENTION),
    ),
    served(44, "miss", _of(MissConfig, r=4, target_modules=_EVERY), kind="MiSS as LoRA"),
    refused(
        44,
        "loha-above-the-cap",
        _of(LoHaConfig, r=4, target_modules=["q_proj"]),
        "q_proj",
        "max-rank",
        max_rank=8,
    ),
    refused(
        44,
        "lokr-above-the-cap",
        _of(LoKrConfig, r=4, target_modules=["down_proj"]),
        "down_proj",
        "max-rank",
        max_rank=8,
    ),
    served(
        45, "ia3-out", _of(IA3Config, target_modules=["k_proj", "v_proj"], feedforward_modules=[]), kind="IA3"
    ),
    served(
        45,
        "ia3-out-biased-and-feedforward",
        _of(IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        base="qwen2",
    ),
    served(
        45,
        "ia3-gpt2",
        _of(IA3Config, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        base="gpt2",
    ),
    served(
        45,
        "ia3-two",
        _of(IA3Config, target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        _of(IA3Config, target_modules=["q_proj", "up_proj"], feedforward_modules=[]),
    ),
    refused(
        45,
        "prompt-tuning-refused",
        _of(PromptTuningConfig, num_virtual_tokens=4),
        "PROMPT_TUNING",
        "LoRA|LORA",
    ),
    refused(46, "oft", _of(OFTConfig, oft_block_size=8, r=0, target_modules=["q_proj"]), "OFT", "merge"),
    *(refused(46, name, _retyped(name), name, "LoRA|LORA") for name in ("XLORA", "NO_SUCH_TYPE", "BONE")),
    refused(46, "no-peft-type", _retyped(...), "peft_type", "LORA"),
)

CASES = (
    *_INITS,
    *_EXPERTS,
    *_FORWARDS,
    *_TYPES,
    served(67, "mlx", _mlx(), kind="LoRA of MLX"),
    served(67, "mlx-dora", _mlx(dora=True), kind="DoRA of MLX"),
)  # fmt: skip
