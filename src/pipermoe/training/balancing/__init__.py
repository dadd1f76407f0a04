"""Whether and when a run lays its experts out anew; runtime/layout carries them."""
