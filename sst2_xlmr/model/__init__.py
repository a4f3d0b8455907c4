"""XLM-R in plain PyTorch: texts to ids, pretrained weights, the classifier."""
