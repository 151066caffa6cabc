"""docs/adapters.md says of every kind of adapter that PEFT can write what becomes of it here."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig, PeftType

from loraplex.shard.adapters.families.refused import refusal
from loraplex.shard.adapters.merging.recipe import METHODS
from loraplex.shard.adapters.parse import READERS

PAGE = (Path(__file__).resolve().parents[2] / "docs/adapters.md").read_text()
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("|")]


def verdicts(name: str) -> list[str]:
    """The second column of the rows whose first names `name`."""
    return [row[1].strip() for row in ROWS if f"`{name}`" in row[0] or f"`{name}:" in row[0]]


@pytest.mark.parametrize("name", [kind.value for kind in PeftType if kind is not PeftType.LORA])
def test_every_type_has_its_row(name: str) -> None:
    served = name in READERS
    assert [verdict in ("served", "converted") for verdict in verdicts(name)] == [served]
    if not served:
        assert verdicts(name) == ["refused"]
        assert "not known here" not in refusal(name, READERS)


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(LoraConfig) if field.name != "peft_type"]
)
def test_every_option_of_lora_has_its_row(name: str) -> None:
    assert verdicts(name) != []


def test_every_way_to_merge_is_named() -> None:
    for method in METHODS:
        assert f"`{method.removesuffix('_svd')}`" in PAGE


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("#")
    }
    linked = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert linked
    assert linked <= headings
