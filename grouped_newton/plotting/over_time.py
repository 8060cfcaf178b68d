"""Pictures of a training: rates, slopes and decreases over its steps.

steps (T,)     rates (T, S)    as the state keeps them    names  S group names
own, unseen    slopes on the batch of the direction and on others, (T,) and (T,) or (T, N)
predicted, actual (T,)         decreases of the loss in a step
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from grouped_newton.plotting import axes


def plot_rates(
    ax: Axes,
    steps: Any,
    rates: Any,
    names: Sequence[str],
    *,
    learning_rate: Any = 1.0,
    rejected: Any = None,
    spikes: Any = None,
) -> list[Line2D]:
    """Draws the rate of every group over time, on a logarithmic axis.

    What is drawn is the rate that was applied::

      learning_rate * rates_s

    A logarithmic axis has no zero: where a rate is zero its line has a gap, and a
    triangle stands in the group's row at the bottom of the axes. Of more than seven
    groups, colours go from the first (dark) to the last (bright). :func:`label_lines` writes the names
    beside the lines, or ``ax.legend()``; with a few dozen groups see :func:`plot_rate_map` too.

    Args:
      ax: the matplotlib Axes to draw on.
      steps: when the rates were in force, shape (T,), in steps.
      rates: the state's ``rates`` at these steps, shape (T, S).
      names: the group names, of length S, as ``groups.names`` gives them.
      learning_rate: the factor on all rates, shape (T,) or (), 1 by default.
      rejected: whether a refresh was rejected since the last of these steps, shape (T,):
        marked by crosses at the top. Not marked by default.
      spikes: whether there was a spike in the loss, likewise: triangles at the top.

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
    steps, rates = _over_time(ax, steps, rates, names, "plot_rates")
    factor = np.asarray(learning_rate, dtype=float)
    if factor.shape not in ((), steps.shape):
        raise ValueError(f"learning_rate must be one number or of shape {steps.shape} as steps, got {factor.shape}")
    rates = np.maximum(rates, 0) * (factor[:, None] if factor.ndim else factor)
    lines, S = [], len(names)
    row = min(0.04, 0.3 / max(S, 1))
    at_bottom = ax.get_xaxis_transform()
    thick = {"marker": ".", "markersize": 4, "linewidth": 1.6}
    style = thick if S <= axes.SMALL_TABLE else {"linewidth": 1.1}
    for i, (name, colour, dashes) in enumerate(zip(names, *axes.line_styles(S), strict=True)):
        rate = rates[:, i]
        shown = np.where(rate > 0, rate, np.nan)
        lines += ax.plot(steps, shown, label=name, color=colour, linestyle=dashes, **style)
        zero = steps[rate == 0]
        height = np.full(len(zero), row * (S - i - 0.5))
        ax.plot(zero, height, "v", color=colour, markersize=3.5, transform=at_bottom, scaley=False)
    axes.log_axis(ax.yaxis, axes.finite(rates))
    ax.set(xlabel="step", ylabel="rate")
    marked = [when for when in (rejected, spikes) if when is not None and np.any(when)]
    _leave_room(ax, axes.finite(rates), below=np.any(rates == 0) and row * S + 0.03, above=0.06 * len(marked))
    _mark_steps(ax, steps, rejected, "rejected", "rejected refresh", "x", "-")
    _mark_steps(ax, steps, spikes, "spikes", "spike in the loss", "^", ":")
    return lines


def plot_rate_map(ax: Axes, steps: Any, rates: Any, names: Sequence[str]) -> QuadMesh:
    """Draws the rates of many groups over time as a heat map, a row a group, the first on top.

    Colours are logarithmic. Where a rate is zero, or not finite, the map is grey.

    Args:
      ax: the matplotlib Axes to draw on, best with a tenth of an inch a group.
      steps: when the rates were in force, shape (T,), ascending, in steps.
      rates: the state's ``rates`` at these steps, shape (T, S), times the learning rate.
      names: the group names, of length S, as ``groups.names`` gives them.

    Returns:
      The mesh, for a colour bar.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> figure = Figure()
      >>> ax = figure.subplots()
      >>> mesh = plot_rate_map(ax, [10, 20, 30], [[0.1, 0.3], [0.2, 0.0], [0.4, 0.1]], ["hidden", "output"])
      >>> mesh.get_array().tolist()
      [[0.1, 0.2, 0.4], [0.3, None, 0.1]]
      >>> bar = figure.colorbar(mesh, ax=ax, label="rate")
    """
    steps, rates = _over_time(ax, steps, rates, names, "plot_rate_map")
    S = len(names)
    table = np.ma.masked_array(rates.T, ~((rates.T > 0) & np.isfinite(rates.T)))
    positive = table.compressed()
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    norm = LogNorm(low, high if high > low else 1.1 * low)
    colours = mpl.colormaps["viridis"].with_extremes(bad="0.85")
    mesh = ax.pcolormesh(_edges(steps), np.arange(S + 1) - 0.5, table, norm=norm, cmap=colours, rasterized=True)
    axes.name_ticks(ax.yaxis, names, axes.size_of(ax)[1] / max(S, 1))
    ax.set(ylim=(max(S, 1) - 0.5, -0.5), xlabel="step")
    return mesh


def plot_slopes(ax: Axes, steps: Any, own: Any, unseen: Any) -> tuple[Line2D, Line2D]:
    """Draws the slope along the direction on the batch that it is of, and on batches that it hasn't seen.

    ``sum(gbar)`` of a summary along u, on either batch. What lies between them is noise of the batch, to which the
    direction is fitted; where the unseen slope is near zero, noise is all that is left. The axis is logarithmic,
    and goes both ways from zero where there are negative slopes.

    Args:
      ax: the matplotlib Axes to draw on.
      steps: shape (T,).
      own: the slopes on the direction's own batch, shape (T,), in loss per rate.
      unseen: those on another batch, shape (T,), or on N of them, (T, N), whose mean is drawn with a
        band from the 10 % to the 90 % quantile.

    Returns:
      The lines of own and of unseen slopes.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots()
      >>> own, unseen = plot_slopes(ax, [10, 20, 30], [3.0, 2.0, 1.0], [2.5, 1.0, -0.1])
      >>> own.get_label(), unseen.get_label(), ax.get_yscale()
      ('own batch', 'unseen batch', 'symlog')
    """
    axes.check_axes(ax)
    steps, own, unseen = (np.asarray(x, dtype=float) for x in (steps, own, unseen))
    if steps.ndim != 1 or own.shape != steps.shape or unseen.ndim not in (1, 2) or unseen.shape[:1] != steps.shape:
        raise ValueError(
            "plot_slopes takes steps (T,), own (T,) and unseen (T,) or (T, N), got shapes"
            f" {steps.shape}, {own.shape} and {unseen.shape}"
        )
    mean = unseen
    if unseen.ndim == 2:
        mean, (low, high) = unseen.mean(1), np.quantile(unseen, (0.1, 0.9), axis=1)
        ax.fill_between(steps, low, high, color=axes.ORANGE, alpha=0.25, linewidth=0)
    style = {"linewidth": 1.6, "marker": ".", "markersize": 4}
    label = "unseen batch" if unseen.ndim == 1 else f"{unseen.shape[1]} unseen batches"
    (first,) = ax.plot(steps, own, color=axes.BLUE, label="own batch", **style)
    (second,) = ax.plot(steps, mean, color=axes.ORANGE, label=label, **style)
    numbers = axes.finite(own, mean)
    if numbers.size and np.all(numbers > 0):
        axes.log_axis(ax.yaxis, numbers)
    else:
        axes.signed_log_axis(ax.yaxis, numbers, share=0.5)
    ax.set(xlabel="step", ylabel="slope (loss per rate)")
    return first, second


def plot_decrease(ax: Axes, predicted: Any, actual: Any, *, steps: Any = None) -> PathCollection:
    """Draws actual decreases of the loss over predicted ones, with the diagonal on which they agree.

    Both axes are logarithmic and alike; where the loss rose, or was predicted to, they go both ways from
    zero. A shade reaches from half to twice the prediction.

    Args:
      ax: the matplotlib Axes to draw on, best square.
      predicted: decreases by a model, as ``gbar @ eta - eta @ hbar @ eta / 2``, shape (T,).
      actual: ``L(theta) - L(theta - sum_s eta_s u_s)`` on the summary's batch, shape (T,).
      steps: of each refresh, shape (T,), for colours by time, dark to bright. One colour by default.

    Returns:
      The points, for a colour bar.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: if ``ax`` isn't one Axes.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure(figsize=(4, 4)).subplots()
      >>> points = plot_decrease(ax, [0.1, 0.2, 0.05], [0.09, 0.3, -0.01])
      >>> points.get_offsets().tolist()
      [[0.1, 0.09], [0.2, 0.3], [0.05, -0.01]]
    """
    axes.check_axes(ax)
    predicted, actual = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    times = None if steps is None else np.asarray(steps, dtype=float)
    if predicted.ndim != 1 or actual.shape != predicted.shape or (times is not None and times.shape != actual.shape):
        shape = None if times is None else times.shape
        raise ValueError(
            "plot_decrease takes predicted (T,), actual (T,) and steps (T,) or None, got shapes"
            f" {predicted.shape}, {actual.shape} and {shape}"
        )
    numbers = axes.finite(predicted, actual)
    if np.any(numbers <= 0):
        for axis in (ax.xaxis, ax.yaxis):
            axes.signed_log_axis(axis, numbers)
        below = axes.linear_below(numbers)
        ends = min(2 * numbers.min(), -below), max(2 * numbers.max(), below)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axes.log_axis(axis, numbers)
        ends = axes.limits(numbers, room=0.08)
    ax.set(xlim=ends, ylim=ends, xlabel="predicted decrease of the loss", ylabel="actual decrease of the loss")
    least = np.abs(numbers[numbers != 0]).min(initial=ends[1]) / 10
    line = np.geomspace(least, max(map(abs, ends)), 200)
    line = np.concatenate([-line[::-1], line]) if ends[0] < 0 else line
    ax.fill_between(line, line / 2, line * 2, color="0.92", linewidth=0, zorder=0)
    ax.plot(line, line, color="0.55", linewidth=1, zorder=1)
    colours = {"color": axes.BLUE} if times is None else {"c": times, "cmap": "viridis"}
    size = float(np.clip(2000 / max(len(actual), 1), 8, 30))
    return ax.scatter(predicted, actual, s=size, linewidths=0, alpha=0.8, zorder=2, **colours)


def label_lines(lines: Sequence[Line2D]) -> list[Annotation]:
    """Writes the names of lines beside their right ends, in their colours, instead of a legend.

    Up to twelve lines are all named, the names moved apart where ends are close. Of more, as many as have room,
    the topmost and the lowest first; the others fade. What marks at the top mean stands above the axes. Call it
    when all is drawn, on a figure with ``layout="constrained"`` or with room on the right.

    Args:
      lines: lines on one Axes with labels, as :func:`plot_rates` returns them.

    Returns:
      The names.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = Figure(layout="constrained").subplots()
      >>> lines = plot_rates(ax, [10, 20], [[0.1, 0.3], [0.2, 0.1]], ["hidden", "output"])
      >>> [name.get_text() for name in label_lines(lines)]
      ['output', 'hidden']
    """
    ends = [(line, _end(line)) for line in lines]
    ends = sorted([(line, end) for line, end in ends if end is not None], key=lambda pair: pair[1][1])
    if not ends:
        return []
    ax = ends[0][0].axes
    axes.check_axes(ax)
    size = min(axes.font_points(mpl.rcParams["legend.fontsize"]), 9.0)
    gap = 1.25 * size / axes.size_of(ax)[1]
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = np.array([to_axes.transform(end)[1] for _, end in ends])
    chosen = range(len(ends)) if len(ends) <= axes.SMALL_TABLE else _far_apart(heights, gap)
    texts, names = [], axes.shortened([line.get_label() for line, _ in ends])
    for i, height in zip(chosen, _moved_apart(heights[list(chosen)], gap), strict=True):
        line, end = ends[i]
        leader = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        at = {"xytext": (1.03, height), "textcoords": ax.transAxes, "va": "center", "annotation_clip": False}
        texts.append(ax.annotate(names[i], end, color=line.get_color(), size=size, arrowprops=leader, **at))
    for i in set(range(len(ends))) - set(chosen):
        ends[i][0].set_alpha(0.35)
    marks = [x for x in ax.get_lines() if x.get_linestyle() == "None" and not x.get_label().startswith("_")]
    if marks:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0, "borderpad": 0.2}
        ax.legend(handles=marks, ncols=len(marks), frameon=False, fontsize=size, handletextpad=0, **place)
    return texts


def _over_time(ax, steps, rates, names, whose):
    axes.check_axes(ax)
    steps, rates = np.asarray(steps), np.asarray(rates, dtype=float)
    if steps.ndim != 1 or rates.shape != (len(steps), len(names)):
        raise ValueError(
            f"{whose} takes steps (T,), rates (T, S) and S names, got shapes {steps.shape} and {rates.shape} and"
            f" {len(names)} names; stack the state's rates over time"
        )
    return steps, rates


def _leave_room(ax, rates, below, above):
    """Keeps shares of a logarithmic axis free of the lines."""
    rates = rates[rates > 0]
    if rates.size and (below or above):
        low, high = axes.limits(rates, room=0.05, least=0.04)
        decades = np.log10(high / low) / (1 - below - above)
        ax.set_ylim(low / 10 ** (decades * below), high * 10 ** (decades * above))


def _mark_steps(ax, steps, when, whose, label, marker, dashes):
    """Marks at the top of the axes, and faint lines down from them."""
    if when is None:
        return
    when = np.asarray(when, dtype=bool)
    if when.shape != steps.shape:
        raise ValueError(f"{whose} must be of shape {steps.shape} as steps, got {when.shape}")
    if not when.any():
        return
    at, height = steps[when], 0.965 if marker == "x" else 0.915
    for x in at:
        ax.axvline(x, ymax=height, color="0.75", linewidth=0.8, linestyle=dashes, zorder=0)
    style = {"linestyle": "none", "color": "0.25", "markersize": 5, "label": label}
    ax.plot(at, np.full(len(at), height), marker, transform=ax.get_xaxis_transform(), scaley=False, **style)


def _edges(steps):
    """The ends of the cells around the steps, (T + 1,)."""
    if len(steps) < 2:
        return np.array([steps[0] - 0.5, steps[0] + 0.5]) if len(steps) else np.array([0.0])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _end(line):
    """The last point of a line that is finite, or None."""
    x, y = (np.asarray(data, dtype=float) for data in line.get_data())
    (there,) = np.nonzero(np.isfinite(x) & np.isfinite(y))
    return (x[there[-1]], y[there[-1]]) if there.size else None


def _far_apart(heights, gap):
    """Of ascending heights, numbers of some no closer than ``gap``, the outermost first."""
    chosen = [len(heights) - 1]
    distance = np.abs(heights - heights[-1])
    while (farthest := int(distance.argmax())) not in chosen and distance[farthest] >= gap:
        chosen.append(farthest)
        distance = np.minimum(distance, np.abs(heights - heights[farthest]))
    return sorted(chosen)


def _moved_apart(heights, gap):
    """The ascending heights in [0, 1] that are ``gap`` apart and, in the least squares, closest to the given ones."""
    steps = gap * np.arange(len(heights))
    means, counts = [], []
    for height in heights - steps:  # of which the closest ascending ones are found by pooling
        means.append(height)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    pooled = np.repeat(means, counts)
    return np.clip(pooled, 0, max(0, 1 - steps[-1])) + steps
