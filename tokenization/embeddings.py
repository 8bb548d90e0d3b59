"""Token embeddings to cluster: from a model, from a file, or from the co-occurrences of a corpus.

Every function returns (V, d) float32, row i for token i. Special and padding tokens are tokens like others.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm
from transformers import AutoModel

CONTEXT_SMOOTHING = 0.75  # power of the context counts; lessens PMI's bias towards rare words (Levy et al., 2015)
CHUNK_TOKENS = 1_000_000  # counted at a time: bounds the memory by the chunk and the non-zero counts


def model_embeddings(name_or_path: str | os.PathLike, **kwargs: Any) -> np.ndarray:
    """Input embeddings of a Hugging Face model; `kwargs` go to `AutoModel.from_pretrained` (`gguf_file=`, ...)."""
    model = AutoModel.from_pretrained(name_or_path, **kwargs)
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} of {name_or_path} has no input embedding matrix. "
            "Use a text model, a file of embeddings or a corpus."
        ) from error
    return _as_matrix(weight, f"the input embedding of {name_or_path}")


def file_embeddings(path: str | os.PathLike, key: str | None = None) -> np.ndarray:
    """Embeddings stored as a `.npy` array or in a `.safetensors` file: its tensor `key`, or its only 2-D tensor.

    Raises `ValueError` if the file is of another kind, is damaged, or does not say which tensor is meant.
    """
    suffix = Path(path).suffix
    if suffix == ".npy":
        return _as_matrix(np.load(path, allow_pickle=False), os.fspath(path))
    if suffix != ".safetensors":
        raise ValueError(f"{path} must be a .npy or .safetensors file, not {suffix or 'without suffix'}.")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _as_matrix(file.get_tensor(_choose_key(shapes, key, path)), os.fspath(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def corpus_embeddings(
    token_sequences: Iterable[Sequence[int]],
    vocab_size: int,
    dim: int = 128,
    window: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Tokens that keep the same company get close rows: truncated SVD of the co-occurrences' positive PMI.

    Rows are scaled by the square root of the singular values; a token without a neighbour gets the zero vector.

    Args:
        token_sequences: token ids, one sequence a document; windows do not cross its ends. Read once.
        vocab_size: V, larger than every token id.
        dim: d, at most V.
        window: tokens to the left and to the right that count as neighbours.
        seed: of the randomized SVD.
        progress: show a progress bar, in tokens.

    Raises:
        ValueError: an id outside 0 ... V-1, no two neighbouring tokens at all, or `dim` or `window` out of range.

    Source: Levy, Goldberg and Dagan, "Improving Distributional Similarity with Lessons Learned from Word Embeddings".
    """
    if not 1 <= dim <= vocab_size:
        raise ValueError(f"dim={dim} must be 1 ... vocab_size={vocab_size}.")
    if window < 1:
        raise ValueError(f"window={window} must be at least 1.")
    counts = _count_neighbours(token_sequences, vocab_size, window, progress)
    if counts.nnz == 0:
        raise ValueError("no sequence has two tokens, so there is nothing to count. Pass a larger corpus.")
    with threadpool_limits(limits=1):  # sums in a fixed order: the same embeddings whatever the number of threads
        left, singular_values, _ = randomized_svd(_positive_pmi(counts), dim, random_state=seed)
    embeddings = (left * np.sqrt(singular_values)).astype(np.float32)
    embeddings[np.diff(counts.indptr) == 0] = 0
    return embeddings


def _count_neighbours(
    token_sequences: Iterable[Sequence[int]], vocab_size: int, window: int, progress: bool
) -> sparse.csr_array:
    """(V, V) symmetric counts of how often two tokens stand at most `window` apart in one sequence."""
    counts = sparse.csr_array((vocab_size, vocab_size), dtype=np.float64)
    with tqdm(disable=not progress, unit="token", unit_scale=True) as bar:
        for tokens, sequence in _chunks(token_sequences):
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(
                    f"token ids are {tokens.min()} ... {tokens.max()}, outside 0 ... vocab_size-1={vocab_size - 1}."
                )
            pairs = np.hstack([_pairs(tokens, sequence, offset) for offset in range(1, window + 1)])
            counts += sparse.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), counts.shape).tocsr()
            bar.update(len(tokens))
    return (counts + counts.T).tocsr()


def _pairs(tokens: np.ndarray, sequence: np.ndarray, offset: int) -> np.ndarray:
    """(2, n) tokens that stand `offset` apart in one sequence."""
    near = sequence[offset:] == sequence[:-offset]
    return np.stack([tokens[:-offset][near], tokens[offset:][near]])


def _chunks(token_sequences: Iterable[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids of many sequences in a row, and the index of the sequence of each. Long sequences are cut."""
    arrays = (np.asarray(tokens, dtype=np.int64) for tokens in token_sequences)
    pieces = itertools.chain.from_iterable(
        (array[start : start + CHUNK_TOKENS] for start in range(0, len(array), CHUNK_TOKENS)) for array in arrays
    )
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK_TOKENS:
            yield _join(held)
            held, size = [], 0
    if held:
        yield _join(held)


def _join(pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(pieces), np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])


def _positive_pmi(counts: sparse.csr_array) -> sparse.csr_array:
    """max(0, log p(x, c) / (p(x) p_smooth(c))), p_smooth(c) proportional to the count of c to the power 0.75."""
    totals = counts.sum(1)
    smoothed = totals**CONTEXT_SMOOTHING / (totals**CONTEXT_SMOOTHING).sum()
    cells = counts.tocoo()
    pmi = np.log(cells.data / (totals[cells.row] * smoothed[cells.col]))
    kept = pmi > 0
    return sparse.csr_array((pmi[kept], (cells.row[kept], cells.col[kept])), counts.shape)


def _choose_key(shapes: dict[str, tuple[int, ...]], key: str | None, path: str | os.PathLike) -> str:
    if key is not None:
        if key not in shapes:
            raise ValueError(f"{path} has no tensor {key!r}; it holds {sorted(shapes)[:8]}.")
        return key
    matrices = sorted(name for name, shape in shapes.items() if len(shape) == 2)
    if len(matrices) != 1:
        raise ValueError(f"{path} holds {len(matrices)} 2-D tensors {matrices[:8]}: name one with `key`.")
    return matrices[0]


def _as_matrix(values: np.ndarray | torch.Tensor, source: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()  # NumPy has no bfloat16
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(f"{source} must be a (vocab_size, dim) array of numbers, got {values.dtype} {values.shape}.")
    return np.ascontiguousarray(values, dtype=np.float32)


__all__ = ["corpus_embeddings", "file_embeddings", "model_embeddings"]
