from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives import DDPM, NoisySample

SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
LATENTS = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(**options: Any) -> DDPM:
    objective = DDPM(**options)
    objective.prepare(SCHEDULE)
    return objective


def sampled(**options: Any) -> Any:
    return prepared(**options).sample(LATENTS, Draws(0, range(64)))


def test_the_schedule_decides_unless_told_otherwise() -> None:
    assert prepared().prediction_type == "epsilon"
    objective = DDPM("v_prediction")
    assert objective.prepare(SCHEDULE)["prediction_type"] == "v_prediction"
    assert SCHEDULE["prediction_type"] == "epsilon"


def test_the_three_targets_describe_the_same_noisy_latents() -> None:
    epsilon, velocity, sample = (sampled(prediction_type=p) for p in ("epsilon", "v_prediction", "sample"))
    assert torch.equal(epsilon.noisy, velocity.noisy)
    alpha = prepared().scheduler.alphas_cumprod[epsilon.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha.sqrt() * sample.target + (1 - alpha).sqrt() * epsilon.target, epsilon.noisy)
    torch.testing.assert_close(alpha.sqrt() * epsilon.noisy - (1 - alpha).sqrt() * velocity.target, LATENTS)


def test_min_snr_weights() -> None:
    plain = sampled()
    alpha = prepared().scheduler.alphas_cumprod[plain.timesteps]
    snr = alpha / (1 - alpha)
    assert torch.equal(plain.weight, torch.ones(64))
    clipped = torch.minimum(snr, torch.tensor(5.0))
    for prediction_type, expected in {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }.items():
        weight = sampled(prediction_type=prediction_type, snr_gamma=5.0).weight
        torch.testing.assert_close(weight, expected)


def test_noise_offset_moves_whole_channels() -> None:
    difference = sampled(noise_offset=0.5).target - sampled().target
    assert torch.allclose(difference, difference.mean(dim=(2, 3), keepdim=True), atol=1e-6)
    assert difference[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.2)


def test_input_perturbation_reaches_the_input_but_not_the_target() -> None:
    plain, perturbed = sampled(), sampled(input_perturbation=0.1)
    assert torch.equal(plain.target, perturbed.target)
    alpha = prepared().scheduler.alphas_cumprod[plain.timesteps].view(-1, 1, 1, 1)
    added = (perturbed.noisy - plain.noisy) / (1 - alpha).sqrt()
    assert added.std() == pytest.approx(0.1, rel=0.05)


def test_evaluation_is_plain_so_that_runs_compare() -> None:
    objective = prepared(snr_gamma=5.0, noise_offset=0.5, input_perturbation=0.1).eval()
    for ours, plain in zip(objective.sample(LATENTS, Draws(0, range(64))), sampled(), strict=True):
        assert torch.equal(ours, plain)


def test_loss_is_per_sample_and_weighted() -> None:
    prediction, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    sample = NoisySample(prediction, torch.tensor([1, 2]), target, torch.tensor([1.0, 0.5]), prediction)
    assert DDPM().loss(prediction, sample).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_gamma": 0.0}, "snr_gamma=0.0 is too small; it must be above 0"),
        ({"noise_offset": -1.0}, "noise_offset=-1.0 is too small; it must be at least 0"),
        ({"input_perturbation": -1.0}, "input_perturbation=-1.0 is too small"),
    ],
)
def test_values_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DDPM(**options)


def test_epsilon_over_a_schedule_that_ends_in_pure_noise_is_refused() -> None:
    with pytest.raises(UserError, match="set prediction_type to v_prediction"):
        DDPM("epsilon").prepare({**SCHEDULE, "rescale_betas_zero_snr": True})
    DDPM("v_prediction").prepare({**SCHEDULE, "rescale_betas_zero_snr": True})
