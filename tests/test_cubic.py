import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import certify_cubic, cubic_model, definiteness_without_cubic, minimise_cubic

from grouped_newton import CubicStatus, solve_cubic
from grouped_newton.cubic import solve_decoupled

SOLVED, HARD_CASE, UNBOUNDED, NOT_FINITE, _ = CubicStatus
REFERENCE = pathlib.Path(__file__).parent / "data" / "reference_summary.npz"
INSTANCES = {1: 100, 3: 100, 6: 100, 42: 6}  # S: of each case
ROUNDING = 16  # in units of S eps: what M, and whether H is definite on ker D, are known to
CASES = (
    "definite",
    "indefinite",
    "singular",
    "hard",
    "near_hard",
    "zeros_in_d",
    "no_d",
    "no_damping",
    "no_slope",
    "no_minimiser",
    "unused",
)

solve_each = jax.jit(jax.vmap(solve_cubic))
solve_one = jax.jit(solve_cubic)
solve_each_decoupled = jax.jit(jax.vmap(solve_decoupled))


def instances(case, S, N, rng):
    """N problems (g, H, d, lam) of a case; float64, their integers and powers of two exact in float32 too."""
    if case in ("hard", "near_hard"):
        return _exact_sizes(_orthogonal_to_null_vector(S, N, rng, tilted=case == "near_hard"), rng)
    if case == "singular":
        return _exact_sizes(_singular_with_known_minimum(S, N, rng), rng)
    mixed = np.where(rng.random((N, S)) < 0.5, 1, -1)
    mixed[:, 0] = -1
    positive, some = abs(mixed), _some(S, N, rng)
    signs = {"indefinite": mixed, "zeros_in_d": mixed, "no_minimiser": -positive, "unused": mixed}.get(case, positive)
    if case == "no_slope":
        signs = np.where(rng.random((N, 1)) < 0.5, positive, mixed)
    g, H, d, lam = _generic(signs, rng)
    if case == "zeros_in_d":
        root = rng.normal(size=(N, S, 2 * S))
        H = np.where(some[:, :, None] & some[:, None, :], root @ root.swapaxes(1, 2) / S, H)
        d = np.where(some, 0, d)
    if case == "no_minimiser":
        kind = rng.integers(3, size=N)[:, None]
        d = np.where((kind == 0) | ((kind == 1) & some), 0, d)
        lam = np.where(kind[:, 0] == 2, 0, lam)
    if case == "unused":
        g, d = np.where(some, 0, g), np.where(some, 0, d)
        H = np.where(some[:, :, None] | some[:, None, :], 0, H)
    zero = {"no_slope": (0, 1, 1, 1), "no_d": (1, 1, 0, 1), "no_damping": (1, 1, 1, 0)}.get(case, (1, 1, 1, 1))
    g, H, d, lam = (x * keep for x, keep in zip((g, H, d, lam), zero, strict=True))
    return rescaled(g, H, d, lam, _spread(-4, 4, (N, S), rng))


def rescaled(g, H, d, lam, a):
    """The same problems with the direction of group s scaled by a_s."""
    return g * a, H * (a[:, :, None] * a[:, None, :]), d * a, lam


def _spread(low, high, shape, rng):
    return 10 ** rng.uniform(low, high, shape)


def _some(S, N, rng):
    """At least one of S."""
    chosen = rng.random((N, S)) < 0.4
    chosen[np.arange(N), rng.integers(S, size=N)] = True
    return chosen


def _generic(signs, rng):
    """Every size over its whole range; the signs of H's eigenvalues given."""
    N, S = signs.shape
    Q = np.linalg.qr(rng.normal(size=(N, S, S)))[0]
    H = (Q * (signs * _spread(-2, 1, (N, S), rng))[:, None, :]) @ Q.swapaxes(1, 2)
    H = (H + H.swapaxes(1, 2)) * _spread(-3, 3, (N, 1, 1), rng)
    g = rng.normal(size=(N, S)) * _spread(-12, 12, (N, 1), rng)
    return g, H, _spread(-6, 3, (N, S), rng), _spread(-3, 3, N, rng)


def _orthogonal_to_null_vector(S, N, rng, tilted):
    """Integers with D = 1: H is -c S on the vector of ones, at least 0 elsewhere, and g is orthogonal to it."""
    weights = np.triu(rng.integers(0, 4, (N, S, S)), 1)
    weights = weights + weights.swapaxes(1, 2)
    laplacian = weights.sum(axis=2)[:, :, None] * np.eye(S) - weights
    c = rng.integers(1, 4, N)
    g = rng.integers(-8, 9, (N, S)).astype(float)
    g[:, 0] -= g.sum(axis=1)
    # lambda/2 ||M(pole)^-1 g|| < pole = c S makes it hard
    lam = 2.0 ** np.floor(np.log2((c * S) ** 2 / np.maximum(np.linalg.norm(g, axis=1), 1)) - rng.integers(0, 6, N))
    tilt = _spread(-18, -1, (N, 1), rng) * rng.choice([-1, 1], (N, 1)) if tilted else 0
    return g + tilt, laplacian - c[:, None, None], np.ones((N, S)), lam


def _singular(S, N, rng):
    """Integer H of half rank, semi-definite and indefinite."""
    half = rng.integers(-3, 4, (N, S, S // 2)).astype(float)
    signs = np.where(rng.random((N, 1, 1)) < 0.5, 1, rng.choice([-1, 1], (N, 1, S // 2)))
    return half * signs @ half.swapaxes(1, 2)


def _singular_with_known_minimum(S, N, rng):
    """D that weighs the kernel of H, and mu not too small, keep rounding from deciding whether there is a minimum."""
    H = _singular(S, N, rng)
    sizes = np.sqrt(np.maximum(abs(np.einsum("nii->ni", H)), 1))
    d, eta = sizes * _spread(-0.5, 0.5, (N, S), rng), rng.normal(size=(N, S)) / sizes
    pole = np.maximum(0, -np.linalg.eigvalsh(H / (d[:, :, None] * d[:, None, :]))[:, 0])
    mu = pole + _spread(-1, 1, N, rng)
    g = np.einsum("nij,nj->ni", H, eta) + mu[:, None] * d**2 * eta
    return g, H, d, 2 * mu / np.linalg.norm(d * eta, axis=1)


def _exact_sizes(problems, rng):
    """Sizes of groups, D and the loss by powers of two."""
    g, H, d, lam = problems
    N, S = g.shape
    loss, size = 2.0 ** rng.integers(-20, 21, N), 2.0 ** rng.integers(-10, 6, N)
    problems = g * loss[:, None], H * loss[:, None, None], d * size[:, None], lam * loss / size**3
    return rescaled(*problems, 2.0 ** rng.integers(-13, 14, (N, S)))


@functools.cache
def _solved(S, dtype):
    """All instances of this size in one batch, and the answers."""
    rng = np.random.default_rng(S)
    each = [instances(case, S, INSTANCES[S], rng) for case in CASES]
    problems = [np.concatenate(x).astype(dtype) for x in zip(*each, strict=True)]
    return problems, [np.asarray(x) for x in solve_each(*problems)]


def solved(S):
    return _solved(S, jnp.result_type(float))


def of_case(case, S):
    return np.arange(INSTANCES[S]) + CASES.index(case) * INSTANCES[S]


@pytest.mark.parametrize("S", INSTANCES)
def test_answers_are_stationary_with_semi_definite_m(S, precision):
    problems, (eta, radius, status) = solved(S)
    found = status < UNBOUNDED
    certificate = certify_cubic(*(x[found] for x in problems), eta[found], radius[found])
    assert np.sum(found) >= 9 * INSTANCES[S]
    assert np.max(certificate.residual) < ROUNDING
    assert np.min(certificate.curvature) > -ROUNDING
    assert np.max(certificate.radius) < 4


@pytest.mark.parametrize("S", INSTANCES)
def test_status_tells_which_case(S, precision):
    problems, (eta, radius, status) = solved(S)
    bounded = definiteness_without_cubic(*problems)
    assert np.all(status[bounded > ROUNDING] < UNBOUNDED)
    assert np.all(status[bounded < -ROUNDING] == UNBOUNDED)
    assert np.all(eta[status == UNBOUNDED] == 0)
    assert np.all(radius[status == UNBOUNDED] == 0)
    assert np.all(np.isfinite(eta))
    assert np.all(np.isfinite(radius))
    # Solved and hard differ by the least eigenvalue of M, which is known to rounding only.
    curvature = certify_cubic(*problems, eta, radius).curvature
    assert np.all(status[(status < UNBOUNDED) & (curvature > ROUNDING)] == SOLVED)
    assert np.all(status[of_case("no_minimiser", S)] == UNBOUNDED)
    for case in ("definite", "no_d", "no_damping"):
        assert np.all(status[of_case(case, S)] == SOLVED)
    assert np.all(curvature[of_case("hard", S)] < ROUNDING)


@pytest.mark.parametrize("S", [1, 6])
def test_a_diagonal_curvature_is_solved_without_the_matrix(S, precision):
    (g, H, d, lam), _ = solved(S)
    diagonal = np.einsum("nii->ni", H)
    H = np.einsum("ni,ij->nij", diagonal, np.eye(S, dtype=H.dtype))
    eta, radius, status = map(np.asarray, solve_each_decoupled(g, diagonal, d, lam))
    found = status < UNBOUNDED
    certificate = certify_cubic(*(x[found] for x in (g, H, d, lam)), eta[found], radius[found])
    assert np.max(certificate.residual) < ROUNDING
    assert np.min(certificate.curvature) > -ROUNDING
    assert np.max(certificate.radius) < 4
    # Single precision overflows in h / d^2 of a few.
    assert np.mean(status != np.asarray(solve_each(g, H, d, lam).status)) < (0.01 if g.dtype == "float32" else 1e-9)
    assert np.all(eta[~found] == 0)


def test_not_finite_input_of_decoupled_groups_is_told():
    problems = [np.ones((8, 2)), np.ones((8, 2)), np.ones((8, 2)), np.ones((8, 1))]
    for i, (where, bad) in enumerate(itertools.product(range(4), (np.nan, np.inf))):
        problems[where][i, 0] = bad
    solution = solve_each_decoupled(*arrays(*problems[:3], problems[3][:, 0]))
    np.testing.assert_array_equal(solution.status, NOT_FINITE)
    np.testing.assert_array_equal(solution.eta, 0.0)


@pytest.mark.parametrize("S", [1, 4])
def test_decoupled_groups_whose_pole_is_out_of_range_on_the_left(S):
    """h / d^2 overflows; the cubic term is next to nothing."""
    h = jnp.full(S, np.sqrt(np.finfo(jnp.result_type(float)).max), jnp.result_type(float))
    solution = jax.jit(solve_decoupled)(h, h, h**-0.5 / 8, 1.0)
    np.testing.assert_allclose(solution.eta, 1.0, rtol=1e-6)


def numerically_singular(S):
    """H of half rank, exactly, and d that may be next to nothing on its kernel: rounding decides what there is."""
    rng = np.random.default_rng(S)
    g, _, d, lam = _generic(np.ones((INSTANCES[S] * len(CASES), S)), rng)
    problems = _exact_sizes((g, _singular(S, len(g), rng), d, lam), rng)
    return [x.astype(jnp.result_type(float)) for x in problems]


@pytest.mark.parametrize("S", [3, 6])
def test_numbers_stay_finite_where_rounding_decides(S, precision):
    eta, radius, status = map(np.asarray, solve_each(*numerically_singular(S)))
    assert np.all(np.isfinite(eta))
    assert np.all(np.isfinite(radius))
    assert np.all(eta[status == UNBOUNDED] == 0)
    assert np.mean(status == UNBOUNDED) < 0.01


@pytest.mark.parametrize("S", [3, 6])
def test_singular_curvature_without_damping_has_no_minimum(S, precision):
    g, H, d, lam = numerically_singular(S)
    for problem in ((g, H, d, 0 * lam), (g, H, 0 * d, lam)):
        assert np.all(solve_each(*problem).status == UNBOUNDED)


@pytest.mark.parametrize("S", [1, 3, 6])
def test_agrees_with_sixty_digits(S, precision):
    problems, (eta, radius, status) = solved(S)
    decided = abs(definiteness_without_cubic(*problems)) > ROUNDING
    far_from_pole = certify_cubic(*problems, eta, radius).curvature > ROUNDING
    bounds = []
    for i in np.concatenate([of_case(case, S)[:3] for case in CASES]):
        if not decided[i]:
            continue
        problem = [x[i].astype(float) for x in problems]
        exact = minimise_cubic(*problem)
        assert (exact is None) == (status[i] == UNBOUNDED)
        if exact is None:
            continue
        excess = cubic_model(*problem, eta[i]) - exact.value
        assert -1e-30 * abs(exact.value) <= excess <= ROUNDING * S * precision * abs(exact.value)
        if far_from_pole[i] and exact.value < 0:
            error, bound = _relative_error_in_eta(*problem, eta[i].astype(float), exact, precision)
            assert error <= bound
            assert abs(radius[i] - float(exact.radius)) <= bound * float(exact.radius)
            bounds.append(bound)
    assert np.median(bounds) < 1000 * S * precision  # most are sharp


def _relative_error_in_eta(g, H, d, lam, eta, exact, eps):
    """Of T^-1 eta, T making the model's hessian a unit diagonal; and how large ROUNDING in the residual can make it."""
    S, r = len(g), float(exact.radius)
    damping, D2_eta = lam / 2 * r * d**2, d * (d * exact.eta)
    T = 1 / np.sqrt(np.where(abs(np.diag(H)) + damping > 0, abs(np.diag(H)) + damping, 1))
    hessian = H + np.diag(damping) + (lam / 2 / r * np.outer(D2_eta, D2_eta) if r > 0 else 0)
    hessian += np.diag(np.diag(hessian) == 0)  # unused groups
    length = np.linalg.norm(exact.eta / T)
    residual = ROUNDING * S * eps * np.linalg.norm(T * ((abs(H) + np.diag(damping)) @ abs(exact.eta) + abs(g)))
    return (
        np.linalg.norm((eta - exact.eta) / T) / length,
        residual * np.linalg.norm(np.linalg.inv(T[:, None] * hessian * T), 2) / length,
    )


@pytest.mark.parametrize("S", [1, 3, 6, 42])
def test_rescaled_groups_give_the_same_bits(S, precision):
    problems, (eta, radius, status) = solved(S)
    a = (2.0 ** np.random.default_rng(S).integers(-20, 21, problems[0].shape)).astype(eta.dtype)
    again = solve_each(*rescaled(*problems, a))
    np.testing.assert_array_equal(again.eta * a, eta)
    np.testing.assert_array_equal(again.radius, radius)
    np.testing.assert_array_equal(again.status, status)


def test_rescaled_loss_and_d_give_the_same_bits(precision):
    rng = np.random.default_rng(0)
    N, S = INSTANCES[3] * len(CASES), 3
    g, H, d, lam = _orthogonal_to_null_vector(S, N, rng, tilted=True)
    d = d * rng.choice([0.25, 1, 2, 3], (N, S))
    problems = [x.astype(jnp.result_type(float)) for x in (g, H, d, lam)]
    loss, size = 4.0 ** rng.integers(-20, 21, N), 4.0 ** rng.integers(-5, 6, N)
    scaled = g * loss[:, None], H * loss[:, None, None], d * size[:, None], lam * loss / size**3
    solution, again = solve_each(*problems), solve_each(*(x.astype(jnp.result_type(float)) for x in scaled))
    np.testing.assert_array_equal(again.eta, solution.eta)
    np.testing.assert_array_equal(again.radius / size, solution.radius)
    np.testing.assert_array_equal(again.status, solution.status)


def arrays(*problem):
    return tuple(jnp.asarray(x, jnp.result_type(float)) for x in problem)


def test_published_hard_case(precision):
    g, H = np.array([0.0, 2.0, 0.0]), np.array([[1.0, 0.0, 4.0], [0.0, 2.0, 0.0], [4.0, 0.0, 3.0]])
    for M, value, radius in (((1, 1, 1), -1.12008177, 2.1231056256), ((1, 2, 1), -0.95520463, None)):
        problem = -g, H, np.sqrt(M), 2.0
        solution = solve_one(*arrays(*problem))
        assert abs(float(cubic_model(*problem, np.asarray(solution.eta))) + 0.96 - value) < 1e-8 + 4 * precision
        assert radius is None or abs(solution.radius - radius) < 1e-10 + 4 * precision * radius
        assert solution.status < UNBOUNDED


def test_published_radius(precision):
    solution = solve_one(*arrays([0, 20, 20], np.diag([-1, 2, 3]), [1, 1, 1], 1))
    assert abs(solution.radius - 5.474860754766346) < 8 * precision * 5.474860754766346
    assert solution.status == SOLVED


@pytest.mark.parametrize("damping", ["0.1", "1.0", "10.0"])
@pytest.mark.parametrize("partition", ["mlp/canonical", "mlp/trivial", "lenet/canonical", "lenet/trivial"])
def test_agrees_with_reference(partition, damping, x64):
    with np.load(REFERENCE) as file:
        gbar, hbar, third = (file[f"{partition}/{name}"] for name in ("gbar", "hbar", "third"))
        eta, radius = (file[f"{partition}/{name}_{damping}"] for name in ("eta", "radius"))
    solution = solve_one(gbar, hbar, np.cbrt(abs(third)), float(damping))
    assert solution.status == SOLVED
    np.testing.assert_allclose(solution.eta, eta, rtol=1e-9)
    np.testing.assert_allclose(solution.radius, radius, rtol=1e-9)


def test_hard_case_is_told_and_completed_where_nothing_rounds(precision):
    # M = diag(0, 2, 6) at mu = 2 = lambda/2 r, so eta = (t, 1/2, 1/3) with ||D eta|| = 4
    solution = solve_one(*arrays([0, 1, 2], np.diag([-2, 0, 4]), [1, 1, 1], 1))
    assert solution.status == HARD_CASE
    assert abs(solution.radius - 4) < 8 * precision
    t = np.sqrt(16 - 1 / 4 - 1 / 9)
    np.testing.assert_allclose(solution.eta, [t, 1 / 2, 1 / 3], rtol=8 * precision)


@pytest.mark.parametrize("curvature", [-1, -1e10])
def test_least_slope_decides_the_sign_in_one_dimension(curvature, precision):
    shape = solved(1)[0][0].shape
    g = np.resize([1e-30, -1e-30, 1e-10, -1e-10, 1.0, -1.0], shape)
    solution = solve_each(*arrays(g, np.full((*shape, 1), curvature), np.ones(shape), np.ones(len(g))))
    np.testing.assert_array_equal(np.sign(solution.eta), np.sign(g))
    assert np.all(solution.status < UNBOUNDED)


def test_no_slope_and_positive_curvature_is_no_step(precision):
    solution = solve_one(*arrays([0, 0, 0], np.diag([1, 2, 3]), [1, 0, 1e3], 1))
    assert np.all(solution.eta == 0)
    assert solution.radius == 0
    assert solution.status == SOLVED


def test_without_damping_d_sets_the_radius_only(precision):
    g, H, d = np.array([1.0, -2.0, 3.0]), np.diag([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])
    solution = solve_one(*arrays(g, H, d, 0))
    np.testing.assert_allclose(solution.eta, g / np.diag(H), rtol=4 * precision)
    np.testing.assert_allclose(solution.radius, np.sqrt(14), rtol=4 * precision)
    assert solve_one(*arrays(g, H - 2 * np.eye(3), d, 0)).status == UNBOUNDED


def test_negative_damping_has_no_minimum(precision):
    solution = solve_one(*arrays([1, 1, 1], np.eye(3), [1, 1, 1], -1))
    assert solution.status == UNBOUNDED
    assert np.all(solution.eta == 0)


def test_a_group_keeps_its_accuracy_beside_one_that_matters_far_more(precision):
    big = 1 / precision
    g, H, d = np.array([1, -big, 2]), np.array([[2, 1, 0.5], [1, 2, 0.5], [0.5, 0.5, 1]]), np.array([1, 0, 3])
    problem = arrays(g, H, d, 0.03)
    solution = solve_one(*problem)
    certificate = certify_cubic(*(np.asarray(x)[None] for x in (*problem, solution.eta, solution.radius)))
    assert certificate.residual[0] < ROUNDING


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["gbar", "diagonal", "upper", "lower", "d", "damping"])
def test_not_finite_input_is_told(where, bad):
    g, H, d, lam = np.ones(3, np.float32), np.eye(3, dtype=np.float32), np.ones(3, np.float32), np.float32(1)
    if where == "damping":
        lam = np.float32(bad)
    else:
        entry = {"gbar": (g, 1), "diagonal": (H, (1, 1)), "upper": (H, (0, 2)), "lower": (H, (2, 0)), "d": (d, 1)}
        array, index = entry[where]
        array[index] = bad
    solution = solve_one(g, H, d, lam)
    assert solution.status == NOT_FINITE
    assert np.all(solution.eta == 0)
    assert solution.radius == 0


def test_largest_numbers_do_not_overflow_when_symmetrised():
    one = np.ones(3, np.float32)
    assert solve_one(one, np.full((3, 3), 3e38, np.float32), one, np.float32(1)).status != NOT_FINITE


def test_only_the_symmetric_part_counts(precision):
    problem = arrays([1, 2, 3], [[2, 3, -1], [-1, 1, 0], [5, 2, 3]], [1, 2, 3], 1)
    g, H, d, lam = problem
    for a, b in zip(solve_one(g, H, d, lam), solve_one(g, (H + H.T) / 2, d, lam), strict=True):
        np.testing.assert_array_equal(a, b)


def test_unused_groups_stay_still_and_disturb_no_other(precision):
    (g, H, d, lam), (_, radius, status) = solved(3)
    keep, N = np.array([0, 2, 5]), len(g)
    wide_g, wide_H, wide_d = (np.zeros((N, *shape), g.dtype) for shape in ((6,), (6, 6), (6,)))
    wide_g[:, keep], wide_d[:, keep] = g, d
    wide_H[:, keep[:, None], keep] = H
    wide = [np.asarray(x) for x in solve_each(wide_g, wide_H, wide_d, lam)]
    assert np.all(wide[0][:, [1, 3, 4]] == 0)
    np.testing.assert_array_equal(wide[2] < UNBOUNDED, status < UNBOUNDED)
    found = status < UNBOUNDED
    problems = g[found], H[found], d[found], lam[found]
    assert np.max(certify_cubic(*problems, wide[0][found][:, keep], wide[1][found]).residual) < ROUNDING
    np.testing.assert_allclose(wide[1][of_case("definite", 3)], radius[of_case("definite", 3)], rtol=2000 * precision)


def test_nothing_but_unused_groups_is_solved_by_no_step(precision):
    solution = solve_one(*arrays([0, 0, 0], np.zeros((3, 3)), [0, 0, 0], 1))
    assert np.all(solution.eta == 0)
    assert solution.radius == 0
    assert solution.status == SOLVED


def test_batch_equals_loop(precision):
    problems, (eta, radius, status) = solved(3)
    for i in range(0, len(eta), 29):
        solution = solve_one(*(x[i] for x in problems))
        assert solution.status == status[i]
        np.testing.assert_allclose(solution.radius, radius[i], rtol=100 * ROUNDING * precision)
        if status[i] == SOLVED:
            np.testing.assert_allclose(solution.eta, eta[i], rtol=100 * ROUNDING * precision)


def test_works_inside_cond_and_scan():
    problem = arrays([1, 2, 3], np.diag([-1, 2, 3]), [1, 2, 3], 1)

    @jax.jit
    def scanned(due, lam):
        old = jax.tree.map(jnp.zeros_like, jax.eval_shape(solve_cubic, *problem))
        step = lambda old, due: 2 * (lax.cond(due, lambda: solve_cubic(*problem[:3], lam), lambda: old),)
        return lax.scan(step, old, due)[1]

    solution = solve_one(*problem)
    found = scanned(jnp.array([False, True, False]), problem[3])
    np.testing.assert_allclose(found.eta, [0 * solution.eta, solution.eta, solution.eta], rtol=2.0**-19)
    np.testing.assert_array_equal(found.status, [0, solution.status, solution.status])


def test_single_precision_is_the_same_where_double_is_allowed():
    problem = [np.asarray(x, np.float32) for x in ([1, 2, 3], np.diag([-1, 2, 3]), [1, 2, 3], 1)]
    solution = solve_one(*problem)
    with jax.enable_x64(True):
        again = solve_one(*problem)
    assert again.eta.dtype == again.radius.dtype == jnp.float32
    assert again.status.dtype == solution.status.dtype == jnp.int32
    np.testing.assert_allclose(again.eta, solution.eta, rtol=2.0**-20)
    np.testing.assert_allclose(again.radius, solution.radius, rtol=2.0**-20)


def test_new_values_do_not_retrace():
    traces = []

    @jax.jit
    def solve(*problem):
        traces.append(1)
        return solve_cubic(*problem)

    for value in (1, 2, -3):
        solve(*arrays([value], [[value]], [value], abs(value)))
    assert len(traces) == 1


@pytest.mark.parametrize("widest", ["bfloat16", "float16", "int32", "float32", "float64"])
def test_answer_has_the_widest_dtype_and_at_least_single_precision(widest, x64):
    one = lambda dtype, *shape: jnp.ones(shape, dtype)
    solution = jax.eval_shape(solve_cubic, one("bfloat16", 3), one(widest, 3, 3), one("bfloat16", 3), one("float64"))
    expected = jnp.float64 if widest == "float64" else jnp.float32
    assert solution.eta.dtype == solution.radius.dtype == expected
    assert solution.status.dtype == jnp.int32


def test_half_precision_is_solved_in_single():
    problem = [jnp.asarray(x, jnp.bfloat16) for x in ([1, 2, 3], np.diag([1, 2, 3]), [1, 2, 3], 1)]
    exact = solve_one(*(x.astype(jnp.float32) for x in problem))
    np.testing.assert_array_equal(solve_one(*problem).eta, exact.eta)


def test_no_groups_at_all():
    solution = solve_cubic(jnp.zeros(0), jnp.zeros((0, 0)), jnp.zeros(0), 1.0)
    assert solution.eta.shape == (0,)
    assert solution.radius == 0
    assert solution.status == SOLVED


@pytest.mark.parametrize(
    "shapes",
    [
        ((), (3, 3), (3,), ()),
        ((3, 1), (3, 3), (3,), ()),
        ((3,), (3,), (3,), ()),
        ((3,), (3, 2), (3,), ()),
        ((3,), (3, 3), (), ()),
        ((3,), (3, 3), (2,), ()),
        ((3,), (3, 3), (3,), (1,)),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(ValueError, match=r"takes gbar \(S,\).* got shapes") as error:
        solve_cubic(*(jnp.ones(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("which", range(4))
def test_complex_input_is_refused(which):
    problem = list(arrays([1, 2, 3], np.eye(3), [1, 2, 3], 1))
    problem[which] = problem[which] * 1j
    with pytest.raises(TypeError, match="real numbers"):
        solve_cubic(*problem)
