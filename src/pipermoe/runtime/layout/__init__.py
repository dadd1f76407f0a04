"""Expert layouts in a run: rows travel to slots, experts between ranks."""
