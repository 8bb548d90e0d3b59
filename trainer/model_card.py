"""The model card: what a run knows about its model, as front matter for the Hub and as text (`hub_card`)."""

import importlib.metadata
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tdlm.hub_card import TEMPLATE
from tdlm.modeling_tdlm import DiffusionLM
from tdlm.tokenization import format_statistics, tree_outline, tree_statistics
from tdlm.trainer.own_process import describe_machine

if TYPE_CHECKING:
    from tdlm.trainer.trainer import TDLMTrainer

TAGS = ("tdlm", "diffusion", "diffusion-language-model", "masked-diffusion", "custom_code")
# metric of an evaluation -> the card's name of it in `metrics` and in the model index
METRICS = {"nelbo": "nelbo", "ppl": "perplexity", "bpb": "bits_per_byte"}
METRIC_NAMES = {
    "nelbo": "NELBO, nats per token (upper bound)",
    "ppl": "Perplexity (upper bound)",
    "bpb": "Bits per byte (upper bound)",
}
RECIPE = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("optim", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16", "seed"),
)
VERSIONS = ("tdlm", "torch", "transformers", "datasets", "tokenizers", "accelerate")
PROMPT = "The"  # of the snippet: a word or a few letters in any tokenizer
NEW_TOKENS = 32


@dataclass(frozen=True)
class CardDataset:
    """Data as the card names them: `hub_id` is their repository on the Hub, if they are there."""

    name: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        name = self.name if self.hub_id is None else f"[{self.name}](https://huggingface.co/datasets/{self.hub_id})"
        return ", ".join(part for part in (name, self.config, self.split) if part)


@dataclass(frozen=True)
class CardDetails:
    """What a card says and no run knows by itself. The card leaves out what is `None`.

    Args:
        model_name: its title. Default: the name of the output folder.
        model_id: repository on the Hub, which the snippet then loads; default: the folder of the card.
        language, license: as the Hub writes them: `"en"`, `"apache-2.0"`.
        tags: tags beside the ones that every card has.
        base_model: checkpoint or repository from which training went on.
        train_data, eval_data: what was trained and evaluated on.
        command: command line that gives the results.
    """

    model_name: str | None = None
    model_id: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    train_data: tuple[CardDataset, ...] = ()
    eval_data: CardDataset | None = None
    command: str | None = None


@dataclass
class _Result:
    """One evaluation: `step` is that of the weights that were measured."""

    data: CardDataset | None
    step: int
    metrics: dict[str, float] = field(repr=False)

    def __post_init__(self) -> None:
        self.nelbo, self.ppl, self.num_tokens = (self.metrics[name] for name in ("nelbo", "ppl", "num_tokens"))
        self.bpb, self.error = self.metrics.get("bpb"), self.metrics.get("nelbo_standard_error")
        levels = sorted(int(name.rpartition("_")[2]) for name in self.metrics if name.startswith("nelbo_level_"))
        self.levels = [self.metrics[f"nelbo_level_{level}"] for level in levels]


def create_model_card(
    model: DiffusionLM,
    tokenizer: Any = None,
    details: CardDetails | None = None,
    trainer: "TDLMTrainer | None" = None,
) -> ModelCard:
    """The card of a model, with what `details` tell and what a `trainer` has measured and done. `card.save(path)`.

    Without a trainer the card has no results and no recipe. Results enter the front matter only where they were
    measured on the weights that the model now has, and on data that `details` or the evaluation name.
    """
    details = CardDetails() if details is None else details
    step = 0 if trainer is None else trainer.weights_step
    results = [] if trainer is None else _results(trainer, details)
    has_trained = trainer is not None and trainer.state.global_step > 0
    base_model = details.base_model or (model.config._name_or_path if has_trained else None) or None
    title = details.model_name or (details.model_id or model.config.model_type).rpartition("/")[2]
    return ModelCard.from_template(
        _front_matter(model, title, details, base_model, [result for result in results if result.step == step]),
        template_path=os.fspath(TEMPLATE),
        title=title,
        class_name=type(model).__name__,
        config=model.config,
        parameters=model.num_parameters(),
        tree=_tree(model, tokenizer),
        base_name=_base_name(base_model),
        train_data=details.train_data,
        command=details.command,
        results=results,
        step=step,
        run=_run(trainer) if trainer is not None and has_trained else None,
        **_snippet(model, tokenizer, details.model_id),
        evaluation=None if trainer is None else _evaluation(trainer),
    )


def _front_matter(
    model: DiffusionLM, title: str, details: CardDetails, base_model: str | None, results: Sequence[_Result]
) -> ModelCardData:
    hub_ids = list(dict.fromkeys(source.hub_id for source in details.train_data if source.hub_id is not None))
    eval_results = [entry for result in results for entry in _eval_results(result)]
    measured = [card_name for name, card_name in METRICS.items() if any(name in result.metrics for result in results)]
    return ModelCardData(
        language=details.language,
        license=details.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *(["mdm-prime"] if model.config.model_type == "mdm_prime" else []), *details.tags],
        datasets=hub_ids or None,
        metrics=measured or None,
        base_model=base_model if base_model is not None and not os.path.isdir(base_model) else None,
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
    )


def _eval_results(result: _Result) -> list[EvalResult]:
    """The entries of the model index, which has no place for data without a name nor for numbers that are none."""
    if result.data is None:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=result.data.hub_id or result.data.name,
            dataset_name=result.data.name,
            dataset_config=result.data.config,
            dataset_split=result.data.split,
            metric_type=card_name,
            metric_name=METRIC_NAMES[name],
            metric_value=result.metrics[name],
        )
        for name, card_name in METRICS.items()
        if name in result.metrics and math.isfinite(result.metrics[name])
    ]


def _results(trainer: "TDLMTrainer", details: CardDetails) -> list[_Result]:
    """The evaluation of each set by these weights, or else its latest one."""
    results: dict[str, _Result] = {}
    for (prefix, step), metrics in trainer.evaluations.items():
        if prefix in results and results[prefix].step == trainer.weights_step:
            continue
        name = prefix.removeprefix("eval").removeprefix("_")
        data = CardDataset(name) if name else details.eval_data
        results[prefix] = _Result(data, step, metrics)
    return list(results.values())


def _evaluation(trainer: "TDLMTrainer") -> dict[str, int]:
    args = trainer.args
    batch_size = args.eval_batch_size * args.world_size
    return {"num_samples": args.eval_num_samples, "seed": args.eval_seed, "batch_size": batch_size}


def _run(trainer: "TDLMTrainer") -> dict[str, Any]:
    args, data = trainer.args, trainer.train_dataset
    recipe = {name: getattr(args, name) for name in RECIPE if getattr(args, name) not in (None, False)}
    recipe = {name: value.value if isinstance(value, Enum) else value for name, value in recipe.items()}
    recipe.pop("num_train_epochs" if args.max_steps > 0 else "max_steps")
    return {
        "documents": len(data) if hasattr(data, "__len__") else None,
        "sequences": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        # Counted by the Trainer itself, other things may be meant by it.
        "tokens": trainer.state.num_input_tokens_seen if args.include_num_input_tokens_seen == "no" else None,
        "machine": describe_machine(),
        "processes": args.world_size,
        "versions": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in VERSIONS),
        "arguments": yaml.safe_dump(recipe, sort_keys=False).strip(),
    }


def _tree(model: DiffusionLM, tokenizer: Any) -> dict[str, str | None] | None:
    """The tree's sizes and, unless it is flat, some of its nodes; `None` for a model without a tree."""
    if model.config.model_type != "tdlm":
        return None
    deep = model.tree.height > 2
    outline = tree_outline(model.tree, tokenizer, max_depth=2 if deep else 1, max_children=4 if deep else 8)
    return {
        "statistics": format_statistics(tree_statistics(model.tree)),
        "outline": outline if model.tree.height > 1 else None,
    }


def _base_name(base_model: str | None) -> str | None:
    if base_model is None:
        return None
    if os.path.isdir(base_model):
        return f"the checkpoint `{Path(base_model).resolve().name}`"
    return f"[{base_model}](https://huggingface.co/{base_model})"


def _snippet(model: DiffusionLM, tokenizer: Any, model_id: str | None) -> dict[str, Any]:
    prompt = [] if tokenizer is None else tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    return {
        "repo": model_id or ".",
        "has_tokenizer": tokenizer is not None,
        "prompt": f'"{PROMPT}"',
        "max_new_tokens": max(1, min(NEW_TOKENS, model.config.max_position_embeddings - len(prompt))),
    }


__all__ = ["CardDataset", "CardDetails", "create_model_card"]
