"""Rows 60 to 63: weighted sums in a request, and adapters merged ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel

from loraplex.shard.adapters.merging.merge import MergeInput, merge_adapters
from loraplex.shard.adapters.merging.recipe import merge_recipe

from .bench import Bench, Made, Maker, Reference, lora, quiet
from .case import served

_WEIGHTS = (0.7, -0.4)


def _both(bench: Bench, parts: Sequence[Maker]) -> PeftModel:
    """The parts, each made in a directory of its own, as adapters 0, 1, … of one PEFT model."""
    directories = [make(bench.part(str(index))).directory for index, make in enumerate(parts)]
    model = PeftModel.from_pretrained(bench.base.fresh(), directories[0], adapter_name="0")
    for index, directory in enumerate(directories[1:], 1):
        model.load_adapter(directory, str(index))
    return model


def weighted_sum(*parts: Maker, weights: Sequence[float] = _WEIGHTS) -> Maker:
    """A weighted sum, which for plain LoRA is what PEFT's `cat` computes."""

    def make(bench: Bench) -> Made:
        with quiet():
            model = _both(bench, parts)
            names = [str(index) for index in range(len(parts))]
            model.add_weighted_adapter(names, list(weights), "sum", combination_type="cat")
            model.set_adapter("sum")
        return _row(bench, weights, model)

    return make


def _active_together(*parts: Maker) -> Maker:
    """The sum with weights 1: PEFT's model with several active adapters."""

    def make(bench: Bench) -> Made:
        with quiet():
            model = _both(bench, parts)
            model.base_model.set_adapter([str(index) for index in range(len(parts))])
        return _row(bench, [1.0] * len(parts), model)

    return make


def _row(bench: Bench, weights: Sequence[float], model: PeftModel) -> Made:
    adapters = tuple((bench.part(str(index)).directory, weight) for index, weight in enumerate(weights))
    return Made(adapters, Reference(lambda: model))


def merged(method: str, *parts: Maker, weights: Sequence[float] = _WEIGHTS, **parameters: Any) -> Maker:
    """An adapter merged on disk: the one that PEFT merges in memory."""

    def make(bench: Bench) -> Made:
        names = [str(index) for index in range(len(parts))]
        with quiet():
            model = _both(bench, parts)
            theirs = {"svd_rank" if name == "rank" else name: value for name, value in parameters.items()}
            model.add_weighted_adapter(names, list(weights), "merged", combination_type=method, **theirs)
            model.set_adapter("merged")
        inputs = [
            MergeInput(bench.part(name).directory, weight)
            for name, weight in zip(names, weights, strict=True)
        ]
        target = bench.directory / "merged"
        target.mkdir()
        merge_adapters(inputs, merge_recipe(method, **parameters), target)
        return Made(((target, 1.0),), Reference(lambda: model))

    return make


_QV = lora(r=3, target_modules=["q_proj", "v_proj"])
_V_DOWN = lora(r=7, lora_alpha=20, target_modules=["v_proj", "down_proj"])
_EQUAL = (_QV, lora(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]))
_EXPERTS = lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
_RS = lora(r=5, use_rslora=True, target_modules=["q_proj", "up_proj"])

CASES = (
    served(60, "sum-of-unequal-ranks-partly-overlapping", weighted_sum(_QV, _V_DOWN)),
    served(60, "sum-of-three", weighted_sum(_QV, _V_DOWN, lora(r=1), weights=(1.5, -0.25, 0.5))),
    served(60, "one-adapter-scaled", weighted_sum(_V_DOWN, weights=(0.5,))),
    served(
        60,
        "sums-of-the-same-parts-side-by-side",
        weighted_sum(_QV, _V_DOWN),
        weighted_sum(_QV, _V_DOWN, weights=(-1, 2)),
    ),
    served(61, "sum-of-rslora", _active_together(_RS, lora(r=9, use_rslora=True, target_modules=["q_proj"]))),
    served(61, "sum-with-the-owner-of-a-head", _active_together(lora(modules_to_save=["lm_head"]), _V_DOWN)),
    served(
        61,
        "sum-at-embedding-and-head",
        _active_together(
            lora(target_modules=["embed_tokens", "lm_head"]), lora(target_modules=["embed_tokens"])
        ),
    ),
    served(61, "sum-with-lora-bias", _active_together(lora(lora_bias=True, r=2), _QV)),
    served(61, "sum-of-experts", _active_together(_EXPERTS, _EXPERTS), base="mixtral"),
    served(61, "sum-with-an-activated", _active_together(_QV, lora(alora_invocation_tokens=[33, 71]))),
    served(63, "merged-linear", merged("linear", *_EQUAL)),
    served(63, "merged-cat", merged("cat", _QV, _V_DOWN)),
    served(63, "merged-svd", merged("svd", _QV, _V_DOWN)),
    served(63, "merged-svd-rank", merged("svd", _QV, _V_DOWN, rank=10)),
    served(63, "merged-ties", merged("ties", *_EQUAL, density=0.4)),
    served(
        63, "merged-ties-frequency", merged("ties", *_EQUAL, density=0.7, majority_sign_method="frequency")
    ),
    served(63, "merged-ties-svd", merged("ties_svd", _QV, _V_DOWN, density=0.5)),
    served(63, "merged-magnitude-prune", merged("magnitude_prune", *_EQUAL, density=0.3)),
    served(63, "merged-magnitude-prune-svd", merged("magnitude_prune_svd", _QV, _V_DOWN, density=0.6)),
    served(63, "merged-dare-linear-dropping-nothing", merged("dare_linear", *_EQUAL, density=1.0)),
    served(63, "merged-dare-ties-dropping-nothing", merged("dare_ties", *_EQUAL, density=1.0)),
)
