"""Measuring: memory, time, windows, training, fused and linear attention, beside peers; what
mechanisms learn; and what attention across devices sends, holds and waits for.

    attnlab bench memory        python -m attnlab.bench memory [--quick] [--save FOLDER]

Every module has `run(save=None, quick=False)`, which prints a table and returns a `Result`.
`quality` and `claims` take hours in full and go on where they were cut off: see `kept`.
"""

BENCHMARKS = (
    "memory", "time", "window", "train", "flash", "linear", "recall", "quality", "claims",
    "distributed",
)  # fmt: skip
