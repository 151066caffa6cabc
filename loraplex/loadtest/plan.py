"""From what was typed to a plan of the benchmark. Every mistake raises ValueError with one clear line."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .specs import KINDS, Lengths, Popularity, SLora, Spec, Timeouts
from .workloads import FIRST_TOKEN_ID, Trace, trace

STYLES = ("openai", "llama.cpp")
_NAMED = re.compile(r"([\w.-]+)=(https?://.*)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NAMES = 100_000
_MOST_ROUNDS = 1000
_SPREADS = {"uniform": None, "round-robin": None, "zipf": 1.0, "power": 0.3}
_MIXES = {"identical": None, "distinct": None, "uniform": None, "zipf": 1.5}
"""What a popularity may be called, and its parameter unless one is given; None: it takes none."""


@dataclass(frozen=True, slots=True)
class Target:
    """One server: where it answers, what it calls base and adapters, and how it is told."""

    name: str
    url: str
    style: str = "openai"
    model: str | None = None
    """The base's name; None: what the server's list of models says."""
    adapters: tuple[str, ...] = ()
    api_key: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of the sweep, or the only one: a workload over the first `adapters` adapters."""

    spec: Spec
    adapters: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """The settings to measure, and what changes among them: `adapters`, `rate`, or nothing."""

    axis: str | None
    points: tuple[Point, ...]

    def value(self, point: Point) -> float:
        """Where a point lies on the axis."""
        return point.spec.rate if self.axis == "rate" and isinstance(point.spec, SLora) else point.adapters

    def label(self, point: Point) -> str:
        """A point as people read it; empty where there is only one."""
        return f"{self.axis} {self.value(point):g}" if self.axis else ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what is measured."""

    targets: tuple[Target, ...]
    sweep: Sweep
    base_share: float = 0.0
    rounds: int = 1
    vocabulary: int = 1000
    """Prompts have ids below it."""
    warm_up: bool = True
    timeouts: Timeouts = field(default_factory=Timeouts)
    first_token_limit: float = 6.0
    """Seconds."""

    def __post_init__(self) -> None:
        if not 0 <= self.base_share <= 1:
            raise ValueError("--base-share must lie between 0 and 1")
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise ValueError(f"--rounds must lie between 1 and {_MOST_ROUNDS}")
        if self.vocabulary <= FIRST_TOKEN_ID:
            raise ValueError(
                f"--vocabulary must be above {FIRST_TOKEN_ID}: ids below are left to special tokens"
            )
        if not self.first_token_limit > 0:
            raise ValueError("--slo must be above 0")

    @property
    def seed(self) -> int:
        """Of the prompts; the workloads of all points have the same."""
        return self.sweep.points[0].spec.seed

    def trace(self, point: Point) -> Trace:
        """The requests of one point, the same for every server and round."""
        return trace(point.spec, point.adapters, self.base_share)


def targets(
    servers: Sequence[str],
    *,
    styles: Sequence[str] = (),
    models: Sequence[str] = (),
    adapters: Sequence[str] = (),
    api_keys: Sequence[str] = (),
) -> tuple[Target, ...]:
    """Servers as typed, `[NAME=]URL`, each with what the per-server options say about it."""
    urls = [_server(text) for text in servers]
    names = [name for name, _ in urls]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two servers are called {twice}; give each a name of its own: NAME=URL")
    style = _by_server("--style", styles, names)
    model = _by_server("--model", models, names)
    own = {name: expand(text) for name, text in _by_server("--adapters", adapters, names).items()}
    key = _by_server("--api-key", api_keys, names, free=True)
    if wrong := next((text for text in style.values() if text not in STYLES), None):
        raise ValueError(f"--style {wrong}: write {' or '.join(STYLES)}")
    if len({len(own.get(name, ())) for name in names}) > 1:
        counts = ", ".join(f"{name} {len(own.get(name, ()))}" for name in names)
        raise ValueError(f"--adapters: all servers need equally many adapters ({counts})")
    return tuple(
        Target(
            name=name,
            url=url,
            style=style.get(name, STYLES[0]),
            model=model.get(name),
            adapters=own.get(name, ()),
            api_key=key.get(name, ""),
        )
        for name, url in urls
    )


def spec(workload: str, given: Mapping[str, Any]) -> Spec:
    """The workload with the options that were given (None: not given), the others at their defaults.

    An option of another workload is refused.
    """
    if workload not in KINDS:
        raise ValueError(f"--workload {workload}: write {', '.join(KINDS)}")
    kind = KINDS[workload]
    chosen = {name: _parsed(name, value) for name, value in given.items() if value is not None}
    for name in chosen.keys() - {each.name for each in fields(kind)}:
        owners = [other for other, spec in KINDS.items() if name in {each.name for each in fields(spec)}]
        raise ValueError(f"{_flag(name)} goes with --workload {' or '.join(owners)}, not with {workload}")
    return kind(**chosen)


def sweep(spec: Spec, adapters: int, counts: str | None, rates: str | None) -> Sweep:
    """The points of `--adapter-counts` or `--rates`; one point where neither is given."""
    if counts is not None and rates is not None:
        raise ValueError("give --adapter-counts or --rates, not both: one thing changes in a sweep")
    if counts is not None:
        values = _counts(counts)
        if values[-1] > adapters:
            raise ValueError(f"--adapter-counts {counts}: --adapters names only {adapters}")
        return Sweep("adapters", tuple(Point(spec, value) for value in values))
    if rates is not None:
        if not isinstance(spec, SLora):
            raise ValueError("--rates goes with --workload s-lora: only its requests arrive at a rate")
        points = (Point(replace(spec, rate=value), adapters) for value in _rates(rates))
        return Sweep("rate", tuple(points))
    return Sweep(None, (Point(spec, adapters),))


def expand(text: str) -> tuple[str, ...]:
    """Names from a list with ranges: `sql,b{0..2}` is sql, b0, b1, b2, and `{00..11}` keeps two digits."""
    names: list[str] = []
    for part in text.split(","):
        names += _expanded(part.strip())
        if len(names) > _MOST_NAMES:
            raise ValueError(f"--adapters {text}: more than {_MOST_NAMES} names")
    if "" in names:
        raise ValueError(f"--adapters {text}: a name is empty")
    if len(set(names)) < len(names):
        raise ValueError(f"--adapters {text}: a name is there twice")
    return tuple(names)


def check_outputs(sweep: Sweep, json: Path | None, plots: Path | None) -> None:
    """Raise ValueError where the results could not be written, before anything is measured."""
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise ValueError(f"--json {json}: no such folder to write a file into")
    if plots is None:
        return
    if plots.exists() and not plots.is_dir():
        raise ValueError(f"--plots {plots}: it is a file, not a folder")
    if sweep.axis is None:
        raise ValueError("--plots draws a sweep: add --adapter-counts 1,8,32 or --rates 1,2,4")
    if find_spec("matplotlib") is None:
        raise ValueError("--plots needs matplotlib: pip install 'loraplex[bench]'")


def _expanded(name: str) -> list[str]:
    found = _BRACES.search(name)
    if found is None:
        return [name]
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= _MOST_NAMES:
        raise ValueError(f"--adapters {name}: {found[0]} is no range; write the smaller number first")
    digits = len(found[1]) if found[1].startswith("0") else 0
    head, tail = name[: found.start()], _expanded(name[found.end() :])
    return [f"{head}{number:0{digits}}{rest}" for number in range(first, last + 1) for rest in tail]


def _server(text: str) -> tuple[str, str]:
    """Name and URL; a bare URL is named by its host and port."""
    named = _NAMED.fullmatch(text)
    url = (named[2] if named else text).rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text} is no server; write NAME=URL or URL, such as http://127.0.0.1:8080")
    return (named[1] if named else parts.netloc.rpartition("@")[2]), url


def _by_server(
    flag: str, values: Sequence[str], names: Collection[str], *, free: bool = False
) -> dict[str, str]:
    """Values by server: `NAME=VALUE` for one, a bare VALUE for all others.

    With `free`, values may contain an equals sign of their own.
    """
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if equals and name in names:
            own[name] = value
        elif equals and not free:
            raise ValueError(f"{flag} {text}: no server is called {name}; there is {', '.join(names)}")
        else:
            common = dict.fromkeys(names, text)
    return common | own


def _parsed(name: str, value: Any) -> Any:
    """An option's value as its field in the spec wants it."""
    if name == "spread":
        return _popularity("--spread", value, _SPREADS)
    if name == "mix":
        return _popularity("--mix", value, _MIXES)
    if name in ("input_range", "output_range"):
        low, colon, high = str(value).partition(":")
        if not (colon and low.isdecimal() and high.isdecimal()):
            raise ValueError(f"{_flag(name)} {value} is no range; write LOW:HIGH, such as 8:512")
        return Lengths(int(low), int(high))
    return value


def _popularity(flag: str, text: str, kinds: Mapping[str, float | None]) -> Popularity:
    kind, colon, number = text.partition(":")
    parameter = kinds.get(kind)
    if kind not in kinds or (colon and parameter is None):
        shown = ", ".join(name if usual is None else f"{name}:{usual:g}" for name, usual in kinds.items())
        raise ValueError(f"{flag} {text}: write one of {shown}")
    if colon:
        parameter = _number(flag, text, number)
    if kinds is _MIXES and parameter is not None and parameter <= 1:
        raise ValueError(f"{flag} {text}: groups grow by a factor above 1")
    return Popularity(kind, parameter or 0.0)


def _rates(text: str) -> list[float]:
    return sorted({_number("--rates", text, part) for part in text.split(",")})


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--adapter-counts {text}: write whole numbers with commas, such as 1,8,32")
    return sorted({int(part) for part in parts})


def _number(flag: str, text: str, part: str) -> float:
    """The number above 0 that `part` of an option's `text` is."""
    try:
        value = float(part)
    except ValueError:
        raise ValueError(f"{flag} {text}: '{part}' is not a number") from None
    if not 0 < value < math.inf:
        raise ValueError(f"{flag} {text}: '{part}' is not above 0")
    return value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
