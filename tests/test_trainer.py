"""TDLMTrainer: one noise for one global batch, exact sums, seeded evaluation."""

import math

import numpy as np
import pytest
import torch
from tiny import Sequences, tiny_model
from transformers import EvalPrediction, Trainer, TrainingArguments

from tdlm import VocabTree
from tdlm.trainer import TDLMDataCollator, TDLMTrainer, TDLMTrainingArguments, nelbo_metrics

TREE = VocabTree.random(50, 4, seed=0)


def train(tmp_path, dataset, steps=3, plain=False, **options):
    model = tiny_model(TREE)
    kind, arguments = (Trainer, TrainingArguments) if plain else (TDLMTrainer, TDLMTrainingArguments)
    args = arguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "seed": 3,
            **({"dataloader_pin_memory": False} if plain else {}),
            **options,
        },
    )
    trainer = kind(model=model, args=args, train_dataset=dataset, data_collator=TDLMDataCollator(0))
    trainer.train()
    return trainer


def losses(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("dataset", [Sequences(32), Sequences(32, context=5)], ids=["all scored", "with context"])
def test_accumulation_1x8_and_4x2_give_the_same_loss_and_update(tmp_path, dataset):
    whole = train(tmp_path, dataset, per_device_train_batch_size=8)
    parts = train(tmp_path, dataset, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    for level in range(TREE.height):
        name = f"loss_level_{level}"
        assert losses(parts, name) == pytest.approx(losses(whole, name), rel=1e-5, abs=1e-6)
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tmp_path):
    runs = [train(tmp_path, Sequences(32), per_device_train_batch_size=8, seed=seed) for seed in (3, 3, 4)]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])


def test_level_losses_add_up_to_the_loss(tmp_path):
    trainer = train(tmp_path, Sequences(32), steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    levels = zip(*(losses(trainer, f"loss_level_{level}") for level in range(TREE.height)), strict=True)
    assert [sum(level) for level in levels] == pytest.approx(losses(trainer), rel=1e-5)


def test_a_resumed_run_logs_the_levels_and_crops_of_the_run_that_was_not_stopped(tmp_path):
    class Epochs(Sequences):
        epoch, seen = 0, []

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, index):
            self.seen.append(self.epoch)
            return super().__getitem__(index)

    options = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3, "steps": 6}
    whole = train(tmp_path, Epochs(32), **options)
    assert Epochs.seen == [0] * 32 + [1] * 24  # one batch is fetched ahead
    Epochs.seen.clear()
    whole.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # step 3 of an epoch of 4
    assert Epochs.seen == [0] * 8 + [1] * 24
    levels = [losses(whole, f"loss_level_{level}") for level in range(TREE.height)]
    assert [sum(step) for step in zip(*levels, strict=True)] == pytest.approx(losses(whole), rel=1e-5)


def test_the_noise_of_a_step_is_one_grid_over_processes_and_accumulation_steps(tmp_path):
    trainer = train(tmp_path, Sequences(32), steps=1)
    batches = [{"input_ids": torch.zeros(2, 12, dtype=torch.int64)} for _ in range(3)]
    alone = torch.cat([batch["timesteps"] for batch in trainer._noise(batches)])
    torch.testing.assert_close(alone.sort().values.diff(), torch.full((5,), 1 / 6, dtype=torch.float64))

    class Args:  # two processes, three batches of two each
        world_size, seed = 2, trainer.args.seed

    times = []
    for Args.process_index in range(2):
        trainer.args = Args
        times += [trainer._noise(batches)]
    everywhere = torch.cat([batch["timesteps"] for process in times for batch in process])
    torch.testing.assert_close(everywhere.sort().values.diff(), torch.full((11,), 1 / 12, dtype=torch.float64))
    noise = torch.cat([batch["input_ids"] for process in times for batch in process])
    assert len({tuple(row.tolist()) for row in noise}) > 6


def test_a_plain_trainer_trains_and_evaluates_the_model(tmp_path):
    trainer = train(tmp_path, Sequences(64), steps=60, plain=True, per_device_train_batch_size=16, learning_rate=1e-2)
    assert np.mean(losses(trainer)[-10:]) < np.mean(losses(trainer)[:10])
    metrics = trainer.evaluate(Sequences(16))
    assert math.isfinite(metrics["eval_loss"])


def test_evaluation_is_seeded_token_weighted_and_unclipped(tmp_path):
    trainer = train(tmp_path, Sequences(32), steps=1, eval_num_samples=2, per_device_eval_batch_size=3)
    dataset = Sequences(10, uneven=True)
    first, second = trainer.evaluate(dataset), trainer.evaluate(dataset)
    assert first["eval_nelbo"] == second["eval_nelbo"] == first["eval_loss"]
    assert first["eval_num_tokens"] == sum(len(row) for row in dataset.rows)
    assert first["eval_ppl"] == pytest.approx(math.exp(first["eval_nelbo"]))
    levels = [first[f"eval_nelbo_level_{level}"] for level in range(TREE.height)]
    assert sum(levels) == pytest.approx(first["eval_nelbo"])
    assert "eval_bpb" not in first
    # The reference: many draws of each sequence by itself, summed over tokens.
    model, copies = trainer.model.eval(), 500
    draws = torch.stack([model.nelbo(row.expand(copies, -1), num_samples=3).nelbo for row in dataset.rows])
    exact = float(draws.mean(1).sum()) / first["eval_num_tokens"]
    error = float(draws.std(1).square().sum() / copies) ** 0.5 / first["eval_num_tokens"]
    trainer.args.eval_num_samples = 40
    estimate = trainer.evaluate(dataset)
    assert estimate["eval_nelbo"] == pytest.approx(exact, abs=4 * (error + estimate["eval_nelbo_standard_error"]))


def test_metrics_weigh_tokens_and_count_bytes():
    prediction = EvalPrediction(predictions=np.array([[6.0, 2.0], [1.0, 1.0]]), label_ids=np.array([[4, 20], [1, 5]]))
    metrics = nelbo_metrics(prediction, num_samples=1)
    assert metrics["nelbo"] == pytest.approx(10 / 5)
    assert metrics["nelbo_level_0"] == pytest.approx(7 / 5)
    assert metrics["bpb"] == pytest.approx(10 / math.log(2) / 25)
    assert metrics["num_tokens"] == 5
    # The same numbers as two draws of one level.
    assert nelbo_metrics(prediction, num_samples=2)["nelbo_standard_error"] == pytest.approx(
        np.std([7 / 5, 3 / 5], ddof=1) / 2**0.5
    )


def test_a_model_that_is_no_tree_diffusion_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    trainer = TDLMTrainer(LlamaForCausalLM(config), TDLMTrainingArguments(output_dir=str(tmp_path), report_to=[]))
    with pytest.raises(ValueError, match="trains models of type tdlm or mdm_prime, not LlamaForCausalLM"):
        trainer._noise([])


def test_the_recipe_is_the_default(tmp_path):
    args = TDLMTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (5e-4, 0.9, 0.99, 1e-9)
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_kwargs) == (0.02, 1.0, {"min_lr_rate": 0.1})
    assert args.get_warmup_steps(500_000) == 10_000
    assert TDLMTrainingArguments(output_dir=str(tmp_path), lr_scheduler_type="linear").lr_scheduler_kwargs is None
    with pytest.raises(ValueError, match="eval_num_samples=0"):
        TDLMTrainingArguments(output_dir=str(tmp_path), eval_num_samples=0)
