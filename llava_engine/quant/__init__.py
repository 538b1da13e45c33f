"""Weights in fewer bits than the activations' type, one kind per file."""
