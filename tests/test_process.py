"""The law of heights, against its own definitions."""

import itertools

import pytest
import torch

from tdlm import SequentialLaw
from tdlm.process_tdlm import SCHEDULES, low_discrepancy_times

TIMES = [0.0, 0.05, 0.2, 1 / 3, 0.4, 0.61, 2 / 3, 0.9, 1.0]
LAWS = [
    SequentialLaw(1, "linear"),
    SequentialLaw(3, "linear"),
    SequentialLaw(3, "cosine"),
    SequentialLaw(3, "cosine", thresholds=[0, 0.1, 0.7, 1]),
]
ids = [f"H{law.height}-{name}" for law, name in zip(LAWS, ["linear", "linear", "cosine", "uneven"], strict=True)]
each_law = pytest.mark.parametrize("law", LAWS, ids=ids)


def at(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_zero_and_match_their_derivative(name):
    schedule = SCHEDULES[name]
    tau = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(schedule.alpha(tau).sum(), tau)
    tau = tau.detach()
    alpha = schedule.alpha(tau)
    assert float(alpha[0]) == 1
    assert float(alpha[-1]) == pytest.approx(0, abs=1e-15)
    assert (alpha.diff() < 0).all()
    torch.testing.assert_close(derivative, schedule.d_alpha(tau))
    torch.testing.assert_close(schedule.absorbed(tau), 1 - alpha)
    torch.testing.assert_close(schedule.absorbed_inverse(schedule.absorbed(tau)), tau)


@each_law
def test_all_tokens_at_time_0_and_all_absorbed_at_time_1(law):
    m = law.height_probabilities(torch.tensor(TIMES, dtype=torch.float64))
    torch.testing.assert_close(m.sum(-1), torch.ones(len(TIMES), dtype=torch.float64))
    assert (m >= 0).all()
    assert float(m[0, 0]) == 1
    assert float(m[-1, -1]) == pytest.approx(1)


@each_law
def test_kernels_compose_and_carry_the_marginal(law):
    """q(u | s) = sum over t of q(u | t) q(t | s), within levels and across them (Prop. 3.2)."""
    for s, t, u in itertools.combinations_with_replacement(TIMES, 3):
        torch.testing.assert_close(law.kernel(s, u), law.kernel(s, t) @ law.kernel(t, u))
        torch.testing.assert_close(law.height_probabilities(at(s)) @ law.kernel(s, u), law.height_probabilities(at(u)))


@each_law
def test_reverse_rates_are_the_derivative_of_the_posterior(law):
    step = 1e-6
    for t in (0.05, 0.2, 0.4, 0.61, 0.9):
        posterior = law.posterior(t - step, t)
        for jump, (lower, upper) in enumerate(law.jumps):
            if law.height_probabilities(at(t))[upper] > 0 and posterior[upper, lower] > 0:
                rate = float(posterior[upper, lower]) / step
                assert rate == pytest.approx(float(law.reverse_rates(at(t))[jump]), rel=1e-4)


@each_law
def test_reverse_rates_are_those_of_the_kernels_turned_round(law):
    """r = b m_lower / m_upper, with b the derivative of the kernel."""
    step = 1e-6
    for t in (0.05, 0.2, 0.4, 0.61, 0.9):
        m = law.height_probabilities(at(t))
        for jump, (lower, upper) in enumerate(law.jumps):
            if m[lower] > 0 and m[upper] > 0:
                forward_rate = float(law.kernel(t, t + step)[lower, upper]) / step
                expected = forward_rate * float(m[lower] / m[upper])
                assert float(law.reverse_rates(at(t))[jump]) == pytest.approx(expected, rel=1e-4)


@each_law
def test_the_posterior_is_bayes_rule_by_enumeration(law):
    for s, t in itertools.combinations(TIMES, 2):
        m_s, kernel = law.height_probabilities(at(s)), law.kernel(s, t)
        for g in range(law.height + 1):
            evidence = sum(float(m_s[h] * kernel[h, g]) for h in range(law.height + 1))
            if evidence > 0:
                expected = [float(m_s[h] * kernel[h, g]) / evidence for h in range(law.height + 1)]
                assert law.posterior(s, t)[g].tolist() == pytest.approx(expected)


@each_law
def test_in_level_reverse_kernel_is_equation_3(law):
    """(alpha_l(s) - alpha_l(t)) / (1 - alpha_l(t)) move down, and all of them at a threshold."""
    for level, (start, end) in enumerate(itertools.pairwise(law.thresholds)):
        s, t = start + 0.3 * (end - start), start + 0.8 * (end - start)
        alpha_s, alpha_t = (float(law.height_probabilities(at(time))[level]) for time in (s, t))
        assert float(law.posterior(s, t)[level + 1, level]) == pytest.approx((alpha_s - alpha_t) / (1 - alpha_t))
        assert float(law.posterior(start, t)[level + 1, level]) == 1.0


@each_law
def test_sampled_heights_have_the_law(law):
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor([0.0, 0.17, 0.5, 0.83, 1.0], dtype=torch.float64)
    heights = law.sample_heights(t, torch.rand(len(t), 40_000, generator=generator))
    shares = torch.stack([(heights == h).double().mean(1) for h in range(law.height + 1)], dim=1)
    torch.testing.assert_close(shares, law.height_probabilities(t), atol=0.01, rtol=0)


@each_law
def test_jump_times_have_the_density_of_jumps(law):
    """P(a jump of kind j before t) = the mass that has left its lower height by t."""
    u = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000
    t, jump = law.sample_jump_times(u)
    for kind, (_, upper) in enumerate(law.jumps):
        times = t[jump == kind]
        assert len(times) == len(u) // len(law.jumps)
        for time in (0.1, 0.35, 0.5, 0.8):
            above = float(law.height_probabilities(at(time))[upper:].sum())
            assert float((times <= time).double().mean()) == pytest.approx(above, abs=1e-3)


def test_the_sequential_law_is_the_papers_formula():
    law = SequentialLaw(2, "linear", thresholds=[0, 0.25, 1])
    assert law.height_probabilities(at(0.1)).tolist() == pytest.approx([0.6, 0.4, 0.0])
    assert law.height_probabilities(at(0.7)).tolist() == pytest.approx([0.0, 0.4, 0.6])
    assert law.reverse_rates(at(0.1)).tolist() == pytest.approx([10.0, 0.0])  # 1 / (t - t_l)
    assert law.reverse_rates(at(0.7)).tolist() == pytest.approx([0.0, 1 / 0.45])


def test_steps_meet_every_threshold_and_end_at_zero():
    law = SequentialLaw(3, "cosine")
    times = law.sampling_times([2, 1, 3])
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True)
    assert set(law.thresholds) <= set(times)
    assert law.split_steps(10) == [4, 3, 3]


def test_low_discrepancy_times_cover_the_unit_interval_evenly():
    t = low_discrepancy_times(torch.tensor(0.83), torch.arange(64), total=64).sort().values
    torch.testing.assert_close(t.diff(), torch.full((63,), 1 / 64, dtype=torch.float64))
    assert float(t[0]) >= 0 and float(t[-1]) < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequentialLaw(0), "height=0 must be at least 1"),
        (lambda: SequentialLaw(2, "cubic"), r"schedule='cubic' is not one of \['cosine', 'linear'\]"),
        (lambda: SequentialLaw(2, thresholds=[0, 1]), "must be 3 increasing times from 0 to 1"),
        (lambda: SequentialLaw(2, thresholds=[0, 0.5, 0.9]), "must be 3 increasing times"),
        (lambda: SequentialLaw(2).kernel(0.5, 0.2), "s=0.5, t=0.2"),
        (lambda: SequentialLaw(2).sampling_times([4]), "at least 1 step for each of the tree's 2 levels"),
        (lambda: SequentialLaw(4).split_steps(3), "num_denoising_steps=3 is fewer than the tree's 4 levels"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
