"""A pool of actors: the group, its environment, how failures come out, restarts, and nothing left behind."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.util import list_named_actors, placement_group_table

from fastkd import health
from fastkd.actors import WorkerDied, WorkerFailed
from fastkd.errors import DataError, UserError
from fastkd.health import Limits, Report
from fastkd.placement import SLOT, Placement
from fastkd.ray_pools import Options, RayPool


@pytest.fixture
def member(cluster):
    from pool_workers import Member

    return Member


def actors():
    return sorted(one["name"] for one in list_named_actors(all_namespaces=True))


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def test_a_group(placement, member, capfd):
    with RayPool(placement.slots("training"), Options(threads=1), member, start=1.0) as pool:
        assert actors() == ["training-0", "training-1"]
        found = pool.run_all(member.where)
        assert len({pid for pid, _, _ in found} | {os.getpid()}) == 3
        assert [node for _, node, _ in found] == ["node-1", "node-1"]
        for rank, (_, _, environment) in enumerate(found):
            assert environment.pop("MASTER_PORT").isdigit() and environment.pop("MASTER_ADDR")
            assert environment == {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"
            }  # fmt: skip
        assert pool.run(member.add, 2.0) == 6.0  # both ranks: 3 + 3
        assert pool.run_all(member.add, amount=1.0) == [8.0, 8.0]
        assert pool.run_each(member.pair, [("a",), ("b",)], "x") == ["a-x-0", "b-x-1"]
        kept = pool.keep(member.items, 4)
        assert kept.lengths == [6, 6, 6, 6] and kept[3] == "3 of 1" and list(kept[1:3]) == ["1 of 1", "2 of 0"]
        assert pool.run_all(member.read, kept) == [["0 of 0", "1 of 1", "2 of 0", "3 of 1"]] * 2
        pending = pool.submit(member.wait, 0.5)
        assert not pending.done()
        pending.result()
        assert pending.done()
        assert [report.problems for report in pool.reports] == [{}, {}]
        assert all(report.allreduce_seconds and report.matmul_seconds for report in pool.reports)
    assert actors() == []
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.run(member.where)
    eventually(lambda: "(training-1 " in (out := "".join(capfd.readouterr())) or "(training-0 " in out)


def test_failures_come_out_once(placement, member):
    with RayPool(placement.slots("teacher"), Options(), member) as pool:
        with pytest.raises(WorkerFailed) as caught:
            pool.run(member.fail, 1)
        error = caught.value
        assert (error.role, error.rank, error.node) == ("teacher", 1, "node-3")
        assert str(error) == "teacher rank 1 on node-3: ZeroDivisionError: one by nothing"
        assert str(error.__cause__).count("Traceback (most recent call last)") == 1
        assert "pool_workers.py" in str(error.__cause__) and "one by nothing" in str(error.__cause__)
        assert error.__notes__ == ["(1 other teacher worker(s) failed or stopped with it)"]
        with pytest.raises(RuntimeError, match=r"one by nothing.*Call restart\(\)"):  # rank 0 waits for rank 1
            pool.run(member.add, 1.0)
        pool.restart()
        assert pool.run(member.add, 1.0) == 2.0

        with pytest.raises(DataError) as caught:
            pool.run(member.refuse, False)
        assert str(caught.value) == "data.train='x.jsonl': is empty. Give another file."
        assert caught.value.value == "x.jsonl"
        with pytest.raises(WorkerFailed, match=r"rank . on node-3: DataError: data.train='x.jsonl': is empty"):
            pool.run(member.refuse, True)
    with pytest.raises(DataError, match="must not be negative"):
        RayPool(placement.slots("teacher"), Options(), member, start=-1.0)
    eventually(lambda: actors() == [])


def test_a_killed_worker(placement, member):
    with RayPool(placement.slots("training"), Options(), member, start=5.0) as pool:
        for busy in (True, False):
            victim = pool.run_all(member.where)[1][0]
            pending = pool.submit(member.wait, 60.0) if busy else None
            time.sleep(1.0 if busy else 0.0)
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(WorkerDied, match=r"training rank 1 on node-1: its process ended"):
                pending.result() if pending else pool.run(member.wait, 60.0)
            seconds = time.monotonic() - began
            print(f"busy={busy}: detected after {seconds:.1f} s")
            assert seconds < 30  # neither the 60 s of the call nor the half hour of a collective
            pool.restart()
            assert pool.run(member.add, 1.0) == 12.0
            assert actors() == ["training-0", "training-1"]


def test_workers_on_their_own(placement, member):
    with RayPool(placement.slots("generation"), Options(group=False), member) as pool:
        (first, _, environment), (second, _, _) = pool.run_all(member.where)
        assert environment["WORLD_SIZE"] is None
        other = pool.submit_to(0, member.pair, "mine", "ours")
        os.kill(second, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="generation rank 1 on node-2"):
            pool.submit_to(1, member.where).result()
        assert other.result() == "mine-ours-0"
        pool.restart(1)
        (same, _, _), (anew, _, _) = pool.run_all(member.where)
        assert same == first and anew != second


def test_a_lost_node(cluster, isolated, member):
    doomed = cluster.add_node(num_cpus=1, resources={SLOT: 2}, object_store_memory=80 << 20, node_name="node-0")
    with Placement(isolated(), cpu_slots=2) as made:
        pools = [RayPool(made.slots(role), Options(), member) for role in ("training", "teacher")]
        training, teacher = pools
        assert {node for _, node, _ in training.run_all(member.where)} == {"node-0"}
        cluster.remove_node(doomed, allow_graceful=False)
        with pytest.raises(WorkerDied, match=r"training rank . on node-0"):
            training.run(member.wait, 60.0)
        training.restart()  # node-3 was free
        assert {node for _, node, _ in training.run_all(member.where)} == {"node-3"}
        assert {node for _, node, _ in teacher.run_all(member.where)} == {"node-2"}
        for pool in pools:
            pool.close()


def test_health_checks_name_node_and_check(placement, member, cluster):
    with pytest.raises(UserError) as caught:
        RayPool(placement.slots("training"), Options(limits=Limits("/tmp/none/such", 1e9)), member)
    text = str(caught.value)
    assert "training rank 0 on node-1: disk: " in text and "training rank 1 on node-1: disk: " in text
    assert "GiB free under /tmp, wanted 1e+09" in text and "leave out node-1" in text
    eventually(lambda: actors() == [])


def test_health_of_a_node_without_the_device():
    if health.torch.cuda.is_available():
        pytest.skip("this machine has one")
    report = health.examine("teacher", 3, "node-7", "cuda", Limits())
    with pytest.raises(UserError, match="teacher rank 3 on node-7: device: torch sees no CUDA device"):
        health.judge([report])


def test_a_gpu_claimed_twice():
    reports = [Report("teacher", rank, "node-1", "H100", uuid) for rank, uuid in enumerate("aba")]
    with pytest.raises(UserError, match=r"teacher rank 0, teacher rank 2 on node-1: unique device: .* GPU a"):
        health.judge(reports)
    health.judge(reports[:2])


def test_wrong_products_are_counted():
    def off(left, right):
        product = left @ right
        product[3, 4] += 1
        return product

    assert health.multiply_wrong(health.torch.device("cpu")) == 0
    assert health.multiply_wrong(health.torch.device("cpu"), off) == 1


def test_the_table():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    bad = Report("teacher", 1, "node-3", "cpu", None, 0.0012, 4.0, None, {"disk": "full"})
    console.print(health.table([Report("training", 0, "node-1", "cpu", None, 0.001, 8.0, 0.002), bad]))
    lines = console.file.getvalue().splitlines()
    assert any(all(word in line for word in ("training", "node-1", "1.0", "2.0", "8.0", "ok")) for line in lines)
    assert any(all(word in line for word in ("teacher", "node-3", "1.2", "disk")) for line in lines)


DRIVER = """
import signal, sys, ray
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from pool_workers import Member
from fastkd.placement import Placement
from fastkd.ray_pools import Options, RayPool
from fastkd.recipe import recipe_from
recipe = recipe_from({
    "policy": {"model_name": "student"}, "teacher": {"model_name": "teacher"},
    "data": {"train": {"data_path": "unused.jsonl"}}, "cluster": {"num_nodes": 1, "gpus_per_node": 0}}).recipe
ray.init(address=sys.argv[1], logging_level="warning")
with Placement(recipe, cpu_slots=2) as made:
    pool = RayPool(made.slots("training"), Options(), Member)
    print("ready", flush=True)
    pool.run(Member.wait, 600.0)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_driver_that_is_stopped(cluster, stop):
    command = [sys.executable, "-c", DRIVER, cluster.address, str(Path(__file__).parent)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert any("ready" in line for line in driver.stdout)
        assert actors() == ["training-0", "training-1"]
        driver.send_signal(stop)
        assert driver.wait(60) != 0
    finally:
        driver.kill()
        driver.wait()
    eventually(lambda: actors() == [])
    eventually(lambda: all(one["state"] == "REMOVED" for one in placement_group_table().values()))
    eventually(lambda: ray.available_resources().get(SLOT) == 6)
