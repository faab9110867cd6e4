"""One of several processes of a run, and what befalls one of them; `test_processes` starts these.

    python -m tests.distributed.worker FOLDER COORDINATOR PROCESSES PROCESS_ID PATIENCE EVENT VICTIM

EVENT befalls process VICTIM: "step" (killed between steps 5 and 6), "save" (killed while the
checkpoint of step 6 is written), "stop" (stopped after step 5, its connections stay open), "error"
(an error of its own after step 5).
"""

import os
import signal
import sys

import orbax.checkpoint as ocp

from attnlab.distributed import processes
from attnlab.tasks import Corpus
from attnlab.training import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    RunFolder,
    TrainConfig,
    train_language_model,
)

TEXT = "the cat sat on the mat and the rat sat on the cat; " * 40
STEPS = 8


def tiny():
    """The corpus and the configuration of the runs of these tests."""
    corpus = Corpus.of("tiny", TEXT)
    model = ModelConfig("alibi", num_layers=1, features=16, num_heads=4, dropout_rate=0.1)
    train = TrainConfig(STEPS, batch_size=4, context=16, learning_rate=1e-2, warmup=2)
    return corpus, RunConfig(DataConfig("tiny", corpus.vocabulary.characters), model, train)


def main(path, coordinator, count, me, patience, event, victim):
    """Trains to the end, or to the event."""
    struck = me == victim

    def befall(number):
        if struck:
            print("now", flush=True)
            os.kill(os.getpid(), number)

    def report(progress):
        if progress.step == 5 and event in ("step", "stop"):
            befall(signal.SIGKILL if event == "step" else signal.SIGSTOP)
        if progress.step == 5 and event == "error" and struck:
            raise ValueError("no such luck")

    class Folder(RunFolder):
        def save(self, state, history):
            if int(state.step) == 6 and event == "save":
                ocp.StandardCheckpointer.wait_until_finished = lambda self: befall(signal.SIGKILL)
            return super().save(state, history)

    corpus, config = tiny()
    with processes.together(coordinator, count, me, patience=patience):
        train_language_model(
            corpus,
            config,
            folder=Folder(path, config),
            save_every=2,
            evaluate_every=5,  # a stop after step 5
            mesh=MeshConfig(2, count),
            report=report,
        )


if __name__ == "__main__":
    from pathlib import Path

    folder, coordinator, count, me, patience, event, victim = sys.argv[1:]
    main(Path(folder), coordinator, int(count), int(me), float(patience), event, int(victim))
