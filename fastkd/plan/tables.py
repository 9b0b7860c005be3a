"""A plan as tables for a terminal: memory per device, time per step, what bounds it, what to turn when it is tight."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastkd.plan.assemble import Plan, gib
from fastkd.plan.knobs import knobs
from fastkd.plan.layout import ROLES, RoleName
from fastkd.plan.memory import OUTSIDE, ROWS, STATE
from fastkd.plan.splits import Proposal

_WAYS = ("compute", "prefill", "decoding", "launches", "tensor parallel", "context parallel", "sharding",
         "expert parallel", "host transfers", "optimizer", "log-probabilities", "payload")  # fmt: skip


def render(plan: Plan, name: str) -> RenderableType:
    """The whole plan. ``name``: what it is of."""
    device = plan.layout.rates.device
    head = Text(f"{name} on {plan.layout.all_devices} × {device.label} ({gib(device.memory):.1f} GiB each)")
    parts: list[RenderableType] = [head, _roles(plan), memory_table(plan), time_table(plan)]
    parts += [Text(line) for line in verdict(plan)]
    if not plan.fits:
        parts += [Text(line) for line in advice(plan)]
    return Group(*parts, Text(""), *(Text(line, style="dim") for line in assumptions(plan)))


def _roles(plan: Plan) -> Table:
    layout = plan.layout
    table = Table(box=None, pad_edge=False)
    for column in ("role", "devices", "layout", "model", "parameters"):
        table.add_column(column, justify="right" if column in ("devices", "parameters") else "left")
    for role in ROLES:
        shape = layout.teacher if role == "teacher" else layout.student
        of = ""
        if role == "teacher":
            of = " (the student's own weights)" * layout.teacher_shares_weights
            of += " (in vLLM)" * (layout.teacher_engines is not None)
        if role == "generation" and layout.recipe.data.blend.enabled:
            table.add_row(role, "-", "none: texts that exist", "", "")
            continue
        table.add_row(role, str(layout.devices(role)), str(layout.form(role)), shape.name + of, f"{shape.parameters:,}")
    return table


def memory_table(plan: Plan) -> Table:
    """GiB on the device of each role that holds most, at its peak."""
    cpu = plan.layout.rates.device.is_cpu
    unit, scale = ("MiB", 1 << 20) if cpu else ("GiB", 1 << 30)
    table = Table(title=f"Memory per device, {unit}", title_justify="left")
    table.add_column("")
    for role in ROLES:
        table.add_column(role, justify="right")
    rows = {role: plan.memory[role].rows for role in ROLES}

    def add(name: str, amounts: dict[RoleName, float], style: str = "") -> None:
        cells = [f"{amounts[role] / scale:.2f}" if amounts.get(role) else "-" for role in ROLES]
        table.add_row(name, *cells, style=style)

    for group in (STATE, tuple(one for one in ROWS if one not in STATE + OUTSIDE), OUTSIDE):
        shown = [name for name in group if any(rows[role].get(name) for role in ROLES)]
        for name in shown:
            add(name, {role: rows[role].get(name, 0.0) for role in ROLES})
        if shown:
            table.add_section()
    add("peak of the role", {role: plan.memory[role].total for role in ROLES}, style="bold")
    table.add_row("  reached in", *(plan.memory[role].peak for role in ROLES), style="dim")
    pools: dict[RoleName, float] = {role: plan.used(pool) for pool in plan.layout.pools for role in pool}
    if len(plan.layout.pools) < len(ROLES):
        add("roles on one device", pools, style="bold")
    if any(plan.memory[role].host for role in ROLES):
        add("in host memory", {role: plan.memory[role].host for role in ROLES})
    table.add_row(
        f"of {plan.capacity / scale:.1f}",
        *("too large" if role in plan.tight else f"{(plan.capacity - pools[role]) / scale:.1f} free" for role in ROLES),
    )
    return table


def time_table(plan: Plan) -> Table:
    """Seconds of a step, role by role, and bytes over links."""
    table = Table(title="One step", title_justify="left")
    table.add_column("")
    for role in ROLES:
        table.add_column(role, justify="right")
    parts = {role: plan.time[role].parts for role in ROLES}
    digits = 1 if plan.serial_seconds >= 10 else 3
    for name in _WAYS:
        if any(parts[role].get(name, 0.0) >= 0.5 * 10**-digits for role in ROLES):
            cells = [f"{parts[role][name]:.{digits}f} s" if parts[role].get(name) else "-" for role in ROLES]
            table.add_row(name, *cells)
    table.add_section()
    table.add_row("seconds", *(f"{plan.time[role].seconds:.{digits}f} s" for role in ROLES), style="bold")
    table.add_row("TFLOP per device", *(f"{plan.time[role].flops / 1e12:,.{digits}f}" for role in ROLES))
    table.add_row("GB over links, per device", *(f"{plan.time[role].bytes_moved / 1e9:,.1f}" for role in ROLES))
    return table


def verdict(plan: Plan) -> list[str]:
    """What holds and how long it takes, a line each."""
    layout, recipe = plan.layout, plan.layout.recipe
    kept, facts = plan.memory["generation"].facts, plan.memory["training"].facts
    seconds, amount = plan.sync
    loop = recipe.distillation
    chosen = "overlapped" if loop.max_off_policy_steps else "in sequence"
    held = kept["longest sequences held"]
    small = plan.serial_seconds < 10
    form = ".3f" if small else ".0f"
    lines = [
        "",
        f"KV cache     {held:.1f} sequences of {recipe.policy.max_total_sequence_length} tokens per engine, "
        f"{kept['mean sequences held']:.0f} of mean length "
        f"({kept['bytes of a cached token'] / 1024:.0f} KiB per token and device)",
        f"activations  {_amount(facts['activations kept'])} kept, {_amount(facts['activations recomputed'])} "
        f"recomputed ({'recomputed' if recipe.policy.dtensor_cfg.activation_checkpointing else 'kept'} here), "
        f"micro-batch of {facts['tokens of a micro-batch']:.0f} tokens",
        f"logits       {_amount(facts['logits never made'])} of [tokens, vocabulary] are never made",
        f"state        {facts['bytes per parameter']:.0f} bytes per trained parameter "
        "(the float32 weights are the masters)",
        f"payload      {plan.memory['teacher'].facts['payload per token']:.0f} bytes per token, "
        f"{plan.time['teacher'].facts['payload of a step'] / 1e6:,.1f} MB per step",
        f"sync         {amount / 1e9:.1f} GB of weights to the engines, {seconds:.1f} s",
        f"bound by     {plan.bound}",
        f"step         {format(plan.serial_seconds, form)} s in sequence, {format(plan.overlapped_seconds, form)} s "
        f"overlapped (here: {chosen}); {plan.tokens_per_second:,.0f} tokens/s",
        f"run          {loop.max_num_steps} steps and {plan.validations} validations: "
        f"{plan.run_seconds / 3600:,.1f} hours, {plan.device_hours:,.1f} device-hours on {layout.all_devices}",
    ]
    if recipe.data.blend.enabled:  # nothing is cached, and no weights are sent
        lines = [line for line in lines if not line.startswith(("KV cache", "sync"))]
    tight = plan.tight
    return [*lines, f"fits         {'yes' if not tight else 'no: ' + ', '.join(tight)}"]


def _amount(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB" if size >= 1 << 28 else f"{size / (1 << 20):.1f} MiB"


def advice(plan: Plan) -> Iterator[str]:
    """The first knobs for each pool that does not fit."""
    seen: set[tuple[RoleName, ...]] = set()
    for role in plan.tight:
        pool = next(pool for pool in plan.layout.pools if role in pool)
        if pool in seen:
            continue
        seen.add(pool)
        if plan.short(role):
            facts = plan.memory[role].facts
            yield (
                f"An engine of {role} needs {gib(facts['memory it needs']):.1f} GiB for its weights and one longest "
                f"sequence, and may take {gib(facts['memory it may take']):.1f} GiB."
            )
        yield f"Turn for {' and '.join(pool)}, in this order:"
        for number, knob in enumerate(knobs(plan, role), 1):
            if knob.value is None:
                yield f"  {number}. {knob.key}: {knob.note}"
            else:
                result = "then it fits" if knob.fits else "not enough"
                yield f"  {number}. {knob.override}: {gib(knob.total):.1f} GiB, {result} ({knob.note})"


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on."""
    layout = plan.layout
    lengths, reached, assumed = layout.lengths, layout.rates.reached, layout.rates.assumed
    lines = [
        f"Memory is for the longest sequences; time for responses of {lengths.response:.0f} tokens after prompts of "
        f"{lengths.prompt:.0f}, the longest of a step {lengths.longest:.0f}.",
        f"Reached: {reached['training']:.0%} of the matrix-product peak in training, {reached['scoring']:.0%} in "
        f"scoring, {reached['memory']:.0%} of memory bandwidth in decoding."
        + ("" if layout.rates.device.is_cpu else f" {assumed['context_gib']} GiB outside tensors."),
        "Change either with --rates FILE (docs/plan.md), the device with --device NAME.",
    ]
    if max(layout.train.ep, layout.score.ep) > 1:
        lines.append("expert parallel is an estimate: every expert gets as many rows, and no message waits to start.")
    if layout.teacher_engines is not None:
        lines.append(
            f"log-probabilities (K + 1 of every token, by Python) take {assumed['prompt_logprob_us']} µs each in a "
            "teacher's engine: an estimate."
        )
    for shape in {layout.student.name: layout.student, layout.teacher.name: layout.teacher}.values():
        if shape.assumed:
            lines.append(f"{shape.name}: model_type {shape.model_type!r} is counted as a plain gated decoder.")
    return lines


def render_splits(plan: Plan, proposals: list[Proposal]) -> RenderableType:
    """The proposals of ``--sweep``, and the command-line overrides of the best."""
    if not proposals:
        none = "is faster by more than 1 %" if plan.fits else "fits"
        return Text(f"\nNo other split of these devices {none}.")
    table = Table(title="Other splits of the same devices", title_justify="left")
    for column in ("", "training", "generation", "teacher", "step", "tokens/s", "device-hours"):
        table.add_column(column, justify="left" if column in ("", "training", "generation", "teacher") else "right")

    def add(name: str, one: Plan) -> None:
        layout = one.layout
        step = f"{one.step_seconds:.1f} s" if one.fits else "does not fit"
        table.add_row(
            name,
            f"{layout.train.devices}: {layout.train}",
            f"{layout.engines.devices}: {layout.engines}",
            f"{layout.score.devices}: {layout.form('teacher')}",
            step,
            f"{one.tokens_per_second:,.0f}",
            f"{one.device_hours:,.0f}",
        )

    add("now", plan)
    for number, proposal in enumerate(proposals, 1):
        add(str(number), proposal.plan)
    lines = ["The first, as overrides:", *(f"  {one}" for one in proposals[0].overrides)]
    return Group(Text(""), table, *map(Text, lines))
