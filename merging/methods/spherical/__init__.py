"""Lengths and angles of task vectors."""
