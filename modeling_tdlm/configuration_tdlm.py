"""Configuration of tree-structured diffusion language models."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .process_tdlm import LAWS, SCHEDULES, validate_thresholds
from .vocab_tree_tdlm import balanced_nodes_per_height, validate_shape

HEAD_TYPES = ("shared", "tied")

# Blocks, width and heads; `small` and `base` are the paper's, matched in parameters to flat 12- and 24-block models.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64},
    "small": {"num_hidden_layers": 17, "hidden_size": 768, "num_attention_heads": 12},
    "base": {"num_hidden_layers": 27, "hidden_size": 1024, "num_attention_heads": 16},
}


@strict
class TDLMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TDLMForDiffusionLM`].

    Args:
        vocab_size: number of tokens, the leaves of the tree.
        branching_factor: most children a node has; the head classifies over this many slots.
        nodes_per_height: nodes at each height of the tree, `[vocab_size, ..., 1]`. Default: the balanced tree.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the DiT backbone;
            `intermediate_size` defaults to 4 times `hidden_size`.
        max_position_embeddings: context length, in tokens.
        rope_theta: base of the rotary positions.
        layer_norm_eps: epsilon of the norms, which run in float32.
        initializer_range: standard deviation of the initial weights.
        time_conditioning: whether the network sees t. The best child distribution given z_t does not depend on it.
        condition_size: width of the condition that modulates the blocks.
        head_type: `"shared"` (the paper: one vector a child slot) or `"tied"` (children scored by their embeddings).
        law: law of heights, `"sequential"` (the paper).
        schedule: in-level schedule, `"linear"` or `"cosine"`.
        thresholds: times `0 = t_0 < ... < t_H = 1` at which levels meet. Default: uniform.
        loss_weight_clip: largest weight of a position in the training loss, `None` for none. The paper clips at 2 or
            10. It never touches an evaluation: every NELBO is of the unclipped bound.

    ```python
    >>> from tdlm import TDLMConfig, TDLMForDiffusionLM, VocabTree

    >>> tree = VocabTree.random(vocab_size=4096, branching_factor=64, seed=0)
    >>> model = TDLMForDiffusionLM(TDLMConfig.for_tree(tree, preset="tiny"), tree)
    ```"""

    model_type = "tdlm"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50257
    branching_factor: int = 256
    nodes_per_height: list[int] | None = None
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
    head_type: str = "tied"
    law: str = "sequential"
    schedule: str = "linear"
    thresholds: list[float | int] | None = None
    loss_weight_clip: float | int | None = 2.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.nodes_per_height is None:
            self.nodes_per_height = balanced_nodes_per_height(self.vocab_size, self.branching_factor)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

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
        sizes = (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
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
        validate_shape(*self.tree_shape)
        if self.tree_shape[0][0] != self.vocab_size:
            raise ValueError(
                f"nodes_per_height={self.nodes_per_height} begins with the number of leaves, which must be "
                f"vocab_size={self.vocab_size}."
            )
        for name, options in (("head_type", HEAD_TYPES), ("law", LAWS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {sorted(options)}.")
        if self.thresholds is not None:
            validate_thresholds(self.thresholds, self.height)
        if self.loss_weight_clip is not None and not self.loss_weight_clip > 0:
            raise ValueError(f"loss_weight_clip={self.loss_weight_clip} must be positive, or None for no clip.")


__all__ = ["HEAD_TYPES", "PRESETS", "TDLMConfig"]
