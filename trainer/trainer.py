"""TDLMTrainer: the HF Trainer with low-discrepancy noise over the global batch and an exact reduction of the NELBO."""

import math
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainerCallback

from tdlm.modeling_tdlm import DiffusionLM
from tdlm.process_tdlm import low_discrepancy_times
from tdlm.trainer.data import TDLMDataCollator, pad_token_id, perplexity
from tdlm.trainer.training_args import TDLMTrainingArguments


class TDLMTrainer(Trainer):
    """
    [`~transformers.Trainer`] for diffusion language models: TDLM, its flat and HDLM cases, MDM-Prime.

    What it adds. The noise of a step is a function of (seed, step, index of the sequence in the global batch): times
    form one low-discrepancy grid over all devices and accumulation steps, so a batch split otherwise gives the same
    update, and a resumed run draws what it would have drawn. Training logs `loss_level_<l>`, which add up to `loss`
    (nats per token; weighted, clipped, padding included: no bound). Evaluation logs `nelbo` (nats per token, an
    unbiased estimate of a true upper bound, token-weighted, seeded), its levels, `ppl`, and `bpb` where the evaluation
    set has `num_bytes` (see `evaluation_windows`).
    """

    args: TDLMTrainingArguments

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = TDLMTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if processing_class is not None and model is not None:
            base_model(model).check_tokenizer(processing_class)
            data_collator = data_collator or TDLMDataCollator(pad_token_id(processing_class))
        user_metrics = kwargs.pop("compute_metrics", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or TDLMDataCollator(pad_token_id=0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=lambda prediction: {
                **nelbo_metrics(prediction, self.args.eval_num_samples),
                **(user_metrics(prediction) if user_metrics is not None else {}),
            },
            **kwargs,
        )
        self._level_losses: torch.Tensor | None = None
        self._level_losses_since = 0
        self.add_callback(_TrainerState(self))

    # ---- training ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of one update and noise them together, on one grid of times over the global batch."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._noise(batches), num_items_in_batch

    def _noise(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        model = base_model(self.model)
        world_size, rank = self.args.world_size, self.args.process_index
        total = world_size * sum(len(batch["input_ids"]) for batch in batches)
        # Rows as long as the context whatever the batch's length, so that a row depends on its index alone.
        length = max([model.config.max_position_embeddings, *(batch["input_ids"].shape[1] for batch in batches)])
        rng = np.random.default_rng((self.args.seed, self.state.global_step))
        grid_offset = torch.tensor(rng.random())
        draws = model.noise_draws_per_token
        uniforms = torch.from_numpy(rng.random((total, length * draws), dtype=np.float32))
        noised, first = [], 0
        for batch in batches:
            size, device = len(batch["input_ids"]), batch["input_ids"].device
            # accelerate deals batches to processes in turn: all processes' m-th batches come before their next ones.
            index = torch.arange(size) + first * world_size + rank * size
            labels = batch.get("labels", batch["input_ids"])
            timesteps = low_discrepancy_times(grid_offset, index, total).to(device)
            u = uniforms[index, : batch["input_ids"].shape[1] * draws].to(device)
            z_t = model.noise(batch["input_ids"], labels, timesteps, u)
            noised.append({**batch, "input_ids": z_t, "timesteps": timesteps, "labels": labels})
            first += size
        return noised

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "num_bytes"}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            level_losses = outputs["level_losses"]
            if num_items_in_batch is None:
                level_losses = level_losses / self.current_gradient_accumulation_steps
            self._level_losses = level_losses if self._level_losses is None else self._level_losses + level_losses
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._level_losses is not None:
            steps = max(1, self.state.global_step - self._level_losses_since)
            total = self.accelerator.reduce(self._level_losses, "sum") / steps
            logs.update({f"loss_level_{level}": value for level, value in enumerate(total.tolist())})
            self._level_losses, self._level_losses_since = None, self.state.global_step
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_generator = torch.Generator().manual_seed(self.args.eval_seed + self.args.process_index)
        # Never the loss only: the metrics come from per-sequence sums.
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        if f"{metric_key_prefix}_nelbo" in output.metrics:
            # The Trainer's own mean weighs by sequence.
            output.metrics[f"{metric_key_prefix}_loss"] = output.metrics[f"{metric_key_prefix}_nelbo"]
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """-> mean loss, (B, draws * H) nats per sequence, draw and level, and (B, 2) tokens and bytes."""
        inputs = self._prepare_inputs(inputs)
        num_bytes = inputs.pop("num_bytes", None)
        with torch.no_grad(), self.compute_loss_context_manager():
            draws = [model(**inputs, generator=self._eval_generator) for _ in range(self.args.eval_num_samples)]
        num_tokens = draws[0]["num_tokens"]
        # NaN bytes: the set does not say how many, so there are no bits per byte.
        num_bytes = torch.full_like(num_tokens, float("nan"), dtype=torch.float64) if num_bytes is None else num_bytes
        sums = torch.cat([draw["level_nelbo"].double() for draw in draws], dim=1)
        return draws[0]["loss"], sums, torch.stack([num_tokens.double(), num_bytes.double()], dim=1)


def nelbo_metrics(prediction: EvalPrediction, num_samples: int) -> dict[str, float]:
    """Per-sequence sums -> token-weighted `nelbo` (nats), `nelbo_level_<l>`, `ppl`, and `bpb` if bytes are known.

    With two or more draws a sequence also `nelbo_standard_error`: the Monte Carlo error, over the draws.
    """
    sums_BJH = np.asarray(prediction.predictions).reshape(len(prediction.predictions), num_samples, -1)
    num_tokens, num_bytes = np.asarray(prediction.label_ids).sum(0)
    draws_JH = sums_BJH.sum(0) / num_tokens
    nelbo = float(draws_JH.mean(0).sum())
    metrics = {"nelbo": nelbo, "ppl": perplexity(nelbo), "num_tokens": int(num_tokens)}
    metrics |= {f"nelbo_level_{level}": float(value) for level, value in enumerate(draws_JH.mean(0))}
    if num_bytes > 0:
        metrics |= {"bpb": nelbo * num_tokens / math.log(2) / num_bytes, "num_bytes": int(num_bytes)}
    if num_samples > 1:
        metrics["nelbo_standard_error"] = float(draws_JH.sum(1).std(ddof=1) / num_samples**0.5)
    return metrics


MODEL_TYPES = ("tdlm", "mdm_prime")


def base_model(model: Any) -> DiffusionLM:
    """The diffusion model inside PEFT or distributed wrappers, by model type: remote code has its own classes."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model = getattr(model, "module", model)
    if getattr(getattr(model, "config", None), "model_type", None) not in MODEL_TYPES:
        raise ValueError(f"TDLMTrainer trains models of type {' or '.join(MODEL_TYPES)}, not {type(model).__name__}.")
    return model


class _TrainerState(TrainerCallback):
    """Starts the level losses afresh with each training, and tells the training set its epoch.

    accelerate's loaders do not always pass the epoch on.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._level_losses, self.trainer._level_losses_since = None, state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # a resumed epoch starts in its middle


__all__ = ["TDLMTrainer", "nelbo_metrics"]
