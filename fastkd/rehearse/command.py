"""``python -m fastkd.run RECIPE --rehearse``: run the small recipe, resume it in a new run, and say what that showed.

The cluster of simulated nodes lives for both runs; the second one builds every role anew in new processes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastkd import log
from fastkd.checkpoint import Checkpoints
from fastkd.config import Recipe
from fastkd.driver import RunFolder, prepare
from fastkd.errors import MissingDependency, UserError
from fastkd.log import console, logger
from fastkd.recipe import LoadedRecipe
from fastkd.rehearse import memory, sizes, story
from fastkd.rehearse.shrink import STEPS, STEPS_BEFORE, Small, shrink
from fastkd.rehearse.stages import Rehearsal, Seen
from fastkd.roles import Roles
from fastkd.runner import drive
from fastkd.stop import Stop

_STORE_BYTES = 80 << 20
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a thread per core in every one of forty workers is a standstill
    "MALLOC_ARENA_MAX": "2",
    "HF_HUB_OFFLINE": "1",  # nothing of it is on a hub
    "TOKENIZERS_PARALLELISM": "false",
    # Forty interpreters that start on two cores take minutes, and Ray gives one of them a minute.
    "RAY_worker_register_timeout_seconds": "900",
}


def rehearse(loaded: LoadedRecipe, keep: str | None = None) -> bool:
    """Rehearse a recipe and print what it showed; whether all went well.

    Args:
        loaded: the recipe, checked.
        keep: a folder for models, texts and the run folder, which is left there; None: a temporary one.

    Raises:
        UserError: the recipe cannot be rehearsed, or not on this machine.
        WorkerError, NonFiniteLoss: what the run itself raises when it fails.
    """
    log.configure()
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(keep))
        stack.enter_context(_environment(folder))
        seen = Seen(stack.enter_context(memory.PeakMemory()))
        done = False
        small: Small | None = None
        try:
            with seen.stage("make models and texts"):
                small = shrink(loaded, folder)
            _run(loaded.recipe, small, seen, stack)
            done = True
        finally:
            if small is not None:
                console.print(story.tell(loaded, small, seen, done=done))
        if keep:
            logger.info(f"kept: {folder}")
    return not seen.problems


def _run(recipe: Recipe, small: Small, seen: Seen, stack: ExitStack) -> None:
    nodes = recipe.cluster.num_nodes if small.clustered else 0
    memory.require(_need(recipe, small, nodes))
    if small.clustered:
        try:
            from fastkd.simulated_cluster import simulated
        except ImportError as error:
            key, rule = "--rehearse", f"the recipe runs on a Ray cluster, and Ray cannot be imported ({error})"
            raise MissingDependency(key, rule, "pip install 'fastkd[ray]'") from None
        slots = recipe.cluster.gpus_per_node or recipe.cluster.cpu_slots_per_node
        with seen.stage(f"start {nodes} Ray node(s)"):
            stack.enter_context(simulated(nodes, slots, store_bytes=_STORE_BYTES, patient=True))
    _one_run(small.loaded(STEPS_BEFORE), seen, "start the roles")
    _one_run(small.loaded(STEPS), seen, "start the roles of a new run")
    _judge(recipe, small, seen)


def _need(recipe: Recipe, small: Small, nodes: int) -> float:
    if not small.clustered:
        return memory.needed_gib(1, 0)
    roles, engines = recipe.role_sizes, sizes.engines(recipe)
    wide = roles.generation if small.vllm else 0
    return memory.needed_gib(roles.training + roles.teacher + engines, nodes + 1, wide)


def _one_run(loaded: LoadedRecipe, seen: Seen, starting: str) -> None:
    """From the recipe to the end of the run, as ``runner.run`` does it."""
    inputs = prepare(loaded)
    runs: list[Rehearsal] = []
    with ExitStack() as stack:

        def introduce() -> None:
            stack.enter_context(seen.stage(starting))

        def build(folder: RunFolder, roles: Roles, stop: Stop) -> Rehearsal:
            stack.close()  # the roles stand
            runs.append(Rehearsal(loaded, inputs, folder, roles, stop, seen=seen))
            return runs[0]

        drive(loaded, inputs, "", introduce, build)
    if not runs or runs[0].step_number < inputs.last_step:
        raise KeyboardInterrupt  # a signal: the run has said so


def _judge(recipe: Recipe, small: Small, seen: Seen) -> None:
    """What both runs together must have shown."""
    seen.expect(len(seen.prompts) == STEPS, f"{len(seen.prompts)} steps were sampled, not {STEPS}")
    used = [index for step in seen.prompts for index in step]
    seen.expect(len(used) == len(set(used)), "a prompt was used twice: the new run did not go on where the first ended")
    if small.clustered:
        engines, prompts = sizes.engines(recipe), small.tree["distillation"]["num_prompts_per_step"]
        found = len(seen.nodes.get("generation", ()))
        seen.expect(found == engines, f"{found} engines, and the recipe asks for {engines}")
        idle = sorted(set(range(found)) - seen.engines)
        seen.expect(not idle or prompts < engines, f"engines {idle} of {found} never sampled")
    saved = Checkpoints(small.loaded(STEPS).recipe.checkpointing, None).steps()  # pyright: ignore[reportArgumentType]
    seen.expect(STEPS in saved, f"no checkpoint of step {STEPS}: there are {saved}")
    if recipe.validation_enabled:
        seen.expect(seen.validated > 0, "the recipe validates, and nothing was validated")


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="fkd-rehearse-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    folder = Path(keep).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("--keep", "must be a new or an empty folder", "Give another one", value=keep)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--keep", f"cannot be made ({error.strerror})", "Give another one", value=keep) from None
    yield folder


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Variables of this process and of all that it starts; put back at the end."""
    changed = {**_ENVIRONMENT, "HF_DATASETS_CACHE": str(folder / "datasets")}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
