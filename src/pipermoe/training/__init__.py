"""A training run: started, led step by step, measured, saved and taken up again. runtime/ executes the steps."""
