"""Trees built from embeddings: the caps, the sizes, the quality, the reproducibility."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tdlm.tokenization import build_tree, clustering, inertia, unconstrained_inertia
from tdlm.tokenization.clustering import choose_num_clusters, constrained_kmeans

SHAPES = [(2, 2), (3, 2), (7, 2), (300, 2), (8, 8), (9, 8), (500, 4), (1000, 10), (256, 16), (5000, 512), (5000, 71)]


def random_points(rng, num_tokens, dim):
    return rng.standard_normal((num_tokens, dim))


def clustered_points(rng, num_tokens, dim):
    """Five clusters, the largest with half of the tokens."""
    centres = 10 * rng.standard_normal((5, dim))
    return centres[rng.choice(5, num_tokens, p=[0.5, 0.3, 0.1, 0.05, 0.05])] + rng.standard_normal((num_tokens, dim))


def duplicated_points(rng, num_tokens, dim):
    """Two thirds of the tokens share one row, as tokens that a corpus never shows do."""
    points = rng.standard_normal((num_tokens, dim))
    points[rng.random(num_tokens) < 2 / 3] = 0
    return points


def constant_points(rng, num_tokens, dim):
    return np.full((num_tokens, dim), 0.3)


DATA = [random_points, clustered_points, duplicated_points, constant_points]


def assert_caps_hold(tree, num_tokens, branching_factor):
    tree.validate()  # one tree over all tokens, at most K children a node
    assert tree.vocab_size == num_tokens
    assert tree.branching_factor == branching_factor
    for height in range(tree.height + 1):
        assert tree.ancestors[height].bincount().max() <= branching_factor**height


@pytest.mark.parametrize("points", DATA)
@pytest.mark.parametrize(("num_tokens", "branching_factor"), SHAPES)
def test_caps_hold_and_no_token_is_lost(points, num_tokens, branching_factor):
    embeddings = points(np.random.default_rng(0), num_tokens, 6)
    tree = build_tree(embeddings, branching_factor, progress=False)
    assert_caps_hold(tree, num_tokens, branching_factor)
    assert branching_factor ** (tree.height - 1) < num_tokens <= branching_factor**tree.height


@pytest.mark.parametrize("points", DATA)
def test_caps_hold_without_any_slack(points):
    embeddings = points(np.random.default_rng(1), 4096, 6)
    tree = build_tree(embeddings, 16, progress=False)
    assert tree.nodes_per_height == [4096, 256, 16, 1]


def test_caps_hold_for_a_large_vocabulary_and_a_wide_tree():
    embeddings = random_points(np.random.default_rng(2), 50_257, 4)
    assert_caps_hold(build_tree(embeddings, 512, progress=False), 50_257, 512)


@pytest.mark.slow
def test_caps_hold_for_a_large_vocabulary_and_a_binary_tree():
    embeddings = random_points(np.random.default_rng(2), 50_257, 4)
    tree = build_tree(embeddings, 2, progress=False)
    assert_caps_hold(tree, 50_257, 2)
    assert tree.height == 16


@pytest.mark.slow
def test_caps_hold_at_the_size_of_gpt2():
    embeddings = np.random.default_rng(3).standard_normal((50_257, 768), dtype=np.float32)
    tree = build_tree(embeddings, 256, progress=False)
    assert_caps_hold(tree, 50_257, 256)
    assert tree.height == 2
    assert inertia(embeddings, tree) <= 1.03 * unconstrained_inertia(embeddings, tree.nodes_per_height[1])


def test_a_single_token_hangs_below_the_root():
    assert build_tree(np.ones((1, 3)), 4, progress=False).nodes_per_height == [1, 1]


def test_at_most_branching_factor_tokens_become_children_of_the_root():
    assert build_tree(np.eye(5), 5, progress=False).nodes_per_height == [5, 1]
    assert build_tree(np.eye(5), 5, height=3, progress=False).nodes_per_height == [5, 5, 5, 1]


def test_more_height_than_needed_gives_every_leaf_that_depth():
    tree = build_tree(random_points(np.random.default_rng(0), 60, 3), 8, height=4, progress=False)
    assert tree.height == 4
    assert_caps_hold(tree, 60, 8)


def test_separate_clusters_become_nodes():
    cluster = np.repeat(np.arange(8), 10)
    embeddings = 100 * np.eye(8)[cluster] + np.random.default_rng(0).standard_normal((80, 8))
    tree = build_tree(embeddings, 13, max_size_ratio=1.2, progress=False)
    assert tree.nodes_per_height == [80, 9, 1]  # one cluster is cut in two
    for node in range(80, 89):
        assert len(set(cluster[(tree.ancestors[1] == node).numpy()])) == 1


def test_tensors_and_arrays_of_any_float_type_are_embeddings():
    embeddings = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = build_tree(embeddings, 10, progress=False).paths()
    for same in (embeddings.float().numpy(), embeddings.double().numpy(), torch.nn.Parameter(embeddings)):
        assert torch.equal(build_tree(same, 10, progress=False).paths(), expected)


def test_the_input_is_not_written_to():
    embeddings = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    embeddings.flags.writeable = False
    build_tree(embeddings, 12, progress=False)


@pytest.mark.parametrize("points", [random_points, clustered_points])
@pytest.mark.parametrize("height", [2, 3])
def test_children_of_a_split_keep_the_size_ratios(points, height):
    embeddings = points(np.random.default_rng(0), 2000, 6)
    tree = build_tree(embeddings, 64, height=height, min_size_ratio=0.5, max_size_ratio=1.2, progress=False)
    mean = 2000 / tree.nodes_per_height[-2]
    sizes = (tree.ancestors[height - 1] - tree.height_offsets[height - 1]).bincount()
    assert sizes.min() >= int(0.5 * mean)
    assert sizes.max() <= int(1.2 * mean) + 1


def test_ratios_of_one_give_equal_sizes():
    embeddings = clustered_points(np.random.default_rng(0), 1000, 6)
    tree = build_tree(embeddings, 40, min_size_ratio=1, max_size_ratio=1, progress=False)
    sizes = (tree.ancestors[1] - 1000).bincount()
    assert sizes.max() - sizes.min() <= 1


def test_clusters_are_never_empty():
    points = np.zeros((30, 2), dtype=np.float32)
    labels = constrained_kmeans(points, 10, minimum=1, capacity=30, rng=np.random.RandomState(0))
    assert np.bincount(labels).min() >= 1
    assert np.array_equal(np.unique(labels), np.arange(10))


def test_the_auction_finds_the_least_total_cost():
    """Against the exact optimum: each centre repeated `capacity` times in a linear assignment."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.RandomState(0)
    costs = rng.random_sample((60, 5)).astype(np.float32) * [1, 2, 3, 4, 5]
    labels = clustering._assign_with_capacity(costs, 13, rng)
    assert np.bincount(labels).max() <= 13
    rows, columns = linear_sum_assignment(np.repeat(costs, 13, axis=1))
    optimum = costs[rows, columns // 13].sum()
    assert optimum <= costs[np.arange(60), labels].sum() <= 1.01 * optimum


def test_an_auction_cut_short_still_ends_below_the_caps(monkeypatch):
    monkeypatch.setattr(clustering, "AUCTION_ROUNDS", 1)
    embeddings = clustered_points(np.random.default_rng(0), 1000, 6)
    assert_caps_hold(build_tree(embeddings, 32, progress=False), 1000, 32)


def test_two_level_trees_have_about_root_v_clusters_and_slack():
    assert choose_num_clusters(50_257, 512, 2) == 225
    assert choose_num_clusters(50_257, 256, 2) == 246
    assert choose_num_clusters(65_536, 256, 2) == 256
    assert choose_num_clusters(4096, 16, 3) == 16


def test_caps_cost_little_inertia():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((300, 16))[rng.choice(300, 3000)] + 0.7 * rng.standard_normal((3000, 16))
    tree = build_tree(embeddings, 64, progress=False)
    assert inertia(embeddings, tree) <= 1.05 * unconstrained_inertia(embeddings, tree.nodes_per_height[1])


def test_inertia_is_the_spread_around_the_means_of_the_nodes():
    embeddings = np.array([[0.0], [2.0], [10.0], [14.0]])
    tree = build_tree(embeddings, 2, progress=False)
    assert inertia(embeddings, tree) == pytest.approx(1 + 1 + 4 + 4)
    assert unconstrained_inertia(embeddings, 2) == pytest.approx(10)
    assert unconstrained_inertia(embeddings, 4) == 0


def test_seeds_are_repeatable_and_differ():
    embeddings = random_points(np.random.default_rng(0), 500, 6)
    first, again, other = (build_tree(embeddings, 30, seed=seed, progress=False).paths() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


BUILD = """
import sys, numpy as np, torch
from tdlm.tokenization import build_tree
torch.set_num_threads(int(sys.argv[2]))
rng = np.random.default_rng(0)
embeddings = 3 * rng.standard_normal((40, 96))[rng.choice(40, 12_000)] + rng.standard_normal((12_000, 96))
build_tree(embeddings.astype(np.float32), 128, progress=False).save(sys.argv[1])
"""


def test_the_file_is_the_same_whatever_the_number_of_threads(tmp_path):
    for threads in ("1", "2"):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        command = [sys.executable, "-c", BUILD, str(tmp_path / threads), threads]
        subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_the_progress_bar_counts_tokens(capsys):
    build_tree(np.eye(20), 6)
    assert "20/20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"branching_factor": 3, "height": 2},
            r"branching_factor=3 and height=2 give 9 leaves, fewer than vocab_size=20",
        ),
        ({"branching_factor": 1}, r"branching_factor=1 cannot hold vocab_size=20 tokens: it must be at least 2"),
        ({"branching_factor": 32, "height": 0}, r"height=0 must be at least 1"),
        ({"branching_factor": 8, "min_size_ratio": 1.5}, r"min_size_ratio=1.5 must be in \[0, 1\]"),
        ({"branching_factor": 8, "max_size_ratio": 0.9}, r"max_size_ratio=0.9 must be at least 1"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_tree(np.eye(20), **arguments, progress=False)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.zeros(5), r"non-empty \(vocab_size, dim\) array, got shape \(5,\)"),
        (np.zeros((0, 5)), r"got shape \(0, 5\)"),
        (np.array([[0.0], [np.nan], [np.inf]]), r"embeddings of 2 tokens are not finite in float32, first token 1"),
        (np.array([[0.0], [1e300]]), r"embeddings of 1 tokens are not finite in float32, first token 1"),
        (np.array([[0.0], [-1e30]]), r"embeddings reach 1e\+30, over 1e\+15"),
    ],
)
def test_unusable_embeddings_are_refused(embeddings, message):
    with pytest.raises(ValueError, match=message):
        build_tree(embeddings, 2, progress=False)


def test_inertia_needs_one_row_a_token():
    tree = build_tree(np.eye(4), 2, progress=False)
    with pytest.raises(ValueError, match="embeddings have 5 rows, the tree has vocab_size=4"):
        inertia(np.eye(5), tree)


@pytest.mark.parametrize("num_clusters", [0, 6])
def test_there_are_at_most_as_many_clusters_as_tokens(num_clusters):
    with pytest.raises(ValueError, match=rf"num_clusters={num_clusters} must be 1 ... vocab_size=5"):
        unconstrained_inertia(np.eye(5), num_clusters)
