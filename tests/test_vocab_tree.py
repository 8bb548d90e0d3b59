"""The vocabulary tree: constructors, look-ups, files, and the proof that a table is a tree."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EIGHT_LEAVES

from tdlm import VocabTree
from tdlm.vocab_tree_tdlm import balanced_nodes_per_height, hash_vocabulary, validate_shape


class FakeTokenizer:
    def __init__(self, tokens):
        self.vocabulary = {token: token_id for token_id, token in enumerate(tokens)}

    def get_vocab(self):
        return self.vocabulary


def test_look_ups_are_those_of_the_drawing(eight_leaf_tree):
    tree = eight_leaf_tree
    assert tree.nodes_per_height == [8, 5, 3, 1]
    assert tree.height == 3 and tree.num_nodes == 17 and tree.root_id == 16
    tokens = torch.arange(8)
    assert tree.ancestor(tokens, 1).tolist() == [8, 8, 9, 10, 11, 11, 11, 12]
    assert tree.ancestor(tokens, 2).tolist() == [13, 13, 13, 14, 15, 15, 15, 15]
    assert tree.ancestor(tokens, 3).tolist() == [16] * 8
    assert tree.child_slot(tokens, 0).tolist() == [0, 1, 0, 0, 0, 1, 2, 0]
    assert tree.child(torch.tensor([11, 16, 9]), torch.tensor([2, 1, 1])).tolist() == [6, 14, -1]
    assert tree.child_mask(torch.tensor([9, 11])).tolist() == [[True, False, False], [True, True, True]]
    assert tree.node_height(torch.arange(17)).tolist() == [0] * 8 + [1] * 5 + [2] * 3 + [3]


def test_descending_a_path_ends_at_its_token(eight_leaf_tree):
    for tree in (eight_leaf_tree, VocabTree.random(1000, 7, seed=3)):
        node = torch.full((tree.vocab_size,), tree.root_id)
        for slots in tree.paths().T:
            node = tree.child(node, slots)
        assert torch.equal(node, torch.arange(tree.vocab_size))


@pytest.mark.parametrize(("vocab_size", "branching_factor"), [(1, 1), (1, 4), (2, 2), (5, 2), (50, 7), (4096, 64)])
def test_random_trees_are_balanced_and_survive_their_paths(vocab_size, branching_factor):
    tree = VocabTree.random(vocab_size, branching_factor, seed=0)
    assert tree.nodes_per_height == balanced_nodes_per_height(vocab_size, branching_factor)
    assert int(tree.child_counts.max()) <= branching_factor
    again = VocabTree.from_paths(tree.paths(), branching_factor)
    assert torch.equal(again.paths(), tree.paths())


def test_random_trees_follow_their_seed():
    paths = [VocabTree.random(100, 5, seed).paths() for seed in (0, 0, 1)]
    assert torch.equal(paths[0], paths[1]) and not torch.equal(paths[0], paths[2])


def test_flat_tree_is_one_level():
    tree = VocabTree.flat(11)
    assert tree.height == 1 and tree.child_ids.tolist() == [list(range(11))]


def test_dicts_name_nodes_and_strings_are_tokens():
    tokenizer = FakeTokenizer(["a", "b", "1", "2"])
    tree = VocabTree.from_nested({"letters": ["a", "b"], "digits": {"odd": "1", "even": "2"}}, tokenizer=tokenizer)
    assert tree.child_ids.tolist()[:2] == [[0, 1], [2, 3]]
    tree.check_tokenizer(tokenizer)


def test_a_file_round_trips_and_is_always_the_same_bytes(eight_leaf_tree, tmp_path):
    eight_leaf_tree.save(tmp_path / "a.safetensors")
    loaded = VocabTree.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    for name, table in eight_leaf_tree.state_dict().items():
        assert torch.equal(table, loaded.state_dict()[name])


def edit(name: str, index: tuple, value: int):
    def apply(tree: VocabTree) -> None:
        getattr(tree, name)[index] = value

    return apply


# In the drawing (ids of conftest's tree): nodes 8..12 at height 1, 13..15 at height 2, root 16.
WRONG = {
    "cycle": (edit("child_ids", (0, 1), 13), "node 8 at height 1 has child 13, but nodes of height 0 are 0..7"),
    "id out of range": (edit("child_ids", (0, 1), 99), "node 8 at height 1 has child 99"),
    "duplicate leaf": (edit("child_ids", (0, 1), 0), "token 0 is the child of 2 nodes"),
    "missing token": (edit("child_ids", (4, 0), 6), "token 6 is the child of 2 nodes|token 7 is the child of 0 nodes"),
    "duplicate node": (edit("child_ids", (5, 1), 8), "node 8 is the child of 2 nodes"),
    "leaf row": (edit("ancestors", (0, 3), 4), "token 3 is stored as leaf 4"),
    "ancestor": (edit("ancestors", (1, 3), 8), "token 3 has ancestor 8 at height 1, but the parent .* is 10"),
    "slot disagrees": (edit("child_slots", (0, 5), 2), "token 5 has child slot 2 at level 0, but stands in slot 1"),
    "slot out of range": (edit("child_slots", (0, 5), 77), "token 5 has child slot 77"),
    "count too large": (edit("child_counts", (0,), 9), r"node 8 has child count 9, outside 1..branching_factor=3"),
    "count zero": (edit("child_counts", (0,), 0), "node 8 has child count 0"),
    "count disagrees": (edit("child_counts", (0,), 1), "node 8 counts 1 children, but its child slots hold 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tree_is_refused_with_what_is_wrong(name, tmp_path):
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    change, message = WRONG[name]
    change(tree)
    with pytest.raises(ValueError, match=message):
        tree.validate()
    tree.save(tmp_path / "tree.safetensors")
    with pytest.raises(ValueError, match=message):
        VocabTree.load(tmp_path / "tree.safetensors")


def test_files_that_are_no_trees_are_refused(eight_leaf_tree, tmp_path):
    path = tmp_path / "tree.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a vocabulary tree"):
        VocabTree.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no `vocab_tree` metadata"):
        VocabTree.load(path)
    eight_leaf_tree.save(path)
    tensors = load_file(path)
    del tensors["child_counts"]
    save_file(tensors, path, metadata={"vocab_tree": '{"nodes_per_height": [8, 5, 3, 1], "branching_factor": 3}'})
    with pytest.raises(ValueError, match="its header announces"):
        VocabTree.load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VocabTree.from_paths(torch.zeros(3, 2), 2), "integer array"),
        (
            lambda: VocabTree.from_paths(torch.tensor([[0], [5]]), 4),
            r"child slots 0..5, outside 0..branching_factor-1=3",
        ),
        (lambda: VocabTree.from_paths(torch.tensor([[0], [2]]), 4), r"child slots \[0, 2\]"),
        (
            lambda: VocabTree.from_paths(torch.tensor([[0, 1], [0, 0], [0, 1]]), 2),
            r"tokens 0 and 2 share the path \[0, 1\]",
        ),
        (lambda: VocabTree.from_nested([[0, 1], [1]]), "token 1 is twice in the tree"),
        (lambda: VocabTree.from_nested([[0, 1], [3]]), r"at fault: \[2\]"),
        (lambda: VocabTree.from_nested([[0, -1]]), r"at fault: \[-1\]"),
        (lambda: VocabTree.from_nested([[0], []]), r"node at path \[1\] is empty"),
        (lambda: VocabTree.from_nested([["a"]]), "pass the tokenizer"),
        (lambda: VocabTree.from_nested([[1.5]]), "a leaf must be a token id or a token"),
        (lambda: VocabTree.from_nested([["x"]], tokenizer=FakeTokenizer(["a"])), "'x' is not in the tokenizer's"),
        (lambda: VocabTree.from_nested([["a"]], tokenizer=FakeTokenizer(["a", "b"])), r"at fault: \[1\]"),
        (lambda: VocabTree.from_parents([torch.tensor([0, 0, 0])], 2), "3 children in all"),
        (
            lambda: VocabTree.from_parents([torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0])], 2),
            "3 children, more than",
        ),
        (lambda: VocabTree.random(5, 1, 0), "vocab_size=5 tokens cannot hang on a tree with branching_factor=1"),
        (lambda: validate_shape([4], 2), "from the leaves up and end with 1"),
        (lambda: validate_shape([9, 2, 1], 4), "2 nodes at height 1 cannot have 9 children"),
    ],
)
def test_impossible_trees_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tree_belongs_to_one_tokenizer(eight_leaf_tree):
    tokenizer = FakeTokenizer("abcdefgh")
    eight_leaf_tree.check_tokenizer(tokenizer)  # bound to none yet
    eight_leaf_tree.bind(tokenizer).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="built for another tokenizer"):
        eight_leaf_tree.check_tokenizer(FakeTokenizer("abcdefhg"))
    with pytest.raises(ValueError, match="token ids up to 8, the tree has vocab_size=8"):
        eight_leaf_tree.check_tokenizer(FakeTokenizer("abcdefghi"))


def test_the_vocabulary_hash_ignores_the_order_of_the_mapping():
    assert torch.equal(hash_vocabulary({"a": 0, "b": 1}), hash_vocabulary({"b": 1, "a": 0}))
    assert not torch.equal(hash_vocabulary({"a": 0, "b": 1}), hash_vocabulary({"a": 1, "b": 0}))
