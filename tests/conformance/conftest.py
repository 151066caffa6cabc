"""Bases that a whole session shares: written once, loaded once for serving and once for reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from peft import PeftModel

from .bases import Base
from .serving import Served


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are faster without a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_model_cards() -> Iterator[None]:
    """PEFT writes one beside every adapter, which takes longer than the adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "create_or_update_model_card", lambda model, directory: None)
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda name: Base(name, root / name))


@pytest.fixture(scope="session")
def serve(bases: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """The base of a name, loaded as a shard loads it."""
    return cache(lambda name: Served(bases(name).directory, tmp_path_factory.mktemp("spool")))
