"""MDM-Prime: its token codes, its bound, its sampler, its checkpoints."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from test_remote_code import in_a_stranger
from tiny import NUM_POSITIONS, Recorder, Sequences, Source, chi_square_p
from tiny_prime import bayes_prime_model, prime_config, prime_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from tdlm import MDMPrimeConfig, MDMPrimeForDiffusionLM, MDMPrimeModel, VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer import TDLMDataCollator, TDLMTrainer, TDLMTrainingArguments

IGNORE = -100
CODES = [(1, 2), (2, 2), (5, 2), (6, 3), (7, 2), (8, 2), (9, 3), (50, 2), (50, 50), (100, 3), (100, 7)]
HEADS = ["digit", "joint"]
# What a fresh checkpoint of this class carries beside its weights.
CODE_FILES = ["configuration_mdm_prime.py", "modeling_mdm_prime.py", "modeling_tdlm.py", "configuration_tdlm.py"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the code ----


@pytest.mark.parametrize(("vocab_size", "base"), CODES)
def test_codes_are_a_permutation_and_digits_round_trip(vocab_size, base):
    code = MDMPrimeForDiffusionLM(prime_config(vocab_size, base=base)).code
    tokens = torch.arange(vocab_size)
    digits = code.digits(tokens)
    assert digits.shape == (vocab_size, max(1, math.ceil(round(math.log(vocab_size, base), 9))))
    assert digits.min() >= 0 and digits.max() < base
    assert len(torch.unique(digits, dim=0)) == vocab_size
    assert torch.equal(code.tokens(digits), tokens)
    spelled = [int("".join(map(str, row)), base) for row in digits.tolist()] if base < 10 else code.code_of_token
    assert sorted(spelled) == tokens.tolist()


def test_the_shuffle_follows_the_seed():
    codes = [MDMPrimeForDiffusionLM(prime_config(50, shuffle_seed=seed)).code.code_of_token for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[0], torch.arange(50))


@pytest.mark.parametrize(("vocab_size", "base"), [(5, 2), (7, 2), (8, 2), (5, 3), (1, 2), (10, 4)])
def test_a_digit_is_possible_if_some_token_has_it_and_the_revealed_digits(vocab_size, base):
    code = MDMPrimeForDiffusionLM(prime_config(vocab_size, base=base)).code
    tokens = code.digits(torch.arange(vocab_size))
    for canvas in itertools.product(range(base + 1), repeat=code.num_digits):
        z = torch.tensor(canvas)
        agree = tokens[((tokens == z) | (z == code.mask_digit)).all(-1)]
        if len(agree) == 0:
            continue
        for digit in torch.nonzero(z == code.mask_digit).flatten().tolist():
            assert torch.nonzero(code.possible(z)[digit]).flatten().tolist() == agree[:, digit].unique().tolist()


def test_sizes_of_digits_and_embeddings():
    config = prime_config(50257)
    assert (config.num_digits, config.num_nodes) == (16, 48)
    assert (prime_config(2**16).num_digits, prime_config(2**16 + 1).num_digits) == (16, 17)
    assert (prime_config(1000, base=10).num_digits, prime_config(50, base=50).num_digits) == (3, 1)
    model = MDMPrimeForDiffusionLM(prime_config(100, base=3))
    assert model.model.embed_nodes.weight.shape == (20, 32)
    assert model.head.proj.out_features == 15
    assert MDMPrimeForDiffusionLM(prime_config(100, base=3, head_type="joint")).head.proj.out_features == 100


# ---- scores ----


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize(("vocab_size", "base"), [(1, 2), (5, 2), (50, 2), (50, 3), (100, 10)])
def test_masked_digits_have_probabilities_and_impossible_values_none(vocab_size, base, head_type):
    model = prime_model(vocab_size, base=base, head_type=head_type)
    x = torch.randint(0, vocab_size, (4, 9), generator=seeded())
    z_t = model.noise(x, x, torch.full((4,), 0.6, dtype=torch.float64), torch.rand(4, 9 * model.config.num_digits))
    log_probs = model(input_ids=z_t).log_probs
    masked = z_t == model.code.mask_digit
    assert log_probs.shape == (*z_t.shape, base)
    assert (log_probs[~masked] == float("-inf")).all()
    assert torch.equal(log_probs[masked] > float("-inf"), model.code.possible(z_t)[masked])
    torch.testing.assert_close(log_probs[masked].exp().sum(-1), torch.ones(int(masked.sum())))


@pytest.mark.parametrize("head_type", HEADS)
def test_a_digit_that_the_others_decide_costs_nothing(head_type):
    """With V = 5 the only code that begins with 1 is 100."""
    model = prime_model(5, head_type=head_type)
    x = model.code.token_of_code[4].expand(1, 1)
    z_t = torch.tensor([[[1, 2, 2]]])
    loss = model(input_ids=z_t, labels=x, timesteps=torch.tensor([0.5])).loss
    assert loss.item() == 0
    assert torch.equal(model(input_ids=z_t).log_probs[0, 0, 1], torch.tensor([0.0, float("-inf")]))


@pytest.mark.parametrize("base", [2, 3])
def test_the_joint_head_scores_the_marginals_of_its_distribution_over_tokens(base):
    model = prime_model(7, base=base, head_type="joint")
    x = torch.randint(0, 7, (3, 5), generator=seeded())
    u = torch.rand(3, 5 * model.config.num_digits, generator=seeded(1))
    z_t = model.noise(x, x, torch.full((3,), 0.6, dtype=torch.float64), u)
    log_probs = model(input_ids=z_t).log_probs
    by_code = model.head.proj(model.model(z_t).last_hidden_state).softmax(-1)
    digits_VN = model.code.digits(model.code.token_of_code)
    agrees = ((z_t[:, :, None] == digits_VN) | (z_t[:, :, None] == base)).all(-1)
    p = by_code * agrees / (by_code * agrees).sum(-1, keepdim=True)
    expected = torch.einsum("blv,vnk->blnk", p, nn.functional.one_hot(digits_VN, base).float())
    masked = z_t == base
    torch.testing.assert_close(log_probs.exp()[masked], expected[masked], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head_type", HEADS)
def test_the_loss_is_the_rate_times_the_surprise_at_masked_digits(head_type):
    """Recomputed digit by digit from a plain forward; context is left out; training clips and evaluation does not."""
    model = prime_model(50, base=3, head_type=head_type)
    x, t = torch.randint(0, 50, (3, 7), generator=seeded()), torch.tensor([0.1, 0.5, 0.9])
    labels = x.clone()
    labels[2, :3] = IGNORE
    z_t = model.noise(x, labels, t.double(), torch.rand(3, 28, generator=seeded(1)))
    assert torch.equal(z_t[2, :3], model.code.digits(x[2, :3]))
    log_probs, digits = model(input_ids=z_t).log_probs, model.code.digits(x)
    for train, rate in ((False, 1 / t), (True, (1 / t).clamp(max=2.0))):
        output = model.train(train)(input_ids=z_t, timesteps=t, labels=labels)
        expected = torch.zeros(4)
        for b, i, n in torch.nonzero((z_t == 3) & (labels != IGNORE)[..., None]).tolist():
            expected[n] -= float(rate[b] * log_probs[b, i, n, digits[b, i, n]].detach()) / 18
        torch.testing.assert_close(output.level_losses, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, output.level_losses.sum())


def test_one_digit_a_token_is_masked_diffusion_over_tokens():
    model = prime_model(20, base=20, loss_weight_clip=None)
    x, t = torch.randint(0, 20, (4, 9), generator=seeded()), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    masked = torch.rand(4, 9, generator=seeded(1)) < t[:, None]
    z_t = model.code.digits(x).masked_fill(masked[..., None], 20)
    logits = model.head.proj(model.model(z_t).last_hidden_state)
    target = model.code.code_of_token[x]
    cross_entropy = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    expected = (cross_entropy * masked / t[:, None]).sum() / x.numel()
    torch.testing.assert_close(model(input_ids=z_t, timesteps=t, labels=x).loss, expected.float())


@pytest.mark.parametrize("head_type", HEADS)
def test_gradients_are_finite_and_reach_every_parameter(head_type):
    model = prime_model(50, base=3, head_type=head_type, time_conditioning=True).train()
    x = torch.randint(0, 50, (8, 16), generator=seeded())
    model(input_ids=x, labels=x, generator=seeded()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# ---- the bound (its enumeration is in test_bounds.py) ----


@pytest.mark.parametrize("head_type", HEADS)
def test_monte_carlo_nelbo_is_within_three_sigma_of_the_entropy(head_type):
    source = Source(VocabTree.flat(6))
    model = bayes_prime_model(source, head_type=head_type, schedule="cosine")
    x = source.sample(4000, seeded())
    output = model.nelbo(x, num_samples=20, generator=seeded(1))
    # Control variate: the code length of the sampled outcomes themselves, whose mean is the entropy.
    difference = output.nelbo + source.p.log()[x[:, 0] * 6 + x[:, 1]]
    sigma = float(difference.std() / len(x) ** 0.5)
    assert abs(float(difference.mean())) < 3 * sigma
    assert sigma < 0.02
    assert output.level_nelbo.shape == (4000, 3) and (output.num_tokens == 2).all()


def test_context_is_conditioned_on_and_not_scored():
    source = Source(VocabTree.flat(6))
    model = bayes_prime_model(source)
    x = source.sample(4000, seeded())
    labels = x.clone()
    labels[:, 0] = IGNORE
    output = model.nelbo(x, labels=labels, num_samples=10, generator=seeded(1))
    conditional = source.p.view(6, 6) / source.p.view(6, 6).sum(1, keepdim=True)
    difference = output.nelbo + conditional.log()[x[:, 0], x[:, 1]]
    assert (output.num_tokens == 1).all()
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / len(x) ** 0.5
    nothing = model(input_ids=x, labels=torch.full_like(x, IGNORE), generator=seeded())
    assert nothing.loss.item() == 0


def test_training_without_a_clip_estimates_the_same_bound():
    source = Source(VocabTree.flat(6))
    model = bayes_prime_model(source, loss_weight_clip=None).train()
    generator = seeded()
    losses = torch.stack(
        [
            model(input_ids=x, labels=x, generator=generator).loss * NUM_POSITIONS
            for x in (source.sample(1000, generator) for _ in range(100))
        ]
    )
    assert float(losses.mean()) == pytest.approx(source.entropy, abs=4 * float(losses.std()) / 100**0.5)


# ---- generation ----


@pytest.mark.parametrize("head_type", HEADS)
def test_samples_of_the_bayes_denoiser_have_the_law_of_the_source(head_type):
    source = Source(VocabTree.flat(6))
    model = bayes_prime_model(source, head_type=head_type)
    options = {"max_new_tokens": 2, "num_return_sequences": 20_000, "generator": seeded()}
    assert chi_square_p(source, model.generate(num_denoising_steps=400, **options)) > 0.01
    assert chi_square_p(source, model.generate(num_denoising_steps=1, **options)) < 1e-6


def test_the_joint_head_draws_the_digits_of_a_token_together():
    """In one step a single token has its exact law, because its digits are drawn by the chain rule."""
    source = Source(VocabTree.flat(6))
    prompt = torch.full((20_000, 1), 3)
    conditional = source.p.view(6, 6)[3] / source.p.view(6, 6)[3].sum()
    p_values = {}
    for head_type in HEADS:
        model = bayes_prime_model(source, head_type=head_type)
        draws = model.generate(prompt, max_new_tokens=1, num_denoising_steps=1, generator=seeded())
        assert (draws[:, 0] == 3).all()
        observed, expected = torch.bincount(draws[:, 1], minlength=6), conditional * len(draws)
        p_values[head_type] = float(torch.special.gammaincc(torch.tensor(2.5), _chi_square(observed, expected) / 2))
    assert p_values["joint"] > 0.01 > p_values["digit"]


def _chi_square(observed: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return ((observed - expected).square() / expected).sum()


@pytest.mark.parametrize("head_type", HEADS)
@pytest.mark.parametrize(("vocab_size", "base"), [(50, 2), (50, 3), (5, 2)])
def test_every_canvas_of_few_steps_can_become_tokens(vocab_size, base, head_type):
    """More than 100,000 tokens a head, of vocabularies that leave many codes unused."""
    model = prime_model(vocab_size, base=base, head_type=head_type)
    output = model.generate(
        max_new_tokens=10,
        num_return_sequences=3500,
        num_denoising_steps=2,
        generator=seeded(),
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    assert output.num_forwards == 2
    trajectory = torch.stack(output.trajectory)
    assert trajectory.shape == (3, 3500, 10, model.config.num_digits)
    assert (trajectory[0] == base).all()
    assert model.code.possible(trajectory).any(-1).all()
    kept = trajectory[1] != base
    assert torch.equal(trajectory[2][kept], trajectory[1][kept])
    assert torch.equal(model.code.digits(output.sequences), trajectory[2])


def test_digits_drawn_in_ignorance_of_each_other_would_spell_no_token(monkeypatch):
    """The test above can fail: without the mask of the possible the same model leaves the vocabulary."""
    model = prime_model(50)
    monkeypatch.setattr(model.code, "possible", lambda z: torch.ones(*z.shape, 2, dtype=torch.bool))
    with pytest.raises(IndexError, match="out of bounds"):
        model.generate(max_new_tokens=10, num_return_sequences=200, num_denoising_steps=2, generator=seeded())


def test_prompts_are_kept_and_the_seed_decides():
    model = prime_model(50, time_conditioning=True)
    prompts, mask = torch.tensor([[0, 7, 8], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    draws = [
        model.generate(prompts, attention_mask=mask, num_return_sequences=2, generator=seeded(s)) for s in (0, 0, 1)
    ]
    assert draws[0].shape == (4, 16)
    assert torch.equal(draws[0][:, :3], prompts.repeat_interleave(2, dim=0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_greedy_top_k_and_temperature_act_on_digits():
    model = prime_model(50, base=5)
    options = {"max_new_tokens": 12, "num_denoising_steps": 1}
    greedy = model.generate(do_sample=False, generator=seeded(0), **options)
    for sharp in ({"top_k": 1}, {"temperature": 1e-5}, {"top_p": 1e-6}):
        assert torch.equal(model.generate(generator=seeded(1), **options, **sharp), greedy)
    assert not torch.equal(model.generate(generator=seeded(1), **options), greedy)


def test_constraints_on_tokens_are_refused():
    with pytest.raises(ValueError, match="need a head that scores children one by one, not head_type='digit'"):
        prime_model(50).generate(max_new_tokens=4, suppress_tokens=[1])


def test_a_streamer_sees_every_canvas():
    recorder, model = Recorder(), prime_model(50)
    output = model.generate(max_new_tokens=4, num_denoising_steps=6, streamer=recorder, generator=seeded())
    assert len(recorder.canvases) == 6 and recorder.ended
    assert torch.equal(recorder.canvases[-1], output) and torch.equal(torch.cat(recorder.confirmed, 1), output)
    assert recorder.canvases[0].shape == (1, 4) and int(recorder.canvases[0].max()) == 50  # digits are missing


# ---- training ----


def train(tmp_path, head_type="digit", steps=3, **options):
    args = TDLMTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **{"learning_rate": 1e-3, **options},
    )
    trainer = TDLMTrainer(
        model=prime_model(50, head_type=head_type),
        args=args,
        train_dataset=Sequences(32, context=5),
        data_collator=TDLMDataCollator(0),
    )
    trainer.train()
    return trainer


def losses(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("head_type", HEADS)
def test_the_trainer_trains_logs_and_evaluates(tmp_path, head_type):
    trainer = train(tmp_path, head_type, steps=30, per_device_train_batch_size=16, learning_rate=1e-2)
    assert np.mean(losses(trainer)[-5:]) < np.mean(losses(trainer)[:5])
    digits = zip(*(losses(trainer, f"loss_level_{n}") for n in range(6)), strict=True)
    assert [sum(step) for step in digits] == pytest.approx(losses(trainer), rel=1e-5)
    metrics = trainer.evaluate(Sequences(10))
    assert metrics["eval_ppl"] == pytest.approx(math.exp(metrics["eval_nelbo"])) and metrics["eval_num_tokens"] == 120
    assert sum(metrics[f"eval_nelbo_level_{n}"] for n in range(6)) == pytest.approx(metrics["eval_nelbo"])


def test_accumulation_1x8_and_4x2_give_the_same_loss_and_update(tmp_path):
    whole = train(tmp_path, per_device_train_batch_size=8)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to merge, some words to keep"] * 3, 270, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = prime_model(len(tokenizer), base=3, head_type="joint", shuffle_seed=7)
    model.code.bind(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_loads_byte_for_byte_with_and_without_the_package(checkpoint, tmp_path):
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_mdm_prime.MDMPrimeConfig",
        "AutoModel": "modeling_mdm_prime.MDMPrimeModel",
        "AutoModelForCausalLM": "modeling_mdm_prime.MDMPrimeForDiffusionLM",
    }
    here, there = tmp_path / "installed", tmp_path / "stranger"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, MDMPrimeForDiffusionLM)
    assert isinstance(AutoModel.from_pretrained(checkpoint), MDMPrimeModel)
    model.save_pretrained(here)
    printed = in_a_stranger(
        "import torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "config, backbone, model = (\n"
        "    auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM)\n"
        ")\n"
        "z = model.code.digits(torch.arange(16)[None])\n"
        "z[:, ::2, 1:] = config.base\n"
        "assert torch.equal(backbone(z).last_hidden_state, model.model(z).last_hidden_state)\n"
        "assert model.generate(max_new_tokens=3).shape == (1, 3)\n"
        "torch.save((z, model(input_ids=z).log_probs), sys.argv[3])\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print(type(config).__name__, type(backbone).__name__, type(model).__name__)\n",
        *(str(checkpoint), str(there), str(tmp_path / "log_probs.pt")),
    )
    assert printed.split() == ["MDMPrimeConfig", "MDMPrimeModel", "MDMPrimeForDiffusionLM"]
    z, log_probs = torch.load(tmp_path / "log_probs.pt", weights_only=True)
    torch.testing.assert_close(model(input_ids=z).log_probs, log_probs)
    for folder in (here, there):
        for name in [*CODE_FILES, "model.safetensors", "config.json", "generation_config.json"]:
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes(), f"{folder.name}: {name}"


def edited(checkpoint, tmp_path, change):
    """The checkpoint in another folder, its tensors changed."""
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def _swap_two(tensors):
    tensors["code.token_of_code"][[0, 1]] = tensors["code.token_of_code"][[1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors["code.code_of_token"].__setitem__(3, 10**9), "code_of_token must hold each of 0..269"),
        (lambda tensors: tensors["code.token_of_code"].__setitem__(3, -1), "token_of_code must hold each of 0..269"),
        (lambda tensors: tensors["code.code_of_token"].zero_(), "code_of_token must hold each of 0..269 once"),
        (_swap_two, r"token \d+ has code \d+, which token_of_code gives to token \d+"),
        (
            lambda tensors: tensors.pop("code.code_of_token"),
            r"no complete vocabulary code: \['code.code_of_token'\] missing",
        ),
    ],
)
def test_a_checkpoint_with_a_wrong_code_is_refused(checkpoint, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(checkpoint, tmp_path, change))


def test_codes_stay_integers_in_half_precision_and_on_the_meta_device(checkpoint):
    model, half = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.model.embed_nodes.weight.dtype == torch.bfloat16
    assert torch.equal(half.code.code_of_token, model.code.code_of_token)
    x = half.generate(max_new_tokens=8, generator=seeded())
    assert half(input_ids=half.code.digits(x)).log_probs.dtype == torch.float32
    assert half(input_ids=x, labels=x, generator=seeded()).loss.isfinite()
    with torch.device("meta"):
        assert MDMPrimeForDiffusionLM(model.config).code.code_of_token.is_meta


def test_a_checkpoint_beside_another_tokenizer_is_refused(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    train_tokenizer(["entirely different text to merge here"] * 3, 270, progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_belongs_to_one_tokenizer(checkpoint, tokenizer):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    model.check_tokenizer(tokenizer)
    prime_model(len(tokenizer)).check_tokenizer(tokenizer)  # bound to none yet
    with pytest.raises(ValueError, match=f"token ids up to {len(tokenizer) - 1}, the model codes for vocab_size=50"):
        prime_model(50).check_tokenizer(tokenizer)


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": 1}, "base=1 must be at least 2 and at most vocab_size=50"),
        ({"base": 51}, "base=51 must be at least 2 and at most vocab_size=50"),
        ({"head_type": "tied"}, r"head_type='tied' is not one of \['digit', 'joint'\]"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1 must be at least 0"),
        ({"tie_word_embeddings": True}, "the heads over digits share no embeddings"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    ],
)
def test_impossible_configurations_are_named(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        prime_config(50, **fields)


def test_bad_arguments_are_named():
    model = prime_model(50)
    with pytest.raises(ValueError, match="preset='huge' is not one of"):
        MDMPrimeConfig.for_vocab(50, "huge")
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 4\); the model sees digits, .*num_digits=6"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model()
    with pytest.raises(NotImplementedError, match="its vocabulary cannot be resized"):
        model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="only the sequential law goes level by level"):
        model.generate(max_new_tokens=2, steps_per_level=[2, 2])
