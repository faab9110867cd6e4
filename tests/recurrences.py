"""The linear-state recurrence, a loop over steps in float64 NumPy: what the tests believe."""

import numpy as np


def recurrence(query, key, value, *, log_decay=None, erase=None, reset=None, state=None):
    """Output "*B T N D" and the last state "*B K H D", one step and one head after the other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    *batch, length, heads, width = query.shape
    kv_heads, group = key.shape[-2], heads // key.shape[-2]
    memory = np.zeros((*batch, kv_heads, width, value.shape[-1]))
    if state is not None:
        memory[...] = state
    decay = np.ones(key.shape)
    if log_decay is not None:
        g = np.exp(np.asarray(log_decay, np.float64))
        decay[...] = g[..., None] if g.shape != key.shape else g
    out = np.zeros((*batch, length, heads, value.shape[-1]))
    for at in np.ndindex(*batch, kv_heads):
        row, head = at[:-1], at[-1]
        for t in range(length):
            if reset is not None and reset[(*row, t)]:
                memory[at] = 0.0
            k, v, damp = (x[(*row, t, head)] for x in (key, value, decay))
            taken = 0.0 if erase is None else np.asarray(erase, np.float64)[(*row, t, head)]
            read = np.zeros(value.shape[-1])
            for h in range(width) if erase is not None else ():
                read += taken[h] * memory[at][h]
            for h in range(width):
                memory[(*at, h)] = damp[h] * memory[(*at, h)] + k[h] * (v - read)
            for n in range(head * group, (head + 1) * group):
                out[(*row, t, n)] = query[(*row, t, n)] @ memory[at]
    return out, memory


def unrolled(query, key, value, log_decay):
    """The same for one head without erasing, from the sum over pairs and no state at all."""
    out = np.zeros((len(query), value.shape[-1]))
    for t in range(len(query)):
        for s in range(t + 1):
            damp = np.exp(np.sum(log_decay[s + 1 : t + 1], axis=0))
            out[t] += np.sum(query[t] * damp * key[s]) * value[s]
    return out
