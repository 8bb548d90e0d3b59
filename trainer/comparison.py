"""What `tdlm compare` compares: one YAML file -> a checked `Comparison` of models on one corpus, budget and seeds."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer

from tdlm.configuration_mdm_prime import MDMPrimeConfig
from tdlm.configuration_tdlm import TDLMConfig
from tdlm.generation_tdlm import TDLMGenerationConfig
from tdlm.modeling_mdm_prime import MDMPrimeForDiffusionLM
from tdlm.modeling_tdlm import TDLMForDiffusionLM
from tdlm.trainer.causal import CausalTrainer, causal_config
from tdlm.trainer.trainer import TDLMTrainer
from tdlm.trainer.training_args import TDLMTrainingArguments
from tdlm.vocab_tree_tdlm import VocabTree, balanced_nodes_per_height

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "intermediate_size")
TREE_OPTIONS = {
    "clustered": ("branching_factor", "embeddings", "height", "min_size_ratio", "max_size_ratio", "seed"),
    "random": ("branching_factor", "seed"),
    "flat": (),
}
MATCHES = ("depth", "parameters", "flops")
# Fields that follow from the rest of the file, for every model alike.
DERIVED_FIELDS = {
    *("vocab_size", "branching_factor", "nodes_per_height", "max_position_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}
# What makes runs resumable and comparable is not for the file to set.
FIXED_ARGUMENTS = {
    *("output_dir", "seed", "data_seed", "eval_strategy", "eval_seed", "load_best_model_at_end"),
    *("save_strategy", "save_total_limit", "save_only_model", "resume_from_checkpoint", "dataloader_drop_last"),
    *("auto_find_batch_size", "ignore_data_skip", "remove_unused_columns", "label_smoothing_factor"),
}
# The same batches for every model.
BUDGET_ARGUMENTS = {
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("train_sampling_strategy", "accelerator_config"),
}


@dataclass
class DataSection:
    """Where the text comes from. `novels` is the corpus in the package; caps keep the first documents or tokens."""

    train: str = "novels"
    validation: str = "novels"
    text_column: str = "text"
    dataset_config: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    tokenizer: str | None = None
    vocab_size: int = 8192
    max_train_documents: int | None = None
    max_train_tokens: int | None = None
    max_eval_tokens: int | None = None


@dataclass
class GenerativeSection:
    """Samples of each model, and the model (none: no generative perplexity) that scores them."""

    reference: str | None = None
    gguf_file: str | None = None
    num_samples: int = 64
    num_steps: int = 64
    max_new_tokens: int = 64


@dataclass
class ModelSpec:
    """One entry of `models`: its kind, the fields of its configuration, and what it overrides."""

    name: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tree: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    generation: list[dict[str, Any]] = field(default_factory=lambda: [{}])


@dataclass
class Comparison:
    """One YAML file, its sections filled in. `check` builds every configuration, so later nothing can be mistyped."""

    data: DataSection
    backbone: dict[str, int]
    training: dict[str, Any]
    models: dict[str, ModelSpec]
    seeds: list[int]
    match: str = "depth"
    reference: str | None = None
    generative: GenerativeSection = field(default_factory=GenerativeSection)

    def training_settings(self, model: ModelSpec, seed: int) -> dict[str, Any]:
        """Arguments that train `model`: the file's and its own; noise draws, logs and checkpoints by default."""
        settings: dict[str, Any] = {"eval_num_samples": 4, "report_to": [], "disable_tqdm": False}
        settings |= {**self.training, **model.training}
        steps, batch = settings["max_steps"], settings.get("per_device_train_batch_size", 8)
        defaults = {
            "per_device_eval_batch_size": 2 * batch,
            "logging_steps": max(1, steps // 40),
            "save_steps": max(1, steps // 10),
        }
        fixed = {"seed": seed, "data_seed": seed, "dataloader_drop_last": True}
        return {**defaults, **settings, **fixed, "save_strategy": "steps", "save_total_limit": 1}

    def generation_settings(self, model: ModelSpec) -> list[dict[str, Any]]:
        """What each batch of samples of `model` is generated with."""
        steps = {"num_denoising_steps": self.generative.num_steps} if KINDS[model.kind].is_diffusion else {}
        return [{**({} if "steps_per_level" in entry else steps), **entry} for entry in model.generation]

    def check(self, output: str) -> None:
        """Build every configuration, on trees of the right shape, and all training arguments; train nothing."""
        tokenizer = None if self.data.tokenizer is None else AutoTokenizer.from_pretrained(self.data.tokenizer)
        vocabulary = Vocabulary(self.data.vocab_size) if tokenizer is None else Vocabulary.of(tokenizer)
        if self.generative.reference is not None:
            gguf = {} if self.generative.gguf_file is None else {"gguf_file": self.generative.gguf_file}
            AutoTokenizer.from_pretrained(self.generative.reference, **gguf)
        for model in self.models.values():
            try:
                self._check_model(model, output, vocabulary)
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise ValueError(f"models.{model.name}: {error}") from error

    def _check_model(self, model: ModelSpec, output: str, vocabulary: "Vocabulary") -> None:
        kind = KINDS[model.kind]
        tree = None if model.tree is None else tree_of_that_shape(model.tree, vocabulary.size)
        config = kind.config(vocabulary, self.backbone, model.fields, tree)
        TDLMTrainingArguments(output_dir=output, **self.training_settings(model, seed=0))
        with torch.device("meta"):
            untrained = kind.model(config, None)
        length, limit = self.generative.max_new_tokens, self.backbone["max_position_embeddings"]
        if length > limit:
            raise ValueError(f"generative.max_new_tokens={length} is more than the context of {limit}. Lower it.")
        for settings in self.generation_settings(model):
            kind.check_generation(untrained, length, settings)


# ---- kinds of models ----


class Vocabulary(NamedTuple):
    """What a model's configuration takes from the tokenizer."""

    size: int
    token_ids: dict[str, int | None] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        return cls(max(tokenizer.get_vocab().values()) + 1, {name: getattr(tokenizer, name) for name in names})


@dataclass(frozen=True)
class Kind:
    """What `kind:` stands for. `config(vocabulary, sizes, fields, tree)`, `model(config, tree)`."""

    config: Callable[[Vocabulary, dict[str, int], dict[str, Any], VocabTree | None], PreTrainedConfig]
    model: Callable[[Any, VocabTree | None], PreTrainedModel]
    trainer: type[Trainer]
    check_generation: Callable[[Any, int, dict[str, Any]], None]
    has_tree: bool = False
    is_diffusion: bool = True


def _tdlm_config(vocabulary: Vocabulary, sizes: dict, fields: dict, tree: VocabTree | None) -> TDLMConfig:
    _check_fields(fields, TDLMConfig)
    return TDLMConfig.for_tree(tree, "tiny", **{**vocabulary.token_ids, **sizes, **fields})


def _mdm_prime_config(vocabulary: Vocabulary, sizes: dict, fields: dict, tree: VocabTree | None) -> PreTrainedConfig:
    _check_fields(fields, MDMPrimeConfig)
    return MDMPrimeConfig.for_vocab(vocabulary.size, "tiny", **{**vocabulary.token_ids, **sizes, **fields})


def _llama_config(vocabulary: Vocabulary, sizes: dict, fields: dict, tree: VocabTree | None) -> LlamaConfig:
    _check_fields(fields, LlamaConfig)
    return causal_config(vocabulary.size, sizes, **fields)


def _check_fields(fields: dict[str, Any], config_class: type) -> None:
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(config_class)})
    if unknown:
        raise ValueError(f"{unknown} are no fields of {config_class.__name__}.")


def _check_diffusion_generation(model: Any, max_new_tokens: int, settings: dict[str, Any]) -> None:
    config = model._merged_generation_config(TDLMGenerationConfig(), {"max_new_tokens": max_new_tokens, **settings})
    model._sampling_times(max_new_tokens, config)


def _check_causal_generation(model: Any, max_new_tokens: int, settings: dict[str, Any]) -> None:
    unknown = sorted(set(settings) - {"temperature", "top_k", "top_p"})
    if unknown:
        raise ValueError(f"generation sets {unknown}; an autoregressive model has temperature, top_k and top_p.")


KINDS = {
    "tdlm": Kind(_tdlm_config, TDLMForDiffusionLM, TDLMTrainer, _check_diffusion_generation, has_tree=True),
    "mdm_prime": Kind(
        _mdm_prime_config, lambda config, tree: MDMPrimeForDiffusionLM(config), TDLMTrainer, _check_diffusion_generation
    ),
    "llama": Kind(
        _llama_config,
        lambda config, tree: LlamaForCausalLM(config),
        CausalTrainer,
        _check_causal_generation,
        is_diffusion=False,
    ),
}


def tree_of_that_shape(options: dict[str, Any], vocab_size: int) -> VocabTree:
    """A tree with the height and branching factor that `options` lead to; its nodes are not the ones of the data."""
    if options["kind"] == "flat":
        return VocabTree.flat(vocab_size)
    nodes_per_height = balanced_nodes_per_height(vocab_size, options["branching_factor"])
    least = len(nodes_per_height) - 1
    height = options.get("height", least)
    if height < least:
        raise ValueError(
            f"a tree of height={height} with branching_factor={options['branching_factor']} has fewer leaves than the "
            f"{vocab_size} tokens. Use a height of at least {least}."
        )
    missing = height - least
    return VocabTree.contiguous(nodes_per_height + [1] * missing, options["branching_factor"])


# ---- reading ----


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3 for a string and the last of two equal keys for the only one; this loader does not."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"the file names {twice} twice in one section. Keep one of each.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def recipes() -> dict[str, Path]:
    """Name -> file of the comparisons that ship with the package."""
    folder = Path(str(resources.files("tdlm.trainer").joinpath("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_comparison(config: str, data: dict[str, Any] | None = None, generative: Any = None) -> Comparison:
    """A YAML file, or the name of a recipe, -> `Comparison`; `data` and `generative` override fields of these sections.

    Raises `ValueError` where the file does not say what it must, or says what nothing reads.
    """
    path = recipes().get(config, Path(config))
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{config} is neither a .yaml file nor one of the recipes {sorted(recipes())}.")
    settings = yaml.load(path.read_text(), Loader=_Loader)
    if not isinstance(settings, dict):
        raise ValueError(f"{config} must hold `name: value` lines, not {type(settings).__name__}.")
    comparison = parse_comparison(settings)
    return dataclasses.replace(
        comparison,
        data=dataclasses.replace(comparison.data, **_given(data)),
        generative=dataclasses.replace(comparison.generative, **_given(generative)),
    )


def _given(overrides: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (overrides or {}).items() if value is not None}


def parse_comparison(settings: dict[str, Any]) -> Comparison:
    _check_keys("the file", settings, [*Comparison.__dataclass_fields__, "tree"], ["backbone", "training", "models"])
    for name in ("data", "backbone", "training", "generative", "models"):
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{name} must be a section of `name: value` lines, not {settings[name]!r}.")
    data, generative = settings.get("data", {}), settings.get("generative", {})
    _check_keys("data", data, DataSection.__dataclass_fields__)
    _check_keys("generative", generative, GenerativeSection.__dataclass_fields__)
    _check_keys("backbone", settings["backbone"], SIZES, SIZES[:4])
    for name, value in settings["backbone"].items():
        if not _is_positive(value):
            raise ValueError(f"backbone.{name}={value!r} must be a whole number, at least 1.")
    training, seeds = settings["training"], settings.get("seeds", [0])
    _check_training("training", training)
    _check_keys("training", training, required=["max_steps"])
    if not _is_positive(training["max_steps"]):
        raise ValueError(f"training.max_steps={training['max_steps']!r} must be a whole number, at least 1.")
    are_seeds = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not are_seeds or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds} must list different whole numbers from 0, at least one.")
    default_tree = _tree_options("tree", settings.get("tree", "flat"))
    models = {str(name): _model(str(name), entry, default_tree) for name, entry in settings["models"].items()}
    comparison = Comparison(
        data=DataSection(**data),
        backbone=settings["backbone"],
        training=training,
        models=models,
        seeds=seeds,
        match=settings.get("match", "depth"),
        reference=settings.get("reference"),
        generative=GenerativeSection(**generative),
    )
    _check_numbers(comparison)
    _check_match(comparison)
    return comparison


def _check_numbers(comparison: Comparison) -> None:
    optional = ("max_train_documents", "max_train_tokens", "max_eval_tokens")
    for section, names in (
        (comparison.data, ("vocab_size", *optional)),
        (comparison.generative, ("num_samples", "num_steps", "max_new_tokens")),
    ):
        for name in names:
            value = getattr(section, name)
            if not (_is_positive(value) or (value is None and name in optional)):
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")


def _check_match(comparison: Comparison) -> None:
    if not comparison.models:
        raise ValueError("models names no model to compare.")
    if comparison.match not in MATCHES:
        raise ValueError(f"match={comparison.match!r} is not one of {list(MATCHES)}.")
    if comparison.match == "depth":
        if comparison.reference is not None:
            raise ValueError(f"reference={comparison.reference!r} is for match: parameters or flops. Leave it out.")
        return
    if comparison.reference not in comparison.models:
        raise ValueError(
            f"match={comparison.match!r} needs a `reference:` that is one of the models, not {comparison.reference!r}."
        )
    for model in comparison.models.values():
        if "num_hidden_layers" in model.fields:
            raise ValueError(
                f"models.{model.name} sets num_hidden_layers, which match={comparison.match!r} computes. Leave it out."
            )


def _model(name: str, entry: Any, default_tree: dict[str, Any]) -> ModelSpec:
    where = f"models.{name}"
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{where}: a name has letters, digits and `_.+-` only; it names a folder.")
    if not isinstance(entry, dict) or entry.get("kind") not in list(KINDS):
        raise ValueError(f"{where} needs a `kind:`, one of {sorted(KINDS)}.")
    fields = dict(entry)
    kind, tree = fields.pop("kind"), fields.pop("tree", None)
    training, generation = fields.pop("training", {}), fields.pop("generation", [{}])
    if tree is not None and not KINDS[kind].has_tree:
        raise ValueError(f"{where}: kind {kind!r} has no tree. Leave it out.")
    if derived := sorted(DERIVED_FIELDS & set(fields)):
        raise ValueError(f"{where} sets {derived}, which follow from data, tree and backbone, the same for all models.")
    if not isinstance(generation, list) or not generation or not all(isinstance(entry, dict) for entry in generation):
        raise ValueError(f"{where}.generation must list sections of `name: value`, one a batch of samples.")
    _check_training(f"{where}.training", training)
    if budget := sorted(BUDGET_ARGUMENTS & set(training)):
        raise ValueError(f"{where}.training sets {budget}, which must be the same for all models. Set it in training.")
    options = _tree_options(f"{where}.tree", {} if tree is None else tree, default_tree)
    return ModelSpec(name, kind, fields, options if KINDS[kind].has_tree else None, training, generation)


def _tree_options(where: str, tree: Any, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """`flat`, or a section; one without a kind changes the default's options, or is of a clustered tree."""
    section = {"kind": tree} if isinstance(tree, str) else tree
    if not isinstance(section, dict):
        raise ValueError(f"{where}={tree!r} must be `flat` or a section of `name: value` lines.")
    options = section if "kind" in section else {**(default or {"kind": "clustered"}), **section}
    if options["kind"] not in list(TREE_OPTIONS):
        raise ValueError(f"{where}: kind {options['kind']!r} is not one of {sorted(TREE_OPTIONS)}.")
    known = TREE_OPTIONS[options["kind"]]
    _check_keys(where, options, ["kind", *known], known[:1])
    for name in sorted({"branching_factor", "height"} & set(options)):
        if not _is_positive(options[name]):
            raise ValueError(f"{where}.{name}={options[name]!r} must be a whole number, at least 1.")
    return options


def _check_training(where: str, training: Any) -> None:
    if not isinstance(training, dict):
        raise ValueError(f"{where} must be a section of `name: value` lines, not {training!r}.")
    _check_keys(where, training, TDLMTrainingArguments.__dataclass_fields__)
    counts = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
    for name in sorted(counts & set(training)):
        if not _is_positive(training[name]):
            raise ValueError(f"{where}.{name}={training[name]!r} must be a whole number, at least 1.")
    if fixed := sorted(FIXED_ARGUMENTS & set(training)):
        raise ValueError(f"{where} sets {fixed}, which `tdlm compare` sets itself. Leave it out.")


def _check_keys(where: str, section: dict, known: Sequence[str] | dict | None = None, required: Sequence[str] = ()):
    unknown = [] if known is None else sorted(set(map(str, section)) - set(known))
    if unknown:
        raise ValueError(f"{where} sets {unknown}, which is not one of {sorted(known or ())}.")
    missing = [name for name in required if name not in section]
    if missing:
        raise ValueError(f"{where} must set {missing}.")


def _is_positive(value: Any) -> bool:
    return type(value) is int and value >= 1


__all__ = ["KINDS", "Comparison", "Kind", "ModelSpec", "Vocabulary", "load_comparison", "parse_comparison", "recipes"]
