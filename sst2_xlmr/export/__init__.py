"""A trained model's forms: a folder in Hugging Face layout, ONNX, TorchScript, a trimmed vocabulary."""
