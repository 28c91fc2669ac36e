"""A real pool to try everything on: a sentence encoder, and members that it fine-tunes on four domains."""
