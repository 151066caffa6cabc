"""The router's configuration: frozen, each field validated where it is declared."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SCALING = 100.0


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter given on the command line as NAME=SOURCE. Such a source may lie anywhere."""

    name: str
    source: str
    scaling: float = 1.0
    """Multiplies the weight of every use."""

    def __post_init__(self) -> None:
        _require(
            abs(self.scaling) <= MAX_SCALING, f"scaling must lie between -{MAX_SCALING:g} and {MAX_SCALING:g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Where the router listens, which shards it drives, and how much it accepts."""

    served_model_name: str
    ranks: tuple[str, ...]
    """host:port of every rank of the shard group, rank 0 first."""
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 8081
    adapters: tuple[AdapterSpec, ...] = ()
    adapter_roots: tuple[str, ...] = ()
    """Directories below which a request may name an adapter. None given: no directory at all."""
    allow_sources: tuple[str, ...] = ("hub:*",)
    """Patterns a source named in a request must match, such as `hub:my-org/*`."""
    api_key_file: str | None = None
    drain_timeout: float = 30.0
    """Seconds that running requests get after SIGTERM."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1_048_576
    max_step_tokens: int = 512
    """Token budget of one step: decode rows and prompt chunks together."""
    adapter_patience: float = 3.0
    """Seconds a request may wait for room for its adapter before a resident one is drained for it."""
    adapter_tokenizers: bool = True
    """Use an adapter's own tokenizer and chat template where it ships them."""
    max_body_bytes: int = 8 * 1024 * 1024

    def __post_init__(self) -> None:
        _require(bool(self.served_model_name), "served-model-name must not be empty")
        _require(bool(self.ranks), "at least one shard address is needed")
        for name in ("port", "grpc_port"):
            _require(0 <= getattr(self, name) <= 65535, f"{name} must lie between 0 and 65535")
        for name in ("max_queued_requests", "max_queued_tokens", "max_step_tokens", "max_body_bytes"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("drain_timeout", "adapter_patience"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        names = [adapter.name for adapter in self.adapters]
        _require(len(names) == len(set(names)), "an adapter name is given twice")
        _require(self.served_model_name not in names, "an adapter must not have the base model's name")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
