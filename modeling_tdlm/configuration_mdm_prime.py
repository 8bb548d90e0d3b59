"""Configuration of masked diffusion over the digits of token codes (MDM-Prime-v2, arXiv 2603.16077)."""

from huggingface_hub.dataclasses import strict

from .configuration_tdlm import PRESETS, DiffusionBackboneConfig

PRIME_HEAD_TYPES = ("digit", "joint")


@strict
class MDMPrimeConfig(DiffusionBackboneConfig):
    r"""
    Configuration of an [`MDMPrimeForDiffusionLM`]: the fields of [`DiffusionBackboneConfig`] and

    Args:
        base: values of a digit; a token is `ceil(log_base vocab_size)` digits. The paper's binary code is 2; with
            `vocab_size` a token is one digit, which is MDLM.
        head_type: what scores the digits: `"digit"` (a softmax for each digit, by itself) or `"joint"` (logits of all
            tokens, restricted to those that agree with the digits revealed so far).
        shuffle_seed: seed of the random order in which the tokens get their codes (index shuffling).

    ```python
    >>> from tdlm import MDMPrimeConfig, MDMPrimeForDiffusionLM

    >>> model = MDMPrimeForDiffusionLM(MDMPrimeConfig.for_vocab(4096, preset="tiny"))
    ```"""

    model_type = "mdm_prime"

    base: int = 2
    head_type: str = "digit"
    shuffle_seed: int = 0

    @property
    def num_digits(self) -> int:
        """ceil(log_base vocab_size), at least 1; in integers, because a float logarithm misses exact powers."""
        num_digits, num_codes = 1, self.base
        while num_codes < self.vocab_size:
            num_digits, num_codes = num_digits + 1, num_codes * self.base
        return num_digits

    @property
    def num_nodes(self) -> int:
        """Rows of the input embedding: each digit's values and its mask."""
        return self.num_digits * (self.base + 1)

    @classmethod
    def for_vocab(cls, vocab_size: int, preset: str = "small", **kwargs) -> "MDMPrimeConfig":
        """The configuration of a model over `vocab_size` tokens, in a size of `PRESETS`; `kwargs` override it."""
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not one of {sorted(PRESETS)}.")
        return cls(**{**PRESETS[preset], "vocab_size": vocab_size, **kwargs})

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the fields describe one possible model."""
        super().validate_architecture()
        if not 2 <= self.base <= max(2, self.vocab_size):
            raise ValueError(
                f"base={self.base} must be at least 2 and at most vocab_size={self.vocab_size}, with which a token is "
                "a single digit."
            )
        self._check_option("head_type", PRIME_HEAD_TYPES)
        if not 0 <= self.shuffle_seed < 2**63:
            raise ValueError(f"shuffle_seed={self.shuffle_seed} must be at least 0 and below 2**63.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=True: the heads over digits share no embeddings. Leave it out.")


__all__ = ["PRIME_HEAD_TYPES", "MDMPrimeConfig"]
