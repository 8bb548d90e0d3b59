"""Configuration of tree-structured diffusion language models."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .process_tdlm import LAWS, LEVEL_WEIGHTINGS, SCHEDULES, validate_thresholds
from .vocab_tree_tdlm import balanced_nodes_per_height, validate_shape

# What each head needs: whether it can tell parents apart that all stand at the root (the direct law).
HEAD_TYPES = {"shared": False, "tied": True, "node": True, "vocab": True, "joint": False}
NEIGHBORHOOD_POOLINGS = ("concat", "mean")
NEIGHBORHOOD_JUMPS = ("synchronous", "independent")
MAX_JOINT_CLASSES = 2**20

# Blocks, width and heads; `small` and `base` are the paper's, matched in parameters to flat 12- and 24-block models.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64},
    "small": {"num_hidden_layers": 17, "hidden_size": 768, "num_attention_heads": 12},
    "base": {"num_hidden_layers": 27, "hidden_size": 1024, "num_attention_heads": 16},
}


@strict
class DiffusionBackboneConfig(PreTrainedConfig):
    r"""
    What every model on the DiT backbone has; use [`TDLMConfig`] or [`MDMPrimeConfig`].

    Args:
        vocab_size: number of tokens.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the DiT backbone;
            `intermediate_size` defaults to 4 times `hidden_size`.
        max_position_embeddings: context length, in tokens.
        rope_theta: base of the rotary positions.
        layer_norm_eps: epsilon of the norms, which run in float32.
        initializer_range: standard deviation of the initial weights.
        time_conditioning: whether the network sees t. The best denoiser given z_t does not depend on it.
        condition_size: width of the condition that modulates the blocks.
        schedule: noise schedule alpha(t), `"linear"` or `"cosine"`.
        loss_weight_clip: largest weight of a position in the training loss, `None` for none. The paper clips at 2 or
            10. It never touches an evaluation: every NELBO is of the unclipped bound.
    """

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 17
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    rope_theta: float | int = 10000.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    time_conditioning: bool = False
    condition_size: int = 128
    schedule: str = "linear"
    loss_weight_clip: float | int | None = 2.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the fields describe one possible backbone."""
        sizes = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("max_position_embeddings", "condition_size"),
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % self.num_attention_heads != 0 or self.head_dim % 2 != 0:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of num_attention_heads="
                f"{self.num_attention_heads}: rotary positions need an even head size."
            )
        self._check_option("schedule", SCHEDULES)
        if self.loss_weight_clip is not None and not self.loss_weight_clip > 0:
            raise ValueError(f"loss_weight_clip={self.loss_weight_clip} must be positive, or None for no clip.")

    def _check_option(self, name: str, options: Any) -> None:
        if getattr(self, name) not in options:
            raise ValueError(f"{name}={getattr(self, name)!r} is not one of {sorted(options)}.")


@strict
class TDLMConfig(DiffusionBackboneConfig):
    r"""
    Configuration of a [`TDLMForDiffusionLM`]: the fields of [`DiffusionBackboneConfig`] and

    Args:
        branching_factor: most children a node has; the head classifies over this many slots.
        nodes_per_height: nodes at each height of the tree, `[vocab_size, ..., 1]`. Default: the balanced tree.
        head_type: what scores the children of a node: `"shared"` (the paper: one vector a child slot), `"tied"` (the
            children's input embeddings), `"node"` (an output embedding a node), `"vocab"` (logits of all tokens,
            renormalised below the node: MDLM on a flat tree, HDLM on two concurrent levels; with
            `tie_word_embeddings` the tokens' input embeddings) or `"joint"` (all children of a neighborhood at once).
        law: law of heights: `"sequential"` (the paper: level by level), `"concurrent"` (all levels at once) or
            `"direct"` (from a token to the root in one jump, scored along the path).
        thresholds: times `0 = t_0 < ... < t_H = 1` at which the levels of the sequential law meet. Default: uniform.
        level_weighting: weights of the levels in the training loss, `"linear"` or `"exponential"` (App. D), or `None`
            for none. Like the clip, it never touches an evaluation.
        level_weighting_scale: lambda of these weights; positive stresses the levels near the root.
        neighborhood_size: consecutive positions that a `"joint"` head scores together (App. C).
        neighborhood_pooling: their hidden states are concatenated (`"concat"`) or averaged (`"mean"`).
        neighborhood_jumps: `"synchronous"` (a neighborhood jumps as one; its joint log-probability is scored) or
            `"independent"` (positions jump by themselves; marginals of the joint distribution are scored).

    ```python
    >>> from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree

    >>> tree = VocabTree.random(vocab_size=4096, branching_factor=64, seed=0)
    >>> model = TDLMForDiffusionLM(TDLMConfig.for_tree(tree, preset="tiny"), tree)
    ```"""

    model_type = "tdlm"

    branching_factor: int = 256
    nodes_per_height: list[int] | None = None
    head_type: str = "tied"
    law: str = "sequential"
    thresholds: list[float | int] | None = None
    level_weighting: str | None = None
    level_weighting_scale: float | int = 1.0
    neighborhood_size: int = 1
    neighborhood_pooling: str = "concat"
    neighborhood_jumps: str = "synchronous"

    def __post_init__(self, **kwargs):
        if self.nodes_per_height is None:
            self.nodes_per_height = balanced_nodes_per_height(self.vocab_size, self.branching_factor)
        super().__post_init__(**kwargs)

    @property
    def tree_shape(self) -> tuple[list[int], int]:
        """Nodes at each height, leaves first, and the branching factor."""
        assert self.nodes_per_height is not None, "set in __post_init__"
        return self.nodes_per_height, self.branching_factor

    @property
    def num_nodes(self) -> int:
        return sum(self.tree_shape[0])

    @property
    def height(self) -> int:
        return len(self.tree_shape[0]) - 1

    @classmethod
    def for_tree(cls, tree: Any, preset: str = "small", **kwargs) -> "TDLMConfig":
        """The configuration of a model over `tree`, in one of the sizes of `PRESETS`; `kwargs` override it."""
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not one of {sorted(PRESETS)}.")
        shape = {
            "vocab_size": tree.vocab_size,
            "branching_factor": tree.branching_factor,
            "nodes_per_height": list(tree.nodes_per_height),
        }
        return cls(**{**PRESETS[preset], **shape, **kwargs})

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the fields describe one possible model."""
        super().validate_architecture()
        validate_shape(*self.tree_shape)
        if self.tree_shape[0][0] != self.vocab_size:
            raise ValueError(
                f"nodes_per_height={self.nodes_per_height} begins with the number of leaves, which must be "
                f"vocab_size={self.vocab_size}."
            )
        self._check_option("head_type", HEAD_TYPES)
        self._check_option("law", LAWS)
        self._validate_law()
        self._validate_neighborhood()

    def _validate_law(self):
        if self.thresholds is not None:
            validate_thresholds(self.thresholds, self.height)
            if self.law != "sequential":
                raise ValueError(f"law={self.law!r} has no thresholds: leave thresholds out, or use law='sequential'.")
        if self.law == "direct" and self.height > 1 and not HEAD_TYPES[self.head_type]:
            raise ValueError(
                f"law='direct' scores a whole path from one position at the root, and head_type={self.head_type!r} "
                "cannot tell the nodes on it apart. Use head_type='tied', 'node' or 'vocab'."
            )
        if self.tie_word_embeddings and self.head_type != "vocab":
            raise ValueError(
                f"tie_word_embeddings=True is for head_type='vocab', not {self.head_type!r}. The tied head of a tree "
                "is head_type='tied'."
            )
        if self.level_weighting is None and self.level_weighting_scale != 1:
            raise ValueError(
                f"level_weighting_scale={self.level_weighting_scale} needs a level_weighting, one of "
                f"{sorted(LEVEL_WEIGHTINGS)}."
            )
        if self.level_weighting is not None:
            self._check_option("level_weighting", LEVEL_WEIGHTINGS)
            if self.level_weighting == "linear" and not self.level_weighting_scale > -1:
                raise ValueError(
                    f"level_weighting_scale={self.level_weighting_scale} must be above -1 for linear level weights, "
                    "or a level would have no weight."
                )

    def _validate_neighborhood(self):
        self._check_option("neighborhood_pooling", NEIGHBORHOOD_POOLINGS)
        self._check_option("neighborhood_jumps", NEIGHBORHOOD_JUMPS)
        if self.neighborhood_size < 1:
            raise ValueError(f"neighborhood_size={self.neighborhood_size} must be at least 1.")
        if self.head_type != "joint":
            for name in ("neighborhood_size", "neighborhood_pooling", "neighborhood_jumps"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)!r} needs head_type='joint', not {self.head_type!r}.")
            return
        if self.law != "sequential":
            raise ValueError(
                f"head_type='joint' needs law='sequential', not {self.law!r}: the positions of a neighborhood must "
                "choose children at the same level."
            )
        classes = self.branching_factor**self.neighborhood_size
        if classes > MAX_JOINT_CLASSES:
            raise ValueError(
                f"branching_factor={self.branching_factor} and neighborhood_size={self.neighborhood_size} give "
                f"{classes} joint classes, more than {MAX_JOINT_CLASSES}. Lower either one."
            )


__all__ = ["HEAD_TYPES", "PRESETS", "DiffusionBackboneConfig", "TDLMConfig"]
