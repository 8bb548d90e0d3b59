"""Reverse sampling: every position starts at the root and descends, child by child, to a token.

Shape legend: B sequences, L positions of the canvas, P of them prompt, T steps, H height of the root, K child slots.
"""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput, logging

from .configuration_tdlm import TDLMConfig
from .constraints_tdlm import TokenConstraint, constrain
from .heads_tdlm import ChildHead
from .process_tdlm import HeightLaw, draw_uniforms
from .vocab_tree_tdlm import VocabTree

logger = logging.get_logger(__name__)

# What `generate` honours. Any other field that asks for something is refused, not ignored.
SUPPORTED = {
    *("max_new_tokens", "max_length", "num_return_sequences", "return_dict_in_generate"),
    *("do_sample", "temperature", "top_k", "top_p"),
    *("num_denoising_steps", "steps_per_level", "block_length", "output_trajectory"),
    *("suppress_tokens", "allowed_tokens", "stop_strings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"),
}
EXCLUSIVE = (("num_denoising_steps", "steps_per_level"), ("max_new_tokens", "max_length"))
# What other fields may say all the same: nothing.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "min_p"), 0.0),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}


class TDLMGenerationConfig(GenerationConfig):
    r"""
    Parameters of [`TDLMGenerationMixin.generate`], beside the usual ones: `max_new_tokens`, `max_length`,
    `num_return_sequences`, `return_dict_in_generate`, and `do_sample`, `temperature`, `top_k`, `top_p`, which act on
    the distribution over children at every step. `eos_token_id` and `stop_strings` end a sequence: what was generated
    behind them is replaced by padding.

    Args:
        num_denoising_steps (`int`, *optional*): steps of each block, shared out evenly over the levels of the tree.
            Default: one for each of its tokens.
        steps_per_level (`list[int]`, *optional*): steps for each level, from the root down, in place of the above.
        block_length (`int`, *optional*): denoise so many new tokens together, block after block, each in sight of as
            much of the text before it as fits in the context. Default: all together if they fit, otherwise half the
            context.
        suppress_tokens (`list[int]`, *optional*): tokens that are never generated.
        allowed_tokens (`list[int]` or `list[list[int] | None]`, *optional*): the only tokens that may be generated;
            one list for all positions, or one for each new position (`None`: any token).
        output_trajectory (`bool`, *optional*): also return the canvas after every step.
    """

    def __init__(self, **kwargs):
        self.num_denoising_steps: int | None = kwargs.pop("num_denoising_steps", None)
        self.steps_per_level: list[int] | None = kwargs.pop("steps_per_level", None)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.allowed_tokens: list | None = kwargs.pop("allowed_tokens", None)
        self.output_trajectory: bool | None = kwargs.pop("output_trajectory", None)
        kwargs.setdefault("do_sample", True)
        super().__init__(**kwargs)

    def validate(self, *args, **kwargs):
        super().validate(*args, **kwargs)
        if self.num_denoising_steps is not None and self.steps_per_level is not None:
            raise ValueError(
                f"pass num_denoising_steps={self.num_denoising_steps} or steps_per_level={self.steps_per_level}, "
                "not both."
            )
        for name, value in vars(self).items():
            says_nothing = value is None or value is False or value in ("", [], {}) or value == NEUTRAL.get(name)
            if not says_nothing and name not in SUPPORTED and not name.startswith("_"):
                raise ValueError(f"{name}={value!r} is not supported by diffusion generation. Leave it out.")
        for name in ("num_denoising_steps", "num_return_sequences", "max_new_tokens", "max_length", "block_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0, which keeps every child.")

    @classmethod
    def from_model_config(cls, model_config) -> "TDLMGenerationConfig":
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in names})


@dataclass
class TDLMGenerateOutput(ModelOutput):
    """
    Output of [`TDLMGenerationMixin.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`): prompt and generated token ids.
        num_forwards (`int`): forward passes used.
        order (`torch.LongTensor` of shape `(batch, length)`): the step at which each position became a token, counted
            from 1; 0 where it was given.
        trajectory (`tuple(torch.LongTensor)` of `steps + 1` canvases of shape `(batch, length)`): node ids before the
            first step and after each.
        timesteps (`list[float]`): the time of each canvas of `trajectory`.
    """

    sequences: torch.Tensor | None = None
    num_forwards: int | None = None
    order: torch.Tensor | None = None
    trajectory: tuple[torch.Tensor, ...] | None = None
    timesteps: list[float] | None = None


class TDLMGenerationMixin:
    """`generate()` for models with a backbone `model`, a `tree`, a `law` of heights and a `head`."""

    config: TDLMConfig
    device: torch.device
    dtype: torch.dtype
    model: Any
    tree: VocabTree
    law: HeightLaw
    head: Any
    one_per_unit: Callable[[torch.Tensor], torch.Tensor]
    generation_config: Any

    @property
    def node_embeddings(self) -> torch.Tensor:
        """(N, D) what tied heads score with: an adapter around the embedding (LoRA) changes both of its uses."""
        embed_nodes = self.model.embed_nodes
        if isinstance(embed_nodes, torch.nn.Embedding):
            return embed_nodes.weight
        return embed_nodes(torch.arange(self.config.num_nodes, device=self.device))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: TDLMGenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        infill_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor | TDLMGenerateOutput:
        """Generate token ids by reverse diffusion, level by level from the root (Eq. 3).

        Args:
            input_ids: (B, P) prompts, kept as clean context; `None` generates without a prompt.
            attention_mask: (B, P), 0 at padding, on either side.
            generation_config: parameters; `kwargs` override them.
            logits_processor: called with (R, 1) node ids and (R, K) log-probabilities of their children, before
                temperature, top-k and top-p.
            infill_mask: (B, P) bool, True where `input_ids` are to be replaced by generated tokens, in sight of what
                is on both sides. Nothing is then appended unless `max_new_tokens` says so.
            generator: source of randomness, on the model's device or the CPU.
            streamer: gets the prompt (`put`), the (B, L) canvas of node ids after every step (`put_draft`, if it has
                one; of MDM-Prime tokens, and `vocab_size` where digits are missing), the new tokens of each block up to
                the sequence's end (`put`), and `end`.
            tokenizer: needed for `stop_strings`, which are looked for in the new tokens.

        Returns:
            (B * num_return_sequences, P + new) token ids, or a [`TDLMGenerateOutput`] with `return_dict_in_generate`.
        """
        if infill_mask is not None:  # a saved default would append to every text
            kwargs = {"max_new_tokens": None, **kwargs}
        config = self._merged_generation_config(generation_config, kwargs)
        input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, config)
        holes = self._prepare_holes(infill_mask, input_ids, attention_mask, config)
        num_given = input_ids.shape[1]
        num_new = self._num_new_tokens(num_given, config, is_infilling=holes is not None)
        blocks = self._blocks(attention_mask, num_new, config)
        finder = _EndFinder(config, tokenizer, input_ids, attention_mask)
        pick = self._child_picker(config, num_given, num_new, logits_processor, generator)
        canvas = self._absorbed_canvas(input_ids, num_new, holes)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, num_new), value=1)
        record = _Record(canvas, config, streamer, self._is_token, self._draft, has_blanks=holes is not None)
        record.confirm(input_ids if holes is None else input_ids[:, :0])
        for start, end in blocks:
            times = self._sampling_times(self._num_open(canvas[:, start:end]), config)
            show = partial(record.step, canvas, start)
            context = self._context(attention_mask[:, start:end])
            window, forwards = self._denoise(
                canvas[:, start:end], times, context, partial(pick, start=start), generator, show
            )
            canvas = torch.cat([canvas[:, :start], window, canvas[:, end:]], dim=1)
            given, new = self._tokens(canvas[:, :end]).tensor_split([num_given], dim=1)
            all_ended = finder.all_ended(new)
            record.block(given, finder.trimmed(), times, forwards)
            if all_ended:
                break
        return record.output()

    def _context(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, L) mask -> what every forward pass gets. Positions count what is seen, so padding shifts nothing."""
        # Made once: from a 2-D mask every forward would ask the device whether there is padding, and wait.
        like_hidden = attention_mask.new_zeros((*attention_mask.shape, 1), dtype=self.dtype)
        attention_bias = create_bidirectional_mask(
            config=self.config, inputs_embeds=like_hidden, attention_mask=attention_mask
        )
        return {"attention_mask": attention_bias, "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}

    def _absorbed_canvas(self, input_ids: torch.Tensor, num_new: int, holes: torch.Tensor | None) -> torch.Tensor:
        """(B, P) prompts, (B, P) holes -> the canvas at t = 1: the prompts, roots in the holes, and `num_new` roots."""
        given = input_ids if holes is None else input_ids.masked_fill(holes, self.tree.root_id)
        return torch.nn.functional.pad(given, (0, num_new), value=self.tree.root_id)

    def _tokens(self, canvas: torch.Tensor) -> torch.Tensor:
        """A finished canvas -> (B, L) token ids."""
        return canvas

    def _draft(self, canvas: torch.Tensor) -> torch.Tensor:
        """A canvas -> the (B, L) ids that streamers see."""
        return canvas

    def _num_open(self, canvas: torch.Tensor) -> int:
        """The most positions that a sequence has to generate. Waits for the device, once a block."""
        return int((~self._is_token(canvas)).sum(1).max())

    def _is_token(self, canvas: torch.Tensor) -> torch.Tensor:
        """A canvas -> (B, L) bool, True where a token stands."""
        return canvas < self.tree.vocab_size

    # ---- the reverse process ----

    def _denoise(
        self,
        canvas: torch.Tensor,
        times: list[float],
        context: dict[str, Any],
        pick: Callable[..., torch.Tensor],
        generator: torch.Generator | None,
        show: Callable[[torch.Tensor], None],
    ) -> tuple[torch.Tensor, int]:
        """(B, L) canvas with absorbed positions -> (B, L) token ids and the number of forward passes."""
        times_T, posteriors_T = self._step_laws(times, canvas.device)
        lower_heights = self.law.lower_heights().to(canvas.device)
        heights = self.tree.node_height(canvas)
        num_forwards = 0
        for step in range(len(posteriors_T)):
            u = self.one_per_unit(draw_uniforms(canvas.shape, generator, canvas.device, torch.float64))
            target = self.law.sample_posterior(heights, posteriors_T[step], u)
            for jump in range(self.law.jumps_per_step):
                # A position that makes several jumps in one step makes the later ones in sight of the earlier.
                if jump > 0 and not bool((target < heights).any()):
                    break
                hidden_BLD = self.model(canvas, times_T[step].expand(len(canvas)), **context).last_hidden_state
                goal = torch.where(target < heights, lower_heights[heights], heights)
                canvas, heights = self._jump(canvas, heights, goal, hidden_BLD, pick)
                num_forwards += 1
            show(canvas)
        assert int(heights.max()) == 0, "a position is left above a leaf"
        return canvas, num_forwards

    def _step_laws(self, times: list[float], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (T+1,) times and (T, H+1, H+1) posteriors of the steps between them, float64."""
        # Sent to the device at once: a copy inside the loop would wait for it.
        posteriors = torch.stack([self.law.posterior(s, t) for t, s in itertools.pairwise(times)])
        return torch.tensor(times, dtype=torch.float64).to(device), posteriors.to(device)

    def _jump(
        self,
        canvas: torch.Tensor,
        heights: torch.Tensor,
        goal: torch.Tensor,
        hidden_BLD: torch.Tensor,
        pick: Callable[..., torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One jump of every position above its goal, child by child, all from one hidden state."""
        for _ in range(self.law.longest_jump):
            moves = goal < heights
            slots = pick(hidden_BLD, canvas)
            parents = canvas.masked_fill(~moves, self.tree.root_id)  # the others are looked up in vain
            canvas = torch.where(moves, self.tree.child(parents, slots), canvas)
            heights = heights - moves.long()
        return canvas, heights

    def _child_picker(
        self,
        config: TDLMGenerationConfig,
        num_given: int,
        num_new: int,
        logits_processor: LogitsProcessorList | None,
        generator: torch.Generator | None,
    ) -> Callable[..., torch.Tensor]:
        """-> a function of (B, L, D) hidden states, the canvas and its first position: (B, L) slots of children."""
        draw = partial(
            draw_child, warpers=warpers(config), do_sample=config.do_sample is not False, generator=generator
        )
        if not config.suppress_tokens and config.allowed_tokens is None and not logits_processor:
            return partial(self._pick_child, draw)
        if not isinstance(self.head, ChildHead):
            raise ValueError(
                "suppress_tokens, allowed_tokens and logits_processor need a head that scores children one by one, "
                f"not head_type={self.config.head_type!r}. Leave them out."
            )
        constraint = constrain(self.tree, num_given, num_new, config.suppress_tokens, config.allowed_tokens)
        return partial(self._pick_constrained_child, draw, constraint, logits_processor or LogitsProcessorList())

    def _pick_child(
        self, draw: Callable[[torch.Tensor], torch.Tensor], hidden_BLD: torch.Tensor, canvas: torch.Tensor, start: int
    ) -> torch.Tensor:
        return self.head.draw_slots(hidden_BLD, canvas, draw, self.tree, self.node_embeddings)

    def _pick_constrained_child(
        self,
        draw: Callable[[torch.Tensor], torch.Tensor],
        constraint: TokenConstraint | None,
        processors: LogitsProcessorList,
        hidden_BLD: torch.Tensor,
        canvas: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        embedding_ND = self.node_embeddings
        if constraint is None:
            log_probs_BLK = self.head.log_probs(hidden_BLD, canvas, self.tree, embedding_ND)
        else:
            constraint = constraint.window(start, start + canvas.shape[1])
            log_probs_BLK = constraint.log_probs(self.head, hidden_BLD, canvas, embedding_ND)
        (row_R,) = (~self._is_token(canvas)).flatten().nonzero(as_tuple=True)
        scores_RK = processors(canvas.flatten()[row_R, None], log_probs_BLK.flatten(0, 1)[row_R])
        slots = torch.zeros_like(canvas).flatten()
        return slots.index_copy(0, row_R, draw(scores_RK)).view_as(canvas)

    # ---- preparing ----

    def _merged_generation_config(
        self, generation_config: GenerationConfig | None, overrides: dict[str, Any]
    ) -> TDLMGenerationConfig:
        """The model's settings, under those of a given config (where it says something), under the call's own."""
        settings = self.generation_config.to_dict()
        unknown = sorted(set(overrides) - set(settings) - set(TDLMGenerationConfig().to_dict()))
        if unknown:
            raise ValueError(f"generate() got arguments that diffusion generation does not know: {unknown}.")
        given = {} if generation_config is None else generation_config.to_dict()
        for layer in ({name: value for name, value in given.items() if value is not None}, overrides):
            # Two ways of saying one thing: the later layer's counts.
            for one, other in EXCLUSIVE:
                for named, rival in ((one, other), (other, one)):
                    if layer.get(named) is not None and layer.get(rival) is None:
                        settings[rival] = None
            settings |= {name: value.tolist() if hasattr(value, "tolist") else value for name, value in layer.items()}
        return TDLMGenerationConfig.from_dict(settings)

    def _prepare_prompt(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, config: TDLMGenerationConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (B * num_return_sequences, P) token ids and mask on the model's device; P = 0 without a prompt."""
        if input_ids is None:
            input_ids, attention_mask = torch.zeros(1, 0, dtype=torch.int64), None
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; prompts must be (batch, length).")
        if input_ids.numel() and (input_ids.min() < 0 or input_ids.max() >= self.config.vocab_size):
            raise ValueError(
                f"prompt ids {int(input_ids.min())}..{int(input_ids.max())} are outside the vocabulary, "
                f"0..{self.config.vocab_size - 1}. Prompts are token ids, not node ids."
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}."
            )
        size = getattr(self.config, "neighborhood_size", 1)
        if size > 1 and bool((attention_mask == 0).any()):
            raise ValueError(
                f"padding would shift the neighborhoods of {size} positions. Generate for prompts of one length at a "
                "time."
            )
        copies = config.num_return_sequences or 1
        return (
            input_ids.to(self.device, torch.int64).repeat_interleave(copies, dim=0),
            attention_mask.to(self.device, torch.int64).repeat_interleave(copies, dim=0),
        )

    def _prepare_holes(
        self,
        infill_mask: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        config: TDLMGenerationConfig,
    ) -> torch.Tensor | None:
        """-> (B * num_return_sequences, P) bool, True where to fill in."""
        if infill_mask is None:
            return None
        copies = config.num_return_sequences or 1
        if infill_mask.shape != (input_ids.shape[0] // copies, input_ids.shape[1]):
            raise ValueError(
                f"infill_mask has shape {tuple(infill_mask.shape)}, input_ids "
                f"{(input_ids.shape[0] // copies, input_ids.shape[1])}."
            )
        holes = infill_mask.to(self.device, torch.bool).repeat_interleave(copies, dim=0)
        if bool((holes & (attention_mask == 0)).any()):
            raise ValueError(
                "infill_mask asks for tokens where attention_mask says padding. Unmask them, or leave them."
            )
        return holes

    def _num_new_tokens(self, prompt_length: int, config: TDLMGenerationConfig, is_infilling: bool = False) -> int:
        context_length = self.config.max_position_embeddings
        if config.max_new_tokens is not None:
            num_new = config.max_new_tokens
        elif is_infilling:
            num_new = 0
        else:
            num_new = (context_length if config.max_length is None else config.max_length) - prompt_length
        if num_new < 1 and not is_infilling:
            limit = f"max_length={config.max_length}" if config.max_length else f"the context of {context_length}"
            raise ValueError(
                f"a prompt of {prompt_length} tokens leaves no room for a new one in {limit}. Shorten the prompt, or "
                "set max_new_tokens."
            )
        if is_infilling and prompt_length + num_new > context_length:
            raise ValueError(
                f"{prompt_length} tokens to fill in and {num_new} new ones do not fit in the context of "
                f"{context_length}, which infilling sees at once. Shorten the text."
            )
        return num_new

    def _blocks(
        self, attention_mask: torch.Tensor, num_new: int, config: TDLMGenerationConfig
    ) -> list[tuple[int, int]]:
        """(B, P) mask of what is given -> for each block the first position that it sees, and its end."""
        num_given = attention_mask.shape[1]
        context_length, end = self.config.max_position_embeddings, num_given + num_new
        fits = end <= context_length
        if not fits and bool((attention_mask.diff(dim=1) < 0).any()):
            raise ValueError(
                f"{num_given} tokens with padding on the right and {num_new} new ones are more than the context of "
                f"{context_length}: short prompts would leave it. Pad on the left (tokenizer.padding_side = 'left')."
            )
        length = config.block_length or (num_new if fits else context_length // 2)
        if length > context_length:
            raise ValueError(f"block_length={length} is more than the context of {context_length} tokens.")
        if num_new == 0:
            return [(0, num_given)]
        stops = [min(first + length, end) for first in range(num_given, end, length)]
        return [(max(0, stop - context_length), stop) for stop in stops]

    def _sampling_times(self, num_new: int, config: TDLMGenerationConfig) -> list[float]:
        steps_per_level = config.steps_per_level
        if steps_per_level is None:
            steps = config.num_denoising_steps
            steps_per_level = self.law.split_steps(max(num_new, self.law.height) if steps is None else steps)
        return self.law.sampling_times(steps_per_level)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """What PEFT's causal models wrap; the sampler calls the backbone itself."""
        return {"input_ids": input_ids, **kwargs}

    # ---- loading: called by from_pretrained to set `self.generation_config` ----

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Load `generation_config.json` as a [`TDLMGenerationConfig`]; the base class would drop our fields' checks."""
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        loading = {**dict(zip(names, args, strict=False)), **kwargs}
        loading.pop("trust_remote_code", None)
        if generation_config is not None:
            self.generation_config = TDLMGenerationConfig.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            try:
                self.generation_config = TDLMGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                    **loading,
                )
            except OSError:
                logger.info("No generation_config.json found, using the default generation config.")


class _Record:
    """What `generate` shows while it runs, and returns beside the sequences."""

    def __init__(
        self,
        canvas: torch.Tensor,
        config: TDLMGenerationConfig,
        streamer: BaseStreamer | None,
        is_token: Callable[[torch.Tensor], torch.Tensor],
        draft: Callable[[torch.Tensor], torch.Tensor],
        has_blanks: bool,
    ):
        self.draft = draft
        self.has_blanks = has_blanks
        self.return_dict = bool(config.return_dict_in_generate)
        self.streamer = streamer
        self.is_token = is_token
        self.num_steps = 0
        self.order = torch.zeros_like(is_token(canvas), dtype=torch.int64)
        self.is_open = ~is_token(canvas)
        self.trajectory = [canvas] if config.output_trajectory else None
        self.times: list[float] = []
        self.num_forwards = 0
        self.num_shown = 0

    def confirm(self, ids: torch.Tensor) -> None:
        """Tokens that will not change any more."""
        if self.streamer is not None:
            self.streamer.put(ids.cpu())

    def step(self, canvas: torch.Tensor, start: int, window: torch.Tensor) -> None:
        """The canvas with a step's new window in it."""
        self.num_steps += 1
        if not self.return_dict and self.streamer is None:
            return
        end = start + window.shape[1]
        canvas = torch.cat([canvas[:, :start], window, canvas[:, end:]], dim=1)
        if self.return_dict:
            became = self.is_open & self.is_token(canvas)
            self.order = torch.where(became, self.num_steps, self.order)
            self.is_open = self.is_open & ~became
        if self.trajectory is not None:
            self.trajectory.append(canvas)
        if self.streamer is not None and hasattr(self.streamer, "put_draft"):
            # On its device: a copy at every step would wait for it.
            self.streamer.put_draft(self.draft(canvas[:, :end]))

    def block(self, given: torch.Tensor, new: torch.Tensor, times: list[float], num_forwards: int) -> None:
        """(B, P) and (B, n) tokens after a block: given, their blanks filled, and new up to each sequence's end."""
        if self.has_blanks and not self.times:
            self.confirm(given)
        self.confirm(new[:, self.num_shown :])
        self.num_shown = new.shape[1]
        self.times += times[1:] if self.times else times
        self.num_forwards += num_forwards
        self.sequences = torch.cat([given, new], dim=1)

    def output(self) -> torch.Tensor | TDLMGenerateOutput:
        sequences = self.sequences
        if self.streamer is not None:
            self.streamer.end()
        if not self.return_dict:
            return sequences
        length = sequences.shape[1]
        output = TDLMGenerateOutput(sequences=sequences, num_forwards=self.num_forwards, order=self.order[:, :length])
        if self.trajectory is not None:
            output.trajectory = tuple(canvas[:, :length] for canvas in self.trajectory)
            output.timesteps = self.times
        return output


class _EndFinder:
    """Where each sequence ends: behind its end-of-text token, or the token that completes a stop string."""

    def __init__(
        self, config: TDLMGenerationConfig, tokenizer: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ):
        eos = config.eos_token_id
        self.eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.stop_strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
        self.tokenizer = tokenizer
        if self.stop_strings and tokenizer is None:
            raise ValueError(
                f"stop_strings={self.stop_strings} need the tokenizer: generate(..., tokenizer=tokenizer)."
            )
        self.pad_id = config.pad_token_id if config.pad_token_id is not None else next(iter(self.eos_ids), None)
        if self.stop_strings and self.pad_id is None:
            raise ValueError(
                f"stop_strings={self.stop_strings} cut sequences short, and there is neither pad_token_id nor "
                "eos_token_id to fill them up with. Set pad_token_id."
            )
        is_text = (attention_mask != 0) & ~self._is_eos(input_ids)
        self.has_text_B1 = is_text.any(1, keepdim=True)

    def all_ended(self, new_ids: torch.Tensor) -> bool:
        """Take in the (B, n) new tokens so far; have all sequences ended?"""
        self.new_ids, self.lengths = new_ids, None
        if new_ids.shape[1] == 0 or not (self.eos_ids or self.stop_strings):
            return False
        lengths = torch.minimum(self._eos_lengths(new_ids), self._stop_lengths(new_ids))
        self.lengths = lengths.clamp(max=new_ids.shape[1])
        return bool((lengths <= new_ids.shape[1]).all())

    def trimmed(self) -> torch.Tensor:
        """-> (B, n') new tokens up to each one's end, then padding, as long as the longest."""
        if self.lengths is None:
            return self.new_ids
        is_behind = torch.arange(self.new_ids.shape[1], device=self.new_ids.device) >= self.lengths[:, None]
        if not bool(is_behind.any()):
            return self.new_ids
        assert self.pad_id is not None, "what ends sequences also gives the padding"
        return self.new_ids.masked_fill(is_behind, self.pad_id)[:, : int(self.lengths.max())]

    def _is_eos(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids, torch.tensor(self.eos_ids, dtype=ids.dtype, device=ids.device))

    def _eos_lengths(self, new_ids: torch.Tensor) -> torch.Tensor:
        """-> (B,) tokens up to and with the first end-of-text, n + 1 if there is none; with no text before it, it
        opens the sequence."""
        is_eos = self._is_eos(new_ids)
        ends = is_eos & (self.has_text_B1 | ((~is_eos).cumsum(1) > 0))
        return torch.where(ends.any(1), ends.int().argmax(1) + 1, new_ids.shape[1] + 1)

    def _stop_lengths(self, new_ids: torch.Tensor) -> torch.Tensor:
        """-> (B,) tokens up to and with the one that completes the first stop string, n + 1 if none does."""
        if not self.stop_strings:
            return torch.full_like(new_ids[:, 0], new_ids.shape[1] + 1)
        return torch.tensor([self._stop_length(row) for row in new_ids.tolist()], device=new_ids.device)

    def _stop_length(self, ids: list[int]) -> int:
        def stops(length: int) -> bool:
            text = self.tokenizer.decode(ids[:length])
            return any(stop in text for stop in self.stop_strings)

        return bisect.bisect_left(range(len(ids) + 1), True, key=stops)


def warpers(config: TDLMGenerationConfig) -> LogitsProcessorList:
    """transformers' own temperature, top-k and top-p, over the children of a node."""
    asked = LogitsProcessorList()
    if config.temperature is not None and config.temperature != 1.0:
        asked.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None and config.top_k > 0:
        asked.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        asked.append(TopPLogitsWarper(config.top_p))
    return asked


def draw_child(
    log_probs_RK: torch.Tensor, warpers: LogitsProcessorList, do_sample: bool, generator: torch.Generator | None
) -> torch.Tensor:
    """(R, K) log-probabilities -> (R,) slots. float64 inversion: a float32 Gumbel-argmax would cut the tails off."""
    scores_RK = warpers(None, log_probs_RK)  # type: ignore[arg-type]  # these warpers read no input ids
    if not do_sample:
        return scores_RK.argmax(-1)
    cumulative = scores_RK.to(torch.float64).softmax(-1).cumsum(-1)
    u = draw_uniforms(scores_RK.shape[:1], generator, scores_RK.device, torch.float64)
    slots = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(-1)
    # Only rounding could point behind the last class that there is, where a parallel sum need not be monotonic.
    missing_behind = (log_probs_RK > float("-inf")).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(slots, log_probs_RK.shape[1] - 1 - missing_behind)


__all__ = ["TDLMGenerateOutput", "TDLMGenerationConfig", "TDLMGenerationMixin", "draw_child", "warpers"]
