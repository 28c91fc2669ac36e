"""Actors that measure candidates, and the pool of them that a search uses."""
