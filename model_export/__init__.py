"""Export of models with a KIVI cache to ONNX. Nothing is exported yet."""
