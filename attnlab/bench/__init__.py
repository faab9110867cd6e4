"""Measuring: memory, time, windows, training, fused and linear attention, beside peers.

    attnlab bench memory        python -m attnlab.bench memory [--quick] [--save FOLDER]

Every module has `run(save=None, quick=False)`, which prints a table and returns a `Result`.
"""

BENCHMARKS = ("memory", "time", "window", "train", "flash", "linear", "recall")
