"""Activations: the tensors that each block keeps from its forward to its backward, mirrored from `runtime/stage.py`."""
