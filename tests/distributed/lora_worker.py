"""The worker program of test_lora.py: adapters over a sharded base against one process, case after case.

Compared are the loss, the gradient norm, every adapter's gradient by name and every updated weight, gathered; then the
base without adapters, merged weights, exported files and starting values.

Run as: lora_worker.py RENDEZVOUS WORLD RANK
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import CLIP, EXACT, SEQUENCE, Case, build, data, error, step, whole
from worker_inputs import DEVICE, join

from fastkd import grad_norm, lora, lora_export, parallel
from fastkd.batch import pack
from fastkd.config import LoRA
from fastkd.losses import PackedModel

MESHES = {2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (4, 1, 1)]}  # (tp, dp, cp)


@dataclass(frozen=True)
class Adapted:
    """A model with adapters, and how it is sharded."""

    case: Case
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return f"{self.case} {self.config}"


BIASED = {"attention_bias": True, "mlp_bias": True}
# 2 key/value heads: fewer than 4 ranks. Rank 3 divides by no number of ranks.
EVERYWHERE = [
    Adapted(Case(), {"dim": 3}),
    Adapted(Case(tied=False, options=SEQUENCE), {"dim": 4, "alpha": 9}),
    Adapted(Case("Llama", config=BIASED, options=SEQUENCE | {"recompute": True}, packed=False)),
    Adapted(Case("Llama", tied=False), {"target_modules": ["k_proj", "*.layers.1.*.down_proj"]}),
]
ON_TWO = [
    Adapted(Case("Olmo2", tied=False, options=SEQUENCE)),
    Adapted(Case("Gemma", config={"pad_token_id": 3})),
    Adapted(
        Case(config={"num_hidden_layers": 1}, options={"compile_blocks": "aot_eager"}),
        {"target_modules": ["v_proj", "o_proj"]},
    ),
    Adapted(Case(options={"offload": True})),
]
# With an input that every rank has whole (an output, for "post"), ranks drop what one process drops.
SPLIT_BY_OUTPUTS, SPLIT_BY_INPUTS = ["q_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
DROPOUT = [
    Adapted(Case(), {"dropout": 0.5, "target_modules": SPLIT_BY_OUTPUTS}),
    Adapted(
        Case(options={"recompute": True}),
        {"dropout": 0.5, "dropout_position": "post", "target_modules": SPLIT_BY_INPUTS},
    ),
]


def adapted(wanted: Adapted, dtype: torch.dtype = torch.float32):
    """The root of a model that has been trained a little: B is not zero. ``dtype``: of the base."""
    causal_lm = build(wanted.case).to(dtype)
    lora.apply(causal_lm, LoRA(**wanted.config), seed=5)
    make = torch.Generator().manual_seed(7)
    for _, layer in lora.adapted_layers(causal_lm):
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=make) * 0.1)
    return PackedModel(causal_lm)


def results(root, rollouts, rows, size, total, clip, device="cpu"):
    """Loss, gradient norm, gradients of adapters (before clipping) and all updated weights by name."""
    trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, eps=1e-3)
    loss = step(root, rollouts, rows, size, total, device)
    gradients = {name: whole(p.grad).clone() for name, p in trained.items()}
    norm = clip(list(trained.values()), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm.cpu(), gradients, {name: gathered(p) for name, p in root.named_parameters()}


def gathered(parameter):
    return whole(parameter.detach().to("cpu")).clone()


def check(wanted: Adapted, tp: int, dp: int, cp: int, folder: Path) -> float:
    """Largest relative error; raises where it is too large."""
    rollouts, rows, total = data()
    alone = adapted(wanted)
    dropout = wanted.config.get("dropout")
    loss, norm, gradients, weights = results(alone, rollouts, rows, 8, total, torch.nn.utils.clip_grad_norm_)
    assert norm > CLIP and all(gradient.norm() > 0 for gradient in gradients.values())

    mesh = parallel.build_mesh(tp, cp, dp, DEVICE.type)
    root = adapted(wanted)
    before = {name: p.detach().clone() for name, p in root.named_parameters()}
    parallel.shard(root, root.causal_lm, mesh, **wanted.case.options)
    mine = slice(mesh["dp"].get_local_rank(), None, dp)
    one_batch = dropout or "compile_blocks" in wanted.case.options
    size = (8 if one_batch else 2) if wanted.case.packed else 1
    got = results(root, rollouts[mine], rows[mine], size, total, grad_norm.clip_grad_norm, DEVICE)
    got_loss = parallel.sum_over_data(torch.tensor(got[0]), mesh)

    errors = {"loss": abs(got_loss.item() - loss) / abs(loss), "norm": error(got[1], norm)}
    assert got[2].keys() == gradients.keys() and got[3].keys() == weights.keys()
    for name, gradient in gradients.items():
        errors[f"gradient of {name}"] = error(got[2][name], gradient)
    for name, weight in weights.items():
        errors[f"weight {name}"] = error(got[3][name], weight)
        same = torch.equal(got[3][name], before[name])
        assert same != lora.is_adapter(name), f"{wanted}: {name} {'stayed' if same else 'changed'}"
    wrong = {name: f"{value:.1e}" for name, value in errors.items() if not value <= EXACT}
    assert not wrong, f"tp={tp} dp={dp} cp={cp} {wanted}: relative errors {wrong}"

    if not dropout:
        check_base(root, wanted)
        check_exports(root, alone, folder)
    return max(errors.values())


def check_base(root, wanted: Adapted):
    """Without adapters the trained model gives the rows of the base, sharded likewise."""
    batch = pack(data()[0]).to(DEVICE)
    plain = PackedModel(build(wanted.case).requires_grad_(False))
    options = {name: value for name, value in wanted.case.options.items() if name != "compile_blocks"}
    parallel.shard(plain, plain.causal_lm, root.causal_lm.fastkd_layout.mesh, **options)
    with torch.no_grad():
        expected, other = trunk(plain, batch), trunk(root, batch)
        with lora.disabled(root.causal_lm):
            assert torch.equal(trunk(root, batch), expected)
    assert error(other, expected) > 1e-3


def trunk(root, batch):
    """This rank's hidden states, as the head sees them."""
    return root(batch, lambda hidden, shard, batch: hidden.clone())


def check_exports(root, alone, folder: Path):
    """Merged weights and files of the sharded model are those of one process with the same weights."""
    with torch.no_grad():
        values = {name: gathered(p) for name, p in root.named_parameters()}
        for name, parameter in alone.named_parameters():
            parameter.copy_(values[name])
    merged = dict(lora_export.merged_state(root.causal_lm))
    expected = dict(lora_export.merged_state(alone.causal_lm))
    assert list(merged) == list(expected)
    layout = dict(root.causal_lm.named_parameters())
    for name, tensor in merged.items():
        torch.testing.assert_close(gathered(tensor), expected[name], rtol=1e-6, atol=1e-6)
        if name in layout:
            assert tensor.placements == layout[name].placements, name

    path = folder / "adapter"
    lora_export.export(root.causal_lm, path, "org/base")
    dist.barrier()
    files = load_file(path / "adapter_model.safetensors")
    names = {f"base_model.model.{name.removeprefix('causal_lm.')}.weight": name for name in values}
    adapters = {file: values[name] for file, name in names.items() if lora.is_adapter(name)}
    assert files.keys() == adapters.keys()
    assert all(torch.equal(files[name], value) for name, value in adapters.items())
    dist.barrier()


def check_low_base(tp: int, dp: int, cp: int):
    """A base in bfloat16 under adapters in float32: as near to float32 as one process is, within a factor of two."""
    rollouts, rows, total = data()
    wanted, gradients = Adapted(Case(options=SEQUENCE), {"dim": 4}), []
    for dtype in (torch.float32, torch.bfloat16):
        alone = adapted(wanted, dtype)
        step(alone, rollouts, rows, 8, total)
        gradients.append({name: p.grad for name, p in alone.named_parameters() if p.requires_grad})
    mesh = parallel.build_mesh(tp, cp, dp, DEVICE.type)
    root = adapted(wanted, torch.bfloat16)
    parallel.shard(root, root.causal_lm, mesh, param_dtype=torch.bfloat16, **wanted.case.options)
    mine = slice(mesh["dp"].get_local_rank(), None, dp)
    step(root, rollouts[mine], rows[mine], 2, total, DEVICE)
    for name, parameter in root.named_parameters():
        assert parameter.requires_grad == (parameter.dtype == torch.float32), name
        if parameter.requires_grad:
            exact, own = (one[name] for one in gradients)
            assert error(whole(parameter.grad), exact) <= 2 * error(own, exact) + 0.01, name


def check_starting_values(tp: int, dp: int, cp: int):
    """A model that was sharded on meta starts as one that was never sharded."""
    wanted = build(Case())
    lora.apply(wanted, LoRA(dim=3), seed=5)
    with torch.device("meta"):
        root = PackedModel(build(Case()))
    lora.apply(root.causal_lm, LoRA(dim=3))
    parallel.shard(root, root.causal_lm, parallel.build_mesh(tp, cp, dp, DEVICE.type))
    root.to_empty(device=DEVICE)
    lora.initialise(root.causal_lm, 5)
    values = dict(wanted.named_parameters())
    for name, parameter in root.causal_lm.named_parameters():
        if lora.is_adapter(name):
            assert torch.equal(whole(parameter.detach()), values[name]), name


def main(rendezvous: str, world: int, rank: int):
    join(rendezvous, world, rank)
    torch.set_num_threads(1)
    folder = Path(rendezvous).parent
    for tp, dp, cp in MESHES[world]:
        cases = EVERYWHERE + (ON_TWO if (tp, dp, cp) == (2, 1, 1) else [])
        cases += DROPOUT if tp == world else []
        worst = max(check(case, tp, dp, cp, folder) for case in cases)
        check_starting_values(tp, dp, cp)
        if world == 2:
            check_low_base(tp, dp, cp)
        if rank == 0:
            print(f"tp={tp} dp={dp} cp={cp}: largest relative error {worst:.1e}", flush=True)
    dist.barrier()  # a rank that leaves early closes connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
