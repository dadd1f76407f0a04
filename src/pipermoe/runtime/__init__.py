"""One rank's part of a training step, as strategy, schedule and expert layout say it. training/ makes runs of steps."""
