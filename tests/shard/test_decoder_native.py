"""All layers in one call: the same bits as piece after piece, and left alone where a step holds more."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from loraplex.kernels.ops import Entries
from loraplex.shard import packed_weight
from loraplex.shard.adapters.changes import LinearChange, ModuleChange
from loraplex.shard.adapters.pool import AdapterPool
from loraplex.shard.attention import register
from loraplex.shard.decoder import FusedDecoder, FusedParts, find_decoder
from loraplex.shard.kv import KvCache
from loraplex.shard.model import Specialised, specialise
from loraplex.shard.trace import trace

from ..tiny import CONFIGS
from .dense import Changes, packed
from .test_decoder import BLOCK, BLOCKS, SEQUENCES, _batches

decoder_native = pytest.importorskip("loraplex.shard.decoder_native", exc_type=ImportError)
native_decoder = pytest.importorskip("loraplex.kernels.native_decoder", exc_type=ImportError)
native_lora = pytest.importorskip("loraplex.kernels.native_lora", exc_type=ImportError)

pytestmark = [
    pytest.mark.skipif(
        packed_weight.native_linear is None or not packed_weight.native_linear.IS_SERVED,
        reason="this processor multiplies no pairs of bfloat16",
    ),
    pytest.mark.usefixtures("no_tiles"),
]

PLAIN, WIDE, NORM, ROWS = range(4)
NOBODY: list[Entries] = [(), (), (), ()]
SOME: list[Entries] = [((PLAIN, 1.0),), (), ((WIDE, 0.5), (PLAIN, 2.0)), ((WIDE, 1.0),)]


@pytest.fixture
def no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels also where oneDNN would be preferred."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@dataclass
class Both:
    """A model whose layers run in one call and piece by piece, and adapters in its slots."""

    special: Specialised
    decoder: FusedDecoder
    pieces: FusedDecoder
    attention: object
    kv: KvCache
    used: list[bool] = field(default_factory=list)
    """Of each step: whether one call ran it."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Both:
        model = random_model(config)
        seen = trace(model)
        blocks = len(SEQUENCES) * BLOCKS + 1
        cpu = torch.device("cpu")
        kv = KvCache(seen.layers, blocks=blocks, block_size=BLOCK, dtype=torch.bfloat16, device=cpu)
        ops = native_decoder.NativeDecoderOps()
        attention = decoder_native.NativeAttention(kv, ops)
        lora = native_lora.NativeLoraOps()
        special = specialise(model, seen, attention=attention, ops=lora, max_rank=64)
        parts = FusedParts(kv, attention, ops)
        decoder = find_decoder(model, seen)
        stack = decoder_native.native_layers(decoder, parts)
        both = cls(special, FusedDecoder(decoder, parts, stack), FusedDecoder(decoder, parts), attention, kv)
        if stack is not None:
            both._watch(stack)
        return both

    def _watch(self, stack: object) -> None:
        run = stack.run  # type: ignore[attr-defined]

        def watched(*args: object) -> object:
            added = run(*args)
            self.used.append(added is not None)
            return added

        stack.run = watched  # type: ignore[attr-defined]

    def load(self, adapters: dict[int, Changes]) -> None:
        pool = AdapterPool(self.special.sites, slots=16, budget=1 << 30)
        for slot, changes in adapters.items():
            pool.load(slot, str(slot), packed(self.special.layout, changes))

    def run(self, decoder: FusedDecoder, row_entries: list[Entries]) -> list[torch.Tensor]:
        """Every step's logits, over a cache that holds nothing yet."""
        for layer in self.kv.layers:
            for values in self.kv.layer(layer):
                values.fill_(torch.nan)
        register(self.attention.forward)  # type: ignore[attr-defined]
        self.special.model.use(decoder.forward)
        return [self.special.model.forward(batch) for batch in _batches(row_entries)]

    def compare(self, row_entries: list[Entries]) -> list[bool]:
        """Both ways give the same bits; which steps one call ran."""
        self.used.clear()
        got, want = self.run(self.decoder, row_entries), self.run(self.pieces, row_entries)
        for mine, other in zip(got, want, strict=True):
            assert torch.equal(mine, other)
            assert mine.isfinite().all()
        return list(self.used)


def random_model(config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()  # type: ignore[no-any-return]


def changes(both: Both, rank: int, seed: int) -> Changes:
    """Low-rank parts at every linear."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
        return (draw.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    return {
        target.name: LinearChange(a=normal(rank, target.in_features), b=normal(target.out_features, rank))
        for target in both.special.layout.linears
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi3", "llama_tied"])
def test_one_call_gives_the_bits_of_the_pieces(kind: str) -> None:
    both = Both.of(CONFIGS[kind])
    assert both.compare(NOBODY) == [True] * 4
    both.load({PLAIN: changes(both, 3, 1), WIDE: changes(both, 40, 2)})
    assert both.compare(SOME) == [True] * 4
    assert both.compare(NOBODY) == [True] * 4


def test_adapters_change_what_it_gives() -> None:
    both = Both.of(CONFIGS["llama"])
    before = both.run(both.decoder, NOBODY)
    both.load({PLAIN: changes(both, 3, 1), WIDE: changes(both, 40, 2)})
    after = both.run(both.decoder, SOME)
    assert not torch.equal(before[-1], after[-1])
    # Of the third step's rows the second has the base alone; rows of one adapter lie side by side, its first.
    assert torch.equal(before[2][1], after[2][0])


def test_a_step_with_parameters_of_its_own_is_left_to_the_pieces() -> None:
    both = Both.of(CONFIGS["llama"])
    norm = ModuleChange({"weight": np.full(64, 2.0, np.float32)})
    both.load({PLAIN: changes(both, 3, 1), NORM: {"model.layers.1.input_layernorm": norm}})
    with_norm: list[Entries] = [((NORM, 1.0),), (), (), ()]
    assert both.compare(with_norm) == [False, False, False, False]
    assert both.compare([((PLAIN, 1.0),), (), (), ()]) == [True] * 4


def test_scaled_inputs_are_left_to_the_pieces() -> None:
    both = Both.of(CONFIGS["llama"])
    scale = np.full(96, 1.5, np.float32)
    both.load({ROWS: {"model.layers.0.mlp.down_proj": LinearChange(input_scale=scale)}})
    assert not any(both.compare([((ROWS, 1.0),), (), (), ()]))


def test_heads_with_norms_of_their_own_are_not_known_to_it() -> None:
    both = Both.of(CONFIGS["qwen3"])
    assert both.compare(NOBODY) == []
