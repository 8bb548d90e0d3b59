"""The template of the model card, which `tdlm.trainer.model_card` fills from a run."""

from pathlib import Path

TEMPLATE = Path(__file__).with_name("model_card.md")

__all__ = ["TEMPLATE"]
