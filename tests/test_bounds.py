"""Every NELBO the package prints is a bound: with the Bayes-optimal denoiser it equals the entropy of the source."""

import itertools

import numpy as np
import pytest
import torch
from tiny import NUM_POSITIONS, SIX_LEAVES, Source, WholePathLaw, bayes_model, chi_square_p

from tdlm import VocabTree

TREES = {
    "unbalanced": lambda: VocabTree.from_nested(SIX_LEAVES),
    "two_levels": lambda: VocabTree.from_nested([[0, 1, 2], [3, 4], [5]]),
    "flat": lambda: VocabTree.flat(6),
}
LAWS = [
    {"law": "sequential", "schedule": "linear"},
    {"law": "sequential", "schedule": "cosine"},
    {"law": "sequential", "schedule": "linear", "thresholds": "uneven"},
]


def with_thresholds(fields: dict, height: int) -> dict:
    if "thresholds" not in fields:
        return fields
    return {**fields, "thresholds": [(level / height) ** 2 for level in range(height + 1)]}


def exact_level_nelbo(model, source: Source, nodes: int = 32) -> torch.Tensor:
    """Integrate the package's own loss over t (Gauss-Legendre in each level), heights and sources -> (H,) nats."""
    law, tree = model.law, model.tree
    roots, gauss_weights = np.polynomial.legendre.leggauss(nodes)
    total = torch.zeros(tree.height, dtype=torch.float64)
    for start, end in itertools.pairwise(law.thresholds):
        for root, gauss_weight in zip(roots, gauss_weights, strict=True):
            t = torch.tensor((start + end) / 2 + root * (end - start) / 2, dtype=torch.float64)
            m = law.height_probabilities(t)
            for heights in itertools.product(torch.nonzero(m).flatten().tolist(), repeat=NUM_POSITIONS):
                z_t = tree.ancestor(source.x, torch.tensor(heights).expand_as(source.x))
                weight = gauss_weight * (end - start) / 2 * float(torch.prod(m[list(heights)]))
                total += weight * (source.p[:, None] * outcome_level_losses(model, source, z_t, t)).sum(0)
    return total


def outcome_level_losses(model, source: Source, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """(outcomes, H) loss in nats of every outcome by itself, all at this z_t and time."""
    hidden = model.model(z_t).last_hidden_state
    timesteps = t.expand(1)
    return torch.stack(
        [
            model.level_losses(hidden[i : i + 1], z_t[i : i + 1], timesteps, source.x[i : i + 1], num_items_in_batch=1)
            for i in range(len(source.x))
        ]
    )


@pytest.mark.parametrize("tree_name", TREES)
@pytest.mark.parametrize("fields", LAWS, ids=lambda fields: "-".join(fields.values()))
def test_nelbo_equals_entropy_for_the_bayes_denoiser(tree_name, fields):
    tree = TREES[tree_name]()
    source = Source(tree)
    model = bayes_model(source, **with_thresholds(fields, tree.height))
    level_nelbo = exact_level_nelbo(model, source, nodes=8 if fields["schedule"] == "linear" else 16)
    assert float(level_nelbo.sum()) == pytest.approx(source.entropy, rel=1e-6)
    np.testing.assert_allclose(level_nelbo.numpy(), source.level_entropies(), rtol=1e-6, atol=1e-9)


def test_a_worse_denoiser_is_above_the_entropy():
    source, other = Source(TREES["unbalanced"](), seed=0), Source(TREES["unbalanced"](), seed=1)
    model = bayes_model(source)
    model.model = bayes_model(other).model
    assert float(exact_level_nelbo(model, source, nodes=4).sum()) > source.entropy + 0.1


@pytest.mark.parametrize("fields", LAWS, ids=lambda fields: "-".join(fields.values()))
def test_monte_carlo_nelbo_is_within_three_sigma_of_the_entropy(fields):
    tree = TREES["unbalanced"]()
    source = Source(tree)
    model = bayes_model(source, **with_thresholds(fields, tree.height))
    generator = torch.Generator().manual_seed(0)
    x = source.sample(4000, generator)
    draws = torch.stack([model.nelbo(x, generator=generator).nelbo for _ in range(20)])
    # Control variate: the code length of the sampled outcomes themselves, whose mean is the entropy.
    difference = draws.mean(0) - source_code_length(source, x)
    sigma = float(difference.std() / len(x) ** 0.5)
    assert abs(float(difference.mean())) < 3 * sigma
    assert sigma < 0.02


def source_code_length(source: Source, x: torch.Tensor) -> torch.Tensor:
    return -source.p.log()[x[:, 0] * source.tree.vocab_size + x[:, 1]]


def test_training_loss_without_a_clip_estimates_the_same_bound():
    """The time-drawn estimator of training and the jump-drawn one of evaluation have one mean."""
    tree = TREES["two_levels"]()
    source = Source(tree)
    model = bayes_model(source, loss_weight_clip=None).train()
    generator = torch.Generator().manual_seed(0)
    losses = torch.stack(
        [
            model(input_ids=x, labels=x, generator=generator).loss * NUM_POSITIONS
            for x in (source.sample(2000, generator) for _ in range(200))
        ]
    )
    assert float(losses.mean()) == pytest.approx(source.entropy, abs=4 * float(losses.std()) / 200**0.5)


def test_context_is_conditioned_on_and_not_scored():
    """With the first token as context the bound is on the conditional entropy of the second."""
    tree = TREES["unbalanced"]()
    source = Source(tree)
    model = bayes_model(source)
    generator = torch.Generator().manual_seed(0)
    x = source.sample(20_000, generator)
    labels = x.clone()
    labels[:, 0] = -100
    output = model.nelbo(x, labels=labels, num_samples=6, generator=generator)
    marginal = torch.zeros(tree.vocab_size, dtype=torch.float64).index_add(0, source.x[:, 0], source.p)
    conditional = source_code_length(source, x) + marginal.log()[x[:, 0]]
    difference = output.nelbo - conditional
    assert output.num_tokens.tolist() == [1] * len(x)
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(x) ** 0.5


@pytest.mark.parametrize("tree_name", TREES)
def test_jumps_over_several_levels_are_bounded_and_sampled_by_the_same_code(tree_name):
    """A law of whole-path jumps, plugged in from outside: nothing but the law knows about it."""
    tree = TREES[tree_name]()
    source = Source(tree)
    model = bayes_model(source)
    model.law = WholePathLaw(tree.height)
    assert float(exact_level_nelbo(model, source, nodes=4).sum()) == pytest.approx(source.entropy, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    x = source.sample(4000, generator)
    difference = model.nelbo(x, num_samples=4, generator=generator).nelbo - source_code_length(source, x)
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(x) ** 0.5
    draws = model.generate(max_new_tokens=2, num_return_sequences=20_000, num_denoising_steps=300, generator=generator)
    assert chi_square_p(source, draws) > 0.01
