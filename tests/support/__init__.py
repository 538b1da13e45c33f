"""What several test folders share: checkpoints, tokenizers, servers made for tests."""
