"""Tensors in files: element types, and safetensors by offset."""
