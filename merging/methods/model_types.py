"""Families of architectures for which a method's parameters have other defaults."""

T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop")
"""Model types of T5 and its kin."""
