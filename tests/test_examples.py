"""Every script in examples/ runs in a small setting, on what the scripts before it wrote."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hub_server import LocalHub
from huggingface_hub import ModelCard
from test_remote_code import in_a_stranger
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2Model

from tdlm import VocabTree
from tdlm.tokenization import tree_outline
from tdlm.trainer import load_text
from tdlm.trainer.quickstart import corpus_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SMALL = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--save_strategy", "no")
QUIET = ("--disable_tqdm", "true", "--report_to", "none")


def script(name: str) -> str:
    return os.fspath(EXAMPLES / f"{name}.py")


def run(name: str, *arguments) -> str:
    """Run a script in this process -> what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script(name))["main"]([str(argument) for argument in arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple:
    """A small part of the novels, in files as a user has them."""
    folder = tmp_path_factory.mktemp("data")
    texts = [text[:4000] for text in load_text(corpus_file("validation"))["text"]]
    Dataset.from_dict({"text": texts[:16]}).to_parquet(folder / "train.parquet")
    Dataset.from_dict({"text": texts[16:18]}).to_parquet(folder / "held-out.parquet")
    return ("--train_data", folder / "train.parquet", "--eval_data", folder / "held-out.parquet")


@pytest.fixture(scope="module")
def built(data, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tree")
    options = ("--vocab_size", 400, "--branching_factor", 32)
    return folder, run("build_tree", "--corpus", data[1], *options, "--output_dir", folder)


@pytest.fixture(scope="module")
def pretrained(built, data, tmp_path_factory) -> tuple[Path, str]:
    folder, tree = tmp_path_factory.mktemp("pretrained"), built[0]
    made = ("--tokenizer", tree, "--tree", tree / "tree.safetensors")
    return folder, run("pretrain", *made, *data, *SMALL, *QUIET, "--output_dir", folder)


# ---- build_tree ----


def test_a_tree_is_built_from_a_corpus_and_shown(built):
    folder, printed = built
    tree = VocabTree.load(folder / "tree.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tree.check_tokenizer(tokenizer)
    assert tree.vocab_size == 400 and tree.branching_factor == 32
    assert "400 tokens, branching factor 32, height 2" in printed and "inertia" in printed
    assert tree_outline(tree, tokenizer, max_depth=2, max_children=8) in printed


def test_a_tree_is_built_from_the_embeddings_of_a_model(built, tmp_path):
    GPT2Model(GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt")
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    tokenizer.save_pretrained(tmp_path / "gpt")
    run("build_tree", "--model", tmp_path / "gpt", "--branching_factor", 64, "--output_dir", tmp_path / "tree")
    tree = VocabTree.load(tmp_path / "tree" / "tree.safetensors")
    tree.check_tokenizer(tokenizer)
    assert tree.vocab_size == 400 and tree.branching_factor == 64
    assert not torch.equal(tree.paths()[:, 0], VocabTree.load(built[0] / "tree.safetensors").paths()[:, 0])


# ---- pretrain ----


def test_pretraining_takes_the_tree_that_was_built_and_writes_a_whole_checkpoint(pretrained, built):
    folder, printed = pretrained
    model = AutoModelForCausalLM.from_pretrained(folder)
    tree = VocabTree.load(built[0] / "tree.safetensors")
    assert torch.equal(model.tree.paths(), tree.paths()) and model.config.law == "sequential"
    model.check_tokenizer(AutoTokenizer.from_pretrained(folder))
    assert "eval_nelbo " in printed and "eval_bpb" in printed
    assert ModelCard.load(folder / "README.md").data.library_name == "transformers"
    assert (folder / "modeling_tdlm.py").exists()


def test_pretraining_makes_its_own_tokenizer_and_tree_for_the_law_that_is_asked_for(data, tmp_path):
    options = ("--law", "direct", "--vocab_size", 300, "--branching_factor", 32)
    run("pretrain", *options, *data, *SMALL, *QUIET, "--output_dir", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.law == "direct" and model.tree.nodes_per_height[0] == 300
    assert model.tree.child_counts.max() <= 32
    model.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path))


# ---- infill ----


def test_blanks_are_filled_where_tdlm_is_not_installed(pretrained):
    code = "import runpy\nrunpy.run_path(sys.argv.pop(1))['main'](sys.argv[1:])\n"
    text, settings = "It was a [BLANK:3] morning.", ["--num_samples", "2", "--num_denoising_steps", "2"]
    lines = in_a_stranger(code, script("infill"), text, "--model", str(pretrained[0]), *settings)
    assert lines.count("It was a ") == 2 and lines.count(" morning.\n") == 2 and lines.count("    blanks: [") == 2


# ---- fine-tuning ----


def test_a_prompt_gets_a_response_after_training_on_the_novels_dialogues(pretrained, tmp_path):
    settings = ("--per_device_eval_batch_size", 64, "--prompt", "Who is there?")
    model = ("--model", pretrained[0], "--output_dir", tmp_path)
    printed = run("finetune_prompt_response", *model, *settings, *SMALL, *QUIET)
    pairs, before, after = re.search(
        r"^(\d+) of .*nats per token: ([\d.]+) before, ([\d.]+) after", printed, re.DOTALL | re.MULTILINE
    ).groups()
    assert int(pairs) > 50 and before != after
    assert "user: Who is there?\nassistant: " in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "user:\na\nassistant:\nb\n"
    AutoModelForCausalLM.from_pretrained(tmp_path).check_tokenizer(tokenizer)


def test_only_responses_are_scored_and_all_have_one_length(pretrained):
    names = runpy.run_path(script("finetune_prompt_response"))
    tokenizer = AutoTokenizer.from_pretrained(pretrained[0])
    tokenizer.chat_template = names["CHAT_TEMPLATE"]
    pairs = [("a", "b"), ("Who is there?", "c d"), ("a", "long " * 20), ("a " * 60, "b")]
    pairs = Dataset.from_list([{"prompt": prompt, "response": response} for prompt, response in pairs])
    rows = names["encode"](pairs, tokenizer, 8, 40)
    assert len(rows) == 2  # one response is too long, and one prompt
    for row, pair in zip(rows, pairs, strict=False):
        context = row["labels"].count(-100)
        assert tokenizer.decode(row["input_ids"][:context]) == f"user:\n{pair['prompt']}\nassistant:\n"
        assert row["labels"][context:] == row["input_ids"][context:] and len(row["labels"]) == context + 8
        assert tokenizer.decode(row["input_ids"][context:], skip_special_tokens=True) == pair["response"]


def test_pairs_that_do_not_fit_are_told_of(pretrained, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "response": "long " * 50}) + "\n")
    data = ("--train_data", tmp_path / "pairs.jsonl", "--eval_data", tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match=r"below response_length=24 tokens and fits in the context of 64\. Change"):
        run("finetune_prompt_response", "--model", pretrained[0], *data, "--output_dir", tmp_path, "--use_cpu")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # as in test_peft.py
@pytest.mark.parametrize("is_own_data", [False, True])
def test_an_adapter_is_trained_saved_loaded_and_merged(is_own_data, pretrained, data, tmp_path):
    pytest.importorskip("peft", reason="needs the extra peft")
    own = (*data, "--rank", 2) if is_own_data else ()  # else Moby Dick
    settings = ("--learning_rate", 0.05, *SMALL, *QUIET, "--output_dir", tmp_path)
    printed = run("finetune_lora", "--model", pretrained[0], *own, *settings)
    nelbo = {name: float(value) for name, value in re.findall(r"^(\w+) +NELBO ([\d.]+)", printed, re.MULTILINE)}
    assert nelbo["adapter"] == pytest.approx(nelbo["merged"], abs=1e-3)
    assert abs(nelbo["adapter"] - nelbo["base"]) > 1e-2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (2 if is_own_data else 8)
    assert not (tmp_path / "model.safetensors").exists()
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", pretrained[0]))
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    merged.check_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["pretrain", "finetune_prompt_response", "finetune_lora"])
def test_own_data_need_held_out_data_of_their_own(name, capsys, tmp_path):
    if name == "finetune_lora":
        pytest.importorskip("peft", reason="needs the extra peft")
    with pytest.raises(SystemExit):
        run(name, "--train_data", "text.parquet", "--output_dir", tmp_path, "--use_cpu")
    assert "--train_data and --eval_data: pass both, or neither" in capsys.readouterr().err


# ---- push_to_hub ----


def test_a_checkpoint_is_pushed_in_one_commit_and_loaded_back_by_it(pretrained, tmp_path):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    arguments = ["acme/novels", "--model", str(pretrained[0]), "--private", "--license", "apache-2.0"]
    with LocalHub(tmp_path, {"hf_of_acme": "acme"}) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_of_acme", "HF_HOME": str(tmp_path / "home")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        process = subprocess.run(
            [sys.executable, script("push_to_hub"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings,
        )
        assert process.returncode == 0, process.stderr
        assert not hub.unknown
        repository = hub.repositories["acme/novels"]
        commit = repository.commits[-1]
        card = hub.object_path(commit.files["README.md"].oid).read_text()
    assert [commit.title for commit in repository.commits] == ["initial commit", "Upload model card", "Upload model"]
    assert f"Loaded revision {commit.oid}: the same weights" in process.stdout and repository.private
    assert {"model.safetensors", "tokenizer.json", "modeling_tdlm.py", "generation_config.json"} <= set(commit.files)
    assert 'repo = "acme/novels"' in card and "license: apache-2.0" in card


# ---- what is written about the scripts ----


def commands_in(path: Path) -> list[list[str]]:
    """The command lines of a text that run an example, without `python`."""
    text = path.read_text() if path.suffix == ".md" else runpy.run_path(os.fspath(path))["__doc__"]
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [re.search(r"python (examples/\w+\.py[^`]*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


class ParsedError(Exception):
    """Raised in the place of what a script does with its arguments."""


@pytest.mark.parametrize("name", [*SCRIPTS, "README"])
def test_the_command_lines_that_are_shown_are_understood(name, monkeypatch):
    if name in ("finetune_lora", "README"):
        pytest.importorskip("peft", reason="needs the extra peft")
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None):
        _, unknown = parse(parser, args, namespace)
        raise ParsedError(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    commands = commands_in(EXAMPLES / (f"{name}.md" if name == "README" else f"{name}.py"))
    assert {path for path, *_ in commands} >= {
        f"examples/{one}.py" for one in (SCRIPTS if name == "README" else [name])
    }
    for path, *arguments in commands:
        with pytest.raises(ParsedError, match=r"\[\]"):
            run(Path(path).stem, *arguments)
