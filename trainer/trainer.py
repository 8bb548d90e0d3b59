"""TDLMTrainer: the HF Trainer with low-discrepancy noise over the global batch and an exact reduction of the NELBO."""

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.utils import logging

from tdlm.modeling_tdlm import DiffusionLM
from tdlm.process_tdlm import low_discrepancy_times
from tdlm.trainer.data import TDLMDataCollator, pad_token_id, perplexity
from tdlm.trainer.model_card import CardDataset, CardDetails, create_model_card
from tdlm.trainer.training_args import TDLMTrainingArguments

logger = logging.get_logger(__name__)


class TDLMTrainer(Trainer):
    """
    [`~transformers.Trainer`] for diffusion language models: TDLM, its flat and HDLM cases, MDM-Prime.

    What it adds. The noise of a step is a function of (seed, step, index of the sequence in the global batch): times
    form one low-discrepancy grid over all devices and accumulation steps, so a batch split otherwise gives the same
    update, and a resumed run draws what it would have drawn. Training logs `loss_level_<l>`, which add up to `loss`
    (nats per token; weighted, clipped, padding included: no bound). Evaluation logs `nelbo` (nats per token, an
    unbiased estimate of a true upper bound, token-weighted, seeded), its levels, `ppl`, and `bpb` where the evaluation
    set has `num_bytes` (see `evaluation_windows`). Every checkpoint gets a model card, with what `card_details` tell.
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
        card_details: CardDetails | None = None,
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
        self.card_details = CardDetails() if card_details is None else card_details
        self.evaluations: dict[tuple[str, int], dict[str, float]] = {}  # by prefix and step of the weights
        self._best_is_loaded = False
        self.add_callback(_TrainerState(self))

    # ---- training ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of one update and noise them together, on one grid of times over the global batch."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.include_num_input_tokens_seen == "no":  # otherwise the Trainer counts, and waits for the device
            size = sum(batch["input_ids"].numel() for batch in batches)
            self.state.num_input_tokens_seen += self.args.world_size * size
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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        evaluations = dict(self.evaluations)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        others = eval_dataset is not None and eval_dataset is not self.eval_dataset and self.eval_dataset is not None
        if others and metric_key_prefix == "eval" and not isinstance(eval_dataset, dict):
            self.evaluations = evaluations  # the card would take its figures for those of the Trainer's own set
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_generator = torch.Generator().manual_seed(self.args.eval_seed + self.args.process_index)
        # Never the loss only: the metrics come from per-sequence sums.
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        if f"{metric_key_prefix}_nelbo" in output.metrics:
            # The Trainer's own mean weighs by sequence.
            output.metrics[f"{metric_key_prefix}_loss"] = output.metrics[f"{metric_key_prefix}_nelbo"]
            self.evaluations[metric_key_prefix, self.weights_step] = {
                name.removeprefix(f"{metric_key_prefix}_"): value for name, value in output.metrics.items()
            }
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

    # ---- the model card ----

    @property
    def weights_step(self) -> int:
        """The step that the weights are of: not the last one where the best ones were loaded at the end."""
        return (self.state.best_global_step or 0) if self._best_is_loaded else self.state.global_step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_is_loaded = True

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md to the output folder. Arguments as [`~transformers.Trainer.create_model_card`]'s; what they
        tell of the model is kept for the cards of later checkpoints. Datasets are those that were trained on.

        Raises `ValueError` for a task other than text-generation.
        """
        if _listed(tasks) not in ([], ["text-generation"]):
            raise ValueError(f"tasks={tasks!r}: these models are for 'text-generation'. Leave it out.")
        told: dict[str, Any] = {"language": language, "license": license, "model_name": model_name}
        told = {name: value for name, value in {**told, "base_model": finetuned_from}.items() if value is not None}
        names, hub_ids, configs = _listed(dataset), _listed(dataset_tags), _listed(dataset_args)
        if names or hub_ids:
            rows = itertools.zip_longest(names or hub_ids, hub_ids, configs)
            told["train_data"] = tuple(CardDataset(name or hub_id, hub_id, config) for name, hub_id, config in rows)
        told["tags"] = tuple(dict.fromkeys([*self.card_details.tags, *_listed(tags)]))
        self.card_details = replace(self.card_details, **told)
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        readme = folder / "README.md"
        if readme.exists() and not _is_model_card(readme):
            logger.warning(f"{readme} is no model card: it is left as it is, and no card is saved there.")
        else:
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        details = self.card_details
        model_name = details.model_name or Path(self.args.output_dir).resolve().name
        details = replace(details, model_name=model_name, model_id=details.model_id or self.hub_model_id)
        card = create_model_card(base_model(self.model), self.processing_class, details, self)
        card.save(folder / "README.md")
        if hasattr(self.model, "create_or_update_model_card"):  # an adapter: PEFT names its base and library
            self.model.create_or_update_model_card(str(folder))
            updated = ModelCard.load(folder / "README.md")
            updated.data["tags"] = [*card.data["tags"], *updated.data.get("tags", [])]  # it puts its own in their place
            updated.save(folder / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer pushes the output folder with the checkpoint's weights and configuration, but not its code.
        if self.is_world_process_zero():
            for file in [*Path(checkpoint_folder).glob("*.py"), *Path(checkpoint_folder).glob("README.md")]:
                shutil.copy(file, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _is_model_card(path: Path) -> bool:
    try:
        return "library_name" in (metadata_load(path) or {})
    except (ValueError, yaml.YAMLError):  # front matter of something else
        return False


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


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
        metrics |= {"bpb": float(nelbo * num_tokens / math.log(2) / num_bytes), "num_bytes": int(num_bytes)}
    if num_samples > 1:
        metrics["nelbo_standard_error"] = float(draws_JH.sum(1).std(ddof=1) / num_samples**0.5)
    return metrics


MODEL_TYPES = ("tdlm", "mdm_prime")


def base_model(model: Any) -> DiffusionLM:
    """The diffusion model inside PEFT or distributed wrappers, by model type: remote code has its own classes."""
    model = getattr(model, "module", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "config", None), "model_type", None) not in MODEL_TYPES:
        raise ValueError(f"TDLMTrainer trains models of type {' or '.join(MODEL_TYPES)}, not {type(model).__name__}.")
    return model


class _TrainerState(TrainerCallback):
    """Starts the level losses afresh with each training, whose weights are then its own, and tells the set its epoch.

    accelerate's loaders do not always pass the epoch on.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._level_losses, self.trainer._level_losses_since = None, state.global_step
        self.trainer._best_is_loaded = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int((state.epoch or 0) + 1e-6))  # a resumed epoch starts in its middle


__all__ = ["TDLMTrainer", "nelbo_metrics"]
