"""Try a mask, score modifier or normalizer of your own before trusting it on a device.

Hand one in; what comes back is a report: print it, look at its figure, or let a test of yours call
`raise_if_failed`.  Everything runs on any machine, kernels interpreted.

    >>> import jax.numpy as jnp
    >>> from attnlab import masks, scores, testing
    >>> def recent(score, at, rate):
    ...     distance = jnp.abs(at.relative).astype(score.dtype)
    ...     return score - rate * jnp.sqrt(distance)
    >>> mine = scores.ScoreFunction(recent, jnp.ones(4), "N")
    >>> report = testing.check_modifier(mine, mask=masks.Causal(), implementations=["blockwise"])
    >>> report.ok
    True
    >>> [finding.status for finding in report.find("pairs")]
    ['ok']

What is looked at, by the names of the findings:

    leaves        arrays fit the axes they are tagged with, and act along those axes only
    static        other fields can be hashed, as compiling needs
    output        shape and dtype of what is returned
    transforms    the same under jit and vmap, and when called again
    pairs         each pair is treated by itself
    tiles         the same on a tile of any size and place as on the whole matrix
    precision     float32 against float64
    derivative    of your function alone, against differences in float64
    extremes      scores of 0 and of 10000 either way give neither NaN nor infinity
    masked pairs  what becomes of pairs that are hidden, or beyond the end, reaches no gradient
    additive      what claims only to add to scores does so
    bounds        what a mask says of whole tiles is true of their pairs
    plan          empty, full and partial tiles as implementations take them
    future        whether a query may see what comes after it
    empty rows    queries that see nothing, and "unseen keys"
    row sums      what weights sum to
    agreement     attention on each implementation against the formula in float64 NumPy
    gradient      of query, key, value and your arrays: against differences, then on each
                  implementation
    forward mode  jvp against vjp
    masked NaN    NaN in a key reaches only the queries that see it
    kernels       which fused kernels take it, and what keeps the others

The formula is your own function on the whole score matrix in float64, and NumPy around it: no code
of the implementations takes part.  Your function itself is taken at its word: whether it is the
one you meant is for the figure, and for you, to say.
"""

from attnlab.testing.checks import check_mask, check_modifier, check_normalizer
from attnlab.testing.report import Finding, Report

__all__ = ["Finding", "Report", "check_mask", "check_modifier", "check_normalizer"]
