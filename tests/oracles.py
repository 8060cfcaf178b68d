"""Dense and slow references for the tests."""

import functools
from typing import NamedTuple

import mpmath
import numpy as np


class Certificate(NamedTuple):
    """How far answers are from a global minimiser of the cubic model, in units of rounding; arrays of N."""

    residual: np.ndarray  # |M eta - g| over S eps ((|H| + mu D^2) |eta| + |g|), in its worst row
    curvature: np.ndarray  # least eigenvalue of T M T over S eps
    radius: np.ndarray  # |r - ||D eta||| over S eps r


def certify_cubic(g, H, d, lam, eta, radius):
    """Stationarity and M >= 0, which together certify a global minimiser; for N problems of size S.

    T makes the diagonal of T (|H| + mu D^2) T one, and cancels from the rows of the residual. Their unit has
    |H| + mu D^2, not |M|: near the pole H and mu D^2 cancel, and only they, not their sum, are known to rounding.
    """
    S, eps = g.shape[1], np.finfo(eta.dtype).eps
    g, H, d, lam, eta, radius = (np.asarray(x, _wider(eta.dtype)) for x in (g, H, d, lam, eta, radius))
    H = (H + H.swapaxes(1, 2)) / 2
    damping = _diagonal(lam[:, None] / 2 * radius[:, None] * d**2)
    T = _unit_scale(np.einsum("nii->ni", abs(H) + damping))
    off = _apply(H + damping, eta) - g
    unit = _apply(abs(H) + damping, abs(eta)) + abs(g)
    residual = np.max(_ratio(abs(off), unit), axis=1)
    curvature = _least_eigenvalue((H + damping) * T[:, :, None] * T[:, None, :])
    off_radius = _ratio(abs(radius - _norm(d * eta)), radius)
    return Certificate(*((x / (S * eps)).astype(float) for x in (residual, curvature, off_radius)))


def definiteness_without_cubic(g, H, d, lam):
    """Least eigenvalue of H on the kernel of D, scaled to a unit diagonal, over S eps; for N problems.

    Positive: there is a finite minimiser. Negative: there is none. The kernel is everything where lambda = 0.
    """
    S, eps = g.shape[1], np.finfo(H.dtype).eps
    wide = _wider(H.dtype)
    kernel = ((d == 0) | (lam[:, None] == 0)) & ~_unused(g, H, d)
    H = H.astype(wide)
    H = np.where(kernel[:, :, None] & kernel[:, None, :], (H + H.swapaxes(1, 2)) / 2, _diagonal(~kernel))
    diagonal = np.einsum("nii->ni", H)
    T = _unit_scale(diagonal)
    least = _least_eigenvalue(H * T[:, :, None] * T[:, None, :])
    return np.where(np.any(diagonal <= 0, axis=1), -np.inf, least / (S * eps))


def cubic_model(g, H, d, lam, eta, t=1):
    """m(t eta), m(eta) = -g^T eta + eta^T H eta / 2 + lambda/6 ||D eta||^3, with 60 digits."""
    with mpmath.workdps(60):
        g, H, d, lam, eta = (_mp(x) for x in (g, H, d, lam, eta))
        eta = [t * x for x in eta]
        S = len(g)
        quadratic = sum(eta[i] * H[i][j] * eta[j] for i in range(S) for j in range(S)) / 2
        return quadratic - mpmath.fdot(g, eta) + lam / 6 * _mp_norm(d, eta) ** 3


class Minimum(NamedTuple):
    value: mpmath.mpf
    radius: mpmath.mpf
    eta: np.ndarray  # without its part along the null vector in the hard case
    hard: bool


def minimise_cubic(g, H, d, lam):
    """The minimum of the cubic model with 60 digits by bisection on mu = lambda/2 r, or None if there is none."""
    used = ~_unused(g[None], H[None], d[None])[0]
    whole_eta = np.zeros(len(g))
    g, H, d = g[used], H[np.ix_(used, used)], d[used]
    with mpmath.workdps(60):
        g, H, d, lam = (_mp(x) for x in (g, H, d, lam))
        kappa, mu = lam / 2, mpmath.mpf(0)

        def at_or_above_root(mu):
            eta = _solve_definite(g, H, d, mu)
            return eta is not None and kappa * _mp_norm(d, eta) <= mu

        if not at_or_above_root(mu):
            mu = _smallest_where(at_or_above_root) if lam > 0 else None
        if mu is None:
            return None
        eta = _solve_definite(g, H, d, mu)
        hard = kappa * _mp_norm(d, eta) < mu * (1 - mpmath.mpf(10) ** -20)
        r = mu / kappa if mu > 0 else _mp_norm(d, eta)
        whole_eta[used] = eta
        return Minimum(-mpmath.fdot(g, eta) / 2 - lam / 12 * r**3, r, whole_eta, hard)


def minimise_on_ray(g, H, d, lam, eta):
    """The t in (0, 2^20) with the least model at t eta, to 17 digits by golden section."""
    with mpmath.workdps(60):
        value = functools.cache(lambda t: cubic_model(g, H, d, lam, eta, t))
        low, high, golden = mpmath.mpf(0), mpmath.ldexp(1, 20), (mpmath.sqrt(5) - 1) / 2
        while high - low > high * mpmath.mpf(10) ** -17:
            left, right = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, right) if value(left) < value(right) else (left, high)
        return float(high)


def _smallest_where(true_from_there_on, first=-700, last=700):
    """The least mu in (2^first, 2^last) where a monotone condition holds, to 48 digits; None if it never does."""
    if not true_from_there_on(mpmath.ldexp(1, last)):
        return None
    while last - first > 1:
        mid = (first + last) // 2
        first, last = (first, mid) if true_from_there_on(mpmath.ldexp(1, mid)) else (mid, last)
    low, high = mpmath.ldexp(1, first), mpmath.ldexp(1, last)
    for _ in range(160):
        mid = (low + high) / 2
        low, high = (low, mid) if true_from_there_on(mid) else (mid, high)
    return high


def _solve_definite(g, H, d, mu):
    """(H + mu D^2)^-1 g by L diag(p) L^T, or None unless all pivots are positive."""
    S = len(g)
    L, p, x = [[0] * S for _ in range(S)], [0] * S, list(g)
    for i in range(S):
        damping = mu * d[i] * d[i]
        for j in range(i):
            L[i][j] = (H[i][j] - sum(L[i][k] * L[j][k] * p[k] for k in range(j))) / p[j]
        p[i] = H[i][i] + damping - sum(L[i][k] ** 2 * p[k] for k in range(i))
        if p[i] <= (abs(H[i][i]) + damping) * mpmath.mpf(10) ** -56:
            return None
        x[i] -= sum(L[i][k] * x[k] for k in range(i))
    x = [a / b for a, b in zip(x, p, strict=True)]
    for i in reversed(range(S)):
        x[i] -= sum(L[k][i] * x[k] for k in range(i + 1, S))
    return x


def _mp(x):
    return [_mp(y) for y in x] if np.ndim(x) else mpmath.mpf(float(x))


def _mp_norm(d, eta):
    return mpmath.sqrt(sum((a * b) ** 2 for a, b in zip(d, eta, strict=True)))


def _wider(dtype):
    return np.float64 if np.finfo(dtype).bits == 32 else np.longdouble


def _unused(g, H, d):
    return (g == 0) & (d == 0) & np.all(H == 0, axis=2)


def _apply(A, x):
    return np.einsum("nij,nj->ni", A, x)


def _norm(x):
    return np.sqrt(np.sum(x * x, axis=1))


def _ratio(x, unit):
    return x / np.where(unit > 0, unit, 1)


def _diagonal(x):
    return x[:, :, None] * np.eye(x.shape[1], dtype=x.dtype)


def _unit_scale(diagonal):
    return 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))


def _least_eigenvalue(A):
    return np.linalg.eigvalsh(A.astype(np.float64))[:, 0]
