"""Training spread over a mesh, data x sequence: where parameters, batches and numbers lie.

    mesh = (data, sequence)        batch "B T": B cut over data, T over sequence
                                   parameters: whole on each device, or cut over data

Attention goes across devices by `attnlab.distributed.over`; all else the compiler cuts as its
inputs are.  Losses are those of one device, up to the order in which float32 sums are taken.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnlab.distributed import layouts
from attnlab.distributed.across import over
from attnlab.training.config import RunConfig

METHODS = ("ring", "heads")


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over devices; no part of what the run is, so it may change on resuming.

    Attributes:
      data: devices that share the rows of a batch.
      sequence: devices that share the positions of a row.
      method: how attention crosses positions: "ring" (keys and values travel) or "heads" (heads are
        exchanged for positions; the model needs a multiple of `sequence` of them).
      layout: which positions a device of a ring works on: "contiguous", "striped" or "zigzag".
      cut_state: parameters and optimizer state are cut over `data`, where an axis can be, instead
        of whole on each device; less memory, more traffic.

    Raises:
      ValueError: sizes that are not positive, an unknown method or layout, a layout without a ring.
    """

    data: int = 1
    sequence: int = 1
    method: str = "ring"
    layout: str = "contiguous"
    cut_state: bool = False

    def __post_init__(self):
        for name in ("data", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is none of {', '.join(METHODS)}.")
        layouts.check_layout(self.layout)
        if self.method == "heads" and self.layout != "contiguous":
            raise ValueError(f'layout: {self.layout!r} is of a ring; method="heads" has none.')

    def check(self, run: RunConfig) -> None:
        """Raises ValueError where the run's batches or heads cannot be cut so."""
        sizes = [
            ("batch_size", run.train.batch_size, "data", self.data),
            ("context", run.train.context, "sequence", self.sequence),
        ]
        if self.method == "heads":
            sizes.append(("num_heads", run.model.num_heads, "sequence", self.sequence))
        for name, size, axis, devices in sizes:
            if size % devices:
                raise ValueError(
                    f"{name}: {size} is not a multiple of the {axis!r} axis of the mesh, {devices}."
                )

    def place(self) -> "Placement":
        """The mesh, over the first devices there are; with several processes, over all of them.

        Raises ValueError where there are too few devices, or one of another process is left out.
        """
        devices, wanted = jax.devices(), self.data * self.sequence
        if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
            few = "only " if wanted > len(devices) else ""
            raise ValueError(
                f"mesh: {self.data} x {self.sequence} devices were asked for, and {few}"
                f"{len(devices)} are there, in {jax.process_count()} process(es)."
            )
        types = (AxisType.Auto,) * 2
        sizes, names = (self.data, self.sequence), ("data", "sequence")
        mesh = jax.make_mesh(sizes, names, axis_types=types, devices=devices[:wanted])
        return Placement(self, mesh)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh of real devices and what lies where on it; made by `MeshConfig.place`."""

    config: MeshConfig
    mesh: Mesh

    def whole(self, tree: Any) -> Any:
        """The shardings of arrays that each device has whole."""
        return jax.tree.map(lambda _: NamedSharding(self.mesh, P()), tree)

    def state(self, tree: Any) -> Any:
        """The shardings of parameters and optimizer state."""
        if not self.config.cut_state:
            return self.whole(tree)
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self._cut(jnp.shape(x))), tree)

    def _cut(self, shape: tuple[int, ...]) -> P:
        size = self.config.data
        axis = next((i for i, n in enumerate(shape) if n % size == 0 and n >= size), None)
        return P() if axis is None or size == 1 else P(*(None,) * axis, "data")

    def put(self, tree: Any, shardings: Any = None) -> Any:
        """Arrays of this process as arrays of the mesh, whole unless told otherwise.

        Each process gives the same numbers and keeps those that its devices hold; what is on the
        mesh already stays as it is.
        """
        shardings = self.whole(tree) if shardings is None else shardings

        def one(x: Any, sharding: NamedSharding) -> Array:
            if isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set:
                return x if x.sharding == sharding else jax.device_put(x, sharding)
            values = np.asarray(x)
            return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])

        return jax.tree.map(one, tree, shardings)

    def gathered(self, tree: Any) -> Any:
        """Arrays of the mesh as arrays of this process alone; every process has to ask."""
        whole = jax.jit(lambda x: x, out_shardings=self.whole(tree))(tree)
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), whole)

    def tokens(self, x: Array) -> Array:
        """Within a traced function: "B T" cut over the mesh, rows only where they are enough."""
        rows = "data" if x.shape[0] % self.config.data == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(rows, "sequence")))

    @contextlib.contextmanager
    def attention(self, rows: int) -> Iterator[None]:
        """Within this context attention, of batches of so many rows, goes across the mesh."""
        options: dict[str, Any] = {"batch": "data" if rows % self.config.data == 0 else None}
        options[self.config.method] = "sequence"
        with over(self.mesh, layout=self.config.layout, **options):
            yield
