"""Looking at a vocabulary tree: its nodes as an indented text, its sizes as a table."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tdlm.tokenization.clustering import inertia, unconstrained_inertia
from tdlm.vocab_tree_tdlm import VocabTree

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to


def tree_outline(
    tree: VocabTree,
    tokenizer: Any = None,
    *,
    max_depth: int | None = None,
    max_children: int = 12,
    node_id: int | None = None,
) -> str:
    """The nodes below `node_id` (default: the root), one a line, indented by depth, with their first tokens.

    Nodes at height 1, and nodes `max_depth` levels down, show up to `max_children` of their tokens, as quoted text
    when there is a `tokenizer` and as ids otherwise; nodes above show up to `max_children` of their children.
    Raises `ValueError` if the tree has no such node or a limit is out of range.
    """
    node_id = tree.root_id if node_id is None else node_id
    if not 0 <= node_id < tree.num_nodes:
        raise ValueError(f"node_id={node_id} is outside 0 ... num_nodes-1={tree.num_nodes - 1}.")
    if max_children < 1:
        raise ValueError(f"max_children={max_children} must be at least 1.")
    if max_depth is not None and max_depth < 0:
        raise ValueError(f"max_depth={max_depth} must be at least 0.")
    if node_id < tree.vocab_size:
        return f"token {node_id}: {_token_text(node_id, tokenizer)}"
    max_depth = tree.height if max_depth is None else max_depth
    return "\n".join(_outline_lines(tree, tokenizer, node_id, max_depth, max_children, indent=""))


def _outline_lines(
    tree: VocabTree, tokenizer: Any, node_id: int, max_depth: int, max_children: int, indent: str
) -> Iterator[str]:
    height = int(tree.node_height(torch.tensor(node_id)))
    child_row = tree.child_ids[node_id - tree.vocab_size]
    children = child_row[child_row >= 0].tolist()
    tokens = torch.nonzero(tree.ancestors[height] == node_id).flatten().tolist()
    name = "root" if node_id == tree.root_id else "node"
    line = f"{indent}{name} {node_id} (height {height}, {_count(children, 'child', 'children')}"
    line += f", {_count(tokens, 'token', 'tokens')})"
    if height == 1 or max_depth == 0:
        shown = [_token_text(token, tokenizer) for token in (children if height == 1 else tokens)[:max_children]]
        yield f"{line}: {' '.join(shown)}{_and_more(len(tokens) - len(shown))}"
        return
    yield line
    for child in children[:max_children]:
        yield from _outline_lines(tree, tokenizer, child, max_depth - 1, max_children, indent + "  ")
    if len(children) > max_children:
        yield f"{indent} {_and_more(len(children) - max_children)}"


def _count(items: list, one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _and_more(number: int) -> str:
    return f" … {number} more" if number > 0 else ""


def _token_text(token_id: int, tokenizer: Any) -> str:
    """The token as a quoted text without control characters; its piece if its bytes are no whole character."""
    if tokenizer is None:
        return str(token_id)
    text = tokenizer.decode([token_id])
    if not text or REPLACEMENT in text:
        text = tokenizer.convert_ids_to_tokens(token_id)
    return str(token_id) if text is None else repr(text)  # None: a padding row beyond the tokenizer's vocabulary


def tree_statistics(
    tree: VocabTree, embeddings: np.ndarray | torch.Tensor | None = None, seed: int = 0
) -> dict[str, Any]:
    """Sizes of the tree, ready for JSON; with (V, d) `embeddings` also how well its height-1 nodes group them.

    `heights` lists, for each height from 1 up, the minimum, mean and maximum of the `children` and the `tokens` of a
    node, and `fill`, the mean children over the branching factor. `inertia_ratio` compares with plain K-means with as
    many clusters and no caps (`None` if its inertia is 0).
    """
    statistics: dict[str, Any] = {
        "vocab_size": tree.vocab_size,
        "branching_factor": tree.branching_factor,
        "height": tree.height,
        "num_nodes": tree.num_nodes,
        "nodes_per_height": list(tree.nodes_per_height),
        "heights": [_height_statistics(tree, height) for height in range(1, tree.height + 1)],
    }
    if embeddings is not None:
        tree_inertia = inertia(embeddings, tree)
        free_inertia = unconstrained_inertia(embeddings, tree.nodes_per_height[1], seed)
        statistics["inertia"] = tree_inertia
        statistics["unconstrained_inertia"] = free_inertia
        statistics["inertia_ratio"] = tree_inertia / free_inertia if free_inertia > 0 else None
    return statistics


def _height_statistics(tree: VocabTree, height: int) -> dict[str, Any]:
    low, high = tree.height_offsets[height : height + 2]
    children = tree.child_counts[low - tree.vocab_size : high - tree.vocab_size]
    tokens = torch.bincount(tree.ancestors[height] - low, minlength=high - low)
    return {
        "height": height,
        "nodes": high - low,
        "children": _spread(children),
        "tokens": _spread(tokens),
        "fill": float(children.double().mean()) / tree.branching_factor,
    }


def _spread(sizes: torch.Tensor) -> dict[str, float]:
    return {"min": int(sizes.min()), "mean": float(sizes.double().mean()), "max": int(sizes.max())}


def format_statistics(statistics: dict[str, Any]) -> str:
    """`tree_statistics` as a table for people."""
    lines = [
        f"{statistics['vocab_size']} tokens, branching factor {statistics['branching_factor']}, "
        f"height {statistics['height']}, {statistics['num_nodes']} nodes",
        f"{'height':>6} {'nodes':>8}   {'children (min/mean/max)':>24} {'fill':>6}   {'tokens (min/mean/max)':>24}",
    ]
    for row in reversed(statistics["heights"]):
        children, tokens = (
            f"{sizes['min']} / {sizes['mean']:.1f} / {sizes['max']}" for sizes in (row["children"], row["tokens"])
        )
        lines.append(f"{row['height']:>6} {row['nodes']:>8}   {children:>24} {row['fill']:>6.1%}   {tokens:>24}")
    if "inertia" in statistics:
        ratio = statistics["inertia_ratio"]
        lines.append(
            f"inertia {statistics['inertia']:.6g}, without caps {statistics['unconstrained_inertia']:.6g}"
            + (f" (ratio {ratio:.4f})" if ratio is not None else "")
        )
    return "\n".join(lines)


__all__ = ["format_statistics", "tree_outline", "tree_statistics"]
