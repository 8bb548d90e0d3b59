"""Heads: from a position's hidden state and the node that stands there to log-probabilities of the node's children.

All heads share one softmax: slots that the node does not have get -inf, so probability exactly 0.
Shape legend: B sequences, L positions, R rows (positions or neighborhoods that need a child), D hidden size, K child
slots, I internal nodes, N nodes, V tokens, H height of the root, n positions of a neighborhood, C = K^n joint classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_tdlm import TDLMConfig
from .vocab_tree_tdlm import VocabTree

GATHERED_ELEMENTS = 2**26  # of embedding rows gathered at once, 256 MiB in float32
DrawClass = Callable[[torch.Tensor], torch.Tensor]  # (R, C) log-probabilities -> (R,) drawn classes


class Head(nn.Module, ABC):
    """Distributions over children, for whole sequences of nodes z_t: to look at, to score a path, to draw from."""

    @abstractmethod
    def log_probs(
        self, hidden_BLD: torch.Tensor, z_BL: torch.Tensor, tree: VocabTree, embedding_ND: torch.Tensor
    ) -> torch.Tensor:
        """-> (B, L, K) log-probabilities of the children of the node at each position; -inf at leaves."""

    @abstractmethod
    def path_nll(
        self,
        hidden_BLD: torch.Tensor,
        z_BL: torch.Tensor,
        x_BL: torch.Tensor,
        is_scored_HBL: torch.Tensor,
        tree: VocabTree,
        embedding_ND: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which (level, position) pairs to score -> (R,) levels, (R,) flat positions, (R,) nats.

        Each pair is -log p(the child on x's path | the node above it), from the one hidden state of its position.
        """

    @abstractmethod
    def draw_slots(
        self, hidden_BLD: torch.Tensor, z_BL: torch.Tensor, draw: DrawClass, tree: VocabTree, embedding_ND: torch.Tensor
    ) -> torch.Tensor:
        """-> (B, L) a child slot for every position that has children; arbitrary at leaves."""


class ChildHead(Head):
    """Scores the children of a node, row by row. Rows must stand at internal nodes; a leaf has no children."""

    @abstractmethod
    def logits(
        self, hidden_RD: torch.Tensor, node_ids_R: torch.Tensor, tree: VocabTree, embedding_ND: torch.Tensor
    ) -> torch.Tensor:
        """-> (R, K) unnormalised scores; those of absent children are arbitrary."""

    def forward(
        self, hidden_RD: torch.Tensor, node_ids_R: torch.Tensor, tree: VocabTree, embedding_ND: torch.Tensor
    ) -> torch.Tensor:
        """-> (R, K) float32 log-probabilities (float64 for float64 hidden states), exactly -inf for absent children."""
        return torch.log_softmax(self._masked_logits(hidden_RD, node_ids_R, tree, embedding_ND), dim=-1)

    def nll(
        self,
        hidden_RD: torch.Tensor,
        node_ids_R: torch.Tensor,
        slots_R: torch.Tensor,
        tree: VocabTree,
        embedding_ND: torch.Tensor,
    ) -> torch.Tensor:
        """-> (R,) -log p(child in slot | node, hidden state), in nats."""
        logits_RK = self._masked_logits(hidden_RD, node_ids_R, tree, embedding_ND)
        return F.cross_entropy(logits_RK, slots_R, reduction="none")

    def log_probs(self, hidden_BLD, z_BL, tree, embedding_ND) -> torch.Tensor:
        is_leaf = z_BL < tree.vocab_size
        nodes_R = z_BL.masked_fill(is_leaf, tree.root_id).flatten()
        log_probs = self(hidden_BLD.flatten(0, 1), nodes_R, tree, embedding_ND)
        return log_probs.unflatten(0, z_BL.shape).masked_fill(is_leaf[..., None], float("-inf"))

    def path_nll(self, hidden_BLD, z_BL, x_BL, is_scored_HBL, tree, embedding_ND):
        level_R, position_R = is_scored_HBL.flatten(1).nonzero(as_tuple=True)
        token_R = x_BL.flatten()[position_R]
        nll_R = self.nll(
            hidden_BLD.flatten(0, 1).index_select(0, position_R),
            tree.ancestor(token_R, level_R + 1),
            tree.child_slot(token_R, level_R),
            tree,
            embedding_ND,
        )
        return level_R, position_R, nll_R

    def draw_slots(self, hidden_BLD, z_BL, draw, tree, embedding_ND) -> torch.Tensor:
        # No data-dependent shapes, which would wait for the device: leaves are scored as the root and ignored.
        nodes_R = z_BL.masked_fill(z_BL < tree.vocab_size, tree.root_id).flatten()
        return draw(self(hidden_BLD.flatten(0, 1), nodes_R, tree, embedding_ND)).view_as(z_BL)

    def _masked_logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        logits_RK = _softmax_dtype(self.logits(hidden_RD, node_ids_R, tree, embedding_ND))
        return logits_RK.masked_fill(~tree.child_mask(node_ids_R), float("-inf"))


def _softmax_dtype(logits: torch.Tensor) -> torch.Tensor:
    """float32 at least: a bf16 softmax over K children loses the tails."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class SharedHead(ChildHead):
    """The paper's head: slot k of every node is scored by the same vector, `W[k] . h + b[k]`. K d + K parameters."""

    def __init__(self, config: TDLMConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.branching_factor)

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        return self.proj(hidden_RD)


class TiedHead(ChildHead):
    """Child c is scored by its own input embedding, `E[c] . h + b[c]`. No matrix, one bias a node."""

    def __init__(self, config: TDLMConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.num_nodes))

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        rows_R = node_ids_R - tree.vocab_size
        children_IK = tree.child_ids.clamp(min=0)
        # Both copy embedding rows: R K of them for the gather, I K for the product over parents. Copy the fewer.
        gather = rows_R.shape[0] < children_IK.shape[0] or _grouping_waits(hidden_RD)
        scores = gathered_child_scores if gather else grouped_child_scores
        return scores(hidden_RD, rows_R, children_IK, embedding_ND) + F.embedding(rows_R, self.bias[children_IK])


class NodeHead(TiedHead):
    """Child c is scored by an output embedding of its own, `O[c] . h + b[c]`. N d + N parameters."""

    def __init__(self, config: TDLMConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_nodes, config.hidden_size))

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        return super().logits(hidden_RD, node_ids_R, tree, self.weight)


class VocabHead(ChildHead):
    """Logits of all V tokens; a child weighs as much as the leaves below it, renormalised below the parent.

    On a flat tree this is MDLM's head, on two levels HDLM's. With `tie_word_embeddings` the tokens' input embeddings
    are the matrix; otherwise it has V d parameters of its own. V biases in both cases.
    """

    def __init__(self, config: TDLMConfig):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.tie_word_embeddings:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def _weight(self, tree: VocabTree, embedding_ND: torch.Tensor) -> torch.Tensor:
        return embedding_ND[: tree.vocab_size] if self.weight is None else self.weight

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        logits_RV = _softmax_dtype(F.linear(hidden_RD, self._weight(tree, embedding_ND), self.bias))
        if tree.height == 1:
            return logits_RV.index_select(1, tree.child_ids[0])
        children_RK = tree.child_ids.clamp(min=0)[node_ids_R - tree.vocab_size]
        return leaf_masses(logits_RV, tree).gather(1, children_RK)

    def nll(self, hidden_RD, node_ids_R, slots_R, tree, embedding_ND) -> torch.Tensor:
        if tree.height > 1:
            return super().nll(hidden_RD, node_ids_R, slots_R, tree, embedding_ND)
        tokens_R = tree.child(node_ids_R, slots_R)
        return linear_cross_entropy(hidden_RD, self._weight(tree, embedding_ND), self.bias, tokens_R)


def leaf_masses(logits_RV: torch.Tensor, tree: VocabTree) -> torch.Tensor:
    """(R, V) token logits -> (R, N) log-sum-exp over the leaves below each node."""
    masses, below = [logits_RV], logits_RV
    nodes = torch.arange(tree.num_nodes, device=logits_RV.device)
    for height in range(1, tree.height + 1):
        start, offset, end = tree.height_offsets[height - 1 : height + 2]
        parents = (tree.ancestor(tree.first_leaf(nodes[start:offset]), height) - offset).expand_as(below)
        # Each node is shifted by its own maximum: one for the row would underflow in its unlikely branches.
        lowest = below.new_full((len(below), end - offset), float("-inf"))
        largest = lowest.scatter_reduce(1, parents, below.detach(), "amax")
        shifted = torch.exp(below - largest.gather(1, parents))
        below = largest + torch.log(torch.zeros_like(lowest).scatter_add(1, parents, shifted))
        masses.append(below)
    return torch.cat(masses, dim=1)


def linear_cross_entropy(
    hidden_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor, targets_R: torch.Tensor
) -> torch.Tensor:
    """-> (R,) cross-entropy of `W h + b`. On CUDA, where torch has it (2.13), without ever holding (R, V) logits."""
    if hidden_RD.is_cuda and hasattr(F, "linear_cross_entropy"):
        dtype = _compute_dtype(hidden_RD)
        return F.linear_cross_entropy(
            hidden_RD.to(dtype),
            weight_VD.to(dtype),
            targets_R,
            linear_bias=bias_V.to(dtype),
            reduction="none",
            options=nn.LinearCrossEntropyOptions(),
        ).float()
    return F.cross_entropy(_softmax_dtype(F.linear(hidden_RD, weight_VD, bias_V)), targets_R, reduction="none")


class JointHead(Head):
    """The paper's joint head (App. C): one class for every combination of children of a neighborhood, K^n in all.

    Within a neighborhood the positions at the greatest height choose; the slots of the others at that level are known
    from where they stand, which leaves only the combinations with those slots feasible.
    """

    def __init__(self, config: TDLMConfig):
        super().__init__()
        self.size = config.neighborhood_size
        self.is_synchronous = config.neighborhood_jumps == "synchronous"
        self.concat = config.neighborhood_pooling == "concat"
        width = config.hidden_size * (self.size if self.concat else 1)
        self.proj = nn.Linear(width, config.branching_factor**self.size)

    def forward(self, hidden_RnD: torch.Tensor, z_Rn: torch.Tensor, tree: VocabTree) -> torch.Tensor:
        """-> (R, C) log-probabilities of the combinations, the slot of the first position most significant."""
        pooled = hidden_RnD.flatten(1) if self.concat else hidden_RnD.mean(1)
        feasible_RnK = self._feasible(z_Rn, tree)
        feasible_RC = feasible_RnK[:, 0]
        for position in range(1, self.size):
            feasible_RC = (feasible_RC[:, :, None] & feasible_RnK[:, position, None, :]).flatten(1)
        logits_RC = _softmax_dtype(self.proj(pooled)).masked_fill(~feasible_RC, float("-inf"))
        return torch.log_softmax(logits_RC, dim=-1)

    def _feasible(self, z_Rn: torch.Tensor, tree: VocabTree) -> torch.Tensor:
        """-> (R, n, K) slots that each position may take at the neighborhood's level."""
        heights_Rn = tree.node_height(z_Rn)
        level_R1 = (heights_Rn.amax(1, keepdim=True) - 1).clamp(min=0)
        waits_Rn = (heights_Rn > level_R1) & (heights_Rn > 0)
        known_Rn = tree.child_slot(tree.first_leaf(z_Rn), level_R1.expand_as(z_Rn))
        # Not one_hot, which waits for the device.
        known_RnK = known_Rn[..., None] == torch.arange(tree.branching_factor, device=z_Rn.device)
        children_RnK = tree.child_mask(z_Rn.masked_fill(~waits_Rn, tree.root_id))
        return torch.where(waits_Rn[..., None], children_RnK, known_RnK)

    def marginals(self, log_probs_RC: torch.Tensor, tree: VocabTree) -> torch.Tensor:
        """-> (R, n, K) log-probabilities of the slot of each position by itself."""
        # Finite in place of -inf: a sum over impossible combinations alone would have no gradient.
        joint = log_probs_RC.clamp(min=-1e30).unflatten(1, (tree.branching_factor,) * self.size)
        axes = range(1, self.size + 1)
        others = [[axis for axis in axes if axis != position] for position in axes]
        marginals = torch.stack([joint.logsumexp(dim) if dim else joint for dim in others], dim=1)
        return marginals.masked_fill(marginals < -1e29, float("-inf"))

    def log_probs(self, hidden_BLD, z_BL, tree, embedding_ND) -> torch.Tensor:
        hidden_RnD, z_Rn = self._neighborhoods(hidden_BLD), self._neighborhoods(z_BL)
        marginals_RnK = self.marginals(self(hidden_RnD, z_Rn, tree), tree)
        marginals_BLK = marginals_RnK.reshape(len(z_BL), -1, tree.branching_factor)[:, : z_BL.shape[1]]
        return marginals_BLK.masked_fill((z_BL < tree.vocab_size)[..., None], float("-inf"))

    def path_nll(self, hidden_BLD, z_BL, x_BL, is_scored_HBL, tree, embedding_ND):
        """Synchronous: the joint term, at the neighborhood's first scored position. Independent: marginals, one each.

        The joint term of positions that jump independently is no bound (it falls below the entropy): not offered.
        """
        scored_HRn = torch.stack([self._neighborhoods(scored_BL) for scored_BL in is_scored_HBL])
        level_M, row_M = scored_HRn.any(-1).nonzero(as_tuple=True)
        scored_Mn = scored_HRn[level_M, row_M]
        z_Mn, x_Mn, hidden_MnD = (self._neighborhoods(rows)[row_M] for rows in (z_BL, x_BL, hidden_BLD))
        tokens_Mn = torch.where(scored_Mn, x_Mn, tree.first_leaf(z_Mn))  # unscored labels are no tokens
        slots_Mn = tree.child_slot(tokens_Mn, level_M[:, None].expand_as(tokens_Mn))
        log_probs_MC = self(hidden_MnD, z_Mn, tree)
        sequence_M, neighborhood_M = row_M // (rows := -(-z_BL.shape[1] // self.size)), row_M % rows
        first_M = sequence_M * z_BL.shape[1] + neighborhood_M * self.size
        if self.is_synchronous:
            joint_class_M = (slots_Mn * self._places(tree, z_BL.device)).sum(-1)
            nll_M = F.nll_loss(log_probs_MC, joint_class_M, reduction="none")
            return level_M, first_M + scored_Mn.int().argmax(1), nll_M
        nll_Mn = -self.marginals(log_probs_MC, tree).gather(2, slots_Mn[..., None])[..., 0]
        term_R, position_R = scored_Mn.nonzero(as_tuple=True)
        return level_M[term_R], first_M[term_R] + position_R, nll_Mn[term_R, position_R]

    def draw_slots(self, hidden_BLD, z_BL, draw, tree, embedding_ND) -> torch.Tensor:
        joint_R = draw(self(self._neighborhoods(hidden_BLD), self._neighborhoods(z_BL), tree))
        slots_Rn = joint_R[:, None] // self._places(tree, z_BL.device) % tree.branching_factor
        return slots_Rn.reshape(len(z_BL), -1)[:, : z_BL.shape[1]]

    def _places(self, tree: VocabTree, device: torch.device) -> torch.Tensor:
        """(n,) what a slot counts in a joint class: K^(n-1), ..., K, 1."""
        return tree.branching_factor ** torch.arange(self.size - 1, -1, -1, device=device)

    def _neighborhoods(self, rows_BL: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (B * ceil(L / n), n, ...), filled up with zeros: token 0, which waits for nothing."""
        missing = -rows_BL.shape[1] % self.size
        padded = F.pad(rows_BL, (0, 0) * (rows_BL.ndim - 2) + (0, missing))
        return padded.reshape(-1, self.size, *rows_BL.shape[2:])


def gathered_child_scores(
    hidden_RD: torch.Tensor, rows_R: torch.Tensor, children_IK: torch.Tensor, embedding_ND: torch.Tensor
) -> torch.Tensor:
    """-> (R, K) `E[child] . h` from each row's own copy of its children: for few rows, or many parents (K = 2)."""
    dtype = _compute_dtype(hidden_RD)
    chunk = max(1, GATHERED_ELEMENTS // (children_IK.shape[1] * hidden_RD.shape[1]))
    scores = [
        torch.einsum("rd,rkd->rk", hidden.to(dtype), F.embedding(children_IK[rows], embedding_ND).to(dtype))
        for hidden, rows in zip(hidden_RD.split(chunk), rows_R.split(chunk), strict=True)
    ]
    return torch.cat(scores)


def grouped_child_scores(
    hidden_RD: torch.Tensor, rows_R: torch.Tensor, children_IK: torch.Tensor, embedding_ND: torch.Tensor
) -> torch.Tensor:
    """-> (R, K) `E[child] . h` as one product for each parent, over the rows sorted by parent."""
    dtype, K = _compute_dtype(hidden_RD), children_IK.shape[1]
    order_R = torch.argsort(rows_R)
    # zeros + scatter_add, not bincount: bincount waits for the device.
    counts_I = torch.zeros_like(children_IK[:, 0]).scatter_add_(0, rows_R, torch.ones_like(rows_R))
    padded_IK = F.pad(children_IK, (0, -K % 8))  # rows of grouped_mm must be multiples of 16 bytes
    blocks_IKD = F.embedding(padded_IK, embedding_ND).to(dtype)
    sorted_RK = _grouped_product(hidden_RD.to(dtype)[order_R], blocks_IKD.transpose(1, 2), counts_I)[:, :K]
    return torch.empty_like(sorted_RK).index_copy(0, order_R, sorted_RK)


def _grouped_product(rows_RD: torch.Tensor, blocks_IDK: torch.Tensor, counts_I: torch.Tensor) -> torch.Tensor:
    """Consecutive runs of `counts_I` rows, each times its own block -> (R, K)."""
    aligned = rows_RD.shape[1] * rows_RD.element_size() % 16 == 0
    if aligned and rows_RD.dtype != torch.float64:
        return F.grouped_mm(rows_RD, blocks_IDK, offs=counts_I.cumsum(0).to(torch.int32))
    runs = rows_RD.split(counts_I.tolist())
    return torch.cat([run @ block for run, block in zip(runs, blocks_IDK, strict=True)])


def _grouping_waits(hidden_RD: torch.Tensor) -> bool:
    """On CUDA, grouped_mm of float32 reads the group sizes on the host. Sampling must not wait; training may."""
    half = _compute_dtype(hidden_RD) in (torch.bfloat16, torch.float16)
    return hidden_RD.is_cuda and not half and not torch.is_grad_enabled()


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of matrix products here; grouped_mm is not on autocast's list."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


HEADS: dict[str, type[Head]] = {
    "shared": SharedHead,
    "tied": TiedHead,
    "node": NodeHead,
    "vocab": VocabHead,
    "joint": JointHead,
}

__all__ = [
    "HEADS",
    "ChildHead",
    "Head",
    "JointHead",
    "NodeHead",
    "SharedHead",
    "TiedHead",
    "VocabHead",
    "gathered_child_scores",
    "grouped_child_scores",
    "leaf_masses",
    "linear_cross_entropy",
]
