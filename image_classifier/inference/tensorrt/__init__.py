"""TensorRT behind the seam: an engine is built from a bundle's ONNX for this machine's GPU, and kept outside the bundle."""
