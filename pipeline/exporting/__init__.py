"""Convert a trained network to an ONNX graph in float32, float16 or int8, and compare it with PyTorch's outputs."""
