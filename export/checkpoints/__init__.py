"""Checkpoints: found, fetched, and read without their weights."""
