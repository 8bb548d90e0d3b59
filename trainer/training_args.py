"""Training arguments whose defaults are the paper's recipe."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class TDLMTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the recipe's optimizer and schedule as defaults: AdamW 5e-4, betas
    (0.9, 0.99), eps 1e-9, weight decay 0.02, clip 1.0, 2% linear warm-up, cosine to 10%. The recipe trains 500k steps
    of 512 sequences under bf16 autocast: set `max_steps`, the batch size and `bf16` for your machine.
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second beta of AdamW."})
    adam_epsilon: float = field(default=1e-9, metadata={"help": "Epsilon of AdamW."})
    weight_decay: float = field(default=0.02, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "The schedule's own arguments, as JSON; for the default one, min_lr_rate 0.1."}
    )
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Linear warm-up: steps, or below 1 a share of all steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep columns that evaluation needs but forward does not take."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses; it waits for the device at every step."}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin batches in memory, where there is a GPU."}
    )
    eval_num_samples: int = field(default=1, metadata={"help": "Noise draws for each sequence in an evaluation."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the noise in evaluations."})

    def __post_init__(self):
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        super().__post_init__()
        if self.eval_num_samples < 1:
            raise ValueError(f"eval_num_samples={self.eval_num_samples} must be at least 1.")


__all__ = ["TDLMTrainingArguments"]
