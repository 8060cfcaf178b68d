import sys

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from grouped_newton import Summary
from grouped_newton.plotting import (
    label_lines,
    plot_by_group,
    plot_curvature,
    plot_decrease,
    plot_hbar,
    plot_models,
    plot_rate_map,
    plot_rates,
    plot_slopes,
)


@pytest.fixture
def ax():
    return Figure().subplots()


def names(number):
    return [f"group {i}" for i in range(number)]


def test_each_line_is_its_groups_applied_rate(ax):
    eta = np.array([[0.1, 3.0], [0.2, 2.0], [0.4, 1.0]])
    lines = plot_rates(ax, [10, 20, 30], eta, names(2), learning_rate=0.5)
    assert [line.get_label() for line in lines] == names(2)
    for s, line in enumerate(lines):
        assert line.get_xdata().tolist() == [10, 20, 30]
        assert np.array_equal(line.get_ydata(), 0.5 * eta[:, s])
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.legend().get_texts()] == names(2)


def test_factors_over_time_scale_every_line_at_their_steps(ax):
    eta = np.array([[0.1, 3.0], [0.2, 2.0], [0.4, 1.0]])
    lines = plot_rates(ax, [10, 20, 30], eta, names(2), learning_rate=np.array([8.0, 2.0, 0.0]))
    for s, line in enumerate(lines):
        assert line.get_ydata()[:2].tolist() == [8 * eta[0, s], 2 * eta[1, s]]
        assert np.isnan(line.get_ydata()[2])  # a schedule that ends at 0


def test_zero_and_negative_rates_are_gaps_with_a_mark_below_all_lines(ax):
    eta = [[0.1, -2.0], [0.0, 1.0], [0.4, 0.0]]
    lines = plot_rates(ax, [1, 2, 3], eta, names(2))
    marks = [line for line in ax.lines if line not in lines]
    assert [np.isnan(line.get_ydata()).tolist() for line in lines] == [[False, True, False], [True, False, True]]
    assert [line.get_xdata().tolist() for line in marks] == [[2], [1, 3]]
    lowest = ax.transAxes.inverted().transform(ax.transData.transform((1, 0.1)))[1]
    assert max(line.get_ydata().max() for line in marks) < lowest


@pytest.mark.parametrize("eta", [np.zeros((3, 2)), np.full((3, 2), np.nan), np.zeros((3, 0))])
def test_rates_that_are_all_zero_or_unknown_can_be_drawn(ax, eta):
    plot_rates(ax, [1, 2, 3], eta, names(eta.shape[1]))
    ax.figure.canvas.draw()


@pytest.mark.parametrize("number", [7, 40])
def test_no_two_lines_look_alike(ax, number):
    lines = plot_rates(ax, [0, 1], np.ones((2, number)), names(number))
    assert len({(to_rgb(line.get_color()), line.get_linestyle()) for line in lines}) == number


def test_the_heat_map_is_the_scaled_curvature_with_its_numbers(ax):
    hbar = np.array([[4.0, 1.0, -6.0], [1.0, 1.0, 0.0], [-6.0, 0.0, -9.0]])
    image = plot_curvature(ax, hbar, names(3))
    expected = np.array([[1.0, 0.5, -1.0], [0.5, 1.0, 0.0], [-1.0, 0.0, -1.0]])
    assert np.array_equal(image.get_array(), expected)
    assert image.get_clim() == (-1, 1)
    numbers = {text.get_position(): text.get_text().replace("\N{MINUS SIGN}", "-") for text in ax.texts}
    assert {at: float(text) for at, text in numbers.items()} == {(t, s): expected[s, t] for s, t in np.ndindex(3, 3)}
    assert [label.get_text() for label in ax.get_yticklabels()] == names(3)
    assert [label.get_text() for label in ax.get_xticklabels()] == names(3)


def test_the_heat_map_does_not_depend_on_the_scale_of_a_group():
    hbar = np.array([[4.0, 1.0], [1.0, 1.0]])
    a = 2.0 ** np.array([500, -500])  # the product of the two diagonal entries is out of range
    maps = [plot_curvature(Figure().subplots(), h, names(2)).get_array() for h in (hbar, a * hbar * a[:, None])]
    assert np.array_equal(*maps)


def test_a_group_without_curvature_is_left_blank(ax):
    image = plot_curvature(ax, [[0.0, 1.0], [1.0, 4.0]], names(2))
    assert image.get_array().mask.tolist() == [[True, True], [True, False]]
    assert len(ax.texts) == 1
    ax.figure.canvas.draw()


ONE = Summary(0.0, [1.0], [[1.0]], [1.0])
NUMBERS = {
    "ordinary": lambda *shape: np.random.default_rng(0).normal(size=shape),
    "zeros": lambda *shape: np.zeros(shape),
    "unknown": lambda *shape: np.full(shape, np.nan),
    "far apart": lambda *shape: np.geomspace(1e-30, 1e30, max(int(np.prod(shape)), 1))[: int(np.prod(shape))].reshape(
        shape
    ),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("S", [0, 1, 60])
def test_every_picture_can_be_drawn_without_a_trace_outside_its_axes(S, kind):
    figure, steps = Figure(figsize=(20, 3)), [1, 2, 3]
    of, settings = NUMBERS[kind], dict(rcParams)
    axes = figure.subplots(1, 8)
    plot_by_group(axes[0], of(S), names(S), spread=of(4, S))
    plot_hbar(axes[1], of(S, S), names(S))
    plot_curvature(axes[2], of(S, S), names(S))
    plot_rate_map(axes[3], steps, of(3, S), names(S))
    label_lines(plot_rates(axes[4], steps, of(3, S), names(S), rejected=[True] * 3, spikes=[False, True, True]))
    plot_slopes(axes[5], steps, of(3), of(3, 5))
    plot_decrease(axes[6], of(S), of(S), steps=of(S))
    plot_models(axes[7], Summary(of(), of(1), of(1, 1), of(1)), 0, of(S), of(S), rate=of(), internal_damping=of())
    figure.canvas.draw()
    assert dict(rcParams) == settings
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_dot_a_group_with_the_first_on_top(ax):
    dots = plot_by_group(ax, [0.01, 0.2, 0.0, np.nan], names(4), spread=[[0.005, 0.1, 0, 1], [0.02, 0.5, 0, 2]])
    assert dots.get_offsets()[:2].tolist() == [[0.01, 0], [0.2, 1]]
    assert dots.get_offsets().mask[2:].any(axis=1).all()
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_yticklabels()] == names(4)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    marks = {line.get_marker(): line.get_ydata().tolist() for line in ax.lines}
    assert marks["<"] == [2]
    assert marks["x"] == [3]
    (bars,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert [segment[:, 0].tolist() for segment in bars.get_segments()[:2]] == [[0.005, 0.02], [0.1, 0.5]]


def test_where_signs_differ_dots_lie_on_both_sides_of_zero_in_two_colours(ax):
    dots = plot_by_group(ax, [-100.0, 2.0, 0.0], names(3))
    assert ax.get_xscale() == "symlog"
    assert dots.get_offsets()[:, 0].tolist() == [-100, 2, 0]
    assert len({tuple(colour) for colour in dots.get_facecolors()}) == 2
    assert 0 in ax.get_xticks()


def test_the_heat_map_of_hbar_keeps_numbers_and_signs(ax):
    hbar = np.array([[4000.0, -1.0], [-1.0, np.nan]])
    image = plot_hbar(ax, hbar, names(2))
    assert image.get_array().tolist() == [[4000, -1], [-1, None]]
    assert image.get_clim() == (-4000, 4000)
    assert image.norm(-1.0) + image.norm(1.0) == pytest.approx(1)
    assert 0.5 < image.norm(1.0) < 0.7 < image.norm(4000.0)
    assert sorted(text.get_text() for text in ax.texts) == ["4000", "\N{MINUS SIGN}1", "\N{MINUS SIGN}1"]


def test_numbers_that_would_be_too_small_are_left_out_and_names_thinned():
    small, large = (Figure(figsize=(side, side)).subplots() for side in (1, 12))
    for axes in (small, large):
        plot_hbar(axes, np.full((12, 12), -1.23e-7), names(12))
        assert all(text.get_fontsize() >= 5 for text in (*axes.texts, *axes.get_yticklabels()))
    assert not small.texts
    assert len(large.texts) == 144
    assert len(small.get_yticklabels()) < 12 == len(large.get_yticklabels())


def test_the_models_are_those_of_the_summary(ax):
    etas = np.linspace(-1, 2, 7)
    loss, g, h, t = 2.0, 3.0, 4.0, -1.5
    phi = loss - g * etas + h * etas**2 / 2 - t * etas**3 / 6
    summary = Summary(loss, np.array([9.0, g]), np.array([[9.0, 1.0], [1.0, h]]), np.array([9.0, t]))
    line = plot_models(ax, summary, 1, etas, phi, rate=0.7, internal_damping=2.0)
    drawn = {line.get_label(): line for line in ax.lines}
    assert drawn["loss"] is line
    assert np.array_equal(line.get_xydata(), np.column_stack([etas, phi]))
    at = lambda name, eta: np.interp(eta, *drawn[name].get_data())
    for eta in (-1.0, 0.5, 2.0):
        second = loss - g * eta + h * eta**2 / 2
        assert at("second order", eta) == pytest.approx(second)
        assert at("third order", eta) == pytest.approx(second - t * eta**3 / 6)
        assert at("damped, λ = 2", eta) == pytest.approx(second + 2 * abs(t) * abs(eta) ** 3 / 6)
    assert drawn["rate"].get_xdata()[0] == 0.7
    low, high = ax.get_ylim()
    assert low < phi.min() < phi.max() < high < phi.max() + np.ptp(phi)


def test_rejected_and_spiking_steps_are_marked_above_the_lines(ax):
    rates = np.array([[0.1], [0.2], [0.4], [0.4]])
    (line,) = plot_rates(ax, [10, 20, 30, 40], rates, names(1), rejected=[1, 0, 0, 1], spikes=[0, 0, 1, 0])
    marks = {mark.get_label(): mark for mark in ax.lines if not mark.get_label().startswith("_") and mark is not line}
    assert marks["rejected refresh"].get_xdata().tolist() == [10, 40]
    assert marks["spike in the loss"].get_xdata().tolist() == [30]
    highest = ax.transAxes.inverted().transform(ax.transData.transform((1, 0.4)))[1]
    assert highest < min(mark.get_ydata().min() for mark in marks.values())


def test_the_map_of_rates_has_a_row_a_group_and_cells_around_the_steps(ax):
    mesh = plot_rate_map(ax, [10, 20, 40], [[0.1, 0.3], [0.2, 0.0], [0.4, np.nan]], names(2))
    assert mesh.get_array().tolist() == [[0.1, 0.2, 0.4], [0.3, None, None]]
    assert mesh.get_coordinates()[0, :, 0].tolist() == [5, 15, 30, 50]
    assert mesh.get_clim() == (0.1, 0.4)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_slopes_of_several_batches_are_a_mean_in_a_band(ax):
    unseen = np.array([[1.0, 2.0, 3.0], [0.5, 0.0, -2.0]])
    own, mean = plot_slopes(ax, [1, 2], [3.0, 1.0], unseen)
    assert own.get_ydata().tolist() == [3, 1]
    assert mean.get_ydata().tolist() == [2, -0.5]
    assert mean.get_label() == "3 unseen batches"
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (np.quantile(unseen[1], 0.1), np.quantile(unseen[0], 0.9))
    assert ax.get_yscale() == "symlog"


@pytest.mark.parametrize(("actual", "scale"), [([0.09, 0.3], "log"), ([0.09, -0.3], "symlog"), ([0.09, 0.0], "symlog")])
def test_points_on_the_diagonal_are_predicted(ax, actual, scale):
    points = plot_decrease(ax, [0.1, 0.2], actual, steps=[10, 20])
    assert points.get_offsets().tolist() == [[0.1, actual[0]], [0.2, actual[1]]]
    assert points.get_array().tolist() == [10, 20]
    assert ax.get_xscale() == ax.get_yscale() == scale
    assert ax.get_xlim() == ax.get_ylim()
    (diagonal,) = (line for line in ax.lines if len(line.get_xdata()) > 2)
    assert np.array_equal(*diagonal.get_data())
    inside = ax.transAxes.inverted().transform(ax.transData.transform(points.get_offsets()))
    assert np.all((inside > 0) & (inside < 1))


def test_names_stand_beside_the_ends_of_their_lines_and_apart(ax):
    rates = np.array([[0.1, 0.2, 0.2], [0.1, 0.101, 0.4], [0.1, 0.102, np.nan]])
    texts = label_lines(plot_rates(ax, [10, 20, 30], rates, names(3)))
    assert [text.get_text() for text in texts] == names(3)
    assert [text.xy for text in texts] == [(30, 0.1), (30, 0.102), (20, 0.4)]
    heights = [text.get_position()[1] for text in texts]
    size = texts[0].get_fontsize() / (ax.get_window_extent().height * 72 / ax.figure.dpi)
    assert np.diff(heights).min() >= size
    assert 0 <= heights[0] < heights[-1] <= 1


def test_of_many_lines_the_outermost_are_named_and_the_others_fade(ax):
    lines = plot_rates(ax, [1, 2], np.geomspace(1, 10, 60) * np.ones((2, 1)), names(60))
    texts = [text.get_text() for text in label_lines(lines)]
    assert texts[0] == "group 0"
    assert texts[-1] == "group 59"
    assert 5 < len(texts) < 30
    assert [line.get_label() for line in lines if line.get_alpha() is None] == texts


LONG = [f"transformer/encoder/layers/{i}/attention/query_key_value/kernel" for i in range(3)]


def test_of_long_names_the_middle_is_left_out():
    """The axes keep room, which a layout that fits them to their names wouldn't leave."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    three = [LONG[0], "mlp/" + "up_projection/" * 4, "head"]
    plot_by_group(left, [0.1, 0.2, 0.3], three)
    plot_hbar(right, np.eye(3), three)
    figure.canvas.draw()
    short = [text.get_text() for text in left.get_yticklabels()]
    assert short == [LONG[0][:10] + "\N{HORIZONTAL ELLIPSIS}" + LONG[0][-21:], short[1], "head"]
    assert {len(text) for text in short} == {32, 4}
    assert min(axes.get_position().width for axes in (left, right)) > 0.1


def test_names_that_would_look_alike_are_written_out(ax):
    alike = ["a" * 30 + str(i) + "b" * 60 for i in range(2)]
    plot_by_group(ax, [0.1, 0.2], alike)
    assert [text.get_text() for text in ax.get_yticklabels()] == alike
    plot_by_group(ax, [0.1, 0.2, 0.3], LONG)  # the number of the layer is in the middle
    assert ["layers/" + str(i) in text.get_text() for i, text in enumerate(ax.get_yticklabels())] == [True] * 3
    texts = label_lines(plot_rates(ax, [1, 2], np.array([[0.1, 0.2]] * 2), [LONG[0], "head"]))
    assert {text.get_text() for text in texts} == {LONG[0][:10] + "\N{HORIZONTAL ELLIPSIS}" + LONG[0][-21:], "head"}


def test_a_few_negative_numbers_take_no_more_than_their_room(ax):
    plot_slopes(ax, [1, 2, 3], [3.0, 2.0, 1.0], [2.5, 1.0, -0.1])
    assert -0.3 < ax.get_ylim()[0] < -0.1
    assert min(ax.get_yticks()) == 0


def test_marks_at_the_top_are_explained_above_the_axes(ax):
    lines = plot_rates(ax, [1, 2], [[0.1], [0.2]], names(1), rejected=[True, False], spikes=[False, True])
    label_lines(lines)
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rejected refresh", "spike in the loss"]
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda ax: plot_rates(ax, [1, 2], [[0.1], [0.2]], names(2)), ValueError, r"\(2, 1\) and 2 names"),
        (lambda ax: plot_rates(ax, [1, 2, 3], [[0.1], [0.2]], names(1)), ValueError, r"\(3,\) and \(2, 1\)"),
        (lambda ax: plot_rates(ax, 1, [[0.1]], names(1)), ValueError, r"got shapes \(\)"),
        (
            lambda ax: plot_rates(ax, [1], [[0.1, 0.2]], names(2), learning_rate=np.ones(2)),
            ValueError,
            r"learning_rate .* \(1,\) .*\(2,",
        ),
        (lambda ax: plot_rates(ax.figure, [1], [[0.1]], names(1)), TypeError, "got Figure; figure.subplots"),
        (lambda ax: plot_curvature(ax, np.eye(2), names(3)), ValueError, r"got shape \(2, 2\) and 3 names"),
        (lambda ax: plot_curvature([ax], np.eye(2), names(2)), TypeError, "got list"),
        (lambda ax: plot_curvature(ax, Summary(0.0, [1.0], [[1.0]], [1.0]), names(1)), TypeError, "its hbar"),
        (lambda ax: plot_hbar(ax, np.eye(2), names(3)), ValueError, "plot_hbar takes hbar"),
        (lambda ax: plot_rates(ax, [1], [[0.1]], names(1), spikes=[True, False]), ValueError, r"spikes .* \(1,\)"),
        (lambda ax: plot_rates(ax, [1], [[0.1]], names(1), rejected=True), ValueError, r"rejected .* got \(\)"),
        (lambda ax: plot_rate_map(ax, [1], [[0.1, 0.2]], names(1)), ValueError, "plot_rate_map takes"),
        (lambda ax: plot_by_group(ax, [0.1], names(2)), ValueError, r"shapes \(1,\)"),
        (lambda ax: plot_by_group(ax, [0.1], names(1), spread=[0.1]), ValueError, r"\(1,\) and 1 names"),
        (lambda ax: plot_slopes(ax, [1, 2], [1, 2], [1]), ValueError, r"\(2,\) and \(1,\)"),
        (lambda ax: plot_decrease(ax, [1], [1], steps=[1, 2]), ValueError, r"and \(2,\)"),
        (lambda ax: plot_models(ax, ONE, 1, [0.0], [1.0]), ValueError, "from 0 to 0, got 1"),
        (lambda ax: plot_models(ax, ONE, 0, [0.0], [[1.0]]), ValueError, r"\(1, 1\)"),
        (lambda ax: plot_slopes(None, [1], [1], [1]), TypeError, "got NoneType"),
    ],
)
def test_bad_input_is_named(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)
