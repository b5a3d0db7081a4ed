"""What people do with a backbone after training: feature export, and deployment through ONNX."""
