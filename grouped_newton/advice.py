"""Which learning rates to type, by summaries on batches that their direction hasn't seen, and by short trials.

  batches   b_0 ... b_(n-1)
  u_i       the direction of b_i's gradient at theta_i                    like the params
  s_i       the summary along u_i at theta_i of the loss on b_(i+1): gbar_i, hbar_i, |third_i|
  c_i       |u_i^T (hess L) u_i|, the curvature along the whole direction, or what it is on the average where that
            is larger: s_i / c_i is free of the loss's unit, and no batch without curvature outweighs the others
  edge      edge_rates of the mean of s_i / c_i

A *walk* trains over the batches at greedy rates, edge_rates(1) of the mean over the last 30 steps: at the start
curvatures are large and rates small, and a few dozen steps later they are what most of a run has. What is read off are
the means over its second half. *Trials* then train over the same batches anew, at rates a factor of three apart around
the edge; the loss of a trial is that of each batch before its step, over the last quarter of them.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grouped_newton import groups as _groups
from grouped_newton import trees
from grouped_newton.damping import model_error
from grouped_newton.derivatives.summary import (
    Summary,
    one_number,
    summarize,
    summary_dtype,
    summary_of,
    zero_summary,
)
from grouped_newton.direction import in_float32
from grouped_newton.rates import edge_rates

_MEMORY = 30  # steps that the walk averages over
_CHANGE = 3  # the most by which its rate grows or falls in a step
_READINGS = 12  # summaries by group
_SPACING = 3.0  # between the rates of trials
_FARTHEST = 4  # from the edge, in spacings
_WARMUP = 10  # steps of a trial
_DRAWS = 200  # with replacement, of the batches behind a mean
_LOW, _HIGH = 0.1, 0.9  # quantiles of the draws
_OF_STEPS = 3000  # the length for which the best trial's rate is the best peak
_POWER = 1 / 3  # of that length over the run's


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Suggested learning rates; printed, a table.

    All rates are peaks of a schedule that warms up and decays to zero, as warm-up and cosine, for a run of ``steps``.

    Attributes:
      names: of the groups, S of them.
      rates: of each group, (S,); the single rate where a group's own is lost in noise, its ``low`` being 0.
      low: 10 % quantiles of the groups' own rates over draws of the batches with replacement, (S,).
      high: 90 % quantiles, (S,).
      peak: the best single rate.
      peak_low: its 10 % quantile over draws.
      peak_high: its 90 % quantile.
      edge: the single rate by the summaries alone, without trials and ``steps``.
      decrease: the largest fall of the loss in one step that the quadratic model predicts, with one rate and with
        a rate a group in the ratios suggested, in the loss's unit.
      slope_error: standard error of the slope along the direction over the slope. Above 1/2 little is known.
      trials: rate -> loss, of the short runs; empty without.
      steps: length of the run that the rates are for; None, as for 3,000.
      gradients: how many were computed.
      summaries: how many were computed; one costs 1.5 to 3 gradients, and one by group as docs/cost.md says.
      labels: the groups as a tree like the params, where NNX has a variable a label; None where a leaf holds
        several groups, as stacked layers do.
    """

    names: tuple[str, ...]
    rates: np.ndarray
    low: np.ndarray
    high: np.ndarray
    peak: float
    peak_low: float
    peak_high: float
    edge: float
    decrease: tuple[float, float]
    slope_error: float
    trials: dict[float, float]
    steps: int | None
    gradients: int
    summaries: int
    labels: Any = dataclasses.field(repr=False)

    @property
    def by_group(self) -> dict[str, float]:
        """Group name -> rate."""
        return dict(zip(self.names, map(float, self.rates), strict=True))

    def transforms(
        self, make: Callable[[float], optax.GradientTransformation] = optax.adamw
    ) -> dict[Hashable, optax.GradientTransformation]:
        """Group name -> ``make(rate)``, for ``optax.partition(suggested.transforms(make), suggested.labels)``.

        A ValueError where a leaf holds several layers: ``optax.partition`` has one transform a leaf.
        """
        if self.labels is None:
            raise ValueError(
                f"some parameters hold several of the groups {', '.join(self.names)}, and optax.partition has one"
                " transform for each of them; take peak for all, or give groups without stacked layers, such as"
                " groups.by_path"
            )
        return {name: make(rate) for name, rate in self.by_group.items()} | {_groups.FROZEN: optax.set_to_zero()}

    def plot(self, ax: Any = None) -> Any:
        """Draws the rates with their quantiles on the given Axes, or new ones; returns the Axes."""
        from grouped_newton import plotting

        if ax is None:
            import matplotlib.pyplot as plt

            height = 1.2 + 0.25 * len(self.names)
            ax = plt.subplots(figsize=(6, height), layout="constrained")[1]
        plotting.plot_by_group(ax, self.rates, self.names, spread=[self.low, self.high])
        ax.axvline(float(self.peak), color="0.35", linestyle="--", linewidth=1, zorder=0, label="one rate for all")
        low, high = ax.get_xlim()
        ax.set(xlabel="learning rate", xlim=(min(low, self.peak / 1.2), max(high, self.peak * 1.2)))
        ax.legend(fontsize="small")
        return ax

    def __str__(self) -> str:
        rows = [("one rate", self.peak, self.peak_low, self.peak_high)]
        if len(self.names) > 1:
            rows += zip(self.names, self.rates, self.low, self.high, strict=True)
        width = max(len("group"), *(len(row[0]) for row in rows))
        lines = [f"{'group':{width}}  {'rate':>8}  10 % to 90 % of draws"]
        for name, rate, low, high in rows:
            lost = "  (its own is lost in noise)" if low <= 0 and name in self.names else ""
            lines.append(f"{name:{width}}  {rate:8.2g}  {low:.2g} to {high:.2g}{lost}")
        single, grouped = self.decrease
        both = f" with one rate, {grouped:.2g} with one a group" if len(self.names) > 1 else ""
        lines += [
            f"peaks of warm-up and cosine over {self.steps or _OF_STEPS} steps; by the summaries alone {self.edge:.2g}",
            f"largest decrease in a step by the model: {single:.2g}{both}",
            f"standard error of the slope: {100 * self.slope_error:.0f} %",
        ]
        tried = sorted(self.trials)
        if tried and min(tried, key=lambda rate: self.trials[rate]) in (tried[0], tried[-1]):
            lines.append("the best trial is at the end of those made: the best rates may lie beyond")
        return "\n".join(lines)


def suggest_learning_rates(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    groups: _groups.Grouping = _groups.per_module,
    direction: optax.GradientTransformation | None = None,
    state: Any = None,
    steps: int | None = None,
    factor: float = 1.8,
    trials: bool = True,
    max_batches: int = 100,
    progress: bool = True,
) -> LearningRates:
    """The peak learning rates for your own optimizer: one for all parameters, and one a group.

    A short *walk* trains a copy of the params over the batches. Each step's direction u is measured on
    the next batch, which it hasn't seen, and the walk's own rate is the greedy one of these measurements, the edge
    rate without its factor::

      edge = factor * <grad L, u> / (u^T (hess L) u),  shortened by the third derivative

    averaged over the second half of the walk; the ratios between groups are those of :func:`edge_rates`, and 1
    for a group whose slope is lost in noise.
    *Trials* over the same batches, at rates a factor of 3 apart around the edge, then find which level
    trains best, and the rates of all groups are multiplied alike. For a run of ``steps``::

      peak = rate of the best trial * (3000 / steps)^(1/3)

    A step of the walk that makes the loss rise by more than its model's own terms isn't taken, and the next
    is shorter. Params and state are left as they are. With n batches it costs about n gradients, n summaries and
    n losses for the walk, n gradients a trial, most often three to five of them, and 12 summaries by group: in
    all the time of about 8 n steps of training.

    Args:
      loss_fn: ``(params, batch) -> loss``, one real number; close over keys and drop auxiliary outputs.
      params: where training is to go on, a pytree of real floating-point arrays.
      batches: an iterable of at least 2 different batches, better 50 to 100, as training sees them. For
        a loss without noise, ``[batch] * 100``.
      groups: a grouping, see :mod:`grouped_newton.groups`; a group a module by default.
      direction: what your optimizer makes of gradients, neither negated nor scaled by a rate. Adam's by
        default, ``optax.scale_by_adam(b1=0.9, b2=0.999)``, which is AdamW's too.
      state: of that direction, as training left it: ``opt_state[0]`` of ``optax.adamw``, an NNX optimizer's
        too, of all params or of those that aren't frozen. None starts anew.
      steps: the length of the run that is to come; by default, as for 3,000.
      factor: in (0, 2), of the edge rates: 1 is the greedy step, 2 the edge of stability.
      trials: whether to try the rates in short runs; without, the level is the edge's, and the cost half.
      max_batches: the most that are taken from ``batches``, and kept.
      progress: whether to show a bar, where tqdm is installed.

    Returns:
      A :class:`LearningRates`.

    Raises:
      ValueError: if there are fewer than 2 batches or their structures differ, the loss isn't finite, the
        direction is negated, the model has no minimum along it or the loss doesn't fall, the grouping or
        ``state`` doesn't fit, or ``factor`` or ``steps`` is out of range.
      TypeError: if ``direction`` isn't a gradient transformation, or ``loss_fn`` doesn't return one number.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> loss = lambda params, batch: 2 * jnp.sum(params["w"] ** 2) * batch
      >>> params = {"w": jnp.ones(3)}
      >>> sgd = {"direction": optax.identity(), "trials": False}
      >>> suggested = suggest_learning_rates(loss, params, [1.0, 1.0], **sgd)
      >>> round(suggested.peak, 4)  # 1.8 over the curvature, 4
      0.45

    References:
      Pierre Wolinski, Adapting Newton's Method to Neural Networks through a Summary of Higher-Order
      Derivatives, arXiv 2312.03885, for the summaries; trials instead of the range test of Leslie N. Smith,
      Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186.
    """
    _check_options(steps, max_batches)
    taken = _taken(batches, max_batches)
    problem = _problem(loss_fn, params, groups, direction, edge_rates(factor).factor)
    state = None if state is None else _fitting(state, problem, params)
    with _bar(progress, len(taken), trials) as bar:
        measured = _measure(problem, state, taken, bar)
        tried, level = _try(problem, state, taken, measured.edge, bar) if trials else ({}, 1.0)
    scale = level * (1.0 if steps is None else (_OF_STEPS / steps) ** _POWER)
    quantiles = lambda draws: scale * np.quantile(draws, (_LOW, _HIGH), axis=0)
    (low, high), (peak_low, peak_high) = quantiles(measured.draws), quantiles(measured.edge_draws)
    return LearningRates(
        names=problem.names,
        rates=scale * measured.rates,
        low=low,
        high=high,
        peak=scale * measured.edge,
        peak_low=float(peak_low),
        peak_high=float(peak_high),
        edge=measured.edge,
        decrease=measured.decrease,
        slope_error=measured.slope_error,
        trials=tried,
        steps=steps,
        gradients=len(taken) - 1 + len(tried) * len(taken) + measured.readings,
        summaries=len(taken) - 1 + measured.readings,
        labels=problem.labels,
    )


class _Problem(NamedTuple):
    """What is measured: ``loss(theta, batch)``, theta being the params without frozen leaves."""

    loss: Callable
    theta: Any
    names: tuple[str, ...]
    labels: Any
    partition: _groups.Partition  # of theta
    dtype: Any
    direction: optax.GradientTransformationExtraArgs
    factor: float


class _Measured(NamedTuple):
    edge: float
    edge_draws: np.ndarray  # (draws,)
    rates: np.ndarray  # (S,)
    draws: np.ndarray  # (draws, S)
    decrease: tuple[float, float]
    slope_error: float
    readings: int


def _problem(loss_fn, params, groups, direction, factor):
    direction = in_float32(optax.scale_by_adam(b1=0.9, b2=0.999)) if direction is None else direction
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation such as optax.scale_by_adam(), got {direction!r}"
        )
    partition = _groups.resolve(groups, params)
    leaves, treedef = jax.tree.flatten(params)
    name_of = lambda g: _groups.FROZEN if g < 0 else partition.names[g]
    labels = jax.tree.unflatten(jax.tree.structure(params, is_leaf=_is_variable), [name_of(g) for g in partition.index])
    labels = None if any(partition.layers) else labels  # optax.partition has one transform a leaf

    def loss(theta, batch):
        moving = iter(jax.tree.leaves(theta))
        whole = [x if g < 0 else next(moving) for x, g in zip(leaves, partition.index, strict=True)]
        value = loss_fn(jax.tree.unflatten(treedef, whole), batch)
        return one_number("loss_fn must return", value, "lambda params, batch: loss_fn(params, batch)[0]")

    theta, moving = trees.without_frozen(partition, params), partition.without_frozen()
    direction, dtype = optax.with_extra_args_support(direction), summary_dtype(params, partition)
    return _Problem(loss, theta, partition.names, labels, moving, dtype, direction, factor)


def _is_variable(x):
    """Whether an array is wrapped as NNX does, whose optimizer shows optax the variable at init and its array later."""
    return [keys for keys, _ in jax.tree_util.tree_leaves_with_path(x)] == [(jax.tree_util.GetAttrKey("value"),)]


def _check_options(steps, max_batches):
    for name, number in (("steps", steps), ("max_batches", max_batches)):
        if number is not None and not (number >= 1 and number == int(number)):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")


def _taken(batches, most):
    """A list of the first batches, which have one structure; their shapes may differ."""
    batches = list(itertools.islice(batches, most))
    if len(batches) < 2:
        raise ValueError(
            f"suggest_learning_rates takes at least 2 batches, better 50 to 100, got {len(batches)}; a direction is"
            " measured on the batch after its own. For a loss without noise, [batch] * 50"
        )
    first, *others = [str(jax.tree.structure(batch)) for batch in batches]
    for i, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(f"all batches must be alike, got {other} as batch {i} and {first} as batch 0")
    return batches


def _fitting(state, problem, params):
    """The direction's state as its ``init`` makes it, by its leaves, which NNX wraps; one of all params is cut down."""
    leaves = list(map(jnp.asarray, jax.tree.leaves(state)))

    def as_initialised(theta):
        """The leaves in the tree and the dtypes of the state for theta; None if they are others."""
        expected, treedef = jax.tree.flatten(jax.eval_shape(problem.direction.init, theta))
        if [x.shape for x in leaves] == [x.shape for x in expected]:
            cast = [x.astype(y.dtype) for x, y in zip(leaves, expected, strict=True)]
            return jax.tree.unflatten(treedef, cast)
        return None

    if (fitting := as_initialised(problem.theta)) is not None:
        return fitting
    with contextlib.suppress(TypeError):  # frozen leaves that aren't numbers: no direction has a state for them
        if (fitting := as_initialised(params)) is not None:
            return _without_frozen(fitting, problem)
    expected = jax.tree.leaves(jax.eval_shape(problem.direction.init, problem.theta))
    raise ValueError(
        f"state must be that of the direction at these params, {len(expected)} arrays of their shapes, got"
        f" {len(leaves)} arrays; of a chain give the direction's part, as opt_state[0] of optax.adamw"
    )


def _without_frozen(state, problem):
    is_frozen = lambda x: isinstance(x, optax.MaskedNode)
    frozen = jax.tree.map(is_frozen, problem.theta, is_leaf=is_frozen)
    return optax.tree.map_params(problem.direction, lambda x, f: optax.MaskedNode() if f else x, state, frozen)


# The walk


class _Walk(NamedTuple):
    """Where the walk is; everything changes at every step."""

    theta: Any
    state: Any
    size: jax.Array  # mean of |u_i^T (hess L) u_i|
    mean: Summary  # of s_i / c_i
    steps: jax.Array
    rate: jax.Array


def _measure(problem, state, batches, bar):
    """Walks over the batches and reads the edge rates off the second half."""
    step, by_group = jax.jit(functools.partial(_walk_on, problem)), jax.jit(functools.partial(_by_group, problem))
    pairs = list(itertools.pairwise(batches))
    half, S = len(pairs) // 2, len(problem.names)
    read_at = {round(i) for i in np.linspace(half, len(pairs) - 1, _READINGS)} if S > 1 else ()
    number = jnp.zeros((), problem.dtype)
    begin = problem.direction.init(problem.theta) if state is None else state
    walk = _Walk(problem.theta, begin, number, zero_summary(1, problem.dtype), number, number)
    single, grouped = [], []
    for i, (batch, unseen) in enumerate(pairs):
        if i in read_at:
            grouped.append(by_group(walk, batch, unseen))
        walk, summary, own = step(walk, batch, unseen)
        if i == 0:
            _check_first(float(own[0]), float(own[1]), fresh=state is None)
        single.append(summary)
        bar.update()
    whole, by_groups = _stacked(single), _stacked(grouped) if S > 1 else None
    _check_finite(whole, range(len(pairs)))
    if by_groups is not None:
        _check_finite(by_groups, sorted(read_at))
    return _read(problem, jax.tree.map(lambda x: x[half:], whole), by_groups)


def _walk_on(problem, walk, batch, unseen):
    """One greedy step of the walk, what was measured, and the loss and slope on the step's own batch."""
    (value, grads), (u, state) = _direction(problem, walk, batch)
    summary = summarize(lambda theta: problem.loss(theta, unseen), walk.theta, u, _groups.single)
    summary = summary._replace(third=jnp.abs(summary.third))
    steps, curvature = jnp.minimum(walk.steps + 1, _MEMORY), jnp.abs(summary.hbar[0, 0])
    size = walk.size + (curvature - walk.size) / steps
    unit = jnp.maximum(curvature, size)
    unit = jnp.where(unit > 0, unit, 1)
    mean = jax.tree.map(lambda mean, x: mean + (x / unit - mean) / steps, walk.mean, summary)
    rate = _bounded_change(edge_rates(1.0)(mean, 1.0).eta[0], walk.rate)
    theta = _moved(walk.theta, rate, u)
    # Not taken where the loss rises by more than the model's own terms, or a walk may never come back.
    gross = model_error(summary, rate[None], problem.loss(theta, unseen)).gross
    theta = jax.tree.map(lambda before, after: jnp.where(gross, before, after), walk.theta, theta)
    rate = jnp.where(gross, rate / _CHANGE**2, rate)
    return _Walk(theta, state, size, mean, steps, rate), summary, (value, optax.tree.vdot(grads, u))


def _by_group(problem, walk, batch, unseen):
    _, (u, _) = _direction(problem, walk, batch)
    summary = summary_of(lambda theta: problem.loss(theta, unseen), walk.theta, u, problem.partition)
    return summary._replace(third=jnp.abs(summary.third))


def _direction(problem, walk, batch):
    value, grads = jax.value_and_grad(problem.loss)(walk.theta, batch)
    return (value, grads), problem.direction.update(grads, walk.state, walk.theta)


def _check_first(value, slope, fresh):
    """Raises a ValueError for a loss that isn't finite, or a direction that leads uphill on its own batch."""
    if not math.isfinite(value):
        raise ValueError(f"the loss of the params on the first batch is {value}; rates need one that is finite")
    if fresh and slope < 0:  # with momentum it may, for a while
        raise ValueError(
            f"the direction leads uphill: its product with the gradient is {slope:.3g}. Pass one that isn't negated,"
            " as optax.scale_by_adam(), not optax.adam(1e-3)"
        )


def _check_finite(summaries, steps):
    """Raises a ValueError that names the first batches with a loss or derivatives that aren't finite."""
    finite = np.all([np.isfinite(x.reshape(len(x), -1)).all(1) for x in summaries], axis=0)
    if not finite.all():
        i = steps[int(np.argmin(finite))]
        raise ValueError(
            f"the loss or its derivatives aren't finite on batches {i} and {i + 1} (from 0), after {i} steps of a short"
            " training at greedy rates; leave bad batches out, or pass fewer"
        )


def _bounded_change(rate, last):
    """The rate, at most a factor away from the last one; 0 where the rule has none is a fall by that factor."""
    return jnp.where(last > 0, jnp.clip(rate, last / _CHANGE, last * _CHANGE), rate)


def _moved(theta, rate, u):
    with jax.numpy_dtype_promotion("standard"):  # strict rules let half precision meet nothing
        return optax.apply_updates(theta, optax.tree.scale(-rate, u))


# Reading


def _read(problem, single, grouped):
    """The edge rates of summaries with a leading axis of batches: with one group, and with all unless there is one."""
    edge, edge_draws = _edge(problem.factor, single)
    rates, draws = (edge, edge_draws) if grouped is None else _edge(problem.factor, grouped)
    rates = np.where(np.quantile(draws, _LOW, axis=0) > 0, rates, edge)  # a rate of 0 would freeze a group for noise
    if edge[0] == 0:
        slope, curvature = single.gbar.mean(), single.hbar.mean()
        raise ValueError(
            f"no rate was found: the loss doesn't fall along the direction (mean slope {slope:.3g}) or its model has no"
            f" minimum there (mean curvature {curvature:.3g}). Training may have converged, or the direction is negated"
        )
    readings = single if grouped is None else grouped
    unit = _unit(readings)
    size, mean = float(np.exp(np.log(unit).mean())), _mean(_scaled(readings, unit))

    def fall(eta):
        """The most by which the quadratic model falls in a step with multiples of these rates."""
        curvature = float(eta @ mean.hbar @ eta)
        return size * float(mean.gbar @ eta) ** 2 / (2 * curvature) if curvature > 0 else math.inf

    slopes = _scaled(single, _unit(single)).gbar[:, 0]
    error = slopes.std(ddof=1) / math.sqrt(len(slopes)) / abs(slopes.mean()) if len(slopes) > 1 else math.inf
    return _Measured(
        edge=float(edge[0]),
        edge_draws=edge_draws[:, 0],
        rates=rates,
        draws=draws,
        decrease=(fall(np.full(len(rates), edge[0])), fall(rates)),
        slope_error=float(error),
        readings=0 if grouped is None else len(grouped.loss),
    )


def _edge(factor, summaries):
    """The rule's rates of the mean over batches, (S,), and of the means of draws with replacement, (draws, S)."""
    scaled, n = _scaled(summaries, _unit(summaries)), len(summaries.loss)
    drawn = np.random.default_rng(0).integers(0, n, (_DRAWS, n))
    means = jax.tree.map(lambda x: np.concatenate([x.mean(0)[None], x[drawn].mean(1)]), scaled)
    eta = np.asarray(_edges(means, factor))
    return eta[0], eta[1:]


@jax.jit
def _edges(means, factor):
    """The edge rates of several summaries."""
    return jax.vmap(lambda summary: edge_rates(factor)(summary, 1.0).eta)(means)


def _unit(summaries):
    """c_i, (n,): the size of the curvature along the whole direction, at least their median."""
    unit = np.abs(summaries.hbar.sum((1, 2)))
    unit = np.maximum(unit, np.median(unit))
    return np.where(unit > 0, unit, 1)


def _scaled(summaries, unit):
    return jax.tree.map(lambda x: x / unit.reshape(-1, *[1] * (x.ndim - 1)), summaries)


def _mean(summaries):
    return jax.tree.map(lambda x: x.mean(0), summaries)


def _stacked(summaries):
    return jax.tree.map(lambda *xs: np.stack(xs), *summaries)


# Trials


def _try(problem, state, batches, edge, bar):
    """Rate -> loss of short runs around the edge, and the best level over the edge."""
    begin = problem.direction.init(problem.theta) if state is None else state

    @jax.jit
    def step(theta, state, batch, rate):
        value, grads = jax.value_and_grad(problem.loss)(theta, batch)
        u, state = problem.direction.update(grads, state, theta)
        return _moved(theta, rate, u), state, value

    warmup = min(_WARMUP, max(1, len(batches) // 5))

    @functools.cache
    def loss_at(k):
        """Of the last quarter of the batches, each before its own step."""
        theta, s, values = problem.theta, begin, []
        for i, batch in enumerate(batches):
            rate = edge * _SPACING**k * min(1, (i + 1) / warmup)
            theta, s, value = step(theta, s, batch, jnp.asarray(rate, problem.dtype))
            values.append(value)
            bar.update()
        loss = float(np.mean(values[-max(1, len(values) // 4) :]))
        return loss if math.isfinite(loss) else math.inf

    low, high = -1, 1
    while True:
        losses = {k: loss_at(k) for k in range(low, high + 1)}
        best = min(losses, key=lambda k: losses[k])
        if best == low > -_FARTHEST:
            low -= 1
        elif best == high < _FARTHEST:
            high += 1
        else:
            break
    if math.isinf(losses[best]):
        raise ValueError(
            f"all trials diverged, at rates from {edge * _SPACING**low:.2g}; pass trials=False to see the edge"
        )
    beside = (losses.get(best - 1, losses[best]), losses.get(best + 1, losses[best]))
    level = _SPACING ** (best + _vertex(beside[0] - losses[best], beside[1] - losses[best]))
    return {edge * _SPACING**k: loss for k, loss in losses.items()}, level


def _vertex(left, right):
    """Where the parabola through (-1, left), (0, 0) and (1, right) is least, left and right >= 0: in [-1/2, 1/2]."""
    if left == right or math.isinf(left + right):
        return 0.5 * (math.isinf(left) - math.isinf(right))
    return 0.5 * (left - right) / (left + right)


@contextlib.contextmanager
def _bar(progress, batches, trials):
    """A progress bar, where tqdm is there: as long as a walk and three trials, and longer as they become more."""
    bar = None
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        if progress:
            total = batches - 1 + 3 * batches * trials
            bar = tqdm(desc="measuring learning rates", unit=" batches", total=total, leave=False)

    def update():
        if bar is not None:
            bar.total += batches * (bar.n == bar.total)
            bar.update()

    with contextlib.nullcontext() if bar is None else bar:
        yield types.SimpleNamespace(update=update)
