"""The commands. Heavy imports happen inside the command that needs them, so `--help` is instant."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from . import __version__, lifeline, torchrun
from .adapter_tools.commands import adapters
from .adapter_tools.errors import ToolFailed
from .keeper import LaunchFailed
from .launch import serve
from .loadtest.command import bench
from .router.config import RouterConfig
from .settings import REQUIRED, ROUTER, SERVE, SHARD, Setting, SettingError, build, read_file, split_serve
from .shard.config import ShardConfig

CONFIGURATION_ERROR = 2
"""Exit code when the command line, the environment, the file or the model is refused."""

_ELSEWHERE = (
    "Every setting may also come from the environment (--kv-memory from LORAPLEX_KV_MEMORY) "
    "or from the file that --config names (kv-memory)."
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(adapters, name="adapters")
app.command("bench")(bench)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and answer its exit code. Errors are one line on stderr."""
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="loraplex", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(CONFIGURATION_ERROR, error.format_message())
    except SettingError as error:
        return _fail(CONFIGURATION_ERROR, str(error))
    except (LaunchFailed, ToolFailed) as error:
        return _fail(error.code, str(error))
    return int(code or 0)


def _fail(code: int, message: str) -> int:
    print(f"loraplex: {' '.join(message.split())}", file=sys.stderr)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loraplex {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One base model, thousands of LoRA adapters, one batch."""


def _configured(
    name: str, settings: tuple[Setting, ...]
) -> Callable[[Callable[[dict[str, Any]], int]], Callable[[dict[str, Any]], int]]:
    """Register a command whose options are `settings`; it is called with their values by field."""

    def register(command: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], int]:
        def invoke(**values: Any) -> int:
            return command({setting.field: values[setting.key] for setting in settings})

        invoke.__doc__ = f"{command.__doc__}\n\n{_ELSEWHERE}"
        parameters = [_parameter(setting) for setting in settings]
        signature = inspect.Signature([*parameters, _config_parameter(settings)])
        invoke.__signature__ = signature  # type: ignore[attr-defined]
        app.command(name)(invoke)
        return command

    return register


def _parameter(setting: Setting) -> inspect.Parameter:
    """One setting in the form that typer reads: name, annotation and default."""
    shown = setting.shown_default
    common: dict[str, Any] = {
        "help": f"{setting.help} [default: {shown}]" if shown else setting.help,
        "metavar": setting.metavar,
        "envvar": setting.variable,
        "parser": _reported(setting),
        "show_default": False,
        "show_envvar": False,
    }
    kind = typer.Argument(**common) if setting.positional else typer.Option(setting.flag, **common)
    value: Any = list[Any] if setting.many else str if setting.positional else Any
    return inspect.Parameter(
        setting.key,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[value, kind],
        default=inspect.Parameter.empty if setting.default is REQUIRED else setting.default,
    )


def _reported(setting: Setting) -> Callable[[object], object]:
    def parse(value: object) -> object:
        try:
            return setting.parse(value)
        except SettingError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def _config_parameter(settings: tuple[Setting, ...]) -> inspect.Parameter:
    """`--config`, read before the others so that its values become their defaults."""

    def load(ctx: typer.Context, path: str | None) -> str | None:
        if path is not None:
            ctx.default_map = read_file(path, settings)
        return path

    option = typer.Option(
        "--config",
        help="A TOML file with any of these settings.",
        metavar="FILE",
        envvar="LORAPLEX_CONFIG",
        callback=load,
        is_eager=True,
        expose_value=False,
    )
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str | None, option], default=None
    )


def _prepare_part() -> None:
    """Tie this process to its launcher, if it has one, and send our own log lines to stderr."""
    lifeline.watch()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("loraplex").setLevel(logging.INFO)


@_configured("serve", SERVE)
def _serve(values: dict[str, Any]) -> int:
    """Serve MODEL and its adapters: starts shards and a router and keeps them running."""
    shard, router = split_serve(values)
    lifeline.watch()
    return serve(shard, router, tp=values["tp"], replicas=values["replicas"])


@_configured("router", ROUTER)
def _router(values: dict[str, Any]) -> int:
    """Run one router process in front of shards that run elsewhere."""
    config = build(RouterConfig, values)
    _prepare_part()
    from .router.main import run as run_router

    return run_router(config)


@_configured("shard", SHARD)
def _shard(values: dict[str, Any]) -> int:
    """Run one shard process: it holds MODEL on a device and obeys a router."""
    placed = torchrun.place(values, os.environ)
    config = build(ShardConfig, placed.values)
    os.environ.update(placed.environment)
    _prepare_part()
    from .shard.main import run as run_shard

    return run_shard(config)


@app.command("demo")
def _demo(
    prompt: Annotated[
        str | None, typer.Option(help="Your own prompt, sent to the base and to every adapter.")
    ] = None,
) -> int:
    """Serve the bundled model with its adapters, send one mixed batch and show the outputs."""
    from .demo.run import run as run_demo

    return run_demo(prompt)


@app.command("doctor")
def _doctor() -> int:
    """Say what this machine can serve on, and what would be slow."""
    from .doctor import run as run_doctor

    return run_doctor()
