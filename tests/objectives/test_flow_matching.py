"""Flow matching against its formulas and against diffusers' own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives import (
    CosMap,
    CosMapWeighting,
    DebiasedEstimation,
    FlowMatching,
    LogitNormal,
    Mode,
    OffsetNoise,
    SigmaSqrt,
    TimestepDensity,
    Uniform,
    Weighting,
)

SCHEDULER = dict(FlowMatchEulerDiscreteScheduler().config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
MANY = Draws(3, range(4000))
WEIGHTINGS: dict[str, Weighting | None] = {"none": None, "sigma_sqrt": SigmaSqrt(), "cosmap": CosMapWeighting()}


def prepared(scheduler: dict[str, Any] | None = None, **options: Any) -> FlowMatching:
    objective = FlowMatching(**options)
    objective.prepare(SCHEDULER | (scheduler or {}))
    return objective


def sigmas_of(objective: FlowMatching, count: int = 64, num_tokens: int = 1) -> Tensor:
    sample = objective.sample(torch.zeros(count, 1, 1, 1), Draws(3, range(count)), num_tokens)
    return sample.timesteps / 1000


def test_the_path_is_straight_and_the_target_its_velocity() -> None:
    latents = torch.randn(8, 4, 2, 2)
    draws = Draws(5, range(8))
    sample = prepared().sample(latents, draws)
    sigma = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    noise = draws.normal("noise", (4, 2, 2))
    torch.testing.assert_close(sample.noisy, (1 - sigma) * latents + sigma * noise)
    torch.testing.assert_close(sample.target, noise - latents)
    assert sample.latents is latents
    assert sample.timesteps.dtype == torch.float32


def test_one_euler_step_along_the_target_gives_the_latents() -> None:
    latents = torch.randn(8, 4, 2, 2)
    sample = prepared().sample(latents, Draws(5, range(8)))
    sigma = (sample.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(sample.noisy - sigma * sample.target, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("density", "name"), [(Uniform(), "none"), (LogitNormal(0.0, 0.7), "logit_normal"), (Mode(0.8), "mode")]
)
def test_densities_are_those_of_diffusers(density: TimestepDensity, name: str) -> None:
    """Diffusers' draws count from the noise; all of these are symmetric."""
    theirs = compute_density_for_timestep_sampling(name, 40_000, logit_mean=0.0, logit_std=0.7, mode_scale=0.8)
    ours = density.times(MANY)
    levels = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(torch.quantile(ours, levels), torch.quantile(theirs, levels), rtol=0, atol=0.03)


def test_formulas_of_densities() -> None:
    u = MANY.uniform("timestep")
    assert torch.equal(Uniform().times(MANY), u)
    normal = MANY.normal("timestep", ())
    torch.testing.assert_close(LogitNormal(0.5, 2.0).times(MANY), 1 / (1 + (-(0.5 + 2 * normal)).exp()))
    torch.testing.assert_close(Mode(1.0).times(MANY), 1 - u - ((math.pi * u / 2).cos() ** 2 - 1 + u))
    # The noise level of a cosine schedule: tan(pi u / 2) is sigma by 1 - sigma.
    times = CosMap().times(MANY)
    torch.testing.assert_close(times / (1 - times), (math.pi * u / 2).tan(), rtol=1e-3, atol=1e-3)


def test_a_higher_mean_is_more_noise() -> None:
    assert LogitNormal(1.0).times(MANY).mean() > LogitNormal().times(MANY).mean() + 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_those_of_the_scheduler(shift: float) -> None:
    ours = sigmas_of(prepared({"shift": shift}))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas[:1000]
    assert (ours[:, None] - theirs[None]).abs().min(dim=1).values.max() < 1e-6
    assert len(ours.unique()) > 50


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_shift_by_resolution_is_that_of_the_scheduler(kind: str, num_tokens: int) -> None:
    config: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift": 3.0}
    objective = prepared(config)
    unshifted = sigmas_of(prepared({"shift": 1.0}))
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    expected = FlowMatchEulerDiscreteScheduler(**config).time_shift(mu, 1.0, unshifted)
    torch.testing.assert_close(sigmas_of(objective, num_tokens=num_tokens), expected)


def test_a_shift_of_its_own_takes_the_place_of_the_scheduler_s() -> None:
    assert prepared({"use_dynamic_shifting": True}, shift=2.5).shift_for(4096) == 2.5
    assert prepared({"shift": 3.0}).shift_for(4096) == 3.0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_are_those_of_diffusers(weighting: str) -> None:
    objective = prepared(weighting=WEIGHTINGS[weighting])
    sample = objective.sample(torch.zeros(64, 1, 1, 1), Draws(3, range(64)))
    sigmas = sample.timesteps / 1000
    torch.testing.assert_close(sample.weight, compute_loss_weighting_for_sd3(weighting, sigmas))
    formula = {
        "none": torch.ones(64),
        "sigma_sqrt": sigmas**-2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
    }
    torch.testing.assert_close(sample.weight, formula[weighting])


def test_evaluation_is_uniform_unshifted_and_unweighted() -> None:
    objective = prepared(
        {"shift": 3.0}, density=LogitNormal(3.0), weighting=CosMapWeighting(), noise=[OffsetNoise()]
    ).eval()
    sample = objective.sample(torch.zeros(4000, 1, 1, 1), MANY)
    assert torch.equal(sample.weight, torch.ones(4000))
    assert 480 < sample.timesteps.mean() < 520
    plain = prepared(density=Uniform(), shift=1.0).eval().sample(torch.zeros(4000, 1, 1, 1), MANY)
    assert torch.equal(sample.timesteps, plain.timesteps)
    assert torch.equal(sample.target, plain.target)


def test_a_diffusion_solver_that_is_set_up_for_flow() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 2.0}
    objective = FlowMatching()
    objective.prepare(config)
    assert objective.shift_for(1) == 2.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "the scheduler is DDIMScheduler, and FlowMatching supports FlowMatchEuler"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "not configured for flow matching"),
        ({"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_schedulers_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(config)


def test_noise_level_and_noise_kinds() -> None:
    sample = prepared(noise=[OffsetNoise(0.5)]).sample(torch.zeros(8, 4, 2, 2), Draws(5, range(8)))
    sigma = sample.timesteps / 1000
    torch.testing.assert_close(sample.level.time, sigma)
    torch.testing.assert_close(sample.level.snr, (1 / sigma - 1) ** 2)
    draws = Draws(5, range(8))
    assert torch.equal(sample.target, OffsetNoise(0.5).apply(draws.normal("noise", (4, 2, 2)), draws))


def test_levels_of_a_range() -> None:
    """Shifted levels are scaled to the range; evaluation has all of them."""
    objective, whole = prepared({"shift": 3.0}, timestep_range=(0.8, 1.0)), prepared({"shift": 3.0})
    sigmas = sigmas_of(objective)
    torch.testing.assert_close(sigmas, 0.8 + 0.2 * sigmas_of(whole))
    assert sigmas.min() >= 0.8
    assert torch.equal(sigmas_of(objective.eval()), sigmas_of(whole.eval()))
    with pytest.raises(UserError, match=r"timestep_range=\[0.9, 0.1\] must be a part of \[0, 1\]"):
        FlowMatching(timestep_range=(0.9, 0.1))


def test_a_weighting_that_has_no_meaning_is_refused() -> None:
    refusal = "DebiasedEstimation weights the errors of epsilon or v_prediction or sample, .* predicts flow_prediction"
    with pytest.raises(UserError, match=refusal):
        FlowMatching(weighting=DebiasedEstimation())


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match="shift=0 is too small; it must be above 0"):
        FlowMatching(shift=0)
    with pytest.raises(UserError, match=r"std=-1.0 is too small; it must be above 0"):
        LogitNormal(std=-1.0)
    with pytest.raises(UserError, match=r"scale=2.0 is out of range; it must lie in \[-1, 1.75"):
        Mode(2.0)
