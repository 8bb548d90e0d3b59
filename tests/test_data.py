"""Text to batches: every token counted once, every offset reached, padding where the recipe wants it."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset

from tdlm.tokenization import train_tokenizer
from tdlm.trainer import RandomCrops, TDLMDataCollator, evaluation_windows, load_text, stream_crops, tokenize
from tdlm.trainer.data import pad_token_id, random_crop, unigram_entropy

TEXTS = ["Call me Ishmael. Some years ago", "", "naïve café — ünïcödé ☃", "x" * 500]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 300, progress=False)


@pytest.fixture
def text() -> Dataset:
    return Dataset.from_dict({"text": TEXTS})


def test_documents_have_end_of_text_at_both_ends(text, tokenizer):
    ids = tokenize(text, tokenizer)["input_ids"]
    assert all(row[0] == row[-1] == tokenizer.eos_token_id for row in ids)
    assert [tokenizer.decode(row[1:-1]) for row in ids] == TEXTS


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_evaluation_windows_hold_every_token_and_byte_once(text, tokenizer, length):
    windows = evaluation_windows(text, tokenizer, length)
    documents = tokenize(text, tokenizer)["input_ids"]
    assert list(chain(*windows["input_ids"])) == list(chain(*documents))
    assert max(map(len, windows["input_ids"])) <= length
    assert sum(windows["num_bytes"]) == sum(len(document.encode()) for document in TEXTS)
    assert min(windows["num_bytes"]) >= 0


def test_random_crops_reach_every_offset_the_last_included():
    ids = np.arange(10)
    starts = [int(random_crop(ids, 4, 99, np.random.default_rng(i))["input_ids"][0]) for i in range(700)]
    counts = np.bincount(starts, minlength=7)
    assert len(counts) == 7
    assert counts.min() > 60


def test_short_documents_are_padded_and_padding_is_trained_on():
    example = random_crop(np.array([5, 6, 7]), 6, 99, np.random.default_rng(0))
    assert example["input_ids"].tolist() == example["labels"].tolist() == [5, 6, 7, 99, 99, 99]


def test_crops_are_a_function_of_seed_epoch_and_index():
    dataset = Dataset.from_dict({"input_ids": [list(range(100))] * 5})
    first, second = RandomCrops(dataset, 8, 0, seed=1), RandomCrops(dataset, 8, 0, seed=1)
    crops = [first[i]["input_ids"].tolist() for i in range(5)]
    assert [second[i]["input_ids"].tolist() for i in reversed(range(5))] == crops[::-1]
    first.set_epoch(1)
    assert [first[i]["input_ids"].tolist() for i in range(5)] != crops
    assert [RandomCrops(dataset, 8, 0, seed=2)[i]["input_ids"].tolist() for i in range(5)] != crops
    assert len(first) == 5


def test_streams_are_cropped_the_same_every_time(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXTS))
    runs = []
    for _ in range(2):
        stream = tokenize(load_text(tmp_path / "a.jsonl", streaming=True), tokenizer)
        runs.append([torch.as_tensor(row["input_ids"]).tolist() for row in stream_crops(stream, 16, 0, seed=3)])
    assert runs[0] == runs[1]
    assert [len(row) for row in runs[0]] == [16] * 4


def test_the_collator_hides_and_does_not_score_padding():
    batch = TDLMDataCollator(pad_token_id=9)(
        [{"input_ids": [1, 2, 3], "num_bytes": 4}, {"input_ids": [4], "labels": [-100], "num_bytes": 1}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["num_bytes"].tolist() == [4, 1]
    # A mask that the data brings is kept, and its padding is not scored.
    masked = TDLMDataCollator(9)([{"input_ids": [1, 2, 9], "attention_mask": [1, 1, 0]}])
    assert masked["attention_mask"].tolist() == [[1, 1, 0]]
    assert masked["labels"].tolist() == [[1, 2, -100]]
    # No mask where nothing is padded: the fast attention paths take none.
    assert "attention_mask" not in TDLMDataCollator(0)([{"input_ids": torch.tensor([1, 2])}] * 2)


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl", ".csv"])
def test_local_files_of_every_kind_and_folders_of_them(tmp_path, suffix):
    text = Dataset.from_dict({"text": ["one\ntwo", "three"]})
    path = tmp_path / f"part{suffix}"
    if suffix == ".txt":
        path.write_text("one\ntwo")
        (tmp_path / "rest.txt").write_text("three")
    else:
        {".parquet": text.to_parquet, ".jsonl": text.to_json, ".csv": text.to_csv}[suffix](str(path))
    assert load_text(tmp_path)["text"] == ["one\ntwo", "three"]
    assert load_text(str(tmp_path / f"*{suffix}"))["text"] == ["one\ntwo", "three"]
    assert load_text(path)["text"][0] == "one\ntwo"


def test_unigram_entropy_of_a_fair_coin_is_one_bit():
    assert unigram_entropy([[0, 1], [1, 0]], vocab_size=5) == pytest.approx(np.log(2))


def test_gpt2_like_tokenizers_pad_with_end_of_text(tokenizer):
    class NoPad:
        pad_token_id, eos_token_id = None, 7

    assert pad_token_id(NoPad()) == 7
    assert pad_token_id(tokenizer) == 0


def test_bad_sources_are_named(tmp_path, text, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing.txt"):
        load_text(tmp_path / "missing.txt")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(ValueError, match="Files must all be of one kind"):
        load_text(tmp_path / "a.pdf")
    text.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"has no column 'body'; it has \['text'\]"):
        load_text(tmp_path / "a.parquet", text_column="body")

    class Slow:
        eos_token_id, is_fast = 0, False

    with pytest.raises(ValueError, match="only a fast tokenizer"):
        evaluation_windows(text, Slow(), 8)
    Slow.eos_token_id = None
    with pytest.raises(ValueError, match="has no eos_token"):
        tokenize(text, Slow())
