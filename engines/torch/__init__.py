"""The PyTorch fallback, which interprets a component's ONNX graph."""
