"""Linears whose weights have 8 or 4 bits."""
