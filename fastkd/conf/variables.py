"""The variables of the QAD scripts that have no key in a recipe, each with the reason."""

from __future__ import annotations

from difflib import get_close_matches

_LAUNCHER = "the launcher settles it: torchrun, Slurm or Ray"
_MEGATRON = "fastkd needs neither Megatron-LM nor ModelOpt"
_CONTAINER = "containers are the job script's business"
_NETWORK = "an environment variable of the job: export it in the job script"

IGNORED: dict[str, str] = {
    "MLM_DIR": _MEGATRON,
    "MODELOPT_DIR": _MEGATRON,
    "MODEL_CONF_DIR": _MEGATRON,
    "PYTHONPATH": _MEGATRON,
    "DATACACHE_DIR": "indexes are read in place; the cache of Parquet files follows HF_DATASETS_CACHE",
    "MASTER_ADDR": _LAUNCHER,
    "MASTER_PORT": _LAUNCHER,
    "NODE_RANK": _LAUNCHER,
    "SLURM_JOB_NODELIST": _LAUNCHER,
    "SLURM_JOB_ID": _LAUNCHER,
    "SLURM_PROCID": _LAUNCHER,
    "CONTAINER_IMAGE": _CONTAINER,
    "CONTAINER_MOUNTS": _CONTAINER,
    "CONTAINER_WORKDIR": _CONTAINER,
    "LOG_DIR": "the job script's own output; the run's files are under logger.log_dir",
    "LOG_INTERVAL": "every step is recorded",
    "ENABLE_MOE_PERF": "expert layers have one implementation",
    "ENABLE_MOE_EXPERIMENTAL": "expert layers have one implementation",
    "CUDA_DEVICE_MAX_CONNECTIONS": _NETWORK,
    "GLOO_SOCKET_IFNAME": _NETWORK,
    "UB_TIMEOUT": _NETWORK,
    "TRITON_CACHE_DIR": _NETWORK,
    "HF_HOME": _NETWORK,
    "HF_DATASETS_CACHE": _NETWORK,
    "HF_HUB_OFFLINE": _NETWORK,
}
_PREFIXES = {"NCCL_": _NETWORK, "NVTE_": _MEGATRON, "TORCH": _NETWORK, "PYTORCH_": _NETWORK, "SLURM_": _LAUNCHER}

_MAPPED = """
STUDENT_MODEL TEACHER_MODEL STUDENT_MODEL_ENV TEACHER_MODEL_ENV STUDENT_CKPT TEACHER_CKPT TEACHER_MODEL_CONFIG
STUDENT_CONFIG_FILE TOKENIZER_MODEL HF_MODEL_CKPT MODELS_ROOT QAD_CHECKPOINT_ROOT CHECKPOINT_DIR RUN_TAG
TP_SIZE PP_SIZE EP_SIZE IS_MOE MBS GBS NUM_GPUS NNODES SLURM_NNODES MAX_SEQ LR MIN_LR LR_DECAY_STYLE
LR_DECAY_SAMPLES LR_WARMUP_SAMPLES TRAIN_SAMPLES DATASET_NAME BLEND_PATH ITERATIONS_TO_SKIP KD_CFG_PATH
DISTILL_CONFIG_PATH SAVE_INTERVAL SAVE_RETAIN_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_PARAMS_NORM QUANT_CFG
"""
MAPPED = tuple(_MAPPED.split())
"""Variables that become keys."""


def reason(name: str) -> str | None:
    """Why a variable has no key in a recipe; None when it is not in the table."""
    if name in IGNORED:
        return IGNORED[name]
    return next((why for prefix, why in _PREFIXES.items() if name.startswith(prefix)), None)


def meant(name: str) -> str | None:
    """The known variable that a misspelt one was probably meant to be."""
    near = get_close_matches(name, [*MAPPED, *IGNORED], n=1, cutoff=0.8)
    return near[0] if near else None
