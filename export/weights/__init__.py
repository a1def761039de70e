"""Checkpoint tensors to bundle tensors, linked or streamed."""
