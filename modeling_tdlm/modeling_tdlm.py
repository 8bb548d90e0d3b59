"""Tree-structured diffusion language model: a DiT backbone over node ids and a head over child slots (2604.03537).

Architecture: pre-norm DiT; LayerNorm without bias, in float32; adaLN (6 D values a block) from a 128-wide
condition; rotary positions; bidirectional attention without biases; tanh-GELU MLP of 4 D; no dropout, no QK-norm.
Shape legend: B sequences, L positions, D hidden size, N nodes, V tokens, H height of the root, K child slots,
R rows: (position, level) pairs that are scored.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, PushToHubMixin, TransformersKwargs, cached_file
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_tdlm import TDLMConfig
from .generation_tdlm import TDLMGenerationConfig, TDLMGenerationMixin
from .heads_tdlm import HEADS, Head, NodeHead, TiedHead, VocabHead
from .pipeline_tdlm import TDLMInfillingPipeline
from .process_tdlm import LAWS, TRAINING_FLOOR, HeightLaw, draw_uniforms, level_weights, low_discrepancy_times
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
    Output of [`TDLMForDiffusionLM`] and [`MDMPrimeForDiffusionLM`], whose levels are its digits.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): in training the weighted loss, otherwise an unbiased estimate of the
            NELBO; nats per scored token.
        log_probs (`torch.FloatTensor` of shape `(batch, length, branching_factor)`): log-probabilities of the children
            of the node at each position; -inf for absent children, so everywhere at a leaf. Of MDM-Prime, `(batch,
            length, num_digits, base)`: of the values of each masked digit. The direct law goes on from the child to a
            token by the same hidden state: `head.path_nll` scores that path. `None` when there is a loss: the head
            then runs only on the rows that are scored.
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
        # The bias's: a quantised weight is of bytes.
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.in_proj.bias.dtype)
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


class TDLMModulation(nn.Linear):
    """The condition -> vectors that shift, scale and gate, side by side; `gates` says which of them gate."""

    def __init__(self, config: TDLMConfig, num_parts: int, gates: tuple[int, ...] = ()):
        super().__init__(config.condition_size, num_parts * config.hidden_size)
        self.num_parts = num_parts
        self.gates = gates

    def init_weights(self, open_gates: bool) -> None:
        """Ignore the condition: no shift, no scale, and every gate open (1) or shut (0: the block is the identity)."""
        bias_PD = torch.zeros_like(self.bias).view(self.num_parts, -1)
        bias_PD[list(self.gates)] = float(open_gates)
        init.zeros_(self.weight)
        init.copy_(self.bias, bias_PD.flatten())


class TDLMBlock(GradientCheckpointingLayer):
    """One DiT block: the condition shifts, scales and gates both branches."""

    def __init__(self, config: TDLMConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = TDLMAttention(config, layer_idx)
        self.mlp_norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = TDLMMLP(config)
        self.modulation = TDLMModulation(config, num_parts=6, gates=(2, 5))

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
    _auto_map = AUTO_MAP

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Linear and embedding: normal(0, initializer_range), biases 0; norms 1; modulations 0, but gates 1 where the
        time is not seen: there is then nothing to condition on, and a plain pre-norm transformer trains faster.

        Only modules with parameters of their own may be named here: of others, code that travels with a checkpoint
        is taken for initialised.
        """
        super()._init_weights(module)
        if isinstance(module, TDLMModulation):
            module.init_weights(open_gates=not self.config.time_conditioning)
        elif isinstance(module, (TiedHead, VocabHead)):
            init.zeros_(module.bias)
            if isinstance(module, (NodeHead, VocabHead)) and module.weight is not None:
                init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, VocabTree):
            module.init_weights()

    def save_pretrained(self, *args, **kwargs):
        if self._auto_class is not None:
            # Every class of the package, not only the saved one: AutoModel must find the backbone of a full checkpoint.
            self.config.auto_map = dict(self._auto_map)
            implementation = f"pipeline_tdlm.{TDLMInfillingPipeline.__name__}"
            self.config.custom_pipelines = {"infilling": {"impl": implementation, "pt": ["AutoModelForCausalLM"]}}
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError(
            "a tree model has one embedding a node, so its vocabulary cannot be resized by itself. Build a tree for "
            "the new tokenizer (`tdlm tree build`) and a model for that tree (`TDLMConfig.for_tree`)."
        )


class TDLMModel(TDLMPreTrainedModel):
    """The backbone: node ids -> hidden states, normed and modulated, ready for a head."""

    _keys_to_ignore_on_load_unexpected = [r"^tree\.", r"^head\."]

    def __init__(self, config: TDLMConfig):
        super().__init__(config)
        self.embed_nodes = self._make_embedding(config)
        self.time_embedding = TDLMTimeEmbedding(config)
        self.layers = nn.ModuleList([TDLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = TDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.final_modulation = TDLMModulation(config, num_parts=2)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def _make_embedding(config: Any) -> nn.Embedding:
        return nn.Embedding(config.num_nodes, config.hidden_size)

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
        **kwargs: Unpack[TransformersKwargs],
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


class DiffusionLM(TDLMPreTrainedModel, TDLMGenerationMixin, ABC):
    """What a tree model and [`MDMPrimeForDiffusionLM`] share: two losses around their own noise and scores."""

    generation_config_class = TDLMGenerationConfig
    noise_draws_per_token = 1  # uniforms that `noise` needs for each token
    vocabulary_module: str  # the submodule that says what the tokens are: `validate`, `check_tokenizer`, `vocab_hash`

    @abstractmethod
    def child_log_probs(self, hidden_BLD: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """Hidden states and the canvas they come from -> log-probabilities of what each position may become."""

    @abstractmethod
    def noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) clean token ids, labels, (B,) times, (B, L * noise_draws_per_token) uniforms -> z_t ~ q(. | x)."""

    @abstractmethod
    def level_losses(
        self,
        hidden_BLD: torch.Tensor,
        z_t: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """-> (H,) in-level terms of the weighted loss, nats per item."""

    @abstractmethod
    def _nelbo_draw(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        u_B: torch.Tensor,
        generator: torch.Generator | None,
        **context: Any,
    ) -> torch.Tensor:
        """One draw of the jump-conditioned estimator of the bound -> (B, H) nats per sequence and level."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The head's layer, if it is one: quantisers keep it as it is, PEFT's `all-linear` leaves it out."""
        return getattr(self.head, "proj", None)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ValueError` if the model was made for another vocabulary."""
        getattr(self, self.vocabulary_module).check_tokenizer(tokenizer)

    # ---- loading: a vocabulary table from a stranger is validated before it is used ----

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return_info = kwargs.pop("output_loading_info", False)
        loading = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        name = cls.vocabulary_module
        missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{name}."))
        if missing:
            raise ValueError(f"{pretrained_model_name_or_path} holds no complete vocabulary {name}: {missing} missing.")
        vocabulary = getattr(model, name)
        if not vocabulary.vocab_hash.is_meta:
            vocabulary.validate()
            _check_saved_tokenizer(vocabulary, pretrained_model_name_or_path, loading)
        return (model, info) if return_info else model

    # ---- pushing ----

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        commit_message: str = "Upload model",
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """[`~utils.PushToHubMixin.push_to_hub`] that takes the tokenizer along, in the same commit.

        Raises `ValueError`, before anything is sent, if the model was made for another tokenizer.
        """
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        pushed = _ModelAndTokenizer(self, tokenizer)
        tags = [*(self.model_tags or []), *(tags or [])]
        return pushed.push_to_hub(repo_id, commit_message=commit_message, tags=tags or None, **kwargs)

    # ---- forward ----

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
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
        if input_ids is None:
            raise ValueError(
                "pass input_ids: what a position may become depends on the node there; embeddings hide it."
            )
        if labels is None:
            return self._prediction(input_ids, timesteps, context)
        if timesteps is not None and timesteps.dtype in (torch.bfloat16, torch.float16):
            # Rounded so far, a time can fall into another level, where its positions have weight 0.
            raise ValueError(f"timesteps are {timesteps.dtype}; the weights of a loss need float32 or float64 times.")
        if timesteps is None and not self.training:
            return self._evaluation_output(input_ids, labels, context, num_items_in_batch, generator)
        if timesteps is None:
            input_ids, timesteps = self._noise(input_ids, labels, generator)
        outputs = self.model(input_ids, timesteps, **context)
        hidden_BLD, z_t = self.hide_padding(outputs.last_hidden_state, input_ids, attention_mask)
        level_losses = self.level_losses(hidden_BLD, z_t, timesteps, labels, num_items_in_batch)
        return TDLMOutput(
            loss=level_losses.sum(),
            level_losses=level_losses.detach(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prediction(self, z_t: torch.Tensor, timesteps: torch.Tensor | None, context: dict[str, Any]) -> TDLMOutput:
        outputs = self.model(z_t, timesteps, **context)
        log_probs = self.child_log_probs(*self.hide_padding(outputs.last_hidden_state, z_t, context["attention_mask"]))
        return TDLMOutput(log_probs=log_probs, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def hide_padding(
        self, hidden_BLD: torch.Tensor, z_t: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head may see of hidden states and canvas; all of it, for a head that looks at one position."""
        return hidden_BLD, z_t

    # ---- training loss ----

    def _noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean ids and labels -> z_t and low-discrepancy times."""
        B, device = input_ids.shape[0], input_ids.device
        t = low_discrepancy_times(draw_uniforms((), generator, device), torch.arange(B, device=device), total=B)
        shape = (B, input_ids.shape[1] * self.noise_draws_per_token)
        return self.noise(input_ids, labels, t, draw_uniforms(shape, generator, device)), t

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


class _ModelAndTokenizer(PushToHubMixin):
    """Saved into one folder, so pushed in one commit."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None):
        self.model, self.tokenizer = model, tokenizer

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        self.model.save_pretrained(save_directory, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)


class TDLMForDiffusionLM(DiffusionLM):
    """A tree-structured diffusion language model: backbone, vocabulary tree, law of heights, head.

    Its loss is a sum of in-level child classifications (Thm 3.4, Cor. 3.5): without a clip and level weights a true
    upper bound on the negative log-likelihood, for any head and law.
    """

    vocabulary_module = "tree"

    def __init__(self, config: TDLMConfig, tree: VocabTree | None = None):
        super().__init__(config)
        self.model = TDLMModel(config)
        self.head: Head = HEADS[config.head_type](config)
        shape = config.tree_shape
        if tree is not None and (tree.nodes_per_height, tree.branching_factor) != shape:
            raise ValueError(
                f"the tree has nodes_per_height={tree.nodes_per_height} and branching_factor={tree.branching_factor}, "
                f"the config {shape[0]} and {shape[1]}. Make the config with `TDLMConfig.for_tree(tree)`."
            )
        self.tree = VocabTree(*shape)
        self.law: HeightLaw = LAWS[config.law].from_config(config)
        # Positions that jump as one.
        self.jump_unit = config.neighborhood_size if config.neighborhood_jumps == "synchronous" else 1
        self.post_init()
        if tree is not None:
            self.tree.load_state_dict(tree.state_dict())

    def child_log_probs(self, hidden_BLD: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        """(B, L, D) hidden states, (B, L) node ids -> (B, L, K) log-probabilities of children; -inf at leaves."""
        return self.head.log_probs(hidden_BLD, z_t, self.tree, self.node_embeddings)

    def hide_padding(
        self, hidden_BLD: torch.Tensor, z_t: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a neighborhood's padding a joint head sees what it sees where there is none: token 0, hidden state 0."""
        if attention_mask is None or self.config.neighborhood_size == 1:
            return hidden_BLD, z_t
        if bool((attention_mask[:, :1] == 0).any()):
            raise ValueError(
                f"padding on the left would shift the neighborhoods of {self.config.neighborhood_size} positions. Pad "
                "on the right."
            )
        is_padding = attention_mask == 0
        return hidden_BLD.masked_fill(is_padding[..., None], 0.0), z_t.masked_fill(is_padding, 0)

    # ---- training loss ----

    def noise(
        self, input_ids: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, uniforms: torch.Tensor
    ) -> torch.Tensor:
        """(B, L) clean token ids, labels, (B,) times, (B, L) uniforms -> (B, L) node ids z_t ~ q(. | x). Lemma 3.1."""
        heights = self.law.sample_heights(t, self.one_per_unit(uniforms))
        return self.tree.ancestor(input_ids, heights * (labels != IGNORE_INDEX))

    def one_per_unit(self, values_BL: torch.Tensor) -> torch.Tensor:
        """(B, L) -> (B, L) in which positions that jump as one have the value of their first."""
        return values_BL[:, self._unit_of_position(values_BL) * self.jump_unit]

    def _unit_of_position(self, values_BL: torch.Tensor) -> torch.Tensor:
        return torch.arange(values_BL.shape[1], device=values_BL.device) // self.jump_unit

    def _count_units(self, mask_BL: torch.Tensor) -> torch.Tensor:
        """(B, L) bool -> (B,) units with a position in the mask."""
        padded = F.pad(mask_BL, (0, -mask_BL.shape[1] % self.jump_unit))
        return padded.unflatten(1, (-1, self.jump_unit)).any(-1).sum(1)

    def level_losses(
        self,
        hidden_BLD: torch.Tensor,
        z_t: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """-> (H,) in-level terms of the loss, nats per item. Thm 3.4; in training floored, clipped, level-weighted."""
        level_R, _, loss_R = self.weighted_nll(hidden_BLD, z_t, timesteps, labels)
        losses = loss_R.new_zeros(self.tree.height).index_add(0, level_R, loss_R)
        num_items = (labels != IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses / num_items

    def weighted_nll(
        self, hidden_BLD: torch.Tensor, z_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> (R,) levels, (R,) flat positions, (R,) terms `r_h(t) * -log p(child)` of the loss, nats. Thm 3.4."""
        heights = self.tree.node_height(z_t)
        weights = self.law.position_weights(timesteps, heights, TRAINING_FLOOR if self.training else 0.0)
        if self.training and self.config.loss_weight_clip is not None:
            weights = weights.clamp(max=self.config.loss_weight_clip)
        scored = (labels != IGNORE_INDEX) & (weights > 0)  # a position whose level does not run at t costs no head
        is_scored_HBL = self.law.levels_of_jump().to(z_t.device)[heights].movedim(-1, 0) & scored
        level_R, position_R, nll_R = self._path_nll(hidden_BLD, z_t, labels, is_scored_HBL)
        weights_R = weights.flatten()[position_R]
        if self.training and self.config.level_weighting is not None:
            by_level = level_weights(self.config.level_weighting, self.config.level_weighting_scale, self.tree.height)
            weights_R = weights_R * by_level.to(weights_R.device)[level_R]
        return level_R, position_R, nll_R * weights_R.to(nll_R.dtype)

    def _path_nll(
        self, hidden_BLD: torch.Tensor, z_t: torch.Tensor, x_0: torch.Tensor, is_scored_HBL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which (level, position) pairs to score -> (R,) levels, (R,) flat positions, (R,) -log p(child on x_0's path).

        All levels of one position are scored from its one hidden state, each below the node on the true path.
        """
        return self.head.path_nll(hidden_BLD, z_t, x_0, is_scored_HBL, self.tree, self.node_embeddings)

    # ---- the bound ----

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
        u_heights, u_jumper = (self.one_per_unit(draw_uniforms(input_ids.shape, generator, device)) for _ in range(2))
        heights = self.law.sample_heights(t, u_heights)
        unit_L = self._unit_of_position(heights)
        jumper_B = unit_L[torch.where(scored, u_jumper, -1.0).argmax(1)]
        heights = torch.where(unit_L == jumper_B[:, None], upper[:, None], heights) * scored
        z_t = self.tree.ancestor(input_ids, heights)
        hidden_BLD = self.model(z_t, t, **context).last_hidden_state
        hidden_BLD, z_t = self.hide_padding(hidden_BLD, z_t, context.get("attention_mask"))
        waits = (heights == upper[:, None]) & scored
        level_H = torch.arange(self.tree.height, device=device)[:, None, None]
        is_scored_HBL = waits & (level_H >= lower[:, None]) & (level_H < upper[:, None])
        level_R, position_R, nll_R = self._path_nll(hidden_BLD, z_t, labels, is_scored_HBL)
        sequence_R = position_R // input_ids.shape[1]
        sums_BH = nll_R.new_zeros(len(input_ids), self.tree.height).index_put(
            (sequence_R, level_R), nll_R, accumulate=True
        )
        # scored / waiting: the mean over the waiting units stands for every unit of the sequence.
        scale_B = len(self.law.jumps) * self._count_units(scored) / self._count_units(waits).clamp(min=1)
        return sums_BH * scale_B[:, None]


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _check_saved_tokenizer(vocabulary: Any, name_or_path: Any, hub_arguments: dict[str, Any]) -> None:
    """If a fast tokenizer lies beside the weights, it must be the one the model was made for."""
    if name_or_path is None or not vocabulary.vocab_hash.any():
        return
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name_or_path, "tokenizer.json", **hub_arguments, **optional)
    if path is not None:
        vocabulary.check_tokenizer(PreTrainedTokenizerFast(tokenizer_file=path))


__all__ = ["DiffusionLM", "TDLMForDiffusionLM", "TDLMModel", "TDLMNelboOutput", "TDLMOutput", "TDLMPreTrainedModel"]
