"""The quickstart: tokenizer, tree, a tree model and its flat twin, text, and a report, from a corpus in the package."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from tdlm.modeling_tdlm import TDLMForDiffusionLM
from tdlm.tokenization import train_tokenizer
from tdlm.trainer.data import RandomCrops, evaluation_windows, load_text, pad_token_id, tokenize, unigram_entropy
from tdlm.trainer.model_card import CardDataset, CardDetails, create_model_card
from tdlm.trainer.own_process import (
    describe_machine,
    peak_memory_mb,
    quiet,
    run_in_own_process,
    short_bars_off,
    write_json,
)
from tdlm.trainer.report import node_labels, tree_for_report, write_report
from tdlm.trainer.run import make_config, make_tree
from tdlm.trainer.trainer import TDLMTrainer
from tdlm.trainer.training_args import TDLMTrainingArguments
from tdlm.vocab_tree_tdlm import VocabTree

VOCAB_SIZE = 4096
BRANCHING_FACTOR = 96  # about sqrt(V) nodes of about sqrt(V) tokens, with room for uneven clusters
BATCH_SIZE = 32
MAX_STEPS = 1200
LEARNING_RATE = 1e-3
PROMPT = "It was a fine morning, and the captain"

# Loaded where `tdlm` cannot be imported: the checkpoint must bring its own code.
_STRANGER = """
import sys
class NoTdlm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tdlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTdlm())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "tdlm" not in sys.modules and type(model).__module__.startswith("transformers_modules")
ids = model.generate(max_new_tokens=32, generator=torch.Generator().manual_seed(0))
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


@dataclass
class TwinSpec:
    """One model to train in its own process: everything but the tree is the same for both twins."""

    name: str
    folder: str
    max_steps: int
    seed: int
    model_config: dict[str, Any] = field(default_factory=dict)

    @property
    def tree_file(self) -> Path:
        return Path(self.folder, f"{self.name}-tree.safetensors")

    @property
    def model_folder(self) -> Path:
        return Path(self.folder, "model" if self.name == "tdlm" else f"{self.name}-model")


def run_quickstart(output: str, max_steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Do the whole job; returns what `results.json` holds. Files: model/, results.json, samples.txt, report.html."""
    short_bars_off()
    started, folder = time.time(), Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _say(1, "Train a byte-level BPE on novels of Austen and Melville, build the tree from their text")
    tokenizer, tree, entropy = prepare(folder, seed)
    twins = [TwinSpec(name, output, max_steps or MAX_STEPS, seed) for name in ("tdlm", "flat")]
    tree.save(twins[0].tree_file)
    VocabTree.flat(tree.vocab_size).bind(tokenizer).save(twins[1].tree_file)
    runs = {}
    for number, twin in enumerate(twins, start=2):
        kind = f"tree {VocabTree.load(twin.tree_file).nodes_per_height[::-1]}, root first"
        _say(number, f"Train {twin.name} ({kind}; {twin.max_steps} steps of {BATCH_SIZE} x 64 tokens)")
        runs[twin.name] = _train(twin)
    results = {"unigram_entropy": entropy} | {name: run["metrics"] for name, run in runs.items()}
    write_json(folder / "results.json", results)
    print_table(results)
    _say(4, "Generate")
    samples, trajectory = generate_samples(twins[0].model_folder, seed)
    (folder / "samples.txt").write_text(_format_samples(samples), encoding="utf-8")
    print(_format_samples(samples))
    _say(5, "Load the checkpoint where tdlm is not installed")
    print(load_as_stranger(twins[0].model_folder))
    _say(6, "Write the report")
    _write_report(folder / "report.html", results, runs, tree, tokenizer, samples, trajectory, twins[0])
    print(
        f"Done in {time.time() - started:.0f} s. Look at {folder / 'report.html'} in a browser. Next:\n"
        f'  tdlm generate {twins[0].model_folder} --prompt "Call me" --num-samples 3\n'
        f"  tdlm tree show {twins[0].tree_file} --tokenizer {twins[0].model_folder}"
    )
    return results


def corpus_file(split: str) -> str:
    """Path of the corpus that ships with the package: `train` or `validation`."""
    return str(resources.files("tdlm.trainer").joinpath(f"corpus/novels-{split}.parquet"))


def prepare(folder: Path, seed: int) -> tuple[PreTrainedTokenizerBase, VocabTree, float]:
    """Tokenizer, tokenised data (in `folder`/data) and tree -> tokenizer, tree, held-out unigram entropy in nats."""
    text = {split: load_text(corpus_file(split)) for split in ("train", "validation")}
    tokenizer = train_tokenizer(text["train"]["text"], VOCAB_SIZE)
    tokenizer.save_pretrained(folder / "tokenizer")
    train_ids = tokenize(text["train"], tokenizer)
    windows = evaluation_windows(text["validation"], tokenizer, 64)
    datasets.DatasetDict({"train": train_ids, "validation": windows}).save_to_disk(folder / "data")
    tree = make_tree(tokenizer, BRANCHING_FACTOR, "corpus", train_ids["input_ids"], seed)
    return tokenizer, tree, unigram_entropy(windows["input_ids"], tree.vocab_size)


# ---- training ----


def _train(twin: TwinSpec) -> dict[str, Any]:
    """A fresh process for each model, so that its peak memory is its own."""
    run_in_own_process(train_twin, asdict(twin), f"training {twin.name}")
    return json.loads(Path(twin.folder, f"{twin.name}-run.json").read_text())


def train_twin(spec: dict[str, Any]) -> None:
    """Train, evaluate and save one model; writes `<name>-run.json` with its metrics and log."""
    twin = TwinSpec(**spec)
    short_bars_off()
    set_seed(twin.seed)
    data = datasets.load_from_disk(os.fspath(Path(twin.folder, "data")))
    tokenizer = AutoTokenizer.from_pretrained(Path(twin.folder, "tokenizer"))
    tree = VocabTree.load(twin.tree_file)
    model = TDLMForDiffusionLM(make_config(tree, tokenizer, "tiny", head_type="tied", **twin.model_config), tree)
    length = model.config.max_position_embeddings
    args = TDLMTrainingArguments(
        output_dir=twin.folder,
        max_steps=twin.max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=2 * BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        logging_steps=max(1, twin.max_steps // 40),
        save_strategy="no",
        report_to=[],
        seed=twin.seed,
        eval_num_samples=4,
    )
    crops = RandomCrops(data["train"], length, pad_token_id(tokenizer), twin.seed)
    trainer = TDLMTrainer(
        model=model, args=args, train_dataset=crops, eval_dataset=data["validation"], processing_class=tokenizer
    )
    quiet(trainer)
    seconds = trainer.train().metrics["train_runtime"]
    peak = peak_memory_mb()
    evaluation = trainer.evaluate()
    model.save_pretrained(twin.model_folder)
    tokenizer.save_pretrained(twin.model_folder)
    create_model_card(model, tokenizer, _card_details(twin), trainer).save(twin.model_folder / "README.md")
    metrics = {name: evaluation[f"eval_{name}"] for name in ("nelbo", "ppl", "bpb", "nelbo_standard_error")}
    metrics |= {
        "parameters": model.num_parameters(),
        "tokens_per_second": twin.max_steps * BATCH_SIZE * length / seconds,
        "peak_memory_mb": peak,
        "nelbo_by_level": [evaluation[f"eval_nelbo_level_{level}"] for level in range(tree.height)],
    }
    write_json(Path(twin.folder, f"{twin.name}-run.json"), {"metrics": metrics, "log": trainer.state.log_history})


def _card_details(twin: TwinSpec) -> CardDetails:
    novels = "novels of Jane Austen and Herman Melville"
    return CardDetails(
        model_name=f"tdlm quickstart: {twin.name}",
        language="en",
        license="apache-2.0",
        train_data=(CardDataset(novels, split="train"),),
        eval_data=CardDataset(novels, split="validation"),
        command=f"tdlm quickstart --max-steps {twin.max_steps} --seed {twin.seed}",
    )


# ---- showing ----


def print_table(results: dict[str, Any]) -> None:
    columns = ("nelbo", "ppl", "bpb", "parameters", "tokens_per_second", "peak_memory_mb")
    print(f"\n{'':8}" + "".join(f"{column:>19}" for column in columns))
    for name in ("tdlm", "flat"):
        cells = (
            f"{results[name][column]:,.3f}" if column in columns[:3] else f"{results[name][column]:,.0f}"
            for column in columns
        )
        print(f"{name:8}" + "".join(f"{cell:>19}" for cell in cells))
    print(
        f"{'unigram':8}{results['unigram_entropy']:>19,.3f}   (entropy of the held-out token frequencies)\n"
        "Held out, nats per token. NELBO, PPL and bpb are Monte Carlo estimates of true upper bounds."
    )


def generate_samples(model_folder: Path, seed: int) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Samples without and with a prompt -> [{prompt, text}], and the trajectory of the prompted ones' first."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(seed)
    free = model.generate(num_return_sequences=3, generator=generator)
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        **prompt, num_return_sequences=3, generator=generator, return_dict_in_generate=True, output_trajectory=True
    )
    samples = [{"prompt": "", "text": text} for text in tokenizer.batch_decode(free, skip_special_tokens=True)]
    samples += [
        {"prompt": PROMPT, "text": text} for text in tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    ]
    return samples, {"ids": torch.stack(output.trajectory)[:, 0], "timesteps": output.timesteps}


def _format_samples(samples: list[dict[str, str]]) -> str:
    return "\n".join(
        f"--- {'after ' + repr(sample['prompt']) if sample['prompt'] else 'from nothing'} ---\n{sample['text']}\n"
        for sample in samples
    )


def load_as_stranger(model_folder: Path) -> str:
    """Load and generate in a process in which `import tdlm` fails; returns what it printed."""
    command = [sys.executable, "-c", _STRANGER, os.fspath(model_folder.resolve())]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise OSError(f"the checkpoint does not load without tdlm:\n{process.stderr}")
    return process.stdout


def _write_report(
    path: Path,
    results: dict[str, Any],
    runs: dict[str, Any],
    tree: VocabTree,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[dict[str, str]],
    trajectory: dict[str, Any],
    twin: TwinSpec,
) -> None:
    data = datasets.load_from_disk(os.fspath(path.parent / "data"))
    counts = torch.bincount(
        torch.cat([torch.tensor(ids) for ids in data["train"]["input_ids"]]), minlength=tree.vocab_size
    )
    tree_data = tree_for_report(tree, lambda token: tokenizer.decode([token]), counts.tolist())
    summary = {
        "corpus": "novels of Jane Austen and Herman Melville (public domain)",
        "vocabulary": tree.vocab_size,
        "training steps": twin.max_steps,
        "tokens per step": BATCH_SIZE * 64,
        "training curves": "clipped weights: no bound, not comparable between the models",
        "seed": twin.seed,
        "machine": describe_machine(),
        "versions": f"torch {torch.__version__}",
        "unigram_entropy": results["unigram_entropy"],
    }
    write_report(
        path,
        title="tdlm quickstart",
        summary=summary,
        models=[{"name": name, **results[name]} for name in ("tdlm", "flat")],
        loss_curves=_loss_curves(runs),
        tree=tree_data,
        trajectory=_trajectory_for_report(trajectory, tree, node_labels(tree_data), tokenizer),
        samples=samples,
    )


def _loss_curves(runs: dict[str, Any]) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {}
    for name, run in runs.items():
        for entry in run["log"]:
            for key, value in entry.items():
                if key == "loss" or key.startswith("loss_level_"):
                    curves.setdefault(f"{name}: {key}", []).append([entry["step"], value])
    return curves


def _trajectory_for_report(
    trajectory: dict[str, Any], tree: VocabTree, labels: dict[int, str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    ids, times = trajectory["ids"], trajectory["timesteps"]
    seen = torch.unique(ids.cpu())
    text = {
        str(node): tokenizer.decode([node]) if node < tree.vocab_size else labels.get(node, str(node))
        for node in seen.tolist()
    }
    heights = dict(zip(map(str, seen.tolist()), tree.node_height(seen).tolist(), strict=True))
    steps = [
        {"step": step, "level": int(tree.node_height(row).max()) - 1, "t": time, "ids": row.tolist()}
        for step, (row, time) in enumerate(zip(ids.cpu(), times, strict=True))
    ]
    return {"steps": steps, "text": text, "vocab_size": tree.vocab_size, "heights": heights}


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/6] {what}", flush=True)


__all__ = ["run_quickstart"]
