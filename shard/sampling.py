"""From one step's logits to one token a row, and logprobs where asked for.

Every row is drawn by its own parameters, history and counter alone: neighbours, batch position and
preemption change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..proto import shard_pb2
from .device import on_device
from .errors import BadPlan
from .logprobs import TokenLogprobs, score, top_ids

__all__ = ["RowSampling", "SampleRow", "Sampled", "Sampler", "TokenLogprobs", "uniform"]

_CANDIDATES = 64
"""How many of the most probable tokens top-k and top-p look at before they sort a row in full."""

_BLOCK = 64
"""Vocabulary ids reduced at once in the search for a row's maximum."""

_MASK64 = (1 << 64) - 1

_Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row's tokens are chosen. The fields mean what they mean in `SamplingParams`.

    Raises BadPlan for a value that no distribution has. Ids beyond the vocabulary have no effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            _require(math.isfinite(getattr(self, name)), f"{name} must be finite")
        _require(self.temperature >= 0, "temperature must not be negative; 0 is greedy")
        _require(0 <= self.top_p <= 1, "top_p must lie between 0 and 1; 1 is off")
        _require(0 <= self.min_p <= 1, "min_p must lie between 0 and 1; 0 is off")
        _require(self.repetition_penalty > 0, "repetition_penalty must be above 0; 1 is off")
        _require(all(map(math.isfinite, self.logit_bias.values())), "logit_bias must be finite")

    @classmethod
    def from_proto(cls, message: shard_pb2.SamplingParams, seed: int) -> RowSampling:
        """The plain-data form of a `RowStart`'s sampling parameters and seed.

        A repetition penalty left at zero is off: nothing can be divided by it.
        """
        return cls(
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty or 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=dict(message.logit_bias),
            stop_ids=tuple(message.stop_ids),
            min_tokens=message.min_tokens,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
            seed=seed,
        )

    @property
    def penalises_output(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_history(self) -> bool:
        """A draw depends on earlier tokens, so `SampleRow` must carry them."""
        return self.repetition_penalty != 1 or self.penalises_output

    @property
    def is_truncated(self) -> bool:
        """Only the most probable tokens may be drawn, so they must be ordered."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of a step. Histories may stay empty where `sampling.needs_history` is false."""

    sampling: RowSampling
    index: int
    """Of the output token to draw: 0 for the first."""
    prompt_tokens: Sequence[int] = ()
    output_tokens: Sequence[int] = ()

    @property
    def is_adjusted(self) -> bool:
        """The logits change before the draw."""
        sampling = self.sampling
        return sampling.needs_history or bool(sampling.logit_bias) or bool(self.masked_ids)

    @property
    def masked_ids(self) -> tuple[int, ...]:
        """Ids that may not be drawn yet."""
        return self.sampling.stop_ids if self.index < self.sampling.min_tokens else ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row drew. `token` is None where the row's logits were not finite."""

    token: int | None
    logprobs: TokenLogprobs | None = None

    @property
    def finite(self) -> bool:
        return self.token is not None


class Sampler:
    """Draws tokens on the logits' own device; keeps no state between steps."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """Draw one token for every row.

        Args:
            logits: [rows, vocabulary], any float dtype; left unchanged.
            rows: parameters, counter and history of each row.

        Returns:
            One result a row. A row whose logits hold NaN or +inf, or nothing above -inf, is not finite.
        """
        if len(rows) != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} rows")
        if not rows:
            return []
        logits = logits.float()
        best, tokens = _max(logits)
        finite = torch.isfinite(best)
        chosen = [i for i, row in enumerate(rows) if row.sampling.temperature > 0 or row.is_adjusted]
        if chosen:
            picked = logits.clone() if len(chosen) == len(rows) else _select(logits, chosen)
            drawn, drawable = _choose(picked, [rows[i] for i in chosen])
            tokens = _replace(tokens, chosen, drawn)
            finite = _replace(finite, chosen, _select(finite, chosen) & drawable)
        ids: list[int] = torch.where(finite, tokens, -1).tolist()
        logprobs = _chosen_logprobs(logits, rows, ids)
        return [Sampled(token if token >= 0 else None, logprobs.get(i)) for i, token in enumerate(ids)]

    def prompt_logprobs(self, logits: torch.Tensor, targets: Sequence[int], k: int) -> list[TokenLogprobs]:
        """How probable the model found the tokens that the prompt really goes on with.

        Args:
            logits: [tokens, vocabulary], any float dtype.
            targets: the token that follows each position.
            k: how many alternatives to report.

        A position whose logits were not finite has the logprob NaN.
        """
        return score(logits, targets, [k] * len(targets))


def uniform(seed: int, index: int) -> float:
    """The draw of output token `index` under `seed`, in [0, 1): splitmix64, the seed scrambled first."""
    bits = _mix(_mix(seed) + (index + 1) * 0x9E3779B97F4A7C15)
    return (bits >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value &= _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def _max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and its lowest id; NaN if the row has one.

    In two levels: on a CPU the search for a maximum is vectorised, that for its position is not.
    """
    blocks = _blocks(logits, -torch.inf)
    best, block = blocks.amax(dim=-1).max(dim=-1)
    inside = blocks[torch.arange(len(block), device=block.device), block].argmax(dim=-1)
    return best, block * _BLOCK + inside


def _blocks(values: torch.Tensor, fill: float) -> torch.Tensor:
    """[rows, vocabulary] as [rows, blocks, _BLOCK], the last block filled up."""
    missing = -values.shape[1] % _BLOCK
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=fill)
    return values.reshape(len(values), -1, _BLOCK)


def _choose(logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of rows that take more than an argmax, and which of them are finite. Overwrites `logits`."""
    _adjust(logits, rows)
    best, tokens = _max(logits)
    warm = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if warm:
        sampling = [rows[i].sampling for i in warm]
        # The maximum goes first, so that no temperature overflows; one below fp32 would divide 0 by 0.
        temperature = _column(logits, [max(each.temperature, 1e-30) for each in sampling])
        scaled = _select(logits, warm).sub_(_select(best, warm).unsqueeze(1)).div_(temperature)
        draws = [uniform(rows[i].sampling.seed, rows[i].index) for i in warm]
        tokens = _replace(tokens, warm, _draw(torch.softmax(scaled, dim=-1), sampling, draws))
    return tokens, torch.isfinite(best)


def _adjust(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Penalties, then biases, then the mask on early stop ids; in place."""
    _penalise_repetition(logits, rows)
    _penalise_output(logits, rows)
    biased = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.sampling.logit_bias.items()
        if token < logits.shape[1]
    ]
    if biased:
        at_row, at_token, biases = zip(*biased, strict=True)
        logits[_index(logits, at_row), _index(logits, at_token)] += _column(logits, biases).squeeze(1)
    masked = [(i, token) for i, row in enumerate(rows) for token in row.masked_ids if token < logits.shape[1]]
    if masked:
        at_row, at_token = zip(*masked, strict=True)
        logits[_index(logits, at_row), _index(logits, at_token)] = -torch.inf


def _penalise_repetition(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Tokens of prompt and output: a positive logit is divided by the penalty, a negative one multiplied."""
    active = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1]
    if not active:
        return
    histories = [_ids(logits, rows[i].prompt_tokens, rows[i].output_tokens) for i in active]
    at_row, at_token = _positions(logits, active, histories)
    penalties = [rows[i].sampling.repetition_penalty for i in active]
    penalty = _column(logits, np.repeat(penalties, [len(each) for each in histories])).squeeze(1)
    seen = logits[at_row, at_token]
    logits[at_row, at_token] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_output(logits: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    """Tokens of the output: less the presence penalty once, and the frequency penalty each time."""
    active = [i for i, row in enumerate(rows) if row.sampling.penalises_output]
    if not active:
        return
    histories = [_ids(logits, rows[i].output_tokens) for i in active]
    at_row, at_token = _positions(logits, range(len(active)), histories)
    counts = torch.zeros(len(active), logits.shape[1], device=logits.device)
    counts.index_put_((at_row, at_token), torch.ones_like(at_row, dtype=counts.dtype), accumulate=True)
    presence = _column(logits, [rows[i].sampling.presence_penalty for i in active])
    frequency = _column(logits, [rows[i].sampling.frequency_penalty for i in active])
    logits[_index(logits, active)] -= counts * frequency + (counts > 0) * presence


def _ids(logits: torch.Tensor, *histories: Sequence[int]) -> _Ids:
    """The tokens that have a logit: an adapter may bring embeddings for more."""
    tokens = np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])
    return tokens[tokens < logits.shape[1]]


def _positions(
    like: torch.Tensor, rows: Sequence[int], histories: Sequence[_Ids]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (row, token) of every token of every history."""
    at_row = np.repeat(np.asarray(rows, dtype=np.int64), [len(history) for history in histories])
    at_token = np.concatenate(histories)
    return _index(like, at_row), _index(like, at_token)


def _draw(probs: torch.Tensor, sampling: Sequence[RowSampling], draws: Sequence[float]) -> torch.Tensor:
    """One token id a row from `probs` [rows, vocabulary], truncated as each row asks."""
    u = on_device(torch.tensor(draws, dtype=torch.float64), probs.device).unsqueeze(1)
    ordered = [i for i, each in enumerate(sampling) if each.is_truncated]
    plain = [i for i, each in enumerate(sampling) if not each.is_truncated]
    tokens = torch.empty(len(sampling), dtype=torch.int64, device=probs.device)
    if plain:
        drawn = _draw_plain(_select(probs, plain), [sampling[i].min_p for i in plain], _select(u, plain))
        tokens = _replace(tokens, plain, drawn)
    if ordered:
        chosen = [sampling[i] for i in ordered]
        drawn = _draw_ordered(_select(probs, ordered), chosen, _select(u, ordered))
        tokens = _replace(tokens, ordered, drawn)
    return tokens


def _draw_plain(probs: torch.Tensor, min_p: Sequence[float], u: torch.Tensor) -> torch.Tensor:
    """Draw from the whole vocabulary, less what min-p takes."""
    if any(min_p):
        floor = _column(probs, min_p) * probs.amax(dim=-1, keepdim=True)
        probs = torch.where(probs >= floor, probs, 0)
    return _invert(probs, u)


def _draw_ordered(probs: torch.Tensor, sampling: Sequence[RowSampling], u: torch.Tensor) -> torch.Tensor:
    """Draw among the most probable tokens; sort a row in full only where a few of them do not settle it."""
    kept, ids = _truncate(probs, sampling, _CANDIDATES)
    tokens = ids.gather(1, _invert(kept, u).unsqueeze(1)).squeeze(1)
    if probs.shape[1] <= _CANDIDATES:
        return tokens
    # A top-k within the candidates is settled, and a nucleus if it leaves the last candidate out.
    reaches_last = None if all(each.top_k for each in sampling) else kept[:, -1].gt(0).tolist()
    wide = [
        i
        for i, each in enumerate(sampling)
        if (each.top_k > _CANDIDATES if each.top_k or reaches_last is None else reaches_last[i])
    ]
    if wide:
        kept, ids = _truncate(_select(probs, wide), [sampling[i] for i in wide], probs.shape[1])
        drawn = ids.gather(1, _invert(kept, _select(u, wide)).unsqueeze(1)).squeeze(1)
        tokens = _replace(tokens, wide, drawn)
    return tokens


def _truncate(
    probs: torch.Tensor, sampling: Sequence[RowSampling], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` most probable tokens of each row, most probable first, with what top-k, top-p and min-p
    leave of their probabilities (not normalised; the first is always kept), and their ids."""
    vocabulary = probs.shape[1]
    ids = top_ids(probs, min(width, vocabulary))
    ordered = probs.gather(1, ids)
    through = ordered.cumsum(dim=-1, dtype=torch.float64)
    top_k = _index(probs, [min(each.top_k or vocabulary, vocabulary) for each in sampling])
    inside = top_k.clamp(max=ids.shape[1]).unsqueeze(1)
    mass = torch.where(top_k < vocabulary, through.gather(1, inside - 1).squeeze(1), 1.0).unsqueeze(1)
    top_p = on_device(torch.tensor([each.top_p for each in sampling], dtype=torch.float64), probs.device)
    before = through - ordered
    position = torch.arange(ids.shape[1], device=probs.device)
    keep = (position < inside) & ((before < top_p.unsqueeze(1) * mass) | top_p.eq(1).unsqueeze(1))
    keep &= ordered >= _column(probs, [each.min_p for each in sampling]) * ordered[:, :1]
    keep[:, 0] = True
    return torch.where(keep, ordered, 0), ids


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The position where each row's cumulative weight passes the share u [rows, 1] of its total."""
    blocks = _blocks(weights, 0.0)
    sums = blocks.sum(dim=-1)
    block, rest = _pass(sums, u * sums.sum(dim=-1, keepdim=True, dtype=torch.float64))
    inside, _ = _pass(blocks[torch.arange(len(block), device=block.device), block], rest)
    return block * _BLOCK + inside


def _pass(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative weight first exceeds the target, never at a weight of zero; and what of the
    target [rows, 1] is left there."""
    through = weights.cumsum(dim=-1, dtype=torch.float64)
    total = through[:, -1:]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # Only a row of NaN, whose token nobody sees, is not passed anywhere.
    found = torch.searchsorted(through, target, right=True).clamp_(max=weights.shape[1] - 1)
    rest = target - (through - weights).gather(1, found)
    return found.squeeze(1), rest


def _chosen_logprobs(
    logits: torch.Tensor, rows: Sequence[SampleRow], ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """TokenLogprobs of the drawn tokens, by row, for the rows that asked and drew one."""
    counts = {
        i: row.sampling.logprobs
        for i, row in enumerate(rows)
        if row.sampling.logprobs is not None and ids[i] >= 0
    }
    if not counts:
        return {}
    results = score(_select(logits, list(counts)), [ids[i] for i in counts], list(counts.values()))
    return dict(zip(counts, results, strict=True))


def _select(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """These rows: a copy, or `values` itself where they are all of them."""
    return values if len(rows) == len(values) else values[_index(values, rows)]


def _replace(values: torch.Tensor, rows: Sequence[int], new: torch.Tensor) -> torch.Tensor:
    """`values` with these rows replaced: in place, or by `new` itself where they are all of them."""
    if len(rows) == len(values):
        return new
    values[_index(values, rows)] = new
    return values


def _index(like: torch.Tensor, numbers: Sequence[int] | _Ids) -> torch.Tensor:
    """[n] int64 on the device of `like`."""
    return on_device(torch.from_numpy(np.asarray(numbers, dtype=np.int64)), like.device)


def _column(like: torch.Tensor, values: Iterable[float]) -> torch.Tensor:
    """[rows, 1] in the dtype and on the device of `like`."""
    return on_device(torch.tensor(list(values), dtype=like.dtype), like.device).unsqueeze(1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BadPlan(message)
