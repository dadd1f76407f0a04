"""Activations: what each block keeps from forward to backward, mirrored from `runtime/pipeline/stage.py`."""
