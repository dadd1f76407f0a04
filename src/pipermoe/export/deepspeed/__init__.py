"""DeepSpeed: plans as its JSON configuration with AutoEP (expert parallelism of Hugging Face models), and back."""
