"""``logger``, ``checkpointing`` and ``cluster``: what is recorded, what is saved, and on which machines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastkd.config.base import Count, Index, Section, derived, section


class WandbConfig(Section):
    """Weights & Biases."""

    project: str | None = None
    """Project."""
    name: str | None = None
    """Name of the run."""
    entity: str | None = None
    """User or team."""


class SwanLabConfig(Section):
    """SwanLab."""

    project: str | None = None
    """Project."""
    name: str | None = None
    """Name of the run."""


class TensorBoardConfig(Section):
    """TensorBoard."""

    log_dir: str = derived("${logger.log_dir}/tensorboard")
    """Folder of the event files."""


class MLflowConfig(Section):
    """MLflow."""

    experiment_name: str | None = None
    """Experiment."""
    run_name: str | None = None
    """Name of the run."""
    run_id: str | None = None
    """An existing run to continue."""
    tracking_uri: str | None = None
    """Tracking server."""
    artifact_location: str | None = None
    """Where artifacts go."""


class Logger(Section):
    """The run folder and where metrics go besides its `metrics.jsonl`."""

    log_dir: str = Field(default="runs/recipe", min_length=1)
    """The run folder. Default: `runs/<name of the recipe file>`."""
    num_val_samples_to_print: Index = 5
    """Validation samples shown after each validation."""
    wandb_enabled: bool = False
    """Also send metrics to Weights & Biases."""
    tensorboard_enabled: bool = False
    """Also write TensorBoard event files."""
    mlflow_enabled: bool = False
    """Also send metrics to MLflow."""
    swanlab_enabled: bool = False
    """Also send metrics to SwanLab."""
    log_params_norm: bool = False
    """Also record the norm of the student's weights with every step."""
    monitor_gpus: bool = False
    """Also record utilisation, memory, power and temperature of every GPU with every step (`pip install
    fastkd[monitor]`; memory of every role is always recorded)."""
    wandb: WandbConfig = section(WandbConfig)
    """Weights & Biases."""
    swanlab: SwanLabConfig = section(SwanLabConfig)
    """SwanLab."""
    tensorboard: TensorBoardConfig = section(TensorBoardConfig)
    """TensorBoard."""
    mlflow: MLflowConfig = section(MLflowConfig)
    """MLflow."""


class Checkpointing(Section):
    """Checkpoints `step_N`: the best by a metric plus the newest; resume is automatic."""

    enabled: bool = True
    """Write checkpoints."""
    checkpoint_dir: str = derived("${logger.log_dir}/checkpoints")
    """Where they go, and where a resume looks."""
    metric_name: Annotated[str, Field(pattern=r"^(val|train):\S+$")] | None = "val:accuracy"
    """What makes a checkpoint good: `val:` or `train:` and a metric; null = only the newest count."""
    higher_is_better: bool = True
    """Whether a larger metric is better."""
    keep_top_k: Count | None = 3
    """Checkpoints kept by metric (the newest is kept besides); null = all."""
    save_period: Count = 10
    """Save every this many steps (and after the last)."""
    checkpoint_must_save_by: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None = None
    """Save and stop after this much wall time, "DD:HH:MM:SS" in quotes."""
    model_save_format: Literal["safetensors"] = "safetensors"
    """File format of exported weights."""
    save_consolidated: bool = False
    """Also write a Hugging Face folder with each checkpoint."""
    is_async: bool = True
    """Write in the background while training goes on; needs host memory for a copy of weights and optimizer state."""


class Cluster(Section):
    """The machines."""

    gpus_per_node: Index = 1
    """GPUs of a node; 0 = run on the CPU."""
    num_nodes: Count = 1
    """Nodes, all roles together."""
    cpu_threads: Count | None = None
    """Threads of a CPU worker within one operation; null = torch's default."""
    cpu_slots_per_node: Count = 1
    """Workers of a node without GPUs."""
    exclude_nodes: list[str] = Field(default_factory=list)
    """Nodes of the Ray cluster that get no work: names, addresses, or at least 8 digits of their ids."""
    simulated: bool = False
    """Start the nodes as processes on this machine, for a trial without a cluster."""
    max_restarts: Index = 3
    """Times that lost workers of one role are replaced before the run gives up."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The kind of device every worker runs on."""
        return "cuda" if self.gpus_per_node else "cpu"
