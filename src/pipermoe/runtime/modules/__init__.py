"""The model's modules: plain PyTorch, free of parallelism."""
