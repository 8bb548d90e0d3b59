"""Vocabulary trees from token embeddings: recursive K-means whose node sizes obey hard caps.

A node at height h can hold at most K**h tokens, so plain K-means, whose clusters are as large as they like, gives no
tree. Each split here is a constrained K-means (Bradley, Bennett and Demiriz, 2000): unconstrained Lloyd iterations on
a subsample find the centres and clusters far over their cap are split; then every round gives each token a centre, at
least total cost under the caps, and moves each centre to the mean of its tokens. The assignment is an auction
(Bertsekas, 1988): an overfull cluster raises its price until only as many tokens as it can hold still prefer it.

Shape legend: V tokens, d embedding size, K branching factor, H height, n tokens of a node, k clusters of its split.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy import sparse
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from tdlm.vocab_tree_tdlm import VocabTree

TARGET_FILL = 0.8  # of the capacity of a split; the rest is slack that keeps the caps from distorting the clusters
SEEDING_ROWS = 16  # a cluster, for k-means++
SAMPLE_ROWS = 128  # a cluster, for the unconstrained iterations
LLOYD_ITERATIONS = 20
SPLIT_ITERATIONS = 5
CONSTRAINED_ROUNDS = 6
AUCTION_ROUNDS = 1000
PRICE_STEP = 5e-3  # of the gap between a token's mean and least cost: finer steps take longer and gain nothing
PRICE_GROWTH = 1.05  # a round
CHUNK_ROWS = 4096  # rows of one matrix product; fixed, so the result does not depend on the number of threads
LARGEST_VALUE = 1e15  # its square times a million dimensions still fits float32


def build_tree(
    embeddings: np.ndarray | torch.Tensor,
    branching_factor: int,
    *,
    height: int | None = None,
    min_size_ratio: float = 0.0,
    max_size_ratio: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> VocabTree:
    """Cluster token embeddings top-down: (V, d) -> `VocabTree` with tokens of like meaning under one node.

    Hard caps hold for any data: no node has over K children, no node at height h over K**h tokens. A node with at most
    K tokens gives each its own child, and shorter branches are padded with only children. The same arguments give the
    same tree, byte for byte, whatever the number of threads.

    Args:
        embeddings: (V, d) finite values, row i for token i.
        branching_factor: K, the largest number of children of a node.
        height: H, the depth of every leaf. Default: the least H with K**H >= V.
        min_size_ratio: in [0, 1]. A child gets at least this share of its parent's mean child size (rounded down).
        max_size_ratio: at least 1. A child gets at most this multiple of that mean (rounded up); the cap overrides it.
        seed: of the sampling of initial centres.
        progress: show a progress bar, in tokens.

    Raises:
        ValueError: the embeddings are not a finite (V, d) array, K**H < V, or a ratio is out of range.

    Source: arXiv 2604.03537 (recursive K-means with node-size ratios); the caps are this package's.
    """
    points = _as_points(embeddings)
    height = _resolve_height(len(points), branching_factor, height)
    _check_ratios(min_size_ratio, max_size_ratio)
    rng = np.random.RandomState(seed)
    paths = np.zeros((len(points), height), dtype=np.int64)
    stack = [(np.arange(len(points)), height)]
    with threadpool_limits(limits=1), tqdm(total=len(points), disable=not progress, unit="token") as bar:
        while stack:
            tokens, node_height = stack.pop()
            depth = height - node_height
            if len(tokens) <= branching_factor:
                paths[tokens, depth] = np.arange(len(tokens))
                bar.update(len(tokens))
                continue
            num_clusters = choose_num_clusters(len(tokens), branching_factor, node_height)
            mean_size = len(tokens) / num_clusters
            capacity = branching_factor ** (node_height - 1)
            if max_size_ratio is not None:
                capacity = min(capacity, math.ceil(max_size_ratio * mean_size))
            minimum = max(1, math.floor(min_size_ratio * mean_size))
            labels = constrained_kmeans(points[tokens], num_clusters, minimum, capacity, rng)
            paths[tokens, depth] = labels
            stack.extend((tokens[labels == label], node_height - 1) for label in range(num_clusters))
    return VocabTree.from_paths(torch.from_numpy(paths), branching_factor)


def choose_num_clusters(num_tokens: int, branching_factor: int, height: int) -> int:
    """Children of a node at `height` with more than K tokens: the h-th root of the tokens, or more if space is short.

    The root gives every level below equally many choices: a two-level tree has about sqrt(V) clusters of sqrt(V)
    tokens. The second term keeps `TARGET_FILL`: with clusters filled to the brim the caps, and not the embeddings,
    would decide where tokens go. GPT-2's 50,257 tokens with K = 256 get 246 clusters (224 would be 88% full).
    """
    root = math.ceil(num_tokens ** (1 / height) - 1e-9)
    with_slack = math.ceil(num_tokens / (TARGET_FILL * branching_factor ** (height - 1)))
    return min(branching_factor, max(root, with_slack, 2))


def constrained_kmeans(
    points: np.ndarray, num_clusters: int, minimum: int, capacity: int, rng: np.random.RandomState
) -> np.ndarray:
    """(n, d) points -> (n,) labels in 0 ... k-1, each used `minimum` to `capacity` times, ordered by first token."""
    assert num_clusters * minimum <= len(points) <= num_clusters * capacity
    sample = points[_subsample(len(points), SAMPLE_ROWS * num_clusters, rng)]
    centres = _lloyd(sample, _seed_centres(sample, num_clusters, rng), LLOYD_ITERATIONS)
    centres = _split_overfull(points, centres, capacity, rng)
    labels = np.full(len(points), -1)
    for _ in range(CONSTRAINED_ROUNDS):
        costs, previous = _costs(points, centres), labels
        labels = _assign_with_capacity(costs, capacity, rng)
        _fill_up(labels, costs, minimum)
        if np.array_equal(labels, previous):
            break
        centres = _means(points, labels, centres)
    first_token = np.unique(labels, return_index=True)[1]
    return np.argsort(np.argsort(first_token))[labels]


def inertia(embeddings: np.ndarray | torch.Tensor, tree: VocabTree) -> float:
    """Sum over the tokens of the squared distance between (V, d) embeddings and the mean of the height-1 node."""
    points = _as_points(embeddings)
    if len(points) != tree.vocab_size:
        raise ValueError(f"embeddings have {len(points)} rows, the tree has vocab_size={tree.vocab_size} tokens.")
    labels = tree.ancestors[1].cpu().numpy() - tree.vocab_size
    return _inertia(points, labels, tree.nodes_per_height[1])


def unconstrained_inertia(embeddings: np.ndarray | torch.Tensor, num_clusters: int, seed: int = 0) -> float:
    """Inertia of plain K-means on (V, d) embeddings, the yardstick of `inertia`: k-means++, then Lloyd until it rests.

    K-means finds local optima, so a constrained tree can have a slightly lower inertia than this.
    """
    points = _as_points(embeddings)
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"num_clusters={num_clusters} must be 1 ... vocab_size={len(points)}.")
    with threadpool_limits(limits=1):
        rng = np.random.RandomState(seed)
        centres = _lloyd(points, _seed_centres(points, num_clusters, rng), iterations=100)
        return _inertia(points, _costs(points, centres).argmin(1), num_clusters)


# ---- unconstrained K-means ----


def _subsample(num_rows: int, size: int, rng: np.random.RandomState) -> np.ndarray | slice:
    return slice(None) if num_rows <= size else np.sort(rng.choice(num_rows, size, replace=False))


def _seed_centres(points: np.ndarray, num_clusters: int, rng: np.random.RandomState) -> np.ndarray:
    sample = points[_subsample(len(points), SEEDING_ROWS * num_clusters, rng)]
    return kmeans_plusplus(sample, num_clusters, random_state=rng)[0]


def _lloyd(points: np.ndarray, centres: np.ndarray, iterations: int) -> np.ndarray:
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        previous, labels = labels, _costs(points, centres).argmin(1)
        if np.array_equal(labels, previous):
            break
        centres = _means(points, labels, centres)
    return centres


def _split_overfull(points: np.ndarray, centres: np.ndarray, capacity: int, rng: np.random.RandomState) -> np.ndarray:
    """Give clusters over `capacity` a centre for each mean size they hold, taken from the smallest clusters.

    Without this, a crowd too large for one node (rare tokens, in most embeddings) would be scattered over the others.
    """
    labels = _costs(points, centres).argmin(1)
    sizes = np.bincount(labels, minlength=len(centres))
    if sizes.max() <= capacity:
        return centres
    shares = np.where(sizes > capacity, sizes * len(centres) // len(points), 1)
    shares[np.argsort(sizes, kind="stable")[: shares.sum() - len(centres)]] = 0
    parts = [centres[shares == 1]]
    for label in np.flatnonzero(shares > 1):
        members = points[labels == label]
        parts.append(_lloyd(members, _seed_centres(members, shares[label], rng), SPLIT_ITERATIONS))
    return np.concatenate(parts)


def _costs(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, d), (k, d) -> (n, k) squared distances less |point|**2, which is the same for all centres."""
    costs = np.empty((len(points), len(centres)), dtype=np.float32)
    squared_norms = np.einsum("kd,kd->k", centres, centres)

    def fill(start: int) -> None:
        rows = slice(start, start + CHUNK_ROWS)
        np.matmul(points[rows], -2 * centres.T, out=costs[rows])
        costs[rows] += squared_norms

    _in_threads(fill, range(0, len(points), CHUNK_ROWS))
    return costs


def _in_threads(function: Callable[[int], None], starts: range) -> None:
    if len(starts) == 1:
        return function(starts[0])
    with ThreadPoolExecutor() as pool:
        list(pool.map(function, starts))


def _means(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n, d) points, (n,) labels -> (k, d) means; a cluster without points keeps its centre."""
    sizes = np.bincount(labels, minlength=len(centres))[:, None]
    members = sparse.csr_array(
        (np.ones(len(labels), points.dtype), (labels, np.arange(len(labels)))), (len(centres), len(labels))
    )
    return np.where(sizes > 0, (members @ points) / np.maximum(sizes, 1), centres).astype(points.dtype)


def _inertia(points: np.ndarray, labels: np.ndarray, num_clusters: int) -> float:
    residual = points - _means(points, labels, np.zeros((num_clusters, points.shape[1]), points.dtype))[labels]
    return float(np.einsum("nd,nd->n", residual, residual).sum(dtype=np.float64))


# ---- assignment under size limits ----


def _assign_with_capacity(costs: np.ndarray, capacity: int, rng: np.random.RandomState) -> np.ndarray:
    """(n, k) costs -> (n,) labels used at most `capacity` times each, at nearly least total cost.

    Overfull clusters let go of the tokens that lose least by their next best choice and charge the rest that loss plus
    `increment`. When no cluster is overfull the total is within n * increment of the least. Jitter splits ties (equal
    tokens would all move to the same cluster); the growing increment ends price wars.
    """
    labels = costs.argmin(1)
    if np.bincount(labels).max() <= capacity:
        return labels
    scale = float(costs.mean(dtype=np.float64) - costs.min(1).mean(dtype=np.float64))
    increment = max(PRICE_STEP * scale, 4e-6 * float(np.abs(costs).max())) or 1.0
    costs = costs + rng.random_sample(costs.shape).astype(np.float32) * np.float32(increment)
    labels, prices = costs.argmin(1), np.zeros(costs.shape[1])
    for _ in range(AUCTION_ROUNDS):
        excess = np.bincount(labels, minlength=len(prices)) - capacity
        if excess.max() <= 0:
            return labels
        rows, next_labels, regrets = _next_choices(costs, prices, labels, excess > 0)
        leaving = _rank_within(labels[rows], regrets) < excess[labels[rows]]
        losses = np.zeros_like(prices)
        np.maximum.at(losses, labels[rows[leaving]], regrets[leaving])
        prices += np.where(excess > 0, losses + increment, 0)
        labels[rows[leaving]] = next_labels[leaving]
        increment *= PRICE_GROWTH
    return _spill(costs, labels, capacity)


def _next_choices(
    costs: np.ndarray, prices: np.ndarray, labels: np.ndarray, overfull: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens in overfull clusters, the best other cluster of each, and what moving there costs it."""
    rows = np.flatnonzero(overfull[labels])
    charged, own = costs[rows] + prices, (np.arange(len(rows)), labels[rows])
    current = charged[own]
    charged[own] = np.inf
    next_labels = charged.argmin(1)
    return rows, next_labels, charged[own[0], next_labels] - current


def _rank_within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n,) groups, (n,) values -> (n,) how many values of the same group come before this one in rising order."""
    order = np.lexsort((values, groups))
    sorted_groups = groups[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups)
    return ranks


def _spill(costs: np.ndarray, labels: np.ndarray, capacity: int) -> np.ndarray:
    """Move the costliest tokens of overfull clusters to the best cluster that has room."""
    sizes = np.bincount(labels, minlength=costs.shape[1])
    rank = _rank_within(labels, costs[np.arange(len(labels)), labels])
    for token in np.flatnonzero(rank >= capacity):
        sizes[labels[token]] -= 1
        labels[token] = np.where(sizes < capacity, costs[token], np.inf).argmin()
        sizes[labels[token]] += 1
    return labels


def _fill_up(labels: np.ndarray, costs: np.ndarray, minimum: int) -> None:
    """Give clusters with less than `minimum` tokens those that lose least by moving there, in place."""
    sizes = np.bincount(labels, minlength=costs.shape[1])
    for label in np.flatnonzero(sizes < minimum):
        losses = costs[:, label] - costs[np.arange(len(labels)), labels]
        for token in np.argsort(losses, kind="stable"):
            if sizes[label] >= minimum:
                break
            if sizes[labels[token]] > minimum:
                sizes[labels[token]] -= 1
                sizes[label] += 1
                labels[token] = label


# ---- checks ----


def _as_points(embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
    """Any float array or tensor -> (V, d) contiguous float32, checked."""
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):
        points = np.ascontiguousarray(embeddings, dtype=np.float32)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"embeddings must be a non-empty (vocab_size, dim) array, got shape {points.shape}.")
    wrong = ~np.isfinite(points).all(1)
    if wrong.any():
        raise ValueError(
            f"embeddings of {wrong.sum()} tokens are not finite in float32, first token {wrong.argmax()}. "
            "Replace these rows, for example with zeros."
        )
    largest = max(points.max(), -points.min())
    if largest > LARGEST_VALUE:
        raise ValueError(
            f"embeddings reach {largest:.3g}, over {LARGEST_VALUE:g}: their squares overflow float32. "
            "Divide all rows by a constant; the tree does not depend on the scale."
        )
    return points


def _resolve_height(vocab_size: int, branching_factor: int, height: int | None) -> int:
    if branching_factor < 1 or (branching_factor == 1 and vocab_size > 1):
        raise ValueError(
            f"branching_factor={branching_factor} cannot hold vocab_size={vocab_size} tokens: "
            "it must be at least 2 for two or more tokens."
        )
    if height is None:
        height = 1
        while branching_factor**height < vocab_size:
            height += 1
    if height < 1:
        raise ValueError(f"height={height} must be at least 1: the root stands above the tokens.")
    if branching_factor**height < vocab_size:
        raise ValueError(
            f"branching_factor={branching_factor} and height={height} give {branching_factor**height} leaves, "
            f"fewer than vocab_size={vocab_size}. Raise either one."
        )
    return height


def _check_ratios(min_size_ratio: float, max_size_ratio: float | None) -> None:
    if not 0 <= min_size_ratio <= 1:
        raise ValueError(
            f"min_size_ratio={min_size_ratio} must be in [0, 1]: not every child can be larger than the mean."
        )
    if max_size_ratio is not None and not max_size_ratio >= 1:
        raise ValueError(
            f"max_size_ratio={max_size_ratio} must be at least 1: not every child can be smaller than the mean."
        )


__all__ = ["build_tree", "choose_num_clusters", "constrained_kmeans", "inertia", "unconstrained_inertia"]
