"""The autoregressive baseline: transformers' own Llama on the crops and evaluation windows of the diffusion models."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Trainer

from tdlm.modeling_tdlm import IGNORE_INDEX
from tdlm.trainer.data import TDLMDataCollator, pad_token_id
from tdlm.trainer.trainer import nelbo_metrics
from tdlm.trainer.training_args import TDLMTrainingArguments


def causal_config(vocab_size: int, sizes: dict[str, Any], **fields: Any) -> LlamaConfig:
    """A Llama with the backbone's depth, width, heads and MLP width; one more position, for the token before a window.

    It has no token ids of its own: a window may hold several documents' ends, so end-of-text ends no generation.
    """
    sizes = {"intermediate_size": 4 * sizes["hidden_size"], **sizes}
    sizes["max_position_embeddings"] += 1
    token_ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return LlamaConfig(vocab_size=vocab_size, **{**sizes, **token_ids, "use_cache": False, **fields})


class CausalCollator:
    """`TDLMDataCollator` with end-of-text before every row, so that each of its tokens is predicted."""

    def __init__(self, pad_token_id: int, eos_token_id: int):
        self.collate = TDLMDataCollator(pad_token_id)
        self.eos_token_id = eos_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(examples)
        first = {"input_ids": self.eos_token_id, "labels": IGNORE_INDEX, "attention_mask": 1}
        return {
            name: F.pad(values, (1, 0), value=first[name]) if name in first else values
            for name, values in batch.items()
        }


class CausalTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose evaluation is exact: the summed negative log-likelihood of every token, in nats,
    under the same names as `TDLMTrainer`'s bounds (`nelbo`, `ppl`, `bpb`).
    """

    args: TDLMTrainingArguments

    def __init__(self, model=None, args=None, processing_class=None, **kwargs):
        # The tokenizer stays here: the base class would give the model its end-of-text, which then ends generation.
        super().__init__(
            model=model,
            args=args,
            data_collator=CausalCollator(pad_token_id(processing_class), processing_class.eos_token_id),
            compute_metrics=lambda prediction: nelbo_metrics(prediction, num_samples=1),
            **kwargs,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """-> mean loss, (B, 1) nats per sequence, and (B, 2) tokens and bytes."""
        inputs = self._prepare_inputs(inputs)
        num_bytes, labels = inputs.pop("num_bytes"), inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits_BLV = model(**inputs).logits
        nll_B1 = sequence_nll(logits_BLV, labels)[:, None]
        num_tokens = (labels[:, 1:] != IGNORE_INDEX).sum(1)
        return nll_B1.sum() / num_tokens.sum(), nll_B1, torch.stack([num_tokens, num_bytes], dim=1).double()


def sequence_nll(logits_BLV: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, L, V) logits of the next token, (B, L) labels, -100 not scored -> (B,) float64 nats per sequence."""
    nll_BL = F.cross_entropy(
        logits_BLV[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    return nll_BL.double().sum(1)


@torch.no_grad()
def sample_causal(
    model: LlamaForCausalLM, num_samples: int, max_new_tokens: int, eos_token_id: int, **settings: Any
) -> torch.Tensor:
    """-> (num_samples, max_new_tokens) token ids after one end-of-text; from torch's global source of randomness."""
    prompt = torch.full((num_samples, 1), eos_token_id, device=model.device)
    defaults = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens, "use_cache": True}
    config = GenerationConfig(**{**defaults, **settings})
    sequences = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return sequences[:, 1:]


__all__ = ["CausalCollator", "CausalTrainer", "causal_config", "sample_causal", "sequence_nll"]
