"""What the pictures share: colours that the colour-blind tell apart, scales for both signs, names that fit."""

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

DISTINCT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
BLUE, ORANGE, GREEN = DISTINCT[:3]
SMALL_TABLE = 12  # groups of which every one can be told by its line, or its number be read
_DASHES = ("-", "--", ":", "-.")
SMALLEST = 5.0  # points
LONGEST = 32  # letters of a name


def check_axes(ax):
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be one matplotlib Axes, got {type(ax).__name__}; figure.subplots() makes one")


def line_styles(number):
    """Colours and dashes for ``number`` lines; of more than a few, colours from the first to the last."""
    if number <= len(DISTINCT):
        return DISTINCT[:number], ("-",) * number
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, number))
    dashes = _DASHES if number <= SMALL_TABLE else _DASHES[:1]
    return colours, tuple(dashes[i % len(dashes)] for i in range(number))


def number_text(value, digits=2):
    """A number with ``digits`` decimals, while it is below ten."""
    text = f"{value:.{digits}f}" if abs(value) < 9.995 else f"{value:.0f}"
    return text.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def short_text(value):
    """A number of any size with two digits: 0.012, 340, 1.2e4."""
    plain = value == 0 or 0.001 <= abs(value) < 9995
    text = f"{float(f'{value:.1e}'):.10g}" if plain else f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-")
    return text.replace(".0e", "e").replace("e+", "e").replace("-", "\N{MINUS SIGN}")


def size_of(ax):
    """Width and height of the axes, in points."""
    box = ax.get_window_extent()
    return np.array([box.width, box.height]) * 72 / ax.figure.dpi


def font_points(size):
    return FontProperties(size=size).get_size_in_points()


def name_ticks(axis, names, room, **text):
    """Puts the names at 0, 1, ... on an axis, in letters that fit ``room`` points a name; if need be every k-th."""
    names = shortened(names)
    size = min(0.9 * room, font_points(mpl.rcParams["ytick.labelsize"]))
    every = max(1, int(np.ceil(SMALLEST / max(0.9 * room, 1e-3))))
    axis.set_ticks(range(0, len(names), every), names[::every], fontsize=max(size, SMALLEST), **text)
    axis.set_tick_params(length=0)


def shortened(names):
    """Names without the middle of those that are long, so long that no two look alike."""
    names = list(map(str, names))
    for longest in (LONGEST, 2 * LONGEST):
        head, tail = longest // 3, longest - longest // 3 - 1
        short = [x if len(x) <= longest else f"{x[:head]}\N{HORIZONTAL ELLIPSIS}{x[-tail:]}" for x in names]
        if len(set(short)) == len(set(names)):
            return short
    return names


def finite(*arrays):
    """All finite numbers of the arrays."""
    numbers = np.concatenate([np.ravel(x) for x in arrays])
    return numbers[np.isfinite(numbers)]


def linear_below(values, share=0.1):
    """Where a symmetric-log scale of these values is to be linear: below all but a share of them."""
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    return max(np.quantile(sizes, share), sizes.max() * 1e-6) if sizes.size else 1.0


def limits(values, room=0.06, least=0.1):
    """The ends of a logarithmic axis with all positive values on it, a share of ``room`` left at both."""
    values = values[values > 0]
    if not values.size:
        return 0.1, 10.0
    low, high = np.log10(values.min()), np.log10(values.max())
    room = max(room * (high - low), least)
    return 10 ** (low - room), 10 ** (high + room)


def log_axis(axis, values):
    """Makes an axis logarithmic, with plain numbers at few ticks."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = limits(values, room=0, least=1e-9)
    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    else:
        axis.set_major_locator(LogLocator(subs=(1,) if high > 20 * low else (1, 2, 5), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_text(value)))
    axis.set_minor_formatter(NullFormatter())


def signed_log_axis(axis, values, share=0.1):
    """Makes an axis logarithmic in both directions from zero, and linear for the smallest share of the values."""
    ax, below = axis.axes, linear_below(values, share)
    sides = {"x": (ax.set_xscale, ax.axvline, 0), "y": (ax.set_yscale, ax.axhline, 1)}
    scale, line, side = sides[axis.axis_name]
    scale("symlog", linthresh=below, linscale=0.5)
    line(0, color="0.6", linewidth=0.8, zorder=0)
    ticks = _signed_ticks(values, below, most=np.clip(size_of(ax)[side] // 90, 1, 4))
    axis.set_ticks(ticks, [short_text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _signed_ticks(values, below, most):
    """Zero, and powers of ten on the sides where there are values, at most so many on a side."""
    low, high = np.ceil(np.log10(below)), np.floor(np.log10(np.abs(values).max(initial=below)))
    powers = 10.0 ** np.arange(high, low - 1, -max(1, np.ceil((high - low + 1) / most)))
    powers = powers if powers.size else np.array([below])
    side = lambda values: powers[powers <= values.max(initial=0)]  # a tick beyond them would widen the axis
    return [*-side(-values), 0.0, *side(values)[::-1]]
