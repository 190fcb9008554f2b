"""Checkpoints for other programs: Hugging Face Transformers and ONNX, and back."""
