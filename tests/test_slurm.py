"""The launch scripts on a real Slurm: three nodes on this machine, started by the test from what Debian installs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "recipes" / "slurm"
NODES = 3
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
MISSING = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'fastkd[ray]'")
needs_slurm = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"apt-get install slurm-wlm munge ({', '.join(MISSING)} missing)" if MISSING else "slurmd needs root",
)

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

CONNECT = """\
import os, signal, subprocess, sys, time
import ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
assert sorted(node["NodeName"] for node in ray.nodes() if node["Alive"]) == ["n1", "n2", "n3"]

@ray.remote(num_cpus=0, resources={"fastkd_slot": 2})
class Worker:
    def node(self):
        return os.environ["SLURMD_NODENAME"]
    def work(self):
        time.sleep(1000)

workers = [Worker.remote() for _ in range(3)]
assert sorted(ray.get([worker.node.remote() for worker in workers])) == ["n1", "n2", "n3"]
"""
FAILS = (
    CONNECT
    + """
def check(*overrides):
    command = [sys.executable, "-m", "fastkd.run", "arithmetic_ray_cpu", "cluster.simulated=false", "--check"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr

assert check()[0] == 0, check()
code, told = check("cluster.cpu_slots_per_node=4")
assert code == 2 and "of the Ray cluster's 3 nodes 0 have so many worker slots" in told, told
[worker.work.remote() for worker in workers]
subprocess.Popen(["sleep", "1011"])
sys.exit(7)
"""
)
SAVES = (
    CONNECT
    + """
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("ready", flush=True)
while not told:
    time.sleep(0.1)
assert ray.get(workers[0].node.remote()), "the cluster must still be there to save"
print("saved", flush=True)
"""
)


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    for first in range(18000 + os.getpid() % 10000, 60000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def slurm():
    """Folder of a running Slurm of n1, n2, n3; SLURM_CONF leads its commands there."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets have names of at most 107 characters
    first = free_ports(NODES + 1)
    (folder / "state").mkdir()
    config = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        port=first,
        first=first + 1,
        last=first + NODES,
        folder=folder,
        nodes=NODES,
    )
    (folder / "slurm.conf").write_text(config)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    running = []

    def start(*command):
        log = (folder / f"{command[0]}.out").open("ab")
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
        start("munged", "--foreground", "--force", *(f"--{k}={folder / v}" for k, v in files.items()),
              f"--seed-file={folder / 'munge.seed'}")  # fmt: skip
        start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for number in range(1, NODES + 1):
            (folder / f"spool-n{number}").mkdir()
            start("slurmd", "-D", "-N", f"n{number}", "-f", str(folder / "slurm.conf"))
        for _ in range(100):
            told = subprocess.run(["sinfo", "-hNo%t"], env=environment, capture_output=True, text=True, check=False)
            if told.stdout.split() == ["idle"] * NODES:
                break
            time.sleep(0.3)
        else:
            logs = "".join(path.read_text()[-600:] for path in sorted(folder.glob("*.log")))
            pytest.skip(f"Slurm does not start on this machine: {told.stdout}{told.stderr}{logs}")
        yield folder, environment
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(slurm, tmp_path):
    """submit(*arguments, COMMAND=…) → Job."""
    _, environment = slurm
    short = Path(tempfile.mkdtemp(prefix="fkd-"))

    def one(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> Job:
        settings = {
            "LOGS": str(tmp_path / "logs"),
            "RAY_FOLDER": str(short / "r"),
            "CACHES": str(tmp_path / "caches"),
            "HEAD_ADDRESS": "127.0.0.1",
            "GPUS_PER_NODE": "0",
            "WORKERS_PER_NODE": "2",
            "CPUS_PER_NODE": "1",
            "RAY_MEMORY": str(80 << 20),
            "START_SECONDS": "180",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), PATH]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = ["sbatch", "--parsable", f"-N{NODES}", f"--output={tmp_path / 'out'}", *options]
        done = subprocess.run(
            [*command, str(SCRIPTS / "run.sbatch"), *arguments],
            env={**environment, **settings, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return Job(done.stdout.strip(), environment, tmp_path, short)

    yield one
    shutil.rmtree(short, ignore_errors=True)


class Job:
    """A submitted job: its state, its logs, and what it left."""

    def __init__(self, number: str, environment: dict[str, str], folder: Path, ray: Path):
        self.number, self.environment, self.logs, self.ray = number, environment, folder / "logs", ray
        self.out = folder / "out"

    def call(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def ended(self, seconds: float = 240) -> tuple[str, str]:
        """(state, exit code) once it is over."""
        for _ in range(int(seconds / 0.5)):
            told = dict(
                pair.split("=", 1) for pair in self.call("scontrol", "show", "job", self.number).split() if "=" in pair
            )
            if told.get("JobState") not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                return told["JobState"], told["ExitCode"]
            time.sleep(0.5)
        raise AssertionError(f"job {self.number} did not end\n{self.story()}")

    def says(self, words: str, name: str, seconds: float = 180) -> None:
        """Wait until a log holds these words."""
        for _ in range(int(seconds / 0.2)):
            path = self.logs / name
            if path.exists() and words in path.read_text():
                return
            time.sleep(0.2)
        raise AssertionError(f"{name} never said {words!r}\n{self.story()}")

    def story(self) -> str:
        paths = [self.out, *sorted(self.logs.glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in paths if path.exists())

    def left_behind(self) -> list[str]:
        """Processes that still belong to the job; Ray's agents notice within seconds that their raylet is gone."""
        for _ in range(60):
            if not (found := self.processes()):
                break
            time.sleep(0.25)
        return found

    def processes(self) -> list[str]:
        """Processes whose command line or environment belongs to the job."""
        marks = (f"SLURM_JOB_ID={self.number}\0".encode(), str(self.ray).encode())
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                if b"slurmstepd" in command:
                    continue
                if command and any(mark in (process / "environ").read_bytes() + command for mark in marks):
                    found.append(command.replace(b"\0", b" ").decode(errors="replace").rstrip())
            except OSError:
                continue
        return found


def program(folder: Path, text: str) -> str:
    (folder / "program.py").write_text(text)
    return f"{sys.executable} {folder / 'program.py'}"


def test_scripts_are_valid_bash():
    for path in ("common.sh", "run.sbatch", "run_nodes.sh"):
        done = subprocess.run(["bash", "-n", str(SCRIPTS / path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@needs_ray
@needs_slurm
def test_a_job_that_dies_gives_its_code_and_leaves_nothing(submit, tmp_path):
    job = submit(COMMAND=program(tmp_path, FAILS))
    assert job.ended() == ("FAILED", "7:0"), job.story()
    job.says("all 3 nodes joined", "job.log", 1)
    assert {path.name for path in job.logs.glob("*.log")} == {
        "driver.log", "head.log", "job.log", "status.log", "worker-n2.log", "worker-n3.log",
    }  # fmt: skip
    assert job.left_behind() == []
    assert list(job.ray.iterdir()), "Ray's own logs are kept when a job fails"


@needs_ray
@needs_slurm
def test_a_walltime_signal_lets_the_driver_save(submit, tmp_path):
    job = submit(COMMAND=program(tmp_path, SAVES))
    job.says("ready", "driver.log")
    job.call("scancel", "--signal=USR1", "--batch", job.number)  # what --signal=B:USR1@300 sends
    assert job.ended() == ("COMPLETED", "0:0"), job.story()
    assert (job.logs / "driver.log").read_text().endswith("saved\n")
    assert job.left_behind() == [] and not list(job.ray.iterdir())


@pytest.mark.slow
@needs_ray
@needs_slurm
def test_a_driver_that_does_not_end_is_killed(submit, tmp_path):
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\n"
    job = submit(COMMAND=program(tmp_path, deaf + "time.sleep(1012)\n"), SAVE_SECONDS="2")
    job.says("ready", "driver.log")
    job.call("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended() == ("FAILED", "137:0"), job.story()
    assert job.left_behind() == []


@needs_slurm
def test_a_mistake_in_the_recipe_is_found_before_anything_starts(submit):
    job = submit("recipes/topk512_qwen3_1b7.yaml", "cluster.num_nodes=5", OFFLINE="0")
    assert job.ended(60) == ("FAILED", "2:0"), job.story()
    assert "must exactly partition cluster nodes" in job.out.read_text()
    assert not (job.logs / "head.log").exists()


@pytest.mark.slow
@needs_ray
def test_plain_machines(tmp_path):
    """run_nodes.sh three times on this machine, as three machines would."""
    short = Path(tempfile.mkdtemp(prefix="fkd-"))
    text = CONNECT.replace('== ["n1", "n2", "n3"]', "!= []").replace("SLURMD_NODENAME", "RANK")
    settings = {
        "NODES": "3",
        "HEAD_ADDRESS": "127.0.0.1",
        "RAY_PORT": str(free_ports(1)),
        "LOGS": str(tmp_path / "logs"),
        "RAY_FOLDER": str(short / "r"),
        "CACHES": str(tmp_path / "caches"),
        "GPUS_PER_NODE": "0",
        "WORKERS_PER_NODE": "2",
        "CPUS_PER_NODE": "1",
        "RAY_MEMORY": str(80 << 20),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), PATH]),
        "COMMAND": "cd /; " + program(tmp_path, text + "assert len(ray.nodes()) == 3; sys.exit(5)\n"),
    }
    ranks = [
        subprocess.Popen(
            [str(SCRIPTS / "run_nodes.sh")],
            env={**os.environ, **settings, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(3)
    ]
    try:
        told = [rank.communicate(timeout=240)[0] for rank in ranks]
        log = tmp_path / "logs" / "driver.log"
        assert [rank.returncode for rank in ranks] == [5, 0, 0], (told, log.exists() and log.read_text())
        assert "all 3 nodes joined" in told[0]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)
