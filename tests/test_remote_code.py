"""A checkpoint folder brings its own code: it loads where tdlm is not installed, and refuses a tree that is wrong."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vocab_tree import WRONG
from tiny import EIGHT_LEAVES, tiny_model
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

from tdlm import TDLMForDiffusionLM, VocabTree
from tdlm.tokenization import train_tokenizer
from tdlm.trainer.quickstart import load_as_stranger

SOURCE = Path(__file__).parents[1] / "modeling_tdlm"
# What a stranger has: these (safetensors comes with transformers) and Python's own.
ALLOWED_PACKAGES = {"torch", "transformers", "huggingface_hub", "safetensors", *sys.stdlib_module_names}


def imports_in(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def packages_in(statement: ast.Import | ast.ImportFrom) -> set[str]:
    modules = [statement.module] if isinstance(statement, ast.ImportFrom) else [name.name for name in statement.names]
    return {str(module).split(".")[0] for module in modules}


def reached_from(name: str) -> set[str]:
    """The code files that one needs, itself among them, as Python sees it."""
    reached, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [f"{node.module}.py" for node in imports_in(SOURCE / name) if getattr(node, "level", 0)]
    return reached


CODE_FILES = sorted(reached_from("modeling_tdlm.py"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to merge, some words to keep"] * 3, 270, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = VocabTree.random(len(tokenizer), 8, seed=0).bind(tokenizer)
    tiny_model(tree, max_position_embeddings=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_a_stranger(code: str, *arguments: str) -> str:
    """Run code in a process where importing tdlm fails."""
    blocker = (
        "import sys\n"
        "class NoTdlm:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'tdlm':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTdlm())\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", blocker + code, *arguments], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_folder_holds_weights_tree_and_code(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {*CODE_FILES, "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    tensors = load_file(checkpoint / "model.safetensors")
    assert {"tree.ancestors", "tree.child_slots", "tree.child_ids", "tree.child_counts"} <= set(tensors)
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_tdlm.TDLMConfig",
        "AutoModel": "modeling_tdlm.TDLMModel",
        "AutoModelForCausalLM": "modeling_tdlm.TDLMForDiffusionLM",
    }


def test_it_loads_and_generates_where_tdlm_is_not_installed(checkpoint):
    assert load_as_stranger(checkpoint).strip()


def test_every_auto_class_finds_the_code_and_the_numbers_are_the_same(checkpoint):
    printed = in_a_stranger(
        "import torch\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "config = AutoConfig.from_pretrained(folder, trust_remote_code=True)\n"
        "backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "z = torch.arange(20)[None] * 12\n"
        "assert torch.equal(backbone(z).last_hidden_state, model.model(z).last_hidden_state)\n"
        "torch.save(model(input_ids=z).log_probs, sys.argv[2])\n"
        "print(type(config).__name__, type(backbone).__name__, type(model).__name__)\n",
        str(checkpoint),
        str(checkpoint / "log_probs.pt"),
    )
    assert printed.split() == ["TDLMConfig", "TDLMModel", "TDLMForDiffusionLM"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, TDLMForDiffusionLM)
    here = model(input_ids=torch.arange(20)[None] * 12).log_probs
    torch.testing.assert_close(torch.load(checkpoint / "log_probs.pt", weights_only=True), here)
    (checkpoint / "log_probs.pt").unlink()


def test_save_load_save_is_byte_identical(checkpoint, tmp_path):
    here, there = tmp_path / "installed", tmp_path / "stranger"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(here)
    in_a_stranger(
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.save_pretrained(sys.argv[2])\n",
        str(checkpoint),
        str(there),
    )
    for folder in (here, there):
        for name in [*CODE_FILES, "model.safetensors", "config.json", "generation_config.json"]:
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes(), f"{folder.name}: {name}"


def broken_imports(folder: Path) -> list[str]:
    """Imports in the code files of a checkpoint that would fail, or find something else, where tdlm is not installed.

    Two readers: Python, and transformers' scanner, a regular expression over raw text, docstrings included, which
    decides what is saved and what is fetched. Each must find the other's siblings.
    """
    code_files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    siblings = {path.stem for path in code_files}
    broken = []
    for path in code_files:
        scanned = set(get_relative_imports(path))
        broken += [f"{path.name}: the scanner reads an import of .{name}" for name in sorted(scanned - siblings)]
        for statement in imports_in(path):
            if isinstance(statement, ast.ImportFrom) and statement.level:
                is_found = statement.level == 1 and statement.module in siblings & scanned
            else:
                is_found = packages_in(statement) <= ALLOWED_PACKAGES
            if not is_found:
                broken.append(f"{path.name}: {ast.unparse(statement)}")
    return broken


def test_every_relative_import_resolves_inside_the_folder(checkpoint):
    assert sorted(path.name for path in checkpoint.glob("*.py")) == CODE_FILES
    assert not broken_imports(checkpoint)
    assert not broken_imports(SOURCE)  # with the files of other models


@pytest.mark.parametrize(
    "line",
    [
        "from . import heads_tdlm",
        "from .missing import name",
        "from .sub.heads_tdlm import name",
        "from .. import name",
        "from ..heads_tdlm import name",
        "from .__init__ import name",
        "import tdlm",
        "import tdlm.heads_tdlm as heads",
        "from tdlm import TDLMConfig",
        "from tdlm.heads_tdlm import HEADS",
        "from heads_tdlm import HEADS",
        "import datasets",
        "if True:\n    from .missing import name",
        "def late():\n    from . import heads_tdlm",
        '"""Words.\n\nfrom .missing import name\n"""',
        '"""\n    import .missing\n"""',
        "import torch; from .heads_tdlm import HEADS",  # Python finds it, the scanner does not
    ],
)
def test_an_import_that_fails_for_a_stranger_is_noticed(line, checkpoint, tmp_path):
    for name in CODE_FILES:
        (tmp_path / name).write_text((checkpoint / name).read_text())
    assert not broken_imports(tmp_path)
    with (tmp_path / "configuration_tdlm.py").open("a") as code:
        code.write(f"\n\n{line}\n")
    assert {problem.split(":")[0] for problem in broken_imports(tmp_path)} == {"configuration_tdlm.py"}


def test_modeling_needs_torch_and_transformers_alone():
    printed = in_a_stranger(
        "sys.path.insert(0, sys.argv[1])\n"
        "class NoOthers:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('datasets', 'evaluate'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoOthers())\n"
        "import modeling_tdlm\n"
        "print(modeling_tdlm.TDLMForDiffusionLM.__name__)\n",
        str(Path(__file__).parents[1]),
    )
    assert printed.strip() == "TDLMForDiffusionLM"


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_with_a_wrong_tree_is_refused(name, tmp_path):
    tree = VocabTree.from_nested(EIGHT_LEAVES)
    tiny_model(tree).save_pretrained(tmp_path)
    change, message = WRONG[name]
    tensors = load_file(tmp_path / "model.safetensors")
    change(type("Tables", (), {key.removeprefix("tree."): table for key, table in tensors.items()}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_without_its_tree_is_refused(tmp_path):
    tiny_model(VocabTree.from_nested(EIGHT_LEAVES)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["tree.child_ids"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no complete vocabulary tree: \['tree.child_ids'\] missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_beside_another_tokenizer_is_refused(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    train_tokenizer(["entirely different text to merge here"] * 3, 270, progress=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="built for another tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_reports_what_it_loaded(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert isinstance(model, TDLMForDiffusionLM)
    assert not info["missing_keys"]
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert half.model.embed_nodes.weight.dtype == torch.bfloat16
    assert torch.equal(half.tree.ancestors, model.tree.ancestors)
