"""Training each model in a process of its own: a fresh interpreter, its own peak memory, one progress bar."""

import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback


def run_in_own_process(target: Callable[[Any], None], argument: Any, what: str) -> None:
    """Run `target(argument)` in a fresh process; raise `OSError` that names `what` if it fails."""
    # Threads that wait asleep: spinning ones make a step 20 times slower where another program uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    process = multiprocessing.get_context("spawn").Process(target=target, args=(argument,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise OSError(f"{what} ended with exit status {process.exitcode}; its error is printed above.")


def short_bars_off() -> None:
    """Keep the progress bars of work that takes long, drop those that flash by."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


class _ProgressOnly(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def quiet(trainer: Trainer) -> None:
    """The progress bar alone: the logs are for the report."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_ProgressOnly)


def peak_memory_mb() -> float:
    """Peak of the device, or of the whole process on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def describe_machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {os.cpu_count()} cores{gpu}"


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def code_version() -> str | None:
    """The git commit of this package's source, `-dirty` if it was changed since; `None` outside a checkout."""
    source = Path(__file__).resolve()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(source.parent)]
        # A virtual environment may lie in the checkout of something else, which does not track this file.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
        return described.stdout.strip()
    return None


def write_json(path: Path, value: Any) -> None:
    """All or nothing: an interruption leaves no half-written file, nor do two processes meet in one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


__all__ = [
    "code_version",
    "describe_machine",
    "peak_memory_mb",
    "quiet",
    "run_in_own_process",
    "short_bars_off",
    "versions",
    "write_json",
]
