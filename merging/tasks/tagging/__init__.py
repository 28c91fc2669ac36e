"""Tasks on words with tags."""
