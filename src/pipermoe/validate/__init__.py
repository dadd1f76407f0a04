"""How far predictions are from published measurements: recipe in, prediction out, no tuning per row."""
