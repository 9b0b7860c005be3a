"""What is trained on and how: batches, the blend, the learning rate, the loss and the number format."""

from __future__ import annotations

from fastkd.blends.named import find_named, unknown_name
from fastkd.conf import models, schedule
from fastkd.conf.draft import Draft
from fastkd.config.quantization import MODELOPT, PRESETS

_NAMES = {name.lower(): preset for name, preset in MODELOPT.items()} | {name: name for name in PRESETS}
QUANTISATIONS = _NAMES | {"nvfp4": "default", "w4a16_nvfp4": "weight_only"}
"""Names of what is quantised → presets of policy.quant_cfg."""
KEPT_LOGITS = 128
"""Teacher logits per token; the rest of the vocabulary is one bucket. The scripts use all of them."""


def convert_data(draft: Draft) -> None:
    batch = draft.number("GBS", "256", least=1)
    micro = draft.number("MBS", least=1, required=True)
    if batch:
        draft.map("GBS", "distillation.num_prompts_per_step", batch, "and policy.train_global_batch_size")
        draft.set("policy.train_global_batch_size", batch)
    if micro:
        draft.map("MBS", "policy.train_micro_batch_size", micro, "and logprob_batch_size")
        draft.set("policy.logprob_batch_size", micro)
    length = draft.number("MAX_SEQ", draft.sequence_length, least=2)
    if length:
        draft.map("MAX_SEQ", "policy.max_total_sequence_length", length)
    samples = _blend(draft)
    if samples and batch:
        steps = samples // batch
        if steps == 0:
            draft.row("TRAIN_SAMPLES", "error", f"are fewer than one batch of {batch}")
            return
        draft.set("distillation.max_num_steps", steps)
        _learning_rate(draft, samples, batch, steps)
    _skip(draft)


def _blend(draft: Draft) -> int | None:
    """The data section; returns the samples of the run."""
    name, path = draft.get("DATASET_NAME", "openscience"), draft.get("BLEND_PATH")
    named = find_named(name)
    if named is None and not path:
        error = unknown_name(name)
        draft.row("DATASET_NAME", "error", f"{error.rule}. {error.remedy} Else give BLEND_PATH and TRAIN_SAMPLES")
    elif path:
        draft.map("BLEND_PATH", "data.blend.path", path)
        draft.map("DATASET_NAME", "data.blend.name", name, "a label" if named is None else "")
    elif named:
        draft.map("DATASET_NAME", "data.blend.name", name, f"looked for as {named[2]} in data.blend.folder")
    samples = draft.number("TRAIN_SAMPLES", str(named[0].samples) if named else "", least=1)
    if samples is None and "TRAIN_SAMPLES" not in draft.values and path and named is None:
        draft.row("TRAIN_SAMPLES", "error", f"is required with a blend of your own (DATASET_NAME={name} has no size)")
    if samples:
        draft.map("TRAIN_SAMPLES", "data.blend.train_samples", samples)
    return samples


def _skip(draft: Draft) -> None:
    text = draft.get("ITERATIONS_TO_SKIP")
    if not text:
        return
    words = text.replace(",", " ").split()
    if not all(word.isdigit() and int(word) > 0 for word in words):
        draft.row("ITERATIONS_TO_SKIP", "error", "must be whole numbers of at least 1, with spaces between")
        return
    steps = [int(word) for word in words]
    note = f"as Megatron does; for the first {steps[0]} steps write {steps[0]}" if len(steps) == 1 else ""
    draft.map("ITERATIONS_TO_SKIP", "data.blend.iterations_to_skip", steps, note)


def _learning_rate(draft: Draft, samples: int, batch: int, steps: int) -> None:
    lr = draft.number("LR", "1e-6", float)
    minimum = draft.number("MIN_LR", "0", float)
    style = draft.get("LR_DECAY_STYLE", "cosine").lower()
    warmup = draft.number("LR_WARMUP_SAMPLES", str(samples // 100))
    decay = draft.number("LR_DECAY_SAMPLES", str(samples * 99 // 100), least=1)
    if lr == 0:
        draft.row("LR", "error", "must be above 0")
    if style not in schedule.STYLES:
        draft.row("LR_DECAY_STYLE", "error", f"must be one of {', '.join(schedule.STYLES)}")
    if not lr or minimum is None or warmup is None or decay is None or style not in schedule.STYLES:
        return
    if minimum > lr:
        draft.row("MIN_LR", "error", f"must be at most LR, {lr:g}")
        return
    draft.map("LR", "policy.optimizer.kwargs.lr", lr)
    warm, end = schedule.in_steps(warmup, batch), schedule.in_steps(decay, batch)
    draft.set("policy.scheduler", schedule.schedulers(style, lr, minimum, steps=steps, warmup=warm, decay=end))
    for name, text in (
        ("LR_WARMUP_SAMPLES", f"policy.scheduler: warm-up in {warm} steps"),
        ("LR_DECAY_STYLE", f"policy.scheduler: {style}"),
        ("LR_DECAY_SAMPLES", f"policy.scheduler: decay until step {end} of {steps}"),
        ("MIN_LR", f"policy.scheduler: down to {minimum:g}"),
    ):
        draft.row(name, "mapped" if draft.values.get(name) else "default", text)


def convert_loss(draft: Draft) -> None:
    temperature = 1.0
    for name in ("KD_CFG_PATH", "DISTILL_CONFIG_PATH"):
        path = draft.get(name)
        if path:
            temperature = _distillation_file(draft, name, path) or temperature
    draft.set("distillation.topk_logits_k", KEPT_LOGITS)
    draft.set("loss_fn", {"kl_type": "forward", "outside_topk": "bucket", "temperature": temperature})
    preset = draft.get("QUANT_CFG", "nvfp4")
    known = QUANTISATIONS.get(preset.lower())
    if known is None:
        draft.row("QUANT_CFG", "error", f"must be one of {', '.join(QUANTISATIONS)}")
    else:
        draft.map("QUANT_CFG", "policy.quant_cfg", known, "the teacher stays unquantised")


def _distillation_file(draft: Draft, name: str, path: str) -> float | None:
    """A custom distillation config (ModelOpt's YAML); returns its temperature."""
    try:
        config = models.read_yaml(path)
    except ValueError as error:
        draft.row(name, "error", f"{error}; mend it or leave the variable out")
        return None
    if config is None:
        draft.row(name, "error", "no such file; the scripts go on without it, unnoticed: mend or remove it")
        return None
    if config.get("intermediate_layer_pairs"):
        draft.row(name, "error", "intermediate_layer_pairs: only logits are distilled; set it to []")
    if config.get("skip_lm_loss") is False:
        draft.row(name, "error", "skip_lm_loss: false: there is no language-modelling loss beside KL; set it to true")
    temperature = config.get("logit_kl_temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or temperature <= 0:
        draft.row(name, "error", f"logit_kl_temperature is {temperature!r}, must be a number above 0")
        return None
    rest = [key for key in config if key not in ("intermediate_layer_pairs", "skip_lm_loss", "logit_kl_temperature")]
    note = f"; without effect: {', '.join(rest)}" if rest else ""
    draft.row(name, "mapped", f"loss_fn.temperature: {float(temperature):g}{note}")
    return float(temperature)
