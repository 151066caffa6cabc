"""Choose the backend of a device, importing that one only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .capture import Capture, CudaCapture
from .cuda_decoder import CudaDecoderOps
from .decoder_ops import DecoderOps
from .ops import LoraOps

log = logging.getLogger(__name__)

MINIMUM_CAPABILITY = (8, 0)
"""Of a CUDA device: tensor cores for bfloat16, and asynchronous copies."""


class BackendMissing(Exception):
    """No backend serves a device here. The message says what would."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What a device computes with."""

    lora: LoraOps
    decoder: DecoderOps | None = None
    """A decoder's pieces beside its products, where the backend has its own."""
    capture: Callable[[], Capture] | None = None
    """Makes what records steps, where the device can repeat them."""


def load(device: torch.device) -> Backend:
    """The backend of a device. Raises BackendMissing."""
    if device.type == "cpu":
        return _load_cpu()
    if device.type == "cuda":
        return _load_cuda(device)
    raise BackendMissing(f"there are no kernels for {device}: use cpu or cuda")


def _load_cpu() -> Backend:
    try:
        from .native_decoder import NativeDecoderOps
        from .native_lora import NativeLoraOps
    except ImportError as error:
        from .cpu import CpuLoraOps

        log.info("serving by torch alone: %s", error)
        return Backend(CpuLoraOps())
    return Backend(NativeLoraOps(), NativeDecoderOps())


def _load_cuda(device: torch.device) -> Backend:
    if not torch.cuda.is_available():
        raise BackendMissing(
            "torch sees no device cuda: serve with --device cpu, or install torch's CUDA build"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        raise BackendMissing(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 8.0 or later: serve with --device cpu"
        )
    try:
        from .cupy_launcher import CupyLauncher
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise BackendMissing(
            f"CuPy cannot be imported ({reason}); install it: pip install 'loraplex[cuda]'"
        ) from error
    from .cuda import CudaLoraOps
    from .side_stream import CudaSideStream

    launcher = CupyLauncher(device)
    lora = CudaLoraOps(launcher, device, CudaSideStream(device))
    return Backend(lora, CudaDecoderOps(launcher), CudaCapture)
