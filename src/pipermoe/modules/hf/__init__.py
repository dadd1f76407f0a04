"""Published weights: names and layouts of Hugging Face families."""
