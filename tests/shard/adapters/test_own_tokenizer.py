"""What an adapter's directory says of its text side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.shard.adapters.files import FileLimits
from loraplex.shard.adapters.own_tokenizer import BaseText, OwnTokenizer, TextComparison, read_own_tokenizer
from loraplex.shard.errors import AdapterRejected

from ...tiny import tokenizer

LIMITS = FileLimits()


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def test_a_directory_without_companions_has_nothing_of_its_own(tmp_path: Path) -> None:
    assert read_own_tokenizer(tmp_path, LIMITS) == OwnTokenizer()
    assert TextComparison(BaseText(), LIMITS).differs(tmp_path) == (False, False)


def test_a_saved_tokenizer_with_added_tokens_is_read_whole(tmp_path: Path) -> None:
    own = tokenizer()
    own.add_special_tokens({"eos_token": "<|end|>", "bos_token": "<|begin|>"})
    own.save_pretrained(tmp_path)
    read = read_own_tokenizer(tmp_path, LIMITS)
    assert read.stop_ids == (own.convert_tokens_to_ids("<|end|>"),)
    assert read.bos_id == own.convert_tokens_to_ids("<|begin|>")
    assert read.special_tokens["eos_token"] == "<|end|>"
    assert read.chat_template == own.chat_template
    assert json.loads(read.tokenizer_json) == json.loads(own.backend_tokenizer.to_str())


def test_what_only_repeats_the_base_is_not_its_own(tmp_path: Path) -> None:
    base = tokenizer()
    text = BaseText(base.backend_tokenizer.to_str().encode(), base.chat_template)
    comparison = TextComparison(text, LIMITS)
    base.backend_tokenizer.enable_truncation(7)
    base.save_pretrained(tmp_path / "same")
    assert comparison.differs(tmp_path / "same") == (False, False)
    base.add_tokens(["<one more>"])
    base.save_pretrained(tmp_path / "more")
    assert comparison.differs(tmp_path / "more") == (True, False)
    base.chat_template = "{{ messages }}"
    base.save_pretrained(tmp_path / "both")
    assert comparison.differs(tmp_path / "both") == (True, True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}], "y"),
        ([{"name": "tool_use", "template": "x"}], ""),
        (None, ""),
        (7, ""),
    ],
)
def test_templates_inside_the_tokenizer_config(tmp_path: Path, template: object, expected: str) -> None:
    write(tmp_path, tokenizer_config__json=json.dumps({"chat_template": template}))
    assert read_own_tokenizer(tmp_path, LIMITS).chat_template == expected


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, chat_template__jinja="file", tokenizer_config__json='{"chat_template": "config"}')
    assert read_own_tokenizer(tmp_path, LIMITS).chat_template == "file"


def test_tokens_may_be_texts_objects_or_nonsense(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<e>", "lstrip": False}, "bos_token": "<b>", "unk_token": 5}
    write(tmp_path, tokenizer_config__json=json.dumps(config))
    assert read_own_tokenizer(tmp_path, LIMITS).special_tokens == {"eos_token": "<e>", "bos_token": "<b>"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": '{"added_tokens": [{"id": "x"}]}'},
        {"tokenizer_config__json": "[]"},
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, files: dict[str, str]) -> None:
    name = next(iter(files)).replace("__", ".")
    with pytest.raises(AdapterRejected, match=name):
        read_own_tokenizer(write(tmp_path, **files), LIMITS)
