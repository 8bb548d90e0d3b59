"""The model: its outputs, its two losses, its invariances."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config, tiny_model

from tdlm import TDLMConfig, TDLMForDiffusionLM, TDLMModel, VocabTree
from tdlm.configuration_tdlm import PRESETS

IGNORE = -100


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def tree() -> VocabTree:
    return VocabTree.random(50, 4, seed=0)


@pytest.mark.parametrize(("time_conditioning", "gate"), [(True, 0.0), (False, 1.0)])
def test_blocks_start_as_the_identity_if_they_see_the_time_and_plain_otherwise(tree, time_conditioning, gate):
    torch.manual_seed(0)
    model = TDLMForDiffusionLM(tiny_config(tree, time_conditioning=time_conditioning), tree).model
    hidden = torch.randn(2, 5, 32, generator=seeded())
    condition = torch.randn(2, 1, model.config.condition_size, generator=seeded(1))
    for block in model.layers:
        shift, scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = block.modulation(condition).chunk(6, dim=-1)
        assert not any(part.any() for part in (shift, scale, mlp_shift, mlp_scale))
        assert (attn_gate == gate).all() and (mlp_gate == gate).all()
        rotary = (torch.ones(1, 1, 5, 16), torch.zeros(1, 1, 5, 16))
        assert torch.equal(block(hidden, condition, rotary), hidden) == time_conditioning
        assert abs(block.mlp.up_proj.weight.std() - 0.02) < 0.002
    assert not model.final_modulation(condition).any()


@pytest.mark.parametrize("head_type", ["shared", "tied"])
def test_forward_gives_log_probabilities_of_the_children_that_exist(eight_leaf_tree, head_type):
    model = tiny_model(eight_leaf_tree, head_type=head_type)
    node_ids = torch.arange(eight_leaf_tree.num_nodes)[None, 1:]
    log_probs = model(input_ids=node_ids).log_probs[0]
    internal = node_ids[0] >= 8
    assert torch.equal(log_probs[internal] > float("-inf"), eight_leaf_tree.child_mask(node_ids[0][internal]))
    assert (log_probs[~internal] == float("-inf")).all()
    torch.testing.assert_close(log_probs[internal].exp().sum(-1), torch.ones(int(internal.sum())))


def test_the_loss_with_given_times_is_deterministic_and_weighs_as_theorem_3_4(tree):
    """Recomputed from the log-probabilities of a plain forward, position by position."""
    model = tiny_model(tree)
    x, t = torch.randint(0, 50, (3, 7), generator=seeded()), torch.tensor([0.1, 0.5, 0.9])
    heights = model.law.sample_heights(t.double(), torch.rand(3, 7, generator=seeded(1)))
    z_t = tree.ancestor(x, heights)
    labels = x.clone()
    labels[0, :3] = IGNORE
    output = model(input_ids=z_t, timesteps=t, labels=labels)
    assert torch.equal(output.loss, model(input_ids=z_t, timesteps=t, labels=labels).loss)
    log_probs, total = model(input_ids=z_t, timesteps=t).log_probs, 0.0
    for b in range(3):
        for i in range(7):
            level = int(heights[b, i]) - 1
            runs = level >= 0 and model.law.thresholds[level] <= t[b] <= model.law.thresholds[level + 1]
            if runs and labels[b, i] != IGNORE:
                weight = 1 / (float(t[b]) - model.law.thresholds[level])
                total -= weight * float(log_probs[b, i, tree.child_slot(x[b, i], level)].detach())
    assert output.loss.item() == pytest.approx(total / 18, rel=1e-4)
    assert float(output.level_losses.sum()) == pytest.approx(output.loss.item())


def test_a_one_level_tree_is_masked_diffusion():
    """Flat tree: -alpha'/(1 - alpha) times the cross-entropy of the masked positions (MDLM)."""
    tree = VocabTree.flat(20)
    model = tiny_model(tree, loss_weight_clip=None)
    x, t = torch.randint(0, 20, (4, 9), generator=seeded()), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    masked = torch.rand(4, 9, generator=seeded(1)) < t[:, None]
    z_t = torch.where(masked, tree.root_id, x)
    logits = model.model(z_t).last_hidden_state @ model.model.embed_nodes.weight[:20].T + model.head.bias[:20]
    cross_entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x, reduction="none")
    expected = (cross_entropy * masked / t[:, None]).sum() / x.numel()
    torch.testing.assert_close(model(input_ids=z_t, timesteps=t, labels=x).loss, expected.float())


def test_training_clips_the_weight_and_evaluation_never_does(tree):
    x, t = torch.randint(0, 50, (2, 8), generator=seeded()), torch.tensor([0.34, 0.01])
    z_t = tree.ancestor(x, torch.tensor([[2], [1]]))
    losses = {}
    for clip in (None, 2.0):
        model = tiny_model(tree, loss_weight_clip=clip)
        for mode in (True, False):
            losses[clip, mode] = float(model.train(mode)(input_ids=z_t, timesteps=t, labels=x).loss.detach())
    assert losses[2.0, True] < losses[None, True] / 10
    assert losses[2.0, False] == losses[None, False] == pytest.approx(losses[None, True])


def test_training_draws_noise_from_the_generator_and_trains_a_plain_loop(tree):
    model = tiny_model(tree).train()
    # One token throughout: positions are relative, so which token stands where on an empty canvas is no easy task.
    x = torch.full((8, 12), 7)
    loss = [float(model(input_ids=x, labels=x, generator=seeded(s)).loss.detach()) for s in (0, 0, 1)]
    assert loss[0] == loss[1] != loss[2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = float(model.eval().nelbo(x, num_samples=20, generator=seeded()).nelbo.mean())
    model.train()
    for step in range(200):
        optimizer.zero_grad()
        model(input_ids=x, labels=x, generator=seeded(step)).loss.backward()
        optimizer.step()
    assert float(model.eval().nelbo(x, num_samples=20, generator=seeded()).nelbo.mean()) < before / 2


def test_clean_context_is_neither_noised_nor_scored(tree):
    """The loss does not depend on what is predicted at the context, and the network sees it clean."""
    model = tiny_model(tree).train()
    seen = []
    model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randint(0, 50, (4, 10), generator=seeded())
    labels = x.clone()
    labels[:, :6] = IGNORE
    for mode in (True, False):
        model.train(mode)(input_ids=x, labels=labels, generator=seeded())
        assert torch.equal(seen[-1][:, :6], x[:, :6])
    assert (seen[0][:, 6:] != x[:, 6:]).any()
    nothing = model.eval()(input_ids=x, labels=torch.full_like(x, IGNORE), generator=seeded())
    assert nothing.loss.item() == 0 and nothing.num_tokens.tolist() == [0] * 4


def test_padding_on_either_side_and_batching_leave_the_nelbo_alone(tree):
    model = tiny_model(tree)
    x = torch.randint(1, 50, (1, 8), generator=seeded())
    t, heights = torch.tensor([0.5]), torch.tensor([[2, 1, 2, 2, 1, 1, 2, 1]])
    z_t = tree.ancestor(x, heights)
    plain = model(input_ids=z_t, timesteps=t, labels=x).loss.item()
    for left in (0, 3):
        pad = (left, 3 - left)
        padded = model(
            input_ids=torch.nn.functional.pad(z_t, pad, value=0),
            timesteps=t,
            labels=torch.nn.functional.pad(x, pad, value=IGNORE),
            attention_mask=torch.nn.functional.pad(torch.ones_like(x), pad),
        ).loss.item()
        assert padded == pytest.approx(plain, abs=1e-5)


def test_evaluation_neither_sees_nor_scores_padding(tree):
    model = tiny_model(tree)
    x = torch.randint(0, 50, (2, 8), generator=seeded())
    mask = torch.ones_like(x)
    mask[:, 5:] = 0
    output = model(input_ids=x, attention_mask=mask, labels=x, generator=seeded())
    assert output.num_tokens.tolist() == [5, 5]
    assert model.nelbo(x, attention_mask=mask).num_tokens.tolist() == [5, 5]
    half = model(input_ids=x, attention_mask=mask, labels=x, generator=seeded(), num_items_in_batch=20)
    assert half.loss.item() == pytest.approx(output.loss.item() / 2)
    with pytest.raises(ValueError, match=r"timesteps are torch\.bfloat16"):
        model(input_ids=x, labels=x, timesteps=torch.zeros(2, dtype=torch.bfloat16))


def test_the_nelbo_reports_its_monte_carlo_error_and_repeats_with_its_seed(tree):
    model = tiny_model(tree)
    x = torch.randint(0, 50, (2, 6), generator=seeded())
    few, many = (model.nelbo(x, num_samples=n, generator=seeded(n)) for n in (10, 1000))
    assert (many.standard_error < few.standard_error).all()
    assert ((few.nelbo - many.nelbo).abs() < 5 * (few.standard_error + many.standard_error)).all()
    torch.testing.assert_close(many.level_nelbo.sum(1), many.nelbo)
    assert torch.equal(model.nelbo(x, num_samples=10, generator=seeded(10)).nelbo, few.nelbo)
    assert model.nelbo(x).standard_error.isnan().all()


def test_the_jump_estimator_of_a_network_agrees_with_the_time_estimator(tree):
    model = tiny_model(tree, loss_weight_clip=None, time_conditioning=True)
    x = torch.randint(0, 50, (1, 6), generator=seeded()).expand(500, 6)
    exact = model.nelbo(x[:1], num_samples=4_000, generator=seeded())
    model.train()
    with torch.no_grad():
        losses = torch.stack([model(input_ids=x, labels=x, generator=seeded(s)).loss * 6 for s in range(100)])
    error = float(losses.std()) / 10 + float(exact.standard_error)
    assert float(losses.mean()) == pytest.approx(float(exact.nelbo), abs=4 * error)


def test_time_conditioning_needs_and_uses_the_time(tree):
    model = tiny_model(tree, time_conditioning=True)
    z = torch.full((2, 5), tree.root_id)
    early, late = (model(input_ids=z, timesteps=torch.full((2,), t)).log_probs for t in (0.7, 0.9))
    assert not torch.allclose(early, late)
    with pytest.raises(ValueError, match="time_conditioning=True: pass timesteps"):
        model(input_ids=z)
    with pytest.raises(ValueError, match=r"timesteps has shape \(3,\)"):
        model(input_ids=z, timesteps=torch.zeros(3))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(tree, implementation):
    if implementation == "flex_attention":
        pytest.importorskip("torch.nn.attention.flex_attention")
        if not torch.cuda.is_available():
            pytest.skip("flex attention needs a compiler on the CPU")
    reference, model = tiny_model(tree), tiny_model(tree)
    reference.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    z = torch.randint(0, tree.num_nodes, (2, 9), generator=seeded())
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    hidden = [m.model(z, attention_mask=mask).last_hidden_state for m in (reference, model)]
    torch.testing.assert_close(hidden[0][1], hidden[1][1])
    torch.testing.assert_close(hidden[0][0, :6], hidden[1][0, :6])


def test_attention_looks_both_ways(tree):
    model = tiny_model(tree)
    z = torch.randint(50, tree.num_nodes, (1, 6), generator=seeded())
    changed = z.clone()
    changed[0, 5] = 0
    difference = model.model(z).last_hidden_state - model.model(changed).last_hidden_state
    assert (difference[0].abs().amax(-1) > 0).all()


def test_gradient_checkpointing_gives_the_same_gradients(tree):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(tree).train()
        if checkpointing:
            # renamed between the oldest and the newest supported transformers
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        x = torch.randint(0, 50, (2, 6), generator=seeded())
        model(input_ids=x, labels=x, generator=seeded()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


def test_outputs_follow_the_conventions(tree):
    model = tiny_model(tree)
    model.set_attn_implementation("eager")
    z = torch.randint(0, tree.num_nodes, (2, 5), generator=seeded())
    output = model(input_ids=z, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 2, 5, 5)
    assert isinstance(model(input_ids=z, return_dict=False), tuple)
    embeds = model.get_input_embeddings()(z)
    torch.testing.assert_close(model.model(inputs_embeds=embeds).last_hidden_state, model.model(z).last_hidden_state)


@pytest.mark.parametrize(("preset", "millions"), [("small", 169.8), ("base", 413.6)])
def test_presets_have_the_papers_parameters_with_the_shared_head(preset, millions):
    tree_shape = {"vocab_size": 50257, "branching_factor": 256}
    with torch.device("meta"):
        model = TDLMForDiffusionLM(TDLMConfig(**PRESETS[preset], **tree_shape, head_type="shared"))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


def test_bf16_models_train_and_evaluate(tree):
    model = tiny_model(tree).to(torch.bfloat16)
    x = torch.randint(0, 50, (2, 8), generator=seeded())
    loss = model.train()(input_ids=x, labels=x, generator=seeded()).loss
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert bool(model.eval().nelbo(x).nelbo.isfinite().all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 must be an even multiple"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "rotary positions need an even head size"),
        ({"head_type": "big"}, r"head_type='big' is not one of \['joint', 'node', 'shared', 'tied', 'vocab'\]"),
        ({"law": "direct", "head_type": "shared"}, "law='direct' scores a whole path .* head_type='shared' cannot"),
        ({"law": "concurrent", "thresholds": [0.0, 0.2, 0.6, 1.0]}, "law='concurrent' has no thresholds"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is for head_type='vocab', not 'tied'"),
        ({"level_weighting": "cubic"}, r"level_weighting='cubic' is not one of \['exponential', 'linear'\]"),
        ({"level_weighting": "linear", "level_weighting_scale": -1.0}, "level_weighting_scale=-1.0 must be above -1"),
        ({"head_type": "joint", "law": "concurrent"}, "head_type='joint' needs law='sequential', not 'concurrent'"),
        ({"neighborhood_size": 2}, "neighborhood_size=2 needs head_type='joint', not 'tied'"),
        ({"neighborhood_jumps": "independent"}, "neighborhood_jumps='independent' needs head_type='joint', not 'tied'"),
        ({"level_weighting_scale": 2.0}, "level_weighting_scale=2.0 needs a level_weighting, one of"),
        ({"neighborhood_size": 0}, "neighborhood_size=0 must be at least 1"),
        ({"head_type": "joint", "neighborhood_size": 11}, "neighborhood_size=11 give 4194304 joint classes, more than"),
        ({"neighborhood_pooling": "max"}, "neighborhood_pooling='max' is not one of"),
        ({"neighborhood_jumps": "random"}, "neighborhood_jumps='random' is not one of"),
        ({"law": "chaos"}, "law='chaos' is not one of"),
        ({"schedule": "cubic"}, "schedule='cubic' is not one of"),
        ({"thresholds": [0.0, 1.0]}, "thresholds=.* must be 4 increasing times"),
        ({"loss_weight_clip": 0.0}, "loss_weight_clip=0.0 must be positive"),
        ({"nodes_per_height": [49, 13, 4, 1]}, "must be vocab_size=50"),
        ({"nodes_per_height": [50, 2, 1]}, "2 nodes at height 1 cannot have 50 children"),
        ({"condition_size": 0}, "condition_size=0 must be at least 1"),
    ],
)
def test_impossible_configurations_are_named(tree, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(tree, **fields)


def test_misuse_is_named(tree, eight_leaf_tree):
    model = tiny_model(tree)
    with pytest.raises(ValueError, match="preset='huge' is not one of"):
        TDLMConfig.for_tree(tree, preset="huge")
    with pytest.raises(ValueError, match=r"nodes_per_height=\[8, 5, 3, 1\] and branching_factor=3"):
        TDLMForDiffusionLM(tiny_config(tree), eight_leaf_tree)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model()
    with pytest.raises(ValueError, match="pass input_ids: what a position may become"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="num_samples=0"):
        model.nelbo(torch.zeros(1, 2, dtype=torch.int64), num_samples=0)
    with pytest.raises(NotImplementedError, match="cannot be resized by itself"):
        model.resize_token_embeddings(60)


def test_a_backbone_is_what_automodel_gives(tree, tmp_path):
    from transformers import AutoModel

    model = tiny_model(tree)
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, TDLMModel)
    z = torch.randint(0, tree.num_nodes, (1, 4), generator=seeded())
    torch.testing.assert_close(backbone(z).last_hidden_state, model.model(z).last_hidden_state)


def test_level_weights_act_in_training_alone(tree):
    """App. D: the terms of the levels are multiplied, the bound is not touched."""
    x, t = torch.randint(0, 50, (40, 7), generator=seeded()), torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    outputs = {}
    for weighting, scale in ((None, 1.0), ("linear", 4.0)):
        model = tiny_model(tree, level_weighting=weighting, level_weighting_scale=scale)
        z_t = model.noise(x, x, t, torch.rand(40, 7, generator=seeded()))
        arguments = {"input_ids": z_t, "timesteps": t, "labels": x}
        outputs[weighting] = (model.train()(**arguments).level_losses, model.eval()(**arguments).level_losses)
    expected = torch.tensor([1.0, 3.0, 5.0]) / 3
    torch.testing.assert_close(outputs["linear"][0] / outputs[None][0], expected)
    assert torch.equal(outputs["linear"][1], outputs[None][1])


@pytest.mark.parametrize(
    "fields",
    [
        {"law": "concurrent"},
        {"law": "direct", "head_type": "node"},
        {"law": "concurrent", "head_type": "vocab", "schedule": "cosine"},
        {"head_type": "vocab", "tie_word_embeddings": True},
        {"head_type": "joint", "neighborhood_size": 2, "neighborhood_jumps": "independent"},
        {"thresholds": [0.0, 0.2, 0.6, 1.0], "level_weighting": "exponential", "level_weighting_scale": 2.0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_a_checkpoint_carries_the_law_the_head_and_their_fields(tree, fields, tmp_path):
    """Saved and loaded: the same configuration, the same bits in a loss, in training and evaluation."""
    model = tiny_model(tree, **fields)
    model.save_pretrained(tmp_path)
    loaded = TDLMForDiffusionLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in fields} == fields
    assert type(loaded.law) is type(model.law) and type(loaded.head) is type(model.head)
    x = torch.randint(0, 50, (4, 12), generator=seeded())
    for mode in (True, False):
        losses = [m.train(mode)(input_ids=x, labels=x, generator=seeded()).loss for m in (model, loaded)]
        assert torch.equal(*losses) and bool(torch.isfinite(losses[0]))


def test_gradients_of_every_head_and_law_are_finite_and_reach_the_head(tree):
    x = torch.randint(0, 50, (32, 12), generator=seeded())
    combinations = [("concurrent", head) for head in ("shared", "tied", "node", "vocab")]
    combinations += [("direct", head) for head in ("tied", "node", "vocab")] + [("sequential", "joint")]
    for law, head_type in combinations:
        model = tiny_model(tree, law=law, head_type=head_type).train()
        model(input_ids=x, labels=x, generator=seeded()).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None or "time_embedding" in name, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), (law, head_type, name)
        assert all(float(parameter.grad.abs().sum()) > 0 for parameter in model.head.parameters())
