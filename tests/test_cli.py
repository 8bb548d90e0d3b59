"""The `tdlm` command: what it prints, what it writes, how it fails."""

import json
import re

import numpy as np
import pytest
import yaml

from tdlm import VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer.cli import main

TEXT = ["the cat sat on the mat and the dog sat on the log"] * 4 + ["a cat and a dog and a hog"] * 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A model trained by `tdlm train --config`, with a flag that overrides the file."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "per_device_train_batch_size": 4,
        "train_data": str(corpus),
        "eval_data": str(corpus),
        "vocab_size": 280,
        "branching_factor": 24,
        "preset": "tiny",
        "model_config": {"hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16},
        "output_dir": str(folder / "model"),
        "max_steps": 5,
        "learning_rate": "1e-3",  # YAML reads 1e-3 as a string
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(folder / "run.yaml"), "--max_steps", "3"]) == 0
    return folder / "model"


def run_json(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    return json.loads(output)


def test_train_writes_a_whole_checkpoint(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_tdlm.py", "all_results.json"} <= names
    state = json.loads((trained / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_train_continues_from_a_checkpoint(trained, corpus, tmp_path, capsys):
    flags = ["--train_data", str(corpus), "--model_name_or_path", str(trained), "--output_dir", str(tmp_path)]
    result = run_json(capsys, "train", *flags, "--max_steps", "1", "--report_to", "none", "--use_cpu", "True")
    assert result["output_dir"] == str(tmp_path)
    assert np.isfinite(result["train_loss"])


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mdm_prime", "model_config": {"head_type": "joint"}},
        {"tree": "flat", "model_config": {"head_type": "vocab", "tie_word_embeddings": True}},
        {"branching_factor": 24, "model_config": {"law": "direct"}},
    ],
    ids=["mdm_prime", "flat", "direct"],
)
def test_every_kind_of_model_is_trained_evaluated_and_sampled(fields, corpus, tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 16}
    settings = {"train_data": str(corpus), "output_dir": str(tmp_path / "model"), "vocab_size": 280, "preset": "tiny"}
    settings |= {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    settings |= {"save_strategy": "no", **fields, "model_config": {**sizes, **fields["model_config"]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    result = run_json(capsys, "evaluate", str(tmp_path / "model"), "--data", str(corpus), "--num-samples", "2")
    assert 0 < result["nelbo"] < 20 and result["ppl"] == pytest.approx(np.exp(result["nelbo"]))
    texts = run_json(capsys, "generate", str(tmp_path / "model"), "--prompt", "the", "--num-samples", "2")["texts"]
    assert len(texts) == 2 and all(text.startswith("the") for text in texts)
    has_tree = fields.get("model_type") != "mdm_prime"
    assert main(["generate", str(tmp_path / "model"), "--max-new-tokens", "3", "--watch"]) == (0 if has_tree else 2)
    assert has_tree or "mdm_prime models have none" in capsys.readouterr().err


def test_train_streams(trained, corpus, tmp_path, capsys):
    flags = ["--train_data", str(corpus), "--model_name_or_path", str(trained), "--output_dir", str(tmp_path)]
    options = ["--streaming", "True", "--max_steps", "2", "--report_to", "none", "--use_cpu", "True"]
    assert np.isfinite(run_json(capsys, "train", *flags, *options)["train_loss"])


def test_evaluate_prints_one_seeded_json_object(trained, corpus, capsys):
    arguments = ["evaluate", str(trained), "--data", str(corpus), "--seed", "1", "--device", "cpu"]
    first, second = (run_json(capsys, *arguments) for _ in range(2))
    assert first == second
    assert first["ppl"] == pytest.approx(np.exp(first["nelbo"]))
    assert first["num_bytes"] == sum(map(len, TEXT))
    assert {"bpb", "nelbo_level_0", "nelbo_standard_error", "note"} <= set(first)
    assert run_json(capsys, *arguments[:5], "2", "--device", "cpu")["nelbo"] != first["nelbo"]


def test_generate_prints_samples(trained, capsys):
    arguments = ["generate", str(trained), "--prompt", "the cat", "--num-samples", "2", "--max-new-tokens", "4"]
    first, second = (run_json(capsys, *arguments, "--device", "cpu") for _ in range(2))
    assert first == second
    assert len(first["texts"]) == 2
    assert all(text.startswith("the cat") for text in first["texts"])
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "--- sample 2 of 2, seed 0 ---\nthe cat" in capsys.readouterr().out


def test_watch_shows_the_draft_go_down_the_tree(trained, capsys):
    arguments = ["generate", str(trained), "--max-new-tokens", "4", "--device", "cpu", "--watch"]
    assert main([*arguments, "--prompt", "the cat"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("the") and " <" in shown and " _" in shown and "--- sample 1 of 1, seed 0 ---" in shown
    assert main([*arguments, "--num-samples", "2"]) == 2
    assert "--watch shows one sample at a time, not --num-samples 2" in capsys.readouterr().err


def test_tree_build_show_and_stats(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "e.npy", rng.normal(size=(60, 5)).astype(np.float32))
    tree, again = str(tmp_path / "tree.safetensors"), str(tmp_path / "again.safetensors")
    build = ["tree", "build", "--embeddings", str(tmp_path / "e.npy"), "--branching-factor", "8", "--seed", "0"]
    result = run_json(capsys, *build, "--output", tree)
    assert result["output"] == tree
    assert main([*build, "--output", again]) == 0
    assert (tmp_path / "tree.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert VocabTree.load(tree).nodes_per_height[-1] == 1
    capsys.readouterr()
    assert main(["tree", "show", tree, "--max-depth", "1"]) == 0
    assert str(VocabTree.load(tree).root_id) in capsys.readouterr().out
    stats = run_json(capsys, "tree", "stats", tree, "--embeddings", str(tmp_path / "e.npy"))
    assert stats["inertia"] >= 0
    assert main(["tree", "stats", tree]) == 0


def test_tree_build_from_a_corpus_is_bound_to_its_tokenizer(corpus, tmp_path, capsys):
    tokenizer = train_tokenizer(TEXT, 280, progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = str(tmp_path / "tree.safetensors")
    build = ["tree", "build", "--corpus", str(corpus), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*build, "--branching-factor", "24", "--output", output]) == 0
    VocabTree.load(output).check_tokenizer(tokenizer)
    assert main(["tree", "show", output, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    other = train_tokenizer(["other words"] * 3, 280, progress=False)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(["tree", "show", output, "--tokenizer", str(tmp_path / "other")]) == 2
    assert "built for another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tree", "show", "missing.safetensors"], "missing.safetensors"),
        (["tree", "build", "--corpus", "x.txt", "--output", "t"], "--corpus needs --tokenizer"),
        (["evaluate", "no/such/folder", "--data", "x.txt"], "no/such/folder"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--config", "LIST"], "must hold `name: value` lines, not list"),
        (["train", "--config", "UNKNOWN"], r"sets \['train_dat'\]"),
        (["train", "--config", "BAD"], "hidden_size=30 must be an even multiple"),
        (["train", "--config", "STRING"], "invalid dict value: 'big'"),
        (["train", "--config", "TYPO"], r"model_config sets \['head_typ'\]"),
        (["train", "--config", "KIND"], "model_type='mlm' is not one of"),
        (["train", "--config", "PRIMETREE"], "tree=flat: an mdm_prime model has no tree"),
        (["train", "--config", "PRIMETYPO"], r"model_config sets \['law'\], which are no fields of MDMPrimeConfig"),
        (["train", "--config", "FEW"], "holds 8 documents, fewer than the 9 sequences of one update"),
        (["train", "--config", "NOYAML"], "while parsing"),
        (["tree", "build", "--embeddings", "NOYAML", "--output", "no/such/t"], "its folder does not exist"),
        (["tree", "build", "--embeddings", "EMPTY.npy", "--output", "t"], "EMPTY.npy|No data left"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, corpus, tmp_path, capsys):
    data = {"train_data": str(corpus), "output_dir": str(tmp_path), "vocab_size": 280, "max_steps": 1}
    files = {
        "LIST": [1, 2],
        "KIND": {**data, "model_type": "mlm"},
        "PRIMETREE": {**data, "model_type": "mdm_prime", "tree": "flat"},
        "PRIMETYPO": {**data, "model_type": "mdm_prime", "model_config": {"law": "direct"}},
        "UNKNOWN": {"train_dat": "x"},
        "BAD": {**data, "model_config": {"hidden_size": 30, "num_attention_heads": 4}},
        "STRING": {**data, "model_config": "big"},
    }
    files |= {
        "TYPO": {**data, "model_config": {"head_typ": "shared"}},
        "FEW": {**data, "preset": "tiny", "branching_factor": 24, "per_device_train_batch_size": 9},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(value))
    (tmp_path / "NOYAML").write_text("{[")
    (tmp_path / "EMPTY.npy").touch()
    files |= {"NOYAML": None, "EMPTY.npy": None}
    arguments = [str(tmp_path / argument) if argument in files else argument for argument in arguments]
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tdlm: error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_train_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "--train_data" in printed
    assert "--learning_rate" in printed


def test_usage_errors_exit_2(capsys):
    for arguments in ([], ["evaluate"], ["generate", "x", "--no-such-flag"], ["tree", "build", "--output", "x"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
