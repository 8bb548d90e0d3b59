"""Exact log-likelihood of a model's chain in one order of positions: another model than the diffusion it is made of."""

from collections.abc import Iterator
from typing import Any

import torch

from tdlm.modeling_tdlm import IGNORE_INDEX
from tdlm.trainer.trainer import base_model


@torch.no_grad()
def order_log_likelihood(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact log-likelihood, in nats, of the autoregressive model that asks this network for one position after another.

    It is no likelihood of the diffusion model and no bound on it: the diffusion's own order is random, and one order
    may do better or worse. Averaged over all orders it is minus the NELBO, for the sequential and the direct law.

    Each jump of the law, from the root down, goes through all scored positions in their order before the next jump
    begins, so the canvases are those of the process: as many forward passes as positions times jumps (MDM-Prime:
    positions times digits, those of one token one after another).

    Args:
        model: a model of this package, also inside PEFT or distributed wrappers, that does not see the time.
        input_ids: (B, L) clean token ids.
        attention_mask: (B, L), 0 at padding, which is neither seen nor scored.
        labels: (B, L), -100 at clean context, seen from the start.
        order: (L,) or (B, L) whole numbers, the turn of each position; those of one turn are drawn together, each by
            itself. Default: from left to right. Synchronous neighborhoods have the turn of their first position.

    Returns:
        (B,) log p(scored tokens | context) of that chain.
    """
    model = base_model(model)
    if model.config.time_conditioning:
        raise ValueError(
            "a chain of positions has no time, and this model has time_conditioning=True. Use `model.nelbo`."
        )
    labels = input_ids if labels is None else labels
    labels = labels if attention_mask is None else labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
    order = torch.arange(input_ids.shape[1], device=input_ids.device) if order is None else order
    if order.is_floating_point() or order.shape not in (input_ids.shape, input_ids.shape[1:]):
        raise ValueError(
            f"order is {order.dtype} of shape {tuple(order.shape)}; pass whole numbers, one for each position of "
            f"input_ids, {tuple(input_ids.shape)}."
        )
    chain = _digit_chain if model.config.model_type == "mdm_prime" else _tree_chain
    total = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
    for position_R, nll_R in chain(model, input_ids, attention_mask, labels, order.expand_as(input_ids)):
        total -= torch.zeros_like(total).index_add(0, position_R // input_ids.shape[1], nll_R.double())
    return total


Terms = Iterator[tuple[torch.Tensor, torch.Tensor]]  # (R,) flat positions and their -log p, one forward pass each


def _tree_chain(model: Any, input_ids: torch.Tensor, mask: Any, labels: torch.Tensor, order: torch.Tensor) -> Terms:
    scored, turn_BL = labels != IGNORE_INDEX, model.one_per_unit(order)
    level_H = torch.arange(model.tree.height, device=input_ids.device)[:, None, None]
    for lower, upper in sorted(model.law.jumps, reverse=True):
        for turn in turn_BL[scored].unique():
            now = scored & (turn_BL == turn)
            heights = torch.where(turn_BL < turn, lower, upper) * scored
            z_t = model.tree.ancestor(input_ids, heights)
            hidden_BLD = model.model(z_t, attention_mask=mask).last_hidden_state
            hidden_BLD, z_t = model.hide_padding(hidden_BLD, z_t, mask)
            is_scored_HBL = now & (level_H >= lower) & (level_H < upper)
            yield model._path_nll(hidden_BLD, z_t, labels, is_scored_HBL)[1:]


def _digit_chain(model: Any, input_ids: torch.Tensor, mask: Any, labels: torch.Tensor, order: torch.Tensor) -> Terms:
    scored, digit_N = labels != IGNORE_INDEX, torch.arange(model.config.num_digits, device=input_ids.device)
    for turn in order[scored].unique():
        now = scored & (order == turn)
        for digit in digit_N:
            waits_BLN = scored[..., None] & ((order > turn)[..., None] | (now[..., None] & (digit_N >= digit)))
            z_t = model.code.digits(input_ids).masked_fill(waits_BLN, model.code.mask_digit)
            hidden_BLD = model.model(z_t, attention_mask=mask).last_hidden_state
            position_R, nll_RN = model._digit_nll(hidden_BLD, z_t, labels.masked_fill(~now, IGNORE_INDEX))
            yield position_R, nll_RN[:, digit]


__all__ = ["order_log_likelihood"]
