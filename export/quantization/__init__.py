"""Quantize linears: number formats, calibration, recipes, quantized weights and the Q/DQ graph pass."""
