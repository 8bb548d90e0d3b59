"""Heads: from a position's hidden state and the node that stands there to log-probabilities of the node's children.

All heads share one softmax: slots that the node does not have get -inf, so probability exactly 0.
Shape legend: R rows (positions that need a child), D hidden size, K child slots, I internal nodes, N nodes.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_tdlm import TDLMConfig
from .vocab_tree_tdlm import VocabTree

GATHERED_ELEMENTS = 2**26  # of embedding rows gathered at once, 256 MiB in float32


class ChildHead(nn.Module, ABC):
    """Scores the children of a node. Rows must stand at internal nodes; a leaf has no children to score."""

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

    def _masked_logits(self, hidden_RD, node_ids_R, tree, embedding_ND) -> torch.Tensor:
        logits_RK = self.logits(hidden_RD, node_ids_R, tree, embedding_ND)
        # float32 at least: a bf16 softmax over K children loses the tails.
        logits_RK = logits_RK.to(torch.promote_types(logits_RK.dtype, torch.float32))
        return logits_RK.masked_fill(~tree.child_mask(node_ids_R), float("-inf"))


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


HEADS: dict[str, type[ChildHead]] = {"shared": SharedHead, "tied": TiedHead}

__all__ = ["HEADS", "ChildHead", "SharedHead", "TiedHead", "gathered_child_scores", "grouped_child_scores"]
