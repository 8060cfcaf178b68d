"""Pictures of rates, derivatives and models, drawn on Axes that the caller makes.

  by_group     one quantity a group; curvatures between groups; the loss along a group with its models
  over_time    rates, slopes and decreases over training
  axes         what both share: colours, scales, names that fit

Needs matplotlib (``pip install "grouped_newton[plot]"``); ``grouped_newton``
itself never imports this package.
"""

from grouped_newton.plotting.by_group import plot_by_group, plot_curvature, plot_hbar, plot_models
from grouped_newton.plotting.over_time import label_lines, plot_decrease, plot_rate_map, plot_rates, plot_slopes

__all__ = [
    "label_lines",
    "plot_by_group",
    "plot_curvature",
    "plot_decrease",
    "plot_hbar",
    "plot_models",
    "plot_rate_map",
    "plot_rates",
    "plot_slopes",
]
