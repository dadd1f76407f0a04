"""Tokenizers: bytes and vocabulary files."""

from __future__ import annotations

import json
import sys

import pytest

from pipermoe.data.tokenizer import ByteTokenizer, load_tokenizer, token_type
from pipermoe.specs.errors import UserError


@pytest.fixture
def vocabulary(tmp_path):
    """A word-level vocabulary of three words and an end-of-text token."""
    words = {"<unk>": 0, "hello": 1, "world": 2, "</s>": 3}
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}))
    return path


def test_bytes_are_the_text_itself():
    assert bytes(ByteTokenizer().encode("héllo\n")) == "héllo\n".encode()


def test_a_vocabulary_file_gives_its_numbers_and_the_one_that_ends_a_document(vocabulary):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(str(vocabulary))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4, 3)
    assert tokenizer.encode("world hello there").tolist() == [2, 1, 0]


@pytest.mark.parametrize(("size", "kind"), [(256, "<u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_tokens_are_kept_in_the_smallest_type(size, kind):
    assert token_type(size).str.replace("|", "<") == kind


def test_a_missing_or_foreign_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json.*no such file"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "foreign.json").write_text('{"a": 1')
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"foreign\.json.*is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "foreign.json"))


def test_an_absent_package_is_an_error_that_says_how_to_install_it(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'pipermoe\[tokenizers\]'"):
        load_tokenizer(str(vocabulary))
