"""The worker program of test_sharded_sync.py: a sharded student that sends its weights to engines elsewhere.

Run as: torchrun --nproc-per-node=2 sync_worker.py MODEL SHARDING ADDRESS, with the control plane at ADDRESS.
"""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch.distributed as dist

from fastkd import parallel
from fastkd.process_group import joined
from fastkd.recipe import recipe_from
from fastkd.student import Student
from fastkd.sync_probe import SyncProbe, probe_tokens, trainer_logprobs
from fastkd.weight_sync import GLOO, Engines, SyncError, Weights, WeightSender
from fastkd.weights import local_part


def change(parameters: list[torch.Tensor], seed: int) -> None:
    """Move all weights. Every rank draws them whole and adds its part: copies stay the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            part, local = local_part(parameter)
            local.add_(torch.randn(parameter.shape, generator=generator)[part], alpha=0.05)


def gone(method: str, args: list[tuple]) -> None:
    raise OSError("the engine is gone")


def main() -> None:
    folder = Path(sys.argv[1])
    sharding, address, workers, valid = map(json.loads, sys.argv[2:])
    recipe = recipe_from(
        {
            "policy": {"model_name": str(folder), "precision": "float32", "dtensor_cfg": sharding},
            "teacher": {"model_name": str(folder)},
            "data": {"train": {"data_path": "unused.jsonl"}},
        }
    ).recipe
    with joined("cpu") as device:
        layout = recipe.policy.dtensor_cfg
        mesh = parallel.build_mesh(layout.tensor_parallel_size, layout.context_parallel_size, None, device.type)
        student = Student(recipe, device, valid, mesh)
        tokens, rank = probe_tokens((), valid), dist.get_rank()
        engines = None
        if rank == 0:
            connection = Client(tuple(address), authkey=b"test")

            def call(method: str, args: list[tuple]) -> object:
                connection.send((method, args[0]))
                failed, result = connection.recv()
                if failed:
                    raise OSError(result)
                return result

            engines = Engines(call, [workers])
        probe = SyncProbe()
        sender = WeightSender(Weights(student.causal_lm, torch.float32), engines, GLOO, rank=rank, bucket_bytes=50_000)
        for version in range(3):
            print(f"rank {rank} bytes {sender.send(version).nbytes}", flush=True)
            ours = trainer_logprobs(student, tokens)
            if rank == 0:
                found = probe.check(ours, [call("logprobs", [(tokens,)])], version)
                assert found.error < 1e-4, found
                assert version == 0 or found.moved > 0.1, found
                print(f"version {version} {found}", flush=True)
            change(student.parameters, version)
        # Engines that are gone: every rank gets the error, and none hangs in a gather.
        if rank == 0:
            engines.call = gone
        try:
            sender.send(9)
        except SyncError as error:
            print(f"rank {rank} refused: {error}", flush=True)
        if rank == 0:
            connection.send(None)


if __name__ == "__main__":
    main()
