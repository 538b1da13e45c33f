"""Token ids and pixels in, token ids out: scheduler, paged KV cache, model runner."""
