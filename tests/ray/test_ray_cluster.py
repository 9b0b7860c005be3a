"""Which Ray cluster a run uses: the one it is told of, the one of this machine, or a new one."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest

SCRIPT = """
import sys, ray
from fastkd.errors import UserError
from fastkd.ray_cluster import connected
from fastkd.recipe import recipe_from
recipe = recipe_from({
    "policy": {"model_name": "student"}, "teacher": {"model_name": "teacher"},
    "data": {"train": {"data_path": "unused.jsonl"}},
    "cluster": {"num_nodes": int(sys.argv[1]), "gpus_per_node": 0}}).recipe
try:
    with connected(recipe, cpu_slots=3):
        print(f"{len(ray.nodes())} node(s), {ray.cluster_resources()['fastkd_slot']:g} slots")
        with connected(recipe):
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()
except UserError as error:
    print(error)
"""


def said(nodes, address):
    folder = tempfile.mkdtemp(prefix="fkd")
    os.makedirs(os.path.join(folder, "ray"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": folder} | ({"RAY_ADDRESS": address} if address else {})
    try:
        command = [sys.executable, "-c", SCRIPT, str(nodes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_cluster_of_ray_address(cluster, nodes):
    assert "4 node(s), 6 slots" in said(nodes, cluster.address)


def test_an_address_where_nobody_is(cluster):
    assert "RAY_ADDRESS='127.0.0.1:9': no Ray cluster answers there" in said(1, "127.0.0.1:9")


def test_a_new_one(cluster):
    assert "1 node(s), 3 slots" in said(1, None)
