"""For all tests: small trees, a tiny source over one, and the Bayes-optimal denoiser of that source."""

import itertools

import torch
from scipy import stats
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree
from tdlm.heads_tdlm import ChildHead
from tdlm.process_tdlm import HeightLaw, JumpSample

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
    """A small model whose blocks are not the identity, as adaLN-zero makes them at the start."""
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


class WholePathLaw(HeightLaw):
    """A law unlike the paper's, to test what every law shares: one jump from a token to the root, at rate 1/(1-t)."""

    thresholds = (0.0, 1.0)

    def __init__(self, height: int):
        super().__init__(height)
        self.jumps = [(0, height)]

    @classmethod
    def from_config(cls, config):
        return cls(config.height)

    def height_probabilities(self, t):
        m = torch.zeros(*t.shape, self.height + 1, dtype=torch.float64)
        m[..., 0], m[..., -1] = 1 - t, t
        return m

    def kernel(self, s, t):
        kernel = torch.eye(self.height + 1, dtype=torch.float64)
        kernel[0, 0] = (1 - t) / (1 - s) if s < 1 else 1.0
        kernel[0, -1] = 1 - kernel[0, 0]
        return kernel

    def reverse_rates(self, t, floor=0.0):
        return 1 / t.to(torch.float64).clamp(min=floor)[..., None]

    def sample_jump_times(self, u):
        return JumpSample(u.to(torch.float64), torch.zeros_like(u, dtype=torch.int64))

    def sampling_times(self, steps_per_level):
        (steps,) = steps_per_level
        return [1 - i / steps for i in range(steps)] + [0.0]

    def split_steps(self, num_denoising_steps):
        return [num_denoising_steps]


class BayesBackbone(nn.Module):
    """Node ids -> the exact p(x_i | z) over tokens, in the place of hidden states. z alone decides; t does not."""

    def __init__(self, source: Source):
        super().__init__()
        tree, x = source.tree, source.x
        below = torch.zeros(tree.num_nodes, tree.vocab_size, dtype=torch.bool)
        for height in range(tree.height + 1):
            below[tree.ancestors[height], torch.arange(tree.vocab_size)] = True
        possible = below[:, None, x[:, 0]] & below[None, :, x[:, 1]]  # (N, N, outcomes)
        weights = possible * source.p
        table = torch.zeros(tree.num_nodes, tree.num_nodes, NUM_POSITIONS, tree.vocab_size, dtype=torch.float64)
        for position in range(NUM_POSITIONS):
            table[:, :, position].index_add_(2, x[:, position], weights)
        self.table = table / weights.sum(-1)[..., None, None]
        self.embed_nodes = nn.Embedding(1, 1)  # unused; a model without parameters has no device

    def forward(self, input_ids, timesteps=None, **kwargs):
        return BaseModelOutput(last_hidden_state=self.table[input_ids[:, 0], input_ids[:, 1]])


class BayesHead(ChildHead):
    """p(x_i | z) over tokens -> log-probabilities of the children: the mass of the leaves below each, renormalised."""

    def __init__(self, tree: VocabTree):
        super().__init__()
        self.below = torch.zeros(tree.num_nodes, tree.vocab_size, dtype=torch.float64)
        for height in range(tree.height + 1):
            self.below[tree.ancestors[height], torch.arange(tree.vocab_size)] = 1.0

    def logits(self, hidden_RD, node_ids_R, tree, embedding_ND):
        children = tree.child_ids[node_ids_R - tree.vocab_size].clamp(min=0)
        return torch.einsum("rv,rkv->rk", hidden_RD, self.below[children]).clamp(min=1e-300).log()


def bayes_model(source: Source, **fields) -> TDLMForDiffusionLM:
    """The package's model with the Bayes-optimal child distribution in the place of its network."""
    model = TDLMForDiffusionLM(tiny_config(source.tree, **fields), source.tree).eval()
    model.model = BayesBackbone(source)
    model.head = BayesHead(source.tree)
    return model


def chi_square_p(source: Source, draws: torch.Tensor) -> float:
    """p-value of (draws, 2) sampled pairs against the source."""
    outcome = draws[:, 0] * source.tree.vocab_size + draws[:, 1]
    observed = torch.bincount(outcome, minlength=len(source.p)).double()
    expected = source.p * len(draws)
    rare = expected < 5  # pooled, as the statistic needs
    pool = [torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]) for counts in (observed, expected)]
    keep = pool[1] > 0
    return float(stats.chisquare(pool[0][keep].numpy(), pool[1][keep].numpy()).pvalue)
