"""The resource model: what a strategy computes, moves, holds and takes, as formulas over arrays."""
