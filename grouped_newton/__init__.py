"""Exact second- and third-order learning rates, for all parameters or per group of them, for JAX.

See ``grouped_newton`` for the optimizer and ``summarize`` for the derivatives.
"""

from grouped_newton import groups
from grouped_newton.advice import LearningRates, suggest_learning_rates
from grouped_newton.along import losses_along
from grouped_newton.averaging import AverageParamsState, average_params, eval_params
from grouped_newton.cubic import CubicSolution, CubicStatus, solve_cubic
from grouped_newton.damping import AdaptiveDamping, ModelError, adaptive_damping
from grouped_newton.derivatives.curvature import diagonal, gauss_newton_summary
from grouped_newton.derivatives.summary import Summary, summarize
from grouped_newton.derivatives.tensors import derivative_tensors
from grouped_newton.metrics import metrics
from grouped_newton.optimizer import grouped_newton
from grouped_newton.rates import cubic_rates, edge_rates, growing_period
from grouped_newton.transform import GroupedNewtonState, scale_by_grouped_newton

__version__ = "0.1.0"

__all__ = [
    "AdaptiveDamping",
    "AverageParamsState",
    "CubicSolution",
    "CubicStatus",
    "GroupedNewtonState",
    "LearningRates",
    "ModelError",
    "Summary",
    "adaptive_damping",
    "average_params",
    "cubic_rates",
    "derivative_tensors",
    "diagonal",
    "edge_rates",
    "eval_params",
    "gauss_newton_summary",
    "grouped_newton",
    "groups",
    "growing_period",
    "losses_along",
    "metrics",
    "scale_by_grouped_newton",
    "solve_cubic",
    "suggest_learning_rates",
    "summarize",
]
