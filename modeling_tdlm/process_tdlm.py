"""The noising process, as a law of heights: how high above its token each position stands at time t. No network here.

Every token climbs its own ancestor chain independently: at time t it stands at height h with probability m_h(t), and
z_t = A_h(x). A law is that probability, the transition kernel between two times and the rate of its jumps; forward
sampling, the posterior, reverse rates and the jump-conditioned estimator follow from these in the base class.

Times are float64: 1/(1 - alpha_t) near a threshold is beyond float32 and bf16.
Shape legend: B sequences, L positions, H height of the root, J kinds of jump (H where levels are climbed one by one).
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

TRAINING_FLOOR = 1e-4  # smallest 1 - alpha in a training weight; never used in a bound


class Schedule(NamedTuple):
    """An in-level schedule on tau in [0, 1]: alpha(0) = 1, alpha(1) = 0, decreasing.

    `absorbed` is 1 - alpha, given by itself because the difference loses its digits near tau = 0.
    """

    alpha: Callable[[torch.Tensor], torch.Tensor]
    absorbed: Callable[[torch.Tensor], torch.Tensor]
    d_alpha: Callable[[torch.Tensor], torch.Tensor]
    absorbed_inverse: Callable[[torch.Tensor], torch.Tensor]


SCHEDULES = {
    "linear": Schedule(
        alpha=lambda tau: 1 - tau,
        absorbed=lambda tau: tau,
        d_alpha=lambda tau: -torch.ones_like(tau),
        absorbed_inverse=lambda u: u,
    ),
    # alpha = 1 - cos(pi/2 (1 - tau)), the cosine schedule of masked diffusion (MD4).
    "cosine": Schedule(
        alpha=lambda tau: 1 - torch.sin(math.pi / 2 * tau),
        absorbed=lambda tau: torch.sin(math.pi / 2 * tau),
        d_alpha=lambda tau: -math.pi / 2 * torch.cos(math.pi / 2 * tau),
        absorbed_inverse=lambda u: torch.asin(u) * 2 / math.pi,
    ),
}


class JumpSample(NamedTuple):
    """Times at which a jump happens, from the jumps' own density. `t` (B,) float64, `jump` (B,) kind of jump."""

    t: torch.Tensor
    jump: torch.Tensor


class HeightLaw(ABC):
    """A Markov law of heights 0 ... H, non-decreasing in t, with m_0(0) = 1 and m_H(1) = 1.

    `jumps` lists the kinds of jump as (lower height, upper height); at most one kind leads down from each height, so
    a position's height says which jump it waits for. A reverse jump from g to h draws the children of levels
    g-1, ..., h, all scored from one hidden state.
    """

    jumps: list[tuple[int, int]]
    jumps_per_step: int = 1  # most jumps of one position between two sampling times

    def __init__(self, height: int):
        if height < 1:
            raise ValueError(f"height={height} must be at least 1: a tree has a root above its leaves.")
        self.height = height

    # ---- the law: what a subclass defines ----

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> "HeightLaw":
        """The law that a [`TDLMConfig`] describes."""

    @abstractmethod
    def height_probabilities(self, t: torch.Tensor) -> torch.Tensor:
        """(...) times -> (..., H+1) float64 probabilities m_h(t)."""

    @abstractmethod
    def kernel(self, s: float, t: float) -> torch.Tensor:
        """s <= t -> (H+1, H+1) float64 matrix, `[g, h]` = P(height h at t | height g at s)."""

    @abstractmethod
    def reverse_rates(self, t: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        """(...) times -> (..., J) float64 reverse rates r_j(t) = b_j m_lower / m_upper (Thm 3.4).

        `floor` bounds the denominator from below (training only). A rate is 0 where its upper height is empty.
        """

    @abstractmethod
    def sample_jump_times(self, u: torch.Tensor) -> JumpSample:
        """(B,) uniforms -> kind and time of a jump, each kind equally likely, time with density b_j(t) m_lower(t)."""

    @abstractmethod
    def sampling_times(self, steps_per_level: Sequence[int]) -> list[float]:
        """Times of a reverse trajectory, from 1 down to 0; a step between two of them skips no threshold."""

    @abstractmethod
    def split_steps(self, num_denoising_steps: int) -> list[int]:
        """Share a number of steps out evenly, as `sampling_times` takes them."""

    # ---- what follows from it ----

    def levels_of_jump(self) -> torch.Tensor:
        """(H+1, H) bool: `[g, l]` is True if a position at height g is scored on level l."""
        scored = torch.zeros(self.height + 1, self.height, dtype=torch.bool)
        for lower, upper in self.jumps:
            scored[upper, lower:upper] = True
        return scored

    def jump_of_height(self) -> torch.Tensor:
        """(H+1,) kind of jump that leads down from each height, -1 where none does."""
        jump_of_height = torch.full((self.height + 1,), -1)
        for jump, (_, upper) in enumerate(self.jumps):
            jump_of_height[upper] = jump
        return jump_of_height

    def sample_heights(self, t: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """(B,) times and (B, L) uniforms -> (B, L) heights with law m(t), by inversion."""
        return _invert(self.height_probabilities(t)[:, None], uniforms)

    def position_weights(self, t: torch.Tensor, heights: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        """(B,) times and (B, L) heights -> (B, L) float64 reverse rate of the jump each position waits for."""
        jump = self.jump_of_height().to(heights.device)[heights]
        rates = self.reverse_rates(t, floor).gather(1, jump.clamp(min=0))
        return torch.where(jump >= 0, rates, 0.0)

    def posterior(self, s: float, t: float) -> torch.Tensor:
        """s <= t -> (H+1, H+1) float64, `[g, h]` = q(height h at s | height g at t), Bayes' rule on the heights.

        Times the path of x this is q(z_s | z_t, x). Rows of heights that are impossible at t stay put.
        """
        m_s = self.height_probabilities(torch.tensor(s, dtype=torch.float64))
        joint = (m_s[:, None] * self.kernel(s, t)).T  # [g at t, h at s]
        # Normalised by its own sum, which is m_t, so that a certain move has probability exactly 1.
        m_t = joint.sum(-1, keepdim=True)
        return torch.where(m_t > 0, joint / m_t, torch.eye(self.height + 1, dtype=torch.float64))

    def sample_posterior(self, heights: torch.Tensor, posterior: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """(B, L) heights at t, (H+1, H+1) posterior, (B, L) uniforms -> (B, L) heights at s."""
        return _invert(posterior[heights], uniforms)


class SequentialLaw(HeightLaw):
    """The paper's law, one level at a time: from t_l to t_{l+1} heights are l or l+1 only (Lemma 3.1)."""

    def __init__(self, height: int, schedule: str = "linear", thresholds: Sequence[float] | None = None):
        super().__init__(height)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not one of {sorted(SCHEDULES)}.")
        self.schedule = SCHEDULES[schedule]
        self.thresholds = list(thresholds) if thresholds is not None else [i / height for i in range(height + 1)]
        validate_thresholds(self.thresholds, height)
        self.jumps = [(level, level + 1) for level in range(height)]

    @classmethod
    def from_config(cls, config: Any) -> "SequentialLaw":
        return cls(config.height, config.schedule, config.thresholds)

    def _locate(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(...) times -> level l with t in [t_l, t_{l+1}], tau = in-level time in [0, 1], width of the level."""
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64, device=t.device)
        level = torch.bucketize(t, thresholds[1:-1], right=True)
        start, end = thresholds[level], thresholds[level + 1]
        return level, ((t - start) / (end - start)).clamp(0, 1), end - start

    def height_probabilities(self, t: torch.Tensor) -> torch.Tensor:
        """Lemma 3.1: alpha_l(t) at height l, 1 - alpha_l(t) at height l+1."""
        t = t.to(torch.float64)
        level, tau, _ = self._locate(t)
        m = torch.zeros(*t.shape, self.height + 1, dtype=torch.float64, device=t.device)
        m.scatter_(-1, level[..., None], self.schedule.alpha(tau)[..., None])
        m.scatter_(-1, level[..., None] + 1, self.schedule.absorbed(tau)[..., None])
        return m

    def kernel(self, s: float, t: float) -> torch.Tensor:
        """In one level alpha_l(t)/alpha_l(s) stay (Prop. 3.2); across levels the product through the thresholds."""
        if not 0 <= s <= t <= 1:
            raise ValueError(f"a kernel runs forward between times in [0, 1], got s={s}, t={t}.")
        kernel = torch.eye(self.height + 1, dtype=torch.float64)
        for level in range(self.height):
            start, end = self.thresholds[level], self.thresholds[level + 1]
            if s < end and t > start:
                kernel = kernel @ self._in_level_kernel(level, max(s, start), min(t, end))
        return kernel

    def _in_level_kernel(self, level: int, s: float, t: float) -> torch.Tensor:
        start, end = self.thresholds[level], self.thresholds[level + 1]
        alpha_s, alpha_t = self.schedule.alpha(
            torch.tensor([(s - start) / (end - start), (t - start) / (end - start)], dtype=torch.float64)
        )
        kernel = torch.eye(self.height + 1, dtype=torch.float64)
        kernel[level, level] = alpha_t / alpha_s
        kernel[level, level + 1] = 1 - alpha_t / alpha_s
        return kernel

    def reverse_rates(self, t: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        """r_l(t) = -alpha_l'(t) / (1 - alpha_l(t)) in the level that runs at t, 0 in the others (Thm 3.4)."""
        t = t.to(torch.float64)
        level, tau, width = self._locate(t)
        weight = -self.schedule.d_alpha(tau) / width / self.schedule.absorbed(tau).clamp(min=floor)
        rates = torch.zeros(*t.shape, self.height, dtype=torch.float64, device=t.device)
        return rates.scatter_(-1, level[..., None], weight[..., None])

    def sample_jump_times(self, u: torch.Tensor) -> JumpSample:
        """A token makes one jump a level, at the time where 1 - alpha_l is uniform."""
        scaled = u.to(torch.float64) * self.height
        level = scaled.long().clamp(max=self.height - 1)
        tau = self.schedule.absorbed_inverse((scaled - level).clamp(0, 1))
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64, device=u.device)
        return JumpSample(thresholds[level] + tau * (thresholds[level + 1] - thresholds[level]), level)

    def sampling_times(self, steps_per_level: Sequence[int]) -> list[float]:
        """Equal steps within each level; `steps_per_level[0]` is for the first level generated, below the root."""
        if len(steps_per_level) != self.height or any(n < 1 for n in steps_per_level):
            raise ValueError(
                f"steps_per_level={list(steps_per_level)} must give at least 1 step for each of the tree's "
                f"{self.height} levels, from the root down."
            )
        times = [1.0]
        for level, steps in zip(reversed(range(self.height)), steps_per_level, strict=True):
            start, end = self.thresholds[level], self.thresholds[level + 1]
            times += [end + (start - end) * i / steps for i in range(1, steps)] + [start]
        return times

    def split_steps(self, num_denoising_steps: int) -> list[int]:
        if num_denoising_steps < self.height:
            raise ValueError(
                f"num_denoising_steps={num_denoising_steps} is fewer than the tree's {self.height} levels, and every "
                f"level needs a step. Use at least {self.height}."
            )
        share, extra = divmod(num_denoising_steps, self.height)
        return [share + (i < extra) for i in range(self.height)]


LAWS: dict[str, type[HeightLaw]] = {"sequential": SequentialLaw}


def validate_thresholds(thresholds: Sequence[float], height: int) -> None:
    """Raise `ValueError` unless 0 = t_0 < ... < t_H = 1."""
    increasing = all(lower < upper for lower, upper in itertools.pairwise(thresholds))
    if len(thresholds) != height + 1 or thresholds[0] != 0 or thresholds[-1] != 1 or not increasing:
        raise ValueError(
            f"thresholds={list(thresholds)} must be {height + 1} increasing times from 0 to 1, one more than the "
            f"tree's {height} levels."
        )


def low_discrepancy_times(u: torch.Tensor, index: torch.Tensor, total: int) -> torch.Tensor:
    """One uniform `u` and the global indices of some of `total` sequences -> float64 times (u + i/total) mod 1."""
    return (u.to(torch.float64) + index.to(torch.float64) / total) % 1.0


def draw_uniforms(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Uniforms in [0, 1). Drawn where the generator lives, so a CPU generator gives the same noise on every device."""
    where = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=where, dtype=dtype).to(device)


def _invert(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(..., H+1) probabilities and (...) uniforms in [0, 1) -> (...) indices, by the inverse distribution function."""
    cumulative = probabilities.cumsum(-1)[..., :-1]
    return (uniforms[..., None].to(torch.float64) >= cumulative).sum(-1)


__all__ = [
    "LAWS",
    "SCHEDULES",
    "TRAINING_FLOOR",
    "HeightLaw",
    "JumpSample",
    "Schedule",
    "SequentialLaw",
    "draw_uniforms",
    "low_discrepancy_times",
    "validate_thresholds",
]
