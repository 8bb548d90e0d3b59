"""Heads: distributions over exactly the children a node has, however they are computed."""

import pytest
import torch
from tiny import EIGHT_LEAVES, tiny_config, tiny_model

from tdlm import VocabTree
from tdlm.heads_tdlm import (
    HEADS,
    JointHead,
    NodeHead,
    SharedHead,
    VocabHead,
    gathered_child_scores,
    grouped_child_scores,
    leaf_masses,
    linear_cross_entropy,
)

TREES = {
    "eight leaves": lambda: VocabTree.from_nested(EIGHT_LEAVES),
    "binary": lambda: VocabTree.random(50, 2, seed=0),
    "wide": lambda: VocabTree.random(300, 24, seed=0),
    "flat": lambda: VocabTree.flat(20),
}
each_tree = pytest.mark.parametrize("tree_name", TREES)
CHILD_HEADS = sorted(set(HEADS) - {"joint"})
each_head = pytest.mark.parametrize("head_type", CHILD_HEADS)


def head_and_rows(tree: VocabTree, head_type: str, rows: int, dtype=torch.float32):
    torch.manual_seed(0)
    config = tiny_config(tree, head_type=head_type)
    head = HEADS[head_type](config).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(rows, config.hidden_size, dtype=dtype, requires_grad=True)
    embedding = torch.randn(config.num_nodes, config.hidden_size, dtype=dtype, requires_grad=True)
    node_ids = torch.randint(tree.vocab_size, tree.num_nodes, (rows,))
    return head, hidden, embedding, node_ids


def per_row_reference(head, hidden, node_id, tree, embedding) -> torch.Tensor:
    """Log-probabilities over the children of one node, written as the table of the design says."""
    children = [child for child in tree.child_ids[node_id - tree.vocab_size].tolist() if child != -1]
    if isinstance(head, SharedHead):
        scores = torch.stack([head.proj.weight[k] @ hidden + head.proj.bias[k] for k in range(len(children))])
    elif isinstance(head, VocabHead):
        logits = head.weight @ hidden + head.bias
        heights = tree.node_height(torch.tensor(children)).tolist()
        below = [logits[tree.ancestors[h] == child] for child, h in zip(children, heights, strict=True)]
        scores = torch.stack([leaves.logsumexp(0) for leaves in below])
    else:
        matrix = head.weight if isinstance(head, NodeHead) else embedding
        scores = torch.stack([matrix[child] @ hidden + head.bias[child] for child in children])
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
    d, N = tiny_config(tree).hidden_size, tree.num_nodes
    counts = {
        name: sum(p.numel() for p in HEADS[name](tiny_config(tree, head_type=name)).parameters())
        for name in CHILD_HEADS
    }
    assert counts == {"shared": 24 * d + 24, "tied": N, "node": N * d + N, "vocab": 300 * d + 300}
    tied = tiny_config(tree, head_type="vocab", tie_word_embeddings=True)
    assert sum(p.numel() for p in HEADS["vocab"](tied).parameters()) == 300
    joint = tiny_config(VocabTree.random(50, 4, seed=0), head_type="joint", neighborhood_size=3)
    assert sum(p.numel() for p in HEADS["joint"](joint).parameters()) == 4**3 * (3 * d + 1)


def test_a_vocabulary_head_keeps_the_digits_of_unlikely_branches():
    """Children 200 nats below the likeliest token still have their distribution: each node has its own maximum."""
    tree = VocabTree.from_nested([[0, 1], [2, 3]])
    logits = torch.tensor([[200.0, 199.0, 0.0, 1.0]])
    masses = leaf_masses(logits, tree)
    torch.testing.assert_close(masses[0, 5] - masses[0, 2:4], torch.tensor([1.3133, 0.3133]), atol=1e-4, rtol=0)
    gradient = torch.autograd.functional.jacobian(lambda x: leaf_masses(x, tree)[0, 5], logits)
    torch.testing.assert_close(gradient[0], torch.tensor([0, 0, 0.2689, 0.7311]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_head_on_a_flat_tree_is_the_subs_loss_of_mdlm(tied):
    """MDLM's own steps (SUBS): logits, mask token at -inf, log-softmax, gather the clean token, weight 1/t."""
    tree = VocabTree.flat(40)
    model = tiny_model(tree, head_type="vocab", tie_word_embeddings=tied, loss_weight_clip=None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 40, (6, 11), generator=generator)
    t = torch.rand(6, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    masked = torch.rand(6, 11, generator=generator) < t[:, None]
    z_t = torch.where(masked, tree.root_id, x)
    hidden = model.model(z_t).last_hidden_state
    matrix = model.model.embed_nodes.weight[:40] if tied else model.head.weight
    logits = torch.cat([hidden @ matrix.T + model.head.bias, torch.full((6, 11, 1), 7.0)], dim=-1)
    logits[..., 40] = -1e9  # the mask token, never a prediction
    log_p = logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    expected = -(log_p * masked / t[:, None]).sum() / x.numel()
    loss = model(input_ids=z_t, timesteps=t, labels=x).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_vocabulary_head_on_two_concurrent_levels_is_hdlm():
    """HDLM: -ln(1-t)/m(t) at the root for the cluster, 1/c(t) at a cluster for the token in it."""
    tree = VocabTree.random(30, 6, seed=0)
    model = tiny_model(tree, head_type="vocab", law="concurrent", loss_weight_clip=None).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 30, (5, 9), generator=generator)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    heights = model.law.sample_heights(t, torch.rand(5, 9, generator=generator))
    z_t = tree.ancestor(x, heights)
    p = (model.model(z_t).last_hidden_state @ model.head.weight.T + model.head.bias).softmax(-1)
    in_cluster = tree.ancestors[1] == tree.ancestors[1][x][..., None]  # (B, L, V)
    p_cluster = (p * in_cluster).sum(-1)
    p_token = p.gather(-1, x[..., None])[..., 0] / p_cluster
    c = -(1 - t) * torch.log(1 - t)
    m = t - c
    per_position = torch.where(heights == 2, -p_cluster.log() * (-torch.log(1 - t) / m)[:, None], 0.0)
    per_position += torch.where(heights == 1, -p_token.log() / c[:, None], 0.0)
    loss = model(input_ids=z_t, timesteps=t, labels=x).loss
    assert loss.item() == pytest.approx(per_position.mean().item(), rel=1e-9)


def test_the_fused_cross_entropy_of_torch_has_the_values_and_gradients_of_ours():
    """What runs on CUDA where torch has it, against the plain product that runs elsewhere."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch has no linear_cross_entropy")
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(60, 16), torch.randn(300, 16), torch.randn(300)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets, weights = torch.randint(0, 300, (60,)), torch.rand(60)
    plain = linear_cross_entropy(hidden, weight, bias, targets)
    fused = torch.nn.functional.linear_cross_entropy(
        *inputs[:2], targets, linear_bias=bias, reduction="none", options=torch.nn.LinearCrossEntropyOptions()
    )
    torch.testing.assert_close(plain, fused)
    gradients = [torch.autograd.grad((loss * weights).sum(), inputs) for loss in (plain, fused)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


# ---- neighborhoods ----


def joint_head(tree: VocabTree, size: int, **fields) -> JointHead:
    torch.manual_seed(0)
    head = JointHead(tiny_config(tree, head_type="joint", neighborhood_size=size, **fields))
    torch.nn.init.normal_(head.proj.weight)
    return head


@pytest.mark.parametrize("pooling", ["concat", "mean"])
def test_a_joint_head_gives_mass_to_feasible_combinations_only(pooling):
    """Positions at the greatest height choose among their children; what the others stand at fixes their slot."""
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    head = joint_head(tree, 2, neighborhood_pooling=pooling)
    # Both wait at height 2; one waits, one has chosen node 12, slot 1 below 15; token 6, slot 2 below 11, is context.
    z = torch.tensor([[13, 15], [13, 12], [8, 6], [3, 7]])
    log_probs = head(torch.randn(4, 2, 32), z, tree).view(4, 3, 3)
    torch.testing.assert_close(log_probs.exp().sum((1, 2)), torch.ones(4))
    feasible = [
        {(0, 0), (0, 1), (1, 0), (1, 1)},
        {(0, 1), (1, 1)},
        {(0, 2), (1, 2)},
        {(0, 0)},
    ]
    for row, wanted in zip(log_probs, feasible, strict=True):
        assert {tuple(pair) for pair in torch.nonzero(row > float("-inf")).tolist()} == wanted


def test_marginals_of_a_joint_head_are_its_sums():
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    head = joint_head(tree, 3)
    log_probs = head(torch.randn(5, 3, 32), torch.randint(13, 16, (5, 3)), tree)
    marginals = head.marginals(log_probs, tree).exp()
    joint = log_probs.exp().view(5, 3, 3, 3)
    torch.testing.assert_close(marginals[:, 0], joint.sum((2, 3)))
    torch.testing.assert_close(marginals[:, 1], joint.sum((1, 3)))
    torch.testing.assert_close(marginals[:, 2], joint.sum((1, 2)))


def test_synchronous_neighborhoods_jump_as_one():
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    model = tiny_model(tree, head_type="joint", neighborhood_size=3)
    x = torch.randint(0, 8, (200, 8))
    t = torch.full((200,), 0.5, dtype=torch.float64)
    heights = tree.node_height(model.noise(x, x, t, torch.rand(200, 8)))
    assert (heights[:, :3] == heights[:, :1]).all() and (heights[:, 3:6] == heights[:, 3:4]).all()
    assert (heights[:, 6] == heights[:, 7]).all() and not (heights[:, 0] == heights[:, 3]).all()


@pytest.mark.parametrize("jumps", ["synchronous", "independent"])
def test_padding_is_neither_seen_nor_scored_by_a_joint_head(jumps):
    """A padded neighborhood is as one that the sequence's end cuts short, whatever the padding token."""
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    model = tiny_model(tree, head_type="joint", neighborhood_size=3, neighborhood_jumps=jumps).double()
    x, t = torch.tensor([[1, 5, 3, 6]]), torch.tensor([0.9], dtype=torch.float64)
    z = tree.ancestor(x, torch.tensor([[3, 3, 3, 3]]))
    plain = model(input_ids=z, timesteps=t, labels=x).loss
    log_probs = model(input_ids=z).log_probs
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    for pad in (0, 7):
        padded, labels = (torch.nn.functional.pad(ids, (0, 1), value=value) for ids, value in ((z, pad), (x, -100)))
        output = model(input_ids=padded, timesteps=t, labels=labels, attention_mask=mask)
        torch.testing.assert_close(output.loss, plain)
        torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).log_probs[:, :4], log_probs)
    with pytest.raises(ValueError, match="padding on the left would shift the neighborhoods of 3 positions"):
        model(input_ids=x, labels=x, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="padding would shift the neighborhoods of 3 positions"):
        model.generate(x, attention_mask=torch.tensor([[1, 1, 1, 0]]), max_new_tokens=3)


def test_the_training_gradient_of_a_joint_head_is_finite():
    """Slots that the mask rules out at the neighborhood's level are never scored."""
    for jumps in ("synchronous", "independent"):
        model = tiny_model(
            VocabTree.from_nested(EIGHT_LEAVES), head_type="joint", neighborhood_size=2, neighborhood_jumps=jumps
        ).train()
        x = torch.randint(0, 8, (64, 9), generator=torch.Generator().manual_seed(0))
        labels = x.masked_fill(torch.arange(9) < 3, -100)
        model(input_ids=x, labels=labels, generator=torch.Generator().manual_seed(0)).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast_runs_the_products_in_half_precision():
    tree = VocabTree.random(300, 24, seed=0)
    head, hidden, embedding, node_ids = head_and_rows(tree, "tied", 50)
    exact = head(hidden, node_ids, tree, embedding)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(hidden, node_ids, tree, embedding)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    present = tree.child_mask(node_ids)
    torch.testing.assert_close(half[present], exact[present], atol=0.2, rtol=0.05)
