"""The device under test is a GPU. Everything here carries the marker `gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.kernels.side_stream import CudaSideStream

from ..conformance.bases import Base
from ..conformance.conftest import bases, no_model_cards
from ..conformance.serving import Served
from ..conformance.test_cuda_kernels import ServeOn
from ..kernels.conftest import _seeded, make_adapter
from ..kernels.target import Target

__all__ = ["_seeded", "bases", "make_adapter", "no_model_cards"]

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def target(device: torch.device) -> Target:
    from loraplex.kernels.cupy_launcher import CupyLauncher

    return Target(CupyLauncher(device), device, CudaSideStream(device))


@pytest.fixture
def serve_on(device: torch.device) -> ServeOn:
    def serve(base: Base, spool: Path) -> Served:
        return Served(base.directory, spool, device=device.type)

    return serve
