"""Data: deterministic text, a held-back split, and batches that do not depend on the arrangement."""

from __future__ import annotations

import numpy as np
import pytest

from pipermoe.data.batches import TextData, load_text, micro_batches
from pipermoe.data.corpus import read_corpus
from pipermoe.data.prepare import prepare_tokens
from pipermoe.data.stream import Documents, Sequences, Stream
from pipermoe.specs.errors import UserError
from pipermoe.specs.train import Data, TrainConfig


def text_data(blocks: int = 20, batch: int = 4, seed: int = 0) -> TextData:
    """Sequences of two tokens whose first token tells their number."""
    tokens = np.arange(2 * blocks + 1, dtype=np.uint16)
    stream = Stream((Documents("numbers", tokens, np.array([0, len(tokens)], np.uint64), 1000),))
    sequences = Sequences.pack(stream, 2, "stream")
    return TextData(sequences, sequences, batch, 2, seed)


def batch_of(data: TextData, step: int) -> np.ndarray:
    return data.train[data.training_numbers(step)]


def config(paths: tuple[str, ...], **keys) -> TrainConfig:
    return TrainConfig(**{"seq_len": 16, "global_batch_size": 2, **keys}, data=Data(paths=paths))


def test_the_standard_library_is_found_in_the_same_order_every_time():
    documents = read_corpus(())
    assert documents == read_corpus(())
    assert any(document.name == "argparse.py" for document in documents)
    assert not any("test" in document.name.split("/")[:-1] for document in documents)
    assert sum(len(document.text) for document in documents) > 5e6


def test_the_order_of_documents_does_not_depend_on_where_the_folder_lies(tmp_path):
    for root in ("a", "b"):
        for name in ("one.txt", "two.txt", "deep/three.md"):
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / name).write_text(name)
    assert read_corpus((str(tmp_path / "a"),)) == read_corpus((str(tmp_path / "b"),))


def test_binary_and_empty_files_in_a_folder_are_skipped(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros.bin").write_bytes(b"\0\0\0")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "text.txt").write_text("some text")
    assert [document.name for document in read_corpus((str(tmp_path),))] == ["text.txt"]


@pytest.mark.parametrize("case", ["missing", "empty file", "empty folder", "binary"])
def test_a_path_without_text_is_an_error_that_names_it(tmp_path, case):
    path = tmp_path / case
    if case == "empty file":
        path.write_text("")
    elif case == "empty folder":
        path.mkdir()
    elif case == "binary":
        path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(UserError, match=str(path)):
        read_corpus((str(path),))


def test_too_few_tokens_is_an_error_that_names_the_source_and_the_numbers(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 100)
    with pytest.raises(UserError, match=r"short\.txt.*tokens for validation.*2 sequences of 16"):
        load_text(config((str(tmp_path / "short.txt"),)), vocab_size=256)


def test_training_and_validation_text_are_disjoint_and_together_all_of_it(tmp_path):
    text = "".join(chr(33 + i % 90) for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    data = load_text(config((str(tmp_path / "text.txt"),)), vocab_size=256)
    parts = [sequences.stream for sequences in (data.train, data.validation)]
    assert b"".join(bytes(part.read(0, len(part)).tolist()) for part in parts) == text.encode() + b"\0"
    assert len(parts[1]) == 100
    assert data.validation_batches == 3  # six sequences of 16 tokens in batches of 2, not the 4 batches asked for


def test_an_epoch_visits_every_sequence_once_and_the_next_epoch_in_another_order():
    data = text_data(blocks=20, batch=4)
    epochs = [[int(s) for step in range(5 * e, 5 * e + 5) for s in batch_of(data, step)[:, 0] // 2] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step_alone():
    data, fresh = text_data(blocks=18), text_data(blocks=18)  # 18 is no multiple of 4: batches span epochs
    batches = [batch_of(data, step) for step in range(12)]
    for step in reversed(range(12)):
        assert np.array_equal(batch_of(fresh, step), batches[step])
    assert not np.array_equal(batch_of(text_data(seed=1), 0), batch_of(text_data(seed=0), 0))


def test_a_fingerprint_tells_texts_apart_and_not_where_they_lie():
    assert text_data().fingerprint == text_data(seed=1).fingerprint
    assert text_data(blocks=20).fingerprint != text_data(blocks=21).fingerprint
    shifted = text_data()
    shifted.train.stream.shards[0].tokens[7] += 1
    assert text_data().fingerprint != shifted.fingerprint


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_every_arrangement_sees_the_same_micro_batches(data_parallel):
    batch = text_data(blocks=40, batch=16).training_numbers(3)
    shares = [micro_batches(batch, data_parallel, rank, micro_batch_size=2) for rank in range(data_parallel)]
    assert np.array_equal(np.concatenate(shares), micro_batches(batch, 1, 0, micro_batch_size=2))


def test_prepared_and_plain_text_are_not_mixed(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    prepare_tokens([tmp_path / "text.txt"], tmp_path / "tokens")
    with pytest.raises(UserError, match=r"text\.txt: is not prepared, .*tokens is; prepare all of it or none"):
        load_text(config((str(tmp_path / "tokens"), str(tmp_path / "text.txt"))), 256)


def test_prepared_tokens_give_the_batches_of_the_text_they_were_made_of(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"{n} " for n in range(2000)))
    prepare_tokens([tmp_path / "text.txt"], tmp_path / "tokens")
    plain, prepared = (load_text(config((str(tmp_path / name),)), 256) for name in ("text.txt", "tokens"))
    for step in range(3):
        assert np.array_equal(batch_of(plain, step), batch_of(prepared, step))
    held_back = [data.validation[data.validation_numbers(0)] for data in (plain, prepared)]
    assert np.array_equal(held_back[0], held_back[1])


def test_a_vocabulary_larger_than_the_models_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 2000)
    prepare_tokens([tmp_path / "text.txt"], tmp_path / "tokens")
    with pytest.raises(UserError, match=r"tokens\.json: tokenizer = 'bytes': has 256 tokens.*only 100"):
        load_text(config((str(tmp_path / "tokens"),)), vocab_size=100)
    with pytest.raises(UserError, match=r"data\.tokenizer = 'bytes': has 256 tokens.*only 100"):
        load_text(config((str(tmp_path / "text.txt"),)), vocab_size=100)


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"global_batch_size = 16.*3 \* 2"):
        micro_batches(text_data(blocks=40, batch=16).training_numbers(0), 3, 0, 2)
