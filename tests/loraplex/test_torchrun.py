"""Where torchrun's variables put a shard."""

from __future__ import annotations

from typing import Any

import pytest

from loraplex.settings import SHARD, SettingError
from loraplex.torchrun import place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def values(**given: Any) -> dict[str, Any]:
    return {**{setting.field: setting.default for setting in SHARD}, "model": "m", "port": 9000, **given}


def test_a_shard_takes_its_place_from_torchrun() -> None:
    placed = place(values(), TORCHRUN)
    assert placed.values == values(
        rank=3, world_size=4, master="10.0.0.1:29500", store_prefix="loraplex/none/0", port=9001
    )
    assert placed.environment == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_without_all_of_the_variables_nothing_changes(missing: str) -> None:
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    placed = place(values(), environ)
    assert (placed.values, placed.environment) == (values(), {})


@pytest.mark.parametrize("given", [{"rank": 1}, {"world_size": 2}, {"master": "a:1"}])
def test_what_the_user_says_wins(given: dict[str, Any]) -> None:
    placed = place(values(**given), TORCHRUN)
    assert (placed.values, placed.environment) == (values(**given), {})


def test_a_child_of_the_launcher_has_its_place_already() -> None:
    assert place(values(), {**TORCHRUN, "LORAPLEX_LIFELINE": "1"}).values == values()


def test_a_free_port_stays_one() -> None:
    assert place(values(port=0), TORCHRUN).values["port"] == 0


def test_a_master_with_an_address_of_version_6() -> None:
    assert place(values(), {**TORCHRUN, "MASTER_ADDR": "fd00::1"}).values["master"] == "[fd00::1]:29500"


def test_without_a_store_of_the_agent_rank_0_runs_one() -> None:
    for environ in ({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}, dict(list(TORCHRUN.items())[:5])):
        assert place(values(), environ).values["store_prefix"] == ""


def test_each_attempt_has_keys_of_its_own() -> None:
    second = place(values(), {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert second.values["store_prefix"] == "loraplex/none/1"


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "auto", {"CUDA_VISIBLE_DEVICES": "1"}),
        (None, "cpu", {}),
        ("4,5", "cuda", {"CUDA_VISIBLE_DEVICES": "5"}),
        ("7", "cuda", {}),
        ("", "auto", {}),
    ],
)
def test_each_rank_of_a_machine_sees_one_gpu(
    visible: str | None, device: str, expected: dict[str, str]
) -> None:
    environ = TORCHRUN if visible is None else {**TORCHRUN, "CUDA_VISIBLE_DEVICES": visible}
    assert place(values(device=device), environ).environment == expected


def test_a_rank_without_a_gpu_is_refused() -> None:
    environ = {**TORCHRUN, "LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "4,5"}
    with pytest.raises(SettingError, match="CUDA_VISIBLE_DEVICES=4,5 has no GPU for local rank 2"):
        place(values(), environ)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_a_variable_that_torchrun_would_not_set_is_named(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}=x in the environment is not a number"):
        place(values(), {**TORCHRUN, name: "x"})
