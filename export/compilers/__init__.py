"""Compile a bundle's graphs ahead of time into engines of TensorRT and TensorRT for RTX."""
