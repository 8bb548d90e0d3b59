"""Token constraints: generation given that each position's token is in a set, with the mass moved up the tree.

Shape legend: S sets, B sequences, L positions, R rows (positions that choose a child), D hidden size, K child slots,
I internal nodes, N nodes, V tokens.
"""

from collections.abc import Sequence

import torch

from .heads_tdlm import ChildHead
from .vocab_tree_tdlm import VocabTree


class TokenConstraint:
    """Which tokens each position may become, and what that makes of the distribution over children.

    Below a node v, from one hidden state, a path has the probability of its steps. So a child c is chosen, given that
    the token is in the set A, with probability proportional to

        p(c | v) * mass(c),     mass(v) = sum_c p(c | v) mass(c),     mass(leaf) = 1 if it is in A, else 0.

    For the direct law, which draws the whole path from one hidden state, this is exactly the model's distribution
    conditioned on A. For the other laws the lower levels will be drawn from later hidden states, and the mass is what
    the present one expects of them. Whatever the law, a child below which nothing is allowed has probability 0.

    Args:
        tree: the vocabulary.
        allowed_SV: (S, V) bool, one row a set; every set must allow something.
        set_1L: (1, L) the set of each position.
    """

    def __init__(self, tree: VocabTree, allowed_SV: torch.Tensor, set_1L: torch.Tensor):
        self.tree = tree
        self.set_1L = set_1L
        some_SN, all_SN = _nodes_with(allowed_SV, tree)
        self.some_SI = some_SN[:, tree.vocab_size :]
        self.is_mixed_SI = (some_SN & ~all_SN)[:, tree.vocab_size :]
        self.allowed_SV = allowed_SV

    def window(self, start: int, end: int) -> "TokenConstraint":
        """The same sets for a part of the positions."""
        part = TokenConstraint.__new__(TokenConstraint)
        part.__dict__.update(self.__dict__, set_1L=self.set_1L[:, start:end])
        return part

    def log_probs(
        self, head: ChildHead, hidden_BLD: torch.Tensor, z_BL: torch.Tensor, embedding_ND: torch.Tensor
    ) -> torch.Tensor:
        """-> (B, L, K) log-probabilities of the children given the sets; -inf at leaves."""
        log_probs_BLK = head.log_probs(hidden_BLD, z_BL, self.tree, embedding_ND)
        row_R = (z_BL >= self.tree.vocab_size).flatten().nonzero()[:, 0]
        nodes_R, set_R = z_BL.flatten()[row_R], self.set_1L.expand_as(z_BL).flatten()[row_R]
        masses_RI = self._log_masses(head, hidden_BLD.flatten(0, 1)[row_R], nodes_R, set_R, embedding_ND)
        children_RK = self.tree.child_ids.clamp(min=0)[nodes_R - self.tree.vocab_size]
        is_leaf_RK = children_RK < self.tree.vocab_size
        leaf_masses_RK = _log_of(self.allowed_SV[set_R[:, None], children_RK.masked_fill(~is_leaf_RK, 0)])
        inner_RK = (children_RK - self.tree.vocab_size).clamp(min=0)
        mass_RK = torch.where(is_leaf_RK, leaf_masses_RK.to(masses_RI.dtype), masses_RI.gather(1, inner_RK))
        conditioned_RK = (log_probs_BLK.flatten(0, 1)[row_R] + mass_RK).log_softmax(-1)
        return log_probs_BLK.flatten(0, 1).index_copy(0, row_R, conditioned_RK).view_as(log_probs_BLK)

    def _log_masses(
        self,
        head: ChildHead,
        hidden_RD: torch.Tensor,
        nodes_R: torch.Tensor,
        set_R: torch.Tensor,
        embedding_ND: torch.Tensor,
    ) -> torch.Tensor:
        """-> (R, I) log mass(v) of every node below a row's own; of others just whether anything is allowed there."""
        tree, V = self.tree, self.tree.vocab_size
        log_masses_RI = _log_of(self.some_SI[set_R]).to(torch.promote_types(hidden_RD.dtype, torch.float32))
        heights_R = tree.node_height(nodes_R)
        for node in (self.is_mixed_SI.any(0).nonzero()[:, 0] + V).tolist():  # lower nodes have lower ids
            node_id = torch.full_like(nodes_R, node)
            is_below_R = heights_R > tree.node_height(node_id)
            is_below_R &= tree.ancestor(tree.first_leaf(node_id), heights_R) == nodes_R
            row_M = (is_below_R & self.is_mixed_SI[set_R, node - V]).nonzero()[:, 0]
            if len(row_M) == 0:
                continue
            log_probs_MK = head(hidden_RD[row_M], node_id[row_M], tree, embedding_ND)
            children_K = tree.child_ids[node - V].clamp(min=0)
            if int(children_K[0]) < V:
                below_MK = _log_of(self.allowed_SV[set_R[row_M]][:, children_K]).to(log_masses_RI.dtype)
            else:
                below_MK = log_masses_RI[row_M][:, (children_K - V).clamp(min=0)]
            log_masses_RI[row_M, node - V] = (log_probs_MK + below_MK).logsumexp(-1)
        return log_masses_RI


def constrain(
    tree: VocabTree,
    num_given: int,
    num_new: int,
    suppress_tokens: Sequence[int] | None,
    allowed_tokens: Sequence[int] | Sequence[Sequence[int] | None] | None,
) -> TokenConstraint | None:
    """The generation config's `suppress_tokens` and `allowed_tokens` -> a constraint on `num_given + num_new`
    positions, or `None` if there is nothing to constrain. Sets by position are for the new ones."""
    if not suppress_tokens and allowed_tokens is None:
        return None
    device = tree.ancestors.device
    suppressed = _checked(suppress_tokens or [], "suppress_tokens", tree)
    sets: dict[tuple[int, ...] | None, int] = {}
    index = []
    for token_ids in _sets_by_position(allowed_tokens, num_given, num_new):
        key = None if token_ids is None else tuple(sorted(set(token_ids)))
        index.append(sets.setdefault(key, len(sets)))
    allowed_SV = torch.ones(len(sets), tree.vocab_size, dtype=torch.bool, device=device)
    for key, row in sets.items():
        if key is not None:
            allowed_SV[row] = False
            allowed_SV[row, _checked(key, "allowed_tokens", tree)] = True
    allowed_SV[:, suppressed] = False
    if not allowed_SV.any(1).all():
        raise ValueError("suppress_tokens and allowed_tokens leave no token for some position. Allow at least one.")
    return TokenConstraint(tree, allowed_SV, torch.tensor(index, device=device)[None])


def _sets_by_position(allowed_tokens: Sequence | None, num_given: int, num_new: int) -> list[Sequence[int] | None]:
    if allowed_tokens is None:
        return [None] * (num_given + num_new)
    if all(isinstance(entry, int) for entry in allowed_tokens):
        return [allowed_tokens] * (num_given + num_new)
    if len(allowed_tokens) != num_new:
        raise ValueError(
            f"allowed_tokens has sets for {len(allowed_tokens)} positions, and there are {num_new} new ones. Pass one "
            "set a new position (None: any token), or one list of token ids for all, which also holds for blanks."
        )
    return [None] * num_given + list(allowed_tokens)


def _checked(token_ids: Sequence[int], name: str, tree: VocabTree) -> torch.Tensor:
    wrong = [token for token in token_ids if not 0 <= token < tree.vocab_size]
    if wrong:
        raise ValueError(f"{name} holds {wrong[0]}, outside the vocabulary, 0..{tree.vocab_size - 1}.")
    return torch.tensor(list(token_ids), dtype=torch.int64, device=tree.ancestors.device)


def _nodes_with(allowed_SV: torch.Tensor, tree: VocabTree) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (S, N) bool twice: is some token, is every token below the node allowed?"""
    leaves = torch.arange(tree.vocab_size, device=allowed_SV.device)
    num_allowed_SN = allowed_SV.new_zeros(len(allowed_SV), tree.num_nodes, dtype=torch.int64)
    num_leaves_N = torch.zeros_like(num_allowed_SN[0])
    for height in range(tree.height + 1):
        nodes_V = tree.ancestor(leaves, torch.full_like(leaves, height))
        num_allowed_SN.index_add_(1, nodes_V, allowed_SV.long())
        num_leaves_N.index_add_(0, nodes_V, torch.ones_like(leaves))
    return num_allowed_SN > 0, num_allowed_SN == num_leaves_N


def _log_of(is_possible: torch.Tensor) -> torch.Tensor:
    """bool -> log of 1 or 0, float32."""
    return torch.zeros(is_possible.shape, device=is_possible.device).masked_fill(~is_possible, float("-inf"))


__all__ = ["TokenConstraint", "constrain"]
