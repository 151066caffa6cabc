"""Rows 17 to 36: DoRA, embeddings and heads, saved modules, tokens, biases, and inits that edit the base."""

from __future__ import annotations

from dataclasses import replace

from .bench import (
    PROMPT,
    Bench,
    Made,
    Maker,
    Reference,
    Saved,
    build,
    lora,
    lora_config,
    quiet,
    rekeyed,
    relabelled,
)
from .case import served

_DORA = lora(use_dora=True)
_BARE = Saved(arguments={"save_embedding_layers": False})
_WIDER = 310
_NEW_TOKENS = (*PROMPT[:8], 301, 309, 304, *PROMPT[8:])


def _renamed(maker: Maker, old: str, new: str) -> Maker:
    return rekeyed(maker, lambda key: key.replace(old, new))


def _prompted(maker: Maker, prompt: tuple[int, ...]) -> Maker:
    return lambda bench: replace(maker(bench), prompt=prompt)


def with_tokenizer(maker: Maker) -> Maker:
    """The adapter ships the tokenizer that knows its new tokens."""

    def make(bench: Bench) -> Made:
        made = maker(bench)
        own = bench.base.tokenizer()
        own.add_tokens([f"<extra {index}>" for index in range(4)])
        own.save_pretrained(bench.directory)
        return made

    return make


def _converted_pissa(bench: Bench) -> Made:
    """Saved by PEFT as plain LoRA of twice the rank, against the base before PiSSA changed it."""
    config = lora_config(init_lora_weights="pissa", target_modules=["q_proj", "up_proj"])
    with quiet():
        untrained = build(bench, config, Saved(randomise=False))
        untrained.peft_config["default"].init_lora_weights = True
        untrained.save_pretrained(bench.directory / "initial")
        model = build(bench, config, Saved())
        initial = str(bench.directory / "initial")
        model.save_pretrained(bench.directory, path_initial_model_for_weight_conversion=initial)
        trained = build(bench, config, Saved())
    return Made(((bench.directory, 1.0),), Reference(lambda: trained))


CASES = (
    served(17, "dora-q-only", lora(use_dora=True, target_modules=["q_proj"])),
    served(17, "dora-all-linear", _DORA, kind="DoRA"),
    served(17, "dora-qwen2-biased", lora(use_dora=True, r=7), base="qwen2"),
    served(18, "dora-gpt2", lora(use_dora=True, target_modules=["c_attn", "c_proj", "c_fc"]), base="gpt2"),
    served(
        19,
        "dora-rslora-patterns",
        lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3}),
    ),
    served(20, "dora-embedding", lora(use_dora=True, target_modules=["embed_tokens", "q_proj"]), kind="DoRA"),
    served(20, "dora-embedding-gemma2", lora(use_dora=True, target_modules=["embed_tokens"]), base="gemma2"),
    served(21, "dora-key-weight", _renamed(_DORA, "magnitude_vector", "magnitude_vector.weight")),
    served(
        21, "dora-key-default-weight", _renamed(_DORA, "magnitude_vector", "magnitude_vector.default.weight")
    ),
    served(22, "embedding", lora(target_modules=["embed_tokens"])),
    served(22, "embedding-bare", lora(_BARE, target_modules=["embed_tokens", "v_proj"])),
    served(22, "embedding-gemma2-scaled", lora(target_modules=["embed_tokens", "q_proj"]), base="gemma2"),
    served(22, "embedding-gpt2", lora(target_modules=["wte", "c_attn"]), base="gpt2"),
    served(23, "embedding-tied", lora(target_modules=["embed_tokens"]), base="llama_tied"),
    served(24, "head", lora(target_modules=["lm_head", "q_proj"])),
    served(24, "head-bare", lora(_BARE, target_modules=["lm_head"])),
    served(24, "head-tied", lora(target_modules=["lm_head"]), base="llama_tied"),
    served(22, "embedding-opt", lora(target_modules=["embed_tokens", "fc2"]), base="opt"),
    served(24, "head-and-embedding", lora(target_modules=["lm_head", "embed_tokens"])),
    served(24, "head-dora", lora(target_modules=["lm_head"], use_dora=True)),
    served(
        25,
        "embedding-tied-with-its-head",
        lora(target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True),
        base="llama_tied",
    ),
    served(26, "saved-head", lora(modules_to_save=["lm_head"])),
    served(26, "saved-head-and-embedding", lora(modules_to_save=["lm_head", "embed_tokens"])),
    served(26, "saved-head-tied", lora(modules_to_save=["lm_head"]), base="llama_tied"),
    served(
        26,
        "two-saved-heads",
        lora(modules_to_save=["lm_head"]),
        lora(modules_to_save=["lm_head", "embed_tokens"], target_modules=["q_proj"]),
    ),
    served(27, "saved-norms", lora(modules_to_save=["norm"])),
    served(27, "saved-norms-gemma3", lora(modules_to_save=["norm"]), base="gemma3"),
    served(
        27, "saved-norms-gpt2", lora(modules_to_save=["ln_1", "ln_f"], target_modules=["c_attn"]), base="gpt2"
    ),
    served(27, "saved-linear", lora(modules_to_save=["o_proj", "up_proj"], target_modules=["q_proj"])),
    served(28, "saved-embedding-tied", lora(modules_to_save=["embed_tokens"]), base="llama_tied"),
    served(28, "saved-embedding-tied-gemma2", lora(modules_to_save=["embed_tokens"]), base="gemma2"),
    served(
        28,
        "saved-embedding-with-its-head",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        base="llama_tied",
    ),
    served(29, "tokens", lora(trainable_token_indices=[5, 71, 150, 299])),
    served(29, "tokens-tied", lora(trainable_token_indices=[5, 71, 150, 299]), base="llama_tied"),
    served(29, "tokens-gemma2", lora(trainable_token_indices=[5, 71, 150]), base="gemma2"),
    served(29, "tokens-dict", lora(trainable_token_indices={"embed_tokens": [71, 5], "lm_head": [9, 33, 8]})),
    served(
        30,
        "new-tokens-and-head",
        with_tokenizer(
            _prompted(
                lora(
                    Saved(resize=_WIDER),
                    trainable_token_indices=[5, 301, 304, 309],
                    modules_to_save=["lm_head"],
                ),
                _NEW_TOKENS,
            )
        ),
    ),
    served(
        30,
        "new-tokens-tied",
        _prompted(lora(Saved(resize=_WIDER), trainable_token_indices=[301, 304, 309]), _NEW_TOKENS),
        base="llama_tied",
    ),
    served(
        31,
        "resized-vocabulary",
        _prompted(lora(Saved(resize=_WIDER, arguments={"save_embedding_layers": True})), _NEW_TOKENS),
    ),
    served(
        31,
        "resized-vocabulary-tied",
        _prompted(lora(Saved(resize=_WIDER), target_modules=["q_proj"]), _NEW_TOKENS),
        base="llama_tied",
    ),
    served(
        31,
        "resized-vocabulary-head-and-embedding-lora",
        _prompted(
            lora(Saved(resize=_WIDER), target_modules=["q_proj", "lm_head", "embed_tokens"]), _NEW_TOKENS
        ),
    ),
    served(
        31,
        "resized-vocabulary-saved-modules",
        _prompted(lora(Saved(resize=_WIDER), modules_to_save=["lm_head", "embed_tokens"]), _NEW_TOKENS),
    ),
    served(31, "smaller-vocabulary", lora(Saved(resize=296), target_modules=["q_proj"])),
    served(
        31,
        "smaller-vocabulary-tied",
        lora(Saved(resize=290), target_modules=["q_proj"]),
        base="llama_tied",
    ),
    served(32, "bias-lora-only", lora(bias="lora_only", target_modules=["q_proj", "up_proj"]), base="qwen2"),
    served(32, "bias-all", lora(bias="all", target_modules=["v_proj"]), base="qwen2"),
    served(
        32,
        "two-biases",
        lora(bias="lora_only", target_modules=["q_proj"]),
        lora(bias="all", target_modules=["v_proj"]),
        base="qwen2",
    ),
    served(32, "bias-all-opt", lora(bias="all", target_modules=["v_proj", "fc1"]), base="opt"),
    served(32, "bias-all-gpt2", lora(bias="all", target_modules=["c_attn"]), base="gpt2"),
    served(33, "old-bias-key", _renamed(lora(bias="lora_only"), ".base_layer.bias", ".bias"), base="qwen2"),
    served(34, "lora-bias", lora(lora_bias=True)),
    served(34, "lora-bias-biased", lora(lora_bias=True, use_rslora=True), base="qwen2"),
    served(35, "pissa", lora(init_lora_weights="pissa"), kind="PiSSA as LoRA"),
    served(35, "olora", lora(init_lora_weights="olora"), kind="OLoRA as LoRA"),
    served(
        35,
        "pissa-and-olora",
        lora(init_lora_weights="pissa", r=3, target_modules=["q_proj", "up_proj", "down_proj"]),
        lora(init_lora_weights="olora", target_modules=["q_proj", "v_proj", "o_proj"]),
    ),
    served(35, "pissa-gpt2", lora(init_lora_weights="pissa", target_modules=["c_attn", "c_fc"]), base="gpt2"),
    served(
        35,
        "pissa-niter",
        relabelled(lora(init_lora_weights="pissa"), init_lora_weights="pissa_niter_16"),
        warns="exact SVD",
    ),
    served(36, "pissa-converted", _converted_pissa),
)
