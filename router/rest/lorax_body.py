"""The body of LoRAX's generating routes, and what it means."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ..auth import Caller
from ..call import GenerateCall, Sampling, Stopping
from ..errors import InvalidRequest
from ..merges import MergeRecipe
from ..request import AdapterChoice
from .openai import AdapterBody, new_id

_SOURCES: Final = ("hub", "local", "s3")
_STRATEGIES: Final = ("linear", "ties", "dare_linear", "dare_ties")


class MergedAdapters(msgspec.Struct, kw_only=True):
    """Adapters that are merged into one for this request."""

    ids: list[str]
    weights: list[float]
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None


class Parameters(msgspec.Struct, kw_only=True):
    """As lorax-client 0.6 sends them. Each may be null, which is as good as absent."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    adapters: list[AdapterBody] | None = None
    api_token: str | None = None
    best_of: int | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    ignore_eos_token: bool | None = None
    max_new_tokens: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    response_format: Any = None
    return_full_text: bool | None = None
    return_k_alternatives: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None


class LoraxBody(msgspec.Struct, kw_only=True):
    inputs: str | None = None
    parameters: Parameters | None = None
    stream: bool | None = None
    adapters: list[AdapterBody] | None = None


_NOT_SERVED: Final[dict[str, tuple[Any, ...]]] = {
    "response_format": (None,),
    "typical_p": (None, 1.0),
    "watermark": (None, False),
}
"""Parameters that are refused, with the values that ask for nothing."""

_FIELD_NAMES: Final = {
    "prompt": "inputs",
    "model": "adapter_id",
    "max_tokens": "max_new_tokens",
    "n": "best_of",
    "logprobs": "return_k_alternatives",
}


def lorax_call(body: LoraxBody, caller: Caller, *, stream: bool) -> GenerateCall:
    """Raises InvalidRequest for what is not served or does not fit together."""
    parameters = body.parameters or Parameters()
    _check(body, parameters, stream=stream)
    adapters = [adapter.choice for adapter in body.adapters or parameters.adapters or ()]
    merge, names = None, _FIELD_NAMES
    if parameters.merged_adapters is not None:
        merge, adapters = _merge(parameters.merged_adapters)
        names = {**_FIELD_NAMES, "adapters": "merged_adapters"}
    details = stream or parameters.details or (parameters.best_of or 1) > 1
    return GenerateCall(
        id=new_id(),
        caller=caller,
        prompts=[body.inputs or ""],
        model=parameters.adapter_id or "",
        adapters=adapters,
        merge=merge,
        adapter_source=parameters.adapter_source or "",
        hub_token=parameters.api_token or "",
        n=1 if parameters.best_of is None else parameters.best_of,
        truncate=parameters.truncate,
        sampling=_sampling(parameters, wants_logprobs=bool(details)),
        stopping=Stopping(
            max_tokens=parameters.max_new_tokens,
            ignore_eos=bool(parameters.ignore_eos_token),
            strings=parameters.stop or (),
        ),
        field_names=names,
    )


def _merge(merged: MergedAdapters) -> tuple[MergeRecipe, list[AdapterChoice]]:
    strategy = merged.merge_strategy or "linear"
    if strategy not in _STRATEGIES:
        raise InvalidRequest(
            f"merged_adapters.merge_strategy must be one of {', '.join(_STRATEGIES)}", param="merged_adapters"
        )
    if not merged.ids or len(merged.ids) != len(merged.weights):
        raise InvalidRequest("merged_adapters needs ids, and as many weights as ids", param="merged_adapters")
    recipe = MergeRecipe.checked(
        strategy, density=merged.density, majority_sign_method=merged.majority_sign_method or ""
    )
    choices = [AdapterChoice(*pair) for pair in zip(merged.ids, merged.weights, strict=True)]
    return recipe, choices


def _sampling(parameters: Parameters, *, wants_logprobs: bool) -> Sampling:
    """LoRAX is greedy unless something asks for sampling, and knows no generation defaults of the model."""
    hints = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.min_p)
    samples = parameters.do_sample or any(hint is not None for hint in hints)
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    return Sampling(
        temperature=temperature if samples else 0.0,
        top_k=0 if parameters.top_k is None else parameters.top_k,
        top_p=1.0 if parameters.top_p is None else parameters.top_p,
        min_p=0.0 if parameters.min_p is None else parameters.min_p,
        repetition_penalty=1.0 if parameters.repetition_penalty is None else parameters.repetition_penalty,
        presence_penalty=parameters.presence_penalty,
        frequency_penalty=parameters.frequency_penalty,
        seed=parameters.seed,
        logprobs=(parameters.return_k_alternatives or 0) if wants_logprobs else None,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
    )


def _check(body: LoraxBody, parameters: Parameters, *, stream: bool) -> None:
    if body.inputs is None:
        raise InvalidRequest("inputs is needed: the prompt", param="inputs")
    for name, harmless in _NOT_SERVED.items():
        if getattr(parameters, name) not in harmless:
            raise InvalidRequest(f"{name} is not served: leave it out", param=name)
    if parameters.adapter_source not in (None, "", *_SOURCES):
        raise InvalidRequest(f"adapter_source must be one of {', '.join(_SOURCES)}", param="adapter_source")
    if parameters.merged_adapters is not None and (
        parameters.adapter_id or parameters.adapters or body.adapters
    ):
        raise InvalidRequest(
            "give at most one of adapter_id, adapters and merged_adapters", param="merged_adapters"
        )
    best_of = parameters.best_of or 1
    if best_of > 1 and stream:
        raise InvalidRequest("best_of above 1 cannot be streamed", param="best_of")
    if best_of > 1 and parameters.seed is not None:
        raise InvalidRequest("seed must not be set when best_of is above 1", param="seed")
    if parameters.decoder_input_details and stream:
        raise InvalidRequest("decoder_input_details cannot be streamed", param="decoder_input_details")
