import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from grouped_newton import Summary
from grouped_newton.plotting import plot_curvature, plot_rates


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
    ],
)
def test_bad_input_is_named(ax, call, error, message):
    with pytest.raises(error, match=message):
        call(ax)
