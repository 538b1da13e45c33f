"""Pictures: from a path, bytes, a PIL image or a URL to the pixels a vision tower takes."""
