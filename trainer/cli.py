"""The `tdlm` command: tree, train, evaluate, generate, compare, quickstart."""

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.generation.streamers import BaseStreamer

from tdlm.streamer_tdlm import TreeTextStreamer
from tdlm.tokenization import build_tree, file_embeddings, format_statistics, tree_outline, tree_statistics
from tdlm.trainer.compare import run_compare
from tdlm.trainer.comparison import recipes
from tdlm.trainer.data import evaluation_windows, load_text, tokenize
from tdlm.trainer.quickstart import run_quickstart
from tdlm.trainer.run import ScriptArguments, make_tree, run_training
from tdlm.trainer.trainer import MODEL_TYPES, TDLMTrainer
from tdlm.trainer.training_args import TDLMTrainingArguments
from tdlm.vocab_tree_tdlm import VocabTree

# What bad input raises, here and in the libraries that read it.
USER_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    StrictDataclassError,
    yaml.YAMLError,
    SafetensorError,
    DatasetGenerationError,
)

# ---- commands: arguments -> what to print (text), or a dict for --json ----


def tree_build(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"--output {args.output}: its folder does not exist.")
    options = {"height": args.height, "min_size_ratio": args.min_size_ratio, "max_size_ratio": args.max_size_ratio}
    name = args.tokenizer or args.model  # a model brings its own tokenizer
    if name is None and args.corpus is not None:
        raise ValueError("--corpus needs --tokenizer, which turns its text into tokens.")
    if name is None:
        tree = build_tree(file_embeddings(args.embeddings), args.branching_factor, seed=args.seed, **options)
    else:
        tokenizer, sequences = AutoTokenizer.from_pretrained(name), None
        if args.corpus is not None:
            documents = tokenize(
                load_text(args.corpus, text_column=args.text_column), tokenizer, text_column=args.text_column
            )
            sequences = (row["input_ids"] for row in documents)
        source = "corpus" if args.corpus is not None else args.embeddings or args.model
        tree = make_tree(tokenizer, args.branching_factor, source, sequences, args.seed, **options)
    tree.save(args.output)
    return {"output": args.output, **tree_statistics(tree)}


def tree_show(args: argparse.Namespace) -> str:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    tree = VocabTree.load(args.tree)
    if tokenizer is not None:
        tree.check_tokenizer(tokenizer)
    return tree_outline(tree, tokenizer, max_depth=args.max_depth, max_children=args.max_children, node_id=args.node)


def tree_stats(args: argparse.Namespace) -> dict[str, Any]:
    embeddings = file_embeddings(args.embeddings) if args.embeddings else None
    return tree_statistics(VocabTree.load(args.tree), embeddings)


def train(args: argparse.Namespace) -> dict[str, Any]:
    script, training = parse_training_arguments(args.config, args.overrides)
    metrics = run_training(script, training)
    return {"output_dir": training.output_dir, **metrics}


def parse_training_arguments(
    config: str | None, overrides: Sequence[str]
) -> tuple[ScriptArguments, TDLMTrainingArguments]:
    """A YAML file of script and training arguments, overridden by command-line flags of the same names."""
    parser = HfArgumentParser((ScriptArguments, TDLMTrainingArguments), prog="tdlm train")
    parser.error = _raise_usage_error  # type: ignore[method-assign]  # one line in place of 300 flags
    settings = {} if config is None else yaml.safe_load(Path(config).read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{config} must hold `name: value` lines, not {type(settings).__name__}.")
    known = {action.dest: action for action in parser._actions}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{config} sets {unknown}, which `tdlm train --help` does not list.")
    for name in settings:
        known[name].required = False
    parser.set_defaults(**settings)
    script, training = parser.parse_args_into_dataclasses(args=list(overrides))
    return script, training


def _raise_usage_error(message: str) -> NoReturn:
    raise ValueError(f"{message} (see `tdlm train --help`)")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = _load(args)
    text = load_text(args.data, name=args.dataset_config, split=args.split, text_column=args.text_column)
    windows = evaluation_windows(text, tokenizer, model.config.max_position_embeddings, text_column=args.text_column)
    with tempfile.TemporaryDirectory() as folder:
        training = TDLMTrainingArguments(
            output_dir=folder,
            report_to=[],
            use_cpu=model.device.type == "cpu",
            per_device_eval_batch_size=args.batch_size,
            eval_num_samples=args.num_samples,
            eval_seed=args.seed,
        )
        trainer = TDLMTrainer(model=model, args=training, processing_class=tokenizer)
        metrics = trainer.evaluate(windows, metric_key_prefix="eval")
    wanted = ("nelbo", "ppl", "bpb", "num_")
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {
        "model": args.model,
        "data": args.data,
        "seed": args.seed,
        "num_samples": args.num_samples,
        **{name: value for name, value in metrics.items() if name.startswith(wanted)},
        "note": "nelbo (nats per token), ppl and bpb: Monte Carlo estimates of upper bounds",
    }


def generate(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = _load(args)
    prompt = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False) if args.prompt else {}
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "num_denoising_steps": args.num_steps,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }
    sequences = model.generate(
        input_ids=prompt.get("input_ids"),
        num_return_sequences=args.num_samples,
        generator=torch.Generator(model.device).manual_seed(args.seed),
        streamer=_tree_view(args, model, tokenizer) if args.watch else _StepProgress(),
        **{name: value for name, value in settings.items() if value is not None},
    )
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return {"model": args.model, "prompt": args.prompt, "seed": args.seed, "texts": texts}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    if args.list:
        return {"recipes": {name: _first_comment(path) for name, path in recipes().items()}}
    if args.config is None or args.output is None:
        raise ValueError("compare needs a YAML file or the name of a recipe, and --output. `--list` shows the recipes.")
    data = {"train": args.train_data, "validation": args.validation_data}
    generative = {"reference": args.reference, "gguf_file": args.gguf_file}
    return run_compare(args.config, args.output, args.only, f"tdlm {shlex.join(args.argv)}", data, generative)


def _first_comment(path: Path) -> str:
    return path.read_text().splitlines()[0].removeprefix("# ")


def quickstart(args: argparse.Namespace) -> dict[str, Any]:
    return run_quickstart(args.output, max_steps=args.max_steps, seed=args.seed)


def _tree_view(args: argparse.Namespace, model: Any, tokenizer: Any) -> TreeTextStreamer:
    if args.num_samples != 1:
        raise ValueError(f"--watch shows one sample at a time, not --num-samples {args.num_samples}.")
    if model.config.model_type != "tdlm":
        raise ValueError(f"--watch shows the nodes of a tree; {model.config.model_type} models have none.")
    return TreeTextStreamer(tokenizer, model.tree, sleep_time=0.05)


class _StepProgress(BaseStreamer):
    """A progress bar on standard error, one tick a denoising step."""

    bar: tqdm | None = None

    def put(self, value):
        pass

    def put_draft(self, value):
        if self.bar is None:
            self.bar = tqdm(desc="Denoising", unit=" steps", file=sys.stderr)
        self.bar.update()

    def end(self):
        if self.bar is not None:
            self.bar.close()


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(args.model, revision=args.revision)
    if model.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{args.model} is a {model.config.model_type!r} model; this command needs one of {list(MODEL_TYPES)}."
        )
    if args.device is not None and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here. Leave it out, or use cpu.")
    model = model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    model.check_tokenizer(tokenizer)
    return model, tokenizer


# ---- printing ----


def _print_generate(result: dict[str, Any]) -> None:
    for number, text in enumerate(result["texts"], start=1):
        print(f"--- sample {number} of {len(result['texts'])}, seed {result['seed']} ---\n{text}")


def _print_metrics(result: dict[str, Any]) -> None:
    width = max(len(name) for name in result)
    for name, value in result.items():
        print(f"{name:<{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def _print_build(result: dict[str, Any]) -> None:
    print(format_statistics({name: value for name, value in result.items() if name != "output"}))
    print(f"Saved to {result['output']}. Look at it with `tdlm tree show {result['output']} --tokenizer ...`.")


def _print_compare(result: dict[str, Any]) -> None:
    if "table" in result:
        print(f"\n{result['table']}")
    else:
        _print_metrics(result["recipes"])


def _print_train(result: dict[str, Any]) -> None:
    _print_metrics(result)
    print(f"Saved to {result['output_dir']}. Try it: tdlm generate {result['output_dir']} --num-samples 2")


# ---- the parser ----


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdlm", description="Tree-structured diffusion language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tree = commands.add_parser("tree", help="build, show and measure vocabulary trees")
    _add_tree_commands(tree.add_subparsers(required=True, metavar="ACTION"))

    command = _command(commands, "train", train, _print_train, "train a model from a YAML file")
    command.add_argument("--config", help="YAML file of script and training arguments; flags override it")

    command = _command(commands, "evaluate", evaluate, _print_metrics, "held-out NELBO, perplexity, bits per byte")
    _add_model_arguments(command)
    command.add_argument("--data", required=True, help="text file(s), folder or Hub dataset")
    command.add_argument("--dataset-config", help="configuration of a Hub dataset")
    command.add_argument("--split", default="train", help="split of a Hub dataset (default train)")
    command.add_argument("--text-column", default="text")
    command.add_argument("--num-samples", type=int, default=4, help="noise draws a sequence (default 4)")
    command.add_argument("--batch-size", type=int, default=16)

    command = _command(commands, "generate", generate, _print_generate, "generate text")
    _add_model_arguments(command)
    command.add_argument("--prompt", default="", help="text to continue; none: generate from nothing")
    command.add_argument("--num-samples", type=int, default=1)
    command.add_argument("--max-new-tokens", type=int, help="default: fill the context")
    command.add_argument("--num-steps", type=int, help="denoising steps (default: one a new token)")
    command.add_argument("--temperature", type=float)
    command.add_argument("--top-k", type=int, help="keep the k best children of a node")
    command.add_argument("--watch", action="store_true", help="show the draft: root _, clusters <word>, words")
    command.add_argument("--top-p", type=float, help="keep the best children up to this mass")

    _add_compare_command(commands)

    command = _command(commands, "quickstart", quickstart, lambda result: None, "train a small model in minutes")
    command.add_argument("--output", default="runs/quickstart", help="folder for the model, results and report")
    command.add_argument("--max-steps", type=int, help="training steps of each model (default: for 2 CPU cores)")
    command.add_argument("--seed", type=int, default=0)
    return parser


def _add_compare_command(commands: Any) -> None:
    command = _command(
        commands, "compare", compare, _print_compare, "train models on the same batches and tabulate them"
    )
    command.add_argument("config", nargs="?", help="YAML file, or the name of a recipe that ships")
    command.add_argument("--output", help="folder for data, runs, table and plots; finished runs there are kept")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models to train now")
    command.add_argument("--train-data", help="in place of the file's data.train")
    command.add_argument("--validation-data", help="in place of the file's data.validation")
    command.add_argument("--reference", help="causal model that scores the samples, in place of generative.reference")
    command.add_argument("--gguf-file", help="weights of the reference, if it is a GGUF file in that folder")
    command.add_argument("--list", action="store_true", help="list the recipes that ship")


def _add_tree_commands(actions: Any) -> None:
    command = _command(actions, "build", tree_build, _print_build, "cluster token embeddings into a tree")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", help=".npy or .safetensors file, one row a token")
    source.add_argument("--model", help="Hugging Face model whose input embeddings to use")
    source.add_argument("--corpus", help="text file(s), folder or Hub dataset: co-occurrence embeddings")
    command.add_argument("--tokenizer", help="tokenizer that the tree is for; its vocabulary is recorded")
    command.add_argument("--text-column", default="text")
    command.add_argument("--branching-factor", type=int, default=256, help="most children of a node (default 256)")
    command.add_argument("--height", type=int, help="depth of the leaves (default: the least possible)")
    command.add_argument("--min-size-ratio", type=float, default=0.0, help="smallest node, as a share of the mean")
    command.add_argument("--max-size-ratio", type=float, help="largest node, as a multiple of the mean")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", required=True, help="tree file to write, .safetensors")

    command = _command(actions, "show", tree_show, print, "outline of the nodes and their tokens", as_json=False)
    command.add_argument("tree", help="tree file")
    command.add_argument("--tokenizer", help="tokenizer, to show tokens as text")
    command.add_argument("--node", type=int, help="node id to start from (default: the root)")
    command.add_argument("--max-depth", type=int)
    command.add_argument("--max-children", type=int, default=12)

    command = _command(
        actions, "stats", tree_stats, lambda result: print(format_statistics(result)), "sizes, fill and inertia"
    )
    command.add_argument("tree", help="tree file")
    command.add_argument("--embeddings", help=".npy or .safetensors: also print inertia against free K-means")


def _command(
    commands: Any, name: str, run: Callable, show: Callable, summary: str, as_json: bool = True
) -> argparse.ArgumentParser:
    # `train` leaves --help to the parser of its 150 flags.
    command = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", add_help=run is not train
    )
    command.set_defaults(run=run, show=show, json=False)
    if as_json:
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return command


def _add_model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="checkpoint folder or Hub repository")
    command.add_argument("--revision", default="main")
    command.add_argument("--device", help="default: cuda where there is one")
    command.add_argument("--seed", type=int, default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on standard error and exit status 2."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides, args.argv = rest, list(sys.argv[1:] if argv is None else argv)
    try:
        # Libraries print to standard output while they work; with --json only the result may stand there.
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            result = args.run(args)
    except USER_ERRORS as error:
        print(f"tdlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tdlm: interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(result))
    else:
        args.show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
