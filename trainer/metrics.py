"""`evaluate` metrics: the NELBO and its perplexity, and generative perplexity with what it says nothing without.

Made directly (`NelboMetric()`), not by `evaluate.load`, so nothing is downloaded.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from tdlm.trainer.generative import generative_perplexity, load_reference, mean_unigram_entropy, repetition
from tdlm.trainer.trainer import nelbo_metrics

NELBO_INPUTS = """
Args:
    predictions: nats of each sequence, its NELBO summed over its scored tokens (`model.nelbo(...).nelbo`).
    references: scored tokens of each sequence (`model.nelbo(...).num_tokens`).
    num_bytes (`int`, *optional*, in `compute`): UTF-8 bytes of all the text that was scored; adds `bpb`.
Returns:
    `nelbo` (nats per token), `ppl`, `num_tokens`, and with `num_bytes` also `bpb` (bits per byte) and `num_bytes`.
"""
GENERATIVE_INPUTS = """
Args:
    predictions: generated texts.
Returns:
    `generative_perplexity`, `unigram_entropy` (nats), `rep_2`, `rep_3` and `rep_4` (shares, 0 to 1).
"""


class NelboMetric(evaluate.Metric):
    """NELBO, perplexity and bits per byte over a corpus, weighted by token. All are upper bounds, never floored.

    ```python
    metric = NelboMetric()
    for batch in batches:
        bound = model.nelbo(**batch)
        metric.add_batch(predictions=bound.nelbo, references=bound.num_tokens)
    metric.compute(num_bytes=len(text.encode()))
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Upper bounds on the negative log-likelihood per token, the perplexity and the bits per byte.",
            citation="arXiv 2604.03537",
            inputs_description=NELBO_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, num_bytes: int | None = None) -> dict[str, float]:
        if num_bytes is not None and num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes} must be at least 1. Leave it out where the text is not known.")
        counts_B2 = np.zeros((len(references), 2))
        counts_B2[:, 0] = references
        if counts_B2[:, 0].sum() < 1 or counts_B2.min() < 0:
            raise ValueError(f"references={references} are no token counts: they must add up to at least one token.")
        if not np.isfinite(predictions).all():
            wrong = np.flatnonzero(~np.isfinite(predictions)).tolist()
            raise ValueError(f"predictions {wrong} are not finite, so there is no mean over the tokens. Look at those.")
        counts_B2[0, 1] = np.nan if num_bytes is None else num_bytes
        metrics = nelbo_metrics(EvalPrediction(np.asarray(predictions), counts_B2), num_samples=1)
        del metrics["nelbo_level_0"]  # the sums come with their levels added up
        return metrics


class GenerativePerplexityMetric(evaluate.Metric):
    """Perplexity of generated texts under a causal language model, with their entropy and repetition beside it.

    A text that says one word over and over has an excellent generative perplexity, a low entropy and a high rep_n.

    Args:
        model: causal language model, or its name or folder.
        tokenizer: its tokenizer; left out where `model` is a name.
        kwargs: those of `evaluate.Metric`.

    ```python
    GenerativePerplexityMetric("gpt2-large").compute(predictions=texts)
    ```
    """

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any):
        if isinstance(model, str):
            if tokenizer is not None:
                raise ValueError(f"model={model!r} is a name, whose own tokenizer is loaded. Leave the tokenizer out.")
            model, tokenizer = load_reference(model)
        elif tokenizer is None:
            raise ValueError(f"a loaded {type(model).__name__} needs its tokenizer. Pass both, or the model's name.")
        super().__init__(**kwargs)
        self.model, self.tokenizer = model, tokenizer

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Generative perplexity, unigram entropy and repetition, in tokens of the model that scores.",
            citation="seq-rep-n: Welleck et al., Neural Text Generation with Unlikelihood Training, arXiv 1908.04319",
            inputs_description=GENERATIVE_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: Any) -> dict[str, float]:
        texts = list(predictions)
        value = generative_perplexity(texts, self.model, self.tokenizer)  # first: it refuses texts without tokens
        rows = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        return {
            "generative_perplexity": value,
            "unigram_entropy": mean_unigram_entropy([row for row in rows if row]),
            **{f"rep_{n}": repetition(rows, n) for n in (2, 3, 4)},
        }


__all__ = ["GenerativePerplexityMetric", "NelboMetric"]
