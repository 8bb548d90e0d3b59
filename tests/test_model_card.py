"""The model card: true front matter, figures of the weights beside it, and a snippet that runs as pasted."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from test_remote_code import in_a_stranger
from tiny import tiny_model
from tiny_prime import prime_model
from transformers import AutoModelForCausalLM

from tdlm import VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer import (
    CardDataset,
    CardDetails,
    RandomCrops,
    TDLMTrainer,
    TDLMTrainingArguments,
    create_model_card,
    evaluation_windows,
    tokenize,
)
from tdlm.trainer.cli import main
from tdlm.trainer.run import ScriptArguments, _card_details

TEXT = ["some words to merge, some words to keep"] * 8
LENGTH = 16
DETAILS = CardDetails(
    language="en",
    license="apache-2.0",
    tags=("novel",),
    train_data=(CardDataset("Words", "someone/words", "plain", "train"),),
    eval_data=CardDataset("Words", "someone/words", "plain", "validation"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 270, progress=False)


def make_model(tokenizer, kind="tdlm", **fields):
    size = len(tokenizer)
    if kind == "mdm_prime":
        model = prime_model(size, max_position_embeddings=LENGTH)
        model.code.bind(tokenizer)
        return model
    tree = VocabTree.flat(size) if kind == "flat" else VocabTree.random(size, 8, seed=0)
    return tiny_model(tree.bind(tokenizer), max_position_embeddings=LENGTH, **fields)


def make_trainer(folder, tokenizer, model, **options):
    text = datasets.Dataset.from_dict({"text": TEXT})
    details = options.pop("card_details", DETAILS)
    options = {"max_steps": 4, "eval_steps": 2, "eval_strategy": "steps", "save_steps": 2, "report_to": [], **options}
    args = TDLMTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True, **options
    )
    return TDLMTrainer(
        model=model,
        args=args,
        train_dataset=RandomCrops(tokenize(text, tokenizer), LENGTH, tokenizer.pad_token_id),
        eval_dataset=evaluation_windows(text.select(range(2)), tokenizer, LENGTH),
        processing_class=tokenizer,
        card_details=details,
    )


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "words-model"
    trainer = make_trainer(folder, tokenizer, make_model(tokenizer), eval_num_samples=2, gradient_accumulation_steps=2)
    trainer.train()
    trainer.save_model()
    return trainer, folder


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


def test_every_checkpoint_has_a_card_with_its_own_figures(trained):
    trainer, folder = trained
    for step, place in [(2, folder / "checkpoint-2"), (4, folder / "checkpoint-4"), (4, folder)]:
        card = ModelCard.load(place / "README.md")
        measured = trainer.evaluations["eval", step]
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values == {
            "nelbo": measured["nelbo"],
            "perplexity": math.exp(measured["nelbo"]),
            "bits_per_byte": measured["bpb"],
        }
        assert f"| {measured['nelbo']:.4f} ± {measured['nelbo_standard_error']:.4f} |" in card.text
        assert "are upper bounds**" in card.text and "2 noise draws a sequence, seed 0" in " ".join(card.text.split())
        assert f"| steps | {step}, of 4 sequences each |" in card.text
        assert f"| tokens seen, padding included | {step * 4 * LENGTH} |" in card.text
    assert trainer.evaluations["eval", 2]["nelbo"] != trainer.evaluations["eval", 4]["nelbo"]


def test_the_front_matter_is_what_the_hub_reads_and_survives_a_round_trip(trained):
    _, folder = trained
    data = metadata_load(folder / "README.md")
    assert {name: data[name] for name in ("library_name", "pipeline_tag", "license", "language", "datasets")} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "datasets": ["someone/words"],
    }
    assert {"tdlm", "diffusion", "masked-diffusion", "custom_code", "novel"} <= set(data["tags"])
    assert data["metrics"] == ["nelbo", "perplexity", "bits_per_byte"]
    (index,) = data["model-index"]
    assert index["name"] == "words-model"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "Words", "type": "someone/words", "config": "plain", "split": "validation"}
    assert str(ModelCard.load(folder / "README.md")) == (folder / "README.md").read_text()


def test_the_card_holds_tree_recipe_and_nothing_of_this_machine_s_folders(trained, tmp_path):
    trainer, folder = trained
    text = (folder / "README.md").read_text()
    assert re.search(r"270 tokens, branching factor 8, height 3, \d+ nodes", text)
    assert re.search(r"node \d+ \(height 1, \d children, \d tokens\): ['\"]", text)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    for name, value in recipe.items():
        assert value == getattr(trainer.args, name), name
    assert {"max_steps", "learning_rate", "optim", "adam_beta2", "lr_scheduler_type", "warmup_steps"} <= set(recipe)
    assert str(tmp_path.parent) not in text


def test_what_the_run_did_not_tell_is_left_out(tokenizer):
    card = create_model_card(make_model(tokenizer), tokenizer)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    for absent in ("## Results", "## Training", "Weights:", "None", "nknown", "Trained further"):
        assert absent not in card.text
    for present in ("## Use", "## Tree", "## Limits", "## Licence"):
        assert present in card.text


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("tdlm", {"law": "direct", "head_type": "vocab"}, "A tree-structured diffusion"),
        ("tdlm", {"head_type": "joint", "neighborhood_size": 2}, "A tree-structured diffusion"),
        ("flat", {"head_type": "vocab"}, "every token a child of the root"),
        ("mdm_prime", {}, "a token is 9 digits of base 2"),
    ],
)
def test_every_kind_of_model_has_a_card(kind, fields, words, tokenizer, tmp_path):
    model = make_model(tokenizer, kind, **fields)
    trainer = make_trainer(tmp_path, tokenizer, model, max_steps=1, eval_steps=1, save_strategy="no")
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert words in " ".join(card.text.split())
    assert card.data.eval_results[0].metric_value == trainer.evaluations["eval", 1]["nelbo"]
    assert ("## Tree" in card.text) == (kind != "mdm_prime")
    assert ("mdm-prime" in card.data.tags) == (kind == "mdm_prime")
    assert f"`{model.config.head_type}`" in card.text


@pytest.mark.parametrize("kind", ["tdlm", "mdm_prime"])
def test_the_snippet_runs_as_pasted_where_tdlm_is_not_installed(kind, tokenizer, tmp_path):
    model = make_model(tokenizer, kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    create_model_card(model, tokenizer, CardDetails(model_id=str(tmp_path))).save(tmp_path / "README.md")
    code = snippet((tmp_path / "README.md").read_text())
    assert f'repo = "{tmp_path}"\n' in code
    printed = in_a_stranger(code + "\nassert 'tdlm' not in sys.modules\nprint(ids.shape)")
    assert re.search(r"^tensor\(\[\d.*\]\) tensor\(\[\d.*\]\)$", printed, flags=re.MULTILINE), printed
    assert f"torch.Size([1, {LENGTH}])" in printed


def test_the_snippet_of_a_local_folder_runs_inside_it(trained):
    _, folder = trained
    code = snippet((folder / "README.md").read_text())
    assert 'repo = "."' in code
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert process.returncode == 0, process.stderr


def test_a_model_without_a_tokenizer_has_a_snippet_without_one(tokenizer):
    code = snippet(create_model_card(make_model(tokenizer)).text)
    assert "Tokenizer" not in code and "tokenizer" not in code
    compile(code, "snippet", "exec")


def test_figures_of_other_weights_are_dated_and_stay_out_of_the_front_matter(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer), eval_steps=3, max_steps=6)
    trainer.train()
    assert "## Results" not in (tmp_path / "checkpoint-2" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "checkpoint-4" / "README.md")
    assert card.data.eval_results is None and "metrics" not in card.data.to_dict()
    assert "measured at step 3; the weights here are those of step 4" in card.text


def test_the_best_weights_have_the_figures_of_their_own_step(tokenizer, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "nelbo", "greater_is_better": True}
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer), learning_rate=1e-2, **options)
    trainer.train()
    assert trainer.state.best_global_step == 2  # the bound falls as it learns, and the higher one was asked for
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == trainer.evaluations["eval", 2]["nelbo"]
    assert "| steps | 2, of 2 sequences each |" in card.text
    assert trainer.evaluate()["eval_nelbo"] == pytest.approx(card.data.eval_results[0].metric_value)


def test_several_evaluation_sets_are_told_apart(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer), card_details=None)
    sets = {name: trainer.eval_dataset.select([row]) for row, name in enumerate(("letters", "diaries"))}
    metrics = trainer.evaluate(sets)
    card = create_model_card(trainer.model, tokenizer, trainer=trainer)
    found = {r.dataset_name: r.metric_value for r in card.data.eval_results if r.metric_type == "nelbo"}
    assert found == {name: metrics[f"eval_{name}_nelbo"] for name in sets}
    trainer.evaluate()  # on a set that nobody has named
    card = create_model_card(trainer.model, tokenizer, trainer=trainer)
    assert {result.dataset_name for result in card.data.eval_results} == set(sets)
    assert "| evaluation set |" in card.text
    assert "## Training" not in card.text


def test_figures_of_other_data_are_not_taken_for_those_of_the_named_set(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer))
    own = trainer.evaluate()["eval_nelbo"]
    assert trainer.evaluate(trainer.eval_dataset.select([0]))["eval_nelbo"] != own
    other = trainer.evaluate(trainer.eval_dataset.select([1]), metric_key_prefix="test")["test_nelbo"]
    card = create_model_card(trainer.model, tokenizer, DETAILS, trainer)
    found = {r.dataset_name: r.metric_value for r in card.data.eval_results if r.metric_type == "nelbo"}
    assert found == {"Words": own, "test": other}


def test_what_create_model_card_is_told_is_kept_for_later_checkpoints(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer), card_details=None)
    trainer.create_model_card(
        license="mit", tags="mine", dataset_tags="owner/data", dataset_args="small", finetuned_from="owner/base"
    )
    trainer.create_model_card(model_name="Its name", tags=["mine", "ours"], tasks="text-generation")
    trainer.save_model(str(tmp_path / "later"))
    card = ModelCard.load(tmp_path / "later" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["owner/data"], "owner/base")
    assert card.data.tags[-2:] == ["mine", "ours"]
    assert card.text.startswith("\n# Its name\n")
    assert "Trained further from [owner/base](https://huggingface.co/owner/base)" in card.text
    with pytest.raises(ValueError, match="tasks='fill-mask': these models are for 'text-generation'"):
        trainer.create_model_card(tasks="fill-mask")


def test_a_local_base_model_is_named_without_its_folder(tokenizer, tmp_path):
    model = make_model(tokenizer)
    model.config._name_or_path = str(tmp_path)
    trainer = make_trainer(tmp_path, tokenizer, model, max_steps=1)
    assert "Trained further" not in create_model_card(model, tokenizer, trainer=trainer).text  # it is that checkpoint
    trainer.train()
    card = create_model_card(model, tokenizer, trainer=trainer)
    assert f"Trained further from the checkpoint `{tmp_path.name}`." in card.text
    assert card.data.base_model is None and str(tmp_path) not in card.text


def test_a_readme_that_is_no_card_is_left_as_it_is(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer))
    for text in ("# My project\n", "---\n- a list\n---\n", "---\n{[\n---\n"):
        (tmp_path / "README.md").write_text(text)
        trainer.save_model()
        assert (tmp_path / "README.md").read_text() == text
    trainer.create_model_card()  # who asks for a card gets it
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


def test_only_the_first_process_writes(tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, make_model(tokenizer))
    monkeypatch.setattr(TDLMTrainingArguments, "should_save", False)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.save_model()
    trainer.create_model_card(license="mit")
    trainer._push_from_checkpoint(str(tmp_path))
    assert not (tmp_path / "README.md").exists()


def test_a_checkpoint_is_pushed_with_its_code_and_card(trained, tmp_path, monkeypatch):
    trainer, folder = trained
    pushed = []

    class Api:
        def upload_folder(self, folder_path, **options):
            pushed.append({path.name for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    monkeypatch.setattr(trainer, "push_in_progress", None, raising=False)
    trainer._push_from_checkpoint(str(folder / "checkpoint-4"))
    (names,) = pushed
    assert {"README.md", "modeling_tdlm.py", "configuration_tdlm.py", "config.json", "tokenizer.json"} <= names


# PEFT 0.21 asks transformers 5.23 for the name that an attribute had before.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_s_card_is_ours_with_what_peft_adds(tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path / "adapter", tokenizer, model, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", str(tmp_path / "base"))
    assert {"tdlm", "custom_code", "lora"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == trainer.evaluations["eval", 1]["nelbo"]
    assert "Trained further from the checkpoint `base`." in " ".join(card.text.split())


def test_the_hub_s_name_of_the_model_stands_in_its_snippet(trained, tokenizer, tmp_path, monkeypatch):
    trainer, _ = trained
    monkeypatch.setattr(trainer, "hub_model_id", "someone/words")
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path))
    trainer.create_model_card()
    assert 'repo = "someone/words"\n' in (tmp_path / "README.md").read_text()


def test_the_command_of_a_card_gives_its_figures(tmp_path, monkeypatch, capsys):
    (tmp_path / "held out.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in TEXT))
    settings = {"train_data": str(tmp_path / "held out.jsonl"), "eval_data": str(tmp_path / "held out.jsonl")}
    settings |= {"text_column": "words", "vocab_size": 280, "branching_factor": 24, "preset": "tiny", "license": "mit"}
    settings |= {"model_config": {"hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": LENGTH}}
    settings |= {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    settings |= {"eval_num_samples": 3, "eval_seed": 5, "save_strategy": "no", "report_to": "none", "language": "en"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.language, card.data.license) == ("en", "mit")
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", card.text, flags=re.DOTALL)[1])
    assert command[:3] == ["tdlm", "evaluate", "."] and "held out.jsonl" in command
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*command[1:], "--device", "cpu", "--json"]) == 0
    nelbo = json.loads(capsys.readouterr().out)["nelbo"]
    assert nelbo == pytest.approx(card.data.eval_results[0].metric_value, rel=1e-6)
    assert "From nothing:" in (tmp_path / "samples.md").read_text()


def test_data_on_the_hub_are_named_with_configuration_and_split(tmp_path):
    script = ScriptArguments("owner/text", eval_data="owner/text", dataset_config="small")
    details = _card_details(script, TDLMTrainingArguments(str(tmp_path), hub_model_id="me/model"))
    assert str(details.train_data[0]) == "[owner/text](https://huggingface.co/datasets/owner/text), small, train"
    assert details.eval_data == CardDataset("owner/text", "owner/text", "small", "validation")
    assert details.command == (
        "tdlm evaluate me/model --data owner/text --dataset-config small --split validation --num-samples 1 "
        "--batch-size 8 --seed 0"
    )
    assert _card_details(ScriptArguments("owner/text"), TDLMTrainingArguments(str(tmp_path))).command is None
