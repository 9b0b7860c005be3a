"""What fastkd adds inside vLLM's worker processes: receivers of weights, unpacked CPU weights, a shorter vocabulary.

vLLM imports this file itself, in every worker and before the model is built, because the engine names
``Extension`` as its ``worker_extension_cls``. Nothing else imports it: it needs vLLM.

The trap it removes: vLLM's CPU build keeps a second, prepacked copy of each linear layer's weight (oneDNN, SGL) and
computes with that one. A copy made at start-up stays as it is when the weight is replaced, which for a head tied to
the embedding happens without any error: the engine goes on sampling with the old head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from vllm import _custom_ops  # pyright: ignore[reportMissingImports]
from vllm.config import set_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.distributed.weight_transfer.base import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (  # pyright: ignore[reportMissingImports]
    WeightTransferEngineFactory,
)
from vllm.model_executor.layers import utils as layer_utils  # pyright: ignore[reportMissingImports]
from vllm.model_executor.model_loader.reload import (  # pyright: ignore[reportMissingImports]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from fastkd.weight_sync import FILE, GLOO, Entry, buckets, gloo_group, unpack


class Extension:
    """Methods that vLLM adds to its worker class; ``collective_rpc`` calls them by name."""

    def limit_vocabulary(self, valid_vocab: int) -> None:
        """Rows of a padded LM head are no tokens: −inf, so that they are never sampled and have no share of softmax."""

        def mask(_module: Any, _inputs: Any, logits: Tensor | None) -> Tensor | None:
            if logits is not None:  # under tensor parallelism the first rank alone gets them
                logits[..., valid_vocab:] = -torch.inf
            return logits

        self.model_runner.model.logits_processor.register_forward_hook(mask)  # pyright: ignore[reportAttributeAccessIssue]

    def divide_logits(self, temperature: float) -> None:
        """Scores at a temperature; vLLM's own applies to sampled tokens alone."""

        def divide(_module: Any, _inputs: Any, logits: Tensor | None) -> Tensor | None:
            return None if logits is None else logits / temperature

        self.model_runner.model.logits_processor.register_forward_hook(divide)  # pyright: ignore[reportAttributeAccessIssue]

    def abandon_weight_update(self) -> None:
        """Forget a broken update, so that the next one starts at the beginning; the weights are garbage until then.

        Without it a layer that had got a part of its tensors counts them twice, and is built from the first ones.
        """
        engine: Any = self.weight_transfer_engine  # pyright: ignore[reportAttributeAccessIssue]
        with set_current_vllm_config(self.vllm_config):  # pyright: ignore[reportAttributeAccessIssue]
            engine.finish_weight_update()
        self._weight_update_active = False


class _CheckpointReceiver(WeightTransferEngine):
    """Takes tensors as a checkpoint names them; vLLM cuts, fuses and post-processes them layer by layer."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_weights(named)


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where to meet. The trainer is rank 0, this engine's workers follow from ``rank_offset`` on."""

    address: str
    port: int
    world_size: int
    bucket_bytes: int
    timeout_s: float
    rank_offset: int


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """What the broadcast will hold, in its order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooReceiver(_CheckpointReceiver):
    """Weights by gloo broadcast in buckets of bytes, into host memory."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    group: Any = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the group; returns when all have."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self.bucket_bytes = init_info.bucket_bytes
        timeout = timedelta(seconds=init_info.timeout_s)
        self.group = gloo_group(init_info.address, init_info.port, rank, init_info.world_size, timeout)

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Take every bucket and load what it holds."""
        entries = [
            Entry(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for bucket in buckets(entries, self.bucket_bytes):
            # A new buffer each time: vLLM keeps views of it until a layer is complete.
            data = torch.empty(bucket.nbytes, dtype=torch.uint8)
            self.group.broadcast([data], _from_first()).wait()
            self.load((name, tensor.to(self.device)) for name, tensor in unpack(bucket, data))

    def shutdown(self) -> None:
        self.group = None


def _from_first() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing to set up."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A folder that all workers see, with safetensors files."""

    path: str = field(default="")


class FileReceiver(_CheckpointReceiver):
    """Weights from a shared folder: the fallback that needs no network between the groups."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to do."""

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Read the files one tensor at a time."""
        paths = sorted(Path(update_info.path).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"no safetensors files in {update_info.path}: do all nodes see this folder?")
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self.load((name, file.get_tensor(name).to(self.device)) for name in file.keys())  # noqa: SIM118

    def shutdown(self) -> None:
        """Nothing to release."""


def _keep_weights_unpacked() -> None:
    """Make vLLM's CPU linear layers compute with the weight itself. Costs some speed, on CPUs alone."""
    _custom_ops._supports_onednn = False
    layer_utils.check_cpu_sgl_kernel = lambda *_: False


if current_platform.is_cpu():
    _keep_weights_unpacked()
for _name, _class in ((GLOO, GlooReceiver), (FILE, FileReceiver)):
    if _name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(_name, _class)
