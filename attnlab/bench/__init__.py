"""Measuring: memory, time, windows, training and fused attention, beside peers in the same run.

    attnlab bench memory        python -m attnlab.bench memory [--quick] [--save FOLDER]

Every module has `run(save=None, quick=False)`, which prints a table and returns a `Result`.
"""

BENCHMARKS = ("memory", "time", "window", "train", "flash")
