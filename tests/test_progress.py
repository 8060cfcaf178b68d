"""The scale that follows the loss: its rule, its windows, spikes, and losses that aren't finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import grouped_newton as gn
from grouped_newton import progress

RULE = gn.success_rule()
SHRINK, GROW, FLOOR = 0.7, 1.2, 1e-3
PERIOD = 10


@functools.partial(jax.jit, static_argnames=("period", "given"))
def watch(losses, period=PERIOD, given=True):
    """The progress after each step, with a refresh at every ``period``-th one, the first included."""

    def step(state, at):
        count, loss = at
        if given:
            state = progress.observe(state, loss, RULE)
            closed = lambda state: progress.close_window(state, RULE)
        else:
            closed = lambda state: progress.judge_refresh(state, loss, RULE)
        state = lax.cond(count % period == 0, closed, lambda state: state, state)
        return state, state

    return lax.scan(step, progress.start(jnp.result_type(float)), (jnp.arange(len(losses)), losses))[1]


def scales(losses, **options):
    return np.asarray(watch(jnp.asarray(losses, jnp.result_type(float)), **options).scale, float)


def plain_scales(losses, period=PERIOD):
    """The rule for given losses, written down once more with lists."""
    scale, window, before = 1.0, [], None
    history = []
    clip = lambda x: min(max(x, FLOOR), 1.0)
    mean, deviation, peak = None, 0.0, -math.inf
    for count, loss in enumerate(losses):
        limit = mean + 8 * deviation if deviation > 0 else None
        if not math.isfinite(loss) or (limit is not None and loss > limit):
            height = loss if math.isfinite(loss) else math.inf
            if height > peak:
                scale, peak = clip(scale * SHRINK), height
            loss = limit
        window += [] if loss is None else [loss]
        if count % period == 0 and len(window) >= 5:
            before, mean = mean, sum(window) / len(window)
            deviation = 0.0 if before is None else sum(abs(v - before) for v in window) / len(window)
            scale = clip(scale * (GROW if before is None or mean <= before else SHRINK))
            window, peak = [], -math.inf
        history.append(scale)
    return np.array(history)


def noisy_descent(steps, seed=0, noise=0.05, to=0.2):
    rng = np.random.default_rng(seed)
    return np.geomspace(1.0, to, steps) * np.exp(noise * rng.standard_normal(steps))


# --- the rule ------------------------------------------------------------------------------------


def test_rule_shrinks_and_grows_between_its_floor_and_one(precision):
    rule = gn.success_rule(0.5, 2.0, 0.25)
    down, up = ([float(rule(jnp.asarray(s, float), fell)) for s in (1.0, 0.6, 0.3)] for fell in (False, True))
    np.testing.assert_allclose(down, [0.5, 0.3, 0.25], rtol=4 * precision)
    np.testing.assert_allclose(up, [1.0, 1.0, 0.6], rtol=4 * precision)


def test_one_failure_in_three_leaves_the_default_scale_at_one_before_it_and_two_do_not():
    run = lambda outcomes: functools.reduce(lambda scale, fell: float(RULE(scale, fell)), outcomes, 1.0)
    assert run([False, True, True] * 30) == 1.0
    assert run([False, False, True] * 30) == pytest.approx(FLOOR * GROW, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"shrink": 0.0},
        {"shrink": 1.0},
        {"shrink": math.nan},
        {"grow": 1.0},
        {"grow": math.inf},
        {"floor": 0.0},
        {"floor": 1.5},
        {"floor": math.nan},
    ],
)
def test_a_rule_out_of_range_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"success_rule needs 0 < shrink < 1 < grow .*{name}={value}"):
        gn.success_rule(**options)


# --- windows of given losses -----------------------------------------------------------------------


def awkward_losses(seed):
    """A noisy descent that turns, with spikes and numbers that aren't finite, in the first window too."""
    rng = np.random.default_rng(seed)
    losses = np.concatenate([noisy_descent(70, seed), noisy_descent(60, seed + 1, 0.2) + 0.1]) - 0.3
    losses[rng.integers(30, 130, 6)] *= 30
    losses[rng.integers(1, 130, 4)] = [math.nan, math.inf, -math.inf, math.nan]
    return losses


@pytest.mark.parametrize("period", [1, 3, PERIOD])
def test_scale_is_that_of_the_rule_written_with_lists(precision, period):
    for seed in range(4):
        losses = np.asarray(jnp.asarray(awkward_losses(seed), float), float)
        expected = plain_scales(losses, period)
        assert {*np.sign(np.diff(expected))} == {-1, 0, 1}
        np.testing.assert_allclose(scales(losses, period=period), expected, rtol=100 * precision)


def test_scale_stays_at_one_while_the_loss_falls():
    for losses in (noisy_descent(200), np.linspace(5.0, -5.0, 200), np.full(200, 0.3)):
        np.testing.assert_array_equal(scales(losses), 1.0)


def test_scale_falls_to_its_floor_while_the_loss_rises_and_comes_back_when_it_falls():
    up_and_down = np.concatenate([np.linspace(1.0, 2.0, 260), np.linspace(2.0, 0.0, 500)])
    scale = scales(up_and_down)
    assert scale[259] == pytest.approx(FLOOR, rel=1e-5)
    # One window has both, and 38 of growth lead from the floor to 1.
    assert scale[-1] == 1.0
    assert np.all(np.diff(scale[280:]) >= 0)


def test_a_window_closes_at_the_first_refresh_with_five_values():
    state = watch(jnp.arange(30.0), period=3)
    closes = np.flatnonzero(np.diff(np.asarray(state.window_mean))) + 1
    np.testing.assert_array_equal(closes, [6, 12, 18, 24])
    np.testing.assert_allclose(state.window_mean[closes], [3.0, 9.5, 15.5, 21.5])
    np.testing.assert_array_equal(state.window_count[:13], [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 0])
    # Distances from the mean of the window before: 7 - 3, ..., 12 - 3.
    np.testing.assert_allclose(state.deviation[closes], [0.0, 6.5, 6.0, 6.0])


def test_losses_are_compared_with_the_window_before_not_with_the_best():
    """Down, up, and half-way down again: the third is progress."""
    scale = scales([2.0, *np.repeat([2.0, 1.0, 3.0, 2.5], PERIOD)])
    np.testing.assert_allclose(scale[[10, 20, 30, 40]], [1.0, 1.0, 0.7, 0.84], rtol=1e-6)


# --- spikes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [50.0, math.inf, math.nan, -math.inf])
def test_a_spike_shrinks_the_scale_at_once_and_it_recovers(bad):
    losses = noisy_descent(100)
    losses[45] = bad
    scale = scales(losses)
    np.testing.assert_array_equal(scale[:45], 1.0)
    np.testing.assert_allclose(scale[45:50], SHRINK, rtol=1e-6)
    assert scale[-1] == 1.0


def test_a_spike_shrinks_the_scale_again_only_while_it_rises():
    losses = noisy_descent(100)
    losses[41:48] = [20.0, 50.0, 50.0, 30.0, 60.0, math.nan, math.inf]
    np.testing.assert_allclose(scales(losses)[41:48], SHRINK ** np.array([1, 2, 2, 2, 3, 4, 4]), rtol=1e-6)


def test_losses_that_are_not_finite_shrink_the_scale_once_a_window():
    losses = noisy_descent(100)
    losses[43:48:2] = math.nan
    losses[53:58:2] = math.nan
    scale = scales(losses)
    np.testing.assert_allclose(scale[43:50], SHRINK, rtol=1e-6)
    np.testing.assert_allclose(scale[53:60], SHRINK * scale[52], rtol=1e-6)


def test_a_spike_starts_eight_deviations_above_the_last_window():
    losses = np.concatenate([np.tile([1.0, 3.0], 20), [1.0]])
    state = watch(jnp.asarray(losses))
    mean, deviation = float(state.window_mean[-1]), float(state.deviation[-1])
    np.testing.assert_allclose([mean, deviation], [1.9, 1.0], rtol=0.06)
    limit = mean + 8 * deviation
    below, above = (scales([*losses, limit + d])[-1] for d in (-0.01, 0.01))
    assert below == scales(losses)[-1]
    assert above == pytest.approx(0.7 * below, rel=1e-6)


def test_a_spike_counts_as_the_limit_in_its_window():
    losses = noisy_descent(70)
    means = []
    for bad in (50.0, 1e30, math.inf, math.nan):
        losses[45] = bad
        means.append(np.asarray(watch(jnp.asarray(losses)).window_mean))
    for mean in means[1:]:
        np.testing.assert_array_equal(mean, means[0])
    assert means[0][50] < 50.0 / PERIOD


def test_before_two_windows_closed_only_losses_that_are_not_finite_are_spikes():
    losses = noisy_descent(20)
    losses[[5, 15]] = 1e3
    np.testing.assert_array_equal(scales(losses)[:20], 1.0)
    losses[4] = math.nan
    state = watch(jnp.asarray(losses))
    np.testing.assert_allclose(state.scale[4:10], SHRINK, rtol=1e-6)
    assert state.window_count[9] == 9  # of ten steps: the one of no number doesn't count


# --- without losses --------------------------------------------------------------------------------


def test_without_losses_those_at_refreshes_are_judged_by_their_average():
    losses = np.where(np.arange(40) % PERIOD == 0, 0.0, math.nan)
    losses[::PERIOD] = [2.0, 1.0, 1.8, 1.6]
    state = watch(jnp.asarray(losses), given=False)
    np.testing.assert_allclose(state.window_mean[::PERIOD], [2.0, 1.7, 1.73, 1.691], rtol=1e-6)
    np.testing.assert_allclose(state.scale[::PERIOD], [1.0, 1.0, 0.7, 0.84], rtol=1e-6)
    np.testing.assert_array_equal(state.window_count, 0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_refresh_whose_loss_is_not_finite_shrinks_and_is_left_out_of_the_average(bad):
    for k in (0, 2):
        losses = np.array([2.0, 1.0, 0.9, 0.8, 0.7])
        clean = watch(jnp.asarray(np.delete(losses, k)), period=1, given=False)
        losses[k] = bad
        state = watch(jnp.asarray(losses), period=1, given=False)
        assert state.scale[k] == pytest.approx(SHRINK, rel=1e-6)
        np.testing.assert_array_equal(np.delete(state.window_mean, k), clean.window_mean)


# --- noise -----------------------------------------------------------------------------------------


def after_comparisons(outcomes, dtype=float, loss=1.0, decrease=0.1, value_dtype=None):
    """``agreed`` after comparisons of losses that are off by so many decreases; None is a step after no refresh."""
    state, history = progress.start(jnp.result_type(dtype)), []
    number = lambda x: jnp.asarray(x, state.predicted.dtype)
    for off in outcomes:
        if off is not None:
            state = progress.predict(state, number(loss - decrease))
        value = loss - decrease + decrease * (5.0 if off is None else off)
        state = progress.compare(state, jnp.asarray(value, value_dtype or state.predicted.dtype), number(loss))
        history.append(float(state.agreed))
    return history


def test_two_agreements_make_a_loss_noiseless_and_one_failure_unmakes_two():
    assert after_comparisons([0.0] * 6) == [1, 2, 3, 4, 4, 4]
    assert after_comparisons([0.0, 1.0, 0.0, 0.0, -1.0]) == [1, 0, 1, 2, 0]
    assert after_comparisons([0.0] * 4 + [1.0, -1.0, 0.0]) == [1, 2, 3, 4, 2, 0, 1]
    assert progress.noiseless(jnp.arange(5.0)).tolist() == [False, False, True, True, True]


def test_agreement_is_within_a_hundredth_of_the_decrease():
    for loss in (1.0, -1.0, 3.0):
        for decrease in (0.1, -0.1):
            outcomes = [0.009, -0.009, 0.011, 0.009, -0.011]
            assert after_comparisons(outcomes, loss=loss, decrease=decrease) == [1, 2, 0, 1, 0]


def test_without_a_refresh_before_or_a_finite_loss_after_it_nothing_is_learnt():
    assert after_comparisons([None, 0.0, None, 0.0, None, None]) == [0, 1, 1, 2, 2, 2]
    start = progress.start(jnp.float32)
    for after in (math.nan, math.inf, -math.inf):
        state = progress.predict(start, jnp.asarray(after))
        assert state.predicted == jnp.finfo(jnp.float32).max
        assert progress.compare(state, 0.9, jnp.array(1.0)).agreed == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_does_not_agree(bad):
    assert after_comparisons([0.0, 0.0, bad]) == [1, 2, 0]


def test_within_the_rounding_of_either_loss_nothing_is_learnt():
    assert after_comparisons([0.0, 0.0, 1.0], "float32", decrease=4e-5) == [0, 0, 0]
    assert after_comparisons([0.0, 0.0, 1.0], "float32", decrease=6e-5) == [1, 2, 0]
    # bfloat16 has steps of 1/128 here: four of them are more than a hundredth of the decrease, or less.
    assert after_comparisons([0.0, 0.0, 1.0], "float32", 1.0, 0.5, "bfloat16") == [0, 0, 0]
    assert after_comparisons([0.0, 0.0, 1.0], "float32", 1.0, 4.0, "bfloat16") == [1, 2, 0]


# --- invariance, dtypes, transforms ------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["given", "at refreshes"])
def test_scale_does_not_depend_on_the_zero_or_the_unit_of_the_loss(x64, given):
    """Of a negative loss neither: nothing is relative to the loss itself."""
    losses = awkward_losses(3)
    expected = scales(losses, given=given)
    for moved in (losses - 100.0, losses + 7.0, 1e-6 * losses, 1e6 * losses - 1e6):
        np.testing.assert_array_equal(scales(moved, given=given), expected)


@pytest.mark.parametrize("size", [1e38, 3e38])
def test_losses_near_the_largest_number_leave_the_state_finite(size):
    sign = np.where(np.arange(60) % 7 < 3, -1.0, 1.0)
    for given in (True, False):
        state = watch(jnp.asarray(size * sign, jnp.float32), given=given)
        assert all(np.all(np.isfinite(x)) for x in state)


@pytest.mark.parametrize("value", [1, 1.5, np.float64(2.0), np.float16(3.0), "bfloat16", "float32", "float64"])
def test_dtypes_and_weak_types_of_the_state_are_kept(x64, value):
    loss = jnp.ones((), value) if isinstance(value, str) else value
    weak = lambda scale, fell: jnp.asarray(1.0)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    for dtype in (jnp.float32, jnp.float64):
        state = progress.start(dtype)
        assert [x.dtype for x in state] == [dtype] * 9
        for rule in (RULE, weak, gn.success_rule(np.float64(0.5), np.float64(2.0), np.float64(0.1))):
            after = jax.eval_shape(
                lambda s, rule=rule: progress.close_window(progress.observe(s, loss, rule), rule), state
            )
            assert jax.tree.map(kind, after) == jax.tree.map(kind, state)
            judged = jax.eval_shape(lambda s, rule=rule: progress.judge_refresh(s, jnp.asarray(loss), rule), state)
            assert jax.tree.map(kind, judged) == jax.tree.map(kind, state)
        predicts = lambda s, now: progress.predict(s, jnp.asarray(loss))
        compares = lambda s, now: progress.compare(s, loss, now)
        for step in (predicts, compares):
            assert jax.tree.map(kind, jax.eval_shape(step, state, jnp.ones((), dtype))) == jax.tree.map(kind, state)


def test_fields_have_buffers_of_their_own():
    """So that the state can be donated."""
    state = progress.start(jnp.float32)
    assert len({x.unsafe_buffer_pointer() for x in state}) == len(state)


def test_vmap_over_runs_equals_a_loop():
    runs = jnp.asarray(np.stack([awkward_losses(seed) for seed in range(3)]))
    together = jax.vmap(watch)(runs)
    for k, run in enumerate(runs):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, k=k: x[k], together), watch(run))
