"""What a workload may be told, checked where it is declared. `workloads` turns a spec into requests."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 1 << 20
"""Most tokens that a prompt or an output may have."""


@dataclass(frozen=True, slots=True)
class Popularity:
    """Which adapters are asked for how often: a kind, and its parameter where it has one."""

    kind: str
    parameter: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers from `low` up to but without `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True, kw_only=True)
class Closed:
    """`requests` requests, `concurrency` at a time: as one ends the next is sent."""

    requests: int = 64
    concurrency: int = 8
    prompt_tokens: int = 64
    output_tokens: int = 32
    spread: Popularity = Popularity("uniform")
    seed: int = 42

    def __post_init__(self) -> None:
        _between(self, 1, LONGEST, "requests", "concurrency", "prompt_tokens", "output_tokens")
        _between(self, 0, None, "seed")


@dataclass(frozen=True, kw_only=True)
class SLora:
    """Requests that arrive by themselves, as in S-LoRA's synthetic traces."""

    rate: float = 2.0
    """Requests a second."""
    duration: float = 60.0
    """Seconds that the arrivals take, on average."""
    alpha: float = 1.0
    """The k most popular of n adapters get (k/n)^alpha of the requests; 1 is uniform, small is skewed."""
    cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals; 1 is a Poisson process."""
    input_range: Lengths = Lengths(8, 512)
    output_range: Lengths = Lengths(8, 512)
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("rate", "duration", "alpha", "cv"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{_flag(name)} must be a number above 0")
        for name in ("input_range", "output_range"):
            lengths: Lengths = getattr(self, name)
            if not 1 <= lengths.low < lengths.high <= LONGEST:
                raise ValueError(
                    f"{_flag(name)} {lengths} holds no length; write LOW:HIGH with 1 ≤ LOW < HIGH"
                )
        _between(self, 0, 2**32 - 1, "seed")
        if not 1 <= self.rate * self.duration <= LONGEST:
            raise ValueError("--rate times --duration must give at least one request, and at most a million")


@dataclass(frozen=True, kw_only=True)
class Punica:
    """`requests` requests, `concurrency` at a time, with Punica's lengths and one of its popularity mixes."""

    requests: int = 64
    concurrency: int = 8
    mix: Popularity = Popularity("uniform")
    max_length: int = 2048
    """Tokens of prompt and output together; the paper's 2048 unless the model holds fewer."""
    seed: int = 0xABCDABCD987

    def __post_init__(self) -> None:
        _between(self, 1, LONGEST, "requests", "concurrency")
        _between(self, 3, LONGEST, "max_length")
        _between(self, 0, None, "seed")


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds: to connect, without a byte from the server, and for a whole request."""

    connect: float = 10.0
    silence: float = 120.0
    total: float = 600.0

    def __post_init__(self) -> None:
        for name, value in (("--silence-timeout", self.silence), ("--timeout", self.total)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0")


Spec = Closed | SLora | Punica
KINDS: dict[str, type[Spec]] = {"closed": Closed, "s-lora": SLora, "punica": Punica}


def _between(spec: object, low: int, high: int | None, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None or value < low else f"at most {high}"
            raise ValueError(f"{_flag(name)} must be {wanted}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
