"""How good generated text is: its perplexity under another model, and its entropy, without which that says nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdlm.modeling_tdlm import IGNORE_INDEX
from tdlm.trainer.causal import sequence_nll
from tdlm.trainer.data import perplexity, unigram_entropy

BATCH_SIZE = 8


def load_reference(name_or_path: str, gguf_file: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, to score text with."""
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name_or_path, **options)


@torch.no_grad()
def generative_perplexity(texts: Sequence[str], model: Any, tokenizer: Any) -> float:
    """Perplexity of `texts` under `model`, over all tokens but each text's first, as the literature counts them.

    A text longer than the model's context is cut there. Raises `ValueError` if no text has two tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit] for text in texts]
    rows = sorted((torch.tensor(row) for row in rows if len(row) > 1), key=len)
    if not rows:
        raise ValueError(f"none of the {len(texts)} texts has the two tokens that a generative perplexity needs.")
    nats, num_tokens = 0.0, 0
    for start in range(0, len(rows), BATCH_SIZE):
        labels = torch.nn.utils.rnn.pad_sequence(
            rows[start : start + BATCH_SIZE], batch_first=True, padding_value=IGNORE_INDEX
        ).to(model.device)
        scored = labels != IGNORE_INDEX
        logits_BLV = model(labels.masked_fill(~scored, 0), attention_mask=scored.long()).logits
        nats += float(sequence_nll(logits_BLV, labels).sum())
        num_tokens += int(scored[:, 1:].sum())
    return perplexity(nats / num_tokens)


def mean_unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the token frequencies within one sample, averaged: low where samples repeat themselves."""
    return float(np.mean([unigram_entropy([sample], vocab_size=max(sample) + 1) for sample in samples]))


def repetition(samples: Sequence[Sequence[int]], n: int) -> float:
    """Share of a sample's n-grams that it has said before, averaged: seq-rep-n of Welleck et al. (1908.04319).

    0 where none repeats. Samples of fewer than n tokens have no n-gram and are left out; NaN if none is left.
    """
    shares = []
    for sample in samples:
        ngrams = [tuple(sample[start : start + n]) for start in range(len(sample) - n + 1)]
        if ngrams:
            shares.append(1 - len(set(ngrams)) / len(ngrams))
    return float(np.mean(shares)) if shares else float("nan")


__all__ = ["generative_perplexity", "load_reference", "mean_unigram_entropy", "repetition"]
