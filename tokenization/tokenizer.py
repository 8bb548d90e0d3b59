"""A byte-level BPE tokenizer trained on a corpus."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, eos_token: str = "<|endoftext|>", progress: bool = True
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: every byte is a token, so nothing is unknown and decoding gives back any text exactly.

    `eos_token` has id 0 and is also the beginning-of-sequence and padding token; padding goes left. The same texts
    give the same tokenizer. The vocabulary stays below `vocab_size` when the texts have no more pairs to merge.

    Raises `ValueError` if `vocab_size` cannot hold the 256 bytes and `eos_token`.
    """
    if vocab_size < NUM_BYTES + 1:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {NUM_BYTES + 1}: {NUM_BYTES} bytes and {eos_token}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=eos_token,
        eos_token=eos_token,
        pad_token=eos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


__all__ = ["train_tokenizer"]
