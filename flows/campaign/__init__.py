"""A campaign from file to winner: every step of it a file."""
