"""Heads: distributions over exactly the children a node has, however they are computed."""

import pytest
import torch
from tiny import EIGHT_LEAVES, tiny_config

from tdlm import VocabTree
from tdlm.heads_tdlm import HEADS, gathered_child_scores, grouped_child_scores

TREES = {
    "eight leaves": lambda: VocabTree.from_nested(EIGHT_LEAVES),
    "binary": lambda: VocabTree.random(50, 2, seed=0),
    "wide": lambda: VocabTree.random(300, 24, seed=0),
    "flat": lambda: VocabTree.flat(20),
}
each_tree = pytest.mark.parametrize("tree_name", TREES)
each_head = pytest.mark.parametrize("head_type", HEADS)


def head_and_rows(tree: VocabTree, head_type: str, rows: int, dtype=torch.float32):
    torch.manual_seed(0)
    config = tiny_config(tree, head_type=head_type)
    head = HEADS[head_type](config).to(dtype)
    torch.nn.init.normal_(head.bias if head_type == "tied" else head.proj.bias)
    hidden = torch.randn(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    embedding = torch.randn(config.num_nodes, config.hidden_size, dtype=dtype, requires_grad=True)
    node_ids = torch.randint(tree.vocab_size, tree.num_nodes, (rows,))
    return head, hidden, embedding, node_ids


def per_row_reference(head, hidden, node_id, tree, embedding) -> torch.Tensor:
    """Log-probabilities over the children of one node, written as the table of the design says."""
    children = [child for child in tree.child_ids[node_id - tree.vocab_size].tolist() if child != -1]
    if hasattr(head, "proj"):
        scores = torch.stack([head.proj.weight[k] @ hidden + head.proj.bias[k] for k in range(len(children))])
    else:
        scores = torch.stack([embedding[child] @ hidden + head.bias[child] for child in children])
    return scores - scores.logsumexp(0)


@each_tree
@each_head
@pytest.mark.parametrize("rows", [1, 3, 400])
def test_probabilities_sum_to_one_over_the_children_and_are_zero_elsewhere(tree_name, head_type, rows):
    tree = TREES[tree_name]()
    head, hidden, embedding, node_ids = head_and_rows(tree, head_type, rows)
    log_probs = head(hidden, node_ids, tree, embedding)
    assert log_probs.shape == (rows, tree.branching_factor)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(rows))
    assert torch.equal(log_probs == float("-inf"), ~tree.child_mask(node_ids))


@each_tree
@each_head
@pytest.mark.parametrize("rows", [2, 60])
def test_values_and_gradients_are_those_of_the_per_row_reference(tree_name, head_type, rows):
    tree = TREES[tree_name]()
    head, hidden, embedding, node_ids = head_and_rows(tree, head_type, rows, torch.float64)
    slots = torch.tensor([int(tree.child_counts[node - tree.vocab_size]) - 1 for node in node_ids])
    inputs = [hidden, *head.parameters()] + ([embedding] if head_type == "tied" else [])
    nll = head.nll(hidden, node_ids, slots, tree, embedding)
    gradients = torch.autograd.grad(nll.sum(), inputs)
    reference = torch.stack(
        [
            -per_row_reference(head, row, node, tree, embedding)[slot]
            for row, node, slot in zip(hidden, node_ids.tolist(), slots.tolist(), strict=True)
        ]
    )
    expected = torch.autograd.grad(reference.sum(), inputs, allow_unused=True)
    torch.testing.assert_close(nll, reference)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if wanted is None else wanted)


@each_tree
@pytest.mark.parametrize("hidden_size", [32, 30], ids=["aligned", "unaligned"])
def test_grouped_and_gathered_scores_agree(tree_name, hidden_size):
    tree = TREES[tree_name]()
    torch.manual_seed(0)
    hidden = torch.randn(100, hidden_size, requires_grad=True)
    embedding = torch.randn(tree.num_nodes, hidden_size, requires_grad=True)
    rows = torch.randint(0, tree.num_nodes - tree.vocab_size, (100,))
    children = tree.child_ids.clamp(min=0)
    scores = [f(hidden, rows, children, embedding) for f in (gathered_child_scores, grouped_child_scores)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(scores[0])
    for left, right in zip(
        *(torch.autograd.grad((s * weights).sum(), [hidden, embedding]) for s in scores), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-5)


@each_head
def test_an_only_child_is_certain_and_costs_no_gradient(head_type):
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    head, hidden, embedding, _ = head_and_rows(tree, head_type, 4)
    only = torch.full((4,), 9)  # the node above token 2 alone
    nll = head.nll(hidden, only, torch.zeros(4, dtype=torch.int64), tree, embedding)
    assert nll.tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    assert float(gradient.abs().max()) == 0


@each_head
def test_half_precision_rows_are_normalised_in_float32(head_type):
    tree = VocabTree.random(300, 24, seed=0)
    head, hidden, embedding, node_ids = head_and_rows(tree, head_type, 50, torch.bfloat16)
    log_probs = head(hidden, node_ids, tree, embedding)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(50))


def test_heads_have_the_parameters_of_the_design_table():
    tree = VocabTree.random(300, 24, seed=0)
    config = tiny_config(tree)
    shared, tied = (sum(p.numel() for p in HEADS[name](config).parameters()) for name in ("shared", "tied"))
    assert shared == 24 * config.hidden_size + 24
    assert tied == tree.num_nodes


def test_autocast_runs_the_products_in_half_precision():
    tree = VocabTree.random(300, 24, seed=0)
    head, hidden, embedding, node_ids = head_and_rows(tree, "tied", 50)
    exact = head(hidden, node_ids, tree, embedding)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(hidden, node_ids, tree, embedding)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    present = tree.child_mask(node_ids)
    torch.testing.assert_close(half[present], exact[present], atol=0.2, rtol=0.05)
