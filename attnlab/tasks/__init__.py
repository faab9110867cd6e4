"""Data to learn from: real text, and the field's synthetic tasks."""

from attnlab.tasks.passkey import Passkey
from attnlab.tasks.text import Corpus, Vocabulary, load_corpus, sample_batch

__all__ = ["Corpus", "Passkey", "Vocabulary", "load_corpus", "sample_batch"]
