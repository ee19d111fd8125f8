"""Writing the encoder of a run for other programs: timm, torchvision, transformers, ONNX."""
