"""The model in plain PyTorch: differentiable modules, free of parallelism."""
