"""One self-contained HTML page about a training run: results, curves, the vocabulary tree, a generation step by step.

The page needs no network and opens from disk. All data is embedded as JSON that cannot end its own script element and
is only ever shown as text, so whatever a corpus holds stays inert.
"""

import heapq
import html
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from tdlm.vocab_tree_tdlm import VocabTree

EXAMPLES_PER_NODE = 12
EXAMPLES_PER_LABEL = 3
LABEL_SEPARATOR = " · "

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
_PLACEHOLDER = re.compile(r"__REPORT_(TITLE|DATA)__")


def visible_text(text: str) -> str:
    """A token as it can be read: white space and control characters become signs, an empty token `⟨empty⟩`."""
    return "".join(map(_visible_character, text)) or "⟨empty⟩"


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if ord(character) < 32:
        return chr(0x2400 + ord(character))  # Unicode's control pictures
    return character if character.isprintable() else f"⟨U+{ord(character):04X}⟩"


def tree_for_report(
    tree: VocabTree, token_text: Callable[[int], str], token_counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """The nested dict of `tree` that `write_report` shows.

    A node is `{"id", "label", "count", "tokens"}` and, above the leaves, `"children"` in slot order. `count` is the
    number of vocabulary tokens below; `tokens` are up to 12 of them, the most frequent first (without `token_counts`,
    the lowest ids first). With `token_counts`, (V,) occurrences in a corpus, each node also has their sum below it as
    `"occurrences"`. Raises `ValueError` if the counts are not one per token.
    """
    if token_counts is not None and len(token_counts) != tree.vocab_size:
        raise ValueError(
            f"token_counts has {len(token_counts)} entries, the tree has vocab_size={tree.vocab_size} tokens. "
            "Pass one count per token id."
        )
    occurrences = None if token_counts is None else [int(count) for count in token_counts]
    texts = [visible_text(token_text(token_id)) for token_id in range(tree.vocab_size)]

    def key(token_id: int) -> tuple[int, int]:
        return (-occurrences[token_id] if occurrences else 0, token_id)

    nodes, examples = [], []
    for token_id, text in enumerate(texts):
        leaf = {"id": token_id, "label": text, "count": 1, "tokens": [text]}
        nodes.append(leaf if occurrences is None else leaf | {"occurrences": occurrences[token_id]})
        examples.append([token_id])
    # Internal nodes are numbered by height, so every child is made before its parent.
    for child_ids, child_count in zip(tree.child_ids.tolist(), tree.child_counts.tolist(), strict=True):
        below = child_ids[:child_count]
        best = heapq.nsmallest(EXAMPLES_PER_NODE, (token for child in below for token in examples[child]), key)
        nodes.append(_cluster(len(nodes), [texts[token] for token in best], [nodes[child] for child in below]))
        examples.append(best)
    return {
        "branching_factor": tree.branching_factor,
        "nodes_per_height": list(tree.nodes_per_height),
        "root": nodes[tree.root_id],
    }


def _cluster(node_id: int, tokens: list[str], children: list[dict[str, Any]]) -> dict[str, Any]:
    node = {
        "id": node_id,
        "label": LABEL_SEPARATOR.join(tokens[:EXAMPLES_PER_LABEL]),
        "count": sum(child["count"] for child in children),
        "tokens": tokens,
        "children": children,
    }
    if "occurrences" in children[0]:
        node["occurrences"] = sum(child["occurrences"] for child in children)
    return node


def node_labels(tree_dict: Mapping[str, Any]) -> dict[int, str]:
    """Node id -> label of every node in what `tree_for_report` returned: `trajectory["text"]` of `write_report`."""
    labels, stack = {}, [tree_dict["root"]]
    while stack:
        node = stack.pop()
        labels[node["id"]] = node["label"]
        stack.extend(node.get("children", ()))
    return labels


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: Mapping[str, str | float],
    models: Sequence[Mapping[str, Any]],
    loss_curves: Mapping[str, Sequence[Sequence[float | None]]],
    tree: Mapping[str, Any] | None,
    trajectory: Mapping[str, Any] | None,
    samples: Sequence[Mapping[str, str]],
) -> None:
    """Write one HTML page to `path`. Everything is plain Python data; NaN and infinity are shown as missing.

    Args:
        summary: facts about the run; `"unigram_entropy"`, nats per token, is also shown beside the models.
        models: `{"name", "nelbo", "ppl", "bpb", "parameters", "tokens_per_second", "peak_memory_mb"}` each; a
            missing or None value is left out. `nelbo` is in nats per token, `bpb` in bits per byte.
        loss_curves: `"model: metric"` -> (n, 2) pairs of step and value.
        tree: what `tree_for_report` returns, or None.
        trajectory: `{"steps": [{"step", "level", "t", "ids"}], "text", "vocab_size", "heights"}` or None: ids, (L,)
            node ids after each step, the first before any; text and heights by node id.
        samples: `{"prompt", "text"}` each.
    """
    data = {
        "title": title,
        "summary": summary,
        "models": models,
        "loss_curves": loss_curves,
        "tree": tree,
        "trajectory": trajectory,
        "samples": samples,
    }
    fields = {"TITLE": html.escape(title), "DATA": _inert_json(data)}
    template = resources.files("tdlm.trainer").joinpath("report.html").read_text(encoding="utf-8")
    # One pass over the template: a placeholder's name inside the data is left alone.
    page = _PLACEHOLDER.sub(lambda match: fields[match[1]], template)
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8", errors="xmlcharrefreplace", newline="\n") as file:
        file.write(page)
    os.replace(partial, path)


def _inert_json(data: Any) -> str:
    """JSON for a script element: no character in it can start a tag, a comment or an entity."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """A copy of plain data with None in place of NaN and infinity. Recursion is as deep as the tree is high."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["node_labels", "tree_for_report", "visible_text", "write_report"]
