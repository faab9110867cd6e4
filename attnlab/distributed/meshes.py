"""Names of mesh axes, and what is refused of them."""

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
