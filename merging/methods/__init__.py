"""Merge methods: importing this package registers every one of them."""

from merging.methods import core_space, lines
from merging.methods.averaging import average, linear, task_arithmetic
from merging.methods.curvature import fisher_averaging, gradient_matching
from merging.methods.least_squares import ace, distilled, mats, regmean, regmean_propagated, wudi
from merging.methods.method import METHODS, Context, Method, Parameter, Prepared, Weight
from merging.methods.spectral import esm, iso_c, iso_cts, svc, tsv_m
from merging.methods.spherical import karcher, model_stock, multi_slerp, nuslerp, slerp
from merging.methods.task_vectors import arcee_fusion, breadcrumbs, consensus, dare, della, nearswap, ram, sce, ties

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "Parameter",
    "Prepared",
    "Weight",
    "ace",
    "arcee_fusion",
    "average",
    "breadcrumbs",
    "consensus",
    "core_space",
    "dare",
    "della",
    "distilled",
    "esm",
    "fisher_averaging",
    "gradient_matching",
    "iso_c",
    "iso_cts",
    "karcher",
    "linear",
    "lines",
    "mats",
    "model_stock",
    "multi_slerp",
    "nearswap",
    "nuslerp",
    "ram",
    "regmean",
    "regmean_propagated",
    "sce",
    "slerp",
    "svc",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "wudi",
]
