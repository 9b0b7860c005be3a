"""A sync gives the engine the trainer's weights, and the probe says so when it does not."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler
from fastkd.student import Student
from fastkd.sync_probe import SyncMismatch, SyncProbe, probe_tokens, trainer_logprobs
from fastkd.weight_sync import FILE, GLOO, Engines, SyncError, Weights, WeightSender

CPU = torch.device("cpu")
LONGEST = 128
GREEDY = Request(Sampler(temperature=0.0))


class Case:
    """A trainer, an engine that began with the same weights, and the connection between them."""

    def __init__(self, engine, student, tokens, transport, folder):
        self.engine, self.student, self.tokens, self.transport, self.folder = engine, student, tokens, transport, folder
        self.version = 0
        self.start()

    def start(self):
        self.probe = SyncProbe()
        self.sender = self.connect(Weights(self.student.causal_lm, torch.float32))

    def connect(self, weights, **more):
        return WeightSender(weights, Engines.local([self.engine]), self.transport, folder=self.folder, **more)

    def change(self, size, seed=0):
        """Move all weights of the trainer, norms too."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.student.causal_lm.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        self.version += 1

    def check(self):
        return self.probe.run(
            lambda: trainer_logprobs(self.student, self.tokens),
            lambda: [self.engine.logprobs(self.tokens)],
            self.version,
        )


CASES = {"tied-gloo": ("qwen3", GLOO), "untied-gloo": ("llama", GLOO), "tied-file": ("qwen3", FILE)}


@pytest.fixture(params=CASES, scope="module")
def facts(request):
    return CASES[request.param]


@pytest.fixture
def case(facts, engines, build_folder, build_recipe, prompts, tokenizer, tmp_path):
    kind, transport = facts
    engine = engines(kind, transport)
    student = Student(build_recipe(build_folder(kind)), CPU, len(tokenizer))
    one = Case(engine, student, probe_tokens(prompts[4].tokens, len(tokenizer)), transport, tmp_path)
    one.sender.send(0)
    one.check()
    return one


def test_the_engine_follows_the_trainer(case):
    for seed in range(3):
        case.change(0.05, seed)
        cost = case.sender.send(case.version)
        found = case.check()
        assert found.error < 1e-4 and found.moved > 0.2, found
        assert cost.nbytes == 4 * sum(one.numel() for one in case.student.causal_lm.parameters())
        assert found.metrics()["sync/probe_seconds"] > 0
    assert not any(case.folder.iterdir()), "files of a finished sync are removed"


def test_samples_after_a_sync_are_the_new_models(case, prompts, tokenizer):
    case.engine.sample(prompts, GREEDY)  # leaves the long prompts' keys and values in the prefix cache
    case.change(0.1, 7)
    case.sender.send(case.version)
    ours = case.engine.sample(prompts, GREEDY)
    assert {one.weights_version for one in ours} == {case.version}
    assert all(one.versions == ((case.version, 0),) for one in ours if one.response)
    reference = Generation(case.student.causal_lm, tokenizer, 40, LONGEST, 16, valid_vocab=len(tokenizer))
    theirs = reference.sample(prompts, GREEDY)
    assert [one.response for one in ours] == [one.response for one in theirs]


def test_bfloat16_and_small_buckets(case):
    """Each tensor in a bucket of its own, cast on the way."""
    weights = Weights(case.student.causal_lm, torch.bfloat16)
    sender = case.connect(weights, bucket_bytes=1)
    with torch.no_grad():
        for parameter in case.student.causal_lm.parameters():
            parameter.copy_(parameter.bfloat16())
    case.change(0, 0)
    cost = sender.send(case.version)
    assert case.check().error < 1e-4
    assert cost.nbytes == 2 * sum(one.numel() for one in case.student.causal_lm.parameters())


class Corrupted(Weights):
    """Damages one tensor on the way."""

    wrong = "model.layers.1.mlp.down_proj.weight"

    def _stream(self):
        for name, tensor in super()._stream():
            yield name, tensor.roll(1, 0) if name == self.wrong else tensor


def test_a_tensor_corrupted_in_transit_is_caught(case, monkeypatch):
    case.change(0.01)
    if case.transport == FILE:
        real = case.engine.update_weights

        def damaged(update):
            from pathlib import Path

            from safetensors.torch import load_file, save_file

            (path,) = Path(update["path"]).glob("*.safetensors")
            state = load_file(path)
            state[Corrupted.wrong] = state[Corrupted.wrong].roll(1, 0).contiguous()
            save_file(state, path)
            real(update)

        monkeypatch.setattr(case.engine, "update_weights", damaged)
        case.sender.send(case.version)
    else:
        case.connect(Corrupted(case.student.causal_lm, torch.float32)).send(case.version)
    with pytest.raises(SyncMismatch, match=r"version 1 engine 0.*off by .* nat.*other weights"):
        case.check()


def test_an_engine_that_took_nothing_is_caught(case, monkeypatch):
    # The update arrives and is dropped; training has moved less than rounding could explain.
    case.change(2e-4)
    if case.transport == GLOO:
        monkeypatch.setattr("fastkd.vllm_extension.GlooReceiver.load", lambda self, named: list(named))
    else:
        monkeypatch.setattr("fastkd.vllm_extension.FileReceiver.load", lambda self, named: list(named))
    case.sender.send(case.version)
    with pytest.raises(SyncMismatch, match=r"version 1 engine 0.*same log-probabilities as before.*did not arrive"):
        case.check()
    monkeypatch.undo()
    case.sender.send(case.version)
    assert case.check().error < 1e-4


def test_a_broken_update_is_an_error_until_a_whole_one_arrives(case, prompts, monkeypatch):
    case.change(0.05)
    load, seen = {}, []
    from fastkd.vllm_extension import _CheckpointReceiver

    load = _CheckpointReceiver.load

    def breaks(self, named):
        for pair in named:
            seen.append(pair)
            if len(seen) == 8:  # in the middle of a layer
                raise OSError("the disk is gone")
            load(self, [pair])

    monkeypatch.setattr(_CheckpointReceiver, "load", breaks)
    with pytest.raises(SyncError, match="version 1 did not reach the engines: the disk is gone"):
        case.connect(Weights(case.student.causal_lm, torch.float32), timeout=timedelta(seconds=20)).send(case.version)
    with pytest.raises(RuntimeError, match="whole weight update before it samples"):
        case.engine.sample(prompts[:1], GREEDY)
    monkeypatch.undo()
    case.start()
    case.sender.send(case.version)
    assert case.check().error < 1e-4
    assert case.engine.sample(prompts[:1], GREEDY)[0].weights_version == case.version


def test_a_trainer_that_vanished_in_an_update_leaves_the_engine_usable(case, prompts):
    case.change(0.05)
    case.engine.start_weight_update()
    case.start()  # its successor
    with pytest.raises(RuntimeError, match="whole weight update before it samples"):
        case.engine.sample(prompts[:1], GREEDY)
    case.sender.send(case.version)
    assert case.check().error < 1e-4
    assert case.engine.sample(prompts[:1], GREEDY)[0].weights_version == case.version


def test_what_is_in_flight_goes_on_with_the_new_weights(case, prompts):
    request = Request(Sampler(), generations=2)
    old = case.engine.sample(prompts, request)
    stream = case.engine.stream(prompts, request)
    done = [next(stream)]
    while len(done[-1][1].response) < 3:  # until something was sampled by the old weights
        done.append(next(stream))
    before = len(done)
    case.change(0.05)
    case.sender.send(case.version)
    done += stream
    assert len(done) == len(old) and [rollout for _, rollout in done[:before]] == [old[i] for i, _ in done[:before]]
    mixed = [(index, one) for index, one in done[before:] if len(one.versions) == 2]
    assert len(mixed) > 5
    for index, one in mixed[:4]:
        (first, zero), (second, cut) = one.versions
        assert (first, zero, second, one.weights_version) == (0, 0, 1, 0)
        assert one.response[:cut] == old[index].response[:cut]
        # Keys and values are the new weights' as well: the rest is what the new model says of the whole sequence.
        start = len(one.prompt.tokens) - 1
        expected = trainer_logprobs(case.student, one.prompt.tokens + one.response)[start:]
        assert one.logprobs[cut:] == pytest.approx(expected[cut:], abs=1e-4)
        assert one.logprobs[:cut] != pytest.approx(expected[:cut], abs=1e-2)
