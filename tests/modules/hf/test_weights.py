"""Weights of every known family: loaded they compute what transformers does, and written again they are the same."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.modules.hf.tiny_families import CONFIGS, SEQ_LEN, SEQUENCES, along, numbers, tokens
from tests.runtime.tiny import engine_for
from torch._C._distributed_c10d import HashStore

from pipermoe.modules.hf.names import FAMILIES
from pipermoe.modules.hf.weights import INDEX, SINGLE, check_weights, load_weights, named_parts
from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.pipeline.interleave import drain
from pipermoe.runtime.pipeline.stage import Tape
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.training.checkpoint.hf_weights import save_weights

# What transformers computed from the same weights: data/make_hf_references.py.
DATA = Path(__file__).parent / "data"
REFERENCES = json.loads((DATA / "hf_references.json").read_text())["families"]
TRAIN = TrainConfig(seq_len=SEQ_LEN, global_batch_size=SEQUENCES, auxiliary_loss=0.0)
WHOLE = Strategy(micro_batch_size=SEQUENCES)


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ProcessGroups.create(Strategy())
    dist.destroy_process_group()


def published(folder: Path, family: str) -> Path:
    """A folder as a model hub would give it."""
    shapes = REFERENCES[family]["shapes"]
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
    save_file({name: numbers(name, tuple(shape)) for name, shape in shapes.items()}, folder / SINGLE)
    return folder


def engine_of(folder: Path, groups: ProcessGroups) -> Engine:
    return engine_for(ModelSpec.from_hf_config(folder), WHOLE, groups, TRAIN)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_logits_loss_and_gradients_are_those_of_transformers(family: str, tmp_path: Path, alone: ProcessGroups):
    engine, expected = engine_of(published(tmp_path, family), alone), REFERENCES[family]
    load_weights(tmp_path, engine.model, engine.named_state())
    stage = engine.stages[0]
    with torch.no_grad():
        hidden_TD = drain(stage.hidden(None, tokens(), Tape(training=False)))
        logits_TV = stage.model.head(stage.model.final_norm(hidden_TD))
    torch.testing.assert_close(logits_TV, torch.tensor(expected["logits"]), rtol=1e-5, atol=1e-5)
    assert engine.step(tokens()[None]).loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    seen = {}
    for name, parameter in engine.named_parameters():
        for theirs, gradient in named_parts(name, gradient_of(parameter), engine.model, FAMILIES[family]).items():
            seen[theirs] = along(theirs, gradient)
    assert seen.keys() == expected["gradients"].keys()
    for name, (norm, product) in expected["gradients"].items():
        assert seen[name] == [pytest.approx(norm, rel=1e-5), pytest.approx(product, abs=1e-5 * norm + 1e-7)], name


def test_what_is_written_is_what_was_read(family: str, tmp_path: Path, alone: ProcessGroups):
    engine = engine_of(published(tmp_path, family), alone)
    load_weights(tmp_path, engine.model, engine.named_state())
    save_weights(tmp_path / "out", engine.model, tmp_path, engine.named_state(), alone)
    table = json.loads((tmp_path / "out" / INDEX).read_text())
    read, written = load_file(tmp_path / SINGLE), {}
    for file in set(table["weight_map"].values()):
        written |= load_file(tmp_path / "out" / file)
    assert table["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in read.values())
    assert written.keys() == read.keys() == table["weight_map"].keys()
    for name, value in read.items():
        assert torch.equal(written[name], value), name


def changed(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"{NORM} is missing; "),
        (lambda w: w.update({"model.layers.1.surprise": torch.ones(1)}), "model.layers.1.surprise is superfluous: "),
        (lambda w: w.update({NORM: torch.ones(3)}), f"{NORM} has the shape [3]; "),
        (lambda w: w.update({NORM: torch.ones(16, dtype=torch.int8)}), f"{NORM} has the type I8; "),
    ],
)
def test_weights_of_another_model_are_refused_by_name(change, message: str, tmp_path: Path, alone: ProcessGroups):
    engine = engine_of(published(tmp_path, "olmoe"), alone)
    before = [tensor.detach().clone() for _, tensor in engine.named_state()]
    changed(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path, engine.model, engine.named_state())
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, old) for (_, tensor), old in zip(engine.named_state(), before, strict=True))


def test_weights_that_transformers_wrote_without_multi_token_prediction_are_refused_with_the_way_out(tmp_path: Path):
    config = CONFIGS["deepseek_v3"] | {"num_nextn_predict_layers": 1}
    (published(tmp_path, "deepseek_v3") / "config.json").write_text(json.dumps(config))
    model = ModelSpec.from_hf_config(tmp_path)
    with pytest.raises(UserError, match=r"layers\.2\..* is missing, of multi-token .* by mtp_layers = 0 in the plan"):
        check_weights(tmp_path, model)
    check_weights(tmp_path, model.model_copy(update={"mtp_layers": 0}))


def test_what_others_save_beside_the_weights_is_passed_over(tmp_path: Path, alone: ProcessGroups):
    engine = engine_of(published(tmp_path, "deepseek_v3"), alone)
    extra = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.eh_proj.weight")
    changed(tmp_path, lambda w: w.update({name: torch.ones(3) for name in extra}))
    load_weights(tmp_path, engine.model, engine.named_state())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: "),
        ({"config.json": '{"model_type": "dbrx"}'}, "model_type = 'dbrx': its weights' names are not known; known: "),
        ({"config.json": json.dumps(CONFIGS["olmoe"])}, f"holds neither {SINGLE} nor {INDEX}"),
        ({"config.json": json.dumps(CONFIGS["olmoe"]), SINGLE: "short"}, f"{SINGLE}: cannot be read: "),
        ({"config.json": json.dumps(CONFIGS["olmoe"]), INDEX: "{}"}, f"{INDEX}: is not an index of weights: "),
        (
            {"config.json": json.dumps(CONFIGS["olmoe"]), INDEX: '{"weight_map": {"a": "../b"}}'},
            "weight_map names '../b'; ",
        ),
        ({"config.json": json.dumps(CONFIGS["olmoe"] | {"rope_theta": 7.0})}, "config.json: attention is "),
        (
            {"config.json": json.dumps(CONFIGS["olmoe"] | {"rope_scaling": {"type": "linear", "factor": 2.0}})},
            "rope_scaling.rope_type = 'linear': ",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    files: dict[str, str], message: str, tmp_path: Path, alone: ProcessGroups
):
    (tmp_path / "good").mkdir()
    engine = engine_of(published(tmp_path / "good", "olmoe"), alone)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path, engine.model, engine.named_state())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers==5.23.0")
def test_the_references_are_what_transformers_computes(family: str):
    spec = importlib.util.spec_from_file_location("make_hf_references", DATA / "make_hf_references.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    computed, frozen = maker.reference(family), REFERENCES[family]
    assert computed["shapes"] == frozen["shapes"]
    assert computed["loss"] == pytest.approx(frozen["loss"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(computed["logits"]), torch.tensor(frozen["logits"]), rtol=1e-5, atol=1e-5)
    for name, values in frozen["gradients"].items():
        assert computed["gradients"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
