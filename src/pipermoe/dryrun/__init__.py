"""The dry run: one rank of a job of any size, executed without memory or network."""
