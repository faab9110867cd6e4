"""Checking a reader's answer: missing, wrong in this way, or right."""

from collections.abc import Callable


def judge(answer: Callable, test: Callable[[Callable], str | None]) -> None:
    """Run `test` on `answer`; it returns None, or what is wrong with it."""
    try:
        complaint = test(answer)
    except NotImplementedError:
        print("… waiting for your answer")
        return
    print(f"✗ not yet: {complaint}" if complaint else "✓ right")
