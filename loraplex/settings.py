"""What users can set: one table drives the flags, the environment variables and the configuration file.

Precedence: flag, then `LORAPLEX_…` in the environment, then the file, then the default. The defaults
are those of `RouterConfig` and `ShardConfig`; this table adds what a person needs to type them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .router.config import MAX_SCALING, AdapterSpec, RouterConfig
from .shard.config import ShardConfig

REQUIRED = object()
"""The default of a setting that has none."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SWITCH = {"on": True, "true": True, "off": False, "false": False}
_SCALING = ",scaling="
"""Between an adapter's source and its scaling. What comes after the last one is the number."""

Config = TypeVar("Config", RouterConfig, ShardConfig)


class SettingError(ValueError):
    """A setting is missing, unknown or wrong. The message is one line for the user."""


def parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{value!r} is not a text")
    return value


def parse_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SettingError(f"{value!r} is not a whole number")
    try:
        return int(value)
    except ValueError:
        raise SettingError(f"{value!r} is not a whole number") from None


def parse_seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SettingError(f"{value!r} is not a number of seconds")
    try:
        seconds = float(value)
    except ValueError:
        raise SettingError(f"{value!r} is not a number of seconds") from None
    if not math.isfinite(seconds):
        raise SettingError(f"{value!r} is not a number of seconds")
    return seconds


def parse_size(value: object) -> int:
    """Bytes from a whole number, or from a text such as `512MiB` (powers of 1024) or `2GB` (of 1000)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or (match[3] and not match[2]):
        raise SettingError(f"{value!r} is not a size; write bytes or a suffix, such as 512MiB or 2GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWER[match[2].lower()])


def parse_adapter(value: object) -> AdapterSpec:
    if isinstance(value, AdapterSpec):
        return value
    name, equals, rest = value.partition("=") if isinstance(value, str) else ("", "", "")
    source, given, scaling = rest.rpartition(_SCALING)
    if not given:
        source, scaling = rest, "1"
    if not (equals and name and source):
        raise SettingError(f"{value!r} is not an adapter; write NAME=SOURCE or NAME=SOURCE,scaling=NUMBER")
    try:
        return AdapterSpec(name, source, float(scaling))
    except ValueError:
        raise SettingError(
            f"{value!r}: scaling must be a number between -{MAX_SCALING:g} and {MAX_SCALING:g}"
        ) from None


def parse_group(value: object) -> tuple[str, ...]:
    """Addresses of one group's ranks."""
    addresses = value if isinstance(value, tuple) else tuple(parse_text(value).split(","))
    if not all(addresses):
        raise SettingError(
            f"{value!r} is not a shard group; write HOST:PORT, or one for each rank: HOST:PORT,HOST:PORT"
        )
    return addresses


def parse_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _SWITCH:
        return _SWITCH[value]
    raise SettingError(f"{value!r} is neither on nor off")


def parse_readable_file(value: object) -> str:
    """The path itself, after a look that it can be read."""
    path = parse_text(value)
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that a user can set."""

    field: str
    """The configuration's field that it fills."""
    help: str
    name: str = ""
    """How it is typed, with underscores; empty: like the field."""
    metavar: str = "TEXT"
    parse: Callable[[object], object] = parse_text
    many: bool = False
    positional: bool = False
    default: object = REQUIRED

    @property
    def key(self) -> str:
        return self.name or self.field

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return "LORAPLEX_" + self.key.upper()

    @property
    def shown_default(self) -> str | None:
        """The default as a user would type it; None where there is nothing to show."""
        if self.default is REQUIRED or self.default is None or self.default == ():
            return None
        if isinstance(self.default, bool):
            return _as_typed(self.default)
        if self.metavar == "BYTES" and isinstance(self.default, int) and self.default % 1024**2 == 0:
            return f"{self.default // 1024**2}MiB"
        return ", ".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)


def _count(field: str, help: str) -> Setting:
    return Setting(field=field, help=help, metavar="N", parse=parse_count)


def _size(field: str, help: str) -> Setting:
    return Setting(field=field, help=help, metavar="BYTES", parse=parse_size)


def _seconds(field: str, help: str) -> Setting:
    return Setting(field=field, help=help, metavar="SECONDS", parse=parse_seconds)


def _file(field: str, help: str) -> Setting:
    return Setting(field=field, help=help, metavar="FILE", parse=parse_readable_file)


_TABLE = (
    Setting(
        field="model",
        help="A directory with a transformers model, or a hub repository.",
        metavar="MODEL",
        positional=True,
    ),
    Setting(field="revision", help="Branch, tag or commit of a hub repository.", metavar="REVISION"),
    Setting(
        field="served_model_name", help="What clients type for the base; as MODEL unless set.", metavar="NAME"
    ),
    Setting(field="device", help="Where the model runs.", metavar="auto|cpu|cuda"),
    Setting(field="dtype", help="As the checkpoint says unless set.", metavar="float32|bfloat16|float16"),
    Setting(field="host", help="Address to listen on.", metavar="HOST"),
    _count("port", "Port to listen on; 0 takes a free one."),
    _count("grpc_port", "Port of the public gRPC interface; 0 takes a free one."),
    Setting(
        field="groups",
        name="group",
        help="Addresses of one shard group, rank 0 first; may be repeated, once for each copy of the model.",
        metavar="HOST:PORT,HOST:PORT",
        parse=parse_group,
        many=True,
    ),
    Setting(
        field="adapters",
        name="adapter",
        help="An adapter to register; its source may lie anywhere, and `,scaling=0.5` after it scales every "
        "use; may be repeated.",
        metavar="NAME=SOURCE",
        parse=parse_adapter,
        many=True,
    ),
    Setting(
        field="adapter_roots",
        name="adapter_root",
        help="A directory below which requests may name adapters; may be repeated.",
        metavar="DIR",
        many=True,
    ),
    Setting(
        field="allow_sources",
        name="allow_source",
        help="A pattern of sources that requests may name, such as hub:my-org/*; may be repeated.",
        metavar="PATTERN",
        many=True,
    ),
    Setting(
        field="adapter_tokenizers",
        help="Use an adapter's own tokenizer and chat template where it ships them.",
        metavar="on|off",
        parse=parse_switch,
    ),
    _size("adapter_memory", "For adapters resident on the device."),
    _size("host_adapter_memory", "For adapters kept parsed in host memory."),
    _count("max_adapters", "Adapters resident at once, whatever their size."),
    _count("max_rank", "Largest rank that is served."),
    _size("kv_memory", "For keys and values; 512MiB on a CPU, most of what is free on a GPU, unless set."),
    _count("block_size", "Tokens in one KV block."),
    _count("max_model_len", "Tokens of prompt and output together; as the model says unless set."),
    _count("max_num_seqs", "Sequences that run at once."),
    _count("max_step_tokens", "Tokens of one step: decode rows and prompt chunks together."),
    _count("max_queued_requests", "Requests that may wait; more are answered 503."),
    _count("max_queued_tokens", "Prompt tokens that may wait; more are answered 503."),
    _count("max_body_bytes", "Largest request body."),
    _seconds("adapter_patience", "Wait for room before an adapter in use is drained for another."),
    _seconds("drain_timeout", "What running requests get to finish after SIGTERM."),
    _seconds("connect_timeout", "What shards get to answer for the first time."),
    _file(
        "api_key_file",
        "File of lines `key tenant [adapter globs]`; with it every route but health needs a key.",
    ),
    _count("threads", "CPU threads of the operators; torch's own choice unless set."),
    Setting(
        field="cores",
        name="core",
        help="A processor core to stay on; may be repeated; all unless set.",
        metavar="N",
        parse=parse_count,
        many=True,
    ),
    _count("rank", "This process's number among those that hold one copy of the model."),
    _count("world_size", "How many processes hold one copy of the model."),
    Setting(field="master", help="Where rank 0 waits for the other ranks.", metavar="HOST:PORT"),
    _seconds("rank_patience", "What ranks get to meet, and what one may keep the others waiting."),
    Setting(
        field="store_prefix",
        help="Where a store runs at --master already, as torchrun's does: what our keys in it begin with.",
        metavar="TEXT",
    ),
    _file(
        "tls_cert", "Certificate for the connection between router and shard, in PEM; then it is encrypted."
    ),
    _file("tls_key", "Its key."),
    _file("tls_ca", "Certificate of the authority that must have signed the other side's."),
    Setting(
        field="tls_name",
        help="What a shard's certificate must be made out to; the host of its address unless set.",
        metavar="NAME",
    ),
    Setting(
        field="plaintext",
        help="Allow a connection between router and shard over a network without TLS.",
        metavar="on|off",
        parse=parse_switch,
    ),
)
_BY_FIELD = {setting.field: setting for setting in _TABLE}


def settings_of(config: type[RouterConfig] | type[ShardConfig]) -> tuple[Setting, ...]:
    """The settings of a configuration, one for each of its fields, with its defaults."""
    return tuple(
        dataclasses.replace(_BY_FIELD[field.name], default=_default_of(field))
        for field in dataclasses.fields(config)
    )


def _default_of(field: dataclasses.Field[Any]) -> object:
    return REQUIRED if field.default is dataclasses.MISSING else field.default


ROUTER = settings_of(RouterConfig)
SHARD = settings_of(ShardConfig)

_SERVED_FIELDS = (
    *("model", "revision", "served_model_name", "device", "dtype", "host", "port", "grpc_port"),
    *("adapters", "adapter_roots", "allow_sources", "adapter_tokenizers"),
    *("adapter_memory", "host_adapter_memory"),
    *("max_adapters", "max_rank", "kv_memory", "max_model_len", "max_num_seqs"),
    *("max_step_tokens", "max_queued_requests", "max_queued_tokens", "adapter_patience"),
    *("api_key_file", "drain_timeout", "threads"),
    *("tls_cert", "tls_key", "tls_ca", "tls_name"),
)


def _settings_of_serve() -> tuple[Setting, ...]:
    # Where both have a field (host, port), a user of `serve` means the router's.
    known = {setting.field: setting for setting in SHARD + ROUTER}
    known["served_model_name"] = dataclasses.replace(known["served_model_name"], default=None)
    degrees = (
        dataclasses.replace(
            _count("tp", "Processes, each with its own device, that hold the model between them."),
            default=1,
        ),
        dataclasses.replace(
            _count("replicas", "Copies of the model, each with processes and devices of its own."), default=1
        ),
    )
    return (*(known[field] for field in _SERVED_FIELDS), *degrees)


SERVE = _settings_of_serve()


def read_file(path: str, settings: tuple[Setting, ...]) -> dict[str, object]:
    """Values by key from a TOML file.

    Raises:
        SettingError: the file cannot be read, a key is unknown or given twice, or a value is wrong.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not TOML: {error}") from None
    known = {setting.key: setting for setting in settings}
    values: dict[str, object] = {}
    for written, value in raw.items():
        key = written.replace("-", "_")
        if key not in known:
            raise SettingError(f"{path}: unknown key {written!r}")
        if key in values:
            raise SettingError(f"{path}: key {written!r} is given twice")
        _check(path, written, value, known[key])
        values[key] = value
    return values


def _check(path: str, written: str, value: object, setting: Setting) -> None:
    if setting.many and not isinstance(value, list):
        raise SettingError(f"{path}: {written}: a list is needed, such as [{setting.metavar!r}]")
    items = value if isinstance(value, list) and setting.many else [value]
    for item in items:
        try:
            setting.parse(item)
        except SettingError as error:
            raise SettingError(f"{path}: {written}: {error}") from None


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from values by field; fields without a value keep their default, empty items of a
    list are dropped.

    Raises:
        SettingError: the configuration refuses a value.
    """
    names = {field.name for field in dataclasses.fields(config)}
    given: dict[str, Any] = {
        name: tuple(item for item in value if item != "") if isinstance(value, list) else value
        for name, value in values.items()
        if name in names
    }
    make: Callable[..., Config] = config
    try:
        return make(**given)
    except ValueError as error:
        raise SettingError(str(error)) from None


def split_serve(values: Mapping[str, Any]) -> tuple[ShardConfig, RouterConfig]:
    """The two configurations behind `loraplex serve`; the shards' addresses are still open.

    Raises:
        SettingError: a value is refused, or asks for what is not served.
    """
    if values["tp"] < 1:
        raise SettingError(f"--tp {values['tp']}: at least one process must hold the model")
    if values["replicas"] < 1:
        raise SettingError(f"--replicas {values['replicas']}: at least one copy of the model is needed")
    for root in values["adapter_roots"]:
        if not Path(root).is_dir():
            raise SettingError(f"--adapter-root {root}: no such directory")
    ours = {name: value for name, value in values.items() if name not in ("host", "port")}
    shard = build(ShardConfig, ours)
    name = values["served_model_name"] or values["model"]
    router = build(RouterConfig, {**values, "served_model_name": name, "groups": (("127.0.0.1:0",),)})
    return shard, router


def to_flags(config: RouterConfig | ShardConfig) -> list[str]:
    """The command line that gives this configuration again. Defaults are left out; an empty list is one
    empty item.
    """
    flags: list[str] = []
    positional: list[str] = []
    for setting in settings_of(type(config)):
        value = getattr(config, setting.field)
        if value == setting.default:
            continue
        if setting.positional:
            positional = ["--", value]
            continue
        items = (value or ("",)) if setting.many else (value,)
        flags += [f"{setting.flag}={_as_typed(item)}" for item in items]
    return flags + positional


def _as_typed(value: object) -> str:
    """A value as a user would type it."""
    if isinstance(value, AdapterSpec):
        plain = value.scaling == 1 and _SCALING not in value.source
        return f"{value.name}={value.source}" + ("" if plain else f"{_SCALING}{value.scaling!r}")
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value)
