"""LoRA through PEFT: trained by both Trainers, saved, loaded, merged; the same numbers all the way."""

import pytest
import torch
from tiny import Sequences, tiny_model
from tiny_prime import prime_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tdlm import VocabTree
from tdlm.trainer import TDLMDataCollator, TDLMTrainer, TDLMTrainingArguments

peft = pytest.importorskip("peft", reason="needs the extra peft")

# PEFT 0.21 asks transformers 5.23 for the name that an attribute had before.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TREE = VocabTree.from_nested([list(range(start, start + 10)) for start in range(0, 50, 10)])
MODELS = {
    "tied": lambda: tiny_model(TREE),
    "shared": lambda: tiny_model(TREE, head_type="shared"),
    "joint": lambda: tiny_model(TREE, head_type="joint", neighborhood_size=2, neighborhood_jumps="synchronous"),
    "timed": lambda: tiny_model(TREE, time_conditioning=True),
    "mdm_prime": lambda: prime_model(50, base=4),
}


def with_lora(model, **fields):
    """An adapter that does something from the start."""
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **fields)).eval()


def nelbo(model) -> torch.Tensor:
    x = torch.stack([Sequences(4)[i]["input_ids"] for i in range(4)])
    return model.nelbo(x, num_samples=4, generator=torch.Generator().manual_seed(0)).nelbo


def generated(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.generate(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4, generator=generator)


def plain_trainer(model, folder, **settings):
    args = TrainingArguments(str(folder), remove_unused_columns=False, **settings)
    return Trainer(model, args, data_collator=TDLMDataCollator(0), train_dataset=Sequences(8))


def tdlm_trainer(model, folder, **settings):
    args = TDLMTrainingArguments(str(folder), **settings)
    return TDLMTrainer(model, args, train_dataset=Sequences(8), eval_dataset=Sequences(8))


CASES = [
    ("tied", ATTENTION_AND_MLP, None, tdlm_trainer),
    ("tied", ATTENTION_AND_MLP, "CAUSAL_LM", plain_trainer),
    ("tied", "all-linear", "CAUSAL_LM", tdlm_trainer),
    ("shared", "all-linear", None, plain_trainer),
    ("joint", "all-linear", "CAUSAL_LM", tdlm_trainer),
    ("timed", "all-linear", None, tdlm_trainer),
    ("mdm_prime", ATTENTION_AND_MLP, "CAUSAL_LM", tdlm_trainer),
    ("mdm_prime", "all-linear", None, plain_trainer),
]


@pytest.mark.parametrize(("name", "target_modules", "task_type", "make_trainer"), CASES)
def test_an_adapter_is_trained_saved_loaded_and_merged(name, target_modules, task_type, make_trainer, tmp_path):
    base = MODELS[name]()
    base.save_pretrained(tmp_path / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    start = nelbo(base)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=target_modules, task_type=task_type),
    )
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "use_cpu": True}
    trainer = make_trainer(model, tmp_path / "run", report_to=[], save_strategy="no", **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    trained, sample = nelbo(model.eval()), generated(model)
    assert (trained - start).abs().min() > 1e-3

    # Only the adapter was trained, and it is what was saved: the tree and every weight of the base are as they were.
    for key, value in before.items():
        assert torch.equal(model.get_base_model().state_dict()[adapted(key, model)], value), key
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))

    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(nelbo(loaded), trained) and torch.equal(generated(loaded), sample)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base) and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(nelbo(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(nelbo(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), nelbo(merged))

    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    direct.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(nelbo(direct.eval()), trained) and torch.equal(generated(direct), sample)


def adapted(key: str, model) -> str:
    """The name that a weight of the base has under LoRA."""
    module, _, leaf = key.rpartition(".")
    inner = f"{module}.base_layer.{leaf}"
    return inner if inner in model.get_base_model().state_dict() else key


def test_all_linear_layers_are_those_of_the_network():
    model = with_lora(tiny_model(TREE), target_modules="all-linear")
    adapters = {name.removeprefix("base_model.model.") for name, module in model.named_modules() if is_lora(module)}
    assert "model.layers.0.modulation" in adapters and "model.layers.1.mlp.down_proj" in adapters
    assert not any(name.startswith(("tree", "head")) for name in adapters)
    shared = with_lora(tiny_model(TREE, head_type="shared"), target_modules="all-linear")
    assert not is_lora(shared.get_base_model().head.proj)  # as PEFT leaves out every model's head
    assert is_lora(with_lora(tiny_model(TREE, head_type="shared"), target_modules=["proj"]).get_base_model().head.proj)


def is_lora(module) -> bool:
    return hasattr(module, "lora_A")


@pytest.mark.parametrize("fields", [{}, {"law": "direct"}, {"head_type": "vocab", "tie_word_embeddings": True}])
def test_lora_on_a_tied_embedding_reaches_input_and_head(fields, tmp_path):
    """Merged into the one matrix, the adapter changes both; so it must before."""
    base = tiny_model(TREE, **fields)
    model = with_lora(base, target_modules=["embed_nodes"])
    scored, sample = nelbo(model), generated(model)
    model.save_pretrained(tmp_path / "adapter")
    z_t = torch.full((1, 4), TREE.root_id)
    log_probs = model(z_t, timesteps=torch.ones(1)).log_probs
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(z_t, timesteps=torch.ones(1)).log_probs, log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nelbo(merged), scored, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(merged), sample)
    loaded = peft.PeftModel.from_pretrained(tiny_model(TREE, **fields), tmp_path / "adapter")
    torch.testing.assert_close(nelbo(loaded), scored)


def test_an_adapted_embedding_is_trained_through_the_head_too():
    model = with_lora(tiny_model(TREE, law="direct"), target_modules=["embed_nodes"]).train()
    x = torch.arange(8)[None]
    model(input_ids=torch.full_like(x, TREE.root_id), labels=x, timesteps=torch.ones(1)).loss.backward()
    (a,) = (parameter for name, parameter in model.named_parameters() if "lora_embedding_A" in name)
    # Tokens that stand nowhere in the sequence are scored as siblings: only the head sees them.
    siblings = torch.arange(8, 10)
    assert bool((a.grad[:, siblings] != 0).any())


def test_the_trainer_evaluates_a_model_with_an_adapter(tmp_path):
    model = with_lora(tiny_model(TREE), target_modules="all-linear")
    settings = {"per_device_eval_batch_size": 8, "use_cpu": True, "report_to": [], "eval_num_samples": 2}
    metrics = tdlm_trainer(model, tmp_path, **settings).evaluate()
    merged = tdlm_trainer(model.merge_and_unload(), tmp_path, **settings).evaluate()
    assert metrics["eval_nelbo"] == pytest.approx(merged["eval_nelbo"], rel=1e-4)
