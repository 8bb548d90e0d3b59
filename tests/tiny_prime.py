"""For the tests of MDM-Prime: small configurations, and the Bayes-optimal denoiser of digits."""

import itertools

import numpy as np
import torch
from tiny import NUM_POSITIONS, Source
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from tdlm import MDMPrimeConfig, MDMPrimeForDiffusionLM, VocabTree


def prime_config(vocab_size: int, /, **fields) -> MDMPrimeConfig:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 16}
    return MDMPrimeConfig.for_vocab(**{**sizes, "vocab_size": vocab_size, **fields})


def prime_model(vocab_size: int, seed: int = 0, **fields) -> MDMPrimeForDiffusionLM:
    """A small model with an opinion: blocks that are not the identity, and a head that is far from uniform."""
    torch.manual_seed(seed)
    model = MDMPrimeForDiffusionLM(prime_config(vocab_size, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
        model.head.proj.weight.normal_(std=0.5)
    return model.eval()


class BayesPrimeBackbone(nn.Module):
    """Digits of two tokens -> log p(token at each position | digits) by code, or the log-marginals of its digits."""

    def __init__(self, source: Source, model: MDMPrimeForDiffusionLM):
        super().__init__()
        self.source, self.code, self.head_type = source, model.code, model.config.head_type
        self.digits_VN = model.code.digits(torch.arange(model.config.vocab_size))
        self.embed_nodes = nn.Embedding(1, 1)  # unused; a model without parameters has no device

    def forward(self, input_ids, timesteps=None, **kwargs):
        # A batch has few distinct canvases: compute each once.
        values = self.code.base + 1
        places = values ** torch.arange(input_ids[0].numel())
        keys, index = torch.unique(input_ids.flatten(1) @ places, return_inverse=True)
        canvases = (keys[:, None] // places % values).view(-1, *input_ids.shape[1:])
        return BaseModelOutput(last_hidden_state=self._hidden(canvases)[index])

    def _hidden(self, z_BLN: torch.Tensor) -> torch.Tensor:
        agrees_BLV = ((z_BLN[:, :, None] == self.code.mask_digit) | (z_BLN[:, :, None] == self.digits_VN)).all(-1)
        x = self.source.x
        weights = self.source.p * agrees_BLV[:, 0, x[:, 0]] * agrees_BLV[:, 1, x[:, 1]]
        posterior_BLV = torch.stack(
            [
                torch.zeros(len(z_BLN), len(self.digits_VN), dtype=torch.float64).index_add(1, x[:, i], weights)
                for i in range(NUM_POSITIONS)
            ],
            dim=1,
        )
        posterior_BLV = (posterior_BLV / weights.sum(-1)[:, None, None]).clamp(min=1e-300)
        if self.head_type == "joint":
            return posterior_BLV[..., self.code.token_of_code].log()
        has_digit_VNK = nn.functional.one_hot(self.digits_VN, self.code.base).double()
        return torch.einsum("blv,vnk->blnk", posterior_BLV, has_digit_VNK).clamp(min=1e-300).log().flatten(2)


def bayes_prime_model(source: Source, **fields) -> MDMPrimeForDiffusionLM:
    """The package's model, its heads' restrictions and marginals included, with exact scores for its network's."""
    model = MDMPrimeForDiffusionLM(prime_config(source.tree.vocab_size, **fields)).eval()
    model.model = BayesPrimeBackbone(source, model)
    model.head.proj = nn.Identity()
    return model


def countable_source(vocab_size: int = 6, parts: int = 200) -> tuple[Source, torch.Tensor]:
    """A source whose probabilities are counts of rows, and the rows: their mean loss is the expected one."""
    source = Source(VocabTree.flat(vocab_size))
    counts = (source.p * parts).ceil().long()
    source.p = counts.double() / counts.sum()
    source.entropy = float(-(source.p * source.p.log()).sum())
    return source, source.x.repeat_interleave(counts, dim=0)


def exact_prime_nelbo(model: MDMPrimeForDiffusionLM, x: torch.Tensor, nodes: int = 12) -> float:
    """The package's own loss of the rows x, in nats a row: over t by Gauss-Legendre, over all masks by enumeration."""
    digits, total = model.code.digits(x), 0.0
    roots, weights = np.polynomial.legendre.leggauss(nodes)
    for mask in itertools.product([False, True], repeat=digits[0].numel()):
        z_t = digits.masked_fill(torch.tensor(mask).view(digits.shape[1:]), model.code.mask_digit)
        hidden = model.model(z_t).last_hidden_state
        for root, weight in zip(roots, weights, strict=True):
            t = torch.tensor((root + 1) / 2, dtype=torch.float64)
            probability = model.law.height_probabilities(t)[torch.tensor(mask).long()].prod()
            losses = model.level_losses(hidden, z_t, t.expand(len(x)), x, num_items_in_batch=len(x))
            total += weight / 2 * float(probability * losses.sum())
    return total
