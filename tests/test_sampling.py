"""Gumbel-max draws from the right distribution, and a sample depends on its own seed alone."""

import math

import pytest
import torch

from fastkd.sampling import Sampler, gumbel_noise, sample_seed


def draws(sampler, logits, count):
    seeds = torch.tensor([sample_seed(0, 1, index, 0) for index in range(count)])
    return sampler(logits.expand(count, -1), seeds, position=3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5, 0.5])
    count = 40_000
    observed = torch.bincount(draws(Sampler(temperature), logits, count), minlength=7).double()
    expected = (logits.double() / temperature).softmax(-1) * count
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 22.5  # 99.9 % quantile at 6 degrees of freedom; the seeds are fixed


def test_noise_is_standard_gumbel_and_independent_of_neighbours():
    seeds = torch.tensor([sample_seed(7, 1, index, 0) for index in range(400)])
    noise = gumbel_noise(seeds, 5, 500).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.012)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    flat = noise - noise.mean()
    for shifted in (flat[:, 1:] * flat[:, :-1], flat[1:] * flat[:-1]):
        assert abs(shifted.mean().item()) / noise.var().item() < 0.01
    next_position = gumbel_noise(seeds, 6, 500).double()
    assert abs((flat * (next_position - next_position.mean())).mean().item()) < 0.02


def test_noise_is_finite_for_a_large_vocabulary():
    noise = gumbel_noise(torch.arange(16), 0, 151_936)
    assert torch.isfinite(noise).all()
    assert noise.max() > 12  # 2.4 million draws: a truncated upper tail would stop short of this


def test_zero_temperature_is_greedy():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(0.0)(logits, torch.arange(5), 0), logits.argmax(-1))


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]))
    assert set(draws(Sampler(1.0, top_k=2), logits, 500).tolist()) == {0, 1}
    assert set(draws(Sampler(1.0, top_p=0.8), logits, 800).tolist()) == {0, 1, 2}


def test_seeds_tell_everything_apart():
    cases = [
        (seed, step, prompt, generation, purpose)
        for seed in (0, 1)
        for step in (1, 11)
        for prompt in (1, 11, 111)
        for generation in (0, 1)
        for purpose in ("train", "grading")
    ]
    assert len({sample_seed(*case) for case in cases}) == len(cases)
    assert all(0 <= sample_seed(*case) < 2**63 for case in cases)
