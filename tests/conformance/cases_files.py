"""Rows 47 to 58, 64 and 68: what files are called, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from loraplex.adapter_tools.convert import convert

from .bench import (
    CONFIG,
    WEIGHTS,
    Bench,
    Made,
    Maker,
    Reference,
    Tensors,
    altered,
    change_config,
    lora,
    lora_config,
    quiet,
    randomise,
    rekeyed,
    relabelled,
)
from .case import refused, served

_PREFIX = "base_model.model."
_QV = lora(target_modules=["q_proj", "v_proj"])
_A = _PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
_B = _PREFIX + "model.layers.0.self_attn.q_proj.lora_B.weight"
_HEAD = _PREFIX + "lm_head"
_OLD_FIELDS = (
    "peft_type", "base_model_name_or_path", "task_type", "inference_mode", "r", "target_modules",
    "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save",
)  # fmt: skip


def _with(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Maker:
    """q and v, with one tensor changed."""
    return altered(_QV, lambda tensors: tensors | {key: change(tensors[key])})


def _without(part: str, maker: Maker = _QV) -> Maker:
    return altered(maker, lambda tensors: {key: value for key, value in tensors.items() if part not in key})


def _holding(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 1] = value
        return tensor

    return change


def _pickled(*, evil: bool = False, beside: bool = False) -> Maker:
    """The weights as a pickle: instead of safetensors, or beside them with other values."""

    def make(bench: Bench) -> Made:
        made = _QV(bench)
        tensors = load_file(bench.directory / WEIGHTS)
        payload = {key: value * 2 for key, value in tensors.items()} if beside else tensors
        torch.save(
            Evil(bench.directory / "trace") if evil else payload, bench.directory / "adapter_model.bin"
        )
        if not beside:
            (bench.directory / WEIGHTS).unlink()
        return made

    return make


def converted(maker: Maker) -> Maker:
    """As `loraplex adapters convert` leaves it, in a directory beside the pickle's."""

    def make(bench: Bench) -> Made:
        made = maker(bench)
        target = bench.directory / "converted"
        convert(made.directory, target)
        return replace(made, adapters=((target, 1.0),))

    return make


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._path,))


def _under(name: str) -> Callable[[str], str]:
    return lambda key: key.replace(_PREFIX + "model.", _PREFIX + name)


def _as_peft_0_2(bench: Bench) -> Made:
    made = _QV(bench)
    newer = json.loads((bench.directory / CONFIG).read_text()).keys() - _OLD_FIELDS
    change_config(bench.directory, **dict.fromkeys(newer, ...))
    change_config(bench.directory, enable_lora=None, merge_weights=False)
    return made


def _old_saved_head(tensors: Tensors) -> Tensors:
    head = tensors.pop(f"{_HEAD}.weight")
    return tensors | {
        f"{_HEAD}.modules_to_save.weight": head,
        f"{_HEAD}.original_module.weight": torch.zeros_like(head),
    }


def _vlm(bench: Bench) -> Made:
    """Trained on a model that also sees: its text part under other names, and tensors for its eyes."""
    regex = r"(?:.*?(?:language|text|vision).*?(?:self_attn).*?(?:q_proj|v_proj).*?)"
    eyes = f"{_PREFIX}model.vision_tower.encoder.layers.0.self_attn.q_proj"
    make = altered(
        rekeyed(_QV, _under("model.language_model.")),
        lambda tensors: (
            tensors | {f"{eyes}.lora_A.weight": torch.ones(4, 48), f"{eyes}.lora_B.weight": torch.ones(48, 4)}
        ),
    )
    return relabelled(make, target_modules=regex)(bench)


def _classifier(bench: Bench) -> Made:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(bench.base.directory, num_labels=3)
        wrapped = get_peft_model(model, lora_config(task_type="SEQ_CLS", target_modules=["q_proj"]))
        randomise(wrapped, bench.seed)
        wrapped.save_pretrained(bench.directory)
    return Made(((bench.directory, 1.0),), Reference(lambda: wrapped))


def _made_on(base: str, **fields: Any) -> Maker:
    """An adapter for another model."""
    return lambda bench: lora(**fields)(replace(bench, base=bench.bases(base)))


def _beneath(name: str) -> Maker:
    """A directory with an adapter of its own, and the one that is wanted below it."""

    def make(bench: Bench) -> Made:
        lora(r=2, target_modules=["q_proj"])(bench)
        return _QV(replace(bench, directory=bench.directory / name, seed=bench.seed + 1))

    return make


def _reference_model(bench: Bench) -> Made:
    """PEFT saves an adapter that is not called default to a folder of its name."""
    with quiet():
        model = get_peft_model(bench.base.fresh(), lora_config(target_modules=["q_proj"]))
        model.add_adapter("ref", lora_config(r=7, target_modules=["up_proj"]))
        randomise(model, bench.seed)
        model.set_adapter("ref")
        randomise(model, bench.seed + 1)
        model.save_pretrained(bench.directory)
    return Made(((bench.directory / "ref", 1.0),), Reference(lambda: model))


def _truncated(bench: Bench) -> Made:
    made = _QV(bench)
    path = bench.directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return made


_NAMES = (
    refused(47, "pickle", _pickled(), r"adapter_model\.bin", "adapters convert|safetensors"),
    refused(
        47, "malicious-pickle", _pickled(evil=True), r"adapter_model\.bin", "adapters convert|safetensors"
    ),
    served(47, "pickle-converted", converted(_pickled())),
    served(47, "pickle-beside-safetensors", _pickled(beside=True)),
    served(48, "no-prefix", rekeyed(_QV, lambda key: key.removeprefix(_PREFIX))),
    served(48, "default-in-keys", rekeyed(_QV, lambda key: key.replace(".weight", ".default.weight"))),
    served(48, "own-name-in-keys", rekeyed(_QV, lambda key: key.replace(".weight", ".my_style.weight"))),
    served(48, "language-model-inside", rekeyed(_QV, _under("model.language_model."))),
    served(48, "language-model-outside", rekeyed(_QV, _under("language_model.model."))),
    served(48, "text-model", rekeyed(_QV, _under("text_model."))),
    served(49, "old-saved-head", altered(lora(modules_to_save=["lm_head"]), _old_saved_head)),
    served(
        49,
        "old-saved-head-default",
        rekeyed(
            lora(modules_to_save=["lm_head"]),
            lambda key: key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
        ),
    ),
    served(50, "peft-0.2-config", _as_peft_0_2),
    served(50, "unknown-field", relabelled(_QV, thermal_paste="thin"), warns="thermal_paste"),
    served(
        50,
        "null-patterns",
        relabelled(
            _QV,
            rank_pattern=None,
            alpha_pattern=None,
            exclude_modules=None,
            layers_to_transform=None,
            bias=None,
        ),
    ),
    served(50, "unknown-falsy-options", relabelled(_QV, use_magic=False, magic_config=None)),
    refused(50, "unknown-use-option", relabelled(_QV, use_magic=True), "use_magic", "merge|remove"),
    refused(
        50, "unknown-config-option", relabelled(_QV, magic_config={"a": 1}), "magic_config", "merge|remove"
    ),
    served(58, "vlm-regex-and-vision-tensors", _vlm, warns="vision"),
    served(64, "ref-folder", _reference_model),
    served(64, "checkpoint-folder", _beneath("checkpoint-10")),
    served(64, "commit-folder", _beneath("snapshots/0123456789abcdef0123456789abcdef01234567")),
    served(66, "two-versions-of-one-name", _QV, lora(r=6, target_modules=["q_proj", "v_proj"])),
)

_EXTRA = f"{_PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"

_DAMAGE = (
    refused(
        51, "extra-tensor", altered(_QV, lambda t: t | {"stray.values": torch.ones(2, 2)}), r"stray\.values"
    ),
    refused(
        51, "extra-layer", altered(_QV, lambda t: t | {_EXTRA: torch.ones(4, 64)}), r"layers\.7\.", "no such"
    ),
    refused(51, "not-targeted", relabelled(_QV, target_modules=["v_proj"]), "q_proj", "target_modules"),
    refused(52, "no-tensors", _without(""), "no tensors", "save"),
    refused(52, "zero-sized-a", _with(_A, lambda a: a[:, :0]), r"q_proj\.lora_A", "gathered"),
    refused(52, "flat-a", _with(_A, lambda a: a.flatten()), r"q_proj\.lora_A", "gathered"),
    refused(
        52, "a-without-b", _without("layers.0.self_attn.q_proj.lora_B"), r"q_proj\.lora_A", "lora_B", "save"
    ),
    refused(53, "config-rank", relabelled(_QV, r=3), r"q_proj\.lora_A", "rank 4", "says 3"),
    refused(53, "wrong-in", _with(_A, lambda a: a[:, :48]), r"q_proj\.lora_A", "in=48", "64"),
    refused(53, "wrong-out", _with(_B, lambda b: b[:48]), r"q_proj\.lora_B", "out=48", "64"),
    refused(53, "another-models-names", _made_on("gpt2", target_modules=["c_attn"]), "c_attn", "no such"),
    refused(53, "another-models-shapes", _made_on("llama_wide"), r"_proj\.lora_A", "in=96", "64"),
    refused(54, "nan", _with(_B, _holding(float("nan"))), r"q_proj\.lora_B", "NaN", "diverged|damaged"),
    refused(
        54, "infinity", _with(_B, _holding(float("-inf"))), r"q_proj\.lora_B", "infinity", "diverged|damaged"
    ),
    refused(55, "dora-without-magnitudes", relabelled(_QV, use_dora=True), "q_proj", "magnitude", "use_dora"),
    refused(
        55,
        "dora-with-a-magnitude-missing",
        _without("layers.1.self_attn.v_proj.lora_magnitude", lora(use_dora=True)),
        r"layers\.1\.self_attn\.v_proj",
        "magnitude",
    ),
    refused(
        55,
        "magnitudes-without-dora",
        relabelled(lora(use_dora=True, target_modules=["q_proj"]), use_dora=False),
        r"q_proj\.lora_magnitude",
        "use_dora",
    ),
    refused(57, "sequence-classifier", _classifier, "score", "classif|generat|task"),
    refused(68, "truncated", _truncated, r"safetensors|bytes|trunc|header"),
)

CASES = (*_NAMES, *_DAMAGE)
