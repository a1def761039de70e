"""TensorRT plans from a bundle's graphs."""
