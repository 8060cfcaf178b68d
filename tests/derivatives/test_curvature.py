"""Gauss-Newton's curvature against a dense one, the diagonal, and what the transform makes of either."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import assert_equal, assert_same_summary

import grouped_newton as gn
from grouped_newton.groups import per_tensor

EPS64 = 2.0**-52


def cross_entropy(outputs):
    return models.nll(outputs["logits"], outputs["labels"]) + jnp.mean(outputs["penalty"] ** 2)


def model(params):
    """Two real outputs, of which one is no array's whole, and labels; the first layer's rule is a custom one."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((6, 3)), float)
    logits = models.apply_dense(params, x, models.sine)
    return {"logits": logits, "labels": jnp.arange(6) % 2, "penalty": params["Dense_0"]["bias"] ** 2}


def test_gauss_newton_is_jacobians_around_the_hessian_of_the_loss(x64):
    _, params, direction, labels = models.custom_rule_problem()

    @jax.jit
    def both(params):
        summary = gn.gauss_newton_summary(model, cross_entropy, params, direction, labels)
        z = model(params)
        flat = lambda logits, penalty: jnp.concatenate([logits.ravel(), penalty])
        jacobian = jax.jacrev(lambda p: flat(model(p)["logits"], model(p)["penalty"]))(params)
        index = gn.groups.resolve(labels, params).index
        tangents = [
            sum(
                jnp.tensordot(j, u, u.ndim)
                for j, u, g in zip(jax.tree.leaves(jacobian), jax.tree.leaves(direction), index, strict=True)
                if g == s
            )
            for s in range(2)
        ]
        of_outputs = lambda y: cross_entropy(z | {"logits": y[:12].reshape(6, 2), "penalty": y[12:]})
        at = flat(z["logits"], z["penalty"])
        along = jnp.stack(tangents)
        third = jax.jacfwd(jax.hessian(of_outputs))(at)
        dense = gn.Summary(
            cross_entropy(z),
            along @ jax.grad(of_outputs)(at),
            along @ jax.hessian(of_outputs)(at) @ along.T,
            jnp.einsum("ijk,si,sj,sk->s", third, along, along, along),
        )
        order_2 = gn.gauss_newton_summary(model, cross_entropy, params, direction, labels, order=2)
        return summary, dense, order_2

    summary, dense, order_2 = both(params)
    assert_same_summary(summary, dense, 256 * EPS64)
    assert_same_summary(order_2, dense._replace(third=jnp.zeros(2)), 256 * EPS64)
    assert np.all(np.linalg.eigvalsh(summary.hbar) > 0)


def some_summary(S, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((S, S))
    of = lambda x: jnp.asarray(x, jnp.float32)
    return gn.Summary(of(1.5), of(rng.uniform(1, 2, S)), of(root @ root.T), of(rng.uniform(1, 2, S)))


def test_a_diagonal_summary_has_no_curvature_between_groups():
    summary = some_summary(3)
    found = gn.diagonal(summary)
    assert np.array_equal(found.hbar, np.diag(np.diag(summary.hbar)))
    assert found._replace(hbar=None) == summary._replace(hbar=None)


# In the transform


def test_a_refresh_takes_the_callers_summary_of_what_it_would_have_summarised():
    params, direction = {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.full(2, 2.0), "b": jnp.full(3, 3.0)}
    given, seen = some_summary(2), []
    tx = gn.scale_by_grouped_newton(per_tensor, rates=gn.edge_rates(1.0))

    @jax.jit
    def refreshed():
        def summary_fn(params, direction, groups):
            assert groups is per_tensor
            seen.append((params, direction))
            return given

        loss = lambda p: jnp.sum(p["a"])
        state = tx.update(direction, tx.init(params), params, value_fn=loss, summary_fn=summary_fn)[1]
        return state, gn.edge_rates(1.0)(given, 1.0).eta

    state, eta = refreshed()
    for name in ("loss", "gbar", "hbar", "third"):
        assert np.array_equal(getattr(state.summary, name), getattr(given, name))
    np.testing.assert_allclose(state.eta, eta, rtol=1e-5)
    assert np.all(eta > 0)
    assert_equal(seen, [(params, direction)])


def test_what_is_no_summary_of_these_groups_is_an_error():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = gn.scale_by_grouped_newton(per_tensor)
    update = lambda fn: tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["a"]), summary_fn=fn)
    with pytest.raises(ValueError, match=r"summary_fn must return a Summary of 2 groups, got .*\(3, 3\)"):
        update(lambda *at: some_summary(3))
    with pytest.raises(TypeError, match="summary_fn must be a function"):
        update(some_summary(2))
