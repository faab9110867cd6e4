"""Small whole models that a mechanism plugs into."""

from attnlab.models.generate import generate
from attnlab.models.language_model import CausalLM
from attnlab.models.sourced import SourcedLM

__all__ = ["CausalLM", "SourcedLM", "generate"]
