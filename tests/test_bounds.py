"""Every NELBO the package prints is a bound: with the Bayes-optimal denoiser it equals the entropy of the source.

The package's own loss is integrated over t and enumerated over everything else, for every law, schedule, head, joint
mode and Prime variant. The two published losses that are no bounds stand at the end, as negative controls.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import NUM_POSITIONS, SIX_LEAVES, Source, bayes_model
from tiny_prime import bayes_prime_model, countable_source, exact_prime_nelbo

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
    {"law": "concurrent", "schedule": "linear"},
    {"law": "concurrent", "schedule": "cosine"},
    {"law": "direct", "schedule": "linear"},
    {"law": "direct", "schedule": "cosine"},
]
HEADS = [
    {"head_type": "shared"},
    {"head_type": "tied"},
    {"head_type": "node"},
    {"head_type": "vocab"},
    {"head_type": "vocab", "tie_word_embeddings": True},
    *(
        {"head_type": "joint", "neighborhood_jumps": jumps, "neighborhood_pooling": pooling}
        for jumps in ("synchronous", "independent")
        for pooling in ("concat", "mean")
    ),
]


def exists(law: dict, head: dict) -> bool:
    """The shared head cannot tell parents apart below a root; a neighborhood chooses at one level."""
    if head["head_type"] == "joint":
        return law["law"] == "sequential"
    return not (law["law"] == "direct" and head["head_type"] == "shared")


MODELS = [{**law, **head} for law in LAWS for head in HEADS if exists(law, head)]
# The bits of a token, or digits in other bases; 6 tokens are a power of neither 2, 3 nor 4.
PRIMES = [
    {"base": base, "head_type": head_type, "schedule": schedule}
    for base in (2, 3, 4, 6)
    for head_type in ("digit", "joint")
    for schedule in ("linear", "cosine")
]
# Every model of the package that prints a bound, and what its tokens are leaves of.
TABLE = [(fields, tree_name) for fields in MODELS for tree_name in TREES] + [(fields, "digits") for fields in PRIMES]


def name_of(fields: dict) -> str:
    return "-".join(map(str, fields.values()))


def with_thresholds(fields: dict, height: int) -> dict:
    if "thresholds" not in fields:
        return fields
    return {**fields, "thresholds": [(level / height) ** 2 for level in range(height + 1)]}


def quadrature(edges: list[float], nodes: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Times and weights of Gauss-Legendre on every interval, through a substitution that is flat at its ends.

    Concurrent heights have powers of ln(1 - t) there. The substitution is a polynomial, so polynomials stay exact.
    """
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    v, weights = (roots + 1) / 2, weights / 2
    tau, slope = v**4 * (35 - 84 * v + 70 * v**2 - 20 * v**3), 140 * (v * (1 - v)) ** 3
    pieces = [
        (start + (end - start) * tau, (end - start) * weights * slope) for start, end in itertools.pairwise(edges)
    ]
    t, w = (torch.from_numpy(np.concatenate(part)) for part in zip(*pieces, strict=True))
    return t, w


def exact_level_nelbo(model, source: Source) -> torch.Tensor:
    """Integrate the package's own loss over t, heights and outcomes -> (H,) nats."""
    law, tree = model.law, model.tree
    t_T, weight_T = quadrature(getattr(law, "thresholds", [0.0, 1.0]))
    m_TH = law.height_probabilities(t_T)
    total = torch.zeros(tree.height, dtype=torch.float64)
    for heights in itertools.product(range(tree.height + 1), repeat=NUM_POSITIONS):
        if model.jump_unit > 1:  # one height for both
            probability_T = m_TH[:, heights[0]] * (heights[0] == heights[1])
        else:
            probability_T = m_TH[:, list(heights)].prod(-1)
        total += _at_heights(model, source, heights, t_T, weight_T * probability_T)
    return total


def _at_heights(model, source: Source, heights: tuple, t_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """(H,) expectation of the loss where the positions stand at these heights, as one batch of times and outcomes."""
    if not (weight_T > 0).any():
        return torch.zeros(model.tree.height, dtype=torch.float64)
    z = model.tree.ancestor(source.x, torch.tensor(heights).expand_as(source.x))
    T, outcomes = len(t_T), len(source.x)
    hidden, z_t, x = (
        rows.repeat(T, *[1] * (rows.ndim - 1)) for rows in (model.model(z).last_hidden_state, z, source.x)
    )
    level, position, loss = model.weighted_nll(hidden, z_t, t_T.repeat_interleave(outcomes), x)
    probability = (weight_T[:, None] * source.p).flatten()[position // NUM_POSITIONS]
    # A state with probability 0 and an infinite loss is not there.
    terms = torch.where(probability > 0, probability * loss.detach(), 0.0)
    return torch.zeros(model.tree.height, dtype=torch.float64).index_add(0, level, terms)


@pytest.mark.parametrize(
    ("fields", "tree_name"), TABLE, ids=[f"{name_of(fields)}-{tree_name}" for fields, tree_name in TABLE]
)
def test_nelbo_equals_entropy_for_the_bayes_denoiser(fields, tree_name):
    if tree_name == "digits":
        source, x = countable_source()
        assert exact_prime_nelbo(bayes_prime_model(source, **fields), x) == pytest.approx(source.entropy, rel=1e-6)
        return
    tree = TREES[tree_name]()
    source = Source(tree)
    model = bayes_model(source, **with_thresholds(fields, tree.height))
    level_nelbo = exact_level_nelbo(model, source)
    assert float(level_nelbo.sum()) == pytest.approx(source.entropy, rel=1e-6)
    if fields["law"] == "sequential":
        np.testing.assert_allclose(level_nelbo.numpy(), source.level_entropies(), rtol=1e-6, atol=1e-9)


def test_a_worse_denoiser_is_above_the_entropy():
    source, other = Source(TREES["unbalanced"](), seed=0), Source(TREES["unbalanced"](), seed=1)
    model = bayes_model(source)
    model.model = bayes_model(other).model
    assert float(exact_level_nelbo(model, source).sum()) > source.entropy + 0.1


def test_a_worse_denoiser_of_digits_is_above_the_entropy():
    source, x = countable_source()
    model = bayes_prime_model(source)
    model.model.source = Source(source.tree, seed=1)
    assert exact_prime_nelbo(model, x, nodes=4) > source.entropy + 0.1


@pytest.mark.parametrize("fields", MODELS, ids=name_of)
def test_monte_carlo_nelbo_is_within_three_sigma_of_the_entropy(fields):
    tree = TREES["unbalanced"]()
    source = Source(tree)
    model = bayes_model(source, **with_thresholds(fields, tree.height))
    generator = torch.Generator().manual_seed(0)
    x = source.sample(2000, generator)
    draws = torch.stack([model.nelbo(x, generator=generator).nelbo for _ in range(10)])
    # Control variate: the code length of the sampled outcomes themselves, whose mean is the entropy.
    difference = draws.mean(0) - source_code_length(source, x)
    sigma = float(difference.std() / len(x) ** 0.5)
    assert abs(float(difference.mean())) < 3 * sigma
    assert sigma < 0.04


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
            model(input_ids=x, labels=x, generator=generator).loss.detach() * NUM_POSITIONS
            for x in (source.sample(2000, generator) for _ in range(200))
        ]
    )
    assert float(losses.mean()) == pytest.approx(source.entropy, abs=4 * float(losses.std()) / 200**0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"law": "concurrent"},
        {"law": "direct"},
        {"head_type": "joint", "neighborhood_jumps": "synchronous"},
        {"head_type": "joint", "neighborhood_jumps": "independent"},
    ],
    ids=name_of,
)
def test_context_is_conditioned_on_and_not_scored(fields):
    """With the first token as context the bound is on the conditional entropy of the second."""
    tree = TREES["unbalanced"]()
    source = Source(tree)
    model = bayes_model(source, **fields)
    generator = torch.Generator().manual_seed(0)
    x = source.sample(20_000, generator)
    labels = x.clone()
    labels[:, 0] = -100
    output = model.nelbo(x, labels=labels, num_samples=6, generator=generator)
    marginal = torch.zeros(tree.vocab_size, dtype=torch.float64).index_add(0, source.x[:, 0], source.p)
    conditional = source_code_length(source, x) + marginal.log()[x[:, 0]]
    difference = output.nelbo - conditional
    assert output.num_tokens.tolist() == [1] * len(x)
    # Direct jumps have no variance here: all that is left is rounding.
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(x) ** 0.5 + 1e-12


# ---- negative controls: published losses that are no bounds ----


@pytest.mark.parametrize("jumps", ["synchronous", "independent"])
def test_a_neighborhood_that_the_end_cuts_short_has_the_same_bound(jumps):
    """Two tokens in a neighborhood of three: the third place is a known one."""
    source = Source(TREES["unbalanced"]())
    model = bayes_model(source, head_type="joint", neighborhood_size=3, neighborhood_jumps=jumps)
    assert float(exact_level_nelbo(model, source).sum()) == pytest.approx(source.entropy, rel=1e-6)
    x = source.sample(4000, torch.Generator().manual_seed(0))
    difference = model.nelbo(x, num_samples=4, generator=torch.Generator().manual_seed(1)).nelbo
    difference = difference - source_code_length(source, x)
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(x) ** 0.5


@pytest.mark.parametrize("tree_name", TREES)
def test_the_joint_loss_of_independent_jumps_is_no_bound(tree_name):
    """App. C read literally: positions jump independently, yet the joint log-probability of all that have not jumped
    is charged with the usual weight. It undershoots the entropy, so the package does not offer it."""
    source = Source(TREES[tree_name]())
    model = bayes_model(source, head_type="joint", neighborhood_jumps="synchronous")
    assert float(exact_level_nelbo(model, source).sum()) == pytest.approx(source.entropy, rel=1e-6)
    model.jump_unit = 1  # the joint term of the one, the independent jumps of the other
    value = float(exact_level_nelbo(model, source).sum())
    assert value < source.entropy - 0.05
    if tree_name == "flat":  # half of H for both waiting, half of the conditional entropy for either alone
        p = source.p.view(6, 6)
        either = float(-(p * (p / p.sum(0)).log()).sum() - (p * (p / p.sum(1, keepdim=True)).log()).sum())
        assert value == pytest.approx((source.entropy + either) / 2, rel=1e-6)


def published_loss(p_V: torch.Tensor, digits_VN: torch.Tensor, nodes: int = 8) -> float:
    """What the paper minimised, with the best network, for one token: 1/t times -log p(all its masked digits | rest).

    Here only, as a negative control.
    """
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    total, num_digits = 0.0, digits_VN.shape[1]
    for mask in itertools.product([False, True], repeat=num_digits):
        agrees_VV = ((digits_VN[:, None] == digits_VN) | torch.tensor(mask)).all(-1)
        nats = float(-(p_V * (p_V / (agrees_VV * p_V).sum(1)).log()).sum())
        for root, weight in zip(roots, weights, strict=True):
            t = (root + 1) / 2
            total += weight / 2 / t * t ** sum(mask) * (1 - t) ** (num_digits - sum(mask)) * nats
    return total


@pytest.mark.parametrize("head_type", ["digit", "joint"])
def test_the_published_loss_is_no_bound_on_two_identical_bits_and_ours_is(head_type):
    """Two bits of one token that always agree carry ln 2 nats: the published loss says half of it, ours all."""
    twins = torch.tensor([[0, 0], [1, 1]])
    assert published_loss(torch.tensor([0.5, 0.5]), twins) == pytest.approx(math.log(2) / 2, rel=1e-6)
    # The package's loss of the same token, beside one that is known beforehand.
    source = Source(VocabTree.flat(4))
    model = bayes_prime_model(source, head_type=head_type)
    tokens = model.code.tokens(twins)
    happens = torch.isin(source.x[:, 0], tokens) & (source.x[:, 1] == tokens[0])
    source.p = happens.double() / 2
    assert exact_prime_nelbo(model, source.x[happens], nodes=4) == pytest.approx(math.log(2), rel=1e-6)
