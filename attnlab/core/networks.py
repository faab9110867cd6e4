"""Networks of one hidden layer with norms before both of their matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

SLOPE, EPSILON = 0.01, 1e-5  # of the leaky unit below zero, and of the norms


class Net(NamedTuple):
    """J networks of one shape: `expand` "J C E" and `contract` "J E O", gains and biases of both.

    Each computes contract . norm(leaky(expand . norm(z) + b)) + b, with gains and shifts of norms.
    """

    gain: Any
    shift: Any
    expand: Any
    expand_bias: Any
    hidden_gain: Any
    hidden_shift: Any
    contract: Any
    contract_bias: Any

    def __call__(self, z: Float[Array, "*B C"]) -> Float[Array, "*B J O"]:
        """The output of each network."""
        net = Net(*(x.astype(z.dtype) for x in self))
        hidden = jnp.einsum("...jc,jce->...je", _normed(z[..., None, :], net.gain, net.shift),
                            net.expand)  # fmt: skip
        hidden = jax.nn.leaky_relu(_plus(hidden, net.expand_bias), SLOPE)
        hidden = _normed(hidden, net.hidden_gain, net.hidden_shift)
        return _plus(jnp.einsum("...je,jeo->...jo", hidden, net.contract), net.contract_bias)


def _normed(x: Array, gain: Array, shift: Array) -> Array:
    """Mean 0 and deviation 1 over the last axis, then a gain and a shift."""
    off = x - jnp.mean(x, axis=-1, keepdims=True)
    unit = off * jax.lax.rsqrt(jnp.mean(jnp.square(off), axis=-1, keepdims=True) + EPSILON)
    return _plus(unit * jnp.expand_dims(gain, range(x.ndim - 2)), shift)


def _plus(x: Array, bias: Array) -> Array:
    return x + jnp.expand_dims(bias, range(x.ndim - bias.ndim))


class Network(nnx.Module):
    """Parameters of a `Net`; weights start like a linear layer's, uniform by 1 / sqrt(inputs)."""

    def __init__(self, count: int, read: int, hidden: int, written: int, rngs: nnx.Rngs) -> None:
        def drawn(*shape: int, inputs: int) -> nnx.Param:
            bound = inputs**-0.5
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.gain = nnx.Param(jnp.ones((count, read)))
        self.shift = nnx.Param(jnp.zeros((count, read)))
        self.expand = drawn(count, read, hidden, inputs=read)
        self.expand_bias = drawn(count, hidden, inputs=read)
        self.hidden_gain = nnx.Param(jnp.ones((count, hidden)))
        self.hidden_shift = nnx.Param(jnp.zeros((count, hidden)))
        self.contract = drawn(count, hidden, written, inputs=hidden)
        self.contract_bias = drawn(count, written, inputs=hidden)

    def net(self) -> Net:
        return Net(*(getattr(self, name)[...] for name in Net._fields))
