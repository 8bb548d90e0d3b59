"""The noising process, as a law of heights: how high above its token each position stands at time t. No network here.

Every token climbs its own ancestor chain independently: at time t it stands at height h with probability m_h(t), and
z_t = A_h(x). A law is that probability, the transition kernel between two times and the density of its jumps; forward
sampling, the posterior, reverse rates and the jump-conditioned estimator follow from these in the base class.

Three laws: sequential (the paper, level by level), concurrent (all levels at once; two levels are HDLM's process) and
direct (token to root in one jump; on a flat tree all three are MDLM).

Times are float64: 1/(1 - alpha_t) near a threshold is beyond float32 and bf16.
Shape legend: B sequences, L positions, H height of the root, J kinds of jump (H where levels are climbed one by one).
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

TRAINING_FLOOR = 1e-4  # smallest m_upper in a training weight; never used in a bound
LARGEST_CLOCK = 750.0  # exp(-750) is 0 in float64


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
    # alpha = 1 - cos(pi/2 (1 - tau)), the cosine schedule of masked diffusion (MD4); as a square where it is small.
    "cosine": Schedule(
        alpha=lambda tau: torch.where(
            tau < 0.5, 1 - torch.sin(math.pi / 2 * tau), 2 * torch.sin(math.pi / 4 * (1 - tau)) ** 2
        ),
        absorbed=lambda tau: torch.sin(math.pi / 2 * tau),
        d_alpha=lambda tau: -math.pi / 2 * torch.cos(math.pi / 2 * tau),
        absorbed_inverse=lambda u: torch.asin(u) * 2 / math.pi,
    ),
}

# Weights of the levels in training (App. D), x = l / (H - 1) from 0 at the tokens to 1 below the root.
LEVEL_WEIGHTINGS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda x, scale: 1 + scale * x,
    "exponential": lambda x, scale: torch.exp(scale * x),
}


def level_weights(weighting: str | None, scale: float, height: int) -> torch.Tensor:
    """(H,) float64 training weights of the levels 0 ... H-1 from the bottom, of mean 1. App. D."""
    if weighting is None or height == 1:
        return torch.ones(height, dtype=torch.float64)
    weights = LEVEL_WEIGHTINGS[weighting](torch.arange(height, dtype=torch.float64) / (height - 1), scale)
    return weights / weights.mean()


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
    def jump_densities(self, t: torch.Tensor) -> torch.Tensor:
        """(...) times -> (..., J) float64 density b_j(t) m_lower(t) of "a jump of kind j happens at t"."""

    @abstractmethod
    def sample_jump_times(self, u: torch.Tensor) -> JumpSample:
        """(B,) uniforms -> kind and time of a jump, each kind equally likely, time with density b_j(t) m_lower(t)."""

    # ---- what follows from it ----

    def reverse_rates(self, t: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
        """(...) times -> (..., J) float64 reverse rates r_j(t) = b_j m_lower / m_upper (Thm 3.4).

        `floor` bounds the denominator from below (training only). A rate is 0 where its upper height is empty.
        """
        m = self.height_probabilities(t)
        m_upper = torch.stack([m[..., upper] for _, upper in self.jumps], dim=-1)  # an index tensor would be a copy
        return torch.where(m_upper > 0, self.jump_densities(t) / m_upper.clamp(min=floor), 0.0)

    def sampling_times(self, steps_per_level: Sequence[int]) -> list[float]:
        """Times of a reverse trajectory, from 1 down to 0; a step between two of them skips no threshold."""
        if len(steps_per_level) != 1 or steps_per_level[0] < 1:
            raise ValueError(
                f"steps_per_level={list(steps_per_level)}: only the sequential law goes level by level. Set "
                "num_denoising_steps to at least 1."
            )
        steps = steps_per_level[0]
        return [1 - i / steps for i in range(steps)] + [0.0]

    def split_steps(self, num_denoising_steps: int) -> list[int]:
        """Share a number of steps out evenly, as `sampling_times` takes them."""
        return [num_denoising_steps]

    def levels_of_jump(self) -> torch.Tensor:
        """(H+1, H) bool: `[g, l]` is True if a position at height g is scored on level l."""
        scored = torch.zeros(self.height + 1, self.height, dtype=torch.bool)
        for lower, upper in self.jumps:
            scored[upper, lower:upper] = True
        return scored

    @property
    def longest_jump(self) -> int:
        """Levels that one jump crosses at most."""
        return max(upper - lower for lower, upper in self.jumps)

    def lower_heights(self) -> torch.Tensor:
        """(H+1,) where the reverse jump from each height lands; the height itself where none starts."""
        lower_heights = torch.arange(self.height + 1)
        for lower, upper in self.jumps:
            lower_heights[upper] = lower
        return lower_heights

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
        self.schedule = _schedule(schedule)
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

    def jump_densities(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha_l'(t) in the level that runs at t, 0 in the others: r_l = -alpha_l' / (1 - alpha_l) (Thm 3.4)."""
        t = t.to(torch.float64)
        level, tau, width = self._locate(t)
        densities = torch.zeros(*t.shape, self.height, dtype=torch.float64, device=t.device)
        return densities.scatter_(-1, level[..., None], (-self.schedule.d_alpha(tau) / width)[..., None])

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


class ConcurrentLaw(HeightLaw):
    """All levels at once: every jump has rate -alpha'/alpha, so in the clock u = -ln alpha(t) heights are Poisson, cut
    at H. With H = 2 this is HDLM's process (gamma = 1); with H = 1, MDLM's.

        m_h = alpha u^h / h!  for h < H,        m_H = P(H, u), the regularised lower incomplete gamma function
    """

    def __init__(self, height: int, schedule: str = "linear"):
        super().__init__(height)
        self.schedule = _schedule(schedule)
        self.jumps = [(level, level + 1) for level in range(height)]
        self.jumps_per_step = height

    @classmethod
    def from_config(cls, config: Any) -> "ConcurrentLaw":
        return cls(config.height, config.schedule)

    def clock(self, t: torch.Tensor) -> torch.Tensor:
        """(...) times -> u = -ln alpha(t), exact near both ends and finite at t = 1, where alpha is 0 in any case."""
        alpha, absorbed = self.schedule.alpha(t), self.schedule.absorbed(t)
        return torch.where(absorbed < 0.5, -torch.log1p(-absorbed), -torch.log(alpha)).clamp(max=LARGEST_CLOCK)

    def _poisson(self, u: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., H) u^h / h! for h < H."""
        h = torch.arange(self.height, dtype=torch.float64, device=u.device)
        return u[..., None] ** h / torch.exp(torch.lgamma(h + 1))

    def height_probabilities(self, t: torch.Tensor) -> torch.Tensor:
        t = t.to(torch.float64)
        u = self.clock(t)
        below = self.schedule.alpha(t)[..., None] * self._poisson(u)
        return torch.cat([below, _at_least(self.height, u)[..., None]], dim=-1)

    def kernel(self, s: float, t: float) -> torch.Tensor:
        """From height g: a Poisson number of further jumps with mean u_t - u_s, cut at H."""
        if not 0 <= s <= t <= 1:
            raise ValueError(f"a kernel runs forward between times in [0, 1], got s={s}, t={t}.")
        u_s, u_t = self.clock(torch.tensor([s, t], dtype=torch.float64))
        jumps = torch.exp(u_s - u_t) * self._poisson(u_t - u_s)
        kernel = torch.eye(self.height + 1, dtype=torch.float64)
        for g in range(self.height):
            kernel[g, g : self.height] = jumps[: self.height - g]
            kernel[g, self.height] = _at_least(self.height - g, u_t - u_s)
        return kernel

    def jump_densities(self, t: torch.Tensor) -> torch.Tensor:
        """b(t) m_h(t) = -alpha'(t) u^h / h!."""
        t = t.to(torch.float64)
        return -self.schedule.d_alpha(t)[..., None] * self._poisson(self.clock(t))

    def sample_jump_times(self, u: torch.Tensor) -> JumpSample:
        """A token makes one jump h -> h+1, at the clock's reading where P(h+1, .) is uniform: found by bisection."""
        scaled = u.to(torch.float64) * self.height
        jump = scaled.long().clamp(max=self.height - 1)
        low, high = torch.zeros_like(scaled), torch.full_like(scaled, LARGEST_CLOCK)
        for _ in range(64):  # halves the bracket down to float64's own resolution
            middle = (low + high) / 2
            late = torch.special.gammainc((jump + 1).to(torch.float64), middle) > scaled - jump
            low, high = torch.where(late, low, middle), torch.where(late, middle, high)
        return JumpSample(self.schedule.absorbed_inverse(-torch.expm1(-high)), jump)


class DirectLaw(HeightLaw):
    """One jump from a token to the root, m_H = 1 - alpha(t): MDLM's process, scored along the path of the tree."""

    def __init__(self, height: int, schedule: str = "linear"):
        super().__init__(height)
        self.schedule = _schedule(schedule)
        self.jumps = [(0, height)]

    @classmethod
    def from_config(cls, config: Any) -> "DirectLaw":
        return cls(config.height, config.schedule)

    def height_probabilities(self, t: torch.Tensor) -> torch.Tensor:
        t = t.to(torch.float64)
        m = torch.zeros(*t.shape, self.height + 1, dtype=torch.float64, device=t.device)
        m[..., 0], m[..., -1] = self.schedule.alpha(t), self.schedule.absorbed(t)
        return m

    def kernel(self, s: float, t: float) -> torch.Tensor:
        """alpha(t)/alpha(s) stay."""
        if not 0 <= s <= t <= 1:
            raise ValueError(f"a kernel runs forward between times in [0, 1], got s={s}, t={t}.")
        alpha_s, alpha_t = self.schedule.alpha(torch.tensor([s, t], dtype=torch.float64))
        kernel = torch.eye(self.height + 1, dtype=torch.float64)
        kernel[0, 0] = alpha_t / alpha_s if s < 1 else 1.0
        kernel[0, -1] = 1 - kernel[0, 0]
        return kernel

    def jump_densities(self, t: torch.Tensor) -> torch.Tensor:
        """-alpha'(t): r = -alpha' / (1 - alpha)."""
        return -self.schedule.d_alpha(t.to(torch.float64))[..., None]

    def sample_jump_times(self, u: torch.Tensor) -> JumpSample:
        return JumpSample(self.schedule.absorbed_inverse(u.to(torch.float64)), torch.zeros_like(u, dtype=torch.int64))


LAWS: dict[str, type[HeightLaw]] = {"sequential": SequentialLaw, "concurrent": ConcurrentLaw, "direct": DirectLaw}


def _schedule(name: str) -> Schedule:
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is not one of {sorted(SCHEDULES)}.")
    return SCHEDULES[name]


def _at_least(count: int, mean: torch.Tensor) -> torch.Tensor:
    """P(a Poisson number with this mean >= count >= 1); 1 - sum loses its digits where it is small."""
    return torch.special.gammainc(torch.full_like(mean, count), mean)


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
    "LEVEL_WEIGHTINGS",
    "SCHEDULES",
    "TRAINING_FLOOR",
    "ConcurrentLaw",
    "DirectLaw",
    "HeightLaw",
    "JumpSample",
    "Schedule",
    "SequentialLaw",
    "draw_uniforms",
    "level_weights",
    "low_discrepancy_times",
    "validate_thresholds",
]
