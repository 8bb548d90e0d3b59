"""Training and evaluating tree diffusion language models with the Hugging Face Trainer."""

from tdlm.trainer.callbacks import SampleTextCallback
from tdlm.trainer.data import RandomCrops, TDLMDataCollator, evaluation_windows, load_text, stream_crops, tokenize
from tdlm.trainer.model_card import CardDataset, CardDetails, create_model_card
from tdlm.trainer.trainer import TDLMTrainer, nelbo_metrics
from tdlm.trainer.training_args import TDLMTrainingArguments

__all__ = [
    "CardDataset",
    "CardDetails",
    "RandomCrops",
    "SampleTextCallback",
    "TDLMDataCollator",
    "TDLMTrainer",
    "TDLMTrainingArguments",
    "create_model_card",
    "evaluation_windows",
    "load_text",
    "nelbo_metrics",
    "stream_crops",
    "tokenize",
]
