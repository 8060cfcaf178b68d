"""Exact second- and third-order learning rates, one per group of parameters, for JAX.

See ``grouped_newton`` for the optimizer and ``summarize`` for the derivatives.
"""

from grouped_newton import groups
from grouped_newton.cubic import CubicSolution, CubicStatus, solve_cubic
from grouped_newton.rates import cubic_rates, edge_rates
from grouped_newton.summary import Summary, summarize
from grouped_newton.transform import GroupedNewtonState, grouped_newton, scale_by_grouped_newton

__version__ = "0.1.0"

__all__ = [
    "CubicSolution",
    "CubicStatus",
    "GroupedNewtonState",
    "Summary",
    "cubic_rates",
    "edge_rates",
    "grouped_newton",
    "groups",
    "scale_by_grouped_newton",
    "solve_cubic",
    "summarize",
]
