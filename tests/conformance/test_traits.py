"""Row 62: what an adapter says of itself, by which the router refuses the sums that mean nothing (a 400, see
`test_what_may_not_go_together_is_refused_by_name` of tests/router/test_sums.py), and what else it goes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import IA3Config
from tokenizers import Tokenizer

from loraplex.shard.adapters.changes import Traits
from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.own_tokenizer import read_own_tokenizer

from .bases import Base
from .bench import Bench, Maker, Saved, lora, peft
from .cases_variants import with_tokenizer
from .serving import Served


@pytest.fixture
def traits_of(
    bases: Callable[[str], Base], serve: Callable[[str], Served], tmp_path: Path
) -> Callable[[str, Maker], Traits]:
    def pack(base: str, maker: Maker) -> Traits:
        made = maker(Bench(bases(base), tmp_path / "adapter", bases))
        return serve(base).pack(made.directory).traits

    return pack


@pytest.mark.parametrize(
    "maker",
    [
        lora(),
        lora(use_rslora=True, rank_pattern={"q_proj": 2}),
        lora(target_modules=["embed_tokens", "lm_head"]),
        lora(init_lora_weights="pissa"),
    ],
    ids=["lora", "rslora", "embedding", "pissa"],
)
def test_what_is_low_rank_may_be_summed(maker: Maker, traits_of: Callable[[str, Maker], Traits]) -> None:
    traits = traits_of("llama", maker)
    assert (traits.alone, traits.owns) == ("", ())


@pytest.mark.parametrize(
    ("maker", "why"),
    [
        (lora(use_dora=True), "DoRA"),
        (
            peft(IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")),
            "IA3",
        ),
    ],
    ids=["dora", "ia3"],
)
def test_what_scales_the_base_stays_alone(
    maker: Maker, why: str, traits_of: Callable[[str, Maker], Traits]
) -> None:
    assert why in traits_of("llama", maker).alone


@pytest.mark.parametrize(
    ("base", "maker", "owned"),
    [
        ("llama", lora(modules_to_save=["lm_head"]), {"lm_head"}),
        ("llama", lora(modules_to_save=["embed_tokens", "lm_head"]), {"lm_head", "model.embed_tokens"}),
        ("llama", lora(trainable_token_indices=[5, 6]), {"model.embed_tokens"}),
        ("llama_tied", lora(trainable_token_indices=[5, 6]), {"model.embed_tokens", "lm_head"}),
        ("llama", lora(modules_to_save=["model.norm"]), {"model.norm"}),
        (
            "qwen2",
            lora(bias="lora_only", target_modules=["model.layers.1.self_attn.q_proj"]),
            {"model.layers.1.self_attn.q_proj"},
        ),
    ],
    ids=["saved-head", "saved-both", "tokens", "tokens-tied", "saved-norm", "bias"],
)
def test_what_replaces_modules_owns_them(
    base: str, maker: Maker, owned: set[str], traits_of: Callable[[str, Maker], Traits]
) -> None:
    """Or stays alone, where nothing of it can be summed."""
    traits = traits_of(base, maker)
    assert set(traits.owns) == owned or traits.alone


def test_an_activated_adapter_names_its_invocation(traits_of: Callable[[str, Maker], Traits]) -> None:
    assert traits_of("llama", lora(alora_invocation_tokens=[33, 71])).invocation_tokens == (33, 71)


def test_a_wider_adapter_names_its_vocabulary_and_ships_its_tokenizer(
    traits_of: Callable[[str, Maker], Traits], bases: Callable[[str], Base], tmp_path: Path
) -> None:
    maker = with_tokenizer(lora(Saved(resize=310), modules_to_save=["lm_head", "embed_tokens"]))
    assert traits_of("llama", maker).vocab_size == 310
    own = read_own_tokenizer(tmp_path / "adapter", FileLimits())
    tokenizer = Tokenizer.from_buffer(own.tokenizer_json)
    assert tokenizer.token_to_id("<extra 3>") == bases("llama").tokenizer().vocab_size + 3
