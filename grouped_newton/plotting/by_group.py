"""Pictures of one moment: a quantity of each group, curvatures between groups, the loss along a group.

names          S group names
values (S,)    one number a group             spread (N, S)    the same, measured N times
hbar (S, S)    curvatures between groups
phi_s(eta)  =  L(theta - eta u_s)             losses (N,)      of it, at etas (N,)
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import SymLogNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from grouped_newton.plotting import axes


def plot_by_group(ax: Axes, values: Any, names: Sequence[str], *, spread: Any = None) -> PathCollection:
    """Draws one number a group as a dot beside the group's name, the first group on top.

    The axis is logarithmic, and goes both ways from zero where some numbers are
    negative: those are orange, and without ``spread`` a line goes from zero to each dot. On an axis without
    zero a triangle at its left end stands for a number that is zero; a cross
    for one that isn't finite.

    Args:
      ax: the matplotlib Axes to draw on, best with a seventh of an inch a group.
      values: slopes, rates, ``abs(third) ** (1 / 3)``, ..., shape (S,).
      names: the group names, of length S, as ``groups.names`` gives them.
      spread: the same quantity on N batches, or the two ends of a range, shape (N, S):
        a bar from the least to the largest, with a small dot for each of them. None by default.

    Returns:
      The dots, at (value, number of the group).

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> dots = plot_by_group(ax, [0.01, 0.2], ["hidden", "output"], spread=[[0.005, 0.1], [0.02, 0.5]])
      >>> dots.get_offsets().tolist(), ax.get_xscale()
      ([[0.01, 0.0], [0.2, 1.0]], 'log')
    """
    axes.check_axes(ax)
    values, S = np.asarray(values, dtype=float), len(names)
    spread = np.empty((0, S)) if spread is None else np.asarray(spread, dtype=float)
    if values.shape != (S,) or spread.ndim != 2 or spread.shape[1] != S:
        raise ValueError(
            f"plot_by_group takes values (S,), S names and spread (N, S), got shapes {values.shape} and {spread.shape}"
            f" and {S} names"
        )
    numbers, rows = axes.finite(values, spread), np.arange(S)
    left = -np.inf
    if np.any(numbers < 0):
        drawn = values
        axes.signed_log_axis(ax.xaxis, numbers)
        if not len(spread):
            ax.hlines(rows, 0, np.nan_to_num(drawn, posinf=0, neginf=0), color=_sign_colours(values), linewidth=1.2)
    else:
        axes.log_axis(ax.xaxis, numbers)
        left, right = axes.limits(numbers, room=0.1 if np.all(numbers > 0) else 0.2)
        ax.set_xlim(left, right)
        drawn = np.where(values > 0, values, np.nan)
        _marks(ax, rows[values == 0], "<", 0.015)
    _marks(ax, rows[~np.isfinite(values)], "x", 0.015)
    if len(spread):
        finite = np.ma.masked_invalid(np.maximum(spread, left))
        low, high = (x.filled(np.nan) for x in (finite.min(0), finite.max(0)))
        ax.hlines(rows, low, high, color="0.35", linewidth=1.4)
        at = np.broadcast_to(rows, spread.shape)
        ax.scatter(np.where(spread > left, spread, np.nan), at, s=6, color="0.35", linewidths=0)
    dots = ax.scatter(drawn, rows, s=_dot_size(ax, S), c=_sign_colours(values), linewidths=0, zorder=3)
    axes.name_ticks(ax.yaxis, names, _room(ax, S)[1])
    ax.set_ylim(max(S, 1) - 0.4, -0.6)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    return dots


def plot_curvature(ax: Axes, hbar: Any, names: Sequence[str]) -> AxesImage:
    """Draws the curvatures between groups, scaled like correlations, as a heat map.

    ::

      hbar_st / sqrt(|hbar_ss hbar_tt|)

    which doesn't depend on the scale of a group's direction. The diagonal is 1,
    or -1 for a group along whose direction the loss curves downwards; an entry off
    the diagonal says how much two groups' steps add to (positive) or undo
    (negative) each other's slope. Colours end at -1 and 1; in a Hessian that
    isn't positive definite numbers may go beyond. Entries of a group without
    curvature are left grey. :func:`plot_hbar` draws them as they are.

    Args:
      ax: the matplotlib Axes to draw on.
      hbar: curvatures, shape (S, S), a summary's or the state's.
      names: the group names, of length S, as ``groups.names`` gives them.

    Returns:
      The image, for a colour bar. Numbers are written into the cells of up to 12
      groups, where they fit.

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
    hbar = _checked(ax, hbar, names, "plot_curvature")
    size = np.sqrt(np.abs(np.diag(hbar)))
    known = (size[:, None] > 0) & (size[None, :] > 0) & np.isfinite(hbar)
    # Divided one after the other: the product of two sizes may be out of range.
    safe = np.where(size > 0, size, 1)
    scaled = np.ma.masked_array(hbar / safe[:, None] / safe[None, :], ~known)
    return _heat_map(ax, scaled, names, axes.number_text, vmin=-1, vmax=1)


def plot_hbar(ax: Axes, hbar: Any, names: Sequence[str]) -> AxesImage:
    """Draws the curvatures between groups as they are, as a heat map with symmetric-log colours.

    Colours are by ``sign(hbar_st) log |hbar_st|``: orange where two groups undo each other's
    slope, purple where they add to it, and white where a curvature is small. Numbers that
    aren't finite are left grey. Which groups dominate can be seen here, and how groups
    act on each other in :func:`plot_curvature`.

    Args:
      ax: the matplotlib Axes to draw on.
      hbar: curvatures, shape (S, S), a summary's or the state's.
      names: the group names, of length S, as ``groups.names`` gives them.

    Returns:
      The image, for a colour bar. Numbers are written into the cells of up to 12
      groups, where they fit.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes, or a whole summary comes for hbar.

    Example:
      >>> from matplotlib.figure import Figure
      >>> figure = Figure()
      >>> ax = figure.subplots()
      >>> image = plot_hbar(ax, [[400.0, -1.0], [-1.0, 2.0]], ["hidden", "output"])
      >>> image.get_clim()
      (-400.0, 400.0)
      >>> bar = figure.colorbar(image, ax=ax)
    """
    hbar = np.ma.masked_invalid(_checked(ax, hbar, names, "plot_hbar"))
    largest = np.abs(hbar).max() if hbar.count() else 0.0
    largest = float(largest) or 1.0
    below = 10 ** np.floor(np.log10(min(axes.linear_below(hbar.compressed()), largest / 10)))
    norm = SymLogNorm(below, linscale=1, vmin=-largest, vmax=largest, base=10)
    return _heat_map(ax, hbar, names, axes.short_text, norm=norm)


def plot_models(
    ax: Axes,
    summary: Any,
    group: int,
    etas: Any,
    losses: Any,
    *,
    rate: Any = None,
    internal_damping: Any = None,
) -> Line2D:
    """Draws the loss along one group's direction, with its models over it.

    With g, h and t of the group s in the summary, at rates eta::

      loss           phi_s(eta) = L(theta - eta u_s)
      second order   L - g eta + h eta^2 / 2
      third order    L - g eta + h eta^2 / 2 - t eta^3 / 6
      damped         L - g eta + h eta^2 / 2 + lambda |t| |eta|^3 / 6     what cubic_rates minimises

    The axes show the range of the loss; models go out of it.

    Args:
      ax: the matplotlib Axes to draw on.
      summary: a ``Summary`` of the loss at theta along u: fresh, of an average the third order has lost its sign.
      group: s, the number of the group.
      etas: where the loss is given, shape (N,), in ascending order.
      losses: a row of ``losses_along``, shape (N,).
      rate: the rate to mark by a vertical line; none by default.
      internal_damping: lambda, for the damped model; not drawn by default.

    Returns:
      The line of the loss.

    Raises:
      ValueError: if the shapes don't fit or there is no such group.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> import numpy as np
      >>> from grouped_newton import Summary
      >>> ax = Figure().subplots()
      >>> etas = np.linspace(0, 1, 5)
      >>> summary = Summary(2.0, np.array([3.0]), np.array([[4.0]]), np.array([-1.0]))
      >>> line = plot_models(ax, summary, 0, etas, 2 - 3 * etas + 2 * etas**2 + etas**3 / 6, rate=0.7)
      >>> [line.get_label() for line in ax.lines]
      ['loss', 'second order', 'third order', 'rate']
    """
    axes.check_axes(ax)
    etas, losses, gbar = (np.asarray(x, dtype=float) for x in (etas, losses, summary.gbar))
    if etas.ndim != 1 or losses.shape != etas.shape:
        raise ValueError(f"plot_models takes etas (N,) and losses (N,), got shapes {etas.shape} and {losses.shape}")
    if not 0 <= group < len(gbar):
        raise ValueError(f"group must be a number from 0 to {len(gbar) - 1}, got {group}")
    loss, slope = float(summary.loss), gbar[group]
    curvature, third = float(summary.hbar[group][group]), float(summary.third[group])
    (line,) = ax.plot(etas, losses, color="black", linewidth=2.2, label="loss")
    fine = np.linspace(etas.min(), etas.max(), 201) if etas.size else etas
    second = loss - slope * fine + curvature * fine**2 / 2
    ax.plot(fine, second, "--", color=axes.BLUE, linewidth=1.5, label="second order")
    ax.plot(fine, second - third * fine**3 / 6, "-.", color=axes.ORANGE, linewidth=1.5, label="third order")
    if internal_damping is not None:
        damped = second + float(internal_damping) * abs(third) * np.abs(fine) ** 3 / 6
        label = f"damped, \N{GREEK SMALL LETTER LAMDA} = {float(internal_damping):.2g}"
        ax.plot(fine, damped, ":", color=axes.GREEN, linewidth=2, label=label)
    if rate is not None:
        ax.axvline(float(rate), color="0.55", linewidth=1.2, zorder=0, label="rate")
    if (shown := axes.finite(losses)).size:
        low, high = shown.min(), shown.max()
        room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
        ax.set_ylim(low - room, high + room)
    ax.set(xlabel="rate", ylabel="loss")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
    return line


def _checked(ax, hbar, names, whose):
    axes.check_axes(ax)
    if isinstance(hbar, tuple):
        raise TypeError(f"{whose} takes the array hbar, got a tuple; of a summary give its hbar")
    hbar, S = np.asarray(hbar, dtype=float), len(names)
    if hbar.shape != (S, S):
        raise ValueError(f"{whose} takes hbar (S, S) and S names, got shape {hbar.shape} and {S} names")
    return hbar


def _heat_map(ax, table, names, text_of, **colouring):
    """A masked table (S, S) as an image, with names at its sides and, if it is small, numbers in its cells."""
    S = len(names)
    colours = mpl.colormaps["PuOr"].with_extremes(bad="0.85")
    end = max(S, 1) - 0.5
    image = ax.imshow(table, cmap=colours, extent=(-0.5, end, end, -0.5), **colouring)
    room = min(_room(ax, S))
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    upright = {"rotation": 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
    if S <= axes.SMALL_TABLE:
        axes.name_ticks(ax.xaxis, names, 0.55 * room, **slanted)
        _write_numbers(ax, image, table, text_of, room)
    else:
        axes.name_ticks(ax.xaxis, names, room, **upright)
    axes.name_ticks(ax.yaxis, names, room)
    ax.spines[:].set_visible(False)
    return image


def _write_numbers(ax, image, table, text_of, room):
    """Numbers into the cells, where they fit."""
    known = ~np.ma.getmaskarray(table)
    texts = {at: text_of(value) for at, value in np.ndenumerate(table) if known[at]}
    widest = max(map(len, texts.values()), default=1)
    size = min(axes.font_points(mpl.rcParams["font.size"]), 1.35 * room / widest)
    if size < axes.SMALLEST:
        return
    for (s, t), text in texts.items():
        red, green, blue, _ = image.to_rgba(table[s, t])
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        ax.text(t, s, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def _sign_colours(values):
    return np.where(values < 0, axes.ORANGE, axes.BLUE)


def _marks(ax, rows, marker, at):
    ax.plot(np.full(len(rows), at), rows, marker, color="0.35", markersize=4, transform=ax.get_yaxis_transform())


def _dot_size(ax, S):
    return float(np.clip(0.55 * _room(ax, S)[1], 2.5, 7)) ** 2


def _room(ax, S):
    """Points a group, along both sides."""
    return axes.size_of(ax) / max(S, 1)
