"""Choose the backend of a device, importing that one only."""

from __future__ import annotations

from .ops import LoraOps


def load(device: str) -> LoraOps:
    """The operator for a torch device string such as "cpu".

    Raises:
        ValueError: no backend serves this device.
    """
    if device == "cpu":
        from .cpu import CpuLoraOps

        return CpuLoraOps()
    raise ValueError(f"no LoRA operator for device {device!r}: use 'cpu'")
