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
        ("org/name/ref", "", Source(SourceKind.HUB, "org/name", subfolder="ref")),
        (
            "hub:org/name/runs/checkpoint-100@v2",
            "",
            Source(SourceKind.HUB, "org/name", "v2", "runs/checkpoint-100"),
        ),
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
        "org/name/",
        "org/name//ref",
        "org/name/../ref",
        "org/name/.git",
        "org/name/-ref",
        "org/name" + "/a" * 9,
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
    assert policy.requested("team/adapter", "local").root == str(root)


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


def test_a_pattern_covers_a_repositorys_sub_folders() -> None:
    policy = SourcePolicy((), ("hub:mine/one",))
    assert policy.requested("mine/one/ref").subfolder == "ref"
    with pytest.raises(AdapterNotFound):
        policy.requested("mine/two/one")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("s3://bucket/team/adapter", ""),
        ("s3://bucket/team/adapter", "s3"),
        ("bucket/team/adapter", "s3"),
        ("s3:bucket/team/adapter", ""),
    ],
)
def test_an_s3_prefix_is_served_where_the_operator_allows_it(text: str, kind: str) -> None:
    expected = Source(SourceKind.S3, "s3://bucket/team/adapter")
    policy = SourcePolicy((), ("hub:*", "s3:bucket/team/*"))
    assert policy.requested(text, kind) == expected
    assert str(expected) == "s3://bucket/team/adapter"
    for patterns in (("hub:*",), ("s3:other/*",), ("s3:bucket/team",), ("hub:bucket/team/adapter",)):
        with pytest.raises(AdapterNotFound, match="does not exist"):
            SourcePolicy((), patterns).requested(text, kind)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/team/",
        "s3://bucket//adapter",
        "s3://bucket/team/../adapter",
        "s3://bucket/./adapter",
        "s3://bucket/adapter?versionId=1",
        "s3://bucket/adapter%2e%2e",
        "s3://Bucket/adapter",
        "s3://b/adapter",
        "s3://user@bucket/adapter",
        "s3://bucket/ad apter",
        "s3:///adapter",
    ],
)
def test_what_is_no_s3_prefix_is_not_found(text: str) -> None:
    with pytest.raises(AdapterNotFound):
        SourcePolicy((), ("s3:*",)).requested(text)
    with pytest.raises(ValueError, match="neither"):
        trusted_source(text)


def test_the_operator_may_name_any_directory(root: Path) -> None:
    outside = root.parent / "outside"
    assert trusted_source(str(outside)) == Source(SourceKind.LOCAL, str(outside))
    assert trusted_source(str(outside)).root == ""
    assert trusted_source("org/name@main") == Source(SourceKind.HUB, "org/name", "main")
    assert trusted_source("org/name/ref") == Source(SourceKind.HUB, "org/name", subfolder="ref")
    assert trusted_source("s3://bucket/key") == Source(SourceKind.S3, "s3://bucket/key")
    for text in ("/missing/directory", "local:/missing", "name", "org/name/../x"):
        with pytest.raises(ValueError, match="neither"):
            trusted_source(text)


@pytest.mark.parametrize("name", ["", "a b", "a/../b", "a\0", "é", "x" * 600])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)
