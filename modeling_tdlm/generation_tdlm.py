"""Reverse sampling: every position starts at the root and descends, child by child, to a token.

Shape legend: B sequences, L positions of the canvas, P of them prompt, T steps, H height of the root, K child slots.
"""

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
from .process_tdlm import HeightLaw, draw_uniforms
from .vocab_tree_tdlm import VocabTree

logger = logging.get_logger(__name__)

# What `generate` honours. Any other field that asks for something is refused, not ignored.
SUPPORTED = {
    *("max_new_tokens", "max_length", "num_return_sequences", "return_dict_in_generate"),
    *("do_sample", "temperature", "top_k", "top_p"),
    *("num_denoising_steps", "steps_per_level", "output_trajectory"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"),
}
ASKS_FOR_NOTHING: tuple = (None, False, 0, 1, "", [], {})


class TDLMGenerationConfig(GenerationConfig):
    r"""
    Parameters of [`TDLMGenerationMixin.generate`], beside the usual ones: `max_new_tokens`, `max_length`,
    `num_return_sequences`, `return_dict_in_generate`, and `do_sample`, `temperature`, `top_k`, `top_p`, which act on
    the distribution over children at every step.

    Args:
        num_denoising_steps (`int`, *optional*): steps in all, shared out evenly over the levels of the tree. Default:
            one for each new token.
        steps_per_level (`list[int]`, *optional*): steps for each level, from the root down, in place of the above.
        output_trajectory (`bool`, *optional*): also return the canvas after every step.
    """

    def __init__(self, **kwargs):
        self.num_denoising_steps: int | None = kwargs.pop("num_denoising_steps", None)
        self.steps_per_level: list[int] | None = kwargs.pop("steps_per_level", None)
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
            asks = value is True or value not in ASKS_FOR_NOTHING  # True equals 1
            if asks and name not in SUPPORTED and not name.startswith("_"):
                raise ValueError(f"{name}={value!r} is not supported by diffusion generation. Leave it out.")
        for name in ("num_denoising_steps", "num_return_sequences", "max_new_tokens", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

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
        trajectory (`torch.LongTensor` of shape `(steps + 1, batch, length)`): node ids before each step and at the end.
        timesteps (`torch.FloatTensor` of shape `(steps + 1,)`): the time of each canvas of `trajectory`.
    """

    sequences: torch.Tensor | None = None
    num_forwards: int | None = None
    trajectory: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None


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

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: TDLMGenerationConfig | None = None,
        generator: torch.Generator | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | TDLMGenerateOutput:
        """Generate token ids by reverse diffusion, level by level from the root (Eq. 3).

        Args:
            input_ids: (B, P) prompts, kept as clean context; `None` generates without a prompt.
            attention_mask: (B, P), 0 at padding, on either side.
            generation_config: parameters; `kwargs` override them.
            generator: source of randomness, on the model's device or the CPU.
            streamer: receives the (B, L) canvas of node ids after every step.

        Returns:
            (B * num_return_sequences, P + new) token ids, or a [`TDLMGenerateOutput`] with `return_dict_in_generate`.
        """
        config = self._prepare_generation_config(generation_config, kwargs)
        input_ids, attention_mask = self._prepare_prompt(input_ids, attention_mask, config)
        num_new = self._num_new_tokens(input_ids.shape[1], config)
        canvas = self._absorbed_canvas(input_ids, num_new)
        context = self._context(torch.nn.functional.pad(attention_mask, (0, num_new), value=1))
        trajectory = [canvas] if config.output_trajectory else []

        def show(canvas: torch.Tensor) -> None:
            if config.output_trajectory:
                trajectory.append(canvas)
            if streamer is not None:
                streamer.put(canvas)

        draw = partial(
            _draw_child, warpers=_warpers(config), do_sample=config.do_sample is not False, generator=generator
        )
        times = self._sampling_times(num_new, config)
        sequences, num_forwards = self._denoise(canvas, times, context, draw, generator, show)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return sequences
        return TDLMGenerateOutput(
            sequences=sequences,
            num_forwards=num_forwards,
            trajectory=torch.stack(trajectory) if trajectory else None,
            timesteps=torch.tensor(times) if trajectory else None,
        )

    def _context(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, L) mask -> what every forward pass gets. Positions count what is seen, so padding shifts nothing."""
        # Made once: from a 2-D mask every forward would ask the device whether there is padding, and wait.
        like_hidden = attention_mask.new_zeros((*attention_mask.shape, 1), dtype=self.dtype)
        attention_bias = create_bidirectional_mask(
            config=self.config, inputs_embeds=like_hidden, attention_mask=attention_mask
        )
        return {"attention_mask": attention_bias, "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0)}

    def _absorbed_canvas(self, input_ids: torch.Tensor, num_new: int) -> torch.Tensor:
        """(B, P) prompts -> the canvas at t = 1: the prompts and `num_new` roots."""
        return torch.nn.functional.pad(input_ids, (0, num_new), value=self.tree.root_id)

    # ---- the reverse process ----

    def _denoise(
        self,
        canvas: torch.Tensor,
        times: list[float],
        context: dict[str, Any],
        draw: Callable[[torch.Tensor], torch.Tensor],
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
                canvas, heights = self._jump(canvas, heights, goal, hidden_BLD, draw)
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
        draw: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One jump of every position above its goal, child by child, all from one hidden state."""
        for _ in range(self.law.longest_jump):
            moves = goal < heights
            slots = self.head.draw_slots(hidden_BLD, canvas, draw, self.tree, self.model.embed_nodes.weight)
            parents = canvas.masked_fill(~moves, self.tree.root_id)  # the others are looked up in vain
            canvas = torch.where(moves, self.tree.child(parents, slots), canvas)
            heights = heights - moves.long()
        return canvas, heights

    # ---- preparing ----

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, overrides: dict[str, Any]
    ) -> TDLMGenerationConfig:
        base = self.generation_config if generation_config is None else generation_config
        settings = base.to_dict()
        unknown = sorted(set(overrides) - set(settings) - set(TDLMGenerationConfig().to_dict()))
        if unknown:
            raise ValueError(f"generate() got arguments it does not know: {unknown}.")
        if overrides.get("num_denoising_steps") is not None:
            settings["steps_per_level"] = None
        if overrides.get("steps_per_level") is not None and "num_denoising_steps" not in overrides:
            settings["num_denoising_steps"] = None
        if overrides.get("max_new_tokens") is not None and "max_length" not in overrides:
            settings["max_length"] = None
        if overrides.get("max_length") is not None and "max_new_tokens" not in overrides:
            settings["max_new_tokens"] = None
        return TDLMGenerationConfig.from_dict({**settings, **overrides})

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

    def _num_new_tokens(self, prompt_length: int, config: TDLMGenerationConfig) -> int:
        context_length = self.config.max_position_embeddings
        if config.max_new_tokens is not None:
            num_new = config.max_new_tokens
        else:
            num_new = (context_length if config.max_length is None else config.max_length) - prompt_length
        if num_new < 1 or prompt_length + num_new > context_length:
            raise ValueError(
                f"a prompt of {prompt_length} tokens and {num_new} new ones must fit in the context of "
                f"{context_length} with at least one new token. Shorten the prompt or set max_new_tokens."
            )
        return num_new

    def _sampling_times(self, num_new: int, config: TDLMGenerationConfig) -> list[float]:
        steps_per_level = config.steps_per_level
        if steps_per_level is None:
            steps = config.num_denoising_steps
            steps_per_level = self.law.split_steps(max(num_new, self.law.height) if steps is None else steps)
        return self.law.sampling_times(steps_per_level)

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


def _warpers(config: TDLMGenerationConfig) -> LogitsProcessorList:
    """transformers' own temperature, top-k and top-p, over the children of a node."""
    warpers = LogitsProcessorList()
    if config.temperature is not None and config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None and config.top_k > 0:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers


def _draw_child(
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


__all__ = ["TDLMGenerateOutput", "TDLMGenerationConfig", "TDLMGenerationMixin"]
