"""Where arrays live: explicit shardings, and the axes of a ``shard_map``. Elsewhere nothing in here does anything.

Under a mesh with explicit axes an array's sharding is a part of its type; so are, under ``shard_map``, the axes over
which it varies. What is made anew, zeros above all, has to be given both.

``tracked_axes`` are the axes over which JAX knows what varies (``shard_map`` with ``check_vma``). A sum of parts over
the devices of such an axis counts a part that doesn't vary once: ``in_parts`` divides it among the devices. Without
tracking every device holds its own copy of everything, and the mean over the devices is right as it is.
"""

import math
from collections.abc import Collection, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_reshard = jax.reshard if hasattr(jax, "reshard") else jax.sharding.reshard


def with_sharding_of(x: jax.Array, aval: Any) -> jax.Array:
    """``x`` in the explicit sharding of ``aval``, its leading axes beyond those of ``aval`` whole on every device."""
    sharding = _explicit(aval)
    if sharding is None:
        return x
    spec = PartitionSpec(*[None] * (x.ndim - len(aval.shape)), *sharding.spec)
    here = _explicit(jax.typeof(x))
    return x if here is not None and here.spec == spec else _reshard(x, NamedSharding(sharding.mesh, spec))


def replicated(x: jax.Array) -> NamedSharding | None:
    """The ``out_sharding`` of a sum over divided axes of ``x``: None where no sharding is explicit."""
    sharding = _explicit(jax.typeof(x))
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def on_a_mesh(*arrays: jax.Array) -> bool:
    """Whether arrays may be divided among devices, as far as their types tell; inside a ``shard_map`` they aren't."""
    meshes = [getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) for x in arrays]
    return any(t is not AxisType.Manual for m in meshes if m is not None for t in m.axis_types)


def zeros_of(aval: Any, dtype: Any = None, rows: int | None = None) -> jax.Array:
    """Zeros of the type of ``aval``, or so many rows of them."""
    shape = aval.shape if rows is None else (rows, *aval.shape)
    return pvary(with_sharding_of(jnp.zeros(shape, aval.dtype if dtype is None else dtype), aval), varying_axes(aval))


def varying_axes(aval: Any) -> frozenset:
    """The axes of ``shard_map`` over which a value of this type is known to vary, kept elsewhere in later jax."""
    if hasattr(aval, "vma"):
        return aval.vma or frozenset()
    axis_type = getattr(aval, "manual_axis_type", None) or getattr(aval, "mat", None)
    return getattr(axis_type, "varying", frozenset())


def tracked_axes() -> tuple:
    """The axes of the ``shard_map`` around this call for which varying is tracked."""
    names = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(a for a in names if a in varying_axes(jax.typeof(lax.axis_index(a))))


def pvary(x: jax.Array, axes: Collection[Hashable]) -> jax.Array:
    """``x``, marked as varying over the axes as well."""
    missing = tuple(a for a in sorted(axes, key=str) if a not in varying_axes(jax.typeof(x)))
    if not missing:
        return x
    older: Any = lax
    return lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else older.pvary(x, missing)


def in_parts(x: jax.Array, axes: Collection[Hashable]) -> jax.Array:
    """Parts of ``x`` that add up to it over the devices of the axes over which it doesn't vary."""
    missing = [a for a in axes if a not in varying_axes(jax.typeof(x))]
    return pvary(x / math.prod(map(lax.axis_size, missing)), missing) if missing else x


def mean(x: jax.Array, axis_name: Hashable | tuple | None) -> jax.Array:
    """The mean over the devices; of a number that is the same on all, that number."""
    names = axis_names(axis_name)
    return lax.pmean(x, names) if names else x


def axis_names(axis_name: Hashable | tuple | None) -> tuple:
    """The names in an ``axis_name`` argument, or an error for one that no ``shard_map`` or ``pmap`` binds."""
    names = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    for name in names:
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"axis_name {name!r} is no axis of a shard_map or pmap around this call; leave axis_name out under jit"
                " with sharded arrays, where the loss is the whole batch's already"
            ) from error
    return names


def _explicit(aval):
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and AxisType.Explicit in mesh.axis_types else None
