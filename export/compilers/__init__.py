"""Engines compiled ahead for a bundle."""
