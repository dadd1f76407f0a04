"""Checkpoints: what they hold, how they are written, how any arrangement resumes them."""
