from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_lora.draws import Draws
from lit_lora.errors import UserError
from lit_lora.objectives import (
    DDPM,
    CosMapWeighting,
    MinSNR,
    NoiseLevel,
    NoisySample,
    OffsetNoise,
    PseudoHuber,
    PyramidNoise,
    SigmaSqrt,
    SNRPseudoHuber,
)

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


def test_noise_level_is_that_of_the_schedule() -> None:
    sample = sampled()
    alpha = prepared().scheduler.alphas_cumprod[sample.timesteps]
    torch.testing.assert_close(sample.level.snr, alpha / (1 - alpha))
    torch.testing.assert_close(sample.level.time * 1000, sample.timesteps.float())


def test_the_weighting_is_told_what_is_predicted() -> None:
    assert torch.equal(sampled().weight, torch.ones(64))
    level = sampled().level
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        weight = sampled(prediction_type=prediction_type, weighting=MinSNR()).weight
        assert torch.equal(weight, MinSNR().weights(level, prediction_type))


def test_noise_kinds_change_input_and_target_one_after_the_other() -> None:
    changed = sampled(noise=[OffsetNoise(0.5), PyramidNoise()])
    draws = Draws(0, range(64))
    noise = PyramidNoise().apply(OffsetNoise(0.5).apply(draws.normal("noise", (4, 8, 8)), draws), draws)
    assert torch.equal(changed.target, noise)
    assert torch.equal(changed.noisy, prepared().scheduler.add_noise(LATENTS, noise, changed.timesteps))


def test_input_perturbation_reaches_the_input_but_not_the_target() -> None:
    plain, perturbed = sampled(), sampled(input_perturbation=0.1)
    assert torch.equal(plain.target, perturbed.target)
    alpha = prepared().scheduler.alphas_cumprod[plain.timesteps].view(-1, 1, 1, 1)
    added = (perturbed.noisy - plain.noisy) / (1 - alpha).sqrt()
    assert added.std() == pytest.approx(0.1, rel=0.05)


def test_evaluation_is_plain_so_that_runs_compare() -> None:
    objective = prepared(weighting=MinSNR(), noise=[OffsetNoise()], input_perturbation=0.1).eval()
    sample = objective.sample(LATENTS, Draws(0, range(64)))
    for ours, plain in zip(sample[:-2], sampled()[:-2], strict=True):
        assert torch.equal(ours, plain)
    huber = prepared(criterion=PseudoHuber())
    prediction = torch.zeros_like(LATENTS)
    assert not torch.equal(huber.loss(prediction, sample), objective.loss(prediction, sample))
    assert torch.equal(huber.eval().loss(prediction, sample), objective.loss(prediction, sample))


def test_loss_is_per_sample_and_weighted() -> None:
    prediction, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    level = NoiseLevel(torch.tensor([0.1, 0.2]), torch.ones(2))
    sample = NoisySample(prediction, torch.tensor([1, 2]), target, torch.tensor([1.0, 0.5]), prediction, level)
    assert DDPM().loss(prediction, sample).tolist() == [1.0, 2.0]
    far = 2 * 0.5 * ((4 + 0.25) ** 0.5 - 0.5)
    assert DDPM(criterion=PseudoHuber(0.5)).loss(prediction, sample)[1].item() == pytest.approx(0.5 * far)


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match=r"input_perturbation=-1.0 is too small"):
        DDPM(input_perturbation=-1.0)


def test_a_weighting_that_has_no_meaning_is_refused() -> None:
    refusal = (
        "SigmaSqrt weights the errors of flow_prediction, and this model predicts epsilon or v_prediction or sample"
    )
    with pytest.raises(UserError, match=refusal):
        DDPM(weighting=SigmaSqrt())
    with pytest.raises(UserError, match=r"CosMapWeighting .* this model predicts epsilon;"):
        DDPM("epsilon", weighting=CosMapWeighting())

    class OnlyVelocity(MinSNR):
        predictions = ("v_prediction",)

    objective = DDPM(weighting=OnlyVelocity())  # the base decides
    with pytest.raises(UserError, match=r"OnlyVelocity weights the errors of v_prediction, .* predicts epsilon"):
        objective.prepare(SCHEDULE)


def test_timesteps_of_a_range() -> None:
    objective = prepared(timestep_range=(0.25, 0.5))
    many = Draws(0, range(2000))
    timesteps = objective.sample(torch.zeros(2000, 1, 1, 1), many).timesteps
    assert torch.equal(timesteps, 250 + many.integers("timestep", 250))
    assert (timesteps.min(), timesteps.max()) == (250, 499)
    everywhere = objective.eval().sample(torch.zeros(2000, 1, 1, 1), many).timesteps
    assert torch.equal(everywhere, many.integers("timestep", 1000))


def test_ranges_that_are_none() -> None:
    for low, high in ((0.5, 0.5), (0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, 500.0)):
        with pytest.raises(UserError, match=rf"timestep_range=\[{low}, {high}\] must be a part of \[0, 1\]"):
            DDPM(timestep_range=(low, high))
    with pytest.raises(UserError, match=r"timestep_range=\[0.5, 0.5001\] holds none of the base's 1000 timesteps"):
        prepared(timestep_range=(0.5, 0.5001))


@pytest.mark.parametrize("base", ["DDIMScheduler", "PNDMScheduler"])
def test_zero_terminal_snr(base: str) -> None:
    """The schedule of Lin et al., 2023, algorithm 1, for training and for the scheduler that images are drawn with."""
    objective = DDPM("v_prediction", zero_terminal_snr=True)
    config = objective.prepare({**SCHEDULE, "_class_name": base})
    roots = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    first, last = roots[0].item(), roots[-1].item()
    expected = ((roots - last) * first / (first - last)).square()
    kept = objective.scheduler.alphas_cumprod.double()
    torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-6)
    assert kept[-1] == 0
    assert config["_class_name"] == "DDIMScheduler"  # PNDM has no such schedule
    drawing: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    drawing.set_timesteps(10)
    assert drawing.timesteps.long().tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    torch.testing.assert_close(drawing.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-6)
    assert drawing.config.clip_sample is (base == "DDIMScheduler")  # SD's DDIM configs say false
    assert SCHEDULE["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"prediction_type": "flow_prediction"}, "the DDIMScheduler is configured for flow matching"),
        ({"use_flow_sigmas": True}, r"configured for flow matching .*use_flow_sigmas True"),
        ({"timestep_type": "continuous"}, "the DDIMScheduler has timestep_type 'continuous', not 'discrete'"),
    ],
)
def test_schedules_of_another_kind_are_refused(config: dict[str, Any], refusal: str) -> None:
    with pytest.raises(UserError, match=refusal):
        DDPM().prepare(SCHEDULE | config)


def test_zero_terminal_snr_needs_another_prediction_than_epsilon() -> None:
    with pytest.raises(UserError, match="zero_terminal_snr is on, and epsilon cannot be learned from pure noise"):
        DDPM("epsilon", zero_terminal_snr=True)
    with pytest.raises(UserError, match="epsilon cannot be learned from pure noise: set prediction_type to v_predic"):
        prepared(zero_terminal_snr=True)


def test_a_weighting_that_leaves_pure_noise_out_is_told() -> None:
    with pytest.warns(UserWarning, match="MinSNR gives pure noise, in which the schedule ends, the weight 0"):
        prepared(prediction_type="v_prediction", weighting=MinSNR(), zero_terminal_snr=True)


def test_epsilon_over_a_schedule_that_ends_in_pure_noise_is_refused() -> None:
    with pytest.raises(UserError, match="set prediction_type to v_prediction"):
        DDPM("epsilon").prepare({**SCHEDULE, "rescale_betas_zero_snr": True})
    DDPM("v_prediction").prepare({**SCHEDULE, "rescale_betas_zero_snr": True})


def test_a_step_can_be_planned_without_values() -> None:
    """`lit-lora plan` runs steps on tensors without contents, from which no number can be read."""
    objective = prepared(weighting=MinSNR(), criterion=SNRPseudoHuber(), noise=[OffsetNoise(), PyramidNoise()])
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = objective.sample(torch.empty(2, 4, 8, 8), Draws(0, range(2)))
        assert objective.loss(sample.noisy, sample).shape == (2,)
