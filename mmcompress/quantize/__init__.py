"""Int8 for a node: of its ONNX graphs (deployed), and simulated in torch (what a trial sees)."""
