"""Counted floating-point operations of training, and the depth at which two models cost the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tdlm.process_tdlm import low_discrepancy_times

BuildModel = Callable[[int], PreTrainedModel]  # num_hidden_layers -> model
MIN_SEQUENCES = 8
MIN_TOKENS = 2048


def flops_batch_size(length: int) -> int:
    """Sequences in a batch to count: enough for an even grid of times, few enough for a CPU."""
    return max(MIN_SEQUENCES, MIN_TOKENS // length)


def training_flops(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of one forward and backward pass over `batch`; elementwise operations and look-ups count nothing."""
    model.set_attn_implementation("eager")  # fused kernels hide their products from the counter
    with FlopCounterMode(display=False, custom_mapping=_GROUPED_PRODUCT) as counter:
        model.train()(**batch).loss.backward()
    return counter.get_total_flops()


def _grouped_product_flops(rows_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    # (M, K) rows in groups, each times one (K, N) block; in backward (M, K) times groups of (K, N) rows. Same count.
    return 2 * rows_shape[0] * rows_shape[1] * blocks_shape[-1]


_GROUPED_PRODUCT = {torch.ops.aten._grouped_mm: _grouped_product_flops}


def diffusion_batch(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B, L) clean token ids -> a noised batch at the times (i + 1/2) / B: the mean cost over t, with little noise."""
    B, L = input_ids.shape
    t = low_discrepancy_times(torch.tensor(0.5 / B), torch.arange(B), total=B)
    shape = (B, L * model.noise_draws_per_token)
    uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": model.noise(input_ids, input_ids, t, uniforms), "timesteps": t, "labels": input_ids}


def affine_in_depth(cost: Callable[[PreTrainedModel], float], build: BuildModel) -> tuple[float, float]:
    """(cost without blocks, cost of a block): parameters and FLOPs are affine in the depth, so two depths tell all."""
    one, two = (cost(build(depth)) for depth in (1, 2))
    return one - (two - one), two - one


def matching_depth(target: float, affine: Sequence[float]) -> int:
    """The depth whose cost is nearest to `target`; raises `ValueError` if that would be less than one block."""
    rest, block = affine
    depth = round((target - rest) / block)
    if depth < 1:
        raise ValueError(
            f"no depth matches: without its blocks the model costs {rest:,.0f}, each block {block:,.0f}, and the "
            f"reference {target:,.0f} in all. Make the reference larger, or match by depth."
        )
    return depth


__all__ = ["affine_in_depth", "diffusion_batch", "flops_batch_size", "matching_depth", "training_flops"]
