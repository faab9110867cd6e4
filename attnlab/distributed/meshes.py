"""Names of mesh axes, and what is refused of them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh


def axis_names(axes: Any) -> tuple[str, ...]:
    """One name, several or None, as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def automatic(mesh: Any) -> Any:
    """The mesh with all cuts left to the compiler but our own, whatever it says of its axes."""
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    return mesh.update(axis_types=types)


def check_axes(mesh: Any, **axes: Any) -> None:
    """Raise TypeError for what is no mesh, ValueError for an axis it has not or given twice."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}.")
    taken: list[str] = []
    for argument, given in axes.items():
        for name in axis_names(given):
            if name not in mesh.shape:
                raise ValueError(
                    f"{argument}: the mesh has no axis {name!r}; its axes are {dict(mesh.shape)}."
                )
            if name in taken:
                raise ValueError(f"{argument}: mesh axis {name!r} was given twice.")
            taken.append(name)


def on_devices(body: Callable, mesh: Any, in_specs: tuple[Any, ...], out_specs: Any) -> Callable:
    """`jax.shard_map` of the body, under whatever mesh the caller has set.

    Where that mesh's axes are explicit (`jax.set_mesh`), arrays are brought to the cuts first, and
    the results say how they are cut.  What varies over which axis is left unchecked: the folds'
    derivatives are our own, and kernels do not say it.
    """
    context = jax.sharding.get_abstract_mesh()
    explicit = jax.sharding.AxisType.Explicit in context.axis_types

    def run(*arrays: Any) -> Any:
        if explicit:
            arrays = jax.tree.map(jax.reshard, arrays, in_specs)
        return jax.shard_map(
            body, mesh=context if explicit else automatic(mesh), in_specs=in_specs,
            out_specs=out_specs, check_vma=False,
        )(*arrays)  # fmt: skip

    return run
