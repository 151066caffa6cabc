"""A shard's configuration: frozen, each field validated where it is declared."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    """Which model a shard serves, on what, and how much memory it may use."""

    model: str
    """A directory or a hub repository."""
    revision: str | None = None
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    dtype: str | None = None
    """"float32", "bfloat16", "float16"; None: as the checkpoint says."""
    host: str = "127.0.0.1"
    port: int = 0
    kv_memory: int = 512 * MIB
    """Bytes for keys and values."""
    block_size: int = 16
    """Tokens in one KV block."""
    adapter_memory: int = 512 * MIB
    """Bytes for adapters resident on the device."""
    host_adapter_memory: int = 1024 * MIB
    """Bytes for adapters kept parsed in host memory."""
    max_adapters: int = 256
    """Adapters resident at once, whatever their size."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: as the model's config says, at most 8192."""
    max_num_seqs: int = 256
    max_step_tokens: int = 512
    max_rank: int = 512
    threads: int | None = None
    """CPU threads of the device thread's operators; None: torch's own choice."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "a model is needed")
        _require(self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda")
        _require(
            self.dtype in (None, "float32", "bfloat16", "float16"),
            "dtype must be float32, bfloat16 or float16",
        )
        _require(0 <= self.port <= 65535, "port must lie between 0 and 65535")
        for name in (
            "kv_memory",
            "adapter_memory",
            "block_size",
            "max_num_seqs",
            "max_step_tokens",
            "max_rank",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        _require(self.max_adapters >= 1, "max_adapters must be at least 1")
        _require(self.host_adapter_memory >= 0, "host_adapter_memory must not be negative")
        _require(self.max_model_len is None or self.max_model_len >= 1, "max_model_len must be at least 1")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
