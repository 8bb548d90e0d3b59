"""Generation under constraints: what is banned never comes, what is forced always does, the rest keeps its odds."""

import itertools

import pytest
import torch
from tiny import tiny_model
from transformers import LogitsProcessorList

from tdlm import VocabTree

LAWS = ("sequential", "concurrent", "direct")
HEADS = ("shared", "tied", "node", "vocab")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaf_log_probs(model, hidden_D: torch.Tensor) -> torch.Tensor:
    """(V,) log-probabilities of the tokens when a whole path is drawn from one hidden state, step by step."""
    tree, embedding = model.tree, model.model.embed_nodes.weight
    totals = torch.zeros(tree.vocab_size)
    for token, level in itertools.product(range(tree.vocab_size), range(tree.height)):
        parent = tree.ancestor(torch.tensor([token]), level + 1)
        log_probs = model.head(hidden_D[None], parent, tree, embedding)[0]
        totals[token] += log_probs[tree.child_slot(torch.tensor([token]), level)].item()
    return totals


@pytest.mark.parametrize("head_type", ["tied", "node", "vocab"])
@pytest.mark.parametrize("tree_name", ["eight", "wide", "flat"])
def test_the_direct_law_gives_its_own_distribution_conditioned_on_the_set(eight_leaf_tree, head_type, tree_name):
    """One masked position: the odds among the allowed tokens are those of the free model, from the root down."""
    trees = {"eight": eight_leaf_tree, "wide": VocabTree.random(30, 6, seed=1), "flat": VocabTree.flat(12)}
    tree = trees[tree_name]
    if (tree_name == "flat") != (head_type == "vocab") and tree_name == "flat":
        pytest.skip("a flat tree has the vocab head")
    model = tiny_model(tree, law="direct", head_type=head_type)
    model.head.bias.data.normal_(std=2.0)
    allowed = [1, 2, 5, 6, tree.vocab_size - 1]
    hidden = model.model(torch.tensor([[tree.root_id]])).last_hidden_state[0, 0]
    with torch.no_grad():
        expected = leaf_log_probs(model, hidden)[allowed].softmax(0)
    draws = model.generate(
        max_new_tokens=1, num_return_sequences=20_000, allowed_tokens=allowed, num_denoising_steps=1, generator=seeded()
    )
    observed = torch.bincount(draws[:, 0], minlength=tree.vocab_size)
    assert int(observed.sum()) == int(observed[allowed].sum()) == 20_000
    torch.testing.assert_close(observed[allowed] / 20_000, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize(("law", "head_type"), [*itertools.product(LAWS, HEADS)])
def test_banned_tokens_never_come_and_forced_sets_always_hold(law, head_type):
    if (law, head_type) == ("direct", "shared"):
        pytest.skip("the direct law needs a head that depends on the node")
    tree = VocabTree.random(60, 4, seed=0)  # three levels
    model = tiny_model(tree, law=law, head_type=head_type)
    generator = torch.Generator().manual_seed(0)
    for case in range(6):
        banned = torch.randperm(60, generator=generator)[: [1, 5, 59][case % 3]].tolist()
        forced = [torch.randperm(60, generator=generator)[: 1 + case].tolist() for _ in range(4)]
        output = model.generate(
            max_new_tokens=6,
            num_return_sequences=20,
            allowed_tokens=[forced[0], None, forced[1], None, forced[2], forced[3]],
            num_denoising_steps=4,
            generator=generator,
            return_dict_in_generate=True,
            output_trajectory=True,
        )
        for position, tokens in zip((0, 2, 4, 5), forced, strict=True):
            assert set(output.sequences[:, position].tolist()) <= set(tokens)
            nodes_above = {int(tree.ancestor(torch.tensor(token), h)) for token in tokens for h in range(4)}
            assert {int(canvas[row, position]) for canvas in output.trajectory for row in range(20)} <= nodes_above
        draws = model.generate(
            max_new_tokens=8,
            num_return_sequences=20,
            suppress_tokens=banned,
            num_denoising_steps=4,
            temperature=3.0,
            generator=generator,
        )
        assert not set(draws.flatten().tolist()) & set(banned)


def test_without_the_constraint_the_banned_tokens_do_come():
    """The test above can fail."""
    model = tiny_model(VocabTree.random(60, 4, seed=0))
    draws = model.generate(max_new_tokens=8, num_return_sequences=50, num_denoising_steps=4, generator=seeded())
    assert len(draws.unique()) > 40


def test_greedy_choices_obey_too():
    model = tiny_model(VocabTree.random(60, 4, seed=0), head_type="tied")
    free = model.generate(max_new_tokens=8, do_sample=False, num_denoising_steps=3)
    banned = free.unique().tolist()
    draws = model.generate(max_new_tokens=8, do_sample=False, num_denoising_steps=3, suppress_tokens=banned)
    assert not set(draws.unique().tolist()) & set(banned)


def test_constraints_hold_block_after_block_and_in_blanks():
    model = tiny_model(VocabTree.random(60, 4, seed=0))
    allowed = [[token] for token in range(40)]
    draws = model.generate(max_new_tokens=40, allowed_tokens=allowed, generator=seeded())  # the context is 16
    assert draws.tolist() == [list(range(40))]
    ids, holes = torch.arange(10)[None], torch.tensor([[0, 1] * 5]).bool()
    filled = model.generate(ids, infill_mask=holes, allowed_tokens=[50, 51], generator=seeded())
    assert torch.equal(filled[~holes], ids[~holes]) and set(filled[holes].tolist()) <= {50, 51}


def test_logits_processors_see_nodes_and_change_the_odds_of_their_children(eight_leaf_tree):
    seen = []

    def only_the_first_child(node_ids, scores):
        seen.append((node_ids, scores))
        return scores.masked_fill(torch.arange(scores.shape[1]) > 0, float("-inf"))

    model = tiny_model(eight_leaf_tree)
    draws = model.generate(
        max_new_tokens=5, num_denoising_steps=3, logits_processor=LogitsProcessorList([only_the_first_child])
    )
    first = eight_leaf_tree.first_leaf(torch.tensor(eight_leaf_tree.root_id))
    assert (draws == first).all()
    for node_ids, scores in seen:
        assert node_ids.shape == (len(scores), 1)
        assert torch.equal(scores > float("-inf"), eight_leaf_tree.child_mask(node_ids[:, 0]))


@pytest.mark.parametrize("arguments", [{"suppress_tokens": [1]}, {"allowed_tokens": [1]}])
def test_joint_heads_refuse_constraints(eight_leaf_tree, arguments):
    model = tiny_model(eight_leaf_tree, head_type="joint")
    with pytest.raises(ValueError, match="need a head that scores children one by one, not head_type='joint'"):
        model.generate(max_new_tokens=4, **arguments)
