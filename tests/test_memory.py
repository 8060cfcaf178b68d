"""The running average of summaries: its weights, its units, and how long it remembers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close_by_largest, assert_equal, assert_finite, at
from jax import lax

import grouped_newton as gn
from grouped_newton.derivatives.summary import Summary
from grouped_newton.memory import LEAST, Memory, empty, remember

RECENT = 0.2
SHARES = [0.0, 0.1, 0.3, 1.0]


def stream(count, S=3, seed=11):
    """Noisy summaries of positive curvature."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal((count, *shape))
    root = draw(S, S)
    numbers = Summary(draw(), 1 + draw(S), root @ root.swapaxes(1, 2) + np.eye(S), draw(S))
    return jax.tree.map(jnp.asarray, numbers)


def scaled(summaries, a):
    """Each summary of a stream times a number of its own: that of the loss times it."""
    return jax.tree.map(lambda x: x * jnp.asarray(a, x.dtype).reshape(-1, *[1] * (x.ndim - 1)), summaries)


@jax.jit
def memories(summaries, share, eta):
    """The memory after each summary of a stream."""

    def step(carry, new):
        memory, count = carry
        memory = remember(memory, new, count, share, eta)
        return (memory, count + 1), memory

    return lax.scan(step, (empty(len(eta), summaries.gbar.dtype), jnp.int32(1)), summaries)[1]


def weight(k, share):
    return max(1 / k, 1 / (LEAST + share * k)) if share else 1.0


def plain_memory(summaries, share, eta):
    """The last memory, in float64 by a loop over lists."""
    loss, gbar, hbar, third = (np.asarray(x, np.float64) for x in summaries)
    g, H, T, recent = 0.0, 0.0, 0.0, 0.0
    for k in range(1, len(loss) + 1):
        w = weight(k, share)
        recent = recent + max(1 / k, RECENT) * (abs(np.diag(hbar[k - 1])) - recent)
        old = 0.0 if k == 1 else abs(np.diag(H)) @ eta**2
        c = min(1.0, recent @ eta**2 / old) if old else 1.0
        g, H, T = ((1 - w) * c * a + w * b for a, b in ((g, gbar[k - 1]), (H, hbar[k - 1]), (T, abs(third[k - 1]))))
    return Memory(Summary(loss[-1], g, H, T), recent)


@jax.jit
@jax.vmap
def rates(memory):
    """Those of the edge rule."""
    return gn.edge_rates(1.5)(memory.average, 1.0).eta


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_the_memory_is_that_of_a_plain_loop(precision, share):
    """Over summaries whose curvature falls and rises."""
    summaries, eta = scaled(stream(60), np.exp(2 * np.sin(np.arange(60) / 7))), np.array([0.5, 2.0, 0.1])
    found = at(memories(summaries, share, jnp.asarray(eta)), -1)
    # Sixty roundings, and the quotients of sums that c is.
    assert_close_by_largest(found, plain_memory(summaries, share, eta), 64 * precision)
    assert {x.dtype for x in jax.tree.leaves(found)} == {summaries.gbar.dtype}


@pytest.mark.parametrize("share", SHARES[1:])
def test_at_constant_curvature_the_average_is_the_weighted_mean_with_the_latest_loss(precision, share):
    """The weights written down: 1 - w of all later ones, times its own."""
    summaries = stream(70)._replace(hbar=jnp.broadcast_to(jnp.eye(3), (70, 3, 3)))
    w = np.array([weight(k, share) for k in range(1, 71)])
    weights = w * np.append(np.cumprod((1 - w)[:0:-1])[::-1], 1.0)
    assert weights.sum() == pytest.approx(1)
    found = at(memories(summaries, share, jnp.ones(3)), -1)
    mean = lambda x: np.tensordot(weights, np.asarray(x, np.float64), axes=1)
    expected = Summary(summaries.loss[-1], *(mean(x) for x in (summaries.gbar, summaries.hbar, abs(summaries.third))))
    assert_close_by_largest(found.average, expected, 70 * precision)
    assert found.average.loss == summaries.loss[-1]


def test_share_zero_keeps_the_latest_to_the_bit(precision):
    summaries = scaled(stream(8), 2.0 ** np.array([0, 9, -9, 3, 0, -20, 20, 1]))
    found = memories(summaries, 0.0, jnp.ones(3))
    latest = summaries._replace(third=jnp.abs(summaries.third))
    assert_equal(found.average, latest)


@pytest.mark.parametrize("share", SHARES)
def test_the_first_summary_is_taken_as_it_is_whatever_was_there_before(precision, share):
    """So that the first direction's own summary is forgotten."""
    old, new = at(stream(2), 0), at(stream(2), 1)
    before = remember(empty(3, old.gbar.dtype), old, jnp.int32(1), share, jnp.zeros(3))
    fresh, again = (remember(m, new, jnp.int32(1), share, jnp.ones(3)) for m in (empty(3, old.gbar.dtype), before))
    assert_equal(again, fresh)
    assert_equal(again.average, new._replace(third=jnp.abs(new.third)))


@pytest.mark.parametrize("share", SHARES)
def test_a_constant_stream_is_its_own_average(precision, share):
    one = at(stream(1), 0)
    constant = jax.tree.map(lambda x: jnp.broadcast_to(x, (30, *x.shape)), one)
    found = at(memories(constant, share, jnp.ones(3)), -1)
    assert_close_by_largest(found.average, one._replace(third=jnp.abs(one.third)), 64 * precision)
    assert np.any(one.third < 0)


# --- units ---------------------------------------------------------------------------------------


def test_rates_do_not_change_when_summaries_are_multiplied_by_numbers(precision):
    """All by one, to the bit; and one summary by powers of two of its own at every refresh, up and down."""
    some = stream(30)
    found = memories(some, 0.3, jnp.ones(3))
    again = memories(scaled(some, 2.0**-9 + np.zeros(30)), 0.3, jnp.ones(3))
    assert_equal(again.average, jax.tree.map(lambda x: x * 2.0**-9, found.average)._replace(loss=again.average.loss))
    np.testing.assert_allclose(rates(again), rates(found), rtol=100 * precision)  # by a cube root

    constant = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), some)
    factors = 2.0 ** np.random.default_rng(0).integers(-20, 21, 30)
    found = rates(memories(scaled(constant, factors), 0.3, jnp.ones(3)))
    assert np.any(found[0] > 0)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), rtol=1000 * precision)


def ratios(curvatures, ratio, share=0.3):
    """The averages' slope over curvature, of one group, for curvatures and the ratio at every refresh."""
    h, r = (jnp.asarray(x, float) for x in np.broadcast_arrays(curvatures, ratio))
    found = memories(Summary(h, (r * h)[:, None], h[:, None, None], h[:, None]), share, jnp.ones(1))
    return np.asarray(found.average.gbar[:, 0] / found.average.hbar[:, 0, 0])


def test_when_curvature_falls_old_summaries_do_not_outvote_and_when_it_rises_the_new_one_does(x64):
    """The quotient changes from 1 to 3 at the thirtieth summary, as the curvature does by 2^5 or 2^10."""
    later = np.arange(120) >= 30
    ratio = np.where(later, 3.0, 1.0)
    constant, falls, rises = (ratios(np.where(later, a, 1.0), ratio) for a in (1.0, 2.0**-5, 2.0**10))
    # In absolute units thirty against thirty would have the weight of 1 to 32.
    absolute = np.average(ratio[:60], weights=np.where(later, 2.0**-5, 1.0)[:60])
    assert absolute < 1.1
    assert 1.5 < falls[59] < constant[59]
    assert constant[119] - falls[119] < 0.2
    np.testing.assert_array_equal(rises[:30], 1.0)
    np.testing.assert_allclose(rises[30:], 3.0, rtol=0.05)


def test_a_slow_fall_of_curvature_is_no_longer_memory(x64):
    """They fall by 2^40 in all, and the quotients rise: as with constant ones, but for a lag."""
    k = np.arange(400)
    ratio = 1 + k / 100
    constant, falls = ratios(1.0, ratio), ratios(2.0 ** (-k / 10), ratio)
    np.testing.assert_allclose(falls[100:], constant[100:], rtol=0.1)
    absolute = np.average(ratio[:200], weights=2.0 ** (-k[:200] / 10))
    assert absolute < 1.2 < falls[199]


@pytest.mark.parametrize("share", SHARES)
def test_scales_of_the_groups_directions_scale_the_memory_to_the_bit(precision, share):
    """By powers of two: gbar by a, hbar by a_s a_t, third by a^3, rates by 1 / a."""
    some, eta = scaled(stream(40), np.exp(np.cos(np.arange(40)))), jnp.array([0.5, 1.0, 4.0])
    a = jnp.asarray(2.0 ** np.array([-7, 0, 5]), some.gbar.dtype)
    aa = a[:, None] * a[None]
    other = Summary(some.loss, some.gbar * a[None], some.hbar * aa[None], some.third * a[None] ** 3)
    found, again = memories(some, share, eta), memories(other, share, eta / a)
    loss, gbar, hbar, third = found.average
    average = Summary(loss, gbar * a[None], hbar * aa[None], third * a[None] ** 3)
    expected = Memory(average, found.recent * a[None] ** 2)
    assert_equal(again, expected)


def test_a_summary_of_zeros_and_rates_of_zero_leave_the_memory_finite():
    zero = jax.tree.map(jnp.zeros_like, stream(10))
    for summaries, eta in ((zero, jnp.ones(3)), (stream(10), jnp.zeros(3))):
        found = memories(summaries, 0.3, eta)
        assert_finite(found)


# --- how long it remembers -------------------------------------------------------------------------


def test_the_half_life_is_a_share_of_the_summaries_so_far(x64):
    """Once they are many: but for the ten that it has at least, nothing in it is a number of summaries."""
    share = 0.3
    counts = np.array([100, 10_000])
    # The last that have half of the weight: w_k integrated.
    half = (counts + LEAST / share) * (1 - 0.5**share)
    g = np.arange(1, counts[-1] + 1)[:, None] > (counts - half)[None]
    found = memories(
        Summary(jnp.zeros(len(g)), jnp.asarray(g, float), *(jnp.ones((len(g), *s)) for s in ((2, 2), (2,)))),
        share,
        jnp.ones(2),
    )
    for s, k in enumerate(counts):
        assert found.average.gbar[k - 1, s] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(half / counts, [0.2504, 0.1884], atol=1e-4)


# --- transforms, dtypes ------------------------------------------------------------------------------


def test_memories_vmap_over_shares_and_streams(precision):
    streams = jax.tree.map(lambda *xs: jnp.stack(xs), stream(6), stream(6, seed=1))
    shares = jnp.array([0.0, 0.3])
    together = jax.vmap(memories, in_axes=(0, 0, None))(streams, shares, jnp.ones(3))
    for k in range(2):
        assert_close_by_largest(at(together, k), memories(at(streams, k), shares[k], jnp.ones(3)), 16 * precision)


def test_dtypes_are_kept_and_nothing_is_weak(x64):
    for dtype in (jnp.float32, jnp.float64):
        before = empty(3, dtype)
        new = jax.tree.map(lambda x, dtype=dtype: x[0].astype(dtype), stream(1))
        for share in (0.3, 0, np.float64(0.3), jnp.asarray(0.3)):
            after = jax.eval_shape(functools.partial(remember, share=share), before, new, jnp.int32(1), eta=new.gbar)
            kinds = lambda m: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(m)]
            assert kinds(after) == kinds(before)
            assert not any(x.weak_type for x in jax.tree.leaves(after))
    assert len({x.unsafe_buffer_pointer() for x in jax.tree.leaves(empty(3, jnp.float32))}) == 5
