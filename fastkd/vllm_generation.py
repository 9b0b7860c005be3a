"""The generation worker on vLLM: the same contract as ``fastkd.rollout.Generation``, with an engine's throughput.

The engine's core runs in this process and takes a step only when somebody here waits for a result. So whatever holds
the steps back (a pause, a weight update) stops all generation at one token boundary, and nothing in flight is lost:
sequences keep what they have sampled, their keys and values are computed anew with the new weights (as are cached
prefixes), and the seeds' generators go on where they were. Tensor-parallel workers are processes of their own.

Three ways to get rollouts: ``sample`` waits for all; ``stream`` gives each as soon as it is finished; ``submit`` and
``collect`` do so in short calls, which an actor can answer between weight updates.

A sample depends on its own seed, not on what runs beside it (bf16 logits depend on the batch in their last bit, which
can flip a near-tie). The seeds are ``rollout.Generation``'s; the noise is vLLM's, so samples differ between the two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastkd import vllm_setup
from fastkd.batch import Prompt, Rollout
from fastkd.config import Recipe
from fastkd.log import bars
from fastkd.rollout import Request
from fastkd.sampling import sample_seed

_PAUSED, _UPDATING, _ASLEEP = "paused", "updating", "asleep"


@dataclass(frozen=True, slots=True)
class SampledRollout(Rollout):
    """A rollout with what the engine knows about its tokens; ``weights_version`` is that of the first one."""

    logprobs: tuple[float, ...] = ()
    """Of each response token under the sampling weights, at temperature 1 and over the whole vocabulary."""
    versions: tuple[tuple[int, int], ...] = ()
    """(weights version, index of the first response token sampled with it), ascending."""


class VllmGeneration:
    """One vLLM engine.

    Args:
        engine_args: keyword arguments of vLLM's ``EngineArgs``; ``vllm_setup`` makes them from a recipe.
        stop_token_ids: ids that end a response.
        max_new_tokens: longest response.
        max_total_tokens: longest prompt + response; a longer one is cut and counts as truncated.
        stop_strings: texts that end a response, kept in it.
        valid_vocab: rows of the LM head that are tokens, when it is padded; the rest are never sampled.

    Raises:
        MissingDependency: vLLM is not installed.
    """

    def __init__(
        self,
        engine_args: dict[str, Any],
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        max_total_tokens: int,
        stop_strings: Sequence[str] | None = None,
        valid_vocab: int | None = None,
    ):
        self.max_new_tokens, self.max_total_tokens = max_new_tokens, max_total_tokens
        self.stop_token_ids, self.stop_strings = list(stop_token_ids), list(stop_strings or ())
        self.weights_version = 0
        self.engine: Any = vllm_setup.start_engine(engine_args)
        self.workers: int = self.engine.vllm_config.parallel_config.world_size
        if valid_vocab is not None:
            self.engine.collective_rpc("limit_vocabulary", args=(valid_vocab,))
        self.engine.set_weight_version("0")
        self._names, self._tickets = count(), count()
        self._turn = threading.Condition()
        self._held: set[str] = set()  # why no step is taken
        self._broken = ""  # why nothing can be sampled before the next weight update
        self._dropped = False  # the weights, while it sleeps
        self._flying: dict[str, tuple[int, Callable[[Any], Any]]] = {}  # request → ticket, result of its output
        self._finished: dict[int, Any] = {}  # ticket → result
        self._submitted: set[int] = set()

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, eos_token_id: int, valid_vocab: int | None, *, dummy: bool = False, **more: Any
    ) -> VllmGeneration:
        """An engine as ``policy.generation`` says.

        Args:
            recipe: the student's checkpoint, limits, ``vllm_cfg`` and ``vllm_kwargs``.
            eos_token_id: ends a response where the recipe names no stop tokens.
            valid_vocab: ``models.valid_vocab``.
            dummy: random weights, where the first sync brings the real ones: config.json is enough.
            more: keyword arguments of ``EngineArgs`` that go before the recipe's.
        """
        settings = recipe.policy.generation
        return cls(
            vllm_setup.student_arguments(recipe, dummy=dummy) | more,
            settings.stop_token_ids or [eos_token_id],
            settings.max_new_tokens,
            recipe.policy.max_total_sequence_length,
            settings.stop_strings,
            valid_vocab,
        )

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], request: Request, *, batch_size: int | None = None) -> list[Rollout]:
        """``request.generations`` rollouts per prompt, prompt by prompt; ``batch_size`` is left to the engine.

        Masked prompts and prompts that leave no room for a response come back with an empty response.
        """
        rollouts: list[Any] = [None] * (len(prompts) * request.generations)
        for index, rollout in self.stream(prompts, request):
            rollouts[index] = rollout
        return rollouts

    def stream(self, prompts: Sequence[Prompt], request: Request) -> Iterator[tuple[int, SampledRollout]]:
        """(index in what ``sample`` returns, rollout), each as soon as it is finished.

        Several streams may run at once, in threads of their own. A stream that is closed early takes its unfinished
        requests out of the engine.
        """
        tickets = self._add_all(prompts, request)
        waiting = set(tickets)
        try:
            while waiting:
                for ticket, rollout in self._next(waiting):
                    waiting.discard(ticket)
                    yield ticket - tickets.start, rollout
        finally:
            self._cancel(waiting)

    def submit(self, prompts: Sequence[Prompt], request: Request) -> range:
        """Begin to sample, and return at once: a ticket for each rollout, in the order of ``sample``."""
        with self._turn:
            tickets = self._add_all(prompts, request)
            self._submitted.update(tickets)
        return tickets

    def collect(self, seconds: float | None = None) -> list[tuple[int, SampledRollout]]:
        """(ticket, rollout) of what was submitted and is finished.

        Args:
            seconds: wait no longer than this for the first; None: as long as it takes.

        Returns:
            At least one, unless the time is up or nothing is in flight.
        """
        found = self._next(self._submitted, seconds) if self._submitted else []
        with self._turn:
            self._submitted.difference_update(ticket for ticket, _ in found)
        return found

    def cancel(self, tickets: Collection[int]) -> None:
        """Take submitted rollouts back; finished ones are dropped."""
        with self._turn:
            mine = self._submitted.intersection(tickets)
            self._submitted -= mine
            self._cancel(mine)

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """log p(tokens[i] | tokens[:i]) for i = 1 …, at temperature 1, with the weights in force."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, flat_logprobs=True)
        ticket = next(self._tickets)
        self._add(ticket, tokens, params, lambda output: list(output.prompt_logprobs.logprobs))
        ((_, found),) = self._next({ticket})
        return found

    # --- holding back -------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """No token is sampled until ``resume``; what is in flight stays, and those who wait for it wait on."""
        self._hold(_PAUSED)

    def resume(self) -> None:
        """Go on after ``pause``."""
        self._release(_PAUSED)

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Give the device's memory to others until ``wake`` or the next weight update; sequences in flight are kept.

        Keys and values are dropped, and the weights too unless they are moved to host memory. On a CPU nothing moves.
        """
        if _ASLEEP not in self._held:
            self._hold(_ASLEEP)
            self._dropped = not keep_weights
            self.engine.sleep(level=1 if keep_weights else 2, mode="keep")

    def wake(self) -> None:
        """Take the memory back. Weights that were not kept come with the next update, and nothing is sampled before."""
        if _ASLEEP in self._held:
            with self._turn:
                self.engine.wake_up()
                self._broken = "its weights were dropped while it slept" if self._dropped else self._broken
            self._release(_ASLEEP)

    def adopt(self, version: int) -> None:
        """The weights now are those after ``version`` optimizer steps."""
        self.weights_version = version
        self.engine.set_weight_version(str(version))

    def close(self) -> None:
        """Stop the engine and its workers; another one may be built in this process then."""
        vllm_setup.stop_engine(self.engine, self.workers)

    # --- weight updates: called by fastkd.weight_sync.Engines ---------------------------------------------------------

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every worker joins the trainer's group; returns when all have."""
        self.abandon_weight_update()  # of a trainer that died in the middle of it
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        """Hold all generation back, and prepare the workers."""
        self._hold(_UPDATING)
        if _ASLEEP in self._held:
            self.engine.wake_up(["weights"])
        self.engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive tensors and load them."""
        self.engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, version: int) -> None:
        """Go on, with these weights for every token from now on."""
        with self._turn:
            self.engine.collective_rpc("finish_weight_update")
            if _ASLEEP in self._held:
                self.engine.wake_up()
            # Keys and values of the old weights: of cached prefixes and of what is being generated.
            self.engine.reset_prefix_cache(reset_running_requests=True)
            self.adopt(version)
            self._broken = ""
        self._release(_UPDATING, _ASLEEP)

    def abandon_weight_update(self) -> None:
        """The update broke off. Until a whole one arrives, whoever waits for samples gets an error."""
        if _UPDATING in self._held:
            with self._turn:
                self._broken = "a weight update broke off"
                self.engine.collective_rpc("abandon_weight_update")
            self._release(_UPDATING)

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _hold(self, reason: str) -> None:
        self._held.add(reason)  # seen before the next step is taken
        with self._turn:
            pass  # the step under way is done

    def _release(self, *reasons: str) -> None:
        with self._turn:
            self._held.difference_update(reasons)
            self._turn.notify_all()

    def _add_all(self, prompts: Sequence[Prompt], request: Request) -> range:
        wanted = [(prompt, generation) for prompt in prompts for generation in range(request.generations)]
        with self._turn:
            tickets = [next(self._tickets) for _ in wanted]
            for ticket, (prompt, generation) in zip(tickets, wanted, strict=True):
                if prompt.masked or len(prompt.tokens) >= self.max_total_tokens:
                    self._finished[ticket] = SampledRollout(prompt, generation, (), False, self.weights_version)
                else:
                    params = self._params(prompt, generation, request)
                    self._add(ticket, prompt.tokens, params, _Reader(prompt, generation))
        return range(tickets[0], tickets[-1] + 1) if tickets else range(0)

    def _params(self, prompt: Prompt, generation: int, request: Request) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        sampler = request.sampler
        return SamplingParams(
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            top_k=sampler.top_k or 0,
            seed=sample_seed(request.run_seed, request.step, prompt.index, generation, request.purpose),
            max_tokens=min(self.max_new_tokens, self.max_total_tokens - len(prompt.tokens)),
            stop_token_ids=self.stop_token_ids,
            ignore_eos=True,  # only our own ids stop
            stop=self.stop_strings,
            include_stop_str_in_output=True,
            detokenize=bool(self.stop_strings),
            skip_special_tokens=False,  # a stop string may name one
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _add(self, ticket: int, tokens: Sequence[int], params: Any, read: Callable[[Any], Any]) -> None:
        with self._turn:
            if _ASLEEP in self._held:  # whoever asked would wait for ever
                raise RuntimeError("this engine is asleep: wake it, or give it weights, before it samples")
            name = f"fastkd-{next(self._names)}"
            self.engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)
            self._flying[name] = ticket, read

    def _next(self, waiting: Collection[int], seconds: float | None = None) -> list[tuple[int, Any]]:
        """Finished ones among ``waiting``, at least one in time. Steps until there is one, for other waiters too."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            with self._turn:
                found = [(ticket, self._finished.pop(ticket)) for ticket in waiting if ticket in self._finished]
                if found:
                    return found
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                if self._broken and _UPDATING not in self._held:
                    raise RuntimeError(f"{self._broken}: this engine needs a whole weight update before it samples")
                if self._held:
                    self._turn.wait(left)
                    continue
                for output in self.engine.step():
                    if output.finished and output.request_id in self._flying:
                        ticket, read = self._flying.pop(output.request_id)
                        self._finished[ticket] = read(output)
                        bars.advance()

    def _cancel(self, tickets: Collection[int]) -> None:
        with self._turn:
            for ticket in tickets:
                self._finished.pop(ticket, None)
            running = [name for name, (ticket, _) in self._flying.items() if ticket in tickets]
            for name in running:
                del self._flying[name]
            with suppress(Exception):  # closing must not hide why
                self.engine.abort_request(running)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes a rollout of vLLM's output."""

    prompt: Prompt
    generation: int

    def __call__(self, request_output: Any) -> SampledRollout:
        (output,) = request_output.outputs
        spans = tuple((int(span.version), span.start) for span in output.weight_versions)
        return SampledRollout(
            self.prompt,
            self.generation,
            tuple(output.token_ids),
            output.finish_reason == "stop",
            spans[0][0],
            tuple(output.logprobs.logprobs),
            spans,
        )
