"""The global minimiser of the cubic model, by a definite pencil.

  g = gbar (S,)     H = hbar (S, S), symmetric     d (S,) >= 0, D = diag(d)
  kappa = lambda/2  r = ||D eta||                  mu = kappa r, M(mu) = H + mu D^2

  m(eta) = -g^T eta + eta^T H eta / 2 + (lambda/6) ||D eta||^3

eta minimises m iff M(mu) eta = g with M(mu) positive semi-definite. On the mu where
M(mu) is positive definite kappa ||D M(mu)^-1 g|| - mu falls strictly, so it has at
most one root there; without one (the hard case) mu is where M becomes singular, and
a null vector completes eta.

Why this algorithm. The entries of d may span twenty orders of magnitude and some may
be zero, so forming D^-1 H D^-1 (an ordinary eigenproblem) lets the absolute error of
the large entries destroy the small ones, and Newton's method over Cholesky factors
bounces near the singular mu. Instead all scaling is by powers of two, which is exact;
mu is bracketed by its exponent with Cholesky factors of a matrix with a unit-sized
diagonal; and at sigma, at the top of the bracket, where M(sigma) is safely positive
definite, the pencil (M(sigma), D^2) is diagonalised. A zero in d is then a zero
eigenvalue gamma, no threshold. The root is measured from the pole, so that every
denominator is a sum of non-negative terms, and bisected on the bits of a float. The
eigenvectors mix the groups by a rounding error of the largest, which spoils a group
beside others that matter far more; a few Newton steps on the equation itself, row by
row, put that right.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grouped_newton.numerics import all_finite, exponent, float_layout, folded, ldexp, norm


class CubicStatus(enum.IntEnum):
    """What :func:`solve_cubic` found, and what a refresh of the transform did.

    ``SOLVED``: the minimiser, with M positive definite. ``HARD_CASE``: a minimiser
    with M singular; the sign along its null vector is free. ``UNBOUNDED``: there is
    no finite minimiser. ``NOT_FINITE``: the input has a NaN or an infinity.
    ``PARTLY_FINITE``, of a refresh alone: a solution, with some numbers of the summary
    replaced because they weren't finite, see :func:`scale_by_grouped_newton`.
    """

    SOLVED = 0
    HARD_CASE = 1
    UNBOUNDED = 2
    NOT_FINITE = 3
    PARTLY_FINITE = 4


class CubicSolution(NamedTuple):
    """The minimiser of the cubic model.

    Attributes:
      eta: rates, shape (S,); zero unless the status is SOLVED or HARD_CASE.
      radius: ||D eta||, shape ().
      status: an int32 with names in :class:`CubicStatus`, shape ().
    """

    eta: jax.Array
    radius: jax.Array
    status: jax.Array


def solve_cubic(gbar: Any, hbar: Any, d: Any, internal_damping: Any) -> CubicSolution:
    """Solves ``eta = (hbar + (lambda/2) ||D eta|| D^2)^-1 gbar`` for the eta of largest norm.

    Equivalently, the global minimiser of the cubic model::

      m(eta) = -gbar^T eta + eta^T hbar eta / 2 + (lambda/6) ||D eta||^3,  D = diag(d)

    It can be jitted and vmapped, and it is equivariant: scaling group s by a power
    of two a_s (gbar_s by a_s, hbar_st by a_s a_t, d_s by a_s) scales eta_s by 1/a_s.

    Args:
      gbar: slopes, shape (S,).
      hbar: curvatures, shape (S, S); its symmetric part counts.
      d: scale of the cubic term per group, shape (S,), non-negative.
      internal_damping: lambda >= 0, shape (). With lambda = 0 or d = 0 the
        solution is ``hbar^-1 gbar``, and hbar must be positive definite. With
        lambda < 0 there is no minimiser.

    Returns:
      A :class:`CubicSolution` in the widest dtype of the input, at least float32.

    Raises:
      ValueError: if the shapes don't fit.
      TypeError: for complex input.

    Example:
      >>> import jax.numpy as jnp
      >>> s = solve_cubic(jnp.ones(2), jnp.diag(jnp.array([2.0, -1.0])), jnp.ones(2), 1.0)
      >>> CubicStatus(int(s.status)).name, [f"{x:.3f}" for x in s.eta]
      ('SOLVED', ['0.297', '2.719'])

    References:
      Yurii Nesterov and Boris Polyak, Cubic regularization of Newton method and its
      global performance, Mathematical Programming 108 (2006).
      Pierre Wolinski, arXiv 2312.03885, for the anisotropic form.
    """
    gbar, hbar, d, lam = map(jnp.asarray, (gbar, hbar, d, internal_damping))
    dtype = jnp.result_type(gbar, hbar, d, jnp.float32)
    if any(jnp.iscomplexobj(x) for x in (gbar, hbar, d, lam)):
        raise TypeError("solve_cubic takes real numbers, got complex ones")
    S = gbar.size
    if gbar.shape != (S,) or hbar.shape != (S, S) or d.shape != (S,) or lam.shape != ():
        raise ValueError(
            "solve_cubic takes gbar (S,), hbar (S, S), d (S,) and internal_damping (), got shapes"
            f" {gbar.shape}, {hbar.shape}, {d.shape} and {lam.shape}"
        )
    g, H, d, lam = (x.astype(dtype) for x in (gbar, hbar, d, lam))
    if S == 0:
        return CubicSolution(g, jnp.zeros((), dtype), jnp.int32(CubicStatus.SOLVED))

    H = H / 2 + H.T / 2
    finite = all_finite(H, g, d, lam)
    g, d, lam = (jnp.where(finite, x, 0) for x in (g, jnp.abs(d), lam))
    H = jnp.where(finite, H, jnp.eye(S, dtype=dtype))
    # A group without any entry (an unused parameter) is solved apart: 1 * eta_s = 0.
    unused = (g == 0) & (d == 0) & jnp.all(H == 0, axis=0)
    H = H + jnp.diag(unused.astype(dtype))
    # Without damping d must not enter, or an indefinite H would look like a hard case.
    kappa = lam / 2
    damped = kappa >= jnp.finfo(dtype).tiny
    pencil_d, kappa = jnp.where(damped, d, 0), jnp.where(damped, kappa, 1)

    j = _smallest_exponent(g, H, pencil_d, kappa)
    eta, hard = _solve_in_bracket(g, H, pencil_d, kappa, j)
    eta = jnp.where(unused, 0, _refined(eta, g, H, pencil_d, kappa, j))
    radius = norm(d * eta)

    bounded = (lam >= 0) & (j <= _exponents(dtype)[1]) & jnp.all(jnp.isfinite(eta)) & jnp.isfinite(radius)
    solved = jnp.where(hard, CubicStatus.HARD_CASE, CubicStatus.SOLVED)
    status = jnp.where(finite, jnp.where(bounded, solved, CubicStatus.UNBOUNDED), CubicStatus.NOT_FINITE)
    return CubicSolution(
        jnp.where(finite & bounded, eta, 0), jnp.where(finite & bounded, radius, 0), status.astype(jnp.int32)
    )


def solve_decoupled(gbar: Any, h: Any, d: Any, internal_damping: Any) -> CubicSolution:
    """:func:`solve_cubic` for a diagonal hbar, h being (S,): one equation for mu, no matrix.

    ::

      eta_s = g_s / (h_s + mu d_s^2),   mu = kappa ||D eta|| >= pole = max(0, max_s -h_s / d_s^2)

    The root is measured from the pole, where every denominator is a sum of
    non-negative terms, known to a rounding error of h_s. Where h / d^2 overflows it is
    UNBOUNDED.
    """
    dtype = jnp.result_type(gbar, h, d, jnp.float32)
    g, h, d, lam = (jnp.asarray(x).astype(dtype) for x in (gbar, h, d, internal_damping))
    if g.size == 0:
        return CubicSolution(g, jnp.zeros((), dtype), jnp.int32(CubicStatus.SOLVED))
    finite = all_finite(g, h, d, lam)
    g, h, d, lam = (jnp.where(finite, x, 1) for x in (g, h, jnp.abs(d), lam))
    damped = lam / 2 >= jnp.finfo(dtype).tiny
    given_d, d, kappa = d, jnp.where(damped, d, 0), jnp.where(damped, lam / 2, 1)

    cubic = d > 0
    divisor = jnp.where(cubic, d, 1)
    poles = jnp.where(cubic, -h / divisor / divisor, 0)
    pole = folded(jnp.maximum, poles, 0)
    at_pole = cubic & (poles == pole)
    from_pole = jnp.where(at_pole, 0, jnp.where(cubic, jnp.maximum(h + pole * d * d, 0), h))
    eta_at = lambda xi: jnp.where(g == 0, 0, g / (from_pole + xi * d * d))
    xi, below = _bisect(lambda xi: kappa * norm(d * eta_at(xi)) > pole + xi, dtype, jnp.finfo(dtype).max)
    hard = below & (pole > 0)
    eta = jnp.where(hard & at_pole, 0, eta_at(jnp.where(below, 0, xi)))
    # In the hard case mu is the pole, and one group there makes up ||D eta|| = pole / kappa.
    radius = pole / kappa
    share = norm(d * eta) / jnp.where(radius > 0, radius, 1)
    completing = radius * jnp.sqrt(jnp.maximum(1 - share * share, 0)) / divisor
    places = jnp.arange(g.size)
    first = places == folded(jnp.minimum, jnp.where(at_pole, places, g.size), g.size)
    eta = jnp.where(hard & first, jnp.where(g < 0, -completing, completing), eta)

    well_posed = cubic | (h > 0) | ((h == 0) & (g == 0))
    bounded = (lam >= 0) & all_finite(jnp.where(well_posed, eta, jnp.inf))
    solved = jnp.where(hard, CubicStatus.HARD_CASE, CubicStatus.SOLVED)
    status = jnp.where(finite, jnp.where(bounded, solved, CubicStatus.UNBOUNDED), CubicStatus.NOT_FINITE)
    eta = jnp.where(finite & bounded, eta, 0)
    return CubicSolution(eta, norm(given_d * eta), status.astype(jnp.int32))


_NOTHING = -(1 << 20)  # the exponent of zero


def _exponents(dtype):
    """Smallest and largest j with which mu = 4^j is tried; their number is a power of two less one."""
    return (-64, 62) if jnp.finfo(dtype).bits == 32 else (-256, 254)


def _scaled(g, H, d, j):
    """T H T, T 2^j d and 2^-q T g with T = diag(2^-e), all of unit size at mu = 4^j; and e, q."""
    h_exponent = jnp.where(jnp.diag(H) == 0, _NOTHING, -(-exponent(jnp.diag(H)) // 2))
    d_exponent = jnp.where(d == 0, _NOTHING, exponent(d) + j)
    e = jnp.maximum(h_exponent, d_exponent)
    e = jnp.where(e == _NOTHING, 0, e)
    q = _largest_exponent(g, -e)
    return ldexp(H, -e[:, None] - e[None, :]), ldexp(d, j - e), ldexp(g, -e - q), e, q


def _largest_exponent(x, shift):
    """The largest exponent of the entries of x 2^shift, 0 if all are zero."""
    k = jnp.max(jnp.where(x == 0, _NOTHING, exponent(x) + shift))
    return jnp.where(k == _NOTHING, 0, k)


def _smallest_exponent(g, H, d, kappa):
    """The least j where M(4^j) is positive definite and kappa ||D eta(4^j)|| <= 4^j; one more than the last if none."""
    S, eps = g.size, jnp.finfo(g.dtype).eps
    first, last = _exponents(g.dtype)
    k = exponent(kappa)

    def at_or_above_root(j):
        H_j, d_j, g_j, _, q = _scaled(g, H, d, j)
        L = lax.linalg.cholesky(H_j + jnp.diag(d_j * d_j), symmetrize_input=False)
        x = _solve_transposed(L, _solve(L, g_j))
        definite = jnp.all(jnp.diag(L) ** 2 > S * eps)  # False for a NaN
        return definite & (ldexp(ldexp(kappa, -k) * norm(d_j * x), k + q - 3 * j) <= 1)

    def halve(_, bracket):
        low, high = bracket
        mid = (low + high) // 2
        above = at_or_above_root(mid)
        return jnp.where(above, low, mid + 1), jnp.where(above, mid, high)

    steps = (last - first + 2).bit_length() - 1
    _, j = lax.fori_loop(0, steps, halve, (jnp.int32(first), jnp.int32(last + 1)))
    return j


def _solve_in_bracket(g, H, d, kappa, j):
    """eta, given that mu is in (0, 4^j]; and whether it is a hard case."""
    S, eps = g.size, jnp.finfo(g.dtype).eps
    # The pencil at sigma = 2 * 4^j: M(sigma) = L L^T, and D^2 sigma = B B^T in the coordinates of L.
    H_j, d_j, g_j, e, q = _scaled(g, H, d, j)
    sqrt_sigma_d = 2**0.5 * d_j
    L = lax.linalg.cholesky(H_j + jnp.diag(sqrt_sigma_d * sqrt_sigma_d), symmetrize_input=False)
    B = _solve(L, jnp.diag(sqrt_sigma_d))
    gamma, Q = jnp.linalg.eigh(_dot(B, B.T))
    gamma, Q = jnp.maximum(gamma[::-1], 0), Q[:, ::-1]
    c = _dot(Q.T, _solve(L, g_j))

    # mu = sigma (a + xi), a the pole. In these coordinates M(mu) is diag(p + xi gamma), all terms >= 0.
    indefinite = gamma[0] > 1
    a = jnp.where(indefinite, 1 - 1 / gamma[0], 0)
    p = jnp.where(indefinite, (gamma[0] - gamma) / gamma[0], jnp.maximum(1 - gamma, 0))

    # With beta = kappa sigma^(-3/2) 2^q and w = beta sqrt(gamma) c, the root of || w / (p + xi gamma) || = a + xi.
    # w is at most of unit size; beta alone may be far out of range and is kept as fraction * 2^b.
    fraction, b = ldexp(kappa, -exponent(kappa)) * 2**-1.5, exponent(kappa) + q - 3 * j
    root_gamma = jnp.sqrt(gamma)
    w = ldexp(fraction * root_gamma * c, b)
    xi, below = _bisect(lambda xi: norm(w / (p + xi * gamma)) > a + xi, g.dtype, 1.0)
    hard = indefinite & below

    # Components near the pole are taken in units of w (z, of the size of a), all others in units of c.
    denominator = p + xi * gamma
    z = w / denominator
    rest = jnp.sum(jnp.where(jnp.arange(S) > 0, z, 0) ** 2)
    completing = jnp.where(c[0] < 0, -1, 1) * jnp.sqrt(jnp.maximum(a * a - rest, 0))
    z = z.at[0].set(jnp.where(hard, completing, z[0]))
    near_pole = jnp.where(indefinite, p <= S * eps, p == 0)
    y_near = jnp.where(near_pole, z / jnp.where(near_pole, root_gamma, 1), 0)
    y_far = jnp.where(near_pole, 0, c / jnp.where(near_pole, 1, denominator))

    back = lambda y: _solve_transposed(L, _dot(Q, y))
    return ldexp(back(y_far), q - e) + ldexp(back(y_near) / fraction, q - b - e), hard


def _refined(eta, g, H, d, kappa, j):
    """eta after Newton steps on M(kappa ||D eta||) eta = g, as many as halve the error of its worst row, 7 at most."""
    # In x = T^-1 2^-k eta, of unit size, and with mu in units of 4^j.
    H_j, d_j, g_j, e, q = _scaled(g, H, d, j)
    k = _largest_exponent(eta, e)
    x, g_k = ldexp(eta, e - k), ldexp(g_j, q - k)

    def step(state):
        n, best, allowed, x, _ = state
        Dx, r = d_j * x, norm(d_j * x)
        mu = ldexp(ldexp(kappa, -exponent(kappa)) * r, exponent(kappa) + k - 3 * j)
        D2, u = mu * d_j * d_j, d_j * Dx / jnp.where(r > 0, r, 1)
        error = _dot(H_j, x) + D2 * x - g_k
        terms = _dot(jnp.abs(H_j), jnp.abs(x)) + D2 * jnp.abs(x) + jnp.abs(g_k)
        better = jnp.all(jnp.abs(error) <= allowed * terms)  # False for a NaN, which a maximum may lose
        allowed = jnp.max(jnp.abs(error) / jnp.where(terms > 0, terms, 1)) / 2
        L = lax.linalg.cholesky(H_j + jnp.diag(D2) + mu * u[:, None] * u[None, :], symmetrize_input=False)
        return n + 1, jnp.where(better, x, best), allowed, x - _solve_transposed(L, _solve(L, error)), better

    all_allowed = jnp.full((), 2, x.dtype)  # no error is more than the sum of its terms
    unfinished = lambda state: (state[0] < 8) & state[-1]
    return ldexp(lax.while_loop(unfinished, step, (0, x, all_allowed, x, True))[1], k - e)


def _bisect(is_below_root, dtype, largest):
    """The largest float in (0, largest) below the root, by bisecting its bits; and whether the root is below all."""
    info, bits_type = float_layout(dtype)
    to_bits = lambda x: lax.bitcast_convert_type(jnp.asarray(x, dtype), bits_type)
    to_float = lambda bits: lax.bitcast_convert_type(bits, dtype)
    low, high = to_bits(info.tiny), to_bits(largest)

    def halve(_, bracket):
        low, high = bracket
        mid = low + (high - low) // 2
        below = is_below_root(to_float(mid))
        return jnp.where(below, mid, low), jnp.where(below, high, mid)

    found, _ = lax.fori_loop(0, info.bits - 1, halve, (low, high))
    return to_float(found), ~is_below_root(to_float(low))


def _dot(A, x):
    return jnp.matmul(A, x, precision=lax.Precision.HIGHEST)


def _solve(L, x):
    """L^-1 x."""
    return jax.scipy.linalg.solve_triangular(L, x, lower=True)


def _solve_transposed(L, x):
    """L^-T x."""
    return jax.scipy.linalg.solve_triangular(L, x, lower=True, trans=1)
