"""What is measured and shown of a model, beside its training."""
