"""`tdlm compare`: train the models of one file on the same batches, resume what was interrupted, and write the table.

OUTPUT/data/           tokenizer, tokenised documents, evaluation windows, embeddings; made once
OUTPUT/trees/          one file for each tree of the comparison
OUTPUT/runs/NAME-seedK spec.json, result.json, samples.json, model/; checkpoints while it trains
OUTPUT/results.json, table.md, *.png
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import ExportableState

from tdlm.tokenization import corpus_embeddings, train_tokenizer
from tdlm.trainer.causal import CausalCollator, sample_causal
from tdlm.trainer.compare_report import write_comparison
from tdlm.trainer.comparison import KINDS, Comparison, Kind, ModelSpec, Vocabulary, load_comparison
from tdlm.trainer.data import RandomCrops, evaluation_windows, load_text, pad_token_id, tokenize
from tdlm.trainer.flops import affine_in_depth, diffusion_batch, flops_batch_size, matching_depth, training_flops
from tdlm.trainer.generative import generative_perplexity, load_reference, mean_unigram_entropy
from tdlm.trainer.own_process import (
    code_version,
    describe_machine,
    peak_memory_mb,
    quiet,
    run_in_own_process,
    short_bars_off,
    versions,
    write_json,
)
from tdlm.trainer.quickstart import corpus_file
from tdlm.trainer.run import make_tree
from tdlm.trainer.training_args import TDLMTrainingArguments
from tdlm.vocab_tree_tdlm import VocabTree


@dataclass
class RunSpec:
    """Everything that decides what one training run gives. A run folder holds one, and is refused to another."""

    name: str
    kind: str
    seed: int
    sizes: dict[str, int]
    fields: dict[str, Any]
    tree: str | None
    training: dict[str, Any]
    generation: list[dict[str, Any]]
    num_samples: int
    max_new_tokens: int
    data: dict[str, Any]

    @property
    def run_name(self) -> str:
        return f"{self.name}-seed{self.seed}"


def run_compare(
    config: str,
    output: str,
    only: Sequence[str] = (),
    command: str | None = None,
    data: dict[str, str | None] | None = None,
    generative: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    """Do the whole comparison, or what is left of it; returns what `results.json` holds.

    Args:
        config: a YAML file, or the name of a recipe that ships with the package.
        output: folder for everything that is written; what is finished there is not done again.
        only: models to train now; the table also has those that were finished before.
        command: what the table says it was made with.
        data: overrides of the file's data section, such as `train` and `validation`.
        generative: overrides of its generative section: `reference` and `gguf_file`.
    """
    short_bars_off()
    comparison = load_comparison(config, data, generative)
    if unknown := sorted(set(only) - set(comparison.models)):
        raise ValueError(f"--only {unknown}: the models of {config} are {list(comparison.models)}.")
    comparison.check(output)
    folder = Path(output)
    prepared = prepare(comparison, folder)
    specs = plan(comparison, prepared, folder)
    train_all([spec for spec in specs if not only or spec.name in only], folder)
    finished = [spec for spec in specs if (folder / "runs" / spec.run_name / "result.json").exists()]
    scores = score_samples(comparison, prepared, finished, folder)
    runs = [
        {**json.loads((folder / "runs" / spec.run_name / "result.json").read_text()), "samples": scores[spec.run_name]}
        for spec in finished
    ]
    return write_comparison(folder, dataclasses.asdict(comparison), runs, scores["data"][0], command)


# ---- data and trees ----


@dataclass
class Prepared:
    """The data folder, read back."""

    tokenizer: Any
    train: datasets.Dataset
    windows: datasets.Dataset
    fingerprint: dict[str, Any]
    folder: Path

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer)

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        data = datasets.load_from_disk(os.fspath(folder / "data/documents"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "data/tokenizer")
        fingerprint = json.loads((folder / "data/fingerprint.json").read_text())
        return cls(tokenizer, data["train"], data["validation"], fingerprint, folder)

    def tree(self, key: str | None) -> VocabTree | None:
        return None if key is None else VocabTree.load(self.folder / f"trees/{key}.safetensors")


def prepare(comparison: Comparison, folder: Path) -> Prepared:
    """Make the data folder, or take the one that is there if it was made from the same data section."""
    fingerprint = _fingerprint(comparison)
    if not (folder / "data").exists():
        _write_data(comparison, folder, fingerprint)
    prepared = Prepared.load(folder)
    if prepared.fingerprint != fingerprint:
        raise ValueError(
            f"{folder}/data was made from other data: {_difference(prepared.fingerprint, fingerprint)}. "
            "Choose another --output, or delete that folder."
        )
    documents, batch = len(prepared.train), comparison.training.get("per_device_train_batch_size", 8)
    if documents < batch:
        raise ValueError(
            f"{comparison.data.train} holds {documents} documents, fewer than per_device_train_batch_size={batch}: an "
            "epoch has one crop of each document. Split it into more documents (one a row or file), or lower the batch."
        )
    return prepared


def _fingerprint(comparison: Comparison) -> dict[str, Any]:
    files = {split: Path(_source(comparison, split)) for split in ("train", "validation")}
    sizes = {f"{split}_bytes": path.stat().st_size for split, path in files.items() if path.is_file()}
    return {**dataclasses.asdict(comparison.data), **sizes, "length": comparison.backbone["max_position_embeddings"]}


def _source(comparison: Comparison, split: str) -> str:
    source = getattr(comparison.data, split)
    return corpus_file(split) if source == "novels" else source


def _write_data(comparison: Comparison, folder: Path, fingerprint: dict[str, Any]) -> None:
    """Everything goes to a folder that gets its name at the end, so an interruption leaves nothing half-made."""
    section, partial = comparison.data, folder / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    text = {split: _load_split(comparison, split) for split in ("train", "validation")}
    if section.max_train_documents is not None:
        text["train"] = text["train"].select(range(min(section.max_train_documents, len(text["train"]))))
    if section.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(section.tokenizer)
    else:
        tokenizer = train_tokenizer((row[section.text_column] for row in text["train"]), section.vocab_size)
    train_ids = _first_tokens(
        tokenize(text["train"], tokenizer, text_column=section.text_column), section.max_train_tokens
    )
    length = comparison.backbone["max_position_embeddings"]
    windows = evaluation_windows(text["validation"], tokenizer, length, text_column=section.text_column)
    documents = {"train": train_ids, "validation": _first_tokens(windows, section.max_eval_tokens)}
    datasets.DatasetDict(documents).save_to_disk(partial / "documents")
    tokenizer.save_pretrained(partial / "tokenizer")
    write_json(partial / "fingerprint.json", fingerprint)
    partial.rename(folder / "data")


def _load_split(comparison: Comparison, split: str) -> datasets.Dataset:
    section = comparison.data
    return load_text(
        _source(comparison, split),
        name=section.dataset_config,
        split=getattr(section, f"{split}_split"),
        text_column=section.text_column,
    )


def _first_tokens(dataset: datasets.Dataset, max_tokens: int | None) -> datasets.Dataset:
    """The first rows, until they hold `max_tokens` tokens."""
    if max_tokens is None:
        return dataset
    totals = np.cumsum([len(ids) for ids in dataset["input_ids"]])
    return dataset.select(range(min(len(dataset), int(np.searchsorted(totals, max_tokens)) + 1)))


def make_tree_file(options: dict[str, Any], prepared: Prepared) -> str:
    """Build the tree of these options unless its file is there; returns its key."""
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    path = prepared.folder / f"trees/{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        _build_tree(options, prepared).save(partial)
        partial.replace(path)
    return key


def _build_tree(options: dict[str, Any], prepared: Prepared) -> VocabTree:
    options = dict(options)
    kind, vocab_size = options.pop("kind"), prepared.vocabulary.size
    if kind == "flat":
        return VocabTree.flat(vocab_size).bind(prepared.tokenizer)
    K, seed = options.pop("branching_factor"), options.pop("seed", 0)
    if kind == "random":
        return VocabTree.random(vocab_size, K, seed).bind(prepared.tokenizer)
    embeddings = options.pop("embeddings", "corpus")
    if embeddings == "corpus":
        embeddings = os.fspath(_corpus_embeddings_file(prepared))
    return make_tree(prepared.tokenizer, K, embeddings, seed=seed, **options)


def _corpus_embeddings_file(prepared: Prepared) -> Path:
    """The corpus is counted once for all trees."""
    path = prepared.folder / "data/embeddings.npy"
    if not path.exists():
        sequences = (row["input_ids"] for row in prepared.train)
        partial = path.with_name("partial.npy")
        np.save(partial, corpus_embeddings(sequences, prepared.vocabulary.size))
        partial.replace(path)
    return path


# ---- the plan ----


def plan(comparison: Comparison, prepared: Prepared, folder: Path) -> list[RunSpec]:
    """Every run of the comparison, with its depth; refuses folders whose runs were made by another configuration."""
    trees = {
        name: None if model.tree is None else make_tree_file(model.tree, prepared)
        for name, model in comparison.models.items()
    }
    depths = matched_depths(comparison, prepared, trees)
    specs = [
        _run_spec(comparison, model, seed, depths[model.name], trees[model.name], prepared.fingerprint)
        for seed in comparison.seeds
        for model in comparison.models.values()
    ]
    for spec in specs:
        run_folder = folder / "runs" / spec.run_name
        run_folder.mkdir(parents=True, exist_ok=True)
        wanted, path = dataclasses.asdict(spec), run_folder / "spec.json"
        if path.exists() and (found := json.loads(path.read_text())) != json.loads(json.dumps(wanted)):
            raise ValueError(
                f"{run_folder} was trained with another configuration: {_difference(found, wanted)}. "
                "Choose another --output, or delete that folder to train it again."
            )
        write_json(path, wanted)
    return specs


def _run_spec(
    comparison: Comparison, model: ModelSpec, seed: int, depth: int, tree: str | None, fingerprint: dict[str, Any]
) -> RunSpec:
    return RunSpec(
        name=model.name,
        kind=model.kind,
        seed=seed,
        sizes={**comparison.backbone, "num_hidden_layers": depth},
        fields={name: value for name, value in model.fields.items() if name != "num_hidden_layers"},
        tree=tree,
        training=comparison.training_settings(model, seed),
        generation=comparison.generation_settings(model),
        num_samples=comparison.generative.num_samples,
        max_new_tokens=comparison.generative.max_new_tokens,
        data=fingerprint,
    )


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first thing that differs, for an error message."""
    name = next(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
    if isinstance(found.get(name), dict) and isinstance(wanted.get(name), dict):
        return f"{name}.{_difference(found[name], wanted[name])}"
    return f"{name} was {found.get(name)!r} and is now {wanted.get(name)!r}"


def matched_depths(comparison: Comparison, prepared: Prepared, trees: dict[str, str | None]) -> dict[str, int]:
    """num_hidden_layers of every model, so that all cost what the reference does at the backbone's depth."""
    depth = comparison.backbone["num_hidden_layers"]
    if comparison.match == "depth":
        return {name: model.fields.get("num_hidden_layers", depth) for name, model in comparison.models.items()}
    costs = {
        name: _cost_in_depth(comparison, model, prepared, prepared.tree(trees[name]))
        for name, model in comparison.models.items()
    }
    assert comparison.reference is not None, "checked when the file was read"
    rest, block = costs[comparison.reference]
    return {name: matching_depth(rest + depth * block, cost) for name, cost in costs.items()}


def _cost_in_depth(
    comparison: Comparison, model: ModelSpec, prepared: Prepared, tree: VocabTree | None
) -> tuple[float, float]:
    """Parameters or training FLOPs -> (without blocks, of one block)."""
    kind, sizes = KINDS[model.kind], comparison.backbone

    def build(depth: int) -> PreTrainedModel:
        config = kind.config(prepared.vocabulary, {**sizes, "num_hidden_layers": depth}, model.fields, tree)
        return kind.model(config, tree)

    if comparison.match == "parameters":
        return affine_in_depth(lambda model: model.num_parameters(), build)
    clean = _first_crops(prepared, sizes["max_position_embeddings"])
    return affine_in_depth(lambda model: training_flops(model, _flops_batch(kind, model, clean, prepared)), build)


def _first_crops(prepared: Prepared, length: int) -> list[dict[str, torch.Tensor]]:
    crops = RandomCrops(prepared.train, length, pad_token_id(prepared.tokenizer))
    return [crops[index % len(crops)] for index in range(flops_batch_size(length))]


def _flops_batch(kind: Kind, model: Any, crops: list, prepared: Prepared) -> dict[str, torch.Tensor]:
    if kind.is_diffusion:
        return diffusion_batch(model, torch.stack([crop["input_ids"] for crop in crops]))
    return CausalCollator(pad_token_id(prepared.tokenizer), prepared.tokenizer.eos_token_id)(crops)


# ---- training ----


def train_all(specs: Sequence[RunSpec], folder: Path) -> None:
    """Train what has no result yet, one run after another, each in its own process."""
    left = [spec for spec in specs if not (folder / "runs" / spec.run_name / "result.json").exists()]
    print(f"{len(specs) - len(left)} of {len(specs)} runs are finished, {len(left)} to go.", flush=True)
    for number, spec in enumerate(left, start=1):
        run_folder = folder / "runs" / spec.run_name
        print(f"[{number}/{len(left)}] {spec.name}, seed {spec.seed}: {spec.training['max_steps']} steps", flush=True)
        run_in_own_process(train_run, os.fspath(run_folder), f"training {spec.run_name}")
        shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
        result = json.loads((run_folder / "result.json").read_text())
        print(
            f"    nelbo {result['nelbo']:.4f}, ppl {result['ppl']:.2f}, trained in {result['training_seconds']:.0f} s; "
            f"{len(left) - number} left",
            flush=True,
        )


def train_run(run_folder: str) -> None:
    """Train, evaluate and sample from one model; writes `result.json` last. Goes on from the last checkpoint."""
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the parent's, perhaps one JSON object
        short_bars_off()
        transformers.utils.logging.set_verbosity_error()
        folder = Path(run_folder)
        spec = RunSpec(**json.loads((folder / "spec.json").read_text()))
        prepared = Prepared.load(folder.parent.parent)
        kind, tree = KINDS[spec.kind], prepared.tree(spec.tree)
        set_seed(spec.seed)
        config = kind.config(prepared.vocabulary, spec.sizes, spec.fields, tree)
        model = kind.model(config, tree)
        if spec.kind == "mdm_prime":
            model.code.bind(prepared.tokenizer)
        trainer = make_trainer(spec, model, prepared, folder / "checkpoints")
        result = train_and_evaluate(trainer, spec, folder / "checkpoints")
        result |= count_cost(spec, prepared, tree)
        samples = draw_samples(trainer.model, spec, prepared)
        trainer.save_model(os.fspath(folder / "model"))
        prepared.tokenizer.save_pretrained(folder / "model")
        write_json(folder / "samples.json", samples)
        write_json(folder / "result.json", result)


def make_trainer(spec: RunSpec, model: PreTrainedModel, prepared: Prepared, checkpoints: Path) -> Trainer:
    length, pad_id = spec.sizes["max_position_embeddings"], pad_token_id(prepared.tokenizer)
    trainer = KINDS[spec.kind].trainer(
        model=model,
        args=TDLMTrainingArguments(output_dir=os.fspath(checkpoints), **spec.training),
        train_dataset=RandomCrops(prepared.train, length, pad_id, spec.seed),
        eval_dataset=prepared.windows,
        processing_class=prepared.tokenizer,
    )
    quiet(trainer)
    return trainer


def train_and_evaluate(trainer: Trainer, spec: RunSpec, checkpoints: Path) -> dict[str, Any]:
    """-> name, seed, held-out metrics, training time (of all sessions together), throughput and peak memory."""
    checkpoint = last_whole_checkpoint(checkpoints)
    stopwatch = Stopwatch(seconds_so_far(checkpoint))
    trainer.add_callback(stopwatch)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))
    seconds, peak = stopwatch.seconds, peak_memory_mb()
    trainer.args.dataloader_drop_last = False  # training drops an epoch's short batch; evaluation scores every window
    evaluation = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    wanted = ("nelbo", "ppl", "bpb", "num_tokens", "num_bytes")
    args, length = trainer.args, spec.sizes["max_position_embeddings"]
    tokens = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size * length
    return {
        "name": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "made_by": {"commit": code_version(), "machine": describe_machine(), "versions": versions()},
        "bound": "upper bound" if KINDS[spec.kind].is_diffusion else "exact",
        **{name: value for name, value in evaluation.items() if name.startswith(wanted)},
        "training_tokens": tokens,
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_mb": peak,
        "peak_memory_of": "device" if torch.cuda.is_available() else "process",
        "log": trainer.state.log_history,
    }


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds of training. A checkpoint carries them, so a run's time is that of all its sessions."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self._stop()

    def state(self) -> dict[str, Any]:
        self._stop()
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def _stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose last file was written to its end; an interruption may have cut a later one."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_text())
            return folder
    return None


def seconds_so_far(checkpoint: Path | None) -> float:
    if checkpoint is None:
        return 0.0
    state = TrainerState.load_from_json(os.fspath(checkpoint / "trainer_state.json"))
    return state.stateful_callbacks["Stopwatch"]["args"]["seconds"]


def count_cost(spec: RunSpec, prepared: Prepared, tree: VocabTree | None) -> dict[str, Any]:
    """Parameters, and training FLOPs a token; two shallow models on the CPU tell those of the deep one."""
    kind, depth = KINDS[spec.kind], spec.sizes["num_hidden_layers"]

    def build(num_hidden_layers: int) -> PreTrainedModel:
        sizes = {**spec.sizes, "num_hidden_layers": num_hidden_layers}
        return kind.model(kind.config(prepared.vocabulary, sizes, spec.fields, tree), tree)

    clean = _first_crops(prepared, spec.sizes["max_position_embeddings"])
    measures = {
        "parameters": lambda model: model.num_parameters(),
        "parameters_without_embeddings": lambda model: (
            model.num_parameters() - model.get_input_embeddings().weight.numel()
        ),
        "flops_per_token": lambda model: (
            training_flops(model, _flops_batch(kind, model, clean, prepared))
            / (len(clean) * spec.sizes["max_position_embeddings"])
        ),
    }
    costs: dict[str, Any] = {"num_hidden_layers": depth}
    for name, measure in measures.items():
        rest, block = affine_in_depth(measure, build)
        costs[name] = round(rest + depth * block)
    return costs


# ---- samples ----


def draw_samples(model: Any, spec: RunSpec, prepared: Prepared) -> list[dict[str, Any]]:
    """-> for each of the model's generation settings, what was set, texts and the entropy of their tokens."""
    model.eval()
    drawn = []
    for settings in spec.generation:
        set_seed(spec.seed)
        ids = _generate(model, spec, settings, prepared.tokenizer.eos_token_id).tolist()
        texts = prepared.tokenizer.batch_decode(ids, skip_special_tokens=True)
        drawn.append({"settings": settings, "entropy": mean_unigram_entropy(ids), "texts": texts})
    return drawn


def _generate(model: Any, spec: RunSpec, settings: dict[str, Any], eos_token_id: int) -> torch.Tensor:
    batch, batches = spec.training["per_device_eval_batch_size"], []
    for start in range(0, spec.num_samples, batch):
        count = min(batch, spec.num_samples - start)
        if KINDS[spec.kind].is_diffusion:
            # Past an end of text too: every model's samples are equally long.
            settings = {"max_new_tokens": spec.max_new_tokens, "eos_token_id": None, **settings}
            ids = model.generate(num_return_sequences=count, **settings)
        else:
            ids = sample_causal(model, count, spec.max_new_tokens, eos_token_id, **settings)
        batches.append(ids)
    return torch.cat(batches)


def score_samples(
    comparison: Comparison, prepared: Prepared, specs: Sequence[RunSpec], folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Entropy and generative perplexity of every run's samples, and under `data` of real text of their length.

    Each folder keeps its scores and what they are scores of, so that a rerun scores only what is new.
    """
    section = comparison.generative
    real = real_samples(prepared, section.num_samples, section.max_new_tokens)
    write_json(folder / "data/samples.json", [real])
    places = {"data": folder / "data", **{spec.run_name: folder / "runs" / spec.run_name for spec in specs}}
    scores, scorer = {}, None
    for name, place in places.items():
        path = place / "samples-score.json"
        if not path.exists() or json.loads(path.read_text())["of"] != dataclasses.asdict(section):
            if section.reference is not None and scorer is None:
                scorer = load_reference(section.reference, section.gguf_file)
            drawn = json.loads((place / "samples.json").read_text())
            scored = [_score(batch, scorer) for batch in drawn]
            write_json(path, {"of": dataclasses.asdict(section), "scores": scored})
        scores[name] = json.loads(path.read_text())["scores"]
    return scores


def _score(batch: dict[str, Any], scorer: tuple[Any, Any] | None) -> dict[str, Any]:
    value = None if scorer is None else generative_perplexity(batch["texts"], *scorer)
    return {"settings": batch["settings"], "entropy": batch["entropy"], "generative_perplexity": value}


def real_samples(prepared: Prepared, num_samples: int, length: int) -> dict[str, Any]:
    """Windows of held-out text as long as the samples (or as the longest there are), spread evenly over it."""
    rows = [ids[:length] for ids in prepared.windows["input_ids"]]
    longest = max(map(len, rows))
    rows = [ids for ids in rows if len(ids) == longest]
    picked = [rows[i] for i in np.linspace(0, len(rows) - 1, min(num_samples, len(rows))).round().astype(int)]
    texts = prepared.tokenizer.batch_decode(picked, skip_special_tokens=True)
    return {"settings": {}, "entropy": mean_unigram_entropy(picked), "texts": texts}


__all__ = ["run_compare"]
