"""Models as ONNX graphs, which ONNX Runtime answers with; torch is not needed there."""
