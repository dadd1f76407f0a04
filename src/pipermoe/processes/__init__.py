"""Processes of one job on one machine: starting ranks, watching them, telling a person what goes on."""
