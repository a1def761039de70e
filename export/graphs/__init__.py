"""Networks to ONNX: blocks traced once, graphs assembled from calls."""
