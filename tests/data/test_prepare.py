"""`pipermoe tokenize`: the same bytes whatever the workers, whole or not there, and one line for what is no text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipermoe.data import prepare
from pipermoe.data.prepare import prepare_tokens
from pipermoe.data.shards import HEADER, TokenHeader, open_shards
from pipermoe.data.sources import cut_sources, read_documents
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import UserError


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """A folder of texts, one of them binary, and JSON lines."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"text number {n}\n" * (n + 1))
    (folder / "deep" / "test.txt").write_text("deeper")
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"id": str(n), "text": f"line {n} ü" * n}) + "\n" for n in range(40)))
    return [folder, lines]


def texts(folder: Path) -> list[str]:
    """The documents in a folder of prepared bytes, without the token that ends them."""
    found = []
    for shard in open_shards(folder)[1]:
        for begin, end in zip(shard.starts, shard.starts[1:], strict=False):
            *document, last = shard.read(int(begin), int(end)).tolist()
            assert last == 0
            found.append(bytes(document).decode())
    return found


def test_every_document_is_there_in_the_order_of_the_sources(sources, tmp_path):
    header = prepare_tokens(sources, tmp_path / "out", shard_bytes=200)
    folder, lines = [f"text number {n}\n" * (n + 1) for n in range(6)], [f"line {n} ü" * n for n in range(1, 40)]
    assert texts(tmp_path / "out") == [*folder, "deeper", *lines]
    assert header == load(tmp_path / "out" / HEADER, TokenHeader)
    assert header.documents == 46
    assert len(header.shards) > 10
    assert header.tokens == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tokens"))


def test_any_number_of_workers_writes_the_same_bytes(sources, tmp_path):
    written = []
    for workers in (1, 3):
        prepare_tokens(sources, tmp_path / str(workers), workers=workers, shard_bytes=300)
        written.append({path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()})
    assert written[0] == written[1]
    assert not any(name.startswith(".") or name == prepare.UNFINISHED for name in written[0])


@pytest.mark.parametrize("part_bytes", [1, 7, 64, 10_000])
def test_a_line_belongs_to_the_part_that_it_begins_in(sources, part_bytes):
    parts = [part for group in cut_sources(sources[1:], part_bytes) for part in group]
    read = ["".join(pieces) for part in parts for pieces in read_documents(part, "text")]
    assert read == [f"line {n} ü" * n for n in range(1, 40)]


def test_a_stopped_preparation_goes_on_with_what_is_missing(sources, tmp_path, monkeypatch):
    whole = prepare_tokens(sources, tmp_path / "whole", shard_bytes=300)
    out, write = tmp_path / "out", prepare.write_shard

    def fails_later(folder, number, documents, *rest):
        def full_disk():
            yield next(iter(documents))
            raise OSError(28, "No space left on device")

        write(folder, number, full_disk() if number == 3 else documents, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", fails_later)
        with pytest.raises(UserError, match=r"00003\.tokens: cannot be written: No space left on device"):
            prepare_tokens(sources, out, shard_bytes=300)
    assert not (out / HEADER).exists()
    before = (out / "00001.tokens").stat().st_ino
    assert prepare_tokens(sources, out, shard_bytes=300) == whole
    assert (out / "00001.tokens").stat().st_ino == before
    assert texts(out) == texts(tmp_path / "whole")


def test_a_second_preparation_in_the_same_folder_is_refused(sources, tmp_path):
    prepare_tokens(sources, tmp_path / "out")
    with pytest.raises(UserError, match="holds prepared tokens already"):
        prepare_tokens(sources, tmp_path / "out")
    (tmp_path / "out" / HEADER).rename(tmp_path / "out" / "other")
    with pytest.raises(UserError, match="is not empty"):
        prepare_tokens(sources, tmp_path / "out")
    (tmp_path / "new").mkdir()
    other = prepare.Recipe(tokenizer="a", tokenizer_sha256="", json_field="", sources_sha256="")
    save(tmp_path / "new" / prepare.UNFINISHED, other)
    (tmp_path / "new" / "00000.tokens").touch()
    with pytest.raises(UserError, match="start of a preparation from other sources"):
        prepare_tokens(sources, tmp_path / "new")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"lines\.jsonl: line 41: is not valid JSON"),
        ('{"body": "x"}', r"line 41: has no text field 'text'; its texts are body; name one with --json-field"),
        ("[1]", r"line 41: has no text field 'text'; it holds no text"),
        ('{"text": 3}', r"line 41: has no text field 'text'"),
    ],
)
def test_a_line_that_is_no_document_is_an_error_with_its_number(sources, tmp_path, line, message):
    with open(sources[1], "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        prepare_tokens(sources, tmp_path / "out", shard_bytes=200)


def test_a_preparation_that_came_to_a_mistake_begins_anew_once_it_is_mended(sources, tmp_path):
    whole = sources[1].read_text()
    sources[1].write_text(whole + "[1]\n")
    with pytest.raises(UserError, match="line 41"):
        prepare_tokens(sources, tmp_path / "out")
    sources[1].write_text(whole)
    prepare_tokens(sources, tmp_path / "out")
    prepare_tokens(sources, tmp_path / "other")
    assert texts(tmp_path / "out") == texts(tmp_path / "other")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "other").iterdir()
    }


def test_what_is_missing_or_no_text_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: No such file"):
        prepare_tokens([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "image.png").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match=r"image\.png: is not UTF-8 text"):
        prepare_tokens([tmp_path / "image.png"], tmp_path / "out1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no text"):
        prepare_tokens([tmp_path / "empty"], tmp_path / "out2")


def test_half_a_character_in_json_becomes_the_sign_for_a_missing_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    prepare_tokens([tmp_path / "a.jsonl"], tmp_path / "out")
    assert texts(tmp_path / "out") == ["a\N{REPLACEMENT CHARACTER}b"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("00000.tokens", lambda path: os.truncate(path, 5), r"00000\.tokens: is 5 bytes instead of"),
        ("00000.documents", lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "is not an index of"),
        ("00000.tokens", Path.unlink, r"00000\.tokens: cannot be read: No such file"),
        (HEADER, lambda path: os.truncate(path, 30), r"tokens\.json: is not valid JSON"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_the_file(sources, tmp_path, name, change, message):
    prepare_tokens(sources, tmp_path / "out")
    change(tmp_path / "out" / name)
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path / "out")


def test_a_vocabulary_is_stored_in_two_bytes_a_token(tmp_path):
    pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "hello": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 300)}
    vocabulary = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": vocabulary}))
    (tmp_path / "text.txt").write_text("hello w299 there")
    header = prepare_tokens([tmp_path / "text.txt"], tmp_path / "out", tokenizer=str(path))
    assert np.fromfile(tmp_path / "out" / "00000.tokens", "<u2").tolist() == [1, 299, 0, 2]
    assert (header.vocab_size, header.end_of_text, len(header.tokenizer_sha256)) == (300, 2, 64)
