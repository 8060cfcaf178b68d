"""Pictures of rates and curvatures, drawn on Axes that the caller makes.

  steps (T,)     rates (T, S)              as the state keeps them    names  S group names
  hbar (S, S)    curvatures between groups
  rates, low, high (S,)                    one rate a group, and its range

Needs matplotlib (``pip install "grouped_newton[plot]"``); ``grouped_newton``
itself never imports this module.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

_DISTINCT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_DASHES = ("-", "--", ":", "-.")
_SMALL_TABLE = 12


def plot_rates(ax: Axes, steps: Any, rates: Any, names: Sequence[str], *, learning_rate: Any = 1.0) -> list[Line2D]:
    """Draws the rate of every group over time, on a logarithmic axis.

    What is drawn is the rate that was applied::

      learning_rate * rates_s

    A logarithmic axis has no zero: where a rate is zero its line has a gap, and a
    triangle stands in the group's row at the bottom of the axes.

    Args:
      ax: the matplotlib Axes to draw on.
      steps: when the rates were in force, shape (T,), in steps.
      rates: the state's ``rates`` at these steps, shape (T, S).
      names: the group names, of length S, as ``groups.names`` gives them.
      learning_rate: the factor on all rates, shape (T,) or (), 1 by default.

    Returns:
      The S lines, in the order of the groups.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> lines = plot_rates(ax, [10, 20, 30], [[0.1, 0.3], [0.2, 0.0], [0.4, 0.1]], ["hidden", "output"])
      >>> [line.get_label() for line in lines], ax.get_yscale()
      (['hidden', 'output'], 'log')
    """
    _check_axes(ax)
    steps, rates = np.asarray(steps), np.asarray(rates, dtype=float)
    if steps.ndim != 1 or rates.shape != (len(steps), len(names)):
        raise ValueError(
            f"plot_rates takes steps (T,), rates (T, S) and S names, got shapes {steps.shape} and {rates.shape} and"
            f" {len(names)} names; stack the state's rates over time"
        )
    factor = np.asarray(learning_rate, dtype=float)
    if factor.shape not in ((), steps.shape):
        raise ValueError(f"learning_rate must be one number or of shape {steps.shape} as steps, got {factor.shape}")
    rates = np.maximum(rates, 0) * (factor[:, None] if factor.ndim else factor)
    lines = []
    row = min(0.04, 0.3 / max(len(names), 1))
    at_bottom = ax.get_xaxis_transform()
    for i, (name, colour, dashes) in enumerate(zip(names, *_line_styles(len(names)), strict=True)):
        rate = rates[:, i]
        style = {"color": colour, "linestyle": dashes, "marker": ".", "markersize": 4, "linewidth": 1.6}
        lines += ax.plot(steps, np.where(rate > 0, rate, np.nan), label=name, **style)
        zero = steps[rate == 0]
        height = np.full(len(zero), row * (len(names) - i - 0.5))
        ax.plot(zero, height, "v", color=colour, markersize=3.5, transform=at_bottom, scaley=False)
    ax.set(yscale="log", xlabel="step", ylabel="rate")
    positive = rates[(rates > 0) & np.isfinite(rates)]
    if positive.size and np.any(rates == 0):  # room for the triangles
        low, high, strip = positive.min(), positive.max(), row * len(names) + 0.03
        ax.set_ylim(bottom=low * (low / high) ** (strip / (1 - strip)) * 0.9)
    return lines


def plot_curvature(ax: Axes, hbar: Any, names: Sequence[str]) -> AxesImage:
    """Draws the curvatures between groups, scaled like correlations, as a heat map.

    ::

      hbar_st / sqrt(|hbar_ss hbar_tt|)

    which doesn't depend on the scale of a group's direction. The diagonal is 1,
    or -1 for a group along whose direction the loss curves downwards; an entry off
    the diagonal says how much two groups' steps add to (positive) or undo
    (negative) each other's slope. Colours end at -1 and 1; in a Hessian that
    isn't positive definite numbers may go beyond. Entries of a group without
    curvature are left grey.

    Args:
      ax: the matplotlib Axes to draw on.
      hbar: curvatures, shape (S, S), a summary's or the state's.
      names: the group names, of length S, as ``groups.names`` gives them.

    Returns:
      The image, for a colour bar. Numbers are written into the cells of up to 12
      groups.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes, or a whole summary comes for hbar.

    Example:
      >>> from matplotlib.figure import Figure
      >>> figure = Figure()
      >>> ax = figure.subplots()
      >>> image = plot_curvature(ax, [[4.0, 1.0], [1.0, 1.0]], ["hidden", "output"])
      >>> image.get_array().tolist()
      [[1.0, 0.5], [0.5, 1.0]]
      >>> bar = figure.colorbar(image, ax=ax)
    """
    _check_axes(ax)
    if isinstance(hbar, tuple):
        raise TypeError("plot_curvature takes the array hbar, got a tuple; of a summary give its hbar")
    hbar, S = np.asarray(hbar, dtype=float), len(names)
    if hbar.shape != (S, S):
        raise ValueError(f"plot_curvature takes hbar (S, S) and S names, got shape {hbar.shape} and {S} names")
    size = np.sqrt(np.abs(np.diag(hbar)))
    known = (size[:, None] > 0) & (size[None, :] > 0) & np.isfinite(hbar)
    # Divided one after the other: the product of two sizes may be out of range.
    safe = np.where(size > 0, size, 1)
    scaled = np.ma.masked_array(hbar / safe[:, None] / safe[None, :], ~known)

    colours = mpl.colormaps["PuOr"].with_extremes(bad="0.85")
    image = ax.imshow(scaled, cmap=colours, vmin=-1, vmax=1)
    ax.set_xticks(range(S), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(S), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if S <= _SMALL_TABLE:
        for (s, t), value in np.ndenumerate(scaled):
            if known[s, t]:
                ax.text(t, s, _number(value), ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    return image


def plot_learning_rates(ax: Axes, names: Sequence[str], rates: Any, low: Any, high: Any, peak: Any = None) -> Line2D:
    """Draws one rate a group with its range, on a logarithmic axis, the first group on top.

    Args:
      ax: the matplotlib Axes to draw on.
      names: the group names, of length S.
      rates: shape (S,); a group whose rate is 0 has no point.
      low: the lower ends of the ranges, shape (S,); 0 is drawn to the edge of the axes.
      high: the upper ends, shape (S,).
      peak: the single rate, a vertical line; none by default.

    Returns:
      The points.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> points = plot_learning_rates(ax, ["hidden", "output"], [0.01, 0.1], [0.005, 0.05], [0.02, 0.3], peak=0.03)
      >>> points.get_xdata().tolist(), ax.get_xscale()
      ([0.01, 0.1], 'log')
    """
    _check_axes(ax)
    rates, low, high = (np.asarray(x, dtype=float) for x in (rates, low, high))
    if not rates.shape == low.shape == high.shape == (len(names),):
        raise ValueError(
            f"plot_learning_rates takes S names and rates, low and high (S,), got {len(names)} names and shapes"
            f" {rates.shape}, {low.shape} and {high.shape}"
        )
    rows = np.arange(len(names))
    ax.set(xscale="log", xlabel="learning rate", ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(rows, names, fontsize="medium" if len(names) <= _SMALL_TABLE else "x-small")
    (points,) = ax.plot(np.where(rates > 0, rates, np.nan), rows, "o", color=_DISTINCT[0])
    positive = np.concatenate([x[x > 0] for x in (rates, low, high)])
    least = positive.min() if positive.size else 1.0
    ax.hlines(rows, np.maximum(low, least / 10), np.maximum(high, least / 10), color=_DISTINCT[0], linewidth=1.6)
    if positive.size and np.any(low <= 0):
        ax.set_xlim(left=least / 2)
    if peak is not None:
        ax.axvline(float(peak), color=_DISTINCT[1], linestyle="--", label="one rate for all")
        ax.legend(fontsize="small")
    return points


def _line_styles(number):
    """Colours and dashes that tell ``number`` lines apart, also for the colour-blind."""
    if number <= len(_DISTINCT):
        return _DISTINCT[:number], ("-",) * number
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, number))
    return colours, tuple(_DASHES[i % len(_DASHES)] for i in range(number))


def _number(value):
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}"
    return text.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def _check_axes(ax):
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be one matplotlib Axes, got {type(ax).__name__}; figure.subplots() makes one")
