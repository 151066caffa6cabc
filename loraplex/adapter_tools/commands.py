"""The commands of `loraplex adapters`. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

adapters = typer.Typer(add_completion=False, rich_markup_mode=None)

_SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A directory, a hub id such as org/name@revision, or s3://bucket/prefix."
    ),
]
_Parts = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER[=WEIGHT]…", help="What goes into it; a weight is any number, 1 unless said."
    ),
]


_Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name on the server.")]
_Url = Annotated[str, typer.Option(metavar="URL", envvar="LORAPLEX_URL", help="Where the server answers.")]
_ApiKey = Annotated[
    str, typer.Option(metavar="KEY", envvar="LORAPLEX_API_KEY", help="The key it wants, if it wants one.")
]
_URL = "http://127.0.0.1:8080"


@adapters.callback(invoke_without_command=True)
def _group(ctx: typer.Context) -> None:
    """Look at adapters, try them on a base, convert and merge them; manage a running server's."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@adapters.command("inspect")
def _inspect(source: _SourceArgument) -> int:
    """Show an adapter's type, ranks, scales and bytes, and what is unusual about it. Needs no base."""
    from .inspect import inspect

    inspect(source)
    return 0


@adapters.command("check")
def _check(
    source: _SourceArgument,
    base: Annotated[str, typer.Option(metavar="MODEL", help="The base: a directory or a hub repository.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16", help="As the server's; the checkpoint's unless set."
        ),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(metavar="N", help="As the server's.")] = None,
) -> int:
    """Say whether an adapter would be served on a base.

    Exit code 0: it would; 1: it is refused; 2: that cannot be found out.
    """
    from .check import check

    check(source, base, dtype=dtype, max_rank=max_rank)
    return 0


@adapters.command("convert")
def _convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory with adapter_model.bin and its config.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new directory.")],
) -> int:
    """Turn pickled weights into safetensors, in a process without rights. Code in the pickle is never run."""
    from .convert import convert

    convert(source, target)
    return 0


@adapters.command("merge")
def _merge(  # noqa: PLR0913 - one parameter for each option
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new directory.")],
    parts: _Parts,
    *,
    into: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Write this base with the adapters in its weights instead."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="linear, cat, svd, ties, dare_ties and so on. [default: linear]"),
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the values that pruning methods keep.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what the dare methods drop.")] = 0,
    rank: Annotated[
        int, typer.Option(metavar="N", help="Of what the svd methods write; 0: the largest of the parts.")
    ] = 0,
    majority_sign: Annotated[
        str, typer.Option(metavar="total|frequency", help="How the ties methods elect signs.")
    ] = "",
) -> int:
    """Make one adapter of several, or with --into a whole model of a base and its adapters."""
    if into is not None:
        if method or density is not None or seed or rank or majority_sign:
            raise typer.BadParameter("--into adds the adapters to the base; it takes no method")
        from .merge_into import merge_into

        merge_into(into, target, parts)
        return 0
    from ..shard.adapters.merging.recipe import merge_recipe
    from ..shard.errors import AdapterRejected
    from .merge import merge

    try:
        recipe = merge_recipe(
            method or "linear",
            density=density,
            majority_sign_method=majority_sign,
            seed=seed,
            rank=rank,
        )
    except AdapterRejected as error:
        raise typer.BadParameter(str(error)) from None
    merge(target, parts, recipe)
    return 0


@adapters.command("ls")
def _ls(url: _Url = _URL, api_key: _ApiKey = "") -> int:
    """List a server's adapters: state, version, bytes, requests that run and wait."""
    from .remote import Server, list_adapters

    list_adapters(Server(url, api_key))
    return 0


@adapters.command("load")
def _load(
    name: _Name,
    source: _SourceArgument,
    scaling: Annotated[
        float | None, typer.Option(metavar="FACTOR", help="Multiplies every use of this name; 1 unless set.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it resident.")] = False,
    hub_token: Annotated[
        str,
        typer.Option(
            metavar="TOKEN", envvar="LORAPLEX_HUB_TOKEN", help="Opens a private repository on the hub."
        ),
    ] = "",
    url: _Url = _URL,
    api_key: _ApiKey = "",
) -> int:
    """Have a server load an adapter, or a new version of it, and wait until it is resident."""
    from .remote import Load, Server, load

    load(Server(url, api_key), Load(name=name, source=source, scaling=scaling, pin=pin, hub_token=hub_token))
    return 0


@adapters.command("unload")
def _unload(name: _Name, url: _Url = _URL, api_key: _ApiKey = "") -> int:
    """Have a server let an adapter go: it finishes what runs and frees its memory."""
    from .remote import Server, unload

    unload(Server(url, api_key), name)
    return 0


@adapters.command("pin")
def _pin(
    name: _Name,
    off: Annotated[bool, typer.Option("--off", help="Let it make room for others again.")] = False,
    url: _Url = _URL,
    api_key: _ApiKey = "",
) -> int:
    """Keep a server's adapter resident."""
    from .remote import Server, pin

    pin(Server(url, api_key), name, pinned=not off)
    return 0
