"""vLLM samples under the contract of the transformers backend: seeds, stops, limits, greedy responses."""

from __future__ import annotations

import pytest

from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler

LONGEST = 128
GREEDY = Request(Sampler(temperature=0.0))


@pytest.fixture(scope="session")
def folder(build_folder):
    return build_folder("qwen3")


@pytest.fixture(scope="session")
def student(folder, build_recipe, tokenizer):
    import torch

    from fastkd.student import Student

    return Student(build_recipe(folder), torch.device("cpu"), len(tokenizer))


@pytest.fixture(scope="module")
def synced(engines, student):
    """The engine with the weights of the files."""
    import torch

    from fastkd.weight_sync import GLOO, Engines, Weights, WeightSender

    engine = engines()
    WeightSender(Weights(student.causal_lm, torch.float32), Engines.local([engine]), GLOO).send(0)
    return engine


@pytest.fixture
def engine(synced, engines):
    return engines()


@pytest.fixture(scope="module")
def reference(folder, tokenizer):
    """The transformers backend on the same files."""
    import torch

    from fastkd.models import load_causal_lm

    model = load_causal_lm("policy.model_name", str(folder), dtype=torch.float32, device=torch.device("cpu"))

    def build(**changes) -> Generation:
        return Generation(model, tokenizer, 40, LONGEST, 16, valid_vocab=len(tokenizer), **changes)

    return build


def facts(rollouts):
    return [(one.prompt.index, one.generation, one.response, one.finished, one.weights_version) for one in rollouts]


def test_greedy_is_what_transformers_generates(engine, folder, reference, prompts, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    ours = engine.sample(prompts, GREEDY)
    assert facts(ours) == facts(reference().sample(prompts, GREEDY))
    # And once without any code of ours.
    model = AutoModelForCausalLM.from_pretrained(folder)
    rule = GenerationConfig(
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)),
    )
    theirs = model.generate(torch.tensor([prompts[3].tokens]), generation_config=rule)[0, len(prompts[3].tokens) :]
    assert ours[3].response == tuple(theirs.tolist())


def test_a_seed_gives_the_same_sample_whatever_runs_beside_it(engine, prompts):
    request = Request(Sampler(), generations=3, run_seed=5, step=2)
    first, again = engine.sample(prompts, request), engine.sample(prompts, request)
    assert first == again
    assert facts(engine.sample(prompts[4:5], request)) == facts(first[12:15])
    responses = {one.response for one in first if one.response}
    assert len(responses) == 9 * 3, "seeds must differ between prompts and generations"
    other = engine.sample(prompts, Request(Sampler(), generations=3, run_seed=5, step=3))
    assert not responses & {one.response for one in other if one.response}


def test_log_probabilities_are_those_of_the_sampled_tokens(engine, student, prompts):
    from fastkd.sync_probe import trainer_logprobs

    for one in engine.sample(prompts[:4], Request(Sampler(temperature=1.5, top_p=0.9, top_k=50))):
        expected = trainer_logprobs(student, one.prompt.tokens + one.response)[len(one.prompt.tokens) - 1 :]
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_filters_and_temperature_reach_the_engine(engine, prompts):
    greedy = facts(engine.sample(prompts, GREEDY))
    assert facts(engine.sample(prompts, Request(Sampler(top_k=1)))) == greedy
    assert facts(engine.sample(prompts, Request(Sampler(top_p=1e-6)))) == greedy

    def mean_logprob(temperature: float) -> float:
        rollouts = engine.sample(prompts[:8], Request(Sampler(temperature), generations=2))
        found = [logprob for one in rollouts for logprob in one.logprobs]
        return sum(found) / len(found)

    cold, plain, hot = map(mean_logprob, (0.5, 1.0, 2.0))
    assert cold > plain + 0.5 and plain > hot + 0.5


def test_padded_rows_of_the_head_are_never_sampled(engine, prompts, tokenizer):
    # Nine rows of 425: some 30 tokens in 1,500 would be padding.
    rollouts = engine.sample(prompts[:8], Request(Sampler(temperature=2.0), generations=6))
    drawn = [token for one in rollouts for token in one.response]
    assert len(drawn) > 1000 and max(drawn) < len(tokenizer)


def test_stop_tokens(engine, reference, prompts):
    stops = [engine.sample(prompts, GREEDY)[0].response[5], engine.sample(prompts, GREEDY)[1].response[9]]
    engine.stop_token_ids = stops
    ours = engine.sample(prompts, GREEDY)
    assert facts(ours) == facts(reference(stop_token_ids=stops).sample(prompts, GREEDY))
    assert ours[0].finished and ours[0].response[-1] in stops, "the stop token belongs to the response"


def test_stop_strings(engine, reference, prompts, tokenizer):
    whole = engine.sample(prompts, GREEDY)
    stops = [tokenizer.decode(list(whole[0].response[4:6])), tokenizer.decode(list(whole[2].response[7:9]))]
    engine.stop_strings = stops
    ours = engine.sample(prompts, GREEDY)
    assert facts(ours) == facts(reference(stop_strings=stops).sample(prompts, GREEDY))
    assert ours[0].finished and len(ours[0].response) <= 6


def test_limits_and_prompts_that_are_not_sampled(engine, prompts):
    rollouts = engine.sample(prompts, GREEDY)
    long, full, masked = rollouts[8:]
    assert len(long.response) <= LONGEST - 110
    assert not long.finished or len(long.response) < LONGEST - 110
    assert full.response == masked.response == () and not full.finished and not masked.finished
    assert max(len(one.response) for one in rollouts[:8]) == 40


def test_finished_rollouts_come_out_one_by_one(engine, prompts):
    request = Request(Sampler(), generations=2)
    whole = engine.sample(prompts, request)
    streamed = list(engine.stream(prompts, request))
    assert [rollout for _, rollout in sorted(streamed, key=lambda pair: pair[0])] == whole
    lengths = [len(rollout.response) for _, rollout in streamed]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3, "a short response does not wait for a long one"


def test_a_closed_stream_leaves_nothing_behind(engine, prompts):
    request = Request(Sampler(), generations=2)
    engine.stop_token_ids = list(range(0, 400, 12))  # the first one ends long before the last
    stream = engine.stream(prompts[:8], request)
    next(stream)
    assert engine.engine.has_unfinished_requests()
    stream.close()
    assert not engine.engine.has_unfinished_requests() and not engine._finished
    assert len(engine.sample(prompts[:2], request)) == 4


def test_two_streams_at_once(engine, prompts):
    import threading

    requests = [Request(Sampler(), step=step) for step in (1, 2)]
    expected = [engine.sample(prompts, request) for request in requests]
    found = [None, None]

    def run(index):
        found[index] = engine.sample(prompts, requests[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [facts(one) for one in found] == [facts(one) for one in expected]
