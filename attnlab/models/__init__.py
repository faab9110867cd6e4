"""Small whole models that a mechanism plugs into."""

from attnlab.models.generate import generate
from attnlab.models.language_model import CausalLM

__all__ = ["CausalLM", "generate"]
