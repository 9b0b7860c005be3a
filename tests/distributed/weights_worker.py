"""The worker program of test_weights.py: sharded loading and export, case after case.

Run as: weights_worker.py FOLDER WORLD RANK. The folder is shared by the launches: what four ranks export there, the
other launches load. The first launch is the one of four ranks.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fastkd import attention, models, parallel, weights, weights_export
from fastkd.batch import Prompt, Rollout, pack
from fastkd.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))
from worker_inputs import DEVICE, join

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (4, 1)]}  # (tp, dp)
# 101 rows divide by neither 2 nor 4; two key/value heads are fewer than four ranks.
SIZES = dict(
    vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, pad_token_id=None,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CASES = {
    "Qwen3_tied": {},
    "Qwen3_untied": {"tie_word_embeddings": False},
    "Llama_tied": {"tie_word_embeddings": True},
    "Llama_untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "Gemma3_tied": {"pad_token_id": 0, "sliding_window": 5, "final_logit_softcapping": None},
}
FACTOR = 1.25
"""What training does to the weights here, before they are exported."""


def build(case: str):
    """A random model in float32, the same in every process."""
    import transformers

    kind = case.split("_")[0]
    settings = {**SIZES, "tie_word_embeddings": True, **CASES[case]}
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**settings)
    torch.manual_seed(len(case))
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


class Root(nn.Module):
    """Logits of packed sequences, through the sharded head's own forward."""

    def __init__(self, causal_lm):
        super().__init__()
        self.causal_lm = causal_lm

    @torch.no_grad()
    def forward(self, batch):
        hidden = models.packed_hidden(self.causal_lm, batch)
        return parallel.through_head(self.causal_lm, hidden, lambda x, head: x @ head.weight.T)


def sharded(name: str, tp: int, dp: int, dtype=torch.float32, **options) -> Root:
    """The model of a folder: meta, sharded, loaded."""
    causal_lm = models.meta_causal_lm("policy.model_name", name, dtype)
    root = Root(causal_lm)
    parallel.shard(root, causal_lm, parallel.build_mesh(tp, 1, dp, DEVICE.type), **options)
    weights.load(causal_lm, "policy.model_name", name, DEVICE, offload=options.get("offload", False))
    return root


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def same_weights(got, wanted, where: str):
    """Every tensor of the state, and every other buffer, bit for bit."""
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys(), where
    for name, value in [*theirs.items(), *wanted.named_buffers()]:
        mine = whole(ours[name] if name in ours else got.get_buffer(name))
        assert mine.dtype == value.dtype and torch.equal(mine, value), f"{where}: {name}"
    tied = wanted.lm_head.weight is wanted.get_input_embeddings().weight
    assert (got.get_output_embeddings().weight is got.get_input_embeddings().weight) == tied, where


def check_load(folder: Path, case: str, tp: int, dp: int):
    """Loading equals from_pretrained, in both dtypes, and the model then computes what one process computes."""
    from transformers import AutoModelForCausalLM

    name = str(folder / case)
    for dtype in (torch.float32, torch.bfloat16):
        alone = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention.NAME)
        root = sharded(name, tp, dp, dtype)
        same_weights(root.causal_lm, alone, f"{case} tp={tp} dp={dp} {dtype}")
        if dtype == torch.float32:
            batch = pack([Rollout(Prompt(0, "", None, "", (5, 6, 7)), 0, tuple(range(8, 40)), True, 0)])
            logits, wanted = root(batch.to(DEVICE)).cpu(), Root(alone)(batch)
            start = root.causal_lm.lm_head.weight.shape[0] if tp == 1 else -(-101 // tp)
            first = 0 if tp == 1 else start * (dist.get_rank() % tp)
            torch.testing.assert_close(logits, wanted[:, first : first + logits.shape[1]], rtol=1e-4, atol=1e-4)
            same_weights(root.causal_lm, alone, f"{case} after a forward")
    if tp * dp == 2:
        root = sharded(name, tp, dp, offload=True)
        same_weights(root.causal_lm, build(case), f"{case} offloaded")


def check_export(folder: Path, case: str, tp: int, dp: int):
    """Files equal memory bit for bit, one or many, and transformers generates the same tokens from them."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    root = sharded(str(folder / case), tp, dp)
    reference = build(case)
    for model in (root.causal_lm, reference):
        with torch.no_grad():
            for parameter in model.parameters():
                (parameter.to_local() if isinstance(parameter, DTensor) else parameter).mul_(FACTOR)
    for dtype, limit in ((torch.float32, 20_000), (torch.bfloat16, 1 << 30)):
        path = folder / f"export_{case}_{tp}x{dp}_{str(dtype).removeprefix('torch.')}"
        weights_export.export(root.causal_lm, path, dtype, max_shard_bytes=limit)
        files = sorted(path.glob("*.safetensors"))
        assert len(files) == 1 if limit == 1 << 30 else len(files) > 3
        stored = {name: value for file in files for name, value in load_file(file).items()}
        assert stored.keys() == {name for name, _ in reference.named_parameters()}
        for name, parameter in reference.named_parameters():
            assert stored[name].dtype == dtype and torch.equal(stored[name], parameter.detach().to(dtype)), name
        if dist.get_rank() == 0:
            model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation=attention.NAME)
            assert model.dtype == dtype and (model.lm_head.weight is model.model.embed_tokens.weight) == (
                reference.config.tie_word_embeddings
            )
            for parameter in reference.parameters():  # not .to(dtype), which would round the rotary frequencies too
                parameter.data = parameter.data.to(dtype)
            tokens = [
                one.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=12, do_sample=False, pad_token_id=0)
                for one in (model, reference)
            ]
            assert torch.equal(*tokens) and tokens[0].shape[1] > 5
    dist.barrier()


def check_other_world(folder: Path, case: str, tp: int, dp: int):
    """What four ranks exported is loaded by any number of ranks."""
    reference = build(case)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(FACTOR)
    root = sharded(str(folder / f"export_{case}_2x2_float32"), tp, dp)
    same_weights(root.causal_lm, reference, f"{case} of four ranks, tp={tp} dp={dp}")


def check_export_fails_everywhere(folder: Path, tp: int, dp: int):
    """The first rank cannot write: all ranks raise, and stay in step."""
    root = sharded(str(folder / "Qwen3_tied"), tp, dp)
    (folder / f"file_{dist.get_rank()}").write_text("")
    try:
        weights_export.export(root.causal_lm, folder / "file_0" / "export", torch.float32)
    except CheckpointError as error:
        assert "Not a directory" in str(error) and (error.__cause__ is not None) == (dist.get_rank() == 0)
    else:
        raise AssertionError("written into a file")
    weights_export.export(root.causal_lm, folder / "export_after_failure", torch.float32)


# ---------------------------------------------------------------- memory


class Peak:
    """Largest anonymous memory of this process while inside, in bytes above the level at the start."""

    def __enter__(self):
        gc.collect()
        self.start = self.highest = self.now()
        self.running = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self):
        while self.running:
            self.highest = max(self.highest, self.now())
            threading.Event().wait(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.bytes = max(self.highest, self.now()) - self.start

    @staticmethod
    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def check_memory(folder: Path, tp: int, dp: int):
    """A checkpoint of 1 GB: a rank needs its shard and little more to load, one whole tensor more to export."""
    name = str(folder / "large")
    with Peak() as loading:
        root = sharded(name, tp, dp)
    parameters = list(root.parameters())
    shard = sum(p.to_local().numel() * p.to_local().itemsize for p in parameters)
    total = sum(p.numel() * p.itemsize for p in parameters)
    largest = max(p.numel() * p.itemsize for p in parameters)
    with Peak() as writing:
        weights_export.export(root.causal_lm, folder / "large_export", torch.float32, max_shard_bytes=1 << 28)
    mib = 1 << 20
    print(
        f"{total / mib:.0f} MiB on {tp} x {dp} ranks, shard {shard / mib:.0f} MiB: loading took "
        f"{loading.bytes / mib:.0f} MiB ({loading.bytes / shard:.2f} of the shard); export {writing.bytes / mib:.0f} "
        f"MiB more, largest tensor {largest / mib:.0f} MiB",
        flush=True,
    )
    assert total > 0.95e9 and shard < 0.27 * total
    assert shard <= loading.bytes < 1.3 * shard
    # The whole, a part, and what waits to be written; a part elsewhere.
    assert writing.bytes < (2.0 if dist.get_rank() == 0 else 0.5) * largest
    if dist.get_rank() == 0:
        from safetensors import safe_open

        for file in (folder / "large").glob("*.safetensors"):
            exported = {path: safe_open(path, "pt") for path in (folder / "large_export").glob("*.safetensors")}
            with safe_open(file, "pt") as original:
                for tensor in sorted(original.keys()):
                    (copy,) = [one for one in exported.values() if tensor in set(one.keys())]
                    assert torch.equal(copy.get_tensor(tensor), original.get_tensor(tensor)), tensor
    dist.barrier()


def main(folder: Path, world: int, rank: int):
    join(folder / f"rendezvous_{world}", world, rank)
    torch.set_num_threads(1)
    if world == 4 and rank == 0:
        for case in CASES:
            build(case).save_pretrained(folder / case)
    dist.barrier()
    for tp, dp in MESHES[world]:
        for case in CASES:
            check_load(folder, case, tp, dp)
            if world == 4:
                check_export(folder, case, tp, dp)
            else:
                check_other_world(folder, case, tp, dp)
        if world == 2:
            check_export_fails_everywhere(folder, tp, dp)
    if world == 4:
        check_memory(folder, 2, 2)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
