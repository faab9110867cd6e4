"""Training on a mesh: one device's losses, and checkpoints that go from mesh to mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.tasks import Corpus
from attnlab.training import (
    CheckpointError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RunFolder,
    TrainConfig,
    train_language_model,
)
from attnlab.training.loop import History, TrainState
from attnlab.training.optimizer import make_optimizer

TEXT = "the cat sat on the mat and the rat sat on the cat; " * 40

pytestmark = pytest.mark.usefixtures("lightly_compiled")

LOSS = {"rtol": 1e-5, "atol": 0.0}  # sums of float32 in another order


def tiny(steps=8, attention="alibi", context=20, batch_size=4, **model):
    corpus = Corpus.of("tiny", TEXT)
    options = {"num_layers": 1, "features": 16, "num_heads": 4, "dropout_rate": 0.1, **model}
    train = TrainConfig(steps, batch_size=batch_size, context=context, learning_rate=1e-2, warmup=2)
    data = DataConfig("tiny", corpus.vocabulary.characters)
    return corpus, RunConfig(data, ModelConfig(attention=attention, **options), train)


@pytest.fixture(scope="module")
def alone(lightly_compiled):
    return train_language_model(*tiny())


MESHES = {
    "2x4 heads": MeshConfig(2, 4, method="heads", cut_state=True),
}
MORE = {
    "1x1": MeshConfig(),
    "2x1": MeshConfig(2, 1),
    "2x4": MeshConfig(2, 4),
    "1x4 zigzag": MeshConfig(1, 4, layout="zigzag"),  # 5 positions each, made 6 to be pairs
    "1x4 striped": MeshConfig(1, 4, layout="striped"),
    "4x2 cut": MeshConfig(4, 2, cut_state=True),
}


@pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, id=name) for name, mesh in MESHES.items()),
        *(pytest.param(mesh, id=name, marks=pytest.mark.slow) for name, mesh in MORE.items()),
    ],
)
def test_a_mesh_has_the_losses_of_one_device(alone, mesh):
    """With dropout and evaluations; the model that comes back is an ordinary one."""
    model, history = train_language_model(*tiny(), mesh=mesh)
    np.testing.assert_allclose(history.losses, alone[1].losses, **LOSS)
    np.testing.assert_allclose(history.evaluations, alone[1].evaluations, **LOSS)
    one, two = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (alone[0], model))
    assert all(len(leaf.sharding.device_set) == 1 for leaf in two)
    for a, b in zip(one, two, strict=True):
        # Adam divides small gradients by their size: what sums differ by is not scaled down.
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def test_what_is_cut_is_held_in_parts():
    corpus, config = tiny()
    placement = MeshConfig(4, 2, cut_state=True).place()
    params = nnx.state(config.model.build(corpus.vocabulary.size, 0), nnx.Param)
    placed = placement.put(params, placement.state(params))
    kernel = placed["blocks"][0]["mlp"]["expand"]["kernel"][...]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0] // 4, kernel.shape[1])
    for one, two in zip(*map(jax.tree.leaves, (params, placement.gathered(placed))), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"data": 0}, {}, "data: expected at least 1, got 0"),
        ({"method": "star"}, {}, "method: 'star' is none of ring, heads"),
        ({"layout": "spiral"}, {}, "layout: expected one of"),
        ({"method": "heads", "layout": "zigzag"}, {}, "layout: 'zigzag' is of a ring"),
        ({"data": 3}, {}, "batch_size: 4 is not a multiple of the 'data' axis of the mesh, 3"),
        (
            {"sequence": 8},
            {},
            "context: 20 is not a multiple of the 'sequence' axis of the mesh, 8",
        ),
        ({"sequence": 8, "method": "heads"}, {"context": 16}, "num_heads: 4 is not a multiple"),
        ({"data": 4, "sequence": 4}, {}, "mesh: 4 x 4 devices were asked for, and only 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(options, changes, words):
    with pytest.raises(ValueError, match=words):
        train_language_model(*tiny(**changes), mesh=MeshConfig(**options))


def test_a_model_with_chunks_trains_to_the_same_on_a_mesh(alone):
    run, mesh = tiny(feed_forward_chunk=4), MeshConfig(2, 4, layout="zigzag")
    _, history = train_language_model(*run, mesh=mesh, evaluate_every=None)
    np.testing.assert_allclose(history.losses, alone[1].losses, **LOSS)


# Checkpoints.


def test_a_checkpoint_goes_from_mesh_to_mesh(tmp_path, alone):
    """2x4 -> 1x2 -> none -> 4x2: the same bits are read, and the losses are those of one device."""
    corpus, config = tiny()
    folder = RunFolder.create(tmp_path / "run", config, keep=9)
    route = [(2, MeshConfig(2, 4, cut_state=True)), (4, MeshConfig(1, 2)), (6, None),
             (8, MeshConfig(4, 2, cut_state=True))]  # fmt: skip

    class Stop(Exception):
        pass

    seen, read = {}, {}

    class Spy(RunFolder):
        def save(self, state, history):
            path = super().save(state, history)
            seen[int(state.step)] = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            return path

        def restore(self, like, step=None):
            state, history = super().restore(like, step)
            read[int(state.step)] = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            for one, two in zip(*map(jax.tree.leaves, (like, state)), strict=True):
                assert one.sharding.device_set == two.sharding.device_set
            return state, history

    def until(stop):
        def report(progress):
            if progress.step == stop:
                raise Stop

        return report

    spy = Spy(folder.path, config, keep=9)
    for i, (stop, mesh) in enumerate(route):
        with pytest.raises(Stop):
            train_language_model(
                corpus, config, folder=spy, save_every=2, resume=i > 0, mesh=mesh,
                evaluate_every=None, report=until(stop),
            )  # fmt: skip
    assert sorted(read) == [2, 4, 6]
    for step, leaves in read.items():
        for one, two in zip(leaves, seen[step], strict=True):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(folder.check(8)["losses"], alone[1].losses, **LOSS)


def test_a_checkpoint_of_another_model_is_refused_on_a_mesh_too(tmp_path):
    corpus, config = tiny()
    folder = RunFolder.create(tmp_path / "run", config)

    def state(features):
        model = tiny(features=features)[1].model.build(corpus.vocabulary.size, 0)
        params = nnx.state(model, nnx.Param)
        memory = make_optimizer(config.train).init(params)
        made = TrainState(jnp.zeros((), jnp.int32), params, memory)
        placement = MeshConfig(2, 4, cut_state=True).place()
        return placement.put(made, placement.state(made))

    folder.save(state(16), History())
    with pytest.raises(CheckpointError, match="is of another model"):
        folder.restore(state(32))
