"""ONNX Runtime, with the CPU, CUDA and TensorRT-RTX providers."""
