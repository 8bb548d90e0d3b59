"""`tdlm train`: from a text corpus and one configuration to a checkpoint folder, step by step."""

import dataclasses
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from tdlm.configuration_mdm_prime import MDMPrimeConfig
from tdlm.configuration_tdlm import TDLMConfig
from tdlm.modeling_mdm_prime import MDMPrimeForDiffusionLM
from tdlm.modeling_tdlm import DiffusionLM, TDLMForDiffusionLM
from tdlm.tokenization import build_tree, corpus_embeddings, file_embeddings, model_embeddings, train_tokenizer
from tdlm.trainer.callbacks import SampleTextCallback
from tdlm.trainer.data import RandomCrops, evaluation_windows, load_text, pad_token_id, stream_crops, tokenize
from tdlm.trainer.model_card import CardDataset, CardDetails
from tdlm.trainer.trainer import TDLMTrainer
from tdlm.trainer.training_args import TDLMTrainingArguments
from tdlm.vocab_tree_tdlm import VocabTree

STREAM_SAMPLE = 10_000  # documents of a stream that train the tokenizer and the corpus embeddings


@dataclass
class ScriptArguments:
    """What to train on and what to train. Everything else is a training argument of the HF Trainer."""

    train_data: str = field(metadata={"help": "Text file(s), folder or Hub dataset, one document a row or file."})
    eval_data: str | None = field(default=None, metadata={"help": "The same, held out; evaluated at the end."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a Hub dataset to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    streaming: bool = field(default=False, metadata={"help": "Stream the training set; set max_steps."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer; default: train a byte-level BPE."})
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of the tokenizer to train."})
    tree: str | None = field(
        default=None, metadata={"help": "Tree file, or flat (every token a child of the root); default: build one."}
    )
    branching_factor: int = field(default=256, metadata={"help": "Most children of a node of the tree to build."})
    tree_embeddings: str = field(
        default="corpus",
        metadata={"help": "Embeddings to build the tree from: corpus, a .npy or .safetensors, a model."},
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to continue from."})
    preset: str = field(default="small", metadata={"help": "Size of a new model: tiny, small or base."})
    model_type: str = field(default="tdlm", metadata={"help": "Kind of a new model: tdlm or mdm_prime."})
    model_config: dict = field(
        default_factory=dict, metadata={"help": "Fields of TDLMConfig or MDMPrimeConfig, as JSON."}
    )
    language: str | None = field(default=None, metadata={"help": "Of the model card: language code, such as en."})
    license: str | None = field(default=None, metadata={"help": "Of the model card: license, such as apache-2.0."})


def make_tree(
    tokenizer: PreTrainedTokenizerBase,
    branching_factor: int,
    embeddings: str = "corpus",
    sequences: Any = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> VocabTree:
    """A tree for `tokenizer`, from the token sequences of a corpus, an embedding file or a model's embeddings."""
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if embeddings == "corpus":
        matrix = corpus_embeddings(sequences, vocab_size, seed=seed, progress=progress)
    else:
        is_file = Path(embeddings).suffix in (".npy", ".safetensors")
        matrix = file_embeddings(embeddings) if is_file else model_embeddings(embeddings)
    tree = build_tree(np.asarray(matrix), branching_factor, seed=seed, progress=progress, **options)
    return tree.bind(tokenizer)


def make_config(tree: VocabTree, tokenizer: PreTrainedTokenizerBase, preset: str, **fields: Any) -> TDLMConfig:
    """The configuration of a model for this tree and tokenizer."""
    return TDLMConfig.for_tree(tree, preset, **_with_token_ids(TDLMConfig, tokenizer, fields))


def make_prime_config(tokenizer: PreTrainedTokenizerBase, preset: str, **fields: Any) -> MDMPrimeConfig:
    """The configuration of an MDM-Prime model for this tokenizer."""
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return MDMPrimeConfig.for_vocab(vocab_size, preset, **_with_token_ids(MDMPrimeConfig, tokenizer, fields))


def _with_token_ids(config_class: type, tokenizer: Any, fields: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(config_class)})
    if unknown:
        raise ValueError(f"model_config sets {unknown}, which are no fields of {config_class.__name__}.")
    token_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {**token_ids, **fields}


def run_training(script: ScriptArguments, args: TDLMTrainingArguments) -> dict[str, float]:
    """Train, evaluate if there is something to evaluate on, save to `args.output_dir`; returns the metrics.

    With an evaluation set, every evaluation also appends sample text to `samples.md`.
    """
    set_seed(args.seed)
    train_text = load_text(
        script.train_data,
        name=script.dataset_config,
        split=script.train_split,
        streaming=script.streaming,
        text_column=script.text_column,
    )
    model, tokenizer, train_ids = _model_and_data(script, train_text, args.seed)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if not script.streaming and len(train_ids) < batch:
        raise ValueError(
            f"{script.train_data} holds {len(train_ids)} documents, fewer than the {batch} sequences of one update: an "
            "epoch has one crop of each document. Split it into more documents (one a row or file), or lower the batch."
        )
    length, pad_id = model.config.max_position_embeddings, pad_token_id(tokenizer)
    crops = stream_crops if script.streaming else RandomCrops
    trainer = TDLMTrainer(
        model=model,
        args=args,
        train_dataset=crops(train_ids, length, pad_id, args.seed),
        eval_dataset=_evaluation_set(script, tokenizer, length),
        processing_class=tokenizer,
        card_details=_card_details(script, args),
    )
    if script.eval_data is not None:
        trainer.add_callback(SampleTextCallback(trainer))
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = result.metrics | (trainer.evaluate() if script.eval_data else {})
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)
    return metrics


def _card_details(script: ScriptArguments, args: TDLMTrainingArguments) -> CardDetails:
    """What the model card says of the data, and the command that evaluates the checkpoint as this run does."""
    train_data = _card_dataset(script.train_data, script.dataset_config, script.train_split)
    eval_data = command = None
    if script.eval_data is not None:
        eval_data = _card_dataset(script.eval_data, script.dataset_config, script.eval_split)
        options: dict[str, Any] = {"data": eval_data.name, "dataset-config": eval_data.config, "split": eval_data.split}
        options |= {"text-column": None if script.text_column == "text" else script.text_column}
        options |= {"num-samples": args.eval_num_samples, "batch-size": args.eval_batch_size, "seed": args.eval_seed}
        flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        command = shlex.join(["tdlm", "evaluate", args.hub_model_id or ".", *flags])
    return CardDetails(
        language=script.language, license=script.license, train_data=(train_data,), eval_data=eval_data, command=command
    )


def _card_dataset(source: str, config: str | None, split: str) -> CardDataset:
    if os.path.exists(source) or any(mark in source for mark in "*?["):
        return CardDataset(Path(source).resolve().name)  # where it lies on this machine is nobody else's business
    return CardDataset(source, hub_id=source, config=config, split=split)


def _model_and_data(script: ScriptArguments, text: Any, seed: int) -> tuple[DiffusionLM, Any, Any]:
    """-> model, tokenizer, tokenised documents."""
    if script.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or script.model_name_or_path)
        return (
            AutoModelForCausalLM.from_pretrained(script.model_name_or_path),
            tokenizer,
            _tokenize(script, text, tokenizer),
        )
    sample = text.take(STREAM_SAMPLE) if script.streaming else text
    if script.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(script.tokenizer)
    else:
        tokenizer = train_tokenizer((row[script.text_column] for row in sample), script.vocab_size)
    ids = _tokenize(script, text, tokenizer)
    return _new_model(script, tokenizer, ids, seed), tokenizer, ids


def _new_model(script: ScriptArguments, tokenizer: Any, ids: Any, seed: int) -> DiffusionLM:
    if script.model_type == "mdm_prime":
        if script.tree is not None:
            raise ValueError(f"tree={script.tree}: an mdm_prime model has no tree. Leave it out.")
        model = MDMPrimeForDiffusionLM(make_prime_config(tokenizer, script.preset, **dict(script.model_config)))
        model.code.bind(tokenizer)
        return model
    if script.model_type != "tdlm":
        raise ValueError(f"model_type={script.model_type!r} is not one of ['mdm_prime', 'tdlm'].")
    tree = _tree(script, tokenizer, ids, seed)
    return TDLMForDiffusionLM(make_config(tree, tokenizer, script.preset, **dict(script.model_config)), tree)


def _tree(script: ScriptArguments, tokenizer: Any, ids: Any, seed: int) -> VocabTree:
    if script.tree == "flat":
        return VocabTree.flat(max(tokenizer.get_vocab().values()) + 1).bind(tokenizer)
    if script.tree is not None:
        tree = VocabTree.load(script.tree)
        tree.check_tokenizer(tokenizer)
        return tree
    sequences = (row["input_ids"] for row in (ids.take(STREAM_SAMPLE) if script.streaming else ids))
    return make_tree(tokenizer, script.branching_factor, script.tree_embeddings, sequences, seed)


def _tokenize(script: ScriptArguments, text: Any, tokenizer: Any) -> Any:
    return tokenize(text, tokenizer, text_column=script.text_column)


def _evaluation_set(script: ScriptArguments, tokenizer: Any, length: int) -> datasets.Dataset | None:
    if script.eval_data is None:
        return None
    text = load_text(
        script.eval_data, name=script.dataset_config, split=script.eval_split, text_column=script.text_column
    )
    return evaluation_windows(text, tokenizer, length, text_column=script.text_column)


__all__ = ["ScriptArguments", "make_config", "make_prime_config", "make_tree", "run_training"]
