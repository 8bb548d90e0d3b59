"""The quickstart with a handful of steps: every file it promises, with the numbers it promises."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdlm.trainer.quickstart import BATCH_SIZE, run_quickstart


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run_quickstart(str(folder), max_steps=6)


def test_results_hold_the_promised_numbers(outcome):
    folder, results = outcome
    assert json.loads((folder / "results.json").read_text()) == results
    assert 6 < results["unigram_entropy"] < 7
    for name in ("tdlm", "flat"):
        assert {"nelbo", "ppl", "bpb", "parameters", "tokens_per_second", "peak_memory_mb"} <= set(results[name])
        assert 5 < results[name]["nelbo"] < 9  # six steps: near the uniform 8.3 nats
        assert sum(results[name]["nelbo_by_level"]) == pytest.approx(results[name]["nelbo"])
    assert len(results["tdlm"]["nelbo_by_level"]) == 2
    assert len(results["flat"]["nelbo_by_level"]) == 1


def test_the_twins_saw_the_same_batches(outcome):
    """Same seed, crops and number of tokens: only tree and law of heights differ."""
    folder, results = outcome
    logs = [json.loads((folder / f"{name}-run.json").read_text())["log"] for name in ("tdlm", "flat")]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    assert results["tdlm"]["parameters"] - results["flat"]["parameters"] == 64 * (128 + 1)  # 64 more nodes, a bias each
    assert BATCH_SIZE == 32


def test_the_checkpoint_is_whole_and_the_report_is_one_page(outcome):
    folder, _ = outcome
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.tree.check_tokenizer(AutoTokenizer.from_pretrained(folder / "model"))
    assert model.tree.nodes_per_height == [4096, 64, 1]
    card = ModelCard.load(folder / "model" / "README.md")
    assert card.data.eval_results[0].metric_value == outcome[1]["tdlm"]["nelbo"]
    assert "tdlm quickstart --max-steps 6 --seed 0" in card.text
    assert (folder / "samples.txt").read_text().count("---\n") == 6
    page = (folder / "report.html").read_text()
    assert "loss_level_1" in page
    assert "src=" not in page
