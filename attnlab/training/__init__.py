"""Training: an optax loop, orbax checkpoints, progress bars, resuming to the same bits."""

from attnlab.training.checkpoint import CheckpointError, RunFolder
from attnlab.training.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.training.distill import distill
from attnlab.training.language import load_run, train_language_model
from attnlab.training.loop import History, fit
from attnlab.training.mesh import MeshConfig, Placement
from attnlab.training.optimizer import make_optimizer

__all__ = [
    "CheckpointError",
    "DataConfig",
    "History",
    "MeshConfig",
    "ModelConfig",
    "Placement",
    "RunConfig",
    "RunFolder",
    "TrainConfig",
    "distill",
    "fit",
    "load_run",
    "make_optimizer",
    "train_language_model",
]
