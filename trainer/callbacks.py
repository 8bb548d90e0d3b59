"""Callbacks for training: sample text at every evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from tdlm.trainer.trainer import base_model

NEW_TOKENS = 64  # of a sample, where the context has room for them and nothing else is asked for


class SampleTextCallback(TrainerCallback):
    """
    Generates text at every evaluation, appends it to `samples.md` in the output folder, and sends it to TensorBoard,
    Weights & Biases and MLflow where `report_to` names them. The noise is the same each time and is not the training's:
    samples of two steps can be compared, and a run with them is the run without.

    Args:
        trainer: the Trainer that it is added to: `trainer.add_callback(SampleTextCallback(trainer))`.
        prompts: texts to continue; an empty one generates from nothing.
        num_samples: texts for each prompt.
        max_new_tokens: length of the new text. Default: 64 tokens, or what the context has room for.
        num_denoising_steps: steps of `generate`. Default: one for each new token.
        seed: of the noise.

    Raises `ValueError` if the Trainer has no tokenizer, or if a prompt and its new text do not fit in the context.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[str] = ("",),
        num_samples: int = 2,
        max_new_tokens: int | None = None,
        num_denoising_steps: int | None = None,
        seed: int = 0,
    ):
        if trainer.processing_class is None:
            raise ValueError("samples need the Trainer's tokenizer to become text. Pass it as processing_class.")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        self.trainer = trainer
        self.num_samples = num_samples
        self.num_denoising_steps = num_denoising_steps
        self.seed = seed
        self.prompts = [(prompt, *self._encode(prompt, max_new_tokens)) for prompt in prompts]
        self._last_step: int | None = None

    def _encode(self, prompt: str, max_new_tokens: int | None) -> tuple[torch.Tensor, int]:
        """-> (1, P) ids and the number of new tokens. Checked now, not at the first evaluation of a long training."""
        ids = self.trainer.processing_class(prompt, add_special_tokens=False)["input_ids"]
        context_length = base_model(self.trainer.model).config.max_position_embeddings
        room = context_length - len(ids)
        num_new = min(NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
        if not 1 <= num_new <= room:
            raise ValueError(
                f"the prompt {prompt!r} has {len(ids)} tokens: with max_new_tokens={max_new_tokens} it does not fit in "
                f"the context of {context_length} with at least one new token. Shorten it or lower max_new_tokens."
            )
        return torch.tensor([ids], dtype=torch.int64), num_new

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_step = None
        if state.is_world_process_zero and state.global_step == 0:  # not a resumed run
            self._file(args).unlink(missing_ok=True)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self._last_step:  # an evaluation on several sets
            return
        self._last_step = state.global_step
        samples = self.generate()  # on every process: of a sharded model each holds a part
        if not state.is_world_process_zero:
            return
        text = format_samples(samples)
        self._file(args).parent.mkdir(parents=True, exist_ok=True)
        with self._file(args).open("a", encoding="utf-8") as file:
            file.write(f"## Step {state.global_step}\n\n{text}\n")
        for callback in self.trainer.callback_handler.callbacks:
            for kind, report in REPORTERS.items():
                if isinstance(callback, kind):
                    report(callback, args, state, control, samples)

    @torch.no_grad()
    def generate(self) -> list[tuple[str, str]]:
        """-> (prompt, text) of every sample, the text with its prompt."""
        model, tokenizer = base_model(self.trainer.model), self.trainer.processing_class
        generator = torch.Generator().manual_seed(self.seed)
        samples = []
        for prompt, ids, num_new in self.prompts:
            sequences = model.generate(
                ids,
                max_new_tokens=num_new,
                num_return_sequences=self.num_samples,
                num_denoising_steps=self.num_denoising_steps,
                generator=generator,
            )
            samples += [(prompt, text) for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
        return samples

    @staticmethod
    def _file(args: Any) -> Path:
        return Path(args.output_dir, "samples.md")


def format_samples(samples: Sequence[tuple[str, str]]) -> str:
    """Markdown; the texts stand in it as indented code, so that nothing in them is taken for markup."""
    return "\n".join(
        f"{f'After `{prompt!r}`' if prompt else 'From nothing'}:\n\n{indent(text, '    ', lambda line: True)}\n"
        for prompt, text in samples
    )


# ---- trackers, each through the handle that transformers' own callback for it holds ----


def _to_tensorboard(callback: TensorBoardCallback, args, state, control, samples) -> None:
    callback.on_log(args, state, control, logs={"eval_samples": format_samples(samples)})  # it writes strings as text


def _to_wandb(callback: WandbCallback, args, state, control, samples) -> None:
    table = callback._wandb.Table(columns=["prompt", "text"], data=[list(sample) for sample in samples])
    callback._wandb.log({"eval/samples": table, "train/global_step": state.global_step})


def _to_mlflow(callback: MLflowCallback, args, state, control, samples) -> None:
    callback._ml_flow.log_text(format_samples(samples), f"samples/step-{state.global_step}.md")


REPORTERS: dict[type[TrainerCallback], Callable[..., None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    MLflowCallback: _to_mlflow,
}

__all__ = ["SampleTextCallback", "format_samples"]
