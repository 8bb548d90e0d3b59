"""The chain of one order: an exact likelihood by enumeration, and minus the NELBO on average over orders."""

import itertools

import pytest
import torch
from test_bounds import LAWS, MODELS, PRIMES, exact_level_nelbo, name_of, with_thresholds
from tiny import SIX_LEAVES, Source, bayes_model, tiny_model
from tiny_prime import bayes_prime_model, countable_source, prime_model

from tdlm import VocabTree
from tdlm.trainer.scoring import order_log_likelihood

ORDERS = [[0, 1], [1, 0], [0, 0]]  # the last: both at once, each by itself


@pytest.mark.parametrize("fields", [*MODELS, *PRIMES], ids=name_of)
@pytest.mark.parametrize("order", ORDERS[:2], ids=str)
def test_every_order_codes_at_the_entropy_with_the_bayes_denoiser(fields, order):
    if "base" in fields:
        source, _ = countable_source()
        model = bayes_prime_model(source, **fields)
    else:
        source = Source(VocabTree.from_nested(SIX_LEAVES))
        model = bayes_model(source, **with_thresholds(fields, source.tree.height))
    log_p = order_log_likelihood(model, source.x, order=torch.tensor(order))
    assert float(-(source.p * log_p).sum()) == pytest.approx(source.entropy, rel=1e-6)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("fields", [{}, {"law": "concurrent"}, {"law": "direct"}, {"head_type": "node"}], ids=name_of)
def test_the_chain_is_a_distribution_whatever_the_network(fields, order):
    """Over all sequences the probabilities add up to 1, also where two positions are drawn together."""
    x = Source(tree := VocabTree.from_nested(SIX_LEAVES)).x
    log_p = order_log_likelihood(tiny_model(tree, **fields), x, order=torch.tensor(order))
    assert float(log_p.exp().sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("head_type", ["digit", "joint"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_chain_of_digits_is_a_distribution_whatever_the_network(order, head_type):
    x = Source(VocabTree.flat(6)).x
    log_p = order_log_likelihood(prime_model(6, base=2, head_type=head_type), x, order=torch.tensor(order))
    assert float(log_p.exp().sum()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("fields", [law for law in LAWS if law["law"] != "concurrent"], ids=name_of)
def test_the_nelbo_is_the_mean_over_orders(fields):
    """Levels of one law climb at independent times, so every order of positions is as likely, in any schedule."""
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    model = tiny_model(source.tree, **with_thresholds(fields, source.tree.height)).double()
    orders = torch.tensor(list(itertools.permutations(range(2))))
    chains = torch.stack([order_log_likelihood(model, source.x, order=order) for order in orders])
    assert float((chains[0] - chains[1]).abs().max()) > 0.01  # an order by itself says something else
    nelbo = float(exact_level_nelbo(model, source).sum())
    assert float(-(chains.mean(0) * source.p).sum()) == pytest.approx(nelbo, rel=1e-6)


def test_context_is_seen_and_padding_is_not():
    tree = VocabTree.from_nested(SIX_LEAVES)
    model = tiny_model(tree)
    x = torch.tensor([[0, 1, 2, 3]])
    labels = torch.tensor([[-100, -100, 2, 3]])
    chain = [order_log_likelihood(model, x[:, :n], labels=labels[:, :n]) for n in (3, 4)]
    # Two steps by hand: the third token first, with an absorbed fourth, then the fourth. Level by level.
    by_hand = 0.0
    for lower in (2, 1, 0):
        for position in (2, 3):
            heights = torch.tensor([[0, 0, lower + (position == 2), lower + 1]])
            log_probs = model(tree.ancestor(x, heights)).log_probs[0, position].detach()
            by_hand += float(log_probs[tree.child_slots[lower][x[0, position]]])
    assert float(chain[1]) == pytest.approx(by_hand, rel=1e-5)
    padded = torch.tensor([[0, 1, 2, 5], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    both = order_log_likelihood(model, padded, mask, labels.expand(2, -1))
    assert both.tolist() == pytest.approx([float(chain[0]), float(chain[1])], rel=1e-5)


def test_a_model_that_sees_the_time_has_no_chain():
    model = tiny_model(VocabTree.flat(6), time_conditioning=True)
    with pytest.raises(ValueError, match="a chain of positions has no time, and this model has time_conditioning=True"):
        order_log_likelihood(model, torch.tensor([[0, 1]]))


@pytest.mark.parametrize("order", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 2])])
def test_an_order_that_fits_no_sequence_is_refused(order):
    with pytest.raises(ValueError, match=r"order is torch\..* one for each position of input_ids, \(1, 2\)"):
        order_log_likelihood(tiny_model(VocabTree.flat(6)), torch.tensor([[0, 1]]), order=order)
