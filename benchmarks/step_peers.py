"""One provider of the step benchmark in a process of its own: builds a trainer, then steps when it is told to.

``python step_peers.py '{"provider": "fastkd", …}'`` (a Job as JSON) answers on stdout with one JSON object a line:
first a Ready, with what its first step did, then a Burst for every line ``steps N`` on stdin, until stdin closes.
Between bursts it waits and uses no CPU, so that providers can take turns on one machine.

All providers are made to do the same work through their own public settings, and each at its best: float32, one
CPU thread, the same prompts in the same order, fused AdamW at a constant rate, gradient norm clipped at 1, no
logging, no saving, no gradient checkpointing (TRL's default is on, which also switches GKD's KV cache off). No id
ends a response: the stop id is one that does not exist, so every response has exactly the asked length.

A step is timed from the end of the one before to its own end, so it includes rendering and tokenising the prompts.
"Generation" is fastkd's span of that name (sampling, and making rollouts of the samples), and TRL's method that
calls ``generate`` (GKDTrainer.generate_on_policy_outputs, DistillationTrainer._generate_single_turn). CPU time is
kept beside wall time: on a busy machine it says what a quiet one would (one thread does all the work).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "arithmetic_cpu.yaml"
# More steps than anyone asks for: training ends when stdin closes.
_ENDLESS = 10**6


@dataclass(frozen=True)
class Job:
    """What every provider is asked to do."""

    provider: str
    """fastkd, trl-distillation or trl-gkd."""
    student: str
    teacher: str
    """Folders of models with a common tokenizer."""
    vocab: int
    """Rows of both LM heads; also the stop id, which no model can produce."""
    prompts: int
    """Prompts of a step, one response each."""
    new_tokens: int
    """Tokens of every response."""
    lr: float = 1e-4
    keep: int = 32
    """fastkd only: teacher logits kept per token. The rest of the vocabulary is one bucket."""


@dataclass
class Ready:
    """The first step, for the check that all providers do the same."""

    sequences: list[tuple[list[int], list[int]]]
    """(prompt, response) ids."""
    loss: float
    """Reverse KL per response token, as the provider computed it."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Times:
    """Seconds on the clock and of CPU."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Times:
        """Readings of the two clocks."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Times) -> Times:
        return Times(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Burst:
    """Some consecutive steps."""

    steps: list[Times] = field(default_factory=list)
    generation: list[Times] = field(default_factory=list)
    """The part of each step that samples."""
    response_tokens: list[int] = field(default_factory=list)
    """Loss-active tokens of each step."""
    peak_mib: float = 0.0
    """Highest resident set so far, less that of the process once models and trainer were loaded."""


class Meter:
    """Collects what one step did; the providers fill it in."""

    def __init__(self) -> None:
        self.generation = Times()
        self.tokens = 0
        self.loss = 0.0
        self.sequences: list[tuple[list[int], list[int]]] = []

    def timed(self, function: Any) -> Any:
        """The function, its time kept in ``generation``; it is called once per step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = Times.now()
            result = function(*args, **kwargs)
            self.generation = Times.now() - began
            return result

        return run


# --- fastkd -----------------------------------------------------------------------------------------------------


def fastkd_steps(job: Job, meter: Meter, folder: str) -> Iterator[None]:
    """Yields once when everything is loaded, and after every step."""
    from fastkd.driver import RunFolder, prepare
    from fastkd.recipe import load_recipe
    from fastkd.roles import LocalRoles
    from fastkd.rollout import Generation
    from fastkd.runner import Runner

    loaded = load_recipe(
        RECIPE,
        [
            f"policy.model_name={job.student}",
            f"teacher.model_name={job.teacher}",
            f"distillation.num_prompts_per_step={job.prompts}",
            f"policy.train_global_batch_size={job.prompts}",
            f"policy.generation_batch_size={job.prompts}",
            f"policy.generation.max_new_tokens={job.new_tokens}",
            f"policy.generation.stop_token_ids=[{job.vocab}]",
            f"distillation.topk_logits_k={job.keep}",
            "loss_fn.kl_type=reverse",
            "loss_fn.outside_topk=bucket",
            "policy.optimizer.kwargs={" + f"lr: {job.lr}, weight_decay: 0.0, betas: [0.9, 0.999], fused: true" + "}",
            "policy.scheduler=[]",
            "data.shuffle=false",
            "checkpointing.enabled=false",
            f"logger.log_dir={folder}",
        ],
    )
    inputs = prepare(loaded)
    runner = Runner(loaded, inputs, RunFolder(inputs.recipe), LocalRoles(inputs))
    sample = meter.timed(Generation.sample)

    def keep_first(*args: Any, **kwargs: Any) -> Any:
        rollouts = sample(*args, **kwargs)
        meter.sequences = [(list(r.prompt.tokens), list(r.response)) for r in rollouts]
        Generation.sample = sample
        return rollouts

    Generation.sample = keep_first
    yield
    while True:
        metrics = runner.step()
        meter.generation.wall = runner.spans.take()["timing/generation"]
        meter.tokens = round(metrics["train/global_valid_toks"])
        meter.loss = metrics["train/loss"]
        yield


# --- TRL --------------------------------------------------------------------------------------------------------


def trl_trainer(job: Job, meter: Meter, folder: str, callback: Any) -> Any:
    """GKDTrainer or DistillationTrainer, ready to train."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.student, padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(job.student, dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(job.teacher, dtype="float32").eval()
    student.generation_config.eos_token_id = job.vocab
    student.generation_config.max_new_tokens = None  # the trainers bring their own
    rows = [json.loads(line) for line in (RECIPE.parent / "arithmetic" / "train.jsonl").read_text().splitlines()]
    rows = rows[: len(rows) // job.prompts * job.prompts]
    users = [[{"role": "user", "content": row["problem"]}] for row in rows]
    answers = [[{"role": "assistant", "content": row["answer"]}] for row in rows]

    settings: dict[str, Any] = dict(
        output_dir=folder,
        per_device_train_batch_size=job.prompts,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        max_steps=_ENDLESS,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        temperature=1.0,
        beta=1.0,
    )
    common: dict[str, Any] = dict(
        model=student, teacher_model=teacher, processing_class=tokenizer, callbacks=[callback]
    )
    if job.provider == "trl-gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trainer = GKDTrainer(
            args=GKDConfig(lmbda=1.0, max_new_tokens=job.new_tokens, train_sampling_strategy="sequential", **settings),
            train_dataset=Dataset.from_dict({"messages": [u + a for u, a in zip(users, answers, strict=True)]}),
            **common,
        )
        trainer.generate_on_policy_outputs = meter.timed(trainer.generate_on_policy_outputs)
    elif job.provider == "trl-distillation":
        from trl import DistillationConfig, DistillationTrainer

        trainer = DistillationTrainer(
            args=DistillationConfig(max_completion_length=job.new_tokens, shuffle_dataset=False, **settings),
            train_dataset=Dataset.from_dict({"prompt": users}),
            **common,
        )
        # It adds the tokenizer's end-of-sequence token to the ids that stop, whatever the model says.
        trainer.eos_token_ids = [job.vocab]
        trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = [job.vocab]
        trainer._generate_single_turn = meter.timed(trainer._generate_single_turn)
    else:
        raise SystemExit(f"unknown provider {job.provider!r}")

    compute_loss = trainer.compute_loss

    def observed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(model, inputs, *args, **kwargs)
        if job.provider == "trl-gkd":
            active = inputs["labels"] != -100
            # GKD divides by the tokens of the dataset's answers, not by those that it generated.
            items = kwargs.get("num_items_in_batch")
            meter.tokens = int(active.sum())
            meter.loss = float(loss.detach()) * (1 if items is None else int(items) / meter.tokens)
            if not meter.sequences:
                real, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
                meter.sequences = [
                    (row[there & ~counts].tolist(), row[counts].tolist())
                    for row, there, counts in zip(ids, real, active, strict=True)
                ]
        else:
            meter.tokens, meter.loss = int(inputs["completion_mask"].sum()), float(loss.detach())
            if not meter.sequences:
                meter.sequences = [
                    (prompt[there.bool()].tolist(), response.tolist())
                    for prompt, there, response in zip(
                        inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_ids"], strict=True
                    )
                ]
        return loss

    trainer.compute_loss = observed
    return trainer


# --- the process ------------------------------------------------------------------------------------------------


class Session:
    """The conversation with the benchmark: ``loaded`` once, ``stepped`` after every step; False means stop."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        # Libraries print: the real stdout is for JSON alone, theirs goes to stderr.
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.burst: Burst | None = None
        self.wanted = 0
        self.baseline = 0.0
        self.began = Times()

    def send(self, message: Ready | Burst) -> None:
        """One line."""
        self.channel.write(json.dumps(asdict(message)) + "\n")
        self.channel.flush()

    def loaded(self) -> None:
        """Memory counts from here."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) becomes what is resident now
        self.baseline = status_mib("VmRSS")

    def stepped(self) -> bool:
        """Book the step that just ended; wait for the next order when it was the last one wanted."""
        meter, now = self.meter, Times.now()
        if self.burst is None:
            from importlib.metadata import version

            names = ["torch", "transformers", *(["trl"] if "trl" in sys.modules else [])]
            self.send(Ready(meter.sequences, meter.loss, {name: version(name) for name in names}))
        else:
            self.burst.steps.append(now - self.began)
            self.burst.generation.append(meter.generation)
            self.burst.response_tokens.append(meter.tokens)
            if len(self.burst.steps) == self.wanted:
                self.burst.peak_mib = status_mib("VmHWM") - self.baseline
                self.send(self.burst)
        if self.burst is None or len(self.burst.steps) == self.wanted:
            order = sys.stdin.readline().split()
            if not order:
                return False
            self.wanted, self.burst = int(order[1]), Burst()
        meter.generation, meter.tokens = Times(), 0
        self.began = Times.now()
        return True


def status_mib(name: str) -> float:
    """A memory figure of this process from /proc/self/status: VmRSS (now), VmHWM (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Serve one Job."""
    job = Job(**json.loads(sys.argv[1]))
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)  # two threads on a machine with other work wait for one another
    torch.manual_seed(0)
    meter = Meter()
    session = Session(meter)

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            session.loaded()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not session.stepped()

    with tempfile.TemporaryDirectory() as folder:
        if job.provider != "fastkd":
            trl_trainer(job, meter, folder, Turns()).train()
            return
        steps = fastkd_steps(job, meter, folder)
        next(steps)
        session.loaded()
        for _ in steps:
            if not session.stepped():
                return


if __name__ == "__main__":
    main()
