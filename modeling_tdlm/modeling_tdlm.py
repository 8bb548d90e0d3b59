"""Tree-structured diffusion language model: a DiT backbone over node ids and a head over child slots (2604.03537).

Architecture: pre-norm DiT; LayerNorm without bias, in float32; adaLN-zero (6 D values a block) from a 128-wide
condition; rotary positions; bidirectional attention without biases; tanh-GELU MLP of 4 D; no dropout, no QK-norm.
Shape legend: B sequences, L positions, D hidden size, N nodes, V tokens, H height of the root, K child slots,
R rows: (position, level) pairs that are scored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_tdlm import TDLMConfig
from .generation_tdlm import TDLMGenerationConfig, TDLMGenerationMixin
from .heads_tdlm import HEADS, TiedHead
from .process_tdlm import LAWS, TRAINING_FLOOR, HeightLaw, draw_uniforms, low_discrepancy_times
from .vocab_tree_tdlm import VocabTree

IGNORE_INDEX = -100
AUTO_MAP = {
    "AutoConfig": "configuration_tdlm.TDLMConfig",
    "AutoModel": "modeling_tdlm.TDLMModel",
    "AutoModelForCausalLM": "modeling_tdlm.TDLMForDiffusionLM",
}


@dataclass
class TDLMOutput(ModelOutput):
    """
    Output of [`TDLMForDiffusionLM`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): in training the weighted loss, otherwise an unbiased estimate of the
            NELBO; nats per scored token.
        log_probs (`torch.FloatTensor` of shape `(batch, length, branching_factor)`): log-probabilities of the children
            of the node at each position; -inf for absent children, so everywhere at a leaf. `None` when there is a
            loss: the head then runs only on the rows that are scored.
        level_losses (`torch.FloatTensor` of shape `(height,)`): the terms of `loss` by level; they sum to it.
        level_nelbo (`torch.FloatTensor` of shape `(batch, height)`): evaluation only, nats per sequence by level.
        num_tokens (`torch.LongTensor` of shape `(batch,)`): evaluation only, scored tokens in each sequence.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    level_losses: torch.Tensor | None = None
    level_nelbo: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class TDLMNelboOutput(ModelOutput):
    """
    Output of [`TDLMForDiffusionLM.nelbo`]: an unbiased estimate of an upper bound on -log p, in nats.

    Args:
        nelbo (`torch.FloatTensor` of shape `(batch,)`): nats per sequence.
        standard_error (`torch.FloatTensor` of shape `(batch,)`): of `nelbo`, over the samples as if they
            were independent; they are one even grid, so this is more than the true error. NaN for one sample.
        level_nelbo (`torch.FloatTensor` of shape `(batch, height)`): the terms of `nelbo` by level.
        num_tokens (`torch.LongTensor` of shape `(batch,)`): scored tokens.
    """

    nelbo: torch.Tensor | None = None
    standard_error: torch.Tensor | None = None
    level_nelbo: torch.Tensor | None = None
    num_tokens: torch.Tensor | None = None


# ---- backbone ----


class TDLMLayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        normed = F.layer_norm(hidden_states.to(dtype), self.weight.shape, self.weight.to(dtype), eps=self.eps)
        return normed.to(hidden_states.dtype)


class TDLMTimeEmbedding(nn.Module):
    """t in [0, 1] -> the condition: sinusoids, Linear, SiLU, Linear."""

    num_frequencies = 128
    time_scale = 1000.0  # spreads [0, 1] over the sinusoids' range

    def __init__(self, config: TDLMConfig):
        super().__init__()
        self.in_proj = nn.Linear(2 * self.num_frequencies, config.condition_size)
        self.out_proj = nn.Linear(config.condition_size, config.condition_size)

    def forward(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        exponent = torch.arange(self.num_frequencies, device=timesteps_B.device) / self.num_frequencies
        angles = self.time_scale * timesteps_B.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.in_proj.weight.dtype)
        return self.out_proj(F.silu(self.in_proj(sinusoids)))


def rotary_embedding(
    position_ids: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) positions -> cos and sin, (B, 1, L, head_dim). Computed each time: a buffer would not survive loading."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponent
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class TDLMAttention(nn.Module):
    """Bidirectional multi-head attention with rotary positions."""

    def __init__(self, config: TDLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, L, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(B, L, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (apply_rotary(states, *position_embeddings) for states in (query, key))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(B, L, -1).contiguous()), weights


class TDLMMLP(nn.Module):
    def __init__(self, config: TDLMConfig):
        super().__init__()
        assert config.intermediate_size is not None, "set in __post_init__"
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden_states), approximate="tanh"))


class TDLMBlock(GradientCheckpointingLayer):
    """One DiT block: the condition shifts, scales and gates both branches. It starts as the identity."""

    def __init__(self, config: TDLMConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = TDLMAttention(config, layer_idx)
        self.mlp_norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = TDLMMLP(config)
        self.modulation = nn.Linear(config.condition_size, 6 * config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=-1)
        modulated = self.attn_norm(hidden_states) * (1 + attn_scale) + attn_shift
        attended, _ = self.self_attn(modulated, position_embeddings, attention_mask, **kwargs)
        hidden_states = hidden_states + attn_gate * attended
        modulated = self.mlp_norm(hidden_states) * (1 + mlp_scale) + mlp_shift
        return hidden_states + mlp_gate * self.mlp(modulated)


class TDLMPreTrainedModel(PreTrainedModel):
    config: TDLMConfig
    config_class = TDLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TDLMBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": TDLMBlock, "attentions": TDLMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Linear and embedding: normal(0, initializer_range), biases 0; norms 1; modulations 0 (adaLN-zero)."""
        super()._init_weights(module)
        if isinstance(module, TDLMBlock):
            _zero(module.modulation)
        elif isinstance(module, TDLMModel):
            _zero(module.final_modulation)
        elif isinstance(module, TiedHead):
            init.zeros_(module.bias)
        elif isinstance(module, VocabTree):
            module.init_weights()

    def save_pretrained(self, *args, **kwargs):
        if self._auto_class is not None:
            # Every class of the package, not only the saved one: AutoModel must find the backbone of a full checkpoint.
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            "a tree model has one embedding a node, so its vocabulary cannot be resized by itself. Build a tree for "
            "the new tokenizer (`tdlm tree build`) and a model for that tree (`TDLMConfig.for_tree`)."
        )


def _zero(linear: nn.Linear) -> None:
    init.zeros_(linear.weight)
    init.zeros_(linear.bias)


class TDLMModel(TDLMPreTrainedModel):
    """The backbone: node ids -> hidden states, normed and modulated, ready for a head."""

    _keys_to_ignore_on_load_unexpected = [r"^tree\.", r"^head\."]

    def __init__(self, config: TDLMConfig):
        super().__init__(config)
        self.embed_nodes = nn.Embedding(config.num_nodes, config.hidden_size)
        self.time_embedding = TDLMTimeEmbedding(config)
        self.layers = nn.ModuleList([TDLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.final_modulation = nn.Linear(config.condition_size, 2 * config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_nodes

    def set_input_embeddings(self, value: nn.Embedding):
        self.embed_nodes = value

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        r"""
        input_ids: (B, L) node ids z_t.
        timesteps: (B,) times in [0, 1]; needed by a model with `time_conditioning`, ignored by others.
        attention_mask: (B, L), 0 where a position is padding that must not be seen.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        hidden_BLD = self.embed_nodes(input_ids) if inputs_embeds is None else inputs_embeds
        B, L, _ = hidden_BLD.shape
        if position_ids is None:
            position_ids = torch.arange(L, device=hidden_BLD.device)[None]
        condition = self._condition(timesteps, B, hidden_BLD.device)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_BLD, attention_mask=attention_mask)
        rotary = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta, hidden_BLD.dtype)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, condition, rotary, attention_mask=mask, **kwargs)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_BLD) * (1 + scale) + shift)

    def _condition(self, timesteps: torch.Tensor | None, batch_size: int, device: torch.device) -> torch.Tensor:
        """(B, 1, condition_size), or (1, 1, condition_size) of t = 0 for a model that does not see the time."""
        if not self.config.time_conditioning:
            timesteps = torch.zeros(1, device=device)
        elif timesteps is None:
            raise ValueError("this model has time_conditioning=True: pass timesteps, (batch,) times in [0, 1].")
        elif timesteps.shape != (batch_size,):
            raise ValueError(
                f"timesteps has shape {tuple(timesteps.shape)}; pass one time a sequence, ({batch_size},)."
            )
        return F.silu(self.time_embedding(timesteps))[:, None]


# ---- the diffusion language model ----


class TDLMForDiffusionLM(TDLMPreTrainedModel, TDLMGenerationMixin):
    """A tree-structured diffusion language model: backbone, vocabulary tree, law of heights, child head.

    Its loss is a sum of in-level child classifications (Thm 3.4, Cor. 3.5): without a clip a true upper bound on
    the negative log-likelihood for any head and law.
    """

    generation_config_class = TDLMGenerationConfig

    def __init__(self, config: TDLMConfig, tree: VocabTree | None = None):
        super().__init__(config)
        self.model = TDLMModel(config)
        self.head = HEADS[config.head_type](config)
        shape = config.tree_shape
        if tree is not None and (tree.nodes_per_height, tree.branching_factor) != shape:
            raise ValueError(
                f"the tree has nodes_per_height={tree.nodes_per_height} and branching_factor={tree.branching_factor}, "
                f"the config {shape[0]} and {shape[1]}. Make the config with `TDLMConfig.for_tree(tree)`."
            )
        self.tree = VocabTree(*shape)
        self.law: HeightLaw = LAWS[config.law].from_config(config)
        self.post_init()
        if tree is not None:
            self.tree.load_state_dict(tree.state_dict())

    # ---- loading: a tree from a stranger is validated before it is used ----

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return_info = kwargs.pop("output_loading_info", False)
        loading = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if key.startswith("tree."))
        if missing:
            raise ValueError(f"{pretrained_model_name_or_path} holds no complete vocabulary tree: {missing} missing.")
        if not model.tree.ancestors.is_meta:
            model.tree.validate()
            _check_saved_tokenizer(model.tree, pretrained_model_name_or_path, loading)
        return (model, info) if return_info else model

    # ---- forward ----

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> TDLMOutput:
        r"""
        input_ids: (B, L) node ids z_t; clean token ids when `labels` come without `timesteps`.
        timesteps: (B,) times in [0, 1].
        attention_mask: (B, L), 0 where a position is padding that must not be seen.
        labels: (B, L) clean token ids, -100 where a position is context: never noised, never scored.
            With `timesteps`, `input_ids` are taken as noised and the loss is deterministic. Without, forward draws
            time and noise itself: in training for the weighted loss, otherwise for an estimate of the NELBO.
        num_items_in_batch: divisor of the training loss (the Trainer's, for accumulation). Default: scored tokens.
        generator: source of the noise drawn here.
        """
        context = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        if labels is None:
            outputs = self.model(input_ids, timesteps, inputs_embeds=inputs_embeds, **context)
            log_probs = None if input_ids is None else self.child_log_probs(outputs.last_hidden_state, input_ids)
            return TDLMOutput(log_probs=log_probs, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        if input_ids is None:
            raise ValueError("a loss needs input_ids: the heights of z_t are read from its node ids.")
        if timesteps is not None and timesteps.dtype in (torch.bfloat16, torch.float16):
            # Rounded so far, a time can fall into another level, where its positions have weight 0.
            raise ValueError(f"timesteps are {timesteps.dtype}; the weights of a loss need float32 or float64 times.")
        if timesteps is None and not self.training:
            return self._evaluation_output(input_ids, labels, context, num_items_in_batch, generator)
        if timesteps is None:
            input_ids, timesteps = self._noise(input_ids, labels, generator)
        outputs = self.model(input_ids, timesteps, **context)
        level_losses = self.level_losses(outputs.last_hidden_state, input_ids, timesteps, labels, num_items_in_batch)
        return TDLMOutput(
            loss=level_losses.sum(),
            level_losses=level_losses.detach(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def child_log_probs(self, hidden_BLD: torch.Tensor, node_ids_BL: torch.Tensor) -> torch.Tensor:
        """(B, L, D) hidden states, (B, L) node ids -> (B, L, K) log-probabilities of children; -inf at leaves."""
        is_leaf = node_ids_BL < self.tree.vocab_size
        node_ids_R = node_ids_BL.masked_fill(is_leaf, self.tree.root_id).flatten()
        log_probs = self.head(hidden_BLD.flatten(0, 1), node_ids_R, self.tree, self.model.embed_nodes.weight)
        return log_probs.unflatten(0, node_ids_BL.shape).masked_fill(is_leaf[..., None], float("-inf"))

    # ---- training loss ----

    def _noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean ids and labels -> z_t and low-discrepancy times."""
        B, device = input_ids.shape[0], input_ids.device
        t = low_discrepancy_times(draw_uniforms((), generator, device), torch.arange(B, device=device), total=B)
        return self.noise(input_ids, labels, t, draw_uniforms(input_ids.shape, generator, device)), t

    def noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) clean token ids, labels, (B,) times, (B, L) uniforms -> (B, L) node ids z_t ~ q(. | x). Lemma 3.1."""
        heights = self.law.sample_heights(t, uniforms)
        return self.tree.ancestor(input_ids, heights * (labels != IGNORE_INDEX))

    def level_losses(
        self,
        hidden_BLD: torch.Tensor,
        z_t: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """-> (H,) in-level terms of the weighted loss, nats per item. Thm 3.4, weights floored and clipped."""
        heights = self.tree.node_height(z_t)
        scored = labels != IGNORE_INDEX
        floor, clip = (TRAINING_FLOOR, self.config.loss_weight_clip) if self.training else (0.0, None)
        weights = self.law.position_weights(timesteps, heights, floor)
        weights = weights if clip is None else weights.clamp(max=clip)
        is_scored_HBL = self.law.levels_of_jump().to(z_t.device)[heights].movedim(-1, 0) & scored
        level_R, position_R, nll_R = self._path_nll(hidden_BLD, labels, is_scored_HBL)
        weights_R = weights.flatten()[position_R].to(nll_R.dtype)
        losses = nll_R.new_zeros(self.tree.height).index_add(0, level_R, nll_R * weights_R)
        return losses / (scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _path_nll(
        self, hidden_BLD: torch.Tensor, x_0: torch.Tensor, is_scored_HBL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which (level, position) pairs to score -> (R,) levels, (R,) flat positions, (R,) -log p(child on x_0's path).

        All levels of one position are scored from its one hidden state, each below the node on the true path.
        """
        level_R, position_R = is_scored_HBL.flatten(1).nonzero(as_tuple=True)
        token_R = x_0.flatten()[position_R]
        nll_R = self.head.nll(
            hidden_BLD.flatten(0, 1).index_select(0, position_R),
            self.tree.ancestor(token_R, level_R + 1),
            self.tree.child_slot(token_R, level_R),
            self.tree,
            self.model.embed_nodes.weight,
        )
        return level_R, position_R, nll_R

    # ---- the bound ----

    @torch.no_grad()
    def nelbo(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> TDLMNelboOutput:
        """Estimate the NELBO of each sequence: an upper bound on -log p(tokens), never clipped or floored.

        Args:
            input_ids: (B, L) clean token ids.
            attention_mask: (B, L), 0 at padding, which is neither seen nor scored.
            labels: (B, L), -100 at clean context: the bound is then on -log p(the rest | context).
            num_samples: noise draws a sequence; one forward pass each.
            generator: source of the noise.

        Each draw picks a kind of jump and its time from the jumps' own density, which has no singular weight, puts one
        position at the jump's upper height, and averages over all positions that stand there (exchangeable given z_t):

            NELBO = sum_j integral b_j(t) m_lower(t) sum_i E[-log p(child_i) | position i at the upper height] dt
        """
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1.")
        labels = input_ids if labels is None else labels
        labels = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
        B, J, device = input_ids.shape[0], num_samples, input_ids.device
        # Sequence i gets an even grid over its own draws, and the batch an even grid over all of them.
        index_BJ = torch.arange(B, device=device)[:, None] + B * torch.arange(J, device=device)
        u_BJ = low_discrepancy_times(draw_uniforms((), generator, device), index_BJ, total=B * J)
        draws_JBH = torch.stack(
            [self._nelbo_draw(input_ids, labels, u_B, generator, attention_mask=attention_mask) for u_B in u_BJ.T]
        )
        per_draw = draws_JBH.sum(-1)
        error = per_draw.std(0) / J**0.5 if J > 1 else torch.full_like(per_draw[0], float("nan"))
        level_nelbo = draws_JBH.mean(0)
        return TDLMNelboOutput(
            nelbo=level_nelbo.sum(-1),
            standard_error=error,
            level_nelbo=level_nelbo,
            num_tokens=(labels != IGNORE_INDEX).sum(1),
        )

    def _nelbo_draw(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        u_B: torch.Tensor,
        generator: torch.Generator | None,
        **context: Any,
    ) -> torch.Tensor:
        """One draw of the jump-conditioned estimator -> (B, H) nats per sequence and level."""
        device = input_ids.device
        scored = labels != IGNORE_INDEX
        t, jump = self.law.sample_jump_times(u_B)
        lower, upper = torch.tensor(self.law.jumps, device=device)[jump].T
        heights = self.law.sample_heights(t, draw_uniforms(input_ids.shape, generator, device))
        jumper = torch.where(scored, draw_uniforms(input_ids.shape, generator, device), -1.0).argmax(1, keepdim=True)
        heights = heights.scatter(1, jumper, upper[:, None]) * scored
        hidden_BLD = self.model(self.tree.ancestor(input_ids, heights), t, **context).last_hidden_state
        waits = (heights == upper[:, None]) & scored
        level_H = torch.arange(self.tree.height, device=device)[:, None, None]
        is_scored_HBL = waits & (level_H >= lower[:, None]) & (level_H < upper[:, None])
        level_R, position_R, nll_R = self._path_nll(hidden_BLD, labels, is_scored_HBL)
        sequence_R = position_R // input_ids.shape[1]
        sums_BH = nll_R.new_zeros(len(input_ids), self.tree.height).index_put(
            (sequence_R, level_R), nll_R, accumulate=True
        )
        # scored / waiting: the mean over the waiting positions stands for every position of the sequence.
        scale_B = len(self.law.jumps) * scored.sum(1) / waits.sum(1).clamp(min=1)
        return sums_BH * scale_B[:, None]

    def _evaluation_output(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        context: dict,
        num_items_in_batch: torch.Tensor | int | None,
        generator: torch.Generator | None,
    ) -> TDLMOutput:
        """One draw of the NELBO for each sequence; the loss is per scored token. Padding is not scored."""
        if context["attention_mask"] is not None:
            labels = labels.masked_fill(context["attention_mask"] == 0, IGNORE_INDEX)
        B, device = input_ids.shape[0], input_ids.device
        u_B = low_discrepancy_times(draw_uniforms((), generator, device), torch.arange(B, device=device), total=B)
        level_nelbo = self._nelbo_draw(input_ids, labels, u_B, generator, **context)
        num_tokens = (labels != IGNORE_INDEX).sum(1)
        num_items = num_tokens.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        level_losses = level_nelbo.sum(0) / num_items
        return TDLMOutput(
            loss=level_losses.sum(), level_losses=level_losses, level_nelbo=level_nelbo, num_tokens=num_tokens
        )


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _check_saved_tokenizer(tree: VocabTree, name_or_path: Any, hub_arguments: dict[str, Any]) -> None:
    """If a fast tokenizer lies beside the weights, it must be the one the tree was built for."""
    if name_or_path is None or not tree.vocab_hash.any():
        return
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name_or_path, "tokenizer.json", **hub_arguments, **optional)
    if path is not None:
        tree.check_tokenizer(PreTrainedTokenizerFast(tokenizer_file=path))


__all__ = ["TDLMForDiffusionLM", "TDLMModel", "TDLMNelboOutput", "TDLMOutput", "TDLMPreTrainedModel"]
