"""Generation equals transformers' own, stops where it should, and does not depend on the batch."""

import pytest
import torch

from fastkd.batch import Prompt
from fastkd.rollout import Generation, Request
from fastkd.sampling import Sampler

EOS = 100


class Tokenizer:
    eos_token_id = EOS

    @staticmethod
    def decode(ids):
        return "".join(chr(ord("a") + i % 26) for i in ids)


def prompts(count=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [
        Prompt(index, "", None, "", tuple(torch.randint(0, 100, (length,), generator=generator).tolist()))
        for index, length in enumerate(lengths)
    ]


def generation(model, **changes):
    settings = dict(max_new_tokens=14, max_total_tokens=64, batch_size=16)
    return Generation(model, Tokenizer(), **{**settings, **changes})


def test_greedy_equals_transformers_generate(tiny_qwen3):
    model = tiny_qwen3().eval()
    rollouts = generation(model).sample(prompts(), Request(Sampler(0.0)))
    model.set_attn_implementation("sdpa")
    for rollout in rollouts:
        tokens = torch.tensor([rollout.prompt.tokens])
        expected = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, tokens.shape[1] :].tolist()
        assert list(rollout.response) == expected
        assert rollout.finished == (EOS in expected)


def test_samples_do_not_depend_on_batch_composition(tiny_qwen3):
    model, asked = tiny_qwen3(), prompts(24)
    request = Request(Sampler(1.0), generations=2, run_seed=5, step=3)
    together = generation(model, batch_size=64).sample(asked, request)
    apart = generation(model, batch_size=5).sample(list(reversed(asked)), request)
    apart = {(one.prompt.index, one.generation): one.response for one in apart}
    assert [one.response for one in together] == [apart[one.prompt.index, one.generation] for one in together]
    assert len({one.response for one in together}) > 40  # the two generations of a prompt differ


def test_another_step_gives_other_samples(tiny_qwen3):
    model = tiny_qwen3()
    first, second = (generation(model).sample(prompts(), Request(Sampler(1.0), step=step)) for step in (1, 2))
    assert all(a.response != b.response for a, b in zip(first, second, strict=True))


def test_a_stop_token_ends_and_stays_in_the_response(tiny_qwen3):
    model = tiny_qwen3()
    free = generation(model, stop_token_ids=[EOS]).sample(prompts(), Request(Sampler(0.0)))
    stop = free[3].response[4]
    stopped = generation(model, stop_token_ids=[stop, EOS]).sample(prompts(), Request(Sampler(0.0)))[3]
    first = free[3].response.index(stop)
    assert stopped.response == free[3].response[: first + 1]
    assert stopped.finished


def test_a_stop_string_ends_the_response(tiny_qwen3):
    model = tiny_qwen3()
    free = generation(model).sample(prompts(), Request(Sampler(0.0)))
    text = Tokenizer.decode(free[2].response)
    stopped = generation(model, stop_strings=[text[3:6]]).sample(prompts(), Request(Sampler(0.0)))[2]
    end = text.index(text[3:6]) + 3
    assert Tokenizer.decode(stopped.response) == text[:end]
    assert stopped.finished


def test_length_limits_cut_and_say_so(tiny_qwen3):
    model = tiny_qwen3()
    asked = prompts()
    for rollout in generation(model, max_total_tokens=12, stop_token_ids=[999]).sample(asked, Request(Sampler(1.0))):
        assert len(rollout.prompt.tokens) + len(rollout.response) <= 12
        assert not rollout.finished


def test_rows_beyond_a_padded_vocabulary_are_never_sampled(tiny_qwen3):
    model = tiny_qwen3()
    free = generation(model).sample(prompts(), Request(Sampler(1.0)))
    bounded = generation(model, valid_vocab=40, stop_token_ids=[3]).sample(prompts(), Request(Sampler(1.0)))
    assert max(max(one.response) for one in free) >= 40
    assert max(max(one.response) for one in bounded) < 40


def test_sliding_windows_and_full_attention_agree_with_transformers(tiny_qwen3):
    model = tiny_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=None).eval()
    assert "sliding_attention" in model.config.layer_types
    rollouts = generation(model).sample(prompts(), Request(Sampler(0.0)))
    model.set_attn_implementation("sdpa")
    for rollout in rollouts:
        tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.response]])
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        start = len(rollout.prompt.tokens) - 1
        assert logits[start:-1].argmax(-1).tolist() == list(rollout.response)


def test_masked_and_overlong_prompts_come_back_empty(tiny_qwen3):
    masked = Prompt(0, "", None, "", (1, 2), masked=True)
    overlong = Prompt(1, "", None, "", tuple(range(70)))
    fine = Prompt(2, "", None, "", (1, 2))
    rollouts = generation(tiny_qwen3()).sample([masked, overlong, fine], Request(Sampler(1.0)))
    assert [bool(one.response) for one in rollouts] == [False, False, True]
    assert [one.packed_length for one in rollouts[:2]] == [0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_training_mode_as_it_was(tiny_qwen3, training):
    model = tiny_qwen3().train(training)
    generation(model).sample(prompts(2), Request(Sampler(1.0)))
    assert model.training is training
