"""Does the package work with this version of transformers? `python tests/matrix.py [requirement or "installed" ...]`

For each version, installed with what it depends on into a folder that comes before this environment's packages: train
two steps, save, load, load again as remote code where tdlm cannot be imported, and generate the same text there.
Prints a markdown table; fails if a row does.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSIONS = ["transformers==5.14.0", "transformers"]  # the oldest that pyproject.toml allows, and the newest there is
STEPS = ("train", "save", "load", "remote code", "generate")

# Each process says what it has done, one step a line; the last line of the first is torch's version.
TRAIN = """
import sys, torch, transformers
from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer import TDLMTrainer, TDLMTrainingArguments

folder = sys.argv[1]
tokenizer = train_tokenizer(["some words to merge, some words to keep"] * 3, 270, progress=False)
tree = VocabTree.random(len(tokenizer), 8, seed=0).bind(tokenizer)
model = TDLMForDiffusionLM(TDLMConfig.for_tree(tree, preset="tiny"), tree)
rows = [{"input_ids": torch.arange(16) % len(tokenizer), "labels": torch.arange(16) % len(tokenizer)}] * 4
arguments = TDLMTrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, report_to="none")
trainer = TDLMTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
assert trainer.train().global_step == 2
print("train")
trainer.save_model(folder)
print("save")
loaded = TDLMForDiffusionLM.from_pretrained(folder).to(model.device)
state = model.state_dict()
assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
print("load")
generator = torch.Generator().manual_seed(0)
torch.save(loaded.cpu().generate(max_new_tokens=8, num_denoising_steps=8, generator=generator), folder + "/ids.pt")
print(transformers.__version__, torch.__version__)
"""
GENERATE = """
import sys
sys.modules["tdlm"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print("remote code")
generator = torch.Generator().manual_seed(0)
ids = model.generate(max_new_tokens=8, num_denoising_steps=8, generator=generator)
assert torch.equal(ids, torch.load(folder + "/ids.pt"))
print("generate")
"""


def try_version(requirement: str, folder: Path) -> tuple[str, list[str], str]:
    """-> versions, the steps that were done, and what the first one that failed said."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    if requirement != "installed":
        overlay = folder / "packages"
        command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(overlay)]
        subprocess.run([*command, "-c", _constraints(folder), requirement], check=True)
        environment["PYTHONPATH"] = str(overlay)
    done, versions = [], requirement
    for code in (TRAIN, GENERATE):
        process = subprocess.run(
            [sys.executable, "-c", code, str(folder / "model")],
            capture_output=True,
            text=True,
            env=environment,
            cwd=folder,
        )
        lines = process.stdout.splitlines()
        done += [step for step in STEPS if step in lines]
        versions = lines[-1] if code is TRAIN and process.returncode == 0 else versions
        if process.returncode != 0:
            return versions, done, process.stderr
    return versions, done, ""


def _constraints(folder: Path) -> str:
    """numpy and torch stay as they are: this environment's compiled packages were made for them."""
    import numpy
    import torch

    path = folder / "constraints.txt"
    path.write_text(f"numpy=={numpy.__version__}\ntorch=={torch.__version__.split('+')[0]}\n")
    return str(path)


def main(requirements: list[str]) -> int:
    failures = 0
    rows = [f"| transformers | torch | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 2) + "|"]
    for requirement in requirements:
        with tempfile.TemporaryDirectory() as folder:
            versions, done, trouble = try_version(requirement, Path(folder))
        cells = [
            *(versions.split() if " " in versions else (versions, "")),
            *("ok" if s in done else "-" for s in STEPS),
        ]
        rows.append(f"| {' | '.join(cells)} |")
        if done != list(STEPS):
            failures += 1
            print(f"{requirement}:\n{trouble}", file=sys.stderr)
    print("\n".join(rows))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or VERSIONS))
