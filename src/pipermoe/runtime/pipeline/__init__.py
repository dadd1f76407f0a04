"""Executing a schedule: stages cut at their all-to-alls, dispatch, transfers, overlap."""
