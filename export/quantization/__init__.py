"""Fewer bits: number formats, recipes, calibration, and what becomes of weights and graphs."""
