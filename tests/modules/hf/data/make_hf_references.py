"""Writes hf_references.json: what transformers computes for the models of tiny_families.py. Needs transformers 5.23.0.

python tests/modules/hf/data/make_hf_references.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers  # pyright: ignore[reportMissingImports]  # lives in an environment of its own
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny_families  # noqa: E402


def checkpoint_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors as they lie in published checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def reference(model_type: str) -> dict:
    config = tiny_families.CONFIGS[model_type]
    made = transformers.CONFIG_MAPPING[model_type].from_dict(dict(config))
    shapes = {name: list(each.shape) for name, each in checkpoint_of(_class(made)(made)).items()}
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: tiny_families.numbers(name, tuple(shape)) for name, shape in shapes.items()}
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(config))
        model = _class(made).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = tiny_families.tokens()
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradients = checkpoint_of(model)
    trained = {name: each for name, each in gradients.items() if not name.endswith("e_score_correction_bias")}
    return {
        "shapes": shapes,
        "loss": loss.item(),
        "logits": [[float(f"{number:.8g}") for number in row] for row in logits.flatten(0, 1).tolist()],
        "gradients": {
            name: [float(f"{number:.8g}") for number in tiny_families.along(name, gradient)]
            for name, gradient in trained.items()
        },
    }


def _class(config: transformers.PretrainedConfig):
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


if __name__ == "__main__":
    families = {model_type: reference(model_type) for model_type in tiny_families.CONFIGS}
    text = json.dumps({"transformers": transformers.__version__, "families": families}, separators=(",", ":"))
    (HERE / "hf_references.json").write_text(text.replace('},"', '},\n"') + "\n")
