import json

import pytest

from pipermoe.specs.documents import load, require_writable, save
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

TRAIN = "seq_len = 128\nglobal_batch_size = 8\n"


def error_of(path, kind) -> str:
    with pytest.raises(UserError) as caught:
        load(path, kind)
    return str(caught.value)


def test_a_document_survives_being_written_and_read(tmp_path):
    strategy = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, layer_split=(4, 2))
    for suffix in ("toml", "json"):
        path = save(tmp_path / f"strategy.{suffix}", strategy, header="a comment")
        assert load(path, Strategy) == strategy


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_begins_with_its_schema_version_and_need_not(tmp_path, suffix):
    path = save(tmp_path / f"strategy.{suffix}", Strategy())
    assert "schema_version" in next(line for line in path.read_text().splitlines() if len(line) > 1)
    bare = tmp_path / "bare.toml"
    bare.write_text("data_parallel = 2\nexpert_parallel = 2\n")
    assert load(bare, Strategy).data_parallel == 2


@pytest.mark.parametrize("version", ["2", "true", '"1"'])
def test_another_schema_version_is_refused(tmp_path, version):
    path = tmp_path / "job.toml"
    path.write_text(f"schema_version = {version}\n{TRAIN}")
    assert "this version of pipermoe reads schema_version = 1" in error_of(path, TrainConfig)


def test_overrides_win_over_the_file_and_are_validated_with_it(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("seq_len = 128\n")
    assert load(path, TrainConfig, {"global_batch_size": 4, "seq_len": 64}).tokens_per_step == 256
    with pytest.raises(UserError, match="seq_len = 0"):
        load(path, TrainConfig, {"global_batch_size": 4, "seq_len": 0})


def test_an_unknown_key_names_file_key_value_and_what_is_accepted(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(TRAIN + "[optimizer]\nlearning_rat = 0.1\n")
    message = error_of(path, TrainConfig)
    assert message.startswith(f"{path}: optimizer.learning_rat = 0.1: unknown key; did you mean 'learning_rate'?")
    assert "weight_decay" in message


def test_a_misspelt_key_is_named_before_the_one_that_it_leaves_missing(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("seq_len = 128\nglobal_batch_siez = 4\n")
    assert "global_batch_siez = 4: unknown key; did you mean 'global_batch_size'?" in error_of(path, TrainConfig)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seq_len = -4\nglobal_batch_size = 8\n", "seq_len = -4: input should be greater than 0"),
        ('seq_len = "long"\nglobal_batch_size = 8\n', "seq_len = 'long': input should be a valid integer"),
        ("global_batch_size = 8\n", "seq_len: required key is missing"),
        (TRAIN + 'precision = "fp12"\n', "precision = 'fp12': input should be 'fp32', 'bf16', 'fp16' or 'fp8'"),
        ("seq_len = 128\nglobal_batch_size =\n", "is not valid TOML"),
    ],
)
def test_a_wrong_value_is_one_clear_line(tmp_path, text, expected):
    path = tmp_path / "job.toml"
    path.write_text(text)
    message = error_of(path, TrainConfig)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_files_that_are_no_documents_are_refused(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.toml", Strategy)
    (tmp_path / "list.json").write_text("[1, 2]")
    assert "must hold one table" in error_of(tmp_path / "list.json", Strategy)
    (tmp_path / "cut.json").write_text(json.dumps({"schedule": "1f1b"})[:-4])
    assert "is not valid JSON" in error_of(tmp_path / "cut.json", Strategy)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in error_of(tmp_path / "binary.toml", Strategy)
    assert "is not a file" in error_of(tmp_path, Strategy)


def test_a_huge_file_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(50 * 2**20)
    assert "at most" in error_of(path, Strategy)


def test_deeply_nested_json_is_an_error_and_not_a_crash(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert "is not valid JSON" in error_of(path, Strategy)


def test_two_arrangements_that_do_not_cover_the_same_ranks_are_refused(tmp_path):
    path = tmp_path / "strategy.toml"
    path.write_text("data_parallel = 4\nexpert_parallel = 3\n")
    assert "data_parallel * context_parallel * tensor_parallel = 4 must equal" in error_of(path, Strategy)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = save(tmp_path / "strategy.toml", Strategy())
    before = path.read_text()
    (tmp_path / "folder").write_text("a file where a folder would be needed")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "folder" / "strategy.toml", Strategy())
    assert path.read_text() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "strategy.toml"]


def test_a_path_that_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "plan.toml"):
        with pytest.raises(UserError, match="cannot be written"):
            require_writable(path)
    require_writable(tmp_path / "new" / "folder" / "plan.toml")
    assert not (tmp_path / "new").exists()
