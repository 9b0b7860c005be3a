"""The worker program of test_checkpoint_reshard.py: three steps, a save, three more under the same or another layout.

Rank 0 is the driver too: what it calls on its Student, the others are told to call on theirs.

Run as: checkpoint_worker.py FOLDER RENDEZVOUS WORLD RANK
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastkd import parallel
from fastkd.checkpoint import Checkpoints, TrainingInfo, Workers
from fastkd.config import Checkpointing
from fastkd.errors import CheckpointError
from fastkd.recipe import recipe_from
from fastkd.student import Student

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import CLIP, EXACT, VALID, data, error
from worker_inputs import DEVICE, join

KINDS = ("tied", "untied")
ALONE = (1, 1, 1)
# (tp, dp, cp) that saves → (tp, dp, cp) that resumes. ALONE is one process without a mesh. With tp 4 the two
# key/value heads are fewer than the ranks; no degree divides the 101 rows of the vocabulary.
PAIRS = {
    2: [((2, 1, 1), (2, 1, 1)), ((2, 1, 1), (1, 2, 1)), ((1, 2, 1), (2, 1, 1)), ((2, 1, 1), (1, 1, 2)),
        (ALONE, (2, 1, 1))],
    4: [((2, 2, 1), (2, 2, 1)), ((2, 2, 1), (4, 1, 1)), ((4, 1, 1), (2, 2, 1)), ((4, 1, 1), (1, 2, 2)),
        (ALONE, (2, 2, 1))],
}  # fmt: skip


def student(folder: Path, kind: str, layout: tuple[int, int, int]) -> Student:
    tp, dp, cp = layout
    recipe = recipe_from(
        {
            "loss_fn": {"kl_type": "reverse", "outside_topk": "bucket"},
            "policy": {
                "model_name": str(folder / kind),
                "precision": "float32",
                "train_global_batch_size": 8,
                "sequence_packing": {"enabled": True, "train_mb_tokens": 40},
                "max_total_sequence_length": 40,
                "dtensor_cfg": {"tensor_parallel_size": tp, "context_parallel_size": cp},
                "max_grad_norm": CLIP,
                # A large eps: Adam divides by the gradient's size, and would make rounding errors large.
                "optimizer": {"name": "torch.optim.AdamW", "kwargs": {"lr": 0.01, "eps": 1e-3}},
                "scheduler": [{"name": "LinearLR", "kwargs": {"start_factor": 0.2, "total_iters": 5}}],
            },
            "teacher": {"model_name": "unused"},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe
    mesh = None if layout == ALONE else parallel.build_mesh(tp, cp, dp, DEVICE.type)
    return Student(recipe, DEVICE, VALID, mesh)


def train(one: Student, steps: int) -> None:
    rollouts, rows, _ = data()
    for _ in range(steps):
        one.train(rollouts, rows)


def weights(one: Student) -> dict[str, torch.Tensor]:
    """Gathered, by name, with the moments of the optimizer."""
    found = dict(one.causal_lm.named_parameters())
    moments = {f"{n}.{m}": one.optimizer.state[p][m] for n, p in found.items() for m in ("exp_avg", "exp_avg_sq")}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone()
        for name, t in {**found, **moments}.items()
    }


def local(one: Student) -> list[torch.Tensor]:
    """This rank's part of everything."""
    tensors = [t for p in one.parameters for t in (p, *one.optimizer.state[p].values())]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


class Group:
    """The students of all ranks, as the driver on rank 0 sees them."""

    def __init__(self, one: Student):
        self.one = one

    def call(self, method: str, *args: Any) -> Any:
        """On all ranks; rank 0's answer."""
        if dist.is_initialized():
            dist.broadcast_object_list([(method, args)], src=0)
        return self.one.__getattribute__(method)(*args)

    def follow(self) -> None:
        """What the other ranks do until they are told to stop."""
        while True:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            if box[0] is None:
                return
            method, args = box[0]
            try:
                getattr(self.one, method)(*args)
            except (OSError, CheckpointError) as failure:
                assert method in ("saved", "load"), failure  # rank 0 has it too

    def checkpoints(self, folder: Path) -> Checkpoints:
        def bound(method: str) -> Any:
            return lambda *args: self.call(method, *args)

        config = Checkpointing(checkpoint_dir=str(folder))
        return Checkpoints(config, Workers(bound("save"), bound("saved"), bound("load")))

    def drive(self, program: Any) -> None:
        """``program`` on rank 0, obedience on the others."""
        if dist.is_initialized() and dist.get_rank():
            return self.follow()
        program()
        if dist.is_initialized():
            dist.broadcast_object_list([None], src=0)


def info(step: int) -> TrainingInfo:
    return TrainingInfo(step, step * 8, step * 100, 1.0, {})


def where(folder: Path, kind: str, layout: tuple[int, int, int]) -> Path:
    return folder / f"{kind}_{'_'.join(map(str, layout))}"


def save(folder: Path, kind: str, layout: tuple[int, int, int]) -> Student:
    """Three steps, a save, and three more while it is being written."""
    one = student(folder, kind, layout)
    train(one, 3)
    group = Group(one)

    def program() -> None:
        store = group.checkpoints(where(folder, kind, layout))
        store.save(info(3), "")
        rollouts, rows, _ = data()
        for _ in range(3):
            group.call("train", rollouts, rows)
            store.poll()
        store.finish()
        assert store.steps() == [3]

    group.drive(program)
    return one


def resume(folder: Path, kind: str, saved: tuple[int, int, int], layout: tuple[int, int, int]) -> Student:
    """The save of one layout, taken up in another; three more steps."""
    one = student(folder, kind, layout)
    group = Group(one)

    def program() -> None:
        found = group.checkpoints(where(folder, kind, saved)).load_newest()
        assert found == info(3), found

    group.drive(program)
    assert one.version == 3 and one.scheduler.last_epoch == 3
    train(one, 3)
    return one


def worst(one: Student, folder: Path, kind: str) -> float:
    """Largest relative error against six uninterrupted steps in one process; raises above EXACT."""
    wanted = torch.load(folder / f"{kind}_six.pt")
    got = weights(one)
    assert got.keys() == wanted.keys()
    errors = {name: error(got[name], wanted[name]) for name in wanted}
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= EXACT}
    assert not wrong, wrong
    return max(errors.values())


def check_written_once(folder: Path, kind: str, layout: tuple[int, int, int], one: Student) -> None:
    """Replicated and tied tensors are in the files once: three float32 numbers per parameter, and little else."""
    state = where(folder, kind, layout) / "step_3" / "state"
    written = sum(file.stat().st_size for file in state.glob("*.distcp"))
    numbers = 3 * 4 * sum(p.numel() for p in one.parameters)
    tensors = 4 * len(one.parameters)
    # torch.save adds about 1.5 KB to each part of a tensor.
    assert numbers < written < numbers + tensors * dist.get_world_size() * 2048, (written, numbers)


def check_failures(folder: Path, layout: tuple[int, int, int]) -> None:
    """What goes wrong on one rank is raised on all of them, and no rank is left waiting."""
    one = student(folder, "tied", layout)
    group = Group(one)

    def program() -> None:
        store = group.checkpoints(folder / "broken")
        begin = store.workers.save

        def blocked(path: Path, asynchronous: bool) -> None:
            (path / "__1_0.distcp").mkdir(parents=True)
            begin(path, asynchronous)

        object.__setattr__(store.workers, "save", blocked)
        store.save(info(1), "")
        try:
            store.finish()
        except CheckpointError as failure:
            assert "step_1 could not be written (rank 1: IsADirectoryError" in str(failure), failure
        else:
            raise AssertionError("a rank that cannot write goes unnoticed")
        assert not list((folder / "broken").iterdir())

        try:
            group.checkpoints(where(folder, "untied", layout)).load_newest()
        except CheckpointError as failure:
            assert "model.lm_head.weight is [101, 32] there and absent here" in str(failure), failure
        else:
            raise AssertionError("the state of another model was taken")

        # Intact by its manifest, yet unreadable: the ranks agree to take the one before.
        again = folder / "damaged"
        shutil.copytree(where(folder, "tied", layout) / "step_3", again / "step_3")
        shutil.copytree(again / "step_3", again / "step_4")
        (again / "step_4" / "state" / "__1_0.distcp").unlink()
        text = (again / "step_4" / "manifest.json").read_text()
        (again / "step_4" / "manifest.json").write_text(text.replace("__1_0.distcp", "__0_0.distcp"))
        found = group.checkpoints(again).load_newest()
        assert found is not None and found.step == 3
        assert sorted(path.name for path in again.iterdir()) == ["corrupt_step_4", "step_3"]

    group.drive(program)


def main(folder: Path, rendezvous: str, world: int, rank: int) -> None:
    join(rendezvous, world, rank)
    torch.set_num_threads(1)
    for kind in KINDS:
        unbroken: dict[tuple[int, int, int], list[torch.Tensor]] = {}
        for saved, layout in PAIRS[world]:
            if saved not in unbroken and saved != ALONE:
                one = save(folder, kind, saved)
                worst(one, folder, kind)
                check_written_once(folder, kind, saved, one)
                unbroken[saved] = local(one)
            one = resume(folder, kind, saved, layout)
            largest = worst(one, folder, kind)
            if saved == layout:
                assert all(torch.equal(a, b) for a, b in zip(local(one), unbroken[layout], strict=True)), layout
            if rank == 0:
                same = ", bit-identical" if saved == layout else ""
                print(
                    f"{kind} (tp, dp, cp) {saved} -> {layout}: largest relative error {largest:.1e}{same}", flush=True
                )
    if world == 2:
        check_failures(folder, PAIRS[2][0][0])
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
