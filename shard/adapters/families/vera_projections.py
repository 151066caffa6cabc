"""VeRA's shared projections: read from the file, or drawn again as PEFT draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import AdapterRejected
from ..floats import Float32
from ..layout import Target
from ..tensors import Tensors
from .modules import expect_shape

KEYS = ("base_model.vera_A", "base_model.vera_B")


@dataclass(frozen=True, slots=True)
class Projections:
    """A [rank, widest input] and B [widest output, rank], of which every module takes its part."""

    read_a: Callable[[], Float32]
    read_b: Callable[[], Float32]


def projections_of(tensors: Tensors, targets: Sequence[Target], rank: int, seed: int) -> Projections:
    """The projections that these modules share. Raises AdapterRejected where they do not fit them.

    Without `save_projection` the file lacks both; PEFT then draws them from `projection_prng_key`.
    """
    width = max(target.in_features for target in targets)
    height = max(target.out_features for target in targets)
    missing = [key for key in KEYS if key not in tensors]
    if len(missing) == 1:
        raise AdapterRejected(f"it lacks {missing[0]}, but has the other projection; save the adapter again")
    if missing:
        a, b = _draw(seed, (rank, width), (height, rank))
        return Projections(lambda: a, lambda: b)
    key_a, key_b = KEYS
    # The adapter may have been trained on wider modules than those it changes.
    expect_shape(tensors[key_a], rank, max(width, *tensors[key_a].shape[1:2]))
    expect_shape(tensors[key_b], max(height, *tensors[key_b].shape[:1]), rank)
    return Projections(lambda: tensors.read(key_a), lambda: tensors.read(key_b))


def _draw(seed: int, *shapes: tuple[int, int]) -> list[Float32]:
    """Kaiming-uniform matrices, one after another from one generator, as torch's CPU generator gives them.

    torch seeds the Mersenne Twister with the seed's lower 32 bits and makes a float of the lower 24 bits of
    each word (aten/src/ATen/core/DistributionsHelper.h).
    """
    twister = np.random.MT19937()
    state: Any = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)
    twister.state = state
    drawn = []
    for shape in shapes:
        words = twister.random_raw(math.prod(shape)).astype(np.uint32) & 0xFFFFFF
        bound = np.float32(math.sqrt(6 / shape[1]))
        unit = words.astype(np.float32) * np.float32(2**-24)
        drawn.append((unit * (bound + bound) - bound).reshape(shape))
    return drawn
