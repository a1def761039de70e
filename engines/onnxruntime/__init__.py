"""ONNX Runtime, with the CPU, CUDA and TensorRT-RTX providers."""

import os

# Builds for Linux send usage data from 1.31 on. Read when onnxruntime is imported, which this package alone does; who
# wants it sets the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
