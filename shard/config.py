"""A shard's configuration: frozen, each field validated where it is declared."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.credentials import check_link

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
    kv_memory: int | None = None
    """Bytes for keys and values; None: 512 MiB on a CPU, most of what is free on a GPU."""
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
    cores: tuple[int, ...] = ()
    """Processor cores that this process stays on; none given: all."""
    rank: int = 0
    """This process's number among those that hold one copy of the model between them."""
    world_size: int = 1
    """How many these are."""
    master: str = ""
    """host:port at which rank 0 listens for the others."""
    rank_patience: float = 120.0
    """Seconds that the ranks get to meet, and that one of them may keep the others waiting."""
    store_prefix: str = ""
    """Where a store runs at `master` already, as torchrun's does: what our keys in it begin with. Empty: rank
    0 runs one there."""
    tls_cert: str | None = None
    """File with this shard's certificate, in PEM as the other two. With them it serves over TLS alone, and
    whoever shows a certificate of the authority alone."""
    tls_key: str | None = None
    """File with its key."""
    tls_ca: str | None = None
    """File with the authority's certificate."""
    plaintext: bool = False
    """Allow a `host` other than loopback without TLS."""
    drain_timeout: float = 30.0
    """Seconds that the router gets after SIGTERM to finish what runs here, and leave."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "a model is needed")
        _require(self.device in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda")
        _require(
            self.dtype in (None, "float32", "bfloat16", "float16"),
            "dtype must be float32, bfloat16 or float16",
        )
        _require(0 <= self.port <= 65535, "port must lie between 0 and 65535")
        _require(self.drain_timeout >= 0, "drain_timeout must not be negative")
        for name in (
            "adapter_memory",
            "block_size",
            "max_adapters",
            "max_num_seqs",
            "max_step_tokens",
            "max_rank",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("kv_memory", "max_model_len"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1")
        _require(self.host_adapter_memory >= 0, "host_adapter_memory must not be negative")
        _require(self.world_size >= 1, "world_size must be at least 1")
        _require(0 <= self.rank < self.world_size, "rank must lie between 0 and world_size - 1")
        _require(self.world_size == 1 or ":" in self.master, "several ranks need a master: host:port")
        _require(self.rank_patience > 0, "rank_patience must be above 0")
        check_link(self, [self.host])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
