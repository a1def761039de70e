"""Prompts, with and without pictures, to token ids and positions."""
