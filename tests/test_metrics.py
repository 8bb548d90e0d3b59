"""The `evaluate` metrics: token-weighted bounds, and generative perplexity with entropy and repetition."""

import math
import socket

import evaluate
import pytest
import torch
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from tdlm.tokenization import train_tokenizer
from tdlm.trainer.generative import generative_perplexity, repetition
from tdlm.trainer.metrics import GenerativePerplexityMetric, NelboMetric

TEXTS = ["the cat sat on the mat", "a dog ran far away from every small house", "the the the the the the"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A metric that is made directly asks nobody for anything."""

    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280, progress=False)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=280, max_position_embeddings=64, **sizes)).eval()


# ---- NELBO ----


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_nelbo_is_weighted_by_token_over_batches(tmp_path, keep_in_memory):
    metric = NelboMetric(cache_dir=str(tmp_path), keep_in_memory=keep_in_memory)
    metric.add_batch(predictions=torch.tensor([6.0, 1.0]), references=torch.tensor([2, 1]))
    metric.add_batch(predictions=[5.0], references=[3])
    metrics = metric.compute(num_bytes=24)
    assert metrics == {
        "nelbo": pytest.approx(2.0),
        "ppl": pytest.approx(math.exp(2)),
        "num_tokens": 6,
        "bpb": pytest.approx(12 / math.log(2) / 24),
        "num_bytes": 24,
    }
    assert "bpb" not in metric.compute(predictions=[6.0], references=[2])  # and nothing is left of the first corpus
    assert "upper bound" in metric.description.lower()


def test_nelbo_takes_the_model_outputs_as_they_are(eight_leaf_tree, tmp_path):
    model = tiny_model(eight_leaf_tree)
    x = torch.randint(0, 8, (4, 6))
    labels = x.clone()
    labels[:2, :3] = -100
    metric = NelboMetric(cache_dir=str(tmp_path))
    bounds = [model.nelbo(x[rows], labels=labels[rows], num_samples=4) for rows in (slice(0, 3), slice(3, 4))]
    for bound in bounds:
        metric.add_batch(predictions=bound.nelbo, references=bound.num_tokens)
    nats = sum(float(bound.nelbo.sum()) for bound in bounds)
    assert metric.compute()["nelbo"] == pytest.approx(nats / 18, rel=1e-6)


def test_nelbo_metrics_combine_with_others(tmp_path):
    """`evaluate.combine` feeds one set of predictions and references to all."""
    both = evaluate.combine([NelboMetric(cache_dir=str(tmp_path)), NelboMetric(cache_dir=str(tmp_path / "b"))])
    assert both.compute(predictions=[6.0], references=[2])["nelbo_metric_0_nelbo"] == pytest.approx(3.0)


@pytest.mark.parametrize("references", [[0, 0], [3, -1]])
def test_counts_that_are_none_are_refused(references, tmp_path):
    metric = NelboMetric(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="are no token counts: they must add up to at least one token"):
        metric.compute(predictions=[1.0, 1.0], references=references)


def test_a_nelbo_that_is_no_number_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"predictions \[1\] are not finite"):
        NelboMetric(cache_dir=str(tmp_path)).compute(predictions=[3.0, float("nan")], references=[3, 1])


def test_no_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_bytes=0 must be at least 1"):
        NelboMetric(cache_dir=str(tmp_path)).compute(predictions=[1.0], references=[1], num_bytes=0)


# ---- generative perplexity ----


def test_generative_perplexity_stands_beside_entropy_and_repetition(llama, tokenizer, tmp_path):
    metric = GenerativePerplexityMetric(llama, tokenizer, cache_dir=str(tmp_path))
    metric.add_batch(predictions=TEXTS[:2])
    metric.add(prediction=TEXTS[2])
    metrics = metric.compute()
    assert list(metrics) == ["generative_perplexity", "unigram_entropy", "rep_2", "rep_3", "rep_4"]
    assert metrics["generative_perplexity"] == pytest.approx(generative_perplexity(TEXTS, llama, tokenizer))
    repeated = metric.compute(predictions=TEXTS[2:])
    assert repeated["unigram_entropy"] < metric.compute(predictions=TEXTS[:2])["unigram_entropy"]
    assert repeated["rep_2"] > 0.5 > metric.compute(predictions=TEXTS[:2])["rep_2"]


def test_the_scoring_model_is_loaded_by_name(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    loaded = GenerativePerplexityMetric(str(tmp_path / "llama"), cache_dir=str(tmp_path))
    metric = GenerativePerplexityMetric(llama, tokenizer, cache_dir=str(tmp_path))
    assert loaded.compute(predictions=TEXTS) == pytest.approx(metric.compute(predictions=TEXTS))
    with pytest.raises(ValueError, match="is a name, whose own tokenizer is loaded"):
        GenerativePerplexityMetric(str(tmp_path / "llama"), tokenizer)


def test_a_loaded_model_needs_its_tokenizer(llama):
    with pytest.raises(ValueError, match="a loaded LlamaForCausalLM needs its tokenizer"):
        GenerativePerplexityMetric(llama)


def test_texts_without_two_tokens_are_refused(llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="none of the 2 texts has the two tokens"):
        GenerativePerplexityMetric(llama, tokenizer, cache_dir=str(tmp_path)).compute(predictions=["", "a"])


def test_repetition_is_the_share_of_ngrams_said_before():
    assert repetition([[1, 2, 1, 2, 1]], 2) == pytest.approx(1 - 2 / 4)
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3]], 2) == pytest.approx(0.25)  # averaged over samples
    assert repetition([[1, 2, 3], [4]], 2) == 0.0
    assert math.isnan(repetition([[4]], 2))
