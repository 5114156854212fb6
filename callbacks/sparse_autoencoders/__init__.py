"""Callbacks for sparse autoencoders: control of the biases, steering, evaluation."""
