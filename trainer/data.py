"""From text to batches: load, tokenise, crop at random for training, cut into windows for evaluation."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from tdlm.modeling_tdlm import IGNORE_INDEX

_BUILDERS = {".txt": "text", ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_text(
    source: str | os.PathLike,
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_column: str = "text",
) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset with a `text_column`, one document a row.

    `source` is a file, a folder or glob of files of one kind (.txt, one document a file; .parquet, .jsonl, .json,
    .csv), or the name of a dataset on the Hub (then `name` is its configuration and `split` may be any of its splits).
    """
    files = _local_files(source)
    if files:
        kind = _BUILDERS.get(Path(files[0]).suffix)
        if kind is None or any(_BUILDERS.get(Path(file).suffix) != kind for file in files):
            raise ValueError(f"{source}: cannot read {files[0]}. Files must all be of one kind: {list(_BUILDERS)}.")
        options = {"sample_by": "document"} if kind == "text" else {}
        dataset = datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
    elif _looks_like_a_path(source):
        raise FileNotFoundError(f"no such file or folder: {source}")
    else:
        dataset = datasets.load_dataset(os.fspath(source), name, split=split, streaming=streaming)
    columns = dataset.column_names  # None for streams whose features are not known yet
    if columns is not None and text_column not in columns:
        raise ValueError(f"{source} has no column {text_column!r}; it has {columns}. Set text_column.")
    return dataset


def _local_files(source: str | os.PathLike) -> list[str]:
    path = Path(source)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return sorted(str(file) for file in path.iterdir() if file.suffix in _BUILDERS)
    if any(mark in path.name for mark in "*?["):
        return sorted(str(file) for file in path.parent.glob(path.name))
    return []


def _looks_like_a_path(source: str | os.PathLike) -> bool:
    return isinstance(source, os.PathLike) or Path(source).suffix in _BUILDERS or source.startswith((".", "/", "~"))


def document_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a document, with end-of-text at both ends (the recipe)."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]


def tokenize(
    dataset: datasets.Dataset | datasets.IterableDataset, tokenizer: Any, *, text_column: str = "text"
) -> datasets.Dataset | datasets.IterableDataset:
    """Documents of text -> documents of token ids, in the one column `input_ids`. Cached by datasets on disk."""
    check_special_tokens(tokenizer)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        return {"input_ids": [document_ids(text, tokenizer) for text in batch[text_column]]}

    columns = dataset.column_names or list(next(iter(dataset)))
    options = {} if isinstance(dataset, datasets.IterableDataset) else {"desc": "Tokenising"}
    return dataset.map(encode, batched=True, remove_columns=columns, **options)


def check_special_tokens(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which marks the ends of a document. Set tokenizer.eos_token.")


def pad_token_id(tokenizer: Any) -> int:
    """The padding token, or end-of-text for tokenizers such as GPT-2's that have none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def random_crop(ids: np.ndarray, length: int, pad_id: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """A document -> `length` token ids: cropped at a uniform offset, the last included, or padded on the right.

    Padding is an ordinary token here: seen, noised and trained on (App. B).
    """
    offset = int(rng.integers(max(1, len(ids) - length + 1)))
    crop = np.full(length, pad_id, dtype=np.int64)
    crop[: len(ids) - offset] = ids[offset : offset + length]
    input_ids = torch.from_numpy(crop)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


class RandomCrops(Dataset):
    """One random crop of each tokenised document an epoch; a pure function of (seed, epoch, index)."""

    def __init__(self, dataset: datasets.Dataset, length: int, pad_id: int, seed: int = 0):
        self.dataset = dataset.with_format("numpy", columns=["input_ids"])
        self.length = length
        self.pad_id = pad_id
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        return random_crop(self.dataset[index]["input_ids"], self.length, self.pad_id, rng)


def stream_crops(
    dataset: datasets.IterableDataset, length: int, pad_id: int, seed: int = 0
) -> datasets.IterableDataset:
    """`RandomCrops` for a stream of tokenised documents; crops depend on the seed and the place in the stream."""

    def crop(example: dict[str, Any], index: int) -> dict[str, torch.Tensor]:
        return random_crop(np.asarray(example["input_ids"]), length, pad_id, np.random.default_rng((seed, index)))

    return dataset.map(crop, with_indices=True)


def evaluation_windows(
    dataset: datasets.Dataset, tokenizer: Any, length: int, *, text_column: str = "text"
) -> datasets.Dataset:
    """Documents -> consecutive windows of at most `length` tokens, in which every token stands exactly once.

    Columns: `input_ids`, and `num_bytes`, the UTF-8 bytes of text that the window spells; they add up to the text's.
    """
    check_special_tokens(tokenizer)
    if not tokenizer.is_fast:
        raise ValueError("bits per byte need the text offsets that only a fast tokenizer gives.")

    def cut(batch: dict[str, list]) -> dict[str, list]:
        windows: dict[str, list] = {"input_ids": [], "num_bytes": []}
        for text in batch[text_column]:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids = [tokenizer.eos_token_id, *encoded["input_ids"], tokenizer.eos_token_id]
            # Where each token begins in the text; what stands before the first belongs to it.
            starts = [0, *(start for start, _ in encoded["offset_mapping"]), len(text), len(text)]
            starts[1] = 0 if encoded["input_ids"] else len(text)
            for begin in range(0, len(ids), length):
                end = min(begin + length, len(ids))
                windows["input_ids"].append(ids[begin:end])
                windows["num_bytes"].append(len(text[starts[begin] : starts[end]].encode()))
        return windows

    return dataset.map(cut, batched=True, remove_columns=dataset.column_names, desc="Cutting evaluation windows")


class TDLMDataCollator:
    """Pads on the right: padding is not seen (`attention_mask` 0) and not scored (`labels` -100).

    Examples hold `input_ids` and perhaps `attention_mask`, `labels` (-100 marks clean context, as for prompts) and
    `num_bytes`.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        labels = [torch.as_tensor(example.get("labels", example["input_ids"])) for example in examples]
        masks = [
            torch.as_tensor(example.get("attention_mask", torch.ones_like(row)))
            for example, row in zip(examples, ids, strict=True)
        ]
        labels = [row.masked_fill(mask == 0, IGNORE_INDEX) for row, mask in zip(labels, masks, strict=True)]
        batch = {"input_ids": _pad(ids, self.pad_token_id), "labels": _pad(labels, IGNORE_INDEX)}
        mask = _pad(masks, 0)
        if not mask.all():
            batch["attention_mask"] = mask
        if "num_bytes" in examples[0]:
            batch["num_bytes"] = torch.tensor([example["num_bytes"] for example in examples])
        return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def unigram_entropy(sequences: Iterable[Any], vocab_size: int) -> float:
    """Entropy in nats of the token frequencies in `sequences`: what a model that ignores context can reach at best."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in sequences:
        counts += np.bincount(ids, minlength=vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def perplexity(nats_per_token: float) -> float:
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


__all__ = [
    "RandomCrops",
    "TDLMDataCollator",
    "evaluation_windows",
    "load_text",
    "pad_token_id",
    "random_crop",
    "stream_crops",
    "tokenize",
    "unigram_entropy",
]
