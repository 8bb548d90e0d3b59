"""The sampler: its law, its prompts, its parameters."""

import pytest
import torch
from scipy import stats
from tiny import SIX_LEAVES, Recorder, Source, bayes_sampler, chi_square_p, tiny_model
from transformers import GenerationConfig

from tdlm import TDLMGenerationConfig, VocabTree


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAWS = {
    "sequential-linear": {"law": "sequential", "schedule": "linear"},
    "sequential-cosine": {"law": "sequential", "schedule": "cosine"},
    "concurrent-linear": {"law": "concurrent", "schedule": "linear"},
    "concurrent-cosine": {"law": "concurrent", "schedule": "cosine"},
    "direct-linear": {"law": "direct", "schedule": "linear"},
    "direct-cosine": {"law": "direct", "schedule": "cosine"},
    "joint-independent": {"head_type": "joint", "neighborhood_jumps": "independent"},
}
# Steps enough that two positions all but never jump in one step: the reverse process of one position a step, exact.
STEPS = {"sequential": 3 * 300, "concurrent": 500, "direct": 500}


@pytest.mark.parametrize(
    "fields", [pytest.param(LAWS[name], id=name, marks=[pytest.mark.slow] * ("cosine" in name)) for name in LAWS]
)
def test_samples_of_the_bayes_denoiser_have_the_law_of_the_source(fields):
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    model = bayes_sampler(source, **fields)
    steps = STEPS[model.config.law]
    draws = model.generate(
        max_new_tokens=2, num_return_sequences=100_000, num_denoising_steps=steps, generator=seeded()
    )
    assert chi_square_p(source, draws) > 0.01


@pytest.mark.parametrize("name", ["sequential-linear", "concurrent-linear", "direct-linear"])
def test_few_steps_do_not_have_the_law_of_the_source(name):
    """The same statistic sees the independence error of very few steps: the test above can fail."""
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    draws = bayes_sampler(source, **LAWS[name]).generate(
        max_new_tokens=2, num_return_sequences=100_000, num_denoising_steps=3, generator=seeded()
    )
    assert chi_square_p(source, draws) < 1e-6


def test_a_joint_draw_has_no_independence_error():
    """A neighborhood that jumps as one has the law of the source in as few steps as there are levels."""
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    draws = bayes_sampler(source, head_type="joint", neighborhood_jumps="synchronous").generate(
        max_new_tokens=2, num_return_sequences=100_000, num_denoising_steps=3, generator=seeded()
    )
    assert chi_square_p(source, draws) > 0.01


def test_a_prompt_conditions_the_rest():
    """Given the first token, the second has the source's conditional distribution."""
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    prompt = torch.full((20_000, 1), 3)
    draws = bayes_sampler(source).generate(prompt, max_new_tokens=1, num_denoising_steps=3, generator=seeded())
    assert (draws[:, 0] == 3).all()
    conditional = source.p.view(6, 6)[3] / source.p.view(6, 6)[3].sum()
    observed = torch.bincount(draws[:, 1], minlength=6)
    assert stats.chisquare(observed.numpy(), (conditional * len(draws)).numpy()).pvalue > 0.01


def test_only_tokens_are_left_and_the_seed_decides():
    model = tiny_model(VocabTree.random(50, 4, seed=0))
    draws = [model.generate(max_new_tokens=9, num_return_sequences=6, generator=seeded(s)) for s in (0, 0, 1)]
    assert draws[0].shape == (6, 9) and int(draws[0].max()) < 50 and int(draws[0].min()) >= 0
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_concurrent_sampling_never_leaves_a_position_above_a_leaf(eight_leaf_tree, schedule, steps):
    model = tiny_model(eight_leaf_tree, law="concurrent", schedule=schedule)
    output = model.generate(
        max_new_tokens=14,
        num_return_sequences=50,
        num_denoising_steps=steps,
        generator=seeded(),
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    heights = eight_leaf_tree.node_height(torch.stack(output.trajectory))
    assert int(output.sequences.max()) < 8 and int(heights[0].min()) == 3 and (heights.diff(dim=0) <= 0).all()
    # One height a forward: a step in which somebody jumps twice has a second pass, three times a third.
    most_jumps = (-heights.diff(dim=0)).flatten(1).amax(1)
    assert output.num_forwards == int(most_jumps.clamp(min=1).sum()) <= 3 * steps


def test_a_direct_jump_ends_at_a_token(eight_leaf_tree):
    model = tiny_model(eight_leaf_tree, law="direct")
    output = model.generate(
        max_new_tokens=12,
        num_denoising_steps=6,
        generator=seeded(),
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    assert set(eight_leaf_tree.node_height(torch.stack(output.trajectory)).unique().tolist()) == {0, 3}
    assert output.num_forwards == 6


@pytest.mark.parametrize("jumps", ["synchronous", "independent"])
def test_neighborhoods_may_straddle_a_prompt_and_the_end(eight_leaf_tree, jumps):
    model = tiny_model(eight_leaf_tree, head_type="joint", neighborhood_size=3, neighborhood_jumps=jumps)
    prompt = torch.tensor([[7, 1, 4, 2]])
    draws = model.generate(prompt, max_new_tokens=7, num_denoising_steps=9, num_return_sequences=20, generator=seeded())
    assert draws.shape == (20, 11) and (draws[:, :4] == prompt).all() and int(draws.max()) < 8
    assert torch.isfinite(model.nelbo(draws, labels=draws.masked_fill(torch.arange(11) < 4, -100)).nelbo).all()


@pytest.mark.parametrize("head_type", ["shared", "tied", "node", "vocab", "joint"])
@pytest.mark.parametrize("steps", [{"steps_per_level": [1, 5, 2]}, {"num_denoising_steps": 7}, {}])
def test_every_position_becomes_a_token_whatever_the_steps(eight_leaf_tree, head_type, steps):
    model = tiny_model(eight_leaf_tree, head_type=head_type, time_conditioning=True)
    output = model.generate(
        max_new_tokens=8, generator=seeded(), return_dict_in_generate=True, output_trajectory=True, **steps
    )
    heights = eight_leaf_tree.node_height(torch.stack(output.trajectory))
    assert output.num_forwards == {"steps_per_level": 8, "num_denoising_steps": 7}.get(next(iter(steps), ""), 8)
    assert len(output.trajectory) == output.num_forwards + 1 == len(output.timesteps)
    assert output.trajectory[0].shape == (1, 8)
    assert heights[0].min() == 3 and heights[-1].max() == 0
    assert (heights.diff(dim=0) <= 0).all()
    assert torch.equal(output.trajectory[-1], output.sequences)


def test_left_and_right_padding_give_the_same_continuation():
    model = tiny_model(VocabTree.random(50, 4, seed=0))
    prompt, options = torch.tensor([[7, 8, 9]]), {"max_new_tokens": 5, "do_sample": False, "num_denoising_steps": 6}
    # do_sample=False picks the best child; which positions jump still follows the generator.
    plain = model.generate(prompt, generator=seeded(), **options)
    left = torch.tensor([[0, 0, 7, 8, 9]])
    padded = _generate_padded(model, left, torch.tensor([[0, 0, 1, 1, 1]]), options)
    assert _jumps_at_once(model, prompt, options).tolist() == padded[:, 5:].tolist()
    right = _generate_padded(model, torch.tensor([[7, 8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]), options)
    assert right[:, 5:].tolist() == padded[:, 5:].tolist()
    assert plain.shape == (1, 8)


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_prompts_padded_on_either_side_go_on_as_alone(side):
    model = tiny_model(VocabTree.random(50, 4, seed=0))
    prompts, options = [[7, 8, 9], [3], [11, 12, 13, 14, 15]], {"max_new_tokens": 4, "do_sample": False}
    alone = [_jumps_at_once(model, torch.tensor([prompt]), options)[0].tolist() for prompt in prompts]
    width = max(map(len, prompts))
    pads = [[0] * (width - len(prompt)) for prompt in prompts]
    both = [pad + row if side == "left" else row + pad for pad, row in zip(pads, prompts, strict=True)]
    ones = [[1] * len(prompt) for prompt in prompts]
    mask = [pad + row if side == "left" else row + pad for pad, row in zip(pads, ones, strict=True)]
    together = _generate_padded(model, torch.tensor(both), torch.tensor(mask), options)
    assert together[:, :width].tolist() == both and together[:, width:].tolist() == alone


def _generate_padded(model, prompt, mask, options):
    return model.generate(prompt, attention_mask=mask, **{**options, "num_denoising_steps": 3})


def _jumps_at_once(model, prompt, options):
    """One step a level: all positions jump together, so that no random number decides anything."""
    return model.generate(prompt, **{**options, "num_denoising_steps": 3})[:, prompt.shape[1] :]


def test_prompts_and_padding_are_never_changed():
    model = tiny_model(VocabTree.random(50, 4, seed=0))
    prompts = torch.tensor([[0, 7, 8], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    output = model.generate(prompts, attention_mask=mask, num_return_sequences=2, generator=seeded())
    assert output.shape == (4, 16)
    assert torch.equal(output[:, :3], prompts.repeat_interleave(2, dim=0))


def test_top_k_1_is_greedy_and_temperature_sharpens():
    model = tiny_model(VocabTree.random(50, 8, seed=0), head_type="tied")
    options = {"max_new_tokens": 12, "num_denoising_steps": 2}
    greedy = model.generate(do_sample=False, generator=seeded(0), **options)
    for sharp in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}):
        assert torch.equal(model.generate(generator=seeded(1), **options, **sharp), greedy)
    assert not torch.equal(model.generate(generator=seeded(1), **options), greedy)


def test_a_streamer_sees_the_prompt_every_canvas_what_is_new_and_the_end(eight_leaf_tree):
    recorder, model = Recorder(), tiny_model(eight_leaf_tree)
    prompt = torch.tensor([[7, 1]])
    output = model.generate(prompt, max_new_tokens=4, num_denoising_steps=6, streamer=recorder, generator=seeded())
    assert len(recorder.canvases) == 6 and recorder.ended
    assert torch.equal(recorder.canvases[-1], output)
    assert torch.equal(torch.cat(recorder.confirmed, dim=1), output) and len(recorder.confirmed) == 2


def test_the_generation_config_is_saved_and_found_again(eight_leaf_tree, tmp_path):
    model = tiny_model(eight_leaf_tree)
    model.generation_config.num_denoising_steps = 12
    model.generation_config.temperature = 0.7
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, TDLMGenerationConfig)
    assert loaded.generation_config.num_denoising_steps == 12 and loaded.generation_config.temperature == 0.7
    output = loaded.generate(max_new_tokens=3, return_dict_in_generate=True)
    assert output.num_forwards == 12
    # Named steps win over the saved number, and a plain GenerationConfig is accepted.
    assert loaded.generate(max_new_tokens=3, steps_per_level=[1, 1, 2], return_dict_in_generate=True).num_forwards == 4
    assert loaded.generate(generation_config=GenerationConfig(max_new_tokens=3)).shape == (1, 3)


# ---- where a sequence ends ----


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids):
        return "".join("abcdefgh"[i] for i in ids)


def forced(model, tokens, **arguments):
    """Generates exactly `tokens`."""
    return model.generate(
        max_new_tokens=len(tokens), allowed_tokens=[[token] for token in tokens], generator=seeded(), **arguments
    )


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([1, 2, 0, 3, 4], [1, 2, 0]),
        ([0, 1, 2, 0, 3], [0, 1, 2, 0]),  # with no text before it, an end of text opens the sequence
        ([0, 0, 1, 0, 3], [0, 0, 1, 0]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_an_end_of_text_ends_the_sequence(eight_leaf_tree, tokens, kept):
    model = tiny_model(eight_leaf_tree)
    assert forced(model, tokens, eos_token_id=0, pad_token_id=7).tolist() == [kept]
    assert forced(model, tokens, eos_token_id=None).tolist() == [tokens]


def test_after_a_prompt_the_first_end_of_text_counts(eight_leaf_tree):
    model = tiny_model(eight_leaf_tree)
    assert forced(model, [0, 1, 2], input_ids=torch.tensor([[3]]), eos_token_id=[6, 0]).tolist() == [[3, 0]]
    padded = {"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[0, 1]])}
    assert forced(model, [0, 1, 0, 2], eos_token_id=0, **padded).tolist() == [[5, 0, 0, 1, 0]]


def test_a_batch_is_as_long_as_its_longest_and_padded(eight_leaf_tree):
    model = tiny_model(eight_leaf_tree)
    draws = model.generate(
        max_new_tokens=12, num_return_sequences=50, eos_token_id=0, pad_token_id=7, generator=seeded()
    )
    free = model.generate(max_new_tokens=12, num_return_sequences=50, generator=seeded())
    for row, whole in zip(draws.tolist(), free.tolist(), strict=True):
        text = next((i for i, token in enumerate(whole) if token != 0), 12)
        end = whole.index(0, text) + 1 if 0 in whole[text:] else 12
        assert row == (whole[:end] + [7] * 12)[: draws.shape[1]] and draws.shape[1] >= end


def test_stop_strings_end_a_sequence_behind_the_token_that_completes_them(eight_leaf_tree):
    model, options = tiny_model(eight_leaf_tree), {"tokenizer": Letters(), "pad_token_id": 7}
    assert forced(model, [1, 2, 3, 4, 5], stop_strings=["cd"], **options).tolist() == [[1, 2, 3]]
    assert forced(model, [1, 2, 3, 4, 5], stop_strings=["zz", "f", "e"], **options).tolist() == [[1, 2, 3, 4]]
    assert forced(model, [1, 2, 3, 4, 5], stop_strings="ga", **options).tolist() == [[1, 2, 3, 4, 5]]
    assert forced(model, [3, 2], input_ids=torch.tensor([[2]]), stop_strings="cd", **options).tolist() == [[2, 3, 2]]


# ---- blocks ----


def test_text_longer_than_the_context_comes_in_blocks_that_see_the_text_before_them():
    model = tiny_model(VocabTree.random(50, 4, seed=0))
    output = model.generate(
        torch.tensor([[7, 8]]),
        max_new_tokens=40,
        generator=seeded(),
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    assert output.sequences.shape == (1, 42) and int(output.sequences.max()) < 50
    assert output.sequences[0, :2].tolist() == [7, 8]
    # Context 16: blocks of 8, one step a token. A block is finished before the next one begins.
    assert output.num_forwards == 40 and len(output.trajectory) == 41 == len(output.timesteps)
    order = output.order[0]
    assert (order[:2] == 0).all()
    for block in range(5):
        steps = order[2 + 8 * block : 10 + 8 * block]
        assert int(steps.min()) > 8 * block and int(steps.max()) <= 8 * (block + 1)


def test_a_block_sees_as_much_of_the_text_before_it_as_fits_in_the_context():
    model, seen = tiny_model(VocabTree.random(50, 4, seed=0)), []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    prompts = torch.randint(0, 50, (3, 20), generator=seeded())
    output = model.generate(prompts, max_new_tokens=12, block_length=8, num_denoising_steps=3, generator=seeded())
    roots = torch.full((3, 8), model.tree.root_id)
    assert torch.equal(seen[0], torch.cat([prompts[:, 12:], roots], dim=1))  # the context is 16
    assert torch.equal(seen[3], torch.cat([output[:, 16:28], roots[:, :4]], dim=1))


def test_a_streamer_sees_what_is_returned_block_after_block(eight_leaf_tree):
    recorder, model = Recorder(), tiny_model(eight_leaf_tree)
    tokens = [1, 2, 3, 4, 5, 0, 6, 7]
    output = forced(
        model, tokens, input_ids=torch.tensor([[3]]), eos_token_id=0, block_length=3, streamer=recorder, pad_token_id=7
    )
    assert output.tolist() == [[3, 1, 2, 3, 4, 5, 0]]
    assert [part.tolist() for part in recorder.confirmed] == [[[3]], [[1, 2, 3]], [[4, 5, 0]]]
    filled = Recorder()
    ids = torch.tensor([[1, 2, 3]])
    output = model.generate(ids, infill_mask=ids == 2, max_new_tokens=4, block_length=2, streamer=filled)
    assert torch.equal(torch.cat(filled.confirmed, dim=1), output) and filled.confirmed[0].shape == (1, 0)


@pytest.mark.parametrize("end", [3, 4, 5])
def test_an_end_at_the_edge_of_a_block_needs_no_other_block(eight_leaf_tree, end):
    tokens = [1] * (end - 1) + [0] + [2] * (12 - end)
    options = {"block_length": 4, "eos_token_id": 0, "return_dict_in_generate": True}
    output = forced(tiny_model(eight_leaf_tree), tokens, **options)
    assert output.sequences.tolist() == [tokens[:end]] and output.num_forwards == (4 if end <= 4 else 8)


def test_the_later_of_two_ways_to_say_one_thing_counts(eight_leaf_tree):
    model, new = tiny_model(eight_leaf_tree), TDLMGenerationConfig(max_new_tokens=3, steps_per_level=[1, 1, 1])
    assert model.generate(generation_config=new).shape == (1, 3)
    assert model.generate(generation_config=new, max_length=10).shape == (1, 10)
    output = model.generate(generation_config=new, num_denoising_steps=8, return_dict_in_generate=True)
    assert output.num_forwards == 8
    allowed = torch.tensor([1, 2])
    assert set(model.generate(max_new_tokens=9, allowed_tokens=allowed)[0].tolist()) <= {1, 2}


def test_generation_stops_when_every_sequence_has_ended(eight_leaf_tree):
    output = tiny_model(eight_leaf_tree).generate(
        torch.tensor([[1], [2]]),
        max_new_tokens=12,
        block_length=4,
        allowed_tokens=[[0]] * 12,
        eos_token_id=0,
        generator=seeded(),
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == [[1, 0], [2, 0]] and output.num_forwards == 4
    assert output.order.shape == (2, 2)


# ---- infilling ----


@pytest.mark.parametrize(
    "fields", [{}, {"law": "concurrent"}, {"law": "direct"}, {"head_type": "joint", "neighborhood_size": 2}]
)
def test_infilling_never_changes_a_given_token(fields):
    """10,000 random texts and blanks over the four kinds of model."""
    model = tiny_model(VocabTree.random(50, 4, seed=0), **fields)
    generator = seeded()
    for _ in range(5):
        ids = torch.randint(0, 50, (500, 12), generator=generator)
        holes = torch.rand(500, 12, generator=generator) < torch.rand(500, 1, generator=generator)
        filled = model.generate(ids, infill_mask=holes, num_denoising_steps=4, generator=generator)
        assert filled.shape == ids.shape and torch.equal(filled[~holes], ids[~holes])
        assert int(filled.min()) >= 0 and int(filled.max()) < 50
        assert (filled != ids)[holes].float().mean() > 0.9


def test_blanks_see_both_sides():
    """Given the other token of a pair, a blank has the source's conditional distribution."""
    source = Source(VocabTree.from_nested(SIX_LEAVES))
    ids = torch.tensor([[5, 3]]).repeat(20_000, 1)
    draws = bayes_sampler(source).generate(
        ids, infill_mask=torch.tensor([[1, 0]]).repeat(20_000, 1), num_denoising_steps=3, generator=seeded()
    )
    assert (draws[:, 1] == 3).all()
    conditional = source.p.view(6, 6)[:, 3] / source.p.view(6, 6)[:, 3].sum()
    observed = torch.bincount(draws[:, 0], minlength=6)
    assert stats.chisquare(observed.numpy(), (conditional * len(draws)).numpy()).pvalue > 0.01


def test_blanks_and_a_continuation_at_once(eight_leaf_tree):
    output = tiny_model(eight_leaf_tree).generate(
        torch.tensor([[1, 2, 3]]),
        infill_mask=torch.tensor([[0, 1, 0]]),
        max_new_tokens=2,
        generator=seeded(),
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (1, 5) and output.sequences[0, [0, 2]].tolist() == [1, 3]
    assert (output.order > 0).tolist() == [[False, True, False, True, True]]


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported by diffusion generation"),
        ({"use_cache": True}, "use_cache=True is not supported"),
        ({"no_repeat_ngram_size": 1}, "no_repeat_ngram_size=1 is not supported"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id=0 is not supported"),
        ({"top_k": -3}, "top_k=-3 must be at least 0"),
        ({"input_ids": torch.tensor([[1, 2]]), "max_length": 2}, "no room for a new one in max_length=2"),
        (
            {
                "input_ids": torch.ones(1, 12, dtype=torch.int64),
                "attention_mask": torch.tensor([[1] * 6 + [0] * 6]),
                "max_new_tokens": 8,
            },
            "12 tokens with padding on the right and 8 new ones are more than the context of 16",
        ),
        ({"repetition_penalty": 2.0}, "repetition_penalty=2.0 is not supported"),
        ({"bad_words_ids": [[1]]}, "bad_words_ids=.* is not supported"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"block_length": 17}, "block_length=17 is more than the context of 16"),
        ({"stop_strings": ["a"]}, "need the tokenizer"),
        ({"stop_strings": ["a"], "tokenizer": object()}, "neither pad_token_id nor eos_token_id"),
        ({"suppress_tokens": [8]}, r"suppress_tokens holds 8, outside the vocabulary, 0..7"),
        ({"allowed_tokens": [-1]}, r"allowed_tokens holds -1, outside the vocabulary, 0..7"),
        ({"allowed_tokens": [[1]], "max_new_tokens": 2}, "sets for 1 positions, and there are 2 new ones"),
        ({"allowed_tokens": [1], "suppress_tokens": [1]}, "leave no token for some position"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "infill_mask": torch.ones(1, 3)},
            r"infill_mask has shape \(1, 3\), input_ids \(1, 2\)",
        ),
        (
            {
                "input_ids": torch.tensor([[1, 2]]),
                "attention_mask": torch.tensor([[0, 1]]),
                "infill_mask": torch.tensor([[1, 0]]),
            },
            "asks for tokens where attention_mask says padding",
        ),
        (
            {"input_ids": torch.zeros(1, 16, dtype=torch.int64), "infill_mask": torch.ones(1, 16), "max_new_tokens": 1},
            "16 tokens to fill in and 1 new ones do not fit in the context of 16",
        ),
        ({"num_denoising_steps": 0}, "num_denoising_steps=0 must be at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"num_steps": 4}, r"does not know: \['num_steps'\]"),
        ({"num_denoising_steps": 4, "steps_per_level": [1, 1, 1]}, "not both"),
        ({"num_denoising_steps": 2}, "fewer than the tree's 3 levels"),
        ({"steps_per_level": [4, 4]}, "each of the tree's 3 levels"),
        ({"input_ids": torch.tensor([[1, 9]])}, "prompt ids 1..9 are outside the vocabulary, 0..7"),
        ({"input_ids": torch.tensor([1])}, r"input_ids has shape \(1,\)"),
        ({"input_ids": torch.tensor([[1]]), "attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \(1, 2\)"),
        ({"input_ids": torch.zeros(1, 16, dtype=torch.int64)}, "a prompt of 16 tokens leaves no room for a new one"),
    ],
)
def test_bad_arguments_are_named(eight_leaf_tree, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(eight_leaf_tree).generate(**arguments)
