"""A generation call as every dialect states it, and its validation."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .auth import Caller
from .errors import InvalidRequest
from .merges import MergeRecipe
from .request import AdapterChoice, SamplingParams
from .tokenizer import GenerationDefaults

MAX_SEQUENCES: Final = 1024
"""Sequences one call may ask for: prompts times n."""
_MAX_STOPS: Final = 16
_MAX_STOP_CHARACTERS: Final = 256
_MAX_STOP_IDS: Final = 256
_MAX_LOGIT_BIAS: Final = 1024
MAX_ADAPTERS: Final = 8
_MAX_WEIGHT: Final = 100.0
_GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are taken as 0: logits divided by them would overflow."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with a role and a content, for the model's chat template."""

    messages: tuple[Mapping[str, Any], ...]


Prompt = str | Sequence[int] | Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a caller says of sampling; None: as the model's generation defaults say, else as OpenAI's do."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a caller wants generation to end."""

    max_tokens: int | None = None
    """None: the rest of the context, or `default_max_tokens` of the call."""
    min_tokens: int | None = None
    ignore_eos: bool = False
    strings: Sequence[str] = ()
    token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One call: some prompts, `n` sequences for each, one model and its adapters."""

    id: str
    caller: Caller
    prompts: Sequence[Prompt]
    model: str = ""
    """The base, an adapter, or empty for the base."""
    adapters: Sequence[AdapterChoice] = ()
    merge: MergeRecipe | None = None
    """The adapters are merged into one by this recipe, instead of being summed."""
    adapter_source: str = ""
    hub_token: str = field(default="", repr=False)
    n: int = 1
    echo: bool = False
    """The caller shows the prompt too: so max_tokens may be 0, to have the prompt scored."""
    truncate: int | None = None
    """Keep only this many of the prompt's last tokens."""
    sampling: Sampling = Sampling()
    stopping: Stopping = Stopping()
    default_max_tokens: int | None = None
    field_names: Mapping[str, str] = field(default_factory=dict)
    """The dialect's own names of fields, where they differ from ours: errors speak of those."""

    def name_of(self, ours: str) -> str:
        return self.field_names.get(ours, ours)


@dataclass(frozen=True, slots=True)
class _Range:
    """Bounds of a number; `above` excludes the lower one."""

    low: float
    high: float
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'above' if self.above else 'at least'} {self.low} and at most {self.high}"


_SAMPLING_RANGES: Final = {
    "temperature": _Range(0, 2),
    "top_k": _Range(-1, 2**31 - 1),
    "top_p": _Range(0, 1, above=True),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(0, 100, above=True),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "logprobs": _Range(0, 20),
    "prompt_logprobs": _Range(0, 20),
}
_SEEDS: Final = range(-(2**63), 2**64)


def check_call(call: GenerateCall) -> None:
    """Raise InvalidRequest, naming the field, for anything wrong that neither the adapters nor the prompts'
    lengths decide."""
    check_number(call.name_of("n"), call.n, _Range(1, 128))
    if not call.prompts:
        raise _invalid(call, "prompt", "must not be empty")
    if len(call.prompts) * call.n > MAX_SEQUENCES:
        raise _invalid(call, "n", f"times the number of prompts must be at most {MAX_SEQUENCES}")
    if call.truncate is not None:
        check_number(call.name_of("truncate"), call.truncate, _Range(1, 2**31 - 1))
    for prompt in call.prompts:
        if not (prompt.messages if isinstance(prompt, Chat) else prompt):
            raise _invalid(call, "prompt", "must not be empty")
    check_choices(call.adapters, call.name_of("adapters"))
    _check_sampling(call)
    _check_stopping(call)


def check_token_ids(call: GenerateCall, vocab_size: int) -> None:
    """Raise InvalidRequest, naming the field, for a token id that the model and its adapters do not know."""
    ids: list[tuple[str, Collection[int]]] = [
        ("prompt", prompt) for prompt in call.prompts if not isinstance(prompt, str | Chat)
    ]
    ids += [("logit_bias", call.sampling.logit_bias), ("stop_token_ids", call.stopping.token_ids)]
    for name, tokens in ids:
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise _invalid(call, name, f"holds a token id that is not between 0 and {vocab_size - 1}")


def check_number(name: str, value: float, bounds: _Range) -> None:
    """Raises InvalidRequest if the number is out of bounds, infinite or not a number."""
    if not bounds.holds(value):
        raise InvalidRequest(f"{name} must be {bounds}", param=name)


def check_choices(choices: Sequence[AdapterChoice], param: str) -> None:
    """Raise InvalidRequest for a list of adapters that cannot be one, whatever they are."""
    if len(choices) > MAX_ADAPTERS:
        raise InvalidRequest(f"{param} may name at most {MAX_ADAPTERS}", param=param)
    for choice in choices:
        if not choice.id:
            raise InvalidRequest(f"{param} holds an empty id", param=param)
        if not abs(choice.weight) <= _MAX_WEIGHT:
            raise InvalidRequest(
                f"{param} holds a weight that is not between -{_MAX_WEIGHT:g} and {_MAX_WEIGHT:g}",
                param=param,
            )
    if len({choice.id for choice in choices}) < len(choices):
        raise InvalidRequest(f"{param} names one adapter twice: add up its weights", param=param)


def _check_sampling(call: GenerateCall) -> None:
    for name, bounds in _SAMPLING_RANGES.items():
        value = getattr(call.sampling, name)
        if value is not None:
            check_number(call.name_of(name), value, bounds)
    if call.sampling.seed is not None and call.sampling.seed not in _SEEDS:
        raise _invalid(call, "seed", "must be a 64-bit integer")
    bias = call.sampling.logit_bias
    if len(bias) > _MAX_LOGIT_BIAS:
        raise _invalid(call, "logit_bias", f"may have at most {_MAX_LOGIT_BIAS} entries")
    if not all(-100 <= value <= 100 for value in bias.values()):
        raise _invalid(call, "logit_bias", "holds a value that is not between -100 and 100")


def _check_stopping(call: GenerateCall) -> None:
    stopping = call.stopping
    if stopping.max_tokens is not None:
        lowest = 0 if call.echo else 1
        check_number(call.name_of("max_tokens"), stopping.max_tokens, _Range(lowest, 2**31 - 1))
    if stopping.min_tokens is not None:
        most = 2**31 - 1 if stopping.max_tokens is None else stopping.max_tokens
        check_number(call.name_of("min_tokens"), stopping.min_tokens, _Range(0, most))
    if len(stopping.strings) > _MAX_STOPS:
        raise _invalid(call, "stop", f"may hold at most {_MAX_STOPS} strings")
    if not all(0 < len(text) <= _MAX_STOP_CHARACTERS for text in stopping.strings):
        raise _invalid(call, "stop", f"must hold strings of 1 to {_MAX_STOP_CHARACTERS} characters")
    if len(stopping.token_ids) > _MAX_STOP_IDS:
        raise _invalid(call, "stop_token_ids", f"may hold at most {_MAX_STOP_IDS} ids")


def resolve_max_tokens(call: GenerateCall, prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens may follow a prompt of this length. Raises InvalidRequest if there is less room."""
    room = max_model_len - prompt_tokens
    if room < 1:
        raise prompt_too_long(call, f"{prompt_tokens}", max_model_len)
    wanted = call.stopping.max_tokens
    if wanted is None:
        wanted = room if call.default_max_tokens is None else min(room, call.default_max_tokens)
    if wanted > room:
        name = call.name_of("max_tokens")
        raise InvalidRequest(
            f"{name} ({wanted}) and the prompt ({prompt_tokens} tokens) together must be at most "
            f"{max_model_len}, the model's context length: lower {name} to {room} or shorten the prompt",
            param=name,
        )
    if (call.stopping.min_tokens or 0) > wanted:
        raise _invalid(
            call, "min_tokens", f"must be at most {wanted}, the tokens that may follow this prompt"
        )
    return wanted


def prompt_too_long(call: GenerateCall, tokens: str, max_model_len: int) -> InvalidRequest:
    """`tokens`: how many the prompt has, in words."""
    name = call.name_of("prompt")
    return InvalidRequest(
        f"{name} has {tokens} tokens, and the model's context holds {max_model_len}: shorten it", param=name
    )


def sampling_params(
    call: GenerateCall,
    defaults: GenerationDefaults,
    *,
    max_tokens: int,
    eos_ids: frozenset[int],
    vocab_size: int,
) -> SamplingParams:
    """What the engine runs for the call's first sequence; `reseed` makes the others' of it."""
    asked = call.sampling

    def first(given: float | None, default: float | None, otherwise: float) -> float:
        return given if given is not None else default if default is not None else otherwise

    temperature = first(asked.temperature, defaults.temperature, 1.0)
    top_k = int(first(asked.top_k, defaults.top_k, 0))
    stop_ids = set(call.stopping.token_ids) | (set() if call.stopping.ignore_eos else eos_ids)
    return SamplingParams(
        max_tokens=max(1, max_tokens),
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_k=top_k if 0 < top_k < vocab_size else 0,
        top_p=first(asked.top_p, defaults.top_p, 1.0),
        min_p=first(asked.min_p, defaults.min_p, 0.0),
        repetition_penalty=first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=asked.logit_bias,
        stop_ids=tuple(sorted(stop_ids)),
        min_tokens=call.stopping.min_tokens or 0,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
    )


def seed_of(call: GenerateCall, index: int) -> int:
    """The seed of a prompt's sequence `index`, an unsigned 64-bit integer; random if the caller gave none."""
    if call.sampling.seed is None:
        return random.getrandbits(64)
    return (call.sampling.seed + index) % 2**64


def _invalid(call: GenerateCall, ours: str, problem: str) -> InvalidRequest:
    name = call.name_of(ours)
    return InvalidRequest(f"{name} {problem}", param=name)
