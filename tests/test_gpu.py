"""The same laws on a CUDA device; run with `pytest -m gpu`."""

import pytest
import torch
from tiny import tiny_model
from tiny_prime import prime_model

from tdlm import VocabTree

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TREES = {"wide": VocabTree.random(3000, 64, seed=0), "binary": VocabTree.random(200, 2, seed=0)}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
MODELS = {
    "shared": {"head_type": "shared"},
    "tied": {"head_type": "tied"},
    "node": {"head_type": "node"},
    "vocab": {"head_type": "vocab"},
    "joint": {"head_type": "joint", "neighborhood_size": 2, "neighborhood_jumps": "independent"},
    "concurrent": {"law": "concurrent"},
    "direct": {"law": "direct"},
}
each_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@each_tree
@each_model
def test_the_nelbo_is_that_of_the_cpu(tree, fields):
    model = tiny_model(tree, **fields)
    x = torch.randint(0, tree.vocab_size, (4, 16), generator=seeded())
    expected = model.nelbo(x, num_samples=3, generator=seeded()).nelbo
    got = model.cuda().nelbo(x.cuda(), num_samples=3, generator=seeded()).nelbo
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


@each_tree
@each_model
def test_gradients_are_those_of_the_cpu(tree, fields):
    x = torch.randint(0, tree.vocab_size, (8, 16), generator=seeded())
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny_model(tree, **fields).to(device).train()
        model(input_ids=x.to(device), labels=x.to(device), generator=seeded()).loss.backward()
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-4)


@each_tree
@each_model
def test_bf16_autocast_trains(tree, fields):
    model = tiny_model(tree, **fields).cuda().train()
    x = torch.randint(0, tree.vocab_size, (8, 16), generator=seeded()).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=x, labels=x, generator=seeded()).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_flat_model_has_the_values_and_gradients_of_the_cpu(tied):
    """On CUDA the flat peer's cross-entropy is torch's fused one, where torch has it."""
    tree, outcomes = VocabTree.flat(500), []
    x = torch.randint(0, 500, (8, 16), generator=seeded())
    for device in ("cpu", "cuda"):
        model = tiny_model(tree, head_type="vocab", tie_word_embeddings=tied).to(device).train()
        loss = model(input_ids=x.to(device), labels=x.to(device), generator=seeded()).loss
        loss.backward()
        outcomes.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for left, right in zip(*outcomes, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("head_type", ["digit", "joint"])
def test_mdm_prime_has_the_values_of_the_cpu_and_samples(head_type):
    model = prime_model(500, head_type=head_type)
    x = torch.randint(0, 500, (4, 16), generator=seeded())
    expected = model.nelbo(x, num_samples=3, generator=seeded()).nelbo
    got = model.cuda().nelbo(x.cuda(), num_samples=3, generator=seeded()).nelbo
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert int(model.generate(max_new_tokens=16, num_denoising_steps=4).max()) < 500


@each_tree
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"concurrent"}))  # which asks whether somebody jumps twice
def test_sampling_never_waits_for_the_device_inside_the_steps(tree, name):
    """Any host sync between the first and the last step raises."""
    model = tiny_model(tree, **MODELS[name]).cuda()

    class Steps:
        """Turns the detector on at the first step and off at the last."""

        def __init__(self, total):
            self.left = total

        def put(self, value):
            pass

        def put_draft(self, value):
            self.left -= 1
            torch.cuda.set_sync_debug_mode("error" if self.left else "default")

        def end(self):
            torch.cuda.set_sync_debug_mode("default")

    generator = torch.Generator("cuda").manual_seed(0)
    model.generate(max_new_tokens=16, num_denoising_steps=20, generator=generator)  # warm-up: lazy set-up may wait
    try:
        ids = model.generate(max_new_tokens=16, num_denoising_steps=20, generator=generator, streamer=Steps(20))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(ids.max()) < tree.vocab_size
