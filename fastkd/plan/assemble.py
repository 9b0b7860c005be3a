"""The plan of a recipe: memory and time of every role, what bounds the step, and what the run costs.

Nothing is measured here and nothing is loaded: sizes of the models, the recipe and the table of rates are all it
reads. Imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastkd.plan import engine_memory, speed, student_memory, teacher_memory
from fastkd.plan.layout import Layout, RoleName, read
from fastkd.plan.memory import STATE, RoleMemory
from fastkd.plan.rates import GIB, Rates
from fastkd.plan.speed import RoleTime
from fastkd.recipe import LoadedRecipe


@dataclass(frozen=True)
class Plan:
    """What a recipe needs and how long it takes."""

    layout: Layout

    @cached_property
    def memory(self) -> dict[RoleName, RoleMemory]:
        """Per role, on the device that holds most."""
        return {
            "training": student_memory.student(self.layout),
            "generation": engine_memory.generation(self.layout),
            "teacher": teacher_memory.teacher(self.layout),
        }

    @cached_property
    def time(self) -> dict[RoleName, RoleTime]:
        """Of one step, per role."""
        return {
            "training": speed.training(self.layout),
            "generation": speed.sampling(self.layout, self.memory["generation"]),
            "teacher": speed.scoring(self.layout),
        }

    # --- does it fit ------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> float:
        """Bytes of a device."""
        return self.layout.rates.device.memory

    def used(self, pool: tuple[RoleName, ...]) -> float:
        """Bytes on a device that these roles share. Their processes keep what they once had, so peaks add up; roles of
        one process take turns."""
        found = [self.memory[role] for role in pool]
        # A teacher in vLLM takes a Ray run, whose roles are processes on one device too.
        if len(pool) == 1 or self.layout.devices(pool[0]) > 1 or self.layout.teacher_engines:
            return sum(one.total for one in found)
        state = sum(one.rows.get(row, 0.0) for one in found for row in STATE)
        return state + max(one.total - one.state for one in found)

    @property
    def tight(self) -> list[RoleName]:
        """Roles that do not fit, worst first: all of a pool whose sum is too large, and engines whose cache cannot
        hold one sequence."""
        wrong: list[RoleName] = [role for pool in self.layout.pools if self.used(pool) > self.capacity for role in pool]
        wrong.sort(key=lambda role: -self.memory[role].total)
        engines: tuple[RoleName, ...] = ("generation", "teacher")
        return wrong + [role for role in engines if self.short(role) and role not in wrong]

    def short(self, role: RoleName) -> bool:
        """Whether the memory that a role's engine may take is too small for its weights and one longest sequence."""
        facts = self.memory[role].facts
        return facts.get("memory it needs", 0.0) > facts.get("memory it may take", float("inf"))

    @property
    def fits(self) -> bool:
        """Whether every role does."""
        return not self.tight

    # --- how long ---------------------------------------------------------------------------------------------------

    @cached_property
    def sync(self) -> tuple[float, float]:
        """(seconds, bytes) of bringing weights to the engines."""
        return speed.sync_seconds(self.layout)

    @property
    def serial_seconds(self) -> float:
        """A step with everything in sequence (``max_off_policy_steps`` 0)."""
        return sum(one.seconds for one in self.time.values()) + self.sync[0]

    @property
    def overlapped_seconds(self) -> float:
        """A step when roles on devices of their own work at the same time."""
        return max(sum(self.time[role].seconds for role in pool) for pool in self.layout.pools) + self.sync[0]

    @property
    def step_seconds(self) -> float:
        """As the recipe asks."""
        overlaps = self.layout.recipe.distillation.max_off_policy_steps > 0
        return self.overlapped_seconds if overlaps else self.serial_seconds

    @property
    def bound(self) -> RoleName:
        """The role that takes longest."""
        return max(self.time, key=lambda role: self.time[role].seconds)

    @property
    def tokens_per_second(self) -> float:
        """Prompt and response tokens, at the recipe's step time."""
        return self.layout.tokens_per_step / self.step_seconds

    @cached_property
    def validation_seconds(self) -> float:
        """One validation: its answers, on the engines."""
        recipe = self.layout.recipe
        if not recipe.validation_enabled:
            return 0.0
        samples = recipe.distillation.max_val_samples or 512
        return speed.sampling(self.layout, self.memory["generation"], sequences=samples).seconds

    @property
    def validations(self) -> int:
        """How often a whole run validates."""
        loop = self.layout.recipe.distillation
        if not self.layout.recipe.validation_enabled:
            return 0
        steps = loop.max_num_steps
        periodic = steps // loop.val_period if loop.val_period else 0
        at_end = loop.val_at_end and (not loop.val_period or steps % loop.val_period != 0)
        return periodic + int(loop.val_at_start) + int(at_end)

    @property
    def run_seconds(self) -> float:
        """``max_num_steps`` steps and their validations."""
        steps = self.layout.recipe.distillation.max_num_steps
        return steps * self.step_seconds + self.validations * self.validation_seconds

    @property
    def device_hours(self) -> float:
        """Of all devices, for the whole run."""
        return self.layout.all_devices * self.run_seconds / 3600

    # --- for machines -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data: bytes, seconds, counts."""
        layout = self.layout
        models = {"training": layout.student, "generation": layout.student, "teacher": layout.teacher}
        pools = [
            {"roles": list(pool), "bytes": self.used(pool), "fits": self.used(pool) <= self.capacity}
            for pool in layout.pools
        ]
        roles = {
            role: {
                "devices": layout.devices(role),
                "layout": str(layout.form(role)),
                "model": models[role].name,
                "parameters": models[role].parameters,
                "fits": role not in self.tight,
                "memory": {
                    "bytes": found.total,
                    "host_bytes": found.host,
                    "peak": found.peak,
                    "rows": found.rows,
                    "moments": {name: sum(rows.values()) for name, rows in found.moments.items()},
                    "facts": found.facts,
                },
                "time": {
                    "seconds": self.time[role].seconds,
                    "parts": self.time[role].parts,
                    "flops_per_device": self.time[role].flops,
                    "bytes_per_device": self.time[role].moved,
                    "facts": self.time[role].facts,
                },
            }
            for role, found in self.memory.items()
        }
        return {
            "device": {"name": layout.rates.device.name, "bytes": self.capacity, "count": layout.all_devices},
            "fits": self.fits,
            "roles": roles,
            "pools": pools,
            "step": {
                "bound_by": self.bound,
                "serial_seconds": self.serial_seconds,
                "overlapped_seconds": self.overlapped_seconds,
                "seconds": self.step_seconds,
                "sync_seconds": self.sync[0],
                "sync_bytes": self.sync[1],
                "tokens": layout.tokens_per_step,
                "tokens_per_second": self.tokens_per_second,
            },
            "run": {
                "steps": layout.recipe.distillation.max_num_steps,
                "validations": self.validations,
                "validation_seconds": self.validation_seconds,
                "seconds": self.run_seconds,
                "device_hours": self.device_hours,
            },
            "assumed": {"reached": layout.rates.reached} | layout.rates.assumed,
        }


def plan_of(loaded: LoadedRecipe, rates: Rates) -> Plan:
    """The plan of a recipe. Raises ModelError: the sizes of a model are not known."""
    return Plan(read(loaded, rates))


def gib(amount: float) -> float:
    """Bytes in GiB."""
    return amount / GIB
