"""Merge methods: importing this package registers every one of them."""

from merging.methods import average, fisher, gradient_matching, regmean, task_arithmetic, ties
from merging.methods.base import BASE, METHODS, Context, Method, Parameter, Prepared, Weight

__all__ = [
    "BASE",
    "METHODS",
    "Context",
    "Method",
    "Parameter",
    "Prepared",
    "Weight",
    "average",
    "fisher",
    "gradient_matching",
    "regmean",
    "task_arithmetic",
    "ties",
]
