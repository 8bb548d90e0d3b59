"""Push a checkpoint to the Hub, model and tokenizer in one commit, and load it back by that commit.

    hf auth login                                            # or set HF_TOKEN
    python examples/pretrain.py                              # makes runs/pretrain
    python examples/push_to_hub.py you/tdlm-novels --private

A run of the Trainer can push itself, with its results in the card: `--push_to_hub --hub_model_id you/tdlm-novels`.
"""

import argparse

import torch
from huggingface_hub import create_repo, file_exists
from transformers import AutoModelForCausalLM, AutoTokenizer

import tdlm  # noqa: F401  # registers the model classes
from tdlm.trainer import CardDetails, create_model_card


def main(argv=None):
    parser = argparse.ArgumentParser(description="Push a checkpoint to the Hub and load it back.")
    parser.add_argument("repo_id", help="repository on the Hub, made if it does not exist")
    parser.add_argument("--model", default="runs/pretrain", help="checkpoint folder")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--license", help="of the weights, as the Hub writes it: apache-2.0")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    create_repo(args.repo_id, private=args.private, exist_ok=True)
    if not file_exists(args.repo_id, "README.md"):  # pushing a model keeps the card that is there
        card = create_model_card(model, tokenizer, CardDetails(model_id=args.repo_id, license=args.license))
        card.push_to_hub(args.repo_id, commit_message="Upload model card")
    commit = model.push_to_hub(args.repo_id, tokenizer=tokenizer)
    print(f"Pushed to {commit.commit_url}")

    # Anybody can load it so; who has not installed tdlm adds trust_remote_code=True.
    loaded = AutoModelForCausalLM.from_pretrained(args.repo_id, revision=commit.oid)
    tokenizer = AutoTokenizer.from_pretrained(args.repo_id, revision=commit.oid)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), f"{name} came back changed"
    print(f"Loaded revision {commit.oid}: the same weights. It says:")
    print(tokenizer.decode(loaded.generate(max_new_tokens=32)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
