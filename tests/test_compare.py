"""`tdlm compare`: the same batches for every model, resuming, matching, exact and bounded likelihoods, errors."""

import copy
import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from tiny import tiny_config
from transformers import LlamaForCausalLM, Trainer

from tdlm import TDLMForDiffusionLM, VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer import TDLMTrainer, TDLMTrainingArguments, compare, evaluation_windows
from tdlm.trainer.causal import CausalTrainer, causal_config, sample_causal
from tdlm.trainer.cli import main
from tdlm.trainer.comparison import load_comparison, parse_comparison, recipes
from tdlm.trainer.flops import affine_in_depth, diffusion_batch, matching_depth, training_flops
from tdlm.trainer.generative import generative_perplexity, load_reference, mean_unigram_entropy
from tdlm.trainer.own_process import run_in_own_process

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "log",
    "hog",
    "ran",
    "far",
    "away",
    "from",
    "every",
    "small",
    "house",
    "by",
    "river",
    "hill",
]
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
MODELS = {
    "direct": {"kind": "tdlm", "law": "direct", "head_type": "tied"},
    "flat": {"kind": "tdlm", "tree": "flat", "head_type": "vocab", "tie_word_embeddings": True},
    "prime": {"kind": "mdm_prime", "head_type": "digit"},
    "ar": {"kind": "llama", "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    words = re.findall(r"\w+", "the cat sat on a mat and dog log hog ran far away from every small house by river hill")
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, size=rng.integers(5, 40))) for _ in range(24)]


@pytest.fixture(scope="module")
def settings(texts, tmp_path_factory) -> dict:
    """A whole comparison in a few seconds: two seeds of four kinds of model, six steps each."""
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "data": {"train": str(corpus), "validation": str(corpus), "vocab_size": 280, "max_eval_tokens": 100},
        "tree": {"branching_factor": 24},
        "backbone": SIZES,
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True},
        "seeds": [0, 1],
        "generative": {"num_samples": 3, "num_steps": 4, "max_new_tokens": 8},
        "models": MODELS,
    }


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(compare, "run_in_own_process", lambda target, argument, what: target(argument))


def write(folder, settings, **changes):
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({**settings, **changes}, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def outcome(settings, tmp_path_factory):
    """The comparison run to its end, with the clean tokens of every training batch by model and seed."""
    folder, batches = tmp_path_factory.mktemp("compare"), {}
    training_step = Trainer.training_step

    def record(self, model, inputs, *args, **kwargs):
        skip = 1 if isinstance(self, CausalTrainer) else 0
        batches.setdefault(self.args.output_dir.split("/")[-2], []).append(inputs["labels"][:, skip:].tolist())
        return training_step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_in_own_process", lambda target, argument, what: target(argument))
        patch.setattr(Trainer, "training_step", record)
        results = compare.run_compare(write(folder, settings), str(folder / "out"), command="tdlm compare tiny")
    return folder / "out", results, batches


# ---- the whole ----


def test_a_comparison_trains_everything_and_writes_table_and_plots(outcome):
    folder, results, _ = outcome
    saved = json.loads((folder / "results.json").read_text())
    assert saved == {name: value for name, value in results.items() if name != "table"}
    assert {path.stem for path in folder.glob("*.png")} == {
        *("nelbo", "levels", "nelbo-against-time", "nelbo-against-throughput")
    }
    assert len(saved["runs"]) == 8
    for run in saved["runs"]:
        assert run["ppl"] == pytest.approx(np.exp(run["nelbo"]))
        assert run["bpb"] == pytest.approx(run["nelbo"] * run["num_tokens"] / np.log(2) / run["num_bytes"])
        levels = [value for name, value in run.items() if name.startswith("nelbo_level_")]
        assert sum(levels) == pytest.approx(run["nelbo"])
        assert run["flops_per_token"] > 0 < run["tokens_per_second"]
        assert run["training_tokens"] == 6 * 4 * 16
        assert not (folder / "runs" / f"{run['name']}-seed{run['seed']}" / "checkpoints").exists()
    assert len({(run["num_tokens"], run["num_bytes"]) for run in saved["runs"]}) == 1
    assert {run["name"]: run["bound"] for run in saved["runs"]} == {
        **dict.fromkeys(("direct", "flat", "prime"), "upper bound"),
        "ar": "exact",
    }


def test_the_table_says_what_is_exact_with_mean_and_spread(outcome):
    folder, results, _ = outcome
    table = (folder / "table.md").read_text()
    assert table == results["table"]
    means = [model["nelbo"]["mean"] for model in results["models"]]
    assert means == sorted(means)
    for model in results["models"]:
        values = [run["nelbo"] for run in results["runs"] if run["name"] == model["name"]]
        cell = f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        assert f"| {model['name']} | {model['bound']} | 2 | {cell} |" in table
    assert "`tdlm compare tiny`" in table
    assert torch.__version__ in table
    assert "| real held-out text |" in table


def test_every_model_is_trained_on_the_same_batches(outcome):
    _, _, batches = outcome
    assert len(batches) == 8
    for seed in (0, 1):
        seen = [batches[f"{name}-seed{seed}"] for name in MODELS]
        assert len(seen[0]) == 6
        assert all(other == seen[0] for other in seen)
    assert batches["ar-seed0"] != batches["ar-seed1"]


def test_saved_models_and_samples_are_whole(outcome):
    folder, results, _ = outcome
    assert (folder / "runs/direct-seed0/model/tokenizer.json").exists()
    for model in results["models"]:
        (batch,) = model["samples"]
        assert batch["generative_perplexity"] is None
        assert 0 < batch["entropy"]["mean"] <= np.log(8)
        texts = json.loads((folder / f"runs/{model['name']}-seed0/samples.json").read_text())[0]["texts"]
        assert len(texts) == 3


def test_a_rerun_trains_nothing_and_gives_the_same_table(outcome, settings, tmp_path, monkeypatch):
    folder, results, _ = outcome

    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "run_in_own_process", refuse)
    again = compare.run_compare(write(tmp_path, settings), str(folder), command="tdlm compare tiny")
    assert again["table"] == results["table"]


def test_another_reference_scores_the_samples_without_training(outcome, settings, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(outcome[0], folder)
    reference = folder / "runs/ar-seed0/model"
    monkeypatch.setattr(compare, "train_all", lambda specs, folder: None)
    generative = {**settings["generative"], "reference": str(reference)}
    results = compare.run_compare(write(tmp_path, settings, generative=generative), str(folder))
    texts = json.loads((folder / "runs/flat-seed1/samples.json").read_text())[0]["texts"]
    scored = next(model for model in results["models"] if model["name"] == "flat")["samples"][0]
    expected = generative_perplexity(texts, *load_reference(str(reference)))
    assert scored["generative_perplexity"]["values"][1] == pytest.approx(expected)
    assert results["real_text"]["generative_perplexity"] > 1


# ---- interruption ----


def numbers(result: dict) -> dict:
    """What must not depend on when a run was interrupted."""
    timed = ("training_seconds", "tokens_per_second", "peak_memory_mb", "peak_memory_of", "log")
    return {name: value for name, value in result.items() if name not in timed}


def losses(result: dict) -> list[float]:
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


def test_a_killed_run_ends_as_one_never_killed(outcome, settings, tmp_path, monkeypatch, in_this_process):
    """Interrupted in step 4 and then in the evaluation, a checkpoint cut in the middle; finished by a new process."""
    config, folder = write(tmp_path, settings), tmp_path / "out"
    training_step, only = TDLMTrainer.training_step, {"only": ["direct"]}

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(TDLMTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare.run_compare(config, str(folder), **only)
    monkeypatch.setattr(TDLMTrainer, "training_step", training_step)
    checkpoints = folder / "runs/direct-seed0/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-4")
    state = (checkpoints / "checkpoint-3/trainer_state.json").read_text()
    (checkpoints / "checkpoint-4/trainer_state.json").write_text(state[: len(state) // 2])
    (checkpoints / "checkpoint-4/model.safetensors").write_bytes(b"cut")

    def interrupt_evaluation(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TDLMTrainer, "evaluate", interrupt_evaluation)
    with pytest.raises(KeyboardInterrupt):
        compare.run_compare(config, str(folder), **only)
    assert not (folder / "runs/direct-seed0/result.json").exists()
    monkeypatch.undo()  # the rest in a process of its own
    compare.run_compare(config, str(folder), **only)
    for seed in (0, 1):
        killed, whole = (
            json.loads((root / f"runs/direct-seed{seed}/result.json").read_text()) for root in (folder, outcome[0])
        )
        assert numbers(killed) == numbers(whole)
        assert losses(killed) == losses(whole)
        assert (folder / f"runs/direct-seed{seed}/samples.json").read_text() == (
            outcome[0] / f"runs/direct-seed{seed}/samples.json"
        ).read_text()
    assert killed["training_seconds"] > 0


def test_a_failure_in_a_process_names_what_failed():
    with pytest.raises(OSError, match="training x ended with exit status 3"):
        run_in_own_process(sys.exit, 3, "training x")


# ---- the autoregressive baseline ----


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 280, progress=False)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(causal_config(280, SIZES, initializer_range=0.3)).eval()


def test_the_autoregressive_likelihood_is_that_of_every_token_of_every_window(texts, tokenizer, llama, tmp_path):
    windows = evaluation_windows(Dataset.from_dict({"text": texts}), tokenizer, 16)
    args = TDLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=5, report_to=[])
    trainer = CausalTrainer(model=llama, args=args, eval_dataset=windows, processing_class=tokenizer)
    metrics = trainer.evaluate()
    nats = 0.0
    for ids in windows["input_ids"]:
        logits = llama(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0, :-1].detach()
        nats -= float(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].double().sum())
    tokens = sum(map(len, windows["input_ids"]))
    assert metrics["eval_num_tokens"] == tokens
    assert metrics["eval_nelbo"] == pytest.approx(nats / tokens, rel=1e-6)
    assert metrics["eval_bpb"] == pytest.approx(nats / np.log(2) / sum(len(text.encode()) for text in texts), rel=1e-6)


def test_the_twin_has_the_sizes_of_the_backbone(llama):
    config = llama.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert (config.intermediate_size, config.max_position_embeddings) == (64, 17)


def test_autoregressive_samples_go_past_the_end_of_a_document(llama):
    forced = copy.deepcopy(llama)
    with torch.no_grad():
        forced.lm_head.weight.zero_()
    samples = sample_causal(forced, 40, 12, eos_token_id=0)
    assert samples.shape == (40, 12)
    # Uniform over the vocabulary: 0 is a token like any other.
    assert samples.max() < 280
    assert samples.unique().numel() > 150


# ---- generative perplexity ----


def test_generative_perplexity_is_token_weighted(texts, tokenizer, llama):
    chosen = [texts[0], "a", "the cat", texts[1]]  # "a" is one token: nothing to score
    nats, tokens = 0.0, 0
    for text in chosen:
        ids = torch.tensor(tokenizer(text)["input_ids"])[:17]
        log_probs = llama(ids[None]).logits[0, :-1].detach().log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[1:, None]).sum())
        tokens += len(ids) - 1
    assert generative_perplexity(chosen, llama, tokenizer) == pytest.approx(np.exp(nats / tokens), rel=1e-5)
    with pytest.raises(ValueError, match="none of the 1 texts has the two tokens"):
        generative_perplexity(["a"], llama, tokenizer)


def test_entropy_is_of_each_sample_by_itself():
    assert mean_unigram_entropy([[3, 3, 3, 3], [1, 2, 3, 4]]) == pytest.approx(np.log(4) / 2)


# ---- costs ----


def linear_weights(model) -> int:
    return sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, torch.nn.Linear))


def test_flops_of_the_twin_are_those_of_its_matrices(llama):
    ids = torch.randint(0, 280, (4, 17))
    batch = {"input_ids": ids, "labels": ids}
    matrices = 6 * ids.numel() * (linear_weights(llama.model) + llama.lm_head.weight.numel())
    attention = 12 * 4 * 17**2 * 16 * 2
    # Plus the rotary angles, a product too.
    assert training_flops(copy.deepcopy(llama), batch) == pytest.approx(matrices + attention, rel=1e-3)


def test_flops_of_a_tree_model_count_the_grouped_products_of_its_head():
    tree = VocabTree.random(50, 8, seed=0)
    model = TDLMForDiffusionLM(tiny_config(tree, law="direct", head_type="tied"), tree)
    clean = torch.randint(0, 50, (128, 16), generator=torch.Generator().manual_seed(0))
    batch = diffusion_batch(model, clean)
    rows = int((batch["input_ids"] == tree.root_id).sum()) * tree.height
    assert rows / tree.height / clean.numel() == pytest.approx(0.5, abs=0.03)
    modulations = [m for name, m in model.model.named_modules() if name.endswith("modulation")]
    per_sequence = sum(m.weight.numel() for m in modulations)  # one condition for the whole batch
    blocks = linear_weights(model.model) - sum(m.weight.numel() for m in modulations[:-1])
    expected = 6 * clean.numel() * blocks + 12 * 128 * 16**2 * 32 * 2 + 6 * rows * 32 * 8 + 6 * per_sequence
    assert training_flops(model, batch) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_costs_are_affine_in_depth(cost):
    tree = VocabTree.random(50, 8, seed=0)
    clean = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0))

    def build(depth):
        return TDLMForDiffusionLM(tiny_config(tree, num_hidden_layers=depth), tree)

    def measure(model):
        return model.num_parameters() if cost == "parameters" else training_flops(model, diffusion_batch(model, clean))

    rest, block = affine_in_depth(measure, build)
    assert rest + 5 * block == measure(build(5))
    assert matching_depth(rest + 5.4 * block, (rest, block)) == 5
    with pytest.raises(ValueError, match="no depth matches: without its blocks the model costs"):
        matching_depth(rest - block, (rest, block))


@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_matched_models_come_nearest_to_the_reference(settings, tmp_path, match):
    wide = {"kind": "tdlm", "law": "direct", "head_type": "node"}
    models = {"big": {**wide, "hidden_size": 32}, "small": wide, "ar": MODELS["ar"]}
    config = write(tmp_path, settings, match=match, reference="big", models=models, seeds=[0])
    comparison = load_comparison(config)
    prepared = compare.prepare(comparison, tmp_path / "out")
    specs = {spec.name: spec for spec in compare.plan(comparison, prepared, tmp_path / "out")}
    measure = "parameters" if match == "parameters" else "flops_per_token"

    def cost(name, change=0):
        sizes = {**specs[name].sizes, "num_hidden_layers": specs[name].sizes["num_hidden_layers"] + change}
        spec = dataclasses.replace(specs[name], sizes=sizes)
        return compare.count_cost(spec, prepared, prepared.tree(spec.tree))[measure]

    assert specs["big"].sizes["num_hidden_layers"] == 2
    for name in ("small", "ar"):
        gap = [abs(cost(name, change) - cost("big")) for change in (-1, 0, 1)]
        assert gap[1] == min(gap)
        assert specs[name].sizes["num_hidden_layers"] > 2


# ---- recipes and errors ----


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_resolves_to_valid_configurations(name, tmp_path):
    comparison = load_comparison(name)
    vocab_size = 50257 if comparison.data.tokenizer == "gpt2" else comparison.data.vocab_size
    offline = dataclasses.replace(
        comparison,
        data=dataclasses.replace(comparison.data, tokenizer=None, vocab_size=vocab_size),
        training={**comparison.training, "use_cpu": True},
        generative=dataclasses.replace(comparison.generative, reference=None),
    )
    offline.check(str(tmp_path))


def test_recipes_can_be_listed(capsys):
    assert main(["compare", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {"peers-cpu", "peers-gpu", "gidd", "ablation-steps"} <= set(listed)
    assert main(["compare", "--list"]) == 0
    assert "MDLM" in capsys.readouterr().out


def test_the_command_overrides_the_data_and_prints_json(outcome, settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "train_all", lambda specs, folder: None)
    corpus = settings["data"]["train"]
    data = {name: value for name, value in settings["data"].items() if name not in ("train", "validation")}
    config = write(tmp_path, settings, data=data)
    flags = ["--train-data", corpus, "--validation-data", corpus, "--only", "direct", "ar"]
    assert main(["compare", config, "--output", str(outcome[0]), *flags, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["table"] == (outcome[0] / "table.md").read_text()
    assert "--only direct ar" in results["command"]
    assert main(["compare", config, "--output", str(outcome[0]), *flags]) == 0
    assert "| real held-out text |" in capsys.readouterr().out


def changed(path: str, value):
    """A change of one entry, given as `section.entry`; `None` deletes it."""

    def change(settings):
        *sections, name = path.split(".")
        section = settings
        for part in sections:
            section = section[part]
        if value is None:
            del section[name]
        else:
            section[name] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trees", {}, r"the file sets \['trees'\], which is not one of"),
        ("models", None, r"the file must set \['models'\]"),
        ("models", {}, "models names no model"),
        ("data", [1], r"data must be a section of `name: value` lines, not \[1\]"),
        ("data.files", "x", r"data sets \['files'\]"),
        ("data.train", "missing.jsonl", "no such file or folder: missing.jsonl"),
        ("data.tokenizer", "no/such/tokenizer", "no/such/tokenizer"),
        ("data.vocab_size", 0, "vocab_size=0 must be a whole number, at least 1"),
        ("data.max_train_tokens", "many", "max_train_tokens='many' must be a whole number"),
        ("generative.samples", 3, r"generative sets \['samples'\]"),
        ("generative.num_steps", 0, "num_steps=0 must be a whole number"),
        ("generative.reference", "no/such/model", "no/such/model"),
        ("backbone.vocab_size", 9, r"backbone sets \['vocab_size'\]"),
        ("backbone.hidden_size", None, r"backbone must set \['hidden_size'\]"),
        ("backbone.hidden_size", 30, r"models.direct: [\s\S]*hidden_size=30 must be an even multiple"),
        ("training", "fast", "training must be a section of `name: value` lines, not 'fast'"),
        ("training.max_steps", None, r"training must set \['max_steps'\]"),
        ("training.max_steps", 2.5, "training.max_steps=2.5 must be a whole number"),
        ("training.learning_rat", 1, r"training sets \['learning_rat'\]"),
        ("training.seed", 1, r"training sets \['seed'\], which `tdlm compare` sets itself"),
        ("training.eval_num_samples", 0, "eval_num_samples=0 must be at least 1"),
        ("training.per_device_train_batch_size", 25, "holds 24 documents, fewer than per_device_train_batch_size=25"),
        ("seeds", [0, 0], r"seeds=\[0, 0\] must list different whole numbers"),
        ("seeds", 3, "seeds=3 must list different whole numbers"),
        ("seeds", [-1], r"seeds=\[-1\] must list different whole numbers from 0"),
        ("backbone.num_hidden_layers", 0, "backbone.num_hidden_layers=0 must be a whole number"),
        ("training.per_device_train_batch_size", "4", "per_device_train_batch_size='4' must be a whole number"),
        ("training.auto_find_batch_size", True, r"training sets \['auto_find_batch_size'\], which `tdlm compare`"),
        ("tree.branching_factor", "x", "tree.branching_factor='x' must be a whole number"),
        ("tree.height", 1, "a tree of height=1 with branching_factor=.* has fewer leaves than the 280 tokens"),
        ("models.ar.kind", ["llama"], "models.ar needs a `kind:`, one of"),
        ("match", "time", "match='time' is not one of"),
        ("match", "flops", "match='flops' needs a `reference:` that is one of the models, not None"),
        ("reference", "ar", "reference='ar' is for match: parameters or flops"),
        ("tree", 3, "tree=3 must be `flat` or a section"),
        ("tree", "round", "tree: kind 'round' is not one of"),
        ("tree", {"height": 3}, r"tree must set \['branching_factor'\]"),
        ("tree.size", 1, r"tree sets \['size'\]"),
        ("models.ar.kind", "gpt", "models.ar needs a `kind:`, one of"),
        ("models.a b", {"kind": "llama"}, "models.a b: a name has letters"),
        ("models.ar.tree", "flat", "models.ar: kind 'llama' has no tree"),
        ("models.ar.heads", 3, r"models.ar: \['heads'\] are no fields of LlamaConfig"),
        ("models.direct.heads", 3, r"models.direct: \['heads'\] are no fields of TDLMConfig"),
        ("models.prime.heads", 3, r"models.prime: \['heads'\] are no fields of MDMPrimeConfig"),
        ("models.direct.vocab_size", 9, r"models.direct sets \['vocab_size'\], which follow from"),
        ("models.direct.head_type", "shared", r"models.direct: [\s\S]*law='direct' scores a whole path"),
        ("models.direct.training", {"max_steps": 3}, r"models.direct.training sets \['max_steps'\], which must be the"),
        ("models.direct.generation", {}, "models.direct.generation must list sections"),
        ("models.direct.generation", [{"steps_per_level": [2, 2]}], "models.direct: .*only the sequential law goes"),
        ("models.direct.generation", [{"num_beams": 4}], "models.direct: .*num_beams"),
        ("models.ar.generation", [{"num_denoising_steps": 4}], r"models.ar: generation sets \['num_denoising_steps'\]"),
        ("generative.max_new_tokens", 17, r"generative.max_new_tokens=17 is more than the context of 16"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(settings, tmp_path, monkeypatch, path, value, message):
    monkeypatch.setattr(compare, "train_all", lambda specs, folder: pytest.fail("trained"))
    settings = copy.deepcopy(settings)
    changed(path, value)(settings)
    with pytest.raises((ValueError, OSError), match=message):
        compare.run_compare(write(tmp_path, settings), str(tmp_path / "out"))


def test_a_matched_model_has_no_depth_of_its_own(settings):
    models = {**MODELS, "deep": {**MODELS["ar"], "num_hidden_layers": 4}}
    assert parse_comparison({**settings, "models": models}).models["deep"].fields["num_hidden_layers"] == 4
    with pytest.raises(ValueError, match=r"models.deep sets num_hidden_layers, which match='flops' computes"):
        parse_comparison({**settings, "models": models, "match": "flops", "reference": "ar"})


def test_a_long_autoregressive_sample_is_refused(settings, tmp_path):
    comparison = parse_comparison({**settings, "models": {"ar": MODELS["ar"]}})
    longer = dataclasses.replace(comparison, generative=dataclasses.replace(comparison.generative, max_new_tokens=17))
    with pytest.raises(ValueError, match=r"models.ar: generative.max_new_tokens=17 is more than the context of 16"):
        longer.check(str(tmp_path))


def test_a_folder_is_refused_to_another_comparison(outcome, settings, tmp_path):
    other = copy.deepcopy(settings)
    other["models"]["flat"]["loss_weight_clip"] = 5.0
    with pytest.raises(ValueError, match=r"flat-seed0 was trained with another configuration: fields.loss_weight_clip"):
        compare.run_compare(write(tmp_path, other), str(outcome[0]))
    other = copy.deepcopy(settings)
    other["data"]["vocab_size"] = 290
    with pytest.raises(ValueError, match="data was made from other data: vocab_size was 280 and is now 290"):
        compare.run_compare(write(tmp_path, other), str(outcome[0]))
    with pytest.raises(ValueError, match=r"--only \['dirct'\]: the models of .* are \['direct'"):
        compare.run_compare(write(tmp_path, settings), str(outcome[0]), only=["dirct"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold `name: value` lines, not list"),
        ("models: {a: {kind: llama}, a: {kind: llama}}", r"names \['a'\] twice"),
    ],
)
def test_files_that_are_no_comparison_are_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_comparison(str(tmp_path / "x.yaml"))


def test_a_number_with_an_exponent_is_a_number(settings, tmp_path):
    path = write(tmp_path, settings)
    text = (tmp_path / "comparison.yaml").read_text()
    (tmp_path / "comparison.yaml").write_text(re.sub("learning_rate: .*", "learning_rate: 2e-3", text))
    assert load_comparison(path).training["learning_rate"] == 2e-3


def test_data_and_reference_can_be_given_beside_the_file(settings, tmp_path):
    path = write(tmp_path, settings)
    comparison = load_comparison(path, {"validation": "held-out.txt", "train": None}, {"reference": "gpt2"})
    assert (comparison.data.validation, comparison.generative.reference) == ("held-out.txt", "gpt2")
    assert comparison.data.train == load_comparison(path).data.train


def test_usage_errors_say_what_is_missing(capsys):
    assert main(["compare", "no-such-recipe", "--output", "x"]) == 2
    assert "neither a .yaml file nor one of the recipes" in capsys.readouterr().err
    assert main(["compare", "missing.yaml", "--output", "x"]) == 2
    assert "missing.yaml" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "compare needs a YAML file" in capsys.readouterr().err
