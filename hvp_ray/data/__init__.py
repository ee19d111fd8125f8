"""Images: sources, decoding, and the order in which they are visited."""
