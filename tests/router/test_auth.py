from __future__ import annotations

import pytest

from loraplex.router.auth import ApiKeys, Caller
from loraplex.router.errors import AdapterNotFound, Unauthenticated


@pytest.fixture
def keys(tmp_path) -> ApiKeys:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nsesame acme\n  s3cret   blue  blue/*  shared-? \n", encoding="utf-8")
    return ApiKeys.from_file(path)


def test_a_key_names_its_tenant_and_adapters(keys):
    assert keys.authenticate("Bearer sesame") == Caller("acme")
    assert keys.authenticate("bearer  s3cret") == Caller("blue", ("blue/*", "shared-?"))


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "sesame", "Basic sesame",
     "Bearer sesame x", "Bearer SESAME",
     "Bearer #", "Bearer \udcff"],
)  # fmt: skip
def test_anything_else_is_refused(keys, header):
    with pytest.raises(Unauthenticated) as caught:
        keys.authenticate(header)
    assert "sesame" not in caught.value.message


def test_without_a_file_everybody_is_the_empty_tenant():
    assert ApiKeys().authenticate(None) == Caller("")
    assert ApiKeys().authenticate("Bearer whatever") == Caller("")


def test_globs_bound_what_a_caller_may_name():
    caller = Caller("blue", ("blue/*", "shared-?"))
    for name in ("blue/a", "blue/a/b", "shared-1"):
        caller.require(name)
    for name in ("blue", "red/a", "shared-12", "Blue/a"):
        with pytest.raises(AdapterNotFound):
            caller.require(name)
    assert Caller("free").may_name("anything")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("sesame\n", "line 1"), ("a t\na u\n", "line 2"), ("# nothing\n", "no key")],
)
def test_a_malformed_file_is_told_without_its_keys(tmp_path, text, problem):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        ApiKeys.from_file(path)
    assert "sesame" not in str(caught.value)


def test_keys_are_not_kept(keys):
    assert "sesame" not in repr(vars(keys))
