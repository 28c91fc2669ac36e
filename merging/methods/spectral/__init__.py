"""Singular vectors and values of task vectors."""
