"""Sample text at every evaluation: in a file, in the trackers, and without a trace in the training."""

import pytest
import torch
from tiny import Sequences, tiny_model
from transformers.integrations import MLflowCallback, WandbCallback

from tdlm import VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer import SampleTextCallback, TDLMTrainer, TDLMTrainingArguments

TREE_HEIGHT = 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to merge, some words to keep"] * 3, 270, progress=False)


def make_trainer(folder, tokenizer, report_to=(), callbacks=(), **options):
    tree = VocabTree.random(len(tokenizer), 8, seed=0).bind(tokenizer)
    assert tree.height == TREE_HEIGHT
    args = TDLMTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        disable_tqdm=True,
        use_cpu=True,
        report_to=list(report_to),
        **{"max_steps": 4, "logging_steps": 1, "eval_steps": 2, "eval_strategy": "steps", "save_strategy": "no"}
        | options,
    )
    return TDLMTrainer(
        tiny_model(tree),
        args,
        train_dataset=Sequences(8),
        eval_dataset=Sequences(2),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def test_losses_by_level_and_sample_text_arrive_in_tensorboard(tokenizer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, tokenizer, ["tensorboard"])
    trainer.add_callback(SampleTextCallback(trainer, prompts=["", "some words"], num_samples=1))
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    history = trainer.state.log_history
    for name in ["loss", *(f"loss_level_{level}" for level in range(TREE_HEIGHT))]:
        logged = [(entry["step"], entry[name]) for entry in history if name in entry]
        events = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
        assert len(events) == 4
    for name in ["nelbo", *(f"nelbo_level_{level}" for level in range(TREE_HEIGHT))]:
        logged = [(entry["step"], entry[f"eval_{name}"]) for entry in history if f"eval_{name}" in entry]
        events = [(event.step, event.value) for event in board.Scalars(f"eval/{name}")]
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
        assert len(events) == 2
    texts = board.Tensors("eval/samples/text_summary")
    assert [event.step for event in texts] == [2, 4]
    for event in texts:
        (text,) = event.tensor_proto.string_val
        section = f"## Step {event.step}\n\n{text.decode()}\n"
        assert "From nothing:" in section and "After `'some words'`:\n\n    some words" in section
        assert section in (tmp_path / "samples.md").read_text()


def test_samples_stand_in_a_file_with_no_tracker_at_all(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer)
    (tmp_path / "samples.md").write_text("of an earlier run")
    trainer.add_callback(SampleTextCallback(trainer, num_samples=3, max_new_tokens=5, num_denoising_steps=4))
    trainer.train()
    trainer.evaluate()  # of the weights that were evaluated last: no new text
    text = (tmp_path / "samples.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Step 2", "## Step 4"]
    assert text.count("From nothing:\n\n    ") == 6


def test_a_resumed_run_adds_to_its_samples(tokenizer, tmp_path):
    for steps, options in [(2, {}), (4, {"resume_from_checkpoint": True})]:
        trainer = make_trainer(tmp_path, tokenizer, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer.add_callback(SampleTextCallback(trainer, num_samples=1))
        trainer.train(**options)
    text = (tmp_path / "samples.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Step 2", "## Step 4"]


def test_samples_are_seeded_and_leave_the_training_as_it_is(tokenizer, tmp_path):
    torch.manual_seed(0)
    alone = make_trainer(tmp_path, tokenizer)
    alone.train()
    torch.manual_seed(0)
    sampled = make_trainer(tmp_path, tokenizer)
    callback = SampleTextCallback(sampled, prompts=["", "words"])
    sampled.add_callback(callback)
    sampled.train()
    for left, right in zip(alone.model.parameters(), sampled.model.parameters(), strict=True):
        assert torch.equal(left, right)
    first = callback.generate()
    assert callback.generate() == first
    assert SampleTextCallback(sampled, prompts=["", "words"], seed=1).generate() != first
    assert [prompt for prompt, _ in first] == ["", "", "words", "words"]
    assert all(text.startswith(prompt) for prompt, text in first)


def test_text_in_a_sample_is_never_markup(tokenizer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)
    callback = SampleTextCallback(trainer)
    monkeypatch.setattr(callback, "generate", lambda: [("", "```\n\n# Loud\n| a |")])
    trainer.add_callback(callback)
    trainer.evaluate()
    assert "    ```\n    \n    # Loud\n    | a |\n" in (tmp_path / "samples.md").read_text()


class FakeWandb:
    """What the callback uses of wandb: `Table` and `log`."""

    def __init__(self):
        self.logged = []

    def Table(self, columns, data):
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, values):
        self.logged.append(values)


class FakeMLflow:
    """What the callback uses of mlflow: `log_text`."""

    def __init__(self):
        self.texts = {}

    def log_text(self, text, artifact_file):
        self.texts[artifact_file] = text


def test_wandb_and_mlflow_get_the_samples_where_they_report(tokenizer, tmp_path):
    class Wandb(WandbCallback):
        def __init__(self):
            self._wandb = FakeWandb()

        def on_train_begin(self, *args, **kwargs): ...
        def on_train_end(self, *args, **kwargs): ...
        def on_log(self, *args, **kwargs): ...
        def on_save(self, *args, **kwargs): ...

    class MLflow(MLflowCallback):
        def __init__(self):
            self._ml_flow, self._auto_end_run = FakeMLflow(), False

        def on_train_begin(self, *args, **kwargs): ...
        def on_train_end(self, *args, **kwargs): ...
        def on_log(self, *args, **kwargs): ...
        def on_save(self, *args, **kwargs): ...

    wandb, mlflow = Wandb(), MLflow()
    trainer = make_trainer(tmp_path, tokenizer, callbacks=[wandb, mlflow], max_steps=2)
    callback = SampleTextCallback(trainer, prompts=["some"], num_samples=2)
    trainer.add_callback(callback)
    trainer.train()
    rows = [{"prompt": prompt, "text": text} for prompt, text in callback.generate()]
    assert wandb._wandb.logged == [{"eval/samples": rows, "train/global_step": 2}]
    (text,) = mlflow._ml_flow.texts.values()
    assert list(mlflow._ml_flow.texts) == ["samples/step-2.md"]
    assert f"## Step 2\n\n{text}\n" == (tmp_path / "samples.md").read_text()


def test_what_cannot_be_sampled_is_refused_before_the_training(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        SampleTextCallback(trainer, num_samples=0)
    with pytest.raises(ValueError, match=r"has 0 tokens: with max_new_tokens=17 it does not fit in the context of 16"):
        SampleTextCallback(trainer, max_new_tokens=17)
    with pytest.raises(ValueError, match=r"the prompt '1234567890123456' has 16 tokens: .* with at least one new"):
        SampleTextCallback(trainer, prompts=["1234567890123456"])
    trainer.processing_class = None
    with pytest.raises(ValueError, match="samples need the Trainer's tokenizer to become text"):
        SampleTextCallback(trainer)
