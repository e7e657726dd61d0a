"""Models as graphs that answer without this project: ONNX, or a program of torch.export."""
