"""The vocabulary tree: tokens are leaves, noising climbs from a token to the root, generation descends.

Node ids. A leaf's node id is its token id, `0 ... V-1`. Internal nodes follow, sorted by height, so the root is the
last id, `N-1`. All leaves have the same depth `H`; a shorter branch is padded with internal nodes that have one child.

Shape legend: V tokens, H height of the root, N nodes, I = N - V internal nodes, K branching factor.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import initialization as init

VOCAB_HASH_BYTES = 32  # SHA-256
_METADATA_KEY = "vocab_tree"  # one key only: safetensors writes several in no fixed order


def hash_vocabulary(vocabulary: Mapping[str, int]) -> torch.Tensor:
    """A tokenizer's `get_vocab()` -> (32,) uint8, the SHA-256 of its (token id, token) pairs in id order."""
    digest = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}\t{json.dumps(token)}\n".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def balanced_nodes_per_height(vocab_size: int, branching_factor: int) -> list[int]:
    """Nodes at each height, leaves first, of the lowest tree with at most `branching_factor` children a node."""
    if vocab_size < 1 or branching_factor < 1 or (branching_factor == 1 and vocab_size > 1):
        raise ValueError(
            f"vocab_size={vocab_size} tokens cannot hang on a tree with branching_factor={branching_factor}. "
            "Both must be at least 1, and branching_factor at least 2 for two or more tokens."
        )
    nodes_per_height = [vocab_size, -(-vocab_size // branching_factor)]
    while nodes_per_height[-1] > 1:
        nodes_per_height.append(-(-nodes_per_height[-1] // branching_factor))
    return nodes_per_height


def validate_shape(nodes_per_height: Sequence[int], branching_factor: int) -> None:
    """Raise `ValueError` unless a tree with these node counts (leaves first, root last) can exist."""
    sizes = list(nodes_per_height)
    if len(sizes) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes) or sizes[-1] != 1:
        raise ValueError(
            f"nodes_per_height={sizes} must list positive node counts from the leaves up and end with 1, the root."
        )
    for height, (lower, upper) in enumerate(itertools.pairwise(sizes)):
        if not upper <= lower <= upper * branching_factor:
            raise ValueError(
                f"nodes_per_height={sizes}: {upper} nodes at height {height + 1} cannot have {lower} children in all "
                f"with 1 to branching_factor={branching_factor} children each."
            )


class OfOneTokenizer(nn.Module):
    """A table over a tokenizer's vocabulary, which remembers whose: the hash is zeros while it belongs to none."""

    vocab_size: int
    too_small_for: str  # what to say and do where the tokenizer has more tokens
    made_for_another: str  # and where its vocabulary is not the one this was made for
    vocab_hash: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("vocab_hash", torch.zeros(VOCAB_HASH_BYTES, dtype=torch.uint8))

    def bind(self, tokenizer: Any) -> Self:
        """Record that this belongs to `tokenizer`; raises `ValueError` if a token has no place in it."""
        self.check_size(tokenizer)
        self.vocab_hash.copy_(hash_vocabulary(tokenizer.get_vocab()))
        return self

    def check_size(self, tokenizer: Any) -> None:
        largest = max(tokenizer.get_vocab().values())
        if largest >= self.vocab_size:
            problem = self.too_small_for.format(vocab_size=self.vocab_size)
            raise ValueError(f"the tokenizer has token ids up to {largest}, {problem}")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ValueError` unless this was bound to a tokenizer with the same vocabulary."""
        self.check_size(tokenizer)
        if self.vocab_hash.any() and not torch.equal(self.vocab_hash.cpu(), hash_vocabulary(tokenizer.get_vocab())):
            raise ValueError(self.made_for_another)


class VocabTree(OfOneTokenizer):
    """A tree over a vocabulary, as integer tables that live on the model's device and in its safetensors.

    Every look-up is one gather. The tables are redundant on purpose (`child_ids` alone is the tree); `validate`
    proves that they agree, so no unchecked table decides anything.

    Buffers, all int64 unless said:
        ancestors: (H+1, V), `ancestors[h, x]` is A_h(x), the node above token x at height h.
        child_slots: (H, V), `child_slots[l, x]` is the slot of A_l(x) among the children of A_{l+1}(x).
        child_ids: (I, K), node ids of the children of node `V + i`, padded with -1.
        child_counts: (I,), number of children of node `V + i`.
        vocab_hash: (32,) uint8, see `hash_vocabulary`; zeros while the tree belongs to no tokenizer.
    """

    ancestors: torch.Tensor
    child_slots: torch.Tensor
    child_ids: torch.Tensor
    child_counts: torch.Tensor
    too_small_for = (
        "the tree has vocab_size={vocab_size} tokens. Build the tree for this tokenizer (`tdlm tree build`)."
    )
    made_for_another = (
        "this vocabulary tree was built for another tokenizer: the hash of the tokenizer's vocabulary differs "
        "from the one stored with the tree. Use the tokenizer saved beside the model, or build a new tree."
    )

    def __init__(self, nodes_per_height: Sequence[int], branching_factor: int):
        super().__init__()
        validate_shape(nodes_per_height, branching_factor)
        self.nodes_per_height = list(nodes_per_height)
        self.branching_factor = branching_factor
        num_internal = self.num_nodes - self.vocab_size
        # Persistent, because non-persistent buffers come back uninitialised from a model built on the meta device.
        self.register_buffer("ancestors", torch.zeros(self.height + 1, self.vocab_size, dtype=torch.int64))
        self.register_buffer("child_slots", torch.zeros(self.height, self.vocab_size, dtype=torch.int64))
        self.register_buffer("child_ids", torch.zeros(num_internal, branching_factor, dtype=torch.int64))
        self.register_buffer("child_counts", torch.zeros(num_internal, dtype=torch.int64))

    # ---- sizes (host integers, no device access) ----

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # it follows from the shape
        return self.nodes_per_height[0]

    @property
    def height(self) -> int:
        return len(self.nodes_per_height) - 1

    @property
    def num_nodes(self) -> int:
        return sum(self.nodes_per_height)

    @property
    def root_id(self) -> int:
        return self.num_nodes - 1

    @property
    def height_offsets(self) -> list[int]:
        """First node id of each height, and `N` at the end: H+2 integers."""
        return [0, *itertools.accumulate(self.nodes_per_height)]

    def extra_repr(self) -> str:
        return f"nodes_per_height={self.nodes_per_height}, branching_factor={self.branching_factor}"

    # ---- look-ups: any shapes that broadcast, same device as the tables ----

    def ancestor(self, token_ids: torch.Tensor, heights: torch.Tensor | int) -> torch.Tensor:
        """Token ids and heights -> node ids A_h(x)."""
        return self.ancestors[heights, token_ids]

    def child_slot(self, token_ids: torch.Tensor, levels: torch.Tensor | int) -> torch.Tensor:
        """Token ids and levels -> slot of A_l(x) below A_{l+1}(x)."""
        return self.child_slots[levels, token_ids]

    def child(self, node_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Internal node ids and slots -> child node ids (-1 where the node has no such child)."""
        return self.child_ids[node_ids - self.vocab_size, slots]

    def child_mask(self, node_ids: torch.Tensor) -> torch.Tensor:
        """(...) internal node ids -> (..., K) bool, True where the node has that child."""
        slots = torch.arange(self.branching_factor, device=node_ids.device)
        return slots < self.child_counts[node_ids - self.vocab_size, None]

    def first_leaf(self, node_ids: torch.Tensor) -> torch.Tensor:
        """(...) node ids -> (...) token ids: the leaf reached by first children, the node itself for a token."""
        for _ in range(self.height):
            internal = node_ids >= self.vocab_size
            first_child = self.child_ids[(node_ids - self.vocab_size).clamp(min=0), 0]
            node_ids = torch.where(internal, first_child, node_ids)
        return node_ids

    def node_height(self, node_ids: torch.Tensor) -> torch.Tensor:
        """(...) node ids -> (...) heights."""
        heights = torch.zeros_like(node_ids)
        for offset in self.height_offsets[1:-1]:
            heights = heights + (node_ids >= offset)
        return heights

    def paths(self) -> torch.Tensor:
        """(V, H) every token's child slots from the root down."""
        return self.child_slots.flip(0).T.contiguous()

    # ---- constructors ----

    @classmethod
    def from_parents(cls, parents: Sequence[torch.Tensor], branching_factor: int) -> "VocabTree":
        """Build from `parents[h]`: (n_h,) index within height h+1 of each node at height h. Siblings keep order."""
        sizes = [len(parent) for parent in parents] + [1]
        tree = cls(sizes, branching_factor)
        tree._fill(parents)
        return tree.validate()

    @classmethod
    def contiguous(cls, nodes_per_height: Sequence[int], branching_factor: int) -> "VocabTree":
        """The tree of this shape whose nodes take equal runs of consecutive ids as children."""
        validate_shape(nodes_per_height, branching_factor)
        return cls.from_parents(_contiguous_parents(nodes_per_height), branching_factor)

    @classmethod
    def flat(cls, vocab_size: int) -> "VocabTree":
        """Every token a child of the root (H = 1): masked diffusion."""
        return cls.contiguous([vocab_size, 1], vocab_size)

    @classmethod
    def random(cls, vocab_size: int, branching_factor: int, seed: int) -> "VocabTree":
        """The balanced tree of least height with the tokens in random order."""
        parents = _contiguous_parents(balanced_nodes_per_height(vocab_size, branching_factor))
        order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
        return cls.from_parents([parents[0][order], *parents[1:]], branching_factor)

    @classmethod
    def from_paths(cls, paths: torch.Tensor, branching_factor: int) -> "VocabTree":
        """(V, H) child slots from the root down -> tree with exactly these slots.

        Raises `ValueError` if two tokens share a path, or the slots below a node are not 0 ... n-1 with n <= K.
        """
        paths = torch.as_tensor(paths)
        if paths.ndim != 2 or 0 in paths.shape or paths.is_floating_point():
            raise ValueError(f"paths must be a non-empty (vocab_size, height) integer array, got {tuple(paths.shape)}.")
        if paths.min() < 0 or paths.max() >= branching_factor:
            raise ValueError(
                f"paths hold child slots {int(paths.min())}..{int(paths.max())}, outside "
                f"0..branching_factor-1={branching_factor - 1}. Raise branching_factor or renumber the slots."
            )
        group, parents = torch.zeros(len(paths), dtype=torch.int64), []
        for depth, slots in enumerate(paths.to(torch.int64).T):
            keys, child_group = torch.unique(group * branching_factor + slots, return_inverse=True)
            parent, slot = keys // branching_factor, keys % branching_factor
            gap = _rank_among_siblings(parent) != slot
            if gap.any():
                raise ValueError(
                    f"a node at depth {depth} has child slots {slot[parent == parent[gap][0]].tolist()}; "
                    "the slots below a node must be 0, 1, 2, ... without gaps."
                )
            parents.append(parent)
            group = child_group
        if len(keys) < len(paths):
            twins = torch.nonzero(group == group.bincount().argmax()).flatten()[:2].tolist()
            raise ValueError(f"tokens {twins[0]} and {twins[1]} share the path {paths[twins[0]].tolist()}.")
        # Nodes are numbered by path within each height; leaves by token id.
        parents[-1] = parents[-1][group]
        tree = cls([len(parent) for parent in reversed(parents)] + [1], branching_factor)
        tree._fill(parents[::-1], leaf_slots=paths[:, -1])
        return tree.validate()

    @classmethod
    def from_nested(cls, nested: Any, branching_factor: int | None = None, tokenizer: Any = None) -> "VocabTree":
        """A tree written by hand: lists (or dicts, whose keys are only names) of token ids or tokens.

        `[[0, 1], {"digits": [2, 3], "dot": 4}]` is a tree over 5 tokens. Tokens given as strings need `tokenizer`.
        `branching_factor` defaults to the widest node.
        """
        paths: dict[int, tuple[int, ...]] = {}
        stack: list[tuple[Any, tuple[int, ...]]] = [(nested, ())]
        widest = 1
        while stack:
            node, path = stack.pop()
            node = list(node.values()) if isinstance(node, Mapping) else node
            if isinstance(node, (list, tuple)):
                if not node:
                    raise ValueError(f"the node at path {list(path)} is empty; every node needs a token below it.")
                widest = max(widest, len(node))
                stack.extend((child, (*path, slot)) for slot, child in enumerate(node))
                continue
            token_id = _token_id(node, tokenizer)
            if token_id in paths:
                raise ValueError(f"token {node!r} is twice in the tree, at {list(paths[token_id])} and {list(path)}.")
            paths[token_id] = path
        missing = sorted(set(range(max(paths) + 1)) - set(paths)) if min(paths) >= 0 else [min(paths)]
        if tokenizer is not None and not missing:
            missing = sorted(set(tokenizer.get_vocab().values()) - set(paths))
        if missing:
            raise ValueError(f"every token id from 0 up must be in the tree once; at fault: {missing[:8]}.")
        height = max(1, *(len(path) for path in paths.values()))
        padded = [(*paths[token_id], *[0] * (height - len(paths[token_id]))) for token_id in range(len(paths))]
        tree = cls.from_paths(torch.tensor(padded), branching_factor or widest)
        return tree.bind(tokenizer) if tokenizer is not None else tree

    # ---- files ----

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; the same tree always gives the same bytes."""
        shape = {"nodes_per_height": self.nodes_per_height, "branching_factor": self.branching_factor}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = f"{os.fspath(path)}.partial"
        save_file(tensors, partial, metadata={_METADATA_KEY: json.dumps(shape)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VocabTree":
        """Read and validate a file written by `save`. Raises `ValueError` for anything that is not such a file."""
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                shape = json.loads((file.metadata() or {}).get(_METADATA_KEY, "null"))
                if not isinstance(shape, dict) or set(shape) != {"nodes_per_height", "branching_factor"}:
                    raise ValueError(f"{path} is not a vocabulary tree (no `{_METADATA_KEY}` metadata).")
                stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                _check_stored_shapes(stored, shape["nodes_per_height"], shape["branching_factor"])
                tree = cls(**shape)
                tree.load_state_dict({name: file.get_tensor(name) for name in stored})
        except (SafetensorError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is not a vocabulary tree: {error}") from error
        return tree.validate()

    # ---- validation ----

    def validate(self) -> "VocabTree":
        """Prove that the tables are one tree over the vocabulary; raise `ValueError` that says what is wrong."""
        ancestors, slots, child_ids, counts = (
            table.detach().cpu() for table in (self.ancestors, self.child_slots, self.child_ids, self.child_counts)
        )
        vocab_size = self.vocab_size
        if not torch.equal(ancestors[0], torch.arange(vocab_size)):
            wrong = _first(ancestors[0] != torch.arange(vocab_size))
            raise ValueError(f"not a tree: token {wrong} is stored as leaf {int(ancestors[0, wrong])}.")
        if counts.min() < 1 or counts.max() > self.branching_factor:
            node = _first((counts < 1) | (counts > self.branching_factor))
            raise ValueError(
                f"not a tree: node {vocab_size + node} has child count {int(counts[node])}, "
                f"outside 1..branching_factor={self.branching_factor}."
            )
        present = torch.arange(self.branching_factor) < counts[:, None]
        if not torch.equal(present, child_ids != -1):
            node = _first(((child_ids != -1) != present).any(1))
            raise ValueError(
                f"not a tree: node {vocab_size + node} counts {int(counts[node])} children, but its child slots "
                f"hold {int((child_ids[node] != -1).sum())} (absent children are -1 and come last)."
            )
        self._validate_heights(child_ids, present)
        parent, slot = self._parents_and_slots(child_ids, present)
        for level in range(self.height):
            nodes = ancestors[level]
            if not torch.equal(parent[nodes], ancestors[level + 1]):
                token = _first(parent[nodes] != ancestors[level + 1])
                raise ValueError(
                    f"not a tree: token {token} has ancestor {int(ancestors[level + 1, token])} at height {level + 1}, "
                    f"but the parent of its ancestor below is {int(parent[nodes[token]])}."
                )
            if not torch.equal(slot[nodes], slots[level]):
                token = _first(slot[nodes] != slots[level])
                raise ValueError(
                    f"not a tree: token {token} has child slot {int(slots[level, token])} at level {level}, "
                    f"but stands in slot {int(slot[nodes[token]])} of its parent."
                )
        return self

    def _validate_heights(self, child_ids: torch.Tensor, present: torch.Tensor) -> None:
        """Children stand exactly one height below their parent: no cycle, one depth, ids in range."""
        offsets = self.height_offsets
        for height in range(1, self.height + 1):
            rows = slice(offsets[height] - self.vocab_size, offsets[height + 1] - self.vocab_size)
            low, high = offsets[height - 1], offsets[height]
            outside = present[rows] & ((child_ids[rows] < low) | (child_ids[rows] >= high))
            if outside.any():
                row, column = (int(index) for index in torch.nonzero(outside)[0])
                raise ValueError(
                    f"not a tree: node {offsets[height] + row} at height {height} has child "
                    f"{int(child_ids[rows][row, column])}, but nodes of height {height - 1} are {low}..{high - 1} "
                    "(a child at another height makes a cycle or leaves of different depth)."
                )

    def _parents_and_slots(self, child_ids: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) parent and (N,) slot of every node but the root, each node having exactly one parent."""
        parent_row, slot_of_child = torch.nonzero(present, as_tuple=True)
        child = child_ids[present]
        times = torch.bincount(child, minlength=self.num_nodes)[:-1]
        if (times != 1).any():
            node = _first(times != 1)
            what = "token" if node < self.vocab_size else "node"
            raise ValueError(
                f"not a tree: {what} {node} is the child of {int(times[node])} nodes; every one but the root "
                f"({self.root_id}) must be the child of exactly one."
            )
        parent = torch.full((self.num_nodes,), -1)
        slot = torch.full((self.num_nodes,), -1)
        parent[child] = parent_row + self.vocab_size
        slot[child] = slot_of_child
        return parent, slot

    # ---- filling the tables ----

    def _fill(self, parents: Sequence[torch.Tensor], leaf_slots: torch.Tensor | None = None) -> None:
        """Fill the tables from each node's parent, honouring tensors that a checkpoint already filled."""
        offsets = self.height_offsets
        ancestors, child_slots = [torch.arange(self.vocab_size)], []
        child_ids = torch.full((self.num_nodes - self.vocab_size, self.branching_factor), -1)
        for level, parent in enumerate(parents):
            given = leaf_slots if level == 0 else None
            slot = _rank_among_siblings(parent) if given is None else given.to(torch.int64)
            if slot.max() >= self.branching_factor:
                raise ValueError(
                    f"a node at height {level + 1} has {int(slot.max()) + 1} children, more than "
                    f"branching_factor={self.branching_factor}."
                )
            child_ids[parent + offsets[level + 1] - self.vocab_size, slot] = torch.arange(len(parent)) + offsets[level]
            within_height = ancestors[-1] - offsets[level]
            child_slots.append(slot[within_height])
            ancestors.append(parent[within_height] + offsets[level + 1])
        init.copy_(self.ancestors, torch.stack(ancestors))
        init.copy_(self.child_slots, torch.stack(child_slots))
        init.copy_(self.child_ids, child_ids)
        init.copy_(self.child_counts, (child_ids != -1).sum(1))

    def init_weights(self) -> None:
        """Fill with the contiguous tree of this shape: the placeholder of a model that was given no tree."""
        self._fill(_contiguous_parents(self.nodes_per_height))
        init.zeros_(self.vocab_hash)


def _contiguous_parents(nodes_per_height: Sequence[int]) -> list[torch.Tensor]:
    """Parent index of every node at every height but the root's, in equal consecutive runs."""
    return [torch.arange(lower) * upper // lower for lower, upper in itertools.pairwise(nodes_per_height)]


def _rank_among_siblings(parent: torch.Tensor) -> torch.Tensor:
    """(n,) parent indices -> (n,) how many earlier nodes have the same parent."""
    order = torch.argsort(parent, stable=True)
    sorted_parent = parent[order]
    starts = torch.searchsorted(sorted_parent, sorted_parent)
    rank = torch.empty_like(parent)
    rank[order] = torch.arange(len(parent)) - starts
    return rank


def _token_id(token: Any, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise ValueError(f"a leaf must be a token id or a token, got {token!r}.")
    if tokenizer is None:
        raise ValueError(f"token {token!r} is a string: pass the tokenizer that knows its id.")
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise ValueError(f"token {token!r} is not in the tokenizer's vocabulary.")
    return vocabulary[token]


def _check_stored_shapes(stored: dict[str, tuple], nodes_per_height: list[int], branching_factor: int) -> None:
    """Compare a file's tensor shapes with its header before a byte is allocated for them."""
    validate_shape(nodes_per_height, branching_factor)
    vocab_size, height = nodes_per_height[0], len(nodes_per_height) - 1
    num_internal = sum(nodes_per_height) - vocab_size
    expected = {
        "ancestors": (height + 1, vocab_size),
        "child_slots": (height, vocab_size),
        "child_ids": (num_internal, branching_factor),
        "child_counts": (num_internal,),
        "vocab_hash": (VOCAB_HASH_BYTES,),
    }
    if stored != expected:
        raise ValueError(f"not a vocabulary tree: it holds tensors {stored}, its header announces {expected}.")


def _first(condition: torch.Tensor) -> int:
    """Index of the first True."""
    return int(torch.nonzero(condition)[0])


__all__ = ["VocabTree", "balanced_nodes_per_height", "hash_vocabulary", "validate_shape"]
