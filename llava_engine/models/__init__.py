"""The network: CLIP vision tower, projector, Llama decoder, and their weights."""
