"""A file imports only from lower floors, and light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The house, bottom up. A package (config, checks) is one room. docs/architecture.md explains the rooms.
FLOORS = [
    "errors files log profiling sampling attention collectives grad_norm host_copies plot running_mean prefix_template"
    " ahead stop timeline turns queue_lengths environment module_names experts expert_names memory_test_meter"
    " _kernels.nvfp4 _kernels.reference _kernels.rows _kernels.row_topk _kernels.tuning",
    "config batch health gpu_monitor process_group tensor_styles block_compile safetensors_files state_files"
    " train_state expert_parallel model_files"
    " _kernels.gemm _kernels.row_stats _kernels.sparse_kl _kernels.values _kernels.vocab_parallel"
    " _kernels.triton_lanes _kernels.triton_nvfp4 _kernels.triton_sum",
    "recipe metrics monitors packing optim data checkpoint grading answers pools lora_choice context_parallel"
    " tensor_plan trace placement quantization_choice blends shared_weights by_source"
    " _kernels.nvfp4_ops _kernels.problem _kernels.strided_topk"
    " _kernels.triton_math _kernels.triton_stats _kernels.triton_topk",
    "lora parallel plan context_distillation simulated_cluster quantization conf catalogue"
    " _kernels.linear_topk _kernels.row_finish",
    "weights lora_export checks ray_cluster import_conf _kernels.triton_finish",
    "models weights_export fits describe _kernels.row_passes",
    "driver weight_sync nvfp4_export _kernels.heads",
    "vllm_extension vllm_setup calibration _kernels.linear_kl_low",
    "_kernels.linear_kl",
    "_kernels.ops",
    "report kernels",
    "losses rollout payload vllm_teacher",
    "teacher student refs vllm_generation sync_probe",
    "roles actors verified_sync evaluate memory_test_roles",
    "validate ray_pools cluster_workers engine_actors vllm_roles memory_test",
    "collect ray_turns ray_repairs ray_role_pools",
    "ray_sync",
    "ray_roles",
    "offpolicy_roles",
    "runner",
    "offpolicy rehearse",
    "run",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def room(module: str) -> str:
    """ "config.base" is in the room "config"; every kernel file is a room of its own."""
    return module if module.startswith("_kernels.") else module.split(".")[0]


def sources() -> dict[str, Path]:
    found = {f"_kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "fastkd").rglob("*.py"):
        parts = path.relative_to(ROOT / "fastkd").with_suffix("").parts
        if parts[0] not in ("_kernels", "__init__"):
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("fastkd.") for alias in node.names if alias.name.startswith("fastkd.")}
        elif isinstance(node, ast.ImportFrom) and node.module in ("fastkd", "fastkd._kernels"):
            prefix = node.module.removeprefix("fastkd").removeprefix(".")
            found |= {f"{prefix}.{alias.name}".removeprefix(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastkd."):
            found.add(node.module.removeprefix("fastkd."))
    return found


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_come_from_lower_floors(module):
    here = room(module)
    assert here in FLOOR, f"{module} has no floor: add it to FLOORS"
    for other in imports(sources()[module]):
        assert room(other) == here or FLOOR[room(other)] < FLOOR[here], f"{module} imports {other}"


def test_every_floor_is_inhabited():
    assert {room(module) for module in sources()} == set(FLOOR)


def test_the_kernel_folder_is_no_package():
    # A top-level package `kernels` would shadow the one that transformers imports, and break every model.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastkd" / "_kernels").is_symlink()


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_kernels_need_torch_alone():
    loaded = modules_after("import fastkd.kernels")
    assert "torch" in loaded
    assert not loaded & {"transformers", "datasets", "pydantic", "omegaconf", "rich", "safetensors", "matplotlib"}
