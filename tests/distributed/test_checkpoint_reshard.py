"""Three steps, save, three more under another layout equals six uninterrupted; under the same one, bit for bit.

One launch per number of ranks runs every pair of layouts (checkpoint_worker.py); the one process is this one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastkd.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_worker as worker
from parallel_worker import Case, build

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, the save of one process, and what it holds after six steps."""
    folder = tmp_path_factory.mktemp("reshard")
    for kind in worker.KINDS:
        build(Case(tied=kind == "tied")).save_pretrained(folder / kind)
        one = worker.save(folder, kind, worker.ALONE)
        torch.save(worker.weights(one), folder / f"{kind}_six.pt")
        # The save in the middle changed nothing.
        other = worker.student(folder, kind, worker.ALONE)
        worker.train(other, 6)
        assert all(torch.equal(a, b) for a, b in zip(worker.local(one), worker.local(other), strict=True))
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_goes_on_in_another_layout(ranks, folder, tmp_path, launch):
    printed = launch(worker.__file__, ranks, folder, tmp_path / "rendezvous")
    assert printed.count("largest relative error") == len(worker.KINDS) * len(worker.PAIRS[ranks]), printed
    # Back in one process, from every layout that saved.
    for kind in worker.KINDS:
        for saved in {saved for saved, _ in worker.PAIRS[ranks]}:
            worker.worst(worker.resume(folder, kind, saved, worker.ALONE), folder, kind)


def test_one_process_resumes_bit_for_bit(folder):
    for kind in worker.KINDS:
        one = worker.resume(folder, kind, worker.ALONE, worker.ALONE)
        six = torch.load(folder / f"{kind}_six.pt")
        got = worker.weights(one)
        assert all(torch.equal(got[name], tensor) for name, tensor in six.items())


def test_another_model_is_refused(folder):
    with pytest.raises(CheckpointError, match="lm_head"):
        worker.student(folder, "tied", worker.ALONE).load(
            worker.where(folder, "untied", worker.ALONE) / "step_3" / "state"
        )
