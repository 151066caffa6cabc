"""The generated model's tokenizer: byte-level BPE in which every id has a text of its own."""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIALS = (UNK, BOS, EOS)
LETTERS = [chr(code) for code in range(0x21, 0x7F)]
"""Printable ASCII. Their pairs are the tokens beyond the single bytes."""
SMALLEST = len(SPECIALS) + 256
LARGEST = SMALLEST + len(LETTERS) ** 2


def build(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Special tokens are ids 0 to 2, then the 256 bytes, then pairs of letters until the vocabulary is full.

    Raises ValueError where `vocab_size` cannot be filled so.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ValueError(f"the vocabulary must have {SMALLEST} to {LARGEST} tokens, not {vocab_size}")
    merges = list(itertools.islice(itertools.product(LETTERS, LETTERS), vocab_size - SMALLEST))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*SPECIALS, *alphabet, *(first + second for first, second in merges))
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save(directory: Path, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json and its configuration beside a model."""
    build(vocab_size, max_length).save_pretrained(directory)
