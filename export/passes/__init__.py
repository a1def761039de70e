"""Graph passes, one per file, on onnx-ir's pass classes."""
