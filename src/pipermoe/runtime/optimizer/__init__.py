"""Flat parameters, ZeRO sharding, AdamW."""
