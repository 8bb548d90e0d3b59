"""Token embeddings from models, files and corpora."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

from tdlm.tokenization import corpus_embeddings, embeddings, file_embeddings, model_embeddings


def test_a_model_gives_its_input_embeddings_in_float32(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=11, **sizes)).bfloat16()
    model.save_pretrained(tmp_path)
    rows = model_embeddings(tmp_path)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, model.embed_tokens.weight.detach().float().numpy())


def test_a_model_without_token_embeddings_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=4, patch_size=2, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ViTModel of .* has no input embedding matrix"):
        model_embeddings(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_npy_files_are_read_as_float32(tmp_path, dtype):
    rows = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    read = file_embeddings(tmp_path / "rows.npy")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, rows)


def test_safetensors_files_are_read_by_key_or_by_their_only_matrix(tmp_path):
    rows, bias = torch.randn(3, 2).bfloat16(), torch.randn(3)
    save_file({"rows": rows, "bias": bias}, tmp_path / "one.safetensors")
    np.testing.assert_array_equal(file_embeddings(tmp_path / "one.safetensors"), rows.float().numpy())
    save_file({"rows": rows, "other": rows + 1}, tmp_path / "two.safetensors")
    np.testing.assert_array_equal(file_embeddings(str(tmp_path / "two.safetensors"), "rows"), rows.float().numpy())
    with pytest.raises(ValueError, match=r"holds 2 2-D tensors \['other', 'rows'\]: name one with `key`"):
        file_embeddings(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'words'; it holds \['other', 'rows'\]"):
        file_embeddings(tmp_path / "two.safetensors", key="words")
    with pytest.raises(ValueError, match=r"must be a \(vocab_size, dim\) array of numbers, got float32 \(3,\)"):
        file_embeddings(tmp_path / "one.safetensors", key="bias")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a .npy or .safetensors file, not .txt"):
        file_embeddings(tmp_path / "rows.txt")
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        file_embeddings(tmp_path / "bad.safetensors")
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    with pytest.raises(ValueError, match=r"must be a \(vocab_size, dim\) array of numbers, got <U1"):
        file_embeddings(tmp_path / "text.npy")
    np.save(tmp_path / "pickle.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        file_embeddings(tmp_path / "pickle.npy")


def random_corpus(num_sequences=400, vocab_size=20):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, rng.integers(0, 30)) for _ in range(num_sequences)]


def test_tokens_in_the_same_company_are_alike():
    """Tokens 0 and 1 both stand between 2 and 3; tokens 4 and 5 between 6 and 7."""
    rng = np.random.default_rng(0)
    corpus = [[2, rng.integers(0, 2), 3] if rng.random() < 0.5 else [6, rng.integers(4, 6), 7] for _ in range(500)]
    rows = corpus_embeddings(corpus, vocab_size=8, dim=4, progress=False)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > 0.95
    assert unit[4] @ unit[5] > 0.95
    assert abs(unit[0] @ unit[4]) < 0.1


def test_neighbours_are_counted_on_both_sides_within_the_window_and_the_sequence():
    counts = embeddings._count_neighbours([[0, 1, 2], [3], [], [0, 0]], vocab_size=5, window=1, progress=False)
    expected = np.zeros((5, 5))
    expected[[0, 1, 1, 2], [1, 0, 2, 1]] = 1
    expected[0, 0] = 2
    np.testing.assert_array_equal(counts.toarray(), expected)


@pytest.mark.parametrize("window", [1, 4, 50])
def test_sequences_counted_in_chunks_give_the_same_counts(monkeypatch, window):
    whole = embeddings._count_neighbours(random_corpus(), 20, window, progress=False)
    monkeypatch.setattr(embeddings, "CHUNK_TOKENS", 40)  # longer than any sequence, so none is cut
    chunked = embeddings._count_neighbours(random_corpus(), 20, window, progress=False)
    np.testing.assert_array_equal(whole.toarray(), chunked.toarray())


def test_positive_pmi_is_its_definition():
    counts = embeddings._count_neighbours(random_corpus(), 20, 2, progress=False)
    dense = counts.toarray()
    joint, word = dense / dense.sum(), dense.sum(1) / dense.sum()
    context = dense.sum(0) ** 0.75 / (dense.sum(0) ** 0.75).sum()
    expected = np.maximum(np.log(joint / np.outer(word, context), where=joint > 0, out=np.zeros_like(joint)), 0)
    np.testing.assert_allclose(embeddings._positive_pmi(counts).toarray(), expected, atol=1e-12)


def test_full_rank_embeddings_have_the_singular_values_as_column_norms():
    pmi = embeddings._positive_pmi(embeddings._count_neighbours(random_corpus(), 20, 2, progress=False))
    rows = corpus_embeddings(random_corpus(), 20, dim=20, window=2, progress=False)
    np.testing.assert_allclose((rows**2).sum(0), np.linalg.svd(pmi.toarray())[1], rtol=1e-4, atol=1e-5)


def test_tokens_without_neighbours_get_the_zero_vector():
    rows = corpus_embeddings([[1, 2, 1, 3], [4]], vocab_size=6, dim=3, progress=False)
    assert rows.shape == (6, 3)
    assert not rows[[0, 4, 5]].any()
    assert rows[[1, 2, 3]].any(1).all()


def test_a_corpus_of_one_repeated_token_has_finite_embeddings():
    assert np.isfinite(corpus_embeddings([[1, 1, 1]], vocab_size=4, dim=2, progress=False)).all()


CORPUS = """
import sys, numpy as np
from tdlm.tokenization import corpus_embeddings
rng = np.random.default_rng(0)
np.save(sys.argv[1], corpus_embeddings([rng.zipf(1.3, 20_000) % 500 for _ in range(4)], 500, dim=64, progress=False))
"""


def test_the_embeddings_are_the_same_whatever_the_number_of_threads(tmp_path):
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", CORPUS, str(tmp_path / f"{threads}.npy")], env=environment, check=True)
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


@pytest.mark.parametrize(
    ("corpus", "arguments", "message"),
    [
        ([[0, 9]], {}, r"token ids are 0 ... 9, outside 0 ... vocab_size-1=4"),
        ([[-1, 2]], {}, r"token ids are -1 ... 2, outside"),
        ([], {}, "no sequence has two tokens"),
        ([[1], [2], []], {}, "no sequence has two tokens"),
        ([[1, 2]], {"dim": 6}, r"dim=6 must be 1 ... vocab_size=5"),
        ([[1, 2]], {"window": 0}, r"window=0 must be at least 1"),
    ],
)
def test_unusable_corpora_are_refused(corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        corpus_embeddings(corpus, 5, **{"dim": 2, **arguments}, progress=False)
