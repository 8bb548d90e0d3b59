"""Masked diffusion over the digits of token codes: MDM-Prime-v2 (2603.16077) with a likelihood bound that holds.

A token is a few digits, each masked by itself; the DiT backbone sees the sum of the digits' embeddings.
Shape legend: B sequences, L positions, D hidden size, V tokens, N digits of a token, K values of a digit (the base),
M = L N digits of a sequence, R rows (positions whose digits are scored or drawn), C scores of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_mdm_prime import MDMPrimeConfig
from .modeling_tdlm import IGNORE_INDEX, DiffusionLM, TDLMModel
from .process_tdlm import TRAINING_FLOOR, DirectLaw, HeightLaw, draw_uniforms
from .vocab_tree_tdlm import OfOneTokenizer

AUTO_MAP = {
    "AutoConfig": "configuration_mdm_prime.MDMPrimeConfig",
    "AutoModel": "modeling_mdm_prime.MDMPrimeModel",
    "AutoModelForCausalLM": "modeling_mdm_prime.MDMPrimeForDiffusionLM",
}


# ---- the code ----


class TokenCode(OfOneTokenizer):
    """Every token's code, a random place in the vocabulary, written as N digits in base K, the highest first.

    Codes are exactly the integers below V. So digits revealed so far belong to some token if and only if the smallest
    code that agrees with them, zeros in the other places, is below V. A masked digit is K, one above the last value.

    Buffers:
        code_of_token: (V,) int64, a permutation.
        token_of_code: (V,) int64, its inverse.
        vocab_hash: (32,) uint8, see `hash_vocabulary`; zeros while the code belongs to no tokenizer.
    """

    code_of_token: torch.Tensor
    token_of_code: torch.Tensor
    too_small_for = (
        "the model codes for vocab_size={vocab_size} tokens. Make a model for this tokenizer "
        "(`MDMPrimeConfig.for_vocab`)."
    )
    made_for_another = (
        "these token codes were made for another tokenizer: the hash of the tokenizer's vocabulary differs "
        "from the one stored with the codes. Use the tokenizer saved beside the model, or train a new model."
    )

    def __init__(self, config: MDMPrimeConfig):
        super().__init__()
        self.vocab_size, self.base, self.num_digits = config.vocab_size, config.base, config.num_digits
        self.shuffle_seed = config.shuffle_seed
        # Persistent, because non-persistent buffers come back uninitialised from a model built on the meta device.
        self.register_buffer("code_of_token", torch.zeros(self.vocab_size, dtype=torch.int64))
        self.register_buffer("token_of_code", torch.zeros(self.vocab_size, dtype=torch.int64))

    @property
    def mask_digit(self) -> int:
        return self.base

    def init_weights(self) -> None:
        """Shuffle the tokens, as the seed says; they belong to no tokenizer."""
        generator = torch.Generator().manual_seed(self.shuffle_seed)
        # On the CPU whatever the default device is: one seed, one order.
        order = torch.randperm(self.vocab_size, generator=generator, device="cpu")
        init.copy_(self.code_of_token, order)
        init.copy_(self.token_of_code, order.argsort())
        init.zeros_(self.vocab_hash)

    # ---- look-ups ----

    def digits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(...) token ids -> (..., N) digits."""
        return self.code_of_token[token_ids][..., None] // self._places(token_ids.device) % self.base

    def tokens(self, digits: torch.Tensor) -> torch.Tensor:
        """(..., N) digits, none masked -> (...) token ids."""
        return self.token_of_code[self._revealed(digits).sum(-1)]

    def possible(self, digits: torch.Tensor) -> torch.Tensor:
        """(..., N) digits -> (..., N, K) bool: could this digit be k in some token, the other digits being as given?"""
        places, revealed = self._places(digits.device), self._revealed(digits)
        of_others = revealed.sum(-1, keepdim=True) - revealed
        smallest = of_others[..., None] + torch.arange(self.base, device=digits.device) * places[:, None]
        return smallest < self.vocab_size

    def _places(self, device: torch.device) -> torch.Tensor:
        """(N,) what a digit counts for: K^(N-1), ..., K, 1. Made on the device, so that nothing waits for a copy."""
        return self.base ** torch.arange(self.num_digits - 1, -1, -1, device=device)

    def _revealed(self, digits: torch.Tensor) -> torch.Tensor:
        """(..., N) digits -> (..., N) what each adds to the code, masked ones nothing."""
        return digits.masked_fill(digits == self.mask_digit, 0) * self._places(digits.device)

    # ---- validation ----

    def validate(self) -> "TokenCode":
        """Raise `ValueError` unless the two tables are a permutation of the vocabulary and its inverse."""
        everything = torch.arange(self.vocab_size)
        codes, tokens = self.code_of_token.detach().cpu(), self.token_of_code.detach().cpu()
        for name, table in (("code_of_token", codes), ("token_of_code", tokens)):
            if not torch.equal(table.sort().values, everything):
                raise ValueError(f"not a token code: {name} must hold each of 0..{self.vocab_size - 1} once.")
        if not torch.equal(tokens[codes], everything):
            token = int(torch.nonzero(tokens[codes] != everything)[0])
            raise ValueError(
                f"not a token code: token {token} has code {int(codes[token])}, which token_of_code gives to token "
                f"{int(tokens[codes[token]])}."
            )
        return self


# ---- heads: hidden states -> scores -> logits of one digit ----


class PrimeHead(nn.Module, ABC):
    """Scores of a position, from which the logits of each digit are read once the digits revealed are taken in."""

    proj: nn.Module

    def forward(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """-> (R, C) scores in float32 at least: a bf16 softmax loses the tails."""
        scores_RC = self.proj(hidden_RD)
        return scores_RC.to(torch.promote_types(scores_RC.dtype, torch.float32))

    @abstractmethod
    def restrict(self, scores_RC: torch.Tensor, z_RN: torch.Tensor) -> torch.Tensor:
        """-> (R, C) scores that take the revealed digits of z into account."""

    @abstractmethod
    def digit_logits(self, scores_RC: torch.Tensor, digit: int) -> torch.Tensor:
        """-> (R, K) logits of one digit's values; those of impossible values are arbitrary, but finite."""


class DigitHead(PrimeHead):
    """A softmax a digit, each by itself: N K rows. Revealed digits decide only what is possible."""

    def __init__(self, config: MDMPrimeConfig):
        super().__init__()
        self.base = config.base
        self.proj = nn.Linear(config.hidden_size, config.num_digits * config.base)

    def restrict(self, scores_RC, z_RN) -> torch.Tensor:
        return scores_RC

    def digit_logits(self, scores_RC, digit) -> torch.Tensor:
        return scores_RC[:, digit * self.base : (digit + 1) * self.base]


class JointHead(PrimeHead):
    """Logits of all tokens, in the order of their codes, of which the digits' marginals are scored: V rows."""

    def __init__(self, config: MDMPrimeConfig):
        super().__init__()
        self.base, self.num_digits = config.base, config.num_digits
        self.proj = nn.Linear(config.hidden_size, config.vocab_size)
        # The first digit takes only the values that some code needs, so a block of scores is less than 2 V wide.
        first = -(-config.vocab_size // self.base ** (self.num_digits - 1))
        self.values_of_digit = [first] + [self.base] * (self.num_digits - 1)
        self.num_spare_codes = first * self.base ** (self.num_digits - 1) - config.vocab_size

    def forward(self, hidden_RD) -> torch.Tensor:
        scores_RV = super().forward(hidden_RD)
        return F.pad(scores_RV, (0, self.num_spare_codes), value=_lowest(scores_RV))

    def restrict(self, scores_RC, z_RN) -> torch.Tensor:
        """Only codes that agree with every revealed digit keep their score."""
        agrees_RC = torch.ones(len(z_RN), 1, dtype=torch.bool, device=z_RN.device)
        for digit, num_values in enumerate(self.values_of_digit):
            z_R1 = z_RN[:, digit, None]
            agrees_RK = (z_R1 == self.base) | (z_R1 == torch.arange(num_values, device=z_RN.device))
            agrees_RC = (agrees_RC[:, :, None] & agrees_RK[:, None]).flatten(1)
        # Finite: the gradient of a logsumexp over nothing but -inf is NaN.
        return scores_RC.masked_fill(~agrees_RC, _lowest(scores_RC))

    def digit_logits(self, scores_RC, digit) -> torch.Tensor:
        """log sum of exp over the codes with each value of the digit."""
        num_values, place = self.values_of_digit[digit], self.base ** (self.num_digits - 1 - digit)
        logits_RK = scores_RC.unflatten(1, (-1, num_values, place)).logsumexp((1, 3))
        return F.pad(logits_RK, (0, self.base - num_values), value=_lowest(logits_RK))


HEADS: dict[str, type[PrimeHead]] = {"digit": DigitHead, "joint": JointHead}


def _lowest(scores: torch.Tensor) -> float:
    return torch.finfo(scores.dtype).min


# ---- backbone ----


class DigitEmbedding(nn.Embedding):
    """(B, L, N) digits, the base where one is masked -> (B, L, D): the embeddings of a token's digits, added up."""

    def __init__(self, config: MDMPrimeConfig):
        super().__init__(config.num_nodes, config.hidden_size)
        self.num_digits, self.num_values = config.num_digits, config.base + 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.ndim != 3 or input.shape[2] != self.num_digits:
            raise ValueError(
                f"input_ids has shape {tuple(input.shape)}; the model sees digits, (batch, length, num_digits="
                f"{self.num_digits}). `model.code.digits` gives those of token ids."
            )
        return super().forward(input + self.num_values * torch.arange(self.num_digits, device=input.device)).sum(-2)


class MDMPrimeModel(TDLMModel):
    """The backbone over digits: its `input_ids` are (B, L, N), z_t with `base` where a digit is masked."""

    config: MDMPrimeConfig  # type: ignore[assignment]  # same backbone fields
    config_class = MDMPrimeConfig
    _auto_map = AUTO_MAP
    _keys_to_ignore_on_load_unexpected = [r"^code\.", r"^head\."]

    @staticmethod
    def _make_embedding(config: Any) -> nn.Embedding:
        return DigitEmbedding(config)


# ---- the diffusion language model ----


class MDMPrimeForDiffusionLM(DiffusionLM):
    """Masked diffusion over the digits of shuffled token codes, with the partially masked tokens of MDM-Prime-v2.

    Published were the code, the network and a training objective that charges, for every token with masked digits, the
    joint log-probability of all of them, at the rate at which a single digit is unmasked. But digits that are masked
    independently come back one at a time, each drawn from its own marginal given z_t, and a bound has to charge just
    that; the joint charges the later ones as if they had already seen the earlier. So the objective is no bound: with
    the best possible network, two bits that always equal each other, one toss of a fair coin or 0.693 nats, come out
    at 0.347. The authors retracted the perplexities that rested on it, and it is not in this package.

    The loss here is that of masked diffusion on the L N digits, which the backbone sees N to a position: at the
    reverse rate of a digit, the sum over masked digits of -log p(digit | z_t), by a softmax a digit or by the
    marginals of a distribution over tokens (`head_type`). Without a clip it is a true upper bound on the negative
    log-likelihood. Values of a digit that would leave no token have probability exactly 0, in the loss and in
    sampling, so a digit that the others decide costs nothing and no sample is without a token.
    """

    config: MDMPrimeConfig  # type: ignore[assignment]  # same backbone fields
    config_class = MDMPrimeConfig
    _auto_map = AUTO_MAP
    vocabulary_module = "code"

    def __init__(self, config: MDMPrimeConfig):
        super().__init__(config)
        self.model = MDMPrimeModel(config)
        self.head: PrimeHead = HEADS[config.head_type](config)
        self.code = TokenCode(config)
        # A digit is a tree of height 1: the value, and above it the mask.
        self.law: HeightLaw = DirectLaw(1, config.schedule)
        self.noise_draws_per_token = config.num_digits
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TokenCode):
            module.init_weights()

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            "a model over digits has no embedding a token, so its vocabulary cannot be resized. Make a model for the "
            "new one (`MDMPrimeConfig.for_vocab`)."
        )

    # ---- scores ----

    def child_log_probs(self, hidden_BLD: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """(B, L, D) hidden states, (B, L, N) digits -> (B, L, N, K) log-probabilities; -inf at revealed digits."""
        log_probs = self._digit_log_probs(hidden_BLD.flatten(0, 1), z_t.flatten(0, 1)).unflatten(0, z_t.shape[:2])
        return log_probs.masked_fill((z_t != self.code.mask_digit)[..., None], float("-inf"))

    def _digit_log_probs(self, hidden_RD: torch.Tensor, z_RN: torch.Tensor) -> torch.Tensor:
        """-> (R, N, K) log-probabilities of each digit's values, all from one hidden state; -inf if impossible."""
        scores_RC = self.head.restrict(self.head(hidden_RD), z_RN)
        digits = range(self.config.num_digits)
        logits_RNK = torch.stack([self.head.digit_logits(scores_RC, digit) for digit in digits], dim=1)
        return logits_RNK.masked_fill(~self.code.possible(z_RN), float("-inf")).log_softmax(-1)

    def _digit_nll(
        self, hidden_BLD: torch.Tensor, z_t: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (R,) flat scored positions with a masked digit, (R, N) -log p(digit | z_t), 0 where it is not masked."""
        waits_BLN = (z_t == self.code.mask_digit) & (labels != IGNORE_INDEX)[..., None]
        (position_R,) = waits_BLN.any(-1).flatten().nonzero(as_tuple=True)
        z_RN = z_t.flatten(0, 1)[position_R]
        log_probs_RNK = self._digit_log_probs(hidden_BLD.flatten(0, 1)[position_R], z_RN)
        x_RN = self.code.digits(labels.flatten()[position_R])
        nll_RN = -log_probs_RNK.gather(-1, x_RN[..., None]).squeeze(-1)
        return position_R, nll_RN.masked_fill(z_RN != self.code.mask_digit, 0.0)

    # ---- training loss ----

    def noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) clean token ids, labels, (B,) times, (B, L N) uniforms -> (B, L, N) digits z_t ~ q(. | x)."""
        return self._mask(input_ids, self.law.sample_heights(t, uniforms).bool() & self._scored_digits(labels))

    def _mask(self, input_ids: torch.Tensor, is_masked_BM: torch.Tensor) -> torch.Tensor:
        digits_BLN = self.code.digits(input_ids)
        return digits_BLN.masked_fill(is_masked_BM.view_as(digits_BLN), self.code.mask_digit)

    def _scored_digits(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, L) labels -> (B, L N) bool, True at the digits of scored tokens."""
        return (labels != IGNORE_INDEX).repeat_interleave(self.config.num_digits, dim=1)

    def level_losses(
        self,
        hidden_BLD: torch.Tensor,
        z_t: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """-> (N,) terms of the loss by digit, nats per item: rate times -log p. In training floored and clipped."""
        position_R, nll_RN = self._digit_nll(hidden_BLD, z_t, labels)
        weights_B = self.law.reverse_rates(timesteps, TRAINING_FLOOR if self.training else 0.0)[:, 0]
        if self.training and self.config.loss_weight_clip is not None:
            weights_B = weights_B.clamp(max=self.config.loss_weight_clip)
        weights_R = weights_B[position_R // labels.shape[1]].to(nll_RN.dtype)
        losses_N = (weights_R[:, None] * nll_RN).sum(0)
        scored = labels != IGNORE_INDEX
        return losses_N / (scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    # ---- the bound ----

    def _nelbo_draw(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        u_B: torch.Tensor,
        generator: torch.Generator | None,
        **context: Any,
    ) -> torch.Tensor:
        """One draw of the jump-conditioned estimator -> (B, N) nats per sequence and digit."""
        t, _ = self.law.sample_jump_times(u_B)
        is_scored_BM = self._scored_digits(labels)
        u_masks, u_jumper = (draw_uniforms(is_scored_BM.shape, generator, input_ids.device) for _ in range(2))
        jumper_B1 = torch.where(is_scored_BM, u_jumper, -1.0).argmax(1, keepdim=True)
        is_masked_BM = self.law.sample_heights(t, u_masks).bool().scatter(1, jumper_B1, True) & is_scored_BM
        z_t = self._mask(input_ids, is_masked_BM)
        position_R, nll_RN = self._digit_nll(self.model(z_t, t, **context).last_hidden_state, z_t, labels)
        sums_BN = nll_RN.new_zeros(len(labels), self.config.num_digits)
        sums_BN = sums_BN.index_add(0, position_R // labels.shape[1], nll_RN)
        # scored / masked: the mean over the masked digits stands for every digit of the sequence.
        return sums_BN * (is_scored_BM.sum(1) / is_masked_BM.sum(1).clamp(min=1))[:, None]

    # ---- generation ----

    def _absorbed_canvas(self, input_ids: torch.Tensor, num_new: int, holes: torch.Tensor | None) -> torch.Tensor:
        """(B, P) prompts, (B, P) holes -> the canvas at t = 1: the prompts' digits, holes and new tokens masked."""
        given = self.code.digits(input_ids)
        given = given if holes is None else given.masked_fill(holes[..., None], self.code.mask_digit)
        return F.pad(given, (0, 0, 0, num_new), value=self.code.mask_digit)

    def _tokens(self, canvas: torch.Tensor) -> torch.Tensor:
        return self.code.tokens(canvas)

    def _draft(self, canvas: torch.Tensor) -> torch.Tensor:
        return self.code.tokens(canvas).masked_fill(~self._is_token(canvas), self.config.vocab_size)

    def _is_token(self, canvas: torch.Tensor) -> torch.Tensor:
        return (canvas != self.code.mask_digit).all(-1)

    def _pick_child(self, draw: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """(R, K) log-probabilities of a digit's values -> (R,) values."""
        return draw(args[0])

    def _denoise(
        self,
        canvas: torch.Tensor,
        times: list[float],
        context: dict[str, Any],
        pick: Callable[..., torch.Tensor],
        generator: torch.Generator | None,
        show: Callable[[torch.Tensor], None],
    ) -> tuple[torch.Tensor, int]:
        """(B, L, N) canvas with masked digits -> one without, and the number of forward passes."""
        times_T, posteriors_T = self._step_laws(times, canvas.device)
        for step in range(len(posteriors_T)):
            is_masked = canvas == self.code.mask_digit
            u = draw_uniforms(canvas.shape, generator, canvas.device, torch.float64)
            jumps = is_masked & (self.law.sample_posterior(is_masked.long(), posteriors_T[step], u) == 0)
            hidden_BLD = self.model(canvas, times_T[step].expand(len(canvas)), **context).last_hidden_state
            canvas = self._reveal(canvas, jumps, hidden_BLD, pick)
            show(canvas)
        assert not bool((canvas == self.code.mask_digit).any()), "a digit is left masked"
        return canvas, len(posteriors_T)

    def _reveal(
        self,
        canvas: torch.Tensor,
        jumps: torch.Tensor,
        hidden_BLD: torch.Tensor,
        pick: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Draw the digits that jump, those of one token one after another, each in sight of what has been drawn."""
        (position_R,) = jumps.any(-1).flatten().nonzero(as_tuple=True)
        z_RN, jumps_RN = canvas.flatten(0, 1)[position_R], jumps.flatten(0, 1)[position_R]
        scores_RC = self.head(hidden_BLD.flatten(0, 1)[position_R])
        for digit in range(self.config.num_digits):
            scores_RC = self.head.restrict(scores_RC, z_RN)
            logits_RK = self.head.digit_logits(scores_RC, digit)
            drawn_R = pick(logits_RK.masked_fill(~self.code.possible(z_RN)[:, digit], float("-inf")).log_softmax(-1))
            z_RN[:, digit] = torch.where(jumps_RN[:, digit], drawn_R, z_RN[:, digit])
        return canvas.flatten(0, 1).index_copy(0, position_R, z_RN).view_as(canvas)


__all__ = ["MDMPrimeForDiffusionLM", "MDMPrimeModel", "TokenCode"]
