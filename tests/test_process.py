"""The law of heights, against its own definitions."""

import itertools
import math

import pytest
import torch
from scipy import stats

from tdlm import ConcurrentLaw, DirectLaw, SequentialLaw
from tdlm.process_tdlm import SCHEDULES, level_weights, low_discrepancy_times

TIMES = [0.0, 0.05, 0.2, 1 / 3, 0.4, 0.61, 2 / 3, 0.9, 1.0]
LAWS = {
    "flat": SequentialLaw(1, "linear"),
    "sequential-linear": SequentialLaw(3, "linear"),
    "sequential-cosine": SequentialLaw(3, "cosine"),
    "sequential-uneven": SequentialLaw(3, "cosine", thresholds=[0, 0.1, 0.7, 1]),
    "concurrent-flat": ConcurrentLaw(1, "linear"),
    "concurrent-linear": ConcurrentLaw(2, "linear"),
    "concurrent-cosine": ConcurrentLaw(4, "cosine"),
    "direct-linear": DirectLaw(3, "linear"),
    "direct-cosine": DirectLaw(2, "cosine"),
}
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
each_sequential_law = pytest.mark.parametrize("law", [LAWS[name] for name in LAWS if "seq" in name or name == "flat"])


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


@each_sequential_law
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_concurrent_heights_are_poisson_in_their_clock(schedule):
    """Each step back keeps Binomial(h, u_s / u_t) jumps, at the root of a Poisson number of at least H."""
    law, s, t = ConcurrentLaw(3, schedule), 0.35, 0.8
    u_s, u_t = law.clock(torch.tensor([s, t], dtype=torch.float64)).tolist()
    poisson = stats.poisson(u_t)
    assert law.height_probabilities(at(t)).tolist() == pytest.approx([*poisson.pmf(range(3)), poisson.sf(2)])
    posterior = law.posterior(s, t)
    for h in range(3):
        assert posterior[h, : h + 1].tolist() == pytest.approx(list(stats.binom(h, u_s / u_t).pmf(range(h + 1))))
    counts = range(3, 200)
    at_root = sum(poisson.pmf(n) * stats.binom(n, u_s / u_t).pmf(range(3)) for n in counts) / poisson.sf(2)
    assert posterior[3].tolist() == pytest.approx([*at_root, 1 - at_root.sum()])


def test_two_concurrent_levels_have_the_weights_of_hdlm():
    """-ln(1-t)/m(t) at the root and 1/c(t) at the clusters, with c = -(1-t) ln(1-t) and m = 1 - (1-t) - c."""
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    c = -(1 - t) * torch.log(1 - t)
    m = t - c
    weights = ConcurrentLaw(2).reverse_rates(t)
    torch.testing.assert_close(weights[:, 1], -torch.log(1 - t) / m, rtol=1e-9, atol=0)
    torch.testing.assert_close(weights[:, 0], 1 / c, rtol=1e-9, atol=0)


@pytest.mark.parametrize("height", [1, 2, 5, 17])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_concurrent_heights_are_sound_near_both_ends(height, schedule):
    """Against a long sum of the series near t = 0, where 1 - sum_{h<H} m_h has no digits left."""
    law = ConcurrentLaw(height, schedule)
    t = torch.tensor([0.0, 1e-15, 1e-9, 1e-3, 1 - 1e-9, 1 - 2**-53, 1.0], dtype=torch.float64)
    m, rates = law.height_probabilities(t), law.reverse_rates(t)
    assert torch.isfinite(m).all() and torch.isfinite(rates[:-1]).all() and (rates >= 0).all()
    torch.testing.assert_close(m.sum(-1), torch.ones_like(t))
    for i in (1, 2, 3):
        if float(m[i, -1]) > 1e-300:
            u = float(law.clock(t)[i])
            terms = [math.exp(k * math.log(u) - u - math.lgamma(k + 1)) for k in range(height, height + 30)]
            assert float(m[i, -1]) == pytest.approx(sum(terms), rel=1e-9)
            assert float(rates[i, -1]) == pytest.approx(float(law.jump_densities(t)[i, -1]) / sum(terms), rel=1e-9)


def test_a_flat_tree_has_one_law():
    """With one level the sequential, the concurrent and the direct law are the same process, MDLM's."""
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    for schedule in SCHEDULES:
        laws = [law(1, schedule) for law in (SequentialLaw, ConcurrentLaw, DirectLaw)]
        for law in laws[1:]:
            torch.testing.assert_close(law.height_probabilities(t), laws[0].height_probabilities(t))
            torch.testing.assert_close(law.kernel(0.3, 0.7), laws[0].kernel(0.3, 0.7))
            torch.testing.assert_close(law.reverse_rates(t[1:]), laws[0].reverse_rates(t[1:]))


def test_the_direct_law_jumps_a_whole_path():
    law = DirectLaw(3)
    assert law.jumps == [(0, 3)] and law.longest_jump == 3 and law.jumps_per_step == 1
    assert law.height_probabilities(at(0.3)).tolist() == pytest.approx([0.7, 0, 0, 0.3])
    assert law.reverse_rates(at(0.3)).tolist() == pytest.approx([1 / 0.3])
    assert law.levels_of_jump()[3].all() and not law.levels_of_jump()[:3].any()
    assert law.split_steps(10) == [10] and law.sampling_times([4]) == [1, 0.75, 0.5, 0.25, 0]


def test_level_weights_are_those_of_appendix_d():
    """Index from the bottom, mean 1; a positive lambda stresses the levels near the root."""
    linear = torch.tensor([1.0, 1.5, 2.0, 2.5], dtype=torch.float64)  # 1 + 1.5 l / 3
    torch.testing.assert_close(level_weights("linear", 1.5, 4), linear / linear.mean())
    exponential = torch.exp(torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(level_weights("exponential", -2.0, 3), exponential / exponential.mean())
    assert level_weights(None, 1.0, 3).tolist() == [1, 1, 1] == level_weights("linear", 9.0, 1).tolist() * 3


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
        (lambda: ConcurrentLaw(2).kernel(0.5, 0.2), "s=0.5, t=0.2"),
        (lambda: DirectLaw(2).kernel(0.5, 1.2), "s=0.5, t=1.2"),
        (lambda: DirectLaw(2, "quadratic"), "schedule='quadratic' is not one of"),
        (lambda: DirectLaw(2).sampling_times([2, 2]), r"steps_per_level=\[2, 2\]: only the sequential law"),
        (lambda: ConcurrentLaw(2).sampling_times([0]), r"num_denoising_steps to at least 1"),
        (lambda: SequentialLaw(2).sampling_times([4]), "at least 1 step for each of the tree's 2 levels"),
        (lambda: SequentialLaw(4).split_steps(3), "num_denoising_steps=3 is fewer than the tree's 4 levels"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
