"""For all tests: small trees, a tiny source over one, and the Bayes-optimal denoiser of that source."""

import itertools

import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutput

from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree
from tdlm.heads_tdlm import ChildHead

# height 3                root (16)
#               ____________|___________
# height 2     13          14          15
#           ___|___         |       ___|___
# height 1  8     9        10      11     12
#          / \    |        |      / | \    |
# height 0 0 1    2        3      4 5 6    7
EIGHT_LEAVES = [[[0, 1], [2]], [[3]], [[4, 5, 6], [7]]]
# Six leaves, branches of different depth: 5 hangs right below the root and is padded.
SIX_LEAVES = [[[0, 1], [2]], [3, 4], 5]
NUM_POSITIONS = 2


def tiny_config(tree: VocabTree, **fields) -> TDLMConfig:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
    return TDLMConfig.for_tree(tree, **{**sizes, **fields})


def tiny_model(tree: VocabTree, seed: int = 0, **fields) -> TDLMForDiffusionLM:
    """A small model whose blocks do something, and see the time if they are given it."""
    torch.manual_seed(seed)
    model = TDLMForDiffusionLM(tiny_config(tree, **fields), tree)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


class Source:
    """A joint distribution over pairs of tokens, with everything about it known by enumeration."""

    def __init__(self, tree: VocabTree, seed: int = 0):
        self.tree = tree
        self.x = torch.tensor(list(itertools.product(range(tree.vocab_size), repeat=NUM_POSITIONS)))
        generator = torch.Generator().manual_seed(seed)
        p = torch.rand(len(self.x), generator=generator, dtype=torch.float64) ** 3
        self.p = p / p.sum()
        self.entropy = float(-(self.p * self.p.log()).sum())

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.x[torch.multinomial(self.p, count, replacement=True, generator=generator)]

    def level_entropies(self) -> list[float]:
        """H(A_l(x) | A_{l+1}(x)) of both positions together, for every level l."""
        joint = [self._entropy_of(self.tree.ancestors[height][self.x]) for height in range(self.tree.height + 1)]
        return [lower - upper for lower, upper in itertools.pairwise(joint)]

    def _entropy_of(self, values: torch.Tensor) -> float:
        _, index = torch.unique(values, dim=0, return_inverse=True)
        p = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add(0, index, self.p)
        return float(-(p * p.log()).sum())


BAYES_WIDTH = 40  # of the hidden states that carry the exact distributions, as log-masses


class BayesBackbone(nn.Module):
    """Node ids -> log p(.| z) under the source, in the place of hidden states. z alone decides; t does not.

    What a hidden state holds fits the head, whose matrix is the identity: the log-mass of every node (tied, node,
    vocab), of every child of the node that stands there (shared) or of every joint class (joint).
    """

    def __init__(self, source: Source, head_type: str, neighborhood_size: int = NUM_POSITIONS):
        super().__init__()
        self.neighborhood_size = neighborhood_size
        tree, x = source.tree, source.x
        self.tree, self.x = tree, x
        self.below = torch.zeros(tree.num_nodes, tree.vocab_size, dtype=torch.bool)
        for height in range(tree.height + 1):
            self.below[tree.ancestors[height], torch.arange(tree.vocab_size)] = True
        z = torch.cartesian_prod(*[torch.arange(tree.num_nodes)] * NUM_POSITIONS)
        weights = self.below[z[:, 0]][:, x[:, 0]] * self.below[z[:, 1]][:, x[:, 1]] * source.p  # (N^2, outcomes)
        masses_of = {"joint": self._joint, "shared": self._children}.get(head_type, self._nodes)
        masses = masses_of(z, weights / weights.sum(-1, keepdim=True))
        features = F.pad(masses.clamp(min=1e-300).log(), (0, BAYES_WIDTH - masses.shape[-1]))
        self.table = features.unflatten(0, (tree.num_nodes, tree.num_nodes))
        self.embed_nodes = nn.Embedding.from_pretrained(torch.eye(tree.num_nodes, BAYES_WIDTH, dtype=torch.float64))

    def forward(self, input_ids, timesteps=None, **kwargs):
        return BaseModelOutput(last_hidden_state=self.table[input_ids[:, 0], input_ids[:, 1]])

    def _nodes(self, z, p_outcomes):
        tokens = F.one_hot(self.x, self.tree.vocab_size).double()  # (outcomes, positions, V)
        return torch.einsum("bo,opv,nv->bpn", p_outcomes, tokens, self.below.double())

    def _children(self, z, p_outcomes):
        children = self.tree.child_ids[(z - self.tree.vocab_size).clamp(min=0)].clamp(min=0)
        return self._nodes(z, p_outcomes).gather(2, children)

    def _joint(self, z, p_outcomes):
        level = (self.tree.node_height(z).amax(1) - 1).clamp(min=0)
        slots = self.tree.child_slots[level][:, self.x]  # (B, outcomes, positions)
        K, known = self.tree.branching_factor, self.neighborhood_size - NUM_POSITIONS  # slot 0 behind the end
        joint_class = (slots[..., 0] * K + slots[..., 1]) * K**known
        masses = torch.zeros(len(z), K**self.neighborhood_size, dtype=torch.float64)
        return masses.scatter_add(1, joint_class, p_outcomes)[:, None].expand(-1, NUM_POSITIONS, -1)


def bayes_model(source: Source, **fields) -> TDLMForDiffusionLM:
    """The package's model and heads, with the Bayes-optimal distribution in the place of what a network would say."""
    if fields.get("head_type") == "joint":
        fields = {"neighborhood_size": NUM_POSITIONS, **fields}
    config = tiny_config(source.tree, hidden_size=BAYES_WIDTH, **fields)
    model = TDLMForDiffusionLM(config, source.tree).eval().double()
    model.model = BayesBackbone(source, config.head_type, config.neighborhood_size)
    head = model.head
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    matrix = getattr(head, "proj", head).weight if config.head_type not in ("tied",) else None
    if matrix is not None:
        torch.nn.init.eye_(matrix)
    return model


class CachedHead(ChildHead):
    """A head's log-probabilities for every pair of nodes, position and parent, looked up: for many draws."""

    def __init__(self, model: TDLMForDiffusionLM):
        super().__init__()
        tree, table = model.tree, model.model.table.flatten(0, 2)
        nodes = torch.arange(tree.vocab_size, tree.num_nodes)
        rows = [model.head(table, node.expand(len(table)), tree, model.model.embed_nodes.weight) for node in nodes]
        self.cache = torch.stack(rows, dim=1).detach()  # (N * N * positions, I, K)

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND):
        return self.cache[hidden_RD[:, 0].long(), node_ids_R - tree.vocab_size].nan_to_num(nan=0.0)


class IndexBackbone(nn.Module):
    """Node ids -> the row of a `CachedHead`, in the place of hidden states."""

    def __init__(self, num_nodes: int):
        super().__init__()
        self.num_nodes, self.embed_nodes = num_nodes, nn.Embedding(1, 1)

    def forward(self, input_ids, timesteps=None, **kwargs):
        row = (input_ids[:, :1] * self.num_nodes + input_ids[:, 1:]) * NUM_POSITIONS + torch.arange(NUM_POSITIONS)
        return BaseModelOutput(last_hidden_state=row[..., None].double())


def bayes_sampler(source: Source, **fields) -> TDLMForDiffusionLM:
    """`bayes_model` with its answers looked up, for many draws. A joint head is small enough as it is."""
    model = bayes_model(source, **fields)
    if model.config.head_type != "joint":
        model.head = CachedHead(model)
        model.model = IndexBackbone(source.tree.num_nodes)
    return model


class Sequences(Dataset):
    """Sequences of tokens with a little structure; of unequal length, or partly context, if asked."""

    def __init__(self, count: int, uneven: bool = False, context: int = 0):
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, 50, (count,), generator=generator)
        lengths = [12 - (i % 5 if uneven else 0) for i in range(count)]
        self.rows = [(start + torch.arange(n) * 3) % 50 for start, n in zip(starts, lengths, strict=True)]
        self.context = context

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        labels = self.rows[index].clone()
        labels[: self.context * (index % 2)] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class Recorder:
    """A streamer that keeps what it is shown."""

    def __init__(self):
        self.canvases, self.confirmed, self.ended = [], [], False

    def put(self, value):
        self.confirmed.append(value)

    def put_draft(self, value):
        self.canvases.append(value)

    def end(self):
        self.ended = True


def chi_square_p(source: Source, draws: torch.Tensor) -> float:
    """p-value of (draws, 2) sampled pairs against the source."""
    outcome = draws[:, 0] * source.tree.vocab_size + draws[:, 1]
    observed = torch.bincount(outcome, minlength=len(source.p)).double()
    expected = source.p * len(draws)
    rare = expected < 5  # pooled, as the statistic needs
    pool = [torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]) for counts in (observed, expected)]
    keep = pool[1] > 0
    return float(stats.chisquare(pool[0][keep].numpy(), pool[1][keep].numpy()).pvalue)
