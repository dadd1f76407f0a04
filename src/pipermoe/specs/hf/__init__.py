"""Import of Hugging Face `config.json` files: sizes are read, code never is.

`reader` gives typed access with errors that name file and key; `attention`, `layers` and `experts` read one concern
each; `families` says which keys mean what for every `model_type`; `refusals` names what cannot be priced yet.
"""

from pipermoe.specs.hf.families import FAMILIES
from pipermoe.specs.hf.importer import read_config

__all__ = ["FAMILIES", "read_config"]
