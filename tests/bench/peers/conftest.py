"""A model of the generator's kind that is made in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from bench.peers.model import write_all

RANKS = (2, 4)


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory, config: LlamaConfig) -> Path:
    """A directory with a base and three adapters."""
    directory = tmp_path_factory.mktemp("generated")
    write_all(directory, 3, RANKS, config)
    return directory
