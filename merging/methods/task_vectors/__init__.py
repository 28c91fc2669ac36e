"""Elementwise on task vectors: which of their entries are kept, and how these add up."""
