"""What the clients of a Hub run, each in a process of its own: huggingface_hub reads its settings when it is imported.

Nothing here may import tdlm at the top: one client is a stranger, in whose process importing it fails.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


class Client:
    """A process that runs functions of this module, one after another; what they raise is raised here."""

    def __init__(
        self, endpoint: str, home: Path, token: str | None = None, has_tdlm: bool = True, offline: bool = False
    ):
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": os.fspath(home),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=None if has_tdlm else block_tdlm
        )
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE"):
                patch.delenv(name, raising=False)
            for name, value in {**settings, **({"HF_TOKEN": token} if token else {})}.items():
                patch.setenv(name, value)
            self._pool.submit(os.getpid)  # starts the process, which inherits the settings

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


class _NoTdlm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tdlm":
            raise ModuleNotFoundError(name)


def block_tdlm() -> None:
    assert not any(name.split(".")[0] == "tdlm" for name in sys.modules)
    sys.meta_path.insert(0, _NoTdlm())


class Loaded(NamedTuple):
    where: str  # the module of the model's class
    weights: str  # digest of all parameters and tables


def weights_of(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- loading ----


def load(name: str, **kwargs: Any) -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    return Loaded(type(model).__module__, weights_of(model))


def use_every_auto_class(name: str, **kwargs: Any) -> tuple[list[str], str]:
    """-> the names of the classes and some generated text."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    backbone = AutoModel.from_pretrained(name, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    prompt = tokenizer("some words", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, num_denoising_steps=4)
    return [type(part).__name__ for part in (config, backbone, model)], tokenizer.decode(ids[0])


def run_snippet_of_card(repo_id: str) -> str:
    """The card's Python, as it stands there -> what it printed."""
    code = re.search(r"```python\n(.*?)```", ModelCard.load(repo_id).text, flags=re.DOTALL)
    assert code is not None
    assert f'"{repo_id}"' in code[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code[1], {})
    return printed.getvalue()


def pull(repo_id: str, **kwargs: Any) -> str:
    return snapshot_download(repo_id, **kwargs)


def modules_of(repo: str) -> list[str]:
    """What this process has imported of a repository's code."""
    return [name for name in sys.modules if name.startswith("transformers_modules.") and repo in name]


# ---- pushing ----


def push(folder: str, repo_id: str, tokenizer_folder: str | None = None, **kwargs: Any) -> str:
    """Push the checkpoint in a local folder with its tokenizer, or another -> the commit."""
    import tdlm  # noqa: F401  registers the classes

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or folder)
    return model.push_to_hub(repo_id, tokenizer=tokenizer, **kwargs).oid


def push_model_alone(folder: str, repo_id: str, tag: str) -> str:
    import tdlm  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_model_tags([tag])
    return model.push_to_hub(repo_id).oid


def push_tokenizer(folder: str, repo_id: str, **kwargs: Any) -> str:
    return AutoTokenizer.from_pretrained(folder).push_to_hub(repo_id, **kwargs).oid


def call_hub(method: str, *args: Any, **kwargs: Any) -> None:
    """Any method of [`HfApi`], for what it does."""
    getattr(HfApi(), method)(*args, **kwargs)


def train(folder: str, repo_id: str, output_dir: str) -> None:
    """A step of the Trainer with `push_to_hub=True`: it pushes when it saves, then once more when it is told to."""
    from tiny import Sequences

    from tdlm.trainer import TDLMTrainer, TDLMTrainingArguments

    arguments = TDLMTrainingArguments(
        output_dir,
        push_to_hub=True,
        hub_model_id=repo_id,
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = TDLMTrainer(model, arguments, train_dataset=Sequences(8), processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
