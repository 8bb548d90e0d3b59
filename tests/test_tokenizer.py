"""The byte-level tokenizer."""

import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tdlm.tokenization import train_tokenizer

TEXTS = ["The tree has leaves.", "The leaves of the tree fall, and the tree stands.", "Ein Baum trägt Blätter."] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces , and a space before the comma ",
        "tabs\tand\r\nlines\n\n",
        "naïve Straße 漢字 🌳\u200d🌲 \x00\x7f",
        "a\u0301 is not \u00e1",
        "it's <|endoftext|> inside",
        "".join(map(chr, range(0xD800))),
    ],
)
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_vocabulary_has_the_end_of_text_first_then_all_bytes(tokenizer):
    assert len(tokenizer) == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def test_257_tokens_are_enough_for_any_text():
    tokenizer = train_tokenizer([], 257, eos_token="</s>", progress=False)
    assert len(tokenizer) == 257
    assert len(tokenizer("漢")["input_ids"]) == 3
    assert tokenizer.convert_ids_to_tokens(0) == "</s>"


def test_padding_goes_left(tokenizer):
    batch = tokenizer(["The", "The tree stands"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The  tree , it's 漢 <|endoftext|>"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.padding_side == "left"
    assert loaded.pad_token_id == loaded.eos_token_id == loaded.bos_token_id == 0


TRAIN = f"""
import sys
from tdlm.tokenization import train_tokenizer
train_tokenizer({TEXTS!r}, 320, progress=False).save_pretrained(sys.argv[1])
"""


def test_training_is_deterministic(tmp_path):
    for threads in ("1", "2"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / threads)], env=environment, check=True)
    first, second = ((tmp_path / threads / "tokenizer.json").read_bytes() for threads in ("1", "2"))
    assert first == second


def test_a_vocabulary_must_hold_all_bytes():
    with pytest.raises(ValueError, match=r"vocab_size=256 must be at least 257: 256 bytes and <\|endoftext\|>"):
        train_tokenizer(TEXTS, 256, progress=False)
