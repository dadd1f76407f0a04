"""Tokenizers: bytes and vocabulary files."""

from __future__ import annotations

import json
import sys

import pytest

from pipermoe.runtime.data.tokenizer import ByteTokenizer, load_tokenizer
from pipermoe.specs.errors import UserError


@pytest.fixture
def vocabulary(tmp_path):
    """A word-level vocabulary of three words and an end-of-text token."""
    words = {"<unk>": 0, "hello": 1, "world": 2, "</s>": 3}
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}))
    return path


def test_bytes_are_the_text_itself_and_a_zero_at_the_end():
    assert bytes(ByteTokenizer().encode("héllo\n")) == "héllo\n".encode() + b"\0"


def test_a_vocabulary_file_gives_its_numbers_and_ends_the_document(vocabulary):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(str(vocabulary), vocab_size=4)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("world hello there").tolist() == [2, 1, 0, 3]


def test_a_vocabulary_larger_than_the_models_is_an_error_with_both_numbers(vocabulary):
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"has 4 tokens.*only 3"):
        load_tokenizer(str(vocabulary), vocab_size=3)
    with pytest.raises(UserError, match=r"'bytes': has 256 tokens.*only 100"):
        load_tokenizer("bytes", vocab_size=100)


def test_a_missing_or_foreign_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json.*no such file"):
        load_tokenizer(str(tmp_path / "nowhere.json"), 256)
    (tmp_path / "foreign.json").write_text('{"a": 1')
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"foreign\.json.*is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "foreign.json"), 256)


def test_an_absent_package_is_an_error_that_says_how_to_install_it(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'pipermoe\[tokenizers\]'"):
        load_tokenizer(str(vocabulary), 256)
