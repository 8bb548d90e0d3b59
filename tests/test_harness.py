"""lm-evaluation-harness: its own evaluator on local tasks, against what the model says when asked directly."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import tiny_model
from tiny_prime import prime_model

from tdlm import VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer.run import make_tree
from tdlm.trainer.scoring import order_log_likelihood

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tdlm.trainer.harness import TDLMEvalLM  # noqa: E402

TEXTS = ["the cat sat on the mat and ran far away", "a dog sat by the river near the house", "cats and dogs run"]
QUESTIONS = [
    {"question": "the cat sat on", "choices": ["the mat", "a dog", "far"], "answer": 0},
    {"question": "a dog ran", "choices": ["away", "by the river", "mat"], "answer": 1},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["a"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 3},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280, progress=False)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, str]:
    """A tree model and an MDM-Prime model, saved with their tokenizer."""
    tree = VocabTree.flat(280).bind(tokenizer)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    tree = make_tree(tokenizer, 24, sequences=ids, progress=False)
    models = {"tdlm": tiny_model(tree), "mdm_prime": prime_model(280, base=4)}
    models["mdm_prime"].code.bind(tokenizer)
    folders = {}
    for name, model in models.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def make_task(folder, name: str, rows: list[dict], task: dict) -> None:
    """A task of the harness: one YAML and its local data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **task}))


def evaluate(folder, name: str, model, **kwargs) -> tuple[dict, list]:
    """-> the harness's metrics of a task and the model's answers, document by document."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0, **kwargs)
    return results["results"][name], results["samples"][name]


@pytest.mark.parametrize("scoring", ["bound", "left_to_right"])
@pytest.mark.parametrize("name", ["tdlm", "mdm_prime"])
def test_multiple_choice_compares_what_the_model_says_of_the_choices(folders, tokenizer, tmp_path, name, scoring):
    make_task(tmp_path, "choice", QUESTIONS, CHOICE)
    arguments = {"pretrained": folders[name], "num_samples": 8, "seed": 3, "scoring": scoring}
    metrics, samples = evaluate(tmp_path, "choice", "tdlm", model_args=arguments, batch_size=4, device="cpu")
    lm = TDLMEvalLM(folders[name])
    right = 0
    for question, sample in zip(QUESTIONS, samples, strict=True):
        expected = []
        for choice in question["choices"]:
            context = tokenizer(question["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
            labels = ids.clone()
            labels[:, : len(context)] = -100
            if scoring == "bound":
                rows = {"input_ids": ids.expand(4, -1), "labels": labels.expand(4, -1), "num_samples": 2}
                noise = torch.Generator().manual_seed(3)
                expected.append(-float(lm.model.nelbo(**rows, generator=noise).nelbo.mean()))
            else:
                expected.append(float(order_log_likelihood(lm.model, ids, labels=labels)))
        answers = [response[0] for response in sample["resps"]]
        assert [score for score, _ in answers] == pytest.approx(expected, rel=1e-5)
        assert not any(is_greedy for _, is_greedy in answers)  # no meaning for a bound
        right += int(torch.tensor(expected).argmax()) == question["answer"]
    assert metrics["acc,none"] == right / 2


@pytest.mark.parametrize("name", ["tdlm", "mdm_prime"])
def test_rolling_perplexity_scores_every_token_once_in_windows(folders, tokenizer, tmp_path, name):
    text = " ".join(TEXTS)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2 * 15  # three windows of at most 15 tokens, each after one
    make_task(tmp_path, "rolling", [{"text": text}], ROLLING)
    metrics, samples = evaluate(tmp_path, "rolling", TDLMEvalLM(folders[name], num_samples=4, batch_size=4))
    lm = TDLMEvalLM(folders[name])
    nats, last = 0.0, tokenizer.eos_token_id
    scored = 0
    for start in range(0, len(ids), 15):
        window = ids[start : start + 15]
        missing = 15 - len(window)  # the harness fills the last context up to the whole length
        context = [last] if missing == 0 else ids[start - 1 - missing : start]
        row = torch.tensor([[*context, *window]]).expand(4, -1)
        labels = row.clone()
        labels[:, : len(context)] = -100
        nats += float(lm.model.nelbo(row, labels=labels, generator=torch.Generator().manual_seed(0)).nelbo.mean())
        last = window[-1]
        scored += len(window)
    assert scored == len(ids)
    assert samples[0]["resps"][0][0] == pytest.approx(-nats, rel=1e-5)
    assert metrics["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("name", ["tdlm", "mdm_prime"])
def test_generation_stops_at_the_stop_string_and_is_seeded(folders, tokenizer, tmp_path, name):
    make_task(tmp_path, "generate", QUESTIONS, GENERATE)
    lm = TDLMEvalLM(folders[name], batch_size=2)
    _, samples = evaluate(tmp_path, "generate", lm)
    texts = [sample["resps"][0][0] for sample in samples]
    assert all("a" not in text for text in texts)
    assert texts == [sample["resps"][0][0] for sample in evaluate(tmp_path, "generate", lm)[1]]
    make_task(tmp_path, "generate", QUESTIONS, {**GENERATE, "generation_kwargs": {"until": ["#"], "max_gen_toks": 6}})
    prompts = tokenizer([q["question"] for q in QUESTIONS], padding=True, padding_side="left", return_tensors="pt")
    greedy = lm.model.generate(
        **prompts, max_new_tokens=6, do_sample=False, generator=torch.Generator().manual_seed(0)
    )[:, prompts["input_ids"].shape[1] :]
    expected = [tokenizer.decode(row[(row == tokenizer.eos_token_id).cumsum(0) == 0]) for row in greedy]
    order = sorted(range(2), key=lambda i: -len(tokenizer(QUESTIONS[i]["question"])["input_ids"]))
    assert order == [0, 1]  # the harness takes the longest prompts first
    texts = [sample["resps"][0][0] for sample in evaluate(tmp_path, "generate", lm)[1]]
    assert texts == [text.split("#")[0] for text in expected]


def instance(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_text_behind_end_of_text_is_not_part_of_it(folders, tokenizer, monkeypatch):
    lm = TDLMEvalLM(folders["tdlm"])
    prompt, inside = tokenizer("the cat")["input_ids"], tokenizer(" sat")["input_ids"]
    sequence = torch.tensor([[*prompt, *inside, tokenizer.eos_token_id, *inside]])
    monkeypatch.setattr(lm.model, "generate", lambda *args, **kwargs: sequence)
    request = instance("generate_until", "the cat", {"until": [], "max_gen_toks": len(inside) * 2 + 1})
    assert lm.generate_until([request], disable_tqdm=True) == [" sat"]


def test_a_score_is_of_its_request_alone(folders):
    """Neither the other requests nor their order change it, and the seed does."""
    lm = TDLMEvalLM(folders["tdlm"], num_samples=8, batch_size=8)
    requests = [instance("loglikelihood", q["question"], f" {choice}") for q in QUESTIONS for choice in q["choices"]]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    assert lm.loglikelihood(requests[::-1], disable_tqdm=True) == together[::-1]
    assert lm.loglikelihood(requests[2:3], disable_tqdm=True) == together[2:3]
    other = TDLMEvalLM(folders["tdlm"], num_samples=8, batch_size=8, seed=1)
    assert other.loglikelihood(requests, disable_tqdm=True) != together


def test_chains_do_not_depend_on_the_batch(folders):
    requests = [instance("loglikelihood", q["question"], f" {choice}") for q in QUESTIONS for choice in q["choices"]]
    scores = [
        [
            score
            for score, _ in TDLMEvalLM(folders["tdlm"], scoring="left_to_right", batch_size=size).loglikelihood(
                requests, disable_tqdm=True
            )
        ]
        for size in (1, 4)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_long_contexts_are_cut_on_the_left(folders, tokenizer):
    lm = TDLMEvalLM(folders["tdlm"], num_samples=4, batch_size=4)
    long = instance("loglikelihood", " ".join(TEXTS), " mat")
    ids = tokenizer(" ".join(TEXTS) + " mat")["input_ids"]
    continuation = tokenizer(" mat")["input_ids"]
    row = torch.tensor([ids[-16:]]).expand(4, -1)
    labels = row.clone()
    labels[:, : -len(continuation)] = -100
    expected = -float(lm.model.nelbo(row, labels=labels, generator=torch.Generator().manual_seed(0)).nelbo.mean())
    assert lm.loglikelihood([long], disable_tqdm=True)[0][0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"a continuation has \d+ tokens, more than the context of 16"):
        lm.loglikelihood([instance("loglikelihood", "a", " " + " ".join(TEXTS))], disable_tqdm=True)


def test_results_and_log_say_what_the_numbers_are(folders, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("tdlm"), "propagate", True)
    info = TDLMEvalLM(folders["tdlm"], num_samples=2).get_model_info()
    assert "LOWER BOUND" in info["log_likelihoods"] and info["num_samples"] == 2
    assert "LOWER BOUND" in caplog.text
    assert "CHAIN" in TDLMEvalLM(folders["tdlm"], scoring="left_to_right").get_model_info()["log_likelihoods"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scoring": "exact"}, r"scoring='exact' is not one of \['bound', 'left_to_right'\]"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"batch_size": "auto"}, "batch_size='auto' is not supported"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(folders, arguments, message):
    with pytest.raises(ValueError, match=message):
        TDLMEvalLM(folders["tdlm"], **arguments)


def test_other_models_are_refused(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(ValueError, match=r"is a llama model; `tdlm` scores tdlm and mdm_prime\. Use --model hf"):
        TDLMEvalLM(LlamaForCausalLM(LlamaConfig(vocab_size=280, **sizes)), tokenizer=tokenizer)


def test_the_package_is_asked_for_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    monkeypatch.delitem(sys.modules, "tdlm.trainer.harness")
    with pytest.raises(ImportError, match=r"pip install 'tdlm\[lm-eval\]'"):
        import tdlm.trainer.harness  # noqa: F401


def test_the_command_line_of_the_docstring(folders, tmp_path):
    make_task(tmp_path, "choice", QUESTIONS, CHOICE)
    command = [sys.executable, "-m", "tdlm.trainer.harness", "--model", "tdlm"]
    command += ["--model_args", f"pretrained={folders['tdlm']},num_samples=4", "--tasks", "choice"]
    command += ["--include_path", str(tmp_path), "--batch_size", "4", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "LOWER BOUND" in done.stderr and "|choice|" in done.stdout
    (written,) = tmp_path.glob("results*.json")
    results = json.loads(written.read_text())
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1
    assert results["config"]["num_samples"] == 4
