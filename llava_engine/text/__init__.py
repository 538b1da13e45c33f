"""Text at the edges: prompts to token ids, token ids to text."""
