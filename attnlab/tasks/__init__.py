"""Data to learn from: real text, and the field's synthetic tasks."""

from attnlab.tasks.associative_recall import AssociativeRecall
from attnlab.tasks.counting import Counting
from attnlab.tasks.flip_flop import FlipFlop
from attnlab.tasks.linear_regression import LinearRegression
from attnlab.tasks.passkey import Passkey
from attnlab.tasks.same_different import SameDifferent
from attnlab.tasks.selective_copying import SelectiveCopying
from attnlab.tasks.text import Corpus, Vocabulary, load_corpus, sample_batch

__all__ = [
    "AssociativeRecall",
    "Corpus",
    "Counting",
    "FlipFlop",
    "LinearRegression",
    "Passkey",
    "SameDifferent",
    "SelectiveCopying",
    "Vocabulary",
    "load_corpus",
    "sample_batch",
]
