"""The record of every candidate, as rows while it is written and as frames for reading."""
