"""The wheel: installs `tdlm` and nothing else, with its data, and runs."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """An environment with the wheel, and this one's dependencies on its path but not its editable tdlm."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("tdlm-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    (folder / "before").write_text("\n".join(path.name for path in site_packages(folder).iterdir()))
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    # A path in a .pth file is added without reading the .pth files there, so editable installs stay out.
    (site_packages(folder) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def site_packages(folder: Path) -> Path:
    return next((folder / "venv" / "lib").glob("python*")) / "site-packages"


def test_only_tdlm_appears_in_site_packages(clean_python):
    folder = clean_python.parents[2]
    new = {path.name for path in site_packages(folder).iterdir()} - set((folder / "before").read_text().split("\n"))
    assert {name.split("-")[0] for name in new - {"dependencies.pth"}} == {"tdlm"}


def test_the_wheel_runs(clean_python, tmp_path):
    code = (
        "import tdlm, tdlm.tokenization, tdlm.trainer\n"
        "from tdlm.trainer.quickstart import corpus_file\n"
        "import os\n"
        "assert os.path.getsize(corpus_file('train')) > 1_000_000\n"
        "tree = tdlm.VocabTree.random(50, 4, seed=0)\n"
        "model = tdlm.TDLMForDiffusionLM(tdlm.TDLMConfig.for_tree(tree, 'tiny'), tree)\n"
        "from tdlm.trainer import create_model_card\n"
        "assert '## Use' in create_model_card(model).text\n"
        "print(tdlm.__file__, model.generate(max_new_tokens=3).shape)\n"
    )
    printed = run(str(clean_python), "-c", code, cwd=tmp_path)
    assert str(clean_python.parents[1]) in printed
    assert "[1, 3]" in printed
    assert "usage: tdlm" in run(str(clean_python.parent / "tdlm"), "--help", cwd=tmp_path)
