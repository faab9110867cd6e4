"""Options of attention that mean nothing to a mechanism: refused by name, never overlooked.

Layers hand all mechanisms the same options.  One that is as if it were not given (None, False, or
no modifiers) is no reason to refuse.
"""

from typing import Any


def refuse(options: dict[str, Any], words: str, *names: str) -> dict[str, Any]:
    """`options` without `names`, which have no meaning for a mechanism.

    Raises:
      ValueError: one of them is given; `words` say why it may not be.
    """
    for name in names:
        given = options.get(name)
        if (
            given is not None
            and given is not False
            and not (isinstance(given, tuple) and not given)
        ):
            raise ValueError(f"{name}: {words}, got {_shown(given)}.")
    return {name: value for name, value in options.items() if name not in names}


def refuse_dropout(options: dict[str, Any], words: str) -> dict[str, Any]:
    """`options` without the two of dropout, for a mechanism without weights to drop.

    Raises:
      ValueError: a rate or a key that no mechanism takes.
      NotImplementedError: a rate that is not 0; `words` say what is instead of weights.
    """
    rate = options.get("dropout_rate", 0.0)
    if not isinstance(rate, float | int) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), got {rate!r}.")
    if rate and options.get("dropout_key") is None:
        raise ValueError(f"dropout_key: dropout_rate={rate} needs a JAX random key, got None.")
    if rate:
        raise NotImplementedError(f"dropout_rate: {words}.")
    return {name: x for name, x in options.items() if name not in ("dropout_rate", "dropout_key")}


def _shown(given: Any) -> str:
    shape = getattr(given, "shape", None)
    return repr(given) if shape is None else f"an array of shape {shape}"
