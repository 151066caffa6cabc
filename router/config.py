"""The router's configuration: frozen, each field validated where it is declared."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.credentials import check_link, host_of

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
    groups: tuple[tuple[str, ...], ...]
    """Of each shard group, host:port of every rank, rank 0 first. A group holds one copy of the model."""
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
    connect_timeout: float = 300.0
    """Seconds that shards get to answer for the first time."""
    tls_cert: str | None = None
    """File with the router's certificate, in PEM as the other two. With them, shards are reached over TLS."""
    tls_key: str | None = None
    """File with its key."""
    tls_ca: str | None = None
    """File with the certificate of the authority that must have signed the shards'."""
    tls_name: str | None = None
    """What a shard's certificate must be made out to; None: to the host of its address."""
    plaintext: bool = False
    """Allow shards at addresses other than loopback without TLS."""

    def __post_init__(self) -> None:
        _require(bool(self.served_model_name), "served-model-name must not be empty")
        _require(bool(self.groups) and all(self.groups), "at least one shard address is needed")
        addresses = [address for group in self.groups for address in group]
        _require(len(addresses) == len(set(addresses)), "a shard address is given twice")
        for name in ("port", "grpc_port"):
            _require(0 <= getattr(self, name) <= 65535, f"{name} must lie between 0 and 65535")
        for name in ("max_queued_requests", "max_queued_tokens", "max_step_tokens", "max_body_bytes"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("drain_timeout", "adapter_patience"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(self.connect_timeout > 0, "connect_timeout must be above 0")
        _require(self.tls_name is None or bool(self.tls_cert), "--tls-name is of no use without --tls-cert")
        check_link(self, map(host_of, addresses))
        names = [adapter.name for adapter in self.adapters]
        _require(len(names) == len(set(names)), "an adapter name is given twice")
        _require(self.served_model_name not in names, "an adapter must not have the base model's name")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
