"""The network: CLIP vision tower, projector, Llama decoder, and their weights.

Not called `models`: importing a subpackage of that name would put it in the place of the public
function `llava_engine.models`.
"""
