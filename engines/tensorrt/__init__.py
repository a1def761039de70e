"""TensorRT plans, run with TensorRT and CUDA's bindings alone."""
