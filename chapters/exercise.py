"""Checking a reader's answer: say what is missing, what is wrong, or that it is right."""

from collections.abc import Callable


def judge(answer: Callable, test: Callable[[Callable], str | None]) -> None:
    """Try `answer` with `test`, which returns None when it is right, else what is wrong with it."""
    try:
        complaint = test(answer)
    except NotImplementedError:
        print("… waiting for your answer")
        return
    print(f"✗ not yet: {complaint}" if complaint else "✓ right")
