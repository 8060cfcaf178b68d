"""The first call of a summary is cheap: what is alike is traced once, nothing is quadratic, kernels are few."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from interpreter import uncompiled
from jax.flatten_util import ravel_pytree

import grouped_newton as gn
from grouped_newton.derivatives import passes, program
from grouped_newton.derivatives.jaxprs import equations


def layers(n, activation=jnp.tanh, residual=False):
    """A loss of n unrolled layers."""
    params = [{"w": jnp.full((4, 4), 0.1 + k / 100), "b": jnp.full(4, k / 100)} for k in range(n)]

    def loss(params):
        h = jnp.ones((3, 4))
        for p in params:
            z = activation(h @ p["w"] + p["b"][None])
            h = h + z if residual else z
        return jnp.mean(h**2)

    return loss, params


def per_layer(params):
    return [{name: str(k) for name in p} for k, p in enumerate(params)]


def raveled(n):
    params = [jnp.full(3, 0.1 + k / 100) for k in range(n)]
    return (lambda p: jnp.sum(jnp.tanh(ravel_pytree(p)[0]) ** 2)), params


def stacked(n):
    params = [jnp.full(3, 0.1 + k / 100) for k in range(n)]
    return (lambda p: jnp.sum(jnp.sin(jnp.stack(p)) * jnp.ones((n, 1)))), params


def summed(n):
    params = [jnp.full(3, 0.1 + k / 100) for k in range(n)]
    return (lambda p: sum(jnp.sum(jnp.tanh(x)) for x in p)), params


def traced(loss, params, groups, **options):
    return jax.make_jaxpr(lambda p: gn.summarize(loss, p, p, groups, **options))(params)


def kinds(closed):
    """How many equations differ in more than the values that they are of."""
    avals = lambda vs: tuple(str(v.aval) for v in vs)
    return len({(e.primitive, str(e.params), avals(e.invars), avals(e.outvars)) for e in equations(closed.jaxpr)})


def calls_of(monkeypatch, module, name):
    calls, original = collections.Counter(), getattr(module, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("module", "name"), [(program, "_sorted"), (passes, "bilinear"), (passes, "unary"), (passes, "_derivative")]
)
def test_equal_layers_are_analysed_and_traced_once(monkeypatch, module, name, residual):
    found = []
    for n in (4, 8):
        calls = calls_of(monkeypatch, module, name)
        traced(*layers(n, residual=residual), gn.groups.single)
        monkeypatch.undo()
        found.append(calls[name])
    assert 0 < found[0] == found[1]


@pytest.mark.parametrize("made", [raveled, stacked, summed, layers])
@pytest.mark.parametrize("groups", [gn.groups.single, gn.groups.per_module(max_groups=4)])
def test_the_program_grows_in_proportion_to_the_leaves(made, groups):
    sizes = [len(list(equations(traced(*made(n), groups).jaxpr))) for n in (12, 24, 48)]
    assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0])


def test_more_groups_of_small_layers_make_no_more_kinds_of_equations():
    few, many = (kinds(traced(*made, per_layer(made[1]))) for made in (layers(6), layers(12)))
    assert many <= few + 4 * 6  # pads that bring the terms of one group to their place, and sums of more of them


def test_passes_over_as_many_groups_look_alike():
    loss, params = layers(12)
    one, several = (kinds(traced(loss, params, per_layer(params), **kw)) for kw in ({}, {"max_stack": 4}))
    assert several <= 3 * one


@pytest.mark.parametrize("steps", [3, 20])
def test_a_chain_of_any_length_is_differentiated_in_parts_of_bounded_length(x64, steps):
    def loss(p):
        x = p["x"] * p["a"]
        for _ in range(steps):
            x = x + 0.05 * jnp.sin(3 * x)
        return jnp.sum(x**2)

    params = {"x": jnp.linspace(-1.0, 1.0, 5), "a": jnp.array(0.7)}
    swept, nested = (uncompiled(lambda p, m=m: gn.summarize(loss, p, p, method=m))(params) for m in ("sweep", "nested"))
    assert_close(swept, nested, rtol=1e-12, atol=1e-12)


def test_the_kinds_of_nodes_of_a_chain_are_as_many_for_any_length(monkeypatch):
    def loss(x, steps):
        for _ in range(steps):
            x = x + 0.05 * jnp.sin(3 * x)
        return jnp.sum(x**2)

    found = []
    for steps in (32, 64):
        calls = calls_of(monkeypatch, program, "_sorted")
        traced(lambda x, steps=steps: loss(x, steps), jnp.ones(3), gn.groups.single)
        monkeypatch.undo()
        found.append(calls["_sorted"])
    assert found[0] == found[1]


@pytest.mark.parametrize("max_stack", [None, 4, 5])
def test_stacks_with_room_for_later_groups_change_no_number(x64, max_stack):
    loss, params = layers(9, residual=True)
    direction = jax.grad(loss)(params)
    groups = per_layer(params)
    found = uncompiled(lambda p: gn.summarize(loss, p, direction, groups, max_stack=max_stack))(params)
    expected = uncompiled(lambda p: gn.summarize(loss, p, direction, groups, method="nested"))(params)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.max(np.abs(b)))


def test_a_group_that_is_not_finite_spoils_no_other():
    loss = lambda p: jnp.sum(jnp.tanh(p["a"]) ** 2) + jnp.sum(p["b"] ** 0.5) + jnp.sum(jnp.sin(p["c"]))
    params = {"a": jnp.ones(3), "b": jnp.zeros(3), "c": jnp.ones(2)}
    s = gn.summarize(loss, params, params | {"b": jnp.ones(3)}, gn.groups.per_tensor)
    others = np.array([0, 2])
    for numbers in (s.gbar[others], s.hbar[np.ix_(others, others)], s.third[others]):
        assert np.all(np.isfinite(numbers))
    assert not np.isfinite(s.third[1])


def called_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def written_to_a_ref(x):
    ref = jax.new_ref(jnp.zeros(x.shape))
    ref[...] = x
    return ref[...]


REFS = ("swap", "new_ref")  # the first that has one; lax.map is refused for the first in its body


@pytest.mark.parametrize(("fn", "primitives"), [(called_back, ["pure_callback"]), (written_to_a_ref, REFS)])
@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit, lambda f: lambda x: jax.lax.map(f, x[None])])
def test_an_error_names_the_equation_and_the_line_of_the_loss(fn, primitives, wrapper):
    loss = lambda x: jnp.sum(wrapper(fn)(jnp.tanh(x)))
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        gn.summarize(loss, jnp.ones(3), jnp.ones(3), gn.groups.single)
    (note,) = (note for note in caught.value.__notes__ if note.startswith("In the equation"))
    first = fn.__code__.co_firstlineno
    lines = [f"{__file__}:{line} ({fn.__name__})" for line in range(first, first + 4)]
    assert note.startswith(tuple(f"In the equation {name}(" for name in primitives))
    assert any(line in note for line in lines), note
