"""What is unusual about an adapter: everything that makes it more, or less, than A and B on linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..shard.adapters.files import CHAT_TEMPLATE, PICKLED_WEIGHTS, TOKENIZER
from ..shard.adapters.safetensors_header import ITEM_BYTES
from .modules import Module

RankOf = Callable[[str], int | None]

_NOTES = {
    "use_dora": "DoRA: each output is rescaled by a trained magnitude",
    "use_rslora": "rsLoRA: the scale is alpha / sqrt(r)",
    "lora_bias": "LoRA's own biases",
    "use_qalora": "QA-LoRA: A is applied to groups of inputs",
    "use_bdlora": "BD-LoRA: A or B are stored as diagonal blocks",
    "ensure_weight_tying": "embedding and head are trained as one",
    "kasa_config": "KaSA: the base loses its smallest singular components",
    "arrow_config": "Arrow: routes each token between other adapters",
    "layer_replication": "the base's layers are stacked again, into a deeper model",
    "enable_lora": "grouped (merged-linear) LoRA of PEFT up to 0.2",
    "alora_invocation_tokens": "aLoRA: applies from its invocation tokens on",
}
_LISTED = {
    "rank_pattern": "ranks of their own",
    "alpha_pattern": "alphas of their own",
    "modules_to_save": "modules replaced as a whole",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "parameters of experts",
    "exclude_modules": "modules excluded",
    "layers_to_transform": "only in layers",
}
_ORDINARY = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
        "peft_version", "r", "lora_alpha", "target_modules", "fan_in_fan_out", "bias", "init_lora_weights",
        "lora_dropout", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "monteclora_config", "velora_config", "qalora_group_size",
        "runtime_config", "merge_weights",
    }
)  # fmt: skip
"""Fields of LoRA's config that nobody needs to be told of."""
_SHOWN = 5


def oddities(
    config: Mapping[str, Any], modules: Sequence[Module], directory: Path, rank_of: RankOf
) -> list[str]:
    """One line for each thing worth a mention."""
    return [*_of_config(config), *_of_tensors(modules, rank_of), *_of_files(directory)]


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    for field, note in _NOTES.items():
        if config.get(field):
            yield f"{field}: {note}"
    for field, note in _LISTED.items():
        if config.get(field) or config.get(field) == 0:
            yield f"{field}: {note}: {_listed(config[field])}"
    if config.get("bias") not in (None, "none"):
        yield f"bias {config['bias']!r}: brings its own biases"
    init = config.get("init_lora_weights")
    if isinstance(init, str):
        yield f"init_lora_weights {init!r}"
    if isinstance(config.get("target_modules"), str):
        yield f"target_modules is a regular expression: {config['target_modules'][:80]}"
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base.endswith("-bnb-4bit"):
        yield "trained on a base in 4 bits; on the whole base its outputs differ slightly"
    known = _ORDINARY | _NOTES.keys() | _LISTED.keys()
    unknown = [name for name, value in config.items() if value and name not in known]
    if str(config.get("peft_type", "")).upper() == "LORA" and unknown:
        yield f"fields of its config that are not known: {_listed(unknown)}"


def _of_tensors(modules: Sequence[Module], rank_of: RankOf) -> Iterator[str]:
    tensors = [tensor for module in modules for tensor in module.tensors]
    if not tensors:
        yield "its weights file holds no tensors"
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= ITEM_BYTES.keys():
        yield f"dtypes: {', '.join(sorted(dtypes))}"
    alone = [module.name for module in modules if ("A" in module.parts) != ("B" in module.parts)]
    if alone:
        yield f"A without B or B without A: {_listed(alone)}"
    flat = [tensor.key for tensor in tensors if 0 in tensor.shape]
    if flat:
        yield f"empty tensors, as ungathered training leaves them: {_listed(flat)}"
    whole = [module.name for module in modules if module.parts == ("weight",)]
    if whole:
        yield f"brings whole weights for {_listed(whole)}"
    unknown = [module.name for module in modules if "unknown" in module.parts]
    if unknown:
        yield f"tensors of no known kind: {_listed(unknown)}"
    yield from _rank_differences(modules, rank_of)


def _rank_differences(modules: Sequence[Module], rank_of: RankOf) -> Iterator[str]:
    for module in modules:
        said = rank_of(module.name)
        if module.rank and "A" in module.parts and said is not None and said != module.rank:
            yield f"{module.name} has rank {module.rank}, its config says {said}"
            return


def _of_files(directory: Path) -> Iterator[str]:
    notes = {
        TOKENIZER: "a tokenizer of its own",
        CHAT_TEMPLATE: "a chat template of its own",
        PICKLED_WEIGHTS: "a pickle beside the safetensors, which is never opened",
    }
    for name, note in notes.items():
        if (directory / name).is_file():
            yield f"{name}: {note}"


def _listed(value: Any) -> str:
    """The first few of a list, of a dictionary's entries, or the one value."""
    if isinstance(value, Mapping):
        items = [f"{key}={entry}" for key, entry in value.items()]
    else:
        items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(item[:120] for item in items[:_SHOWN]) + more
