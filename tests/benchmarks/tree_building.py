"""Claim: a tree for GPT-2's vocabulary takes seconds, keeps its caps, clusters as K-means does, and is reproducible.

Builds trees from synthetic embeddings, each in a fresh process for each number of threads, and prints a table:
seconds of `build_tree`, peak memory of the process after it, inertia against this package's K-means without caps and
against scikit-learn's, the fullest node over its cap, and whether the files of all thread counts are the same.

    python tests/benchmarks/tree_building.py --json tree_building.json
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from tdlm.tokenization import build_tree, inertia, unconstrained_inertia

GIB = 2**30
COLUMNS = ["data", "threads", "seconds", "peak_gib", "clusters", "fullest", "ratio", "ratio_sklearn", "sha256"]


def gaussian(rng: np.random.Generator, vocab_size: int, dim: int) -> np.ndarray:
    return rng.standard_normal((vocab_size, dim), dtype=np.float32)


def mixture(rng: np.random.Generator, vocab_size: int, dim: int) -> np.ndarray:
    """1000 clusters of uneven size and width, half as far apart as they are wide."""
    centres = 0.5 * rng.standard_normal((1000, dim), dtype=np.float32)
    component = rng.choice(1000, vocab_size, p=rng.dirichlet(np.full(1000, 0.5)))
    widths = rng.uniform(0.5, 1.5, (1000, 1)).astype(np.float32)
    return centres[component] + widths[component] * gaussian(rng, vocab_size, dim)


def separate(rng: np.random.Generator, vocab_size: int, dim: int) -> np.ndarray:
    """400 well separated clusters, many larger than a node: the caps must cut them."""
    centres = rng.standard_normal((400, dim), dtype=np.float32)
    component = rng.choice(400, vocab_size, p=rng.dirichlet(np.full(400, 0.5)))
    return centres[component] + gaussian(rng, vocab_size, dim)


def unseen(rng: np.random.Generator, vocab_size: int, dim: int) -> np.ndarray:
    """60% of the tokens have the zero vector, as those that a small corpus never shows."""
    embeddings = gaussian(rng, vocab_size, dim)
    embeddings[rng.random(vocab_size) < 0.6] = 0
    return embeddings


DATA = {"gaussian": gaussian, "mixture": mixture, "separate": separate, "unseen": unseen}


def measure(arguments: argparse.Namespace, data: str, threads: int, reference: bool) -> dict:
    """Build one tree in this process."""
    torch.set_num_threads(threads)
    embeddings = DATA[data](np.random.default_rng(arguments.seed), arguments.vocab_size, arguments.dim)
    start = time.perf_counter()
    tree = build_tree(embeddings, arguments.branching_factor, height=arguments.height, progress=False)
    row = {"data": data, "threads": threads, "seconds": time.perf_counter() - start}
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux: KiB
    tree.validate()
    row["clusters"] = tree.nodes_per_height[1]
    row["fullest"] = max(
        int(tree.ancestors[height].bincount().max()) / arguments.branching_factor**height
        for height in range(tree.height + 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        tree.save(f"{folder}/tree.safetensors")
        row["sha256"] = hashlib.sha256(Path(folder, "tree.safetensors").read_bytes()).hexdigest()
    if reference:
        tree_inertia = inertia(embeddings, tree)
        row["ratio"] = tree_inertia / unconstrained_inertia(embeddings, row["clusters"])
        kmeans = KMeans(row["clusters"], n_init=1, random_state=0).fit(embeddings)
        row["ratio_sklearn"] = tree_inertia / float(kmeans.inertia_)
    return row


def measure_in_fresh_process(data: str, threads: int, reference: bool) -> dict:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    command = [sys.executable, *sys.argv, "--one", data, str(threads), str(int(reference))]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--branching-factor", type=int, default=256)
    parser.add_argument("--height", type=int)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--no-reference", action="store_true", help="skip the comparison with plain K-means")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        data, threads, reference = arguments.one
        print(json.dumps(measure(arguments, data, int(threads), reference == "1")))
        return
    rows = []
    print("  ".join(f"{column:>13}" for column in COLUMNS))
    for data in arguments.data:
        for threads in arguments.threads:
            reference = not arguments.no_reference and threads == arguments.threads[-1]
            rows.append(measure_in_fresh_process(data, threads, reference))
            shown = (rows[-1].get(column, "") for column in COLUMNS)
            print("  ".join(f"{v:13.4f}" if isinstance(v, float) else f"{str(v)[:12]:>13}" for v in shown), flush=True)
        same = len({row["sha256"] for row in rows if row["data"] == data}) == 1
        print(f"{data}: {'same file' if same else 'DIFFERENT FILES'} for threads {arguments.threads}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": {**vars(arguments), "json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
