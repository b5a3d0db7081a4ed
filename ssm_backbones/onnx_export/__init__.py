"""Export models to ONNX in standard operators."""
