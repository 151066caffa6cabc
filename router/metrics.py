"""Prometheus metrics. The loop adds to plain numbers once a step; a scrape reads them.

No label carries a name, a tenant or a request: their number has no bound. Digests are those of resident
adapters only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ..proto import shard_pb2
from .group import Step
from .sequence import Sequence
from .steps import Settled

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket. Upper bounds are inclusive, as Prometheus has them."""

    bounds: tuple[float, ...] = _LATENCY
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), the last one +Inf."""
        names = [*(str(bound) for bound in self.bounds), "+Inf"]
        sums: list[tuple[str, float]] = []
        so_far = 0
        for name, count in zip(names, self.counts, strict=True):
            so_far += count
            sums.append((name, so_far))
        return sums


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine's state at a scrape."""

    running: int = 0
    waiting: int = 0
    blocks_free: int = 0
    blocks_used: int = 0
    rows_used: int = 0
    slots: int = 0
    slots_used: int = 0
    adapter_bytes_used: int = 0
    adapter_references: int = 0
    adapters_known: int = 0
    steps_in_flight: int = 0
    tasks: int = 0
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    """Device bytes by the digest of what is resident."""
    ready: bool = False
    groups_ready: int = 0


class Metrics(Collector):
    """Everything the router counts. Numbers are public attributes: their owner is the engine loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.snapshot: Callable[[], Snapshot] = Snapshot
        """Set by the engine."""
        self.steps = self.decode_steps = self.step_rows = self.decode_rows = 0
        self.step_rows_max = self.step_adapters_max = 0
        self.device_seconds = self.idle_seconds = self.busy_seconds = 0.0
        self.prompt_tokens = self.generated_tokens = self.preemptions = 0
        self.adapter_downloads = self.adapter_failures = self.adapter_loads = self.adapter_evictions = 0
        self.adapter_hits = self.adapter_misses = 0
        self.groups_lost = self.takeovers = 0
        self.admissions: Counter[str] = Counter()
        """Admitted sequences by the index of their group; one that was preempted counts again."""
        self.outcomes: Counter[str] = Counter()
        """Accepted requests by how they ended: stop, length, cancelled, or an error's code."""
        self.refusals: Counter[str] = Counter()
        self.first_token = Histogram()
        self.inter_token = Histogram()
        self.end_to_end = Histogram()
        self.queue_time = Histogram()
        self.adapter_seconds: Mapping[str, Histogram] = {"download": Histogram(), "load": Histogram()}
        self._busy_since: dict[int, float] = {}
        """By the index of the group."""
        registry.register(self)

    def answered(self, result: shard_pb2.StepResult, step: Step, settled: Settled, interval: float) -> None:
        """Count one answer. `interval`: seconds since the answer before it."""
        self.generated_tokens += settled.tokens
        for gap in settled.gaps:
            self.inter_token.observe(gap)
        if settled.steady:
            self.inter_token.observe(interval, settled.steady)
        for sequence in settled.first_tokens:
            self.prompt_tokens += sequence.prompt_length
            self.first_token.observe(sequence.first_token_at - sequence.request.arrival)
        if not result.last:
            return
        self.steps += 1
        self.step_rows += result.row_count
        self.decode_rows += step.decode_rows
        self.decode_steps += step.decode_rows > 0
        self.step_rows_max = max(self.step_rows_max, result.row_count)
        self.step_adapters_max = max(self.step_adapters_max, result.adapter_count)
        self.device_seconds += result.device_micros * 1e-6
        if step.decode_rows:
            self.idle_seconds += result.idle_micros * 1e-6

    def ended(self, sequence: Sequence, outcome: str, now: float) -> None:
        """Count the terminal event of an accepted request."""
        self.outcomes[outcome] += 1
        self.end_to_end.observe(now - sequence.request.arrival)

    def busy(self, in_flight: bool, now: float, group: int = 0) -> None:
        """Note whether a group has a step in flight: what its device does not use of that time is idle."""
        if in_flight:
            self._busy_since.setdefault(group, now)
        elif (since := self._busy_since.pop(group, None)) is not None:
            self.busy_seconds += now - since

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, help_text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self.first_token),
            ("inter_token_latency_seconds", "Between two tokens of one request.", self.inter_token),
            ("e2e_request_latency_seconds", "From arrival to the terminal event.", self.end_to_end),
            ("request_queue_time_seconds", "From arrival to admission.", self.queue_time),
        ):
            yield HistogramMetricFamily(
                f"loraplex_{name}", help_text, buckets=histogram.cumulative(), sum_value=histogram.total
            )
        stages = HistogramMetricFamily(
            "loraplex_adapter_load_seconds", "Time to bring an adapter one stage further.", labels=["stage"]
        )
        for stage, histogram in self.adapter_seconds.items():
            stages.add_metric([stage], buckets=histogram.cumulative(), sum_value=histogram.total)
        yield stages
        yield self._resident()

    def _resident(self) -> Metric:
        family = GaugeMetricFamily(
            "loraplex_adapter_resident_bytes",
            "Device bytes of each resident adapter, of the fullest rank.",
            labels=["digest"],
        )
        for digest, size in sorted(self.snapshot().resident_bytes.items()):
            family.add_metric([digest], size)
        return family

    def _gauges(self) -> Iterator[Metric]:
        now = self.snapshot()
        blocks = now.blocks_free + now.blocks_used
        for name, help_text, value in (
            ("requests_running", "Accepted requests that have a row or await its last answers.", now.running),
            ("requests_waiting", "Accepted requests in a queue.", now.waiting),
            ("rows_used", "Rows of the batch in use.", now.rows_used),
            ("kv_usage_ratio", "KV blocks in use, 0 to 1.", now.blocks_used / blocks if blocks else 0.0),
            ("kv_blocks_free", "KV blocks nobody uses.", now.blocks_free),
            ("kv_blocks_used", "KV blocks in use.", now.blocks_used),
            ("adapter_slots", "Slots for resident adapters.", now.slots),
            ("adapter_slots_used", "Slots that hold an adapter.", now.slots_used),
            (
                "adapter_bytes_used",
                "Device bytes of resident adapters, of the fullest rank.",
                now.adapter_bytes_used,
            ),
            ("adapter_references", "Uses of resident adapters by requests.", now.adapter_references),
            ("adapters_known", "Adapters registered.", now.adapters_known),
            ("steps_in_flight", "Steps sent and not answered.", now.steps_in_flight),
            ("tasks", "Tasks on the router's event loop.", now.tasks),
            ("ready", "1 while requests are served.", float(now.ready)),
            ("shard_groups_ready", "Shard groups that serve.", now.groups_ready),
            ("step_rows_max", "Most rows in one step, counted by the shard.", self.step_rows_max),
            ("step_adapters_max", "Most adapters in one step, counted by the shard.", self.step_adapters_max),
        ):
            yield GaugeMetricFamily(f"loraplex_{name}", help_text, value=value)

    def _counters(self) -> Iterator[Metric]:
        for name, help_text, value in (
            ("steps", "Steps answered.", self.steps),
            ("decode_steps", "Steps with at least one decode row.", self.decode_steps),
            ("step_rows", "Rows over all steps, counted by the shard.", self.step_rows),
            ("decode_rows", "Decode rows over all steps.", self.decode_rows),
            ("device_seconds", "Time the device worked, by the shard's own clock.", self.device_seconds),
            ("idle_seconds", "Time the device waited for decode steps, by its own clock.", self.idle_seconds),
            ("busy_seconds", "Time with a step in flight, of each group.", self.busy_seconds),
            ("prompt_tokens", "Prompt tokens of requests that got a first token.", self.prompt_tokens),
            ("generated_tokens", "Tokens delivered.", self.generated_tokens),
            ("preemptions", "Sequences that lost their blocks to older ones.", self.preemptions),
            ("adapter_downloads", "Fetches of adapters to disk.", self.adapter_downloads),
            ("adapter_failures", "Adapters that failed to be fetched or loaded.", self.adapter_failures),
            ("adapter_loads", "Adapters made resident.", self.adapter_loads),
            ("adapter_evictions", "Idle adapters that made room.", self.adapter_evictions),
            ("adapter_hits", "Requests whose adapters were resident when they came.", self.adapter_hits),
            ("adapter_misses", "Requests that waited for an adapter.", self.adapter_misses),
            ("shard_groups_lost", "Times a shard group was lost.", self.groups_lost),
            (
                "request_takeovers",
                "Waiting requests that an idle group took from a full one.",
                self.takeovers,
            ),
        ):
            yield CounterMetricFamily(f"loraplex_{name}", help_text, value=value)
        yield _by_label("group_admissions", "Sequences admitted by each group.", "group", self.admissions)
        yield _by_label("requests_finished", "Accepted requests by outcome.", "outcome", self.outcomes)
        yield _by_label("requests_refused", "Requests not accepted, by error code.", "code", self.refusals)


def _by_label(name: str, help_text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"loraplex_{name}", help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family
