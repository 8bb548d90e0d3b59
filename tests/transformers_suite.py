"""transformers' own tests of models and configurations, taken from the source archive of the installed version.

The archive is downloaded once, by name and hash, into the user's cache; nothing of it is kept in this repository. It
holds the files of transformers' `tests` folder but none of its subfolders, so what they import from there has
stand-ins here: `GenerationTesterMixin` and `ExportTesterMixin` come without tests.
"""

import atexit
import hashlib
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers

# Of the archives on the package index, for the versions that our tests run with.
SHA256 = {
    "5.14.0": "9e1a2b345c195d216afd10082394b915a82e339fa09e9013c32094ff835ca9db",
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdlm" / "tests"
PACKAGE = "transformers_tests"  # what their `tests` is called here: half the world has a package of that name
# Marks that their files use. They mean nothing here, but pytest wants to know them.
MARKS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"),
    *("is_training_test", "order"),
)
# What pip says of a connection, as opposed to a package or a hash.
NETWORK_ERRORS = ("connection broken by", "NewConnectionError", "NameResolutionError", "ReadTimeoutError", "ProxyError")
# Every configuration takes these fields, so they are set to what is nobody's default.
COMMON_CONFIG_FIELDS = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "no", 1: "maybe", 2: "yes"},
    "is_encoder_decoder": True,
    "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def load(name: str) -> ModuleType:
    """One of the archive's test modules. Skips the module that asks if the package index cannot be reached."""
    if PACKAGE not in sys.modules:
        _add_package(_extract(_archive(transformers.__version__)))
    return importlib.import_module(f"{PACKAGE}.{name}")


def known_hash(version: str) -> str:
    if version not in SHA256:
        raise ValueError(
            f"no hash of the source archive of transformers {version}, only of {sorted(SHA256)}. Run `pip download "
            f"--no-deps --no-binary transformers transformers=={version}` and add the file's sha256 to "
            "tests/transformers_suite.py."
        )
    return SHA256[version]


def _archive(version: str) -> Path:
    """The source archive, out of the cache or off the index; its hash is right."""
    sha256 = known_hash(version)
    archive = CACHE / f"transformers-{version}.tar.gz"
    if not archive.exists() or hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download(version, sha256, Path(folder))
            os.replace(Path(folder) / archive.name, archive)  # whole or not at all, whoever else is downloading
    return archive


def download(version: str, sha256: str, folder: Path) -> None:
    """pip checks the hash before it looks into the archive."""
    (folder / "wanted.txt").write_text(f"transformers=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", "--retries", "1"]
    command += ["--require-hashes", "-r", "wanted.txt", "-d", "."]
    pip = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if pip.returncode == 0:
        return
    said = pip.stdout + pip.stderr
    if any(words in said for words in NETWORK_ERRORS) and "DO NOT MATCH" not in said:
        pytest.skip("the package index cannot be reached, for transformers' own tests", allow_module_level=True)
    raise RuntimeError(f"`{' '.join(command)}` failed:\n{said}")


def _extract(archive: Path) -> Path:
    """-> the folder of the tests. They read their own source, so it stays until Python ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    with tarfile.open(archive) as members:
        members.extractall(folder.name, [m for m in members if "/tests/" in m.name], filter="data")
    tests = next(Path(folder.name).glob("transformers-*/tests"))
    (tests / "__init__.py").touch()  # not in the archive; the tests of configurations run it
    return tests


def _add_package(tests: Path) -> None:
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG_FIELDS)


def _stand_in(name: str, **contents) -> None:
    module = sys.modules[f"{PACKAGE}.{name}"] = ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(contents)
