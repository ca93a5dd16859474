"""TensorRT as a backend: engines are built from a bundle's ONNX file for this GPU and cached outside the bundle."""
