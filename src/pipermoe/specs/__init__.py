"""The values that all parts agree on, and how they are read and written: models, platforms, strategies, plans."""
