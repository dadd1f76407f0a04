"""Published weights in and out: names and layouts of Hugging Face families."""
