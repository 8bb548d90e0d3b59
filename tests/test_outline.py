"""Trees as text and as numbers."""

import json

import numpy as np
import pytest

from tdlm.tokenization import build_tree, format_statistics, train_tokenizer, tree_outline, tree_statistics
from tdlm.vocab_tree_tdlm import VocabTree


@pytest.fixture
def tree():
    """root 9 over node 7 (tokens 0, 1, 2) and node 8 (tokens 4, 3), then padded by nodes 5 and 6 at height 1."""
    return VocabTree.from_nested([[[0, 1, 2]], [[4, 3]]])


def test_the_outline_shows_every_node_and_token(tree):
    assert tree_outline(tree) == "\n".join(
        [
            "root 9 (height 3, 2 children, 5 tokens)",
            "  node 7 (height 2, 1 child, 3 tokens)",
            "    node 5 (height 1, 3 children, 3 tokens): 0 1 2",
            "  node 8 (height 2, 1 child, 2 tokens)",
            "    node 6 (height 1, 2 children, 2 tokens): 4 3",
        ]
    )


def test_the_outline_is_cut_by_depth_and_by_children(tree):
    assert tree_outline(tree, max_depth=0, max_children=4) == (
        "root 9 (height 3, 2 children, 5 tokens): 0 1 2 3 … 1 more"
    )
    assert tree_outline(tree, max_depth=1, max_children=1) == "\n".join(
        [
            "root 9 (height 3, 2 children, 5 tokens)",
            "  node 7 (height 2, 1 child, 3 tokens): 0 … 2 more",
            "  … 1 more",
        ]
    )


def test_the_outline_can_start_anywhere(tree):
    assert tree_outline(tree, node_id=6) == "node 6 (height 1, 2 children, 2 tokens): 4 3"
    assert tree_outline(tree, node_id=3) == "token 3: 3"


def test_tokens_are_shown_as_quoted_text_without_control_characters():
    tokenizer = train_tokenizer(["ab ab"] * 9, 259, progress=False)
    tree = VocabTree.flat(261)
    vocabulary = tokenizer.get_vocab()

    def shown(piece):
        return tree_outline(tree, tokenizer, node_id=vocabulary[piece])

    assert shown("ab").endswith(": 'ab'")
    assert shown("Ġ").endswith(": ' '")
    assert shown("Ċ").endswith(r": '\n'")
    assert shown("<|endoftext|>").endswith(": '<|endoftext|>'")
    assert shown("Ã").endswith(": 'Ã'")  # one byte of a longer character: its piece
    assert tree_outline(tree, tokenizer, node_id=260) == "token 260: 260"  # beyond the tokenizer's vocabulary
    assert tree_outline(tree, tokenizer).isprintable()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"node_id": 10}, r"node_id=10 is outside 0 ... num_nodes-1=9"),
        ({"node_id": -1}, r"node_id=-1 is outside"),
        ({"max_children": 0}, r"max_children=0 must be at least 1"),
        ({"max_depth": -1}, r"max_depth=-1 must be at least 0"),
    ],
)
def test_outlines_of_nothing_are_refused(tree, arguments, message):
    with pytest.raises(ValueError, match=message):
        tree_outline(tree, **arguments)


def test_statistics_count_nodes_children_and_tokens(tree):
    statistics = tree_statistics(tree)
    assert statistics["nodes_per_height"] == [5, 2, 2, 1]
    assert statistics["heights"][0] == {
        "height": 1,
        "nodes": 2,
        "children": {"min": 2, "mean": 2.5, "max": 3},
        "tokens": {"min": 2, "mean": 2.5, "max": 3},
        "fill": pytest.approx(2.5 / 3),
    }
    assert statistics["heights"][2]["tokens"] == {"min": 5, "mean": 5.0, "max": 5}
    assert "inertia" not in statistics
    assert json.loads(json.dumps(statistics)) == statistics


def test_statistics_compare_the_inertia_with_plain_kmeans():
    embeddings = np.random.default_rng(0).standard_normal((400, 5))
    statistics = tree_statistics(build_tree(embeddings, 24, progress=False), embeddings)
    assert statistics["inertia_ratio"] == statistics["inertia"] / statistics["unconstrained_inertia"]
    assert 0.9 < statistics["inertia_ratio"] < 1.1
    assert f"(ratio {statistics['inertia_ratio']:.4f})" in format_statistics(statistics)


def test_equal_embeddings_have_no_inertia_ratio(tree):
    statistics = tree_statistics(tree, np.ones((5, 2)))
    assert statistics["inertia_ratio"] is None
    assert format_statistics(statistics).endswith("inertia 0, without caps 0")


def test_the_table_has_a_line_for_each_height(tree):
    lines = format_statistics(tree_statistics(tree)).splitlines()
    assert lines[0] == "5 tokens, branching factor 3, height 3, 10 nodes"
    assert lines[1].split()[:2] == ["height", "nodes"]
    assert [line.split()[:2] for line in lines[2:]] == [["3", "1"], ["2", "2"], ["1", "2"]]
    assert lines[4].split() == ["1", "2", "2", "/", "2.5", "/", "3", "83.3%", "2", "/", "2.5", "/", "3"]
