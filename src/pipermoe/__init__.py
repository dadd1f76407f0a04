"""pipermoe: find, predict and run the best way to train a Mixture-of-Experts language model.

A training run is four decisions, each a small immutable value that one part of the package makes and every other part
reads: `Strategy`, `Schedule`, `ExchangePlan` and `ExpertLayout`. Importing this package is cheap and never imports
torch.
"""

__version__ = "0.1.0"
