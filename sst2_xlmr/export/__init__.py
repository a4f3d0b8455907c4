"""A trained model for others: a folder in Hugging Face layout, a TorchScript file."""
