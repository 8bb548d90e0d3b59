"""The models of this package in EleutherAI's lm-evaluation-harness, as its model `tdlm`.

The harness finds models by what has been imported, so its command line is started from this module, which then takes
every option of `lm_eval`:

    python -m tdlm.trainer.harness --model tdlm --model_args pretrained=runs/mine,num_samples=64 \
        --tasks lambada_openai --batch_size 16
"""

import math
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

from tdlm.trainer.data import TDLMDataCollator, pad_token_id
from tdlm.trainer.scoring import order_log_likelihood
from tdlm.trainer.trainer import MODEL_TYPES, base_model

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError("tdlm.trainer.harness needs lm-evaluation-harness: pip install 'tdlm[lm-eval]'") from error

logger = logging.get_logger(__name__)

SCORINGS = {
    "bound": "Monte Carlo estimates of a LOWER BOUND on the log-likelihood. Accuracies compare bounds, perplexities "
    "are upper bounds.",
    "left_to_right": "exact log-likelihoods of the model's LEFT-TO-RIGHT CHAIN, another model than the diffusion that "
    "generates text.",
}
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts (the harness's cache key), context, continuation


@register_model("tdlm")
class TDLMEvalLM(HFLM):
    """[`HFLM`] for diffusion language models: a tree model or MDM-Prime, by folder, Hub id or as a loaded model.

    **Log-likelihoods are lower bounds**: minus `model.nelbo` of the continuation given the context, the mean of
    `num_samples` seeded draws. A score is a function of the request, the seed and the batch size, and requests of one
    length share their noise, so the choices of a question are compared under the same draws. `is_greedy` is always
    False: there is no order of tokens in which a bound could be asked whether each was the most likely.

    Args:
        pretrained: folder, Hub id, or a loaded model (then pass `tokenizer` too).
        num_samples: noise draws for each request.
        seed: of the noise, and of `generate_until`.
        scoring: `bound`, or `left_to_right` for the exact log-likelihood of the chain that reads the continuation from
            left to right: H passes a token, no noise, another model (see `order_log_likelihood`).
        device: default: the GPU, where there is one.
        kwargs: those of `HFLM`: `batch_size` (draws or canvases a forward pass), `tokenizer`, `revision`, `dtype`,
            `peft`, `max_length`, ...

    `generate_until` takes what `model.generate` takes (`num_denoising_steps`, `steps_per_level`, `temperature`, ...).
    """

    def __init__(
        self,
        pretrained: Any,
        num_samples: int = 32,
        seed: int = 0,
        scoring: str = "bound",
        device: str | None = None,
        **kwargs: Any,
    ):
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} is not one of {list(SCORINGS)}.")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise ValueError(f"batch_size={kwargs['batch_size']!r} is not supported by this model. Pass a number.")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        super().__init__(pretrained, device=device, **kwargs)
        if self.config.model_type not in MODEL_TYPES:
            raise ValueError(
                f"{pretrained} is a {self.config.model_type} model; `tdlm` scores {' and '.join(MODEL_TYPES)}. Use "
                "--model hf."
            )
        base_model(self.model).check_tokenizer(self.tokenizer)
        self.num_samples, self.seed, self.scoring = num_samples, seed, scoring
        logger.warning(f"The log-likelihoods of this run are {SCORINGS[scoring]}")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        info = {"log_likelihoods": SCORINGS[self.scoring], "num_samples": self.num_samples, "seed": self.seed}
        return super().get_model_info() | info

    # ---- log-likelihoods ----

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        batches = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]
        for batch in tqdm(batches, desc="Scoring", disable=disable_tqdm or self.rank != 0):
            examples = [self._example(context, continuation) for _, context, continuation in batch]
            scores = self._chains(examples) if self.scoring == "left_to_right" else map(self._bound, examples)
            for (texts, _, _), score in zip(batch, scores, strict=True):
                answers.append((score, False))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows of the context's length, each after its last token before: (bounds on) their sum."""
        totals = []
        for request in tqdm(requests, desc="Scoring", disable=disable_tqdm or self.rank != 0):
            # A diffusion model sees its last token too: a window and the token before it are max_length long.
            windows = get_rolling_token_windows(
                self.tok_encode(*request.args), self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _example(self, context: list[int], continuation: list[int]) -> dict[str, torch.Tensor]:
        """-> (L,) ids and labels, -100 on the context, which is cut on the left where it does not fit."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the context of {self.max_length}. Use a "
                "rolling task for long texts."
            )
        ids = torch.tensor([*context, *continuation], device=self.device)[-self.max_length :]
        if len(ids) < len(context) + len(continuation):
            logger.warning_once(f"Contexts are cut on the left, to fit in the model's {self.max_length} tokens.")
        labels = ids.clone()
        labels[: len(ids) - len(continuation)] = -100
        return {"input_ids": ids, "labels": labels}

    def _bound(self, example: dict[str, torch.Tensor]) -> float:
        """Minus the NELBO of one request, nats: its draws are the batch, on one even grid."""
        rows = math.gcd(self.num_samples, self.batch_size)
        ids, labels = (example[name].expand(rows, -1) for name in ("input_ids", "labels"))
        generator = torch.Generator().manual_seed(self.seed)
        bound = self.model.nelbo(ids, labels=labels, num_samples=self.num_samples // rows, generator=generator)
        return -float(bound.nelbo.double().mean())

    def _chains(self, examples: list[dict[str, torch.Tensor]]) -> list[float]:
        return order_log_likelihood(self.model, **TDLMDataCollator(pad_token_id(self.tokenizer))(examples)).tolist()

    # ---- generation ----

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._generator = torch.Generator().manual_seed(self.seed)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context, max_length, stop, **generation_kwargs) -> torch.Tensor:
        if generation_kwargs.get("temperature") == 0.0:  # the harness's word for greedy
            generation_kwargs |= {"temperature": None, "do_sample": False}
        sequences = self.model.generate(context, max_length=max_length, generator=self._generator, **generation_kwargs)
        # All positions come at once, so a text goes on after its end: nothing behind end-of-text is part of it.
        new = sequences[:, context.shape[1] :]
        ended = (new == self.eot_token_id).cumsum(1) > 0
        return torch.cat([sequences[:, : context.shape[1]], new.masked_fill(ended, self.eot_token_id)], dim=1)


__all__ = ["TDLMEvalLM"]

if __name__ == "__main__":
    cli_evaluate()
