"""A checkpoint is whole or absent; a damaged one is found out; retention keeps the best and the newest."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fastkd import train_state
from fastkd.checkpoint import Checkpoints, TrainingInfo, Workers
from fastkd.config import Checkpointing
from fastkd.errors import CheckpointError, WorkerError
from fastkd.state_files import StateFiles, _exact

# StateFiles silences it for a process; pytest resets the filters for each test.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Worker:
    """A worker of one rank whose state is one number, held as a weight and as optimizer state."""

    def __init__(self, shape=(4, 3)):
        self.files, self.shape = StateFiles(), shape
        self.weight, self.step, self.plain = torch.zeros(shape), torch.tensor(0.0), "zero"

    def set(self, value: float):
        """In place, as an optimizer does."""
        self.weight.fill_(value)
        self.step.fill_(value)
        self.plain = f"{value:g}"

    def state(self):
        return {
            "model": {"weight": self.weight},
            "optimizer": {"state": {"weight": {"step": self.step}}, "param_groups": [{"name": self.plain}]},
        }

    def load(self, path):
        state = self.files.load(self.state(), path)
        self.plain = state["optimizer"]["param_groups"][0]["name"]
        assert state["model"]["weight"] is self.weight  # read in place

    def workers(self) -> Workers:
        return Workers(
            save=lambda path, asynchronous: self.files.save(self.state(), path, asynchronous=asynchronous),
            saved=self.files.saved,
            load=self.load,
        )

    def holds(self, value: float) -> bool:
        """All of its state is of one step."""
        same = torch.equal(self.weight, torch.full(self.shape, float(value))) and self.step == value
        return bool(same) and self.plain == f"{value:g}"


def checkpoints(tmp_path, worker=None, **changes):
    settings = {"checkpoint_dir": str(tmp_path / "checkpoints"), **changes}
    return Checkpoints(Checkpointing(**settings), (worker or Worker()).workers())


def info_of(step, accuracy=None):
    found = {"train/loss": 1.0 / step} | ({} if accuracy is None else {"validation/accuracy": accuracy})
    return TrainingInfo(step, step * 8, step * 100, 1.5, found)


def save(store, step, accuracy=None, *, worker=None):
    """A whole checkpoint of this step; its folder."""
    if worker is not None:
        worker.set(step)
    store.save(info_of(step, accuracy), "distillation: {}\n")
    store.finish()
    return store.path(step)


@pytest.mark.parametrize("is_async", [True, False])
def test_round_trip(tmp_path, is_async):
    worker = Worker()
    store = checkpoints(tmp_path, worker, is_async=is_async)
    assert store.load_newest() is None
    save(store, 3, worker=worker)
    save(store, 5, worker=worker)
    worker.set(7)
    info = store.load_newest()
    assert (info.step, info.consumed_prompts, info.total_tokens, info.metrics) == (5, 40, 500, {"train/loss": 0.2})
    assert worker.holds(5)
    assert (store.path(5) / "recipe.yaml").read_text() == "distillation: {}\n"
    listed = json.loads((store.path(5) / "manifest.json").read_text()).keys()
    written = {str(path.relative_to(store.path(5))) for path in store.path(5).rglob("*") if path.is_file()}
    assert listed == written - {"manifest.json"} and "state/.metadata" in listed


# ---------------------------------------------------------------- in the background


class Gate:
    """Holds the thread that writes, so that what the others do meanwhile is no matter of luck."""

    def __init__(self, files: StateFiles):
        self.open = threading.Event()
        files._thread.submit(self.open.wait)


def test_an_asynchronous_save_holds_the_step_it_was_asked_for(tmp_path):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    worker.set(1)
    gate = Gate(worker.files)
    store.save(info_of(1), "")
    worker.set(2)  # training goes on before a byte is written
    store.poll()
    assert store.steps() == [] and (store.folder / "tmp_step_1").is_dir()
    gate.open.set()
    store.finish()
    assert store.steps() == [1]
    assert store.load_newest().step == 1 and worker.holds(1)


def test_it_becomes_a_checkpoint_as_soon_as_the_driver_looks(tmp_path):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    store.save(info_of(1), "")
    worker.files._writing.result()
    assert store.steps() == []
    store.poll()
    assert store.steps() == [1] and not list(store.folder.glob("tmp_*"))


def test_a_rank_whose_end_nobody_heard_of_saves_again(tmp_path):
    # Polled at one moment, rank 0 may say that all is written and rank 1 that it is not; nobody asks rank 1 again.
    worker = Worker()
    for step in (1, 2):
        gate = Gate(worker.files)
        worker.files.save(worker.state(), tmp_path / f"{step}", asynchronous=True)
        assert worker.files.saved(False) is None
        gate.open.set()
    assert worker.files.saved(True) == worker.files.saved(True) != {}
    assert sorted(path.parent.name for path in tmp_path.glob("*/.metadata")) == ["1", "2"]


def test_the_next_save_waits_for_the_one_before(tmp_path):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    for step in (1, 2, 3):
        worker.set(step)
        store.save(info_of(step), "")
    assert store.steps() == [1, 2]
    store.finish()
    assert store.load_newest().step == 3 and worker.holds(3)


def test_asynchronous_and_synchronous_files_are_bit_identical(tmp_path):
    folders = []
    for is_async in (True, False):
        torch.manual_seed(0)
        worker = Worker()
        worker.weight.copy_(torch.randn(4, 3))
        folders.append(save(checkpoints(tmp_path / str(is_async), worker, is_async=is_async), 1) / "state")
    for file in folders[0].glob("*.distcp"):
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


@pytest.mark.parametrize("is_async", [True, False])
def test_a_save_that_fails_says_which_and_why_and_leaves_nothing(tmp_path, is_async):
    worker = Worker()
    store = checkpoints(tmp_path, worker, is_async=is_async)
    save(store, 1, worker=worker)
    gate = Gate(worker.files)

    def begin(path, asynchronous):
        path.write_text("a file where a folder must be")
        gate.open.set()
        worker.files.save(worker.state(), path, asynchronous=asynchronous)

    broken = Checkpoints(store.config, Workers(begin, worker.files.saved, worker.load))
    with pytest.raises(CheckpointError, match=r"step_2 could not be written \(rank 0: \w+: .*resumes from step_1"):
        broken.save(info_of(2), "")
        broken.finish()
    assert [path.name for path in store.folder.iterdir()] == ["step_1"]
    save(store, 2, worker=worker)  # and the next one succeeds
    assert store.steps() == [1, 2]


class Gone(WorkerError):
    """A rank was killed."""

    gone = True

    def __init__(self, *_):
        RuntimeError.__init__(self, "training rank 1 on node-2: its process ended")


def test_a_rank_that_dies_is_no_fault_of_the_checkpoint(tmp_path):
    """In the middle of loading or saving: nothing is called damaged, and the run may start the rank anew."""
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    save(store, 1, worker=worker)

    def die(*_):
        raise Gone

    with pytest.raises(Gone):
        Checkpoints(store.config, Workers(die, die, die)).load_newest()
    for config in (store.config.model_copy(update={"is_async": is_async}) for is_async in (True, False)):
        dying = Checkpoints(config, Workers(lambda *_: None, die, worker.load))
        with pytest.raises(Gone):
            dying.save(info_of(2), "")
            dying.finish()
    with pytest.raises(Gone):
        Checkpoints(store.config, Workers(die, die, worker.load)).save(info_of(2), "")
    assert [path.name for path in store.folder.iterdir()] == ["step_1"]
    assert store.load_newest().step == 1


def test_what_a_worker_wrote_elsewhere_is_found_out(tmp_path):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    store.save(info_of(1), "")
    worker.files._writing.result()
    next((store.folder / "tmp_step_1" / "state").glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="must be on a shared file system"):
        store.finish()
    assert list(store.folder.iterdir()) == []


def test_the_end_of_a_run_waits_and_a_failing_run_keeps_its_own_error(tmp_path, caplog):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    with store.finishing():
        store.save(info_of(1), "")
    assert store.steps() == [1]
    with pytest.raises(ZeroDivisionError), store.finishing():
        store.save(info_of(2), "")
        raise ZeroDivisionError
    assert store.steps() == [1, 2]
    with pytest.raises(ZeroDivisionError), store.finishing(), caplog.at_level("WARNING", logger="fastkd"):
        store.save(info_of(3), "")
        worker.files._writing.result()
        next((store.folder / "tmp_step_3" / "state").glob("*.distcp")).unlink()
        raise ZeroDivisionError
    assert "step_3 could not be written" in caplog.text


KILLED = """
import sys, torch
from fastkd.checkpoint import Checkpoints, TrainingInfo
from fastkd.config import Checkpointing
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Worker, info_of, save
worker = Worker((1 << 12, 1 << 10))
store = Checkpoints(Checkpointing(checkpoint_dir=sys.argv[1]), worker.workers())
save(store, 1, worker=worker)
worker.set(2)
store.save(info_of(2), "")
print("saving", flush=True)
while True:  # trains on
    worker.weight.add_(1.0)
"""


def test_a_kill_during_a_background_save_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "saving\n"
        # In the middle of it: some of the 16 MB are there. The process never finishes the folder, so it never ends.
        data = folder / "tmp_step_2" / "state" / "__0_0.distcp"
        while not (data.is_file() and data.stat().st_size):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sorted(os.listdir(folder)) == ["step_1", "tmp_step_2"]
    worker = Worker((1 << 12, 1 << 10))
    assert checkpoints(tmp_path, worker).load_newest().step == 1
    assert worker.holds(1) and os.listdir(folder) == ["step_1"]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "metadata", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage, caplog):
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    save(store, 1, worker=worker)
    path = save(store, 2, worker=worker)
    data = next((path / "state").glob("*.distcp"))
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "truncate":
        data.write_bytes(data.read_bytes()[:-7])
    elif damage == "remove":
        data.unlink()
    elif damage == "metadata":
        (path / "state" / ".metadata").write_bytes(b"nothing")
    else:
        (path / "manifest.json").unlink()
    with caplog.at_level("WARNING", logger="fastkd"):
        info = store.load_newest()
    assert info.step == 1 and worker.holds(1)
    assert (store.folder / "corrupt_step_2").is_dir()  # kept for a look, out of the way of the next save
    assert store.steps() == [1]


def test_a_damaged_state_that_still_has_its_manifest_falls_back_too(tmp_path):
    # torch's CheckpointException is a BaseException: `except Exception` would let it through.
    worker = Worker()
    store = checkpoints(tmp_path, worker)
    save(store, 1, worker=worker)
    path = save(store, 2, worker=worker)
    next((path / "state").glob("*.distcp")).unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({n: v for n, v in manifest.items() if not n.endswith(".distcp")}))
    assert store.load_newest().step == 1


def test_when_none_is_intact_it_stops_instead_of_starting_over(tmp_path):
    store = checkpoints(tmp_path)
    (save(store, 1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none is intact"):
        store.load_newest()


def test_an_unfinished_save_is_cleared_away(tmp_path):
    store = checkpoints(tmp_path)
    save(store, 1)
    (store.folder / "tmp_step_2" / "state").mkdir(parents=True)
    assert store.load_newest().step == 1
    assert not list(store.folder.glob("tmp_*"))


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path):
    save(checkpoints(tmp_path), 1)
    store = checkpoints(tmp_path, Worker((4, 5)))
    with pytest.raises(CheckpointError, match=r"model.weight is \[4, 3\] there and \[4, 5\] here"):
        store.load_newest()
    assert store.steps() == [1]


# ---------------------------------------------------------------- retention


@pytest.mark.parametrize("higher_is_better, kept", [(True, [2, 4, 5, 6]), (False, [1, 3, 5, 6])])
def test_retention_keeps_the_best_and_the_newest_two(tmp_path, higher_is_better, kept):
    store = checkpoints(tmp_path, keep_top_k=2, higher_is_better=higher_is_better)
    for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.8, None, 0.5], start=1):
        save(store, step, accuracy)
    assert store.steps() == kept


def test_retention_without_a_metric_keeps_the_newest(tmp_path):
    store = checkpoints(tmp_path, keep_top_k=3, metric_name=None)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [2, 3, 4]


def test_retention_by_a_training_metric(tmp_path):
    store = checkpoints(tmp_path, keep_top_k=1, metric_name="train:loss", higher_is_better=False)
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [3, 4]


# ---------------------------------------------------------------- parts of tensors


@pytest.mark.parametrize("rows", [105, 101, 13, 8, 3])
@pytest.mark.parametrize("tp, dp", [(1, 8), (2, 4), (4, 2), (8, 1), (2, 3)])
def test_every_part_says_where_it_lies(rows, tp, dp):
    # For 105 rows over tp 2 and dp 4 the placements, read as torch reads them, give sizes that no rank holds.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = torch.arange(rows * 2).view(rows, 2)
    found = torch.full_like(whole, -1)
    for rank in range(tp * dp):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * dp)
        try:
            mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
            local = whole
            for parts, index in ((tp, rank % tp), (dp, rank // tp)):  # as tensor parallelism and then FSDP cut
                each = -(-len(local) // parts)
                local = local[each * index : each * (index + 1)]
            placements = (
                _StridedShard(0, split_factor=tp) if tp > 1 else Shard(0),
                Shard(0) if tp > 1 else Replicate(),
            )
            part = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=(2, 1))
            exact = _exact(part)
            chunks = exact.__create_chunk_list__()
            items = exact.__create_write_items__("name", exact)
        finally:
            dist.destroy_process_group()
        assert len(chunks) == len(items) == (len(local) > 0)
        for chunk, item in zip(chunks, items, strict=True):
            assert item.tensor_data.chunk == chunk and item.tensor_data.size == whole.shape
            assert torch.equal(exact.__get_tensor_shard__(item.index), local)
            begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            assert (found[begin:end] == -1).all(), "two ranks claim the same rows"
            found[begin:end] = local
    assert torch.equal(found, whole)


# ---------------------------------------------------------------- what is in a state


class Model(nn.Module):
    """Tied, frozen and never used weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.frozen(self.embedding(ids)))


def training(optimizer=torch.optim.AdamW, **options):
    model = Model()
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def write(path, run, version):
    files = StateFiles()
    files.save(train_state.capture(*run, version), path, asynchronous=True)
    return files.saved(True)


def read(path, run):
    return train_state.restore(StateFiles().load(train_state.capture(*run, 0, room=True), path), *run)


def test_tied_weights_are_written_once_and_frozen_ones_not_at_all(tmp_path):
    run = training()
    train(*run, 1)
    state = train_state.capture(*run, 1)
    assert set(state["model"]) == {"embedding.weight", "unused.weight", "unused.bias"}
    assert set(state["optimizer"]["state"]) == {"embedding.weight"}


@pytest.mark.parametrize("before", [0, 3])
def test_training_goes_on_bit_for_bit(tmp_path, before):
    # before=0: nothing has taken a step. The unused layer never does; Adam must not find a state for it.
    run, resumed = training(), training()
    train(*run, before)
    write(tmp_path / "state", run, before)
    train(*resumed, 2)  # whatever it held is replaced
    resumed[1].state.clear()
    assert read(tmp_path / "state", resumed) == before
    for one in (run, resumed):
        train(*one, 3)
    for ours, theirs in zip(run[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(run[1].state) == len(resumed[1].state) == 1
    assert run[2].state_dict() == resumed[2].state_dict()


def test_another_optimizer_is_refused(tmp_path):
    run = training()
    train(*run, 1)
    write(tmp_path / "state", run, 1)
    with pytest.raises(CheckpointError, match=r"optimizer.state.embedding.weight.exp_avg is \[5, 4\] there and absent"):
        read(tmp_path / "state", training(torch.optim.SGD, momentum=0.9))


def test_a_state_without_a_weight_is_refused():
    run = training()
    state = train_state.capture(*run, 0)
    del state["model"]["embedding.weight"]
    with pytest.raises(KeyError, match=r"embedding\.weight"):
        train_state.restore(state, *run)
