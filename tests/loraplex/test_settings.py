from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loraplex.router.config import AdapterSpec, RouterConfig
from loraplex.settings import (
    REQUIRED,
    ROUTER,
    SERVE,
    SHARD,
    SettingError,
    parse_adapter,
    parse_count,
    parse_seconds,
    parse_size,
    parse_switch,
    read_file,
    split_serve,
    to_flags,
)
from loraplex.shard.config import ShardConfig


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("512MiB", 512 * 1024**2),
        ("512 mib", 512 * 1024**2),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("2GB", 2 * 1000**3),
        ("2G", 2 * 1000**3),
        ("3k", 3000),
        ("1TiB", 1024**4),
        ("7B", 7),
    ],
)
def test_sizes_take_suffixes(typed: object, size: int) -> None:
    assert parse_size(typed) == size


@pytest.mark.parametrize(
    "typed", ["", "MiB", "-1", "12foo", "1 PiB", "1iB", "0x10", "1e9", True, 1.5, None, [1]]
)
def test_other_sizes_are_refused_by_value(typed: object) -> None:
    with pytest.raises(SettingError) as refusal:
        parse_size(typed)
    assert repr(typed) in str(refusal.value)


@pytest.mark.parametrize("typed", ["", "1.5", "many", True, 1.5, None])
def test_counts_are_whole_numbers(typed: object) -> None:
    assert parse_count("12") == parse_count(12) == 12
    with pytest.raises(SettingError, match="not a whole number"):
        parse_count(typed)


@pytest.mark.parametrize("typed", ["", "soon", "nan", "inf", True, None])
def test_seconds_are_finite_numbers(typed: object) -> None:
    assert parse_seconds("1.5") == 1.5
    with pytest.raises(SettingError, match="not a number of seconds"):
        parse_seconds(typed)


@pytest.mark.parametrize("typed", ["sql", "=x", "sql=", 3])
def test_adapters_need_a_name_and_a_source(typed: object) -> None:
    assert parse_adapter("sql=hub/a=b") == AdapterSpec("sql", "hub/a=b")
    with pytest.raises(SettingError, match="NAME=SOURCE"):
        parse_adapter(typed)


@pytest.mark.parametrize(
    ("typed", "spec"),
    [
        ("sql=org/a,scaling=0.5", AdapterSpec("sql", "org/a", 0.5)),
        ("sql=org/a,scaling=-2", AdapterSpec("sql", "org/a", -2.0)),
        ("sql=/a,b=c,scaling=0", AdapterSpec("sql", "/a,b=c", 0.0)),
        ("sql=/a,b", AdapterSpec("sql", "/a,b")),
        ("sql=/x,scaling=2,scaling=1.0", AdapterSpec("sql", "/x,scaling=2")),
    ],
)
def test_an_adapter_may_be_scaled(typed: str, spec: AdapterSpec) -> None:
    assert parse_adapter(typed) == spec
    (flag,) = [f for f in to_flags(router_config(adapters=(spec,))) if f.startswith("--adapter=")]
    assert parse_adapter(flag.removeprefix("--adapter=")) == spec


@pytest.mark.parametrize("scaling", ["", "x", "nan", "inf", "100.1", "-101"])
def test_a_scaling_is_a_bounded_number(scaling: str) -> None:
    with pytest.raises(SettingError, match=r"scaling must be a number between -100 and 100"):
        parse_adapter(f"sql=org/a,scaling={scaling}")
    with pytest.raises(SettingError, match="NAME=SOURCE"):
        parse_adapter(f"sql=,scaling={scaling}")


@pytest.mark.parametrize(
    ("typed", "value"), [("on", True), ("off", False), ("true", True), ("false", False), (False, False)]
)
def test_switches_are_on_or_off(typed: object, value: bool) -> None:
    assert parse_switch(typed) is value
    config = router_config(adapter_tokenizers=value)
    assert ("--adapter-tokenizers=off" in to_flags(config)) is not value


@pytest.mark.parametrize("typed", ["", "1", "yes", 1, 0, None, ["on"]])
def test_other_switches_are_refused(typed: object) -> None:
    with pytest.raises(SettingError, match="neither on nor off"):
        parse_switch(typed)


def router_config(**given: object) -> RouterConfig:
    return RouterConfig(served_model_name="m", groups=(("localhost:1",),), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("settings", "config"), [(ROUTER, RouterConfig), (SHARD, ShardConfig)])
def test_every_field_of_a_configuration_can_be_set(settings: tuple, config: type) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert [setting.field for setting in settings] == list(fields)
    for setting in settings:
        required = fields[setting.field] is dataclasses.MISSING
        assert setting.default is REQUIRED if required else setting.default == fields[setting.field]


def test_serve_takes_the_documented_flags() -> None:
    documented = {
        *("--served-model-name", "--revision", "--device", "--dtype", "--host", "--port", "--grpc-port"),
        *("--tp", "--replicas", "--adapter", "--adapter-root", "--allow-source", "--adapter-tokenizers"),
        *("--adapter-memory", "--host-adapter-memory", "--max-adapters", "--max-rank"),
        *("--kv-memory", "--max-model-len", "--max-num-seqs"),
        *("--max-queued-requests", "--max-queued-tokens", "--api-key-file", "--drain-timeout"),
        *("--max-step-tokens", "--adapter-patience", "--threads"),
        *("--tls-cert", "--tls-key", "--tls-ca", "--tls-name"),
    }
    assert {setting.flag for setting in SERVE if not setting.positional} == documented


def test_flags_and_variables_follow_the_key() -> None:
    setting = next(setting for setting in SERVE if setting.field == "adapter_roots")
    assert (setting.flag, setting.variable) == ("--adapter-root", "LORAPLEX_ADAPTER_ROOT")


def test_a_file_may_use_dashes_or_underscores(tmp_path: Path) -> None:
    path = write(tmp_path, 'kv-memory = "1GiB"\nmax_rank = 64\nadapter = ["sql=org/sql"]\n')
    assert read_file(path, SERVE) == {"kv_memory": "1GiB", "max_rank": 64, "adapter": ["sql=org/sql"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown key 'prot'"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("kv-memory = 1\nkv_memory = 2", "key 'kv_memory' is given twice"),
        ("port = 'x'", "port: 'x' is not a whole number"),
        ("port = true", "port: True is not a whole number"),
        ("adapter = 'sql=org/sql'", r"adapter: a list is needed, such as \['NAME=SOURCE'\]"),
        ("adapter = ['sql']", "adapter: 'sql' is not an adapter"),
        ("model = 3", "model: 3 is not a text"),
        ("port =", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingError, match=f"^{path}.*{message}"):
        read_file(path, SERVE)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(SettingError, match=r"/nowhere\.toml cannot be read: No such file"):
        read_file("/nowhere.toml", SERVE)


def test_serve_splits_into_two_configurations() -> None:
    shard, router = split_serve(
        serve_values(model="org/m", port=1, max_rank=64, adapters=[AdapterSpec("a", "b")])
    )
    assert shard == ShardConfig(model="org/m", max_rank=64)
    assert (router.port, router.adapters) == (1, (AdapterSpec("a", "b"),))
    assert router.served_model_name == "org/m"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, "--tp 0: at least one process must hold the model"),
        ({"replicas": 0}, "--replicas 0: at least one copy of the model is needed"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"port": 65536}, "port must lie between 0 and 65535"),
        ({"adapters": [AdapterSpec("a", "b"), AdapterSpec("a", "c")]}, "an adapter name is given twice"),
        ({"adapter_roots": ["/nowhere"]}, "--adapter-root /nowhere: no such directory"),
    ],
)
def test_what_cannot_be_served_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        split_serve(serve_values(**values))


def serve_values(**given: object) -> dict[str, object]:
    values = {setting.field: setting.default for setting in SERVE}
    return {**values, "model": "m", **given}


def write(folder: Path, text: str) -> str:
    path = folder / "loraplex.toml"
    path.write_text(text)
    return str(path)
