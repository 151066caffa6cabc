"""The command `loraplex bench`. Heavy imports happen when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapter_tools.errors import UNUSABLE, ToolFailed
from .specs import Closed, Punica, SLora, Timeouts


def _option(metavar: str, help: str, default: object = None, **more: Any) -> Any:
    usual = f"{default:g}" if isinstance(default, float) else default
    shown = help if default is None else f"{help} [default: {usual}]"
    return typer.Option(metavar=metavar, help=shown, show_default=False, **more)


_Servers = Annotated[
    list[str],
    typer.Argument(metavar="[NAME=]URL", help="Servers; without a name, called by host and port."),
]
_Adapters = Annotated[
    list[str],
    _option("[SERVER=]LIST", "Names of adapters, such as sql,style or a{0..15}; none: the base alone."),
]
_Model = Annotated[
    list[str], _option("[SERVER=]NAME", "The base's name. [default: the first base that the server lists]")
]
_Style = Annotated[
    list[str],
    _option("[SERVER=]STYLE", "How adapters are named: openai, by model; llama.cpp, by index.", "openai"),
]
_ApiKey = Annotated[
    list[str],
    _option("[SERVER=]KEY", "The key that the servers want.", envvar="LORAPLEX_API_KEY", show_envvar=True),
]
_Workload = Annotated[
    str,
    _option(
        "KIND",
        "closed: so many at a time; s-lora: arrivals by themselves; punica: its lengths and mixes.",
        "closed",
    ),
]
_Requests = Annotated[int | None, _option("N", "closed, punica: requests.", Closed.requests)]
_Concurrency = Annotated[int | None, _option("N", "closed, punica: how many at a time.", Closed.concurrency)]
_PromptTokens = Annotated[int | None, _option("N", "closed: tokens in.", Closed.prompt_tokens)]
_OutputTokens = Annotated[int | None, _option("N", "closed: tokens out.", Closed.output_tokens)]
_Spread = Annotated[
    str | None,
    _option("KIND", "closed: adapters by uniform, round-robin, zipf:S or power:ALPHA.", Closed.spread.kind),
]
_Rate = Annotated[float | None, _option("R", "s-lora: requests a second.", SLora.rate)]
_Duration = Annotated[float | None, _option("S", "s-lora: seconds of arrivals.", SLora.duration)]
_Alpha = Annotated[
    float | None, _option("A", "s-lora: 1 is uniform over adapters, small is skewed.", SLora.alpha)
]
_Cv = Annotated[float | None, _option("CV", "s-lora: burstiness; 1 is Poisson.", SLora.cv)]
_InputRange = Annotated[str | None, _option("LOW:HIGH", "s-lora: tokens in.", SLora.input_range)]
_OutputRange = Annotated[str | None, _option("LOW:HIGH", "s-lora: tokens out.", SLora.output_range)]
_Mix = Annotated[
    str | None,
    _option("KIND", "punica: identical, distinct, uniform or zipf:1.5 (growing groups).", Punica.mix.kind),
]
_MaxLength = Annotated[
    int | None, _option("N", "punica: most tokens in and out together.", Punica.max_length)
]
_Seed = Annotated[int | None, _option("N", "Of all that is drawn. [default: 42; punica: its own]")]
_BaseShare = Annotated[float, _option("SHARE", "Share of requests to the base itself.", 0)]
_Vocabulary = Annotated[int, _option("N", "Prompts are random token ids from 10 to N - 1.", 1000)]
_Counts = Annotated[str | None, _option("N,N,...", "Sweep: measure with the first N adapters, for each N.")]
_Rates = Annotated[str | None, _option("R,R,...", "Sweep: s-lora at each of these rates.")]
_Rounds = Annotated[int, _option("N", "Turns of each server; their order alternates.", 1)]
_WarmUp = Annotated[
    bool,
    typer.Option(
        "--warm-up/--no-warm-up", help="First a short request to the base and to each adapter in use."
    ),
]
_Timeout = Annotated[float, _option("S", "Most seconds of one request.", Timeouts.total)]
_Silence = Annotated[float, _option("S", "Most seconds without a byte of the answer.", Timeouts.silence)]
_Slo = Annotated[float, _option("S", "The first token should come within this.", 6)]
_Json = Annotated[Path | None, _option("FILE", "Write figures and every request as JSON.")]
_Plots = Annotated[Path | None, _option("DIR", "Draw a sweep as PNG files (needs the extra `bench`).")]


def bench(  # noqa: PLR0913 - one parameter for each option
    servers: _Servers,
    *,
    workload: _Workload = "closed",
    adapters: _Adapters = [],  # noqa: B006 - typer makes a list of its own
    requests: _Requests = None,
    concurrency: _Concurrency = None,
    prompt_tokens: _PromptTokens = None,
    output_tokens: _OutputTokens = None,
    spread: _Spread = None,
    rate: _Rate = None,
    duration: _Duration = None,
    alpha: _Alpha = None,
    cv: _Cv = None,
    input_range: _InputRange = None,
    output_range: _OutputRange = None,
    mix: _Mix = None,
    max_length: _MaxLength = None,
    base_share: _BaseShare = 0.0,
    adapter_counts: _Counts = None,
    rates: _Rates = None,
    rounds: _Rounds = 1,
    seed: _Seed = None,
    vocabulary: _Vocabulary = 1000,
    model: _Model = [],  # noqa: B006
    style: _Style = [],  # noqa: B006
    api_key: _ApiKey = [],  # noqa: B006
    warm_up: _WarmUp = True,
    timeout: _Timeout = Timeouts.total,
    silence_timeout: _Silence = Timeouts.silence,
    slo: _Slo = 6.0,
    json: _Json = None,
    plots: _Plots = None,
) -> int:
    """Measure servers that speak OpenAI's completions: ours, vLLM, SGLang, llama.cpp's.

    Every answer is streamed, timed, and counted only if it is complete. With several servers the same
    requests go to each in turn, and a table of ratios follows. docs/bench.md has the workloads and how to
    read the tables.
    """
    from .main import run
    from .plan import Plan, check_outputs, spec, sweep, targets

    options = {
        "requests": requests,
        "concurrency": concurrency,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "spread": spread,
        "rate": rate,
        "duration": duration,
        "alpha": alpha,
        "cv": cv,
        "input_range": input_range,
        "output_range": output_range,
        "mix": mix,
        "max_length": max_length,
        "seed": seed,
    }
    try:
        found = targets(servers, styles=style, models=model, adapters=adapters, api_keys=api_key)
        plan = Plan(
            targets=found,
            sweep=sweep(spec(workload, options), len(found[0].adapters), adapter_counts, rates),
            base_share=base_share,
            rounds=rounds,
            vocabulary=vocabulary,
            warm_up=warm_up,
            timeouts=Timeouts(silence=silence_timeout, total=timeout),
            first_token_limit=slo,
        )
        check_outputs(plan.sweep, json, plots)
    except ValueError as error:
        raise ToolFailed(UNUSABLE, str(error)) from None
    return run(plan, json=json, plots=plots)
