"""What `tdlm compare` found: a table, the same as JSON, and plots."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tdlm.trainer.own_process import write_json

# Name of a measure -> its column's head and its format.
COLUMNS = {
    "nelbo": ("NELBO, nats/token", "{:.4f}"),
    "nelbo_standard_error": ("MC error", "{:.4f}"),
    "ppl": ("PPL", "{:.2f}"),
    "bpb": ("bpb", "{:.4f}"),
    "num_hidden_layers": ("layers", "{:.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "parameters_without_embeddings": ("without input embeddings", "{:,.0f}"),
    "flops_per_token": ("MFLOP/token", "{:,.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "training_seconds": ("training, s", "{:,.0f}"),
    "peak_memory_mb": ("peak memory, MB", "{:,.0f}"),
}
SCALES = {"flops_per_token": 1e-6}


def write_comparison(
    folder: Path, comparison: dict[str, Any], runs: list[dict[str, Any]], real: dict[str, Any], command: str | None
) -> dict[str, Any]:
    """Write results.json, table.md and the plots; returns what results.json holds."""
    groups = [[run for run in runs if run["name"] == name] for name in comparison["models"]]
    models = sorted((summarise(group) for group in groups if group), key=lambda model: model["nelbo"]["mean"])
    results: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "made_by": _distinct([run["made_by"] for run in runs]),
        "comparison": comparison,
        "models": models,
        "real_text": real,
        "runs": runs,
    }
    write_json(folder / "results.json", results)
    results["table"] = format_table(results)
    (folder / "table.md").write_text(results["table"], encoding="utf-8")
    if models:
        write_plots(folder, models)
    return results


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one model with several seeds -> mean, standard deviation and values of every measure."""
    # The digits of MDM-Prime are no levels of a tree.
    levels = [name for name in runs[0] if name.startswith("nelbo_level_") and runs[0]["kind"] == "tdlm"]
    measures = [name for name in (*COLUMNS, *levels) if name in runs[0]]
    first = {name: runs[0][name] for name in ("name", "bound", "peak_memory_of")}
    samples = [
        {
            "settings": batches[0]["settings"],
            **{name: _spread([b[name] for b in batches]) for name in ("entropy", "generative_perplexity")},
        }
        for batches in zip(*(run["samples"] for run in runs), strict=True)
    ]
    summary = {name: _spread([run[name] for run in runs]) for name in measures}
    return {**first, "seeds": [run["seed"] for run in runs], "height": len(levels), **summary, "samples": samples}


def _spread(values: list[Any]) -> dict[str, Any] | None:
    if None in values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}


# ---- the table ----


def format_table(results: dict[str, Any]) -> str:
    """Markdown: likelihood and cost, the levels, the samples, and how it was made."""
    models, comparison = results["models"], results["comparison"]
    head = ["model", "bound", "seeds", *(name for name, _ in COLUMNS.values())]
    rows = [
        [model["name"], model["bound"], str(len(model["seeds"])), *(_cell(model, measure) for measure in COLUMNS)]
        for model in models
    ]
    parts = [_markdown(head, rows), _notes(results)]
    trees = [model for model in models if model["height"] > 1]
    if trees:
        levels = range(max(model["height"] for model in trees))[::-1]
        head = ["model", *(f"level {level}" for level in levels)]
        rows = [[model["name"], *(_cell(model, f"nelbo_level_{level}") for level in levels)] for model in trees]
        parts += ["In-level terms of the NELBO, nats per token, from the root down to the tokens (level 0):"]
        parts += [_markdown(head, rows)]
    parts += [_samples_table(models, results["real_text"], comparison["generative"])]
    return "\n\n".join(parts) + "\n"


def _notes(results: dict[str, Any]) -> str:
    comparison = results["comparison"]
    of = {model["peak_memory_of"] for model in results["models"]}
    data, training = comparison["data"], comparison["training"]
    made_by = [f"{by['machine']}; {by['versions']}; commit {by['commit']}" for by in results["made_by"]]
    mixed = " (mixed: compare with care)" if len(made_by) > 1 else ""
    return "\n".join(
        [
            "Mean ± standard deviation over the seeds, sorted by NELBO, on the same held-out windows. `upper bound`: "
            "a seeded Monte Carlo estimate of a true upper bound on the negative log-likelihood, with its error; "
            "`exact`: the negative log-likelihood itself. PPL and bpb follow from it.",
            "FLOPs: counted, forward and backward, eager attention, per token of a window. Peak memory of the "
            f"{' and the '.join(sorted(of))} in training. Training time includes writing checkpoints. Losses of "
            "training are weighted and not comparable.",
            "",
            f"* command: `{results['command']}`",
            f"* data: {data['train']} ({data['train_split']}), {data['validation']} ({data['validation_split']}); "
            f"{training['max_steps']} steps; depth matched by {comparison['match']}",
            f"* {results['date']}; {' and '.join(made_by)}{mixed}",
        ]
    )


def _samples_table(models: Sequence[dict[str, Any]], real: dict[str, Any], section: dict[str, Any]) -> str:
    rows = [["real held-out text", "", _number(real["generative_perplexity"]), f"{real['entropy']:.3f}"]]
    for model in models:
        for batch in model["samples"]:
            settings = ", ".join(f"{name} {value}" for name, value in batch["settings"].items())
            perplexity = _with_spread(batch["generative_perplexity"], "{:.1f}")
            rows += [[model["name"], settings, perplexity, _with_spread(batch["entropy"], "{:.3f}")]]
    head = ["samples of", "settings", "generative PPL", "unigram entropy, nats"]
    return (
        f"{section['num_samples']} samples of {section['max_new_tokens']} tokens a run; generative perplexity under "
        f"{section['reference'] or 'no reference (none was named)'}. It rewards repetition: read it with the "
        f"entropy, both beside those of real text.\n\n{_markdown(head, rows)}"
    )


def _cell(model: dict[str, Any], measure: str) -> str:
    template = COLUMNS[measure][1] if measure in COLUMNS else "{:.4f}"
    return _with_spread(model.get(measure), template, SCALES.get(measure, 1.0))


def _with_spread(spread: dict[str, Any] | None, template: str, scale: float = 1.0) -> str:
    if spread is None:
        return "-"
    text = template.format(spread["mean"] * scale)
    if spread["standard_deviation"]:
        text += f" ± {template.format(spread['standard_deviation'] * scale)}"
    return text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- plots ----


def write_plots(folder: Path, models: Sequence[dict[str, Any]]) -> None:
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(8, 1.5 + 0.4 * len(models)), layout="constrained")
        draw(axes, models)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


def plot_nelbo(axes: Axes, models: Sequence[dict[str, Any]]) -> None:
    """One row a model: a dot for each seed, a line at the mean."""
    for row, model in enumerate(models):
        values = model["nelbo"]["values"]
        axes.plot(values, [row] * len(values), "o", color=_colour(model), alpha=0.6)
        axes.plot(model["nelbo"]["mean"], row, "|", color="black", markersize=16)
    axes.set(xlabel="NELBO, nats per token (grey: exact NLL)")
    _name_rows(axes, models)


def plot_levels(axes: Axes, models: Sequence[dict[str, Any]]) -> None:
    """One stack a tree model."""
    trees = [model for model in models if model["height"] > 0]
    left, height = np.zeros(len(trees)), max((model["height"] for model in trees), default=1)
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, height))
    for level in reversed(range(height)):
        means = [(model.get(f"nelbo_level_{level}") or {"mean": 0.0})["mean"] for model in trees]
        axes.barh(range(len(trees)), means, left=left, color=colours[level], edgecolor="white", label=f"level {level}")
        left += means
    axes.set(xlabel="NELBO by level, nats per token (level 0: tokens)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    _name_rows(axes, trees)


def _plot_against(measure: str, label: str) -> Callable[[Axes, Sequence[dict[str, Any]]], None]:
    def plot(axes: Axes, models: Sequence[dict[str, Any]]) -> None:
        for model in models:
            x, y = model[measure]["mean"], model["nelbo"]["mean"]
            axes.plot(model[measure]["values"], model["nelbo"]["values"], ".", color=_colour(model), alpha=0.6)
            axes.annotate(model["name"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
            axes.plot(x, y, "o", color=_colour(model))
        axes.set(xlabel=label, ylabel="NELBO, nats per token (grey: exact NLL)")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)

    return plot


def _colour(model: dict[str, Any]) -> str:
    return "tab:gray" if model["bound"] == "exact" else "tab:blue"


def _name_rows(axes: Axes, models: Sequence[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(models)), [model["name"] for model in models])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


PLOTS = {
    "nelbo": plot_nelbo,
    "levels": plot_levels,
    "nelbo-against-time": _plot_against("training_seconds", "training time, s"),
    "nelbo-against-throughput": _plot_against("tokens_per_second", "training throughput, tokens/s"),
}

__all__ = ["format_table", "summarise", "write_comparison", "write_plots"]
