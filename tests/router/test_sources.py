"""What a request may name, and what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.router.errors import AdapterNotFound, InvalidRequest
from loraplex.router.sources import Source, SourceKind, SourcePolicy, check_name, trusted_source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "team" / "adapter").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root" / "link-out").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "link-in").symlink_to(tmp_path / "root" / "team" / "adapter")
    (tmp_path / "root" / "file").write_text("x")
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("org/name", "", Source(SourceKind.HUB, "org/name")),
        ("org/name", "hub", Source(SourceKind.HUB, "org/name")),
        ("hub:org/na.me-1", "", Source(SourceKind.HUB, "org/na.me-1")),
        ("org/name@v1.0", "", Source(SourceKind.HUB, "org/name", "v1.0")),
        ("org/name@refs/pr/3", "", Source(SourceKind.HUB, "org/name", "refs/pr/3")),
    ],
)
def test_hub_ids(text: str, kind: str, expected: Source) -> None:
    assert SourcePolicy((), ("hub:*",)).requested(text, kind) == expected
    assert SourcePolicy((), ("hub:*",)).requested(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "org/name/more",
        "../name",
        "org/../name",
        "org/..",
        "org/na\0me",
        "org/na me",
        "org/naïve",
        "org/name\n",
        "-org/name",
        "org/name@../x",
        "s3://bucket/key",
        "http://host/x",
        "a" * 600,
        "/etc",
        "local:/etc",
    ],
)
def test_anything_else_is_not_found(text: str) -> None:
    with pytest.raises(AdapterNotFound):
        SourcePolicy((), ("hub:*",)).requested(text)


def test_patterns_decide_about_hub_ids() -> None:
    policy = SourcePolicy((), ("hub:mine/*", "hub:other/one"))
    assert policy.requested("mine/x@v2").id == "mine/x"
    assert policy.requested("other/one").id == "other/one"
    for text in ("other/two", "notmine/x", "Mine/x"):
        with pytest.raises(AdapterNotFound) as forbidden:
            policy.requested(text)
        with pytest.raises(AdapterNotFound) as unknown:
            policy.requested(text + "?")
        assert forbidden.value.message.split()[:4] == unknown.value.message.split()[:4]


def test_directories_resolve_below_a_root(root: Path) -> None:
    policy = SourcePolicy((str(root),), ("hub:*",))
    inside = Source(SourceKind.LOCAL, str(root / "team" / "adapter"))
    assert policy.requested(str(root / "team" / "adapter")) == inside
    assert policy.requested("team/adapter", "local") == inside
    assert policy.requested("local:team/adapter") == inside
    assert policy.requested(str(root / "link-in")) == inside


@pytest.mark.parametrize("name", ["", "link-out", "file", "missing", "../outside", "team/../../outside"])
def test_directories_elsewhere_are_not_found(root: Path, name: str) -> None:
    policy = SourcePolicy((str(root),), ("hub:*",))
    for text in (f"{root}/{name}", f"local:{root}/{name}", f"local:{name}"):
        with pytest.raises(AdapterNotFound):
            policy.requested(text)
    with pytest.raises(AdapterNotFound):
        policy.requested(str(root.parent / "outside"))


def test_a_local_pattern_narrows_the_roots(root: Path) -> None:
    (root / "other").mkdir()
    policy = SourcePolicy((str(root),), (f"local:{root}/team/*",))
    assert policy.requested(str(root / "team" / "adapter")).kind is SourceKind.LOCAL
    with pytest.raises(AdapterNotFound):
        policy.requested(str(root / "other"))
    with pytest.raises(AdapterNotFound):
        policy.requested("org/name")


def test_an_unknown_kind_names_its_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SourcePolicy((), ("hub:*",)).requested("org/name", "pbase")
    assert caught.value.param == "adapter_source"
    with pytest.raises(AdapterNotFound, match="S3"):
        SourcePolicy((), ("hub:*",)).requested("key", "s3")


def test_the_operator_may_name_any_directory(root: Path) -> None:
    outside = root.parent / "outside"
    assert trusted_source(str(outside)) == Source(SourceKind.LOCAL, str(outside))
    assert trusted_source("org/name@main") == Source(SourceKind.HUB, "org/name", "main")
    for text in ("/missing/directory", "local:/missing", "name", "s3://b/k"):
        with pytest.raises(ValueError, match="neither"):
            trusted_source(text)


@pytest.mark.parametrize("name", ["", "a b", "a/../b", "a\0", "é", "x" * 600])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)
