"""Row 47: a pickle that runs code runs none, neither when it is served nor when it is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.adapter_tools.convert import convert
from loraplex.adapter_tools.errors import ToolFailed

from .bench import CONFIG
from .cases_files import Evil


def test_a_malicious_pickle_is_not_converted(tmp_path: Path) -> None:
    source, target, trace = tmp_path / "evil", tmp_path / "converted", tmp_path / "trace"
    source.mkdir()
    (source / CONFIG).write_text('{"peft_type": "LORA"}')
    torch.save({"a": torch.ones(2), "b": Evil(trace)}, source / "adapter_model.bin")
    with pytest.raises(ToolFailed, match=r"adapter_model\.bin is refused"):
        convert(source, target)
    assert not target.exists()
    assert not trace.exists()
