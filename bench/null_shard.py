"""A real shard process in which only the model is replaced: a step takes a fixed time and no processor.

python -m bench.null_shard --port 9000 --step-ms 4
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loraplex.proto import shard_pb2 as pb
from loraplex.shard.adapters.base_tensors import BaseTensors
from loraplex.shard.adapters.layout import AdapterLayout
from loraplex.shard.batch import Batch
from loraplex.shard.config import ShardConfig
from loraplex.shard.kv import KvCache
from loraplex.shard.load import LoadedModel
from loraplex.shard.main import run
from loraplex.shard.parallel.ranks import Alone

VOCAB = 256


class TimedModel:
    """Answers, after `seconds`, logits that make every row say the letters in turn."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._logits = torch.eye(VOCAB)

    def forward(self, batch: Batch) -> torch.Tensor:
        deadline = time.perf_counter() + self._seconds
        letters = 64 + batch.positions[batch.logit_rows] % 26
        logits = self._logits[letters]
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return logits


def byte_tokenizer() -> pb.TokenizerReply:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return pb.TokenizerReply(tokenizer_json=core.to_str().encode())


def timed_model(seconds: float) -> LoadedModel:
    """A loaded model without weights or keys."""
    device = torch.device("cpu")
    return LoadedModel(
        model=TimedModel(seconds),
        graphs=None,
        kv=KvCache({}, blocks=65536, block_size=16, dtype=torch.float32, device=device),
        sites=[],
        base=BaseTensors({}),
        layout=AdapterLayout((), "float32", 64),
        tokenizer=byte_tokenizer(),
        device=device,
        digest="",
        architecture="TimedModel",
        max_model_len=4096,
        vocab_size=VOCAB,
        weight_bytes=0,
        block_bytes=1,
        ranks=Alone(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=4.0)
    arguments = parser.parse_args()
    config = ShardConfig(model="null", device="cpu", port=arguments.port, max_adapters=1, threads=1)
    return run(config, load=lambda _: timed_model(arguments.step_ms / 1000))


if __name__ == "__main__":
    sys.exit(main())
