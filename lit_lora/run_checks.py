"""Checks of a run before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig, PeftType

from lit_lora.adapters import check_sharded_training
from lit_lora.distributed import check_strategy, is_ours, shards_weights
from lit_lora.errors import UserError, check_kind
from lit_lora.families import ModelFamily, check_size, editing_families
from lit_lora.loops import never_validates
from lit_lora.memory.host_weights import check_offload
from lit_lora.memory.optimizer_in_backward import check_optimizer_in_backward
from lit_lora.objectives import Objective
from lit_lora.objectives.counting import check_counting
from lit_lora.optimizer_settings import check_lr_finder
from lit_lora.quantization import Quantization
from lit_lora.quantization.packed_convolution import can_pack
from lit_lora.redact import redact
from lit_lora.sampling import check_guidance_rescale

if TYPE_CHECKING:
    from lit_lora.module import LoraDiffusion

_BASE_DTYPES = ("float32", "bfloat16", "float16")


def check_arguments(
    family: object,
    adapter: object,
    text_adapter: object,
    objective: object,
    optimizer: object,
    quantization: object,
    base_dtype: object,
) -> None:
    """Refuse arguments of a module that are of other classes than it takes: names, classes in place of objects, dicts.

    Raises:
        UserError: If there is one.
    """
    check_kind(ModelFamily, 'StableDiffusion("embedded")', family=family)
    check_kind(PeftConfig, "peft.LoraConfig(r=16, lora_alpha=16)", adapter=adapter, text_adapter=text_adapter)
    check_kind(Objective, "DDPM()", objective=objective)
    check_kind(Quantization, "NF4()", quantization=quantization)
    if not callable(optimizer):
        told = repr(optimizer) if isinstance(optimizer, str) else f"an object of {type(optimizer).__name__}"
        raise UserError(
            f"optimizer is {told}; give a function that makes one for the parameters, such as "
            "functools.partial(torch.optim.AdamW, lr=1e-4)"
        )
    if base_dtype not in _BASE_DTYPES:
        raise UserError(f"base_dtype={base_dtype!r} is none of {', '.join(_BASE_DTYPES)}")


def check_other_callbacks(trainer: Trainer, *averages: type[Callback]) -> None:
    """Refuse callbacks of Lightning that change the frozen base or copy it.

    Averages copy the module before its adapter is there, or with its frozen base, which would be in all checkpoints.
    ``ModelPruning`` sets weights of the base to zero, which no checkpoint of an adapter holds.

    Args:
        trainer: Trainer of the run.
        *averages: Classes of averages to refuse.

    Raises:
        UserError: If the trainer has such a callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, averages):
            raise UserError(
                f"{name} copies the whole module, before its adapter is there or with its frozen base; use "
                f"lit_lora.AdapterEMA, which averages what is trained"
            )
        if isinstance(callback, ModelPruning):
            raise UserError(
                f"{name} sets weights of the frozen base to zero, which no checkpoint of an adapter holds; leave it out, or use "
                f"lit_lora.RankBudget, which prunes the adapter's ranks"
            )


def check_data(module: LoraDiffusion) -> None:
    """Check that a module can be trained on its datamodule's image sizes and masks, if it has a datamodule that tells them.

    Args:
        module: Module whose family has read its configs, and whose objective is prepared.

    Raises:
        UserError: If a size does not fit, the family takes no editing pairs, the objective ignores masks or prior preservation,
            or class images have no ``prior``.
    """
    if module._trainer is None:
        return
    if module.saved is not None and module.trainer.training:
        module.saved.warn_of_changes(module)
    datamodule, family = getattr(module.trainer, "datamodule", None), module.family
    sizes = list(getattr(datamodule, "image_sizes", list)())
    for height, width in sizes:
        check_size(family, height, width)
    decoders = getattr(datamodule, "decoders", None) or [getattr(datamodule, "decoder", None)]
    _check_pairs(family, decoders)
    masks = any(getattr(decoder, "mask", None) is not None for decoder in decoders)
    if any(one.prior for one in getattr(datamodule, "training_sets", ())):
        prior = module.objective.prior
        if prior is None:
            raise UserError(
                "a set of train_sets has prior: true, and the objective has no prior; set model.objective.init_args.prior to "
                "lit_lora.objectives.PriorPreservation, or remove prior from the set"
            )
        if prior.class_keys is not None:
            raise UserError(
                f"a set of train_sets has prior: true, and class_keys={prior.class_keys!r} of the objective's prior would count "
                "instead; remove class_keys, or prior from the set"
            )
    if masks or module.objective.prior is not None:
        size = next(iter(sizes), (family.default_size, family.default_size))
        check_counting(module.objective, family.latent_shape(*size), masks)


def _check_pairs(family: ModelFamily, decoders: Sequence[object]) -> None:
    """Check that editing pairs are given to a family that takes them; warn if one that takes them gets none."""
    name = type(family).__name__
    for decoder in decoders:
        pairs = getattr(decoder, "pairs", None)  # other decoders than ours do not tell
        if pairs and not family.takes_sources:
            raise UserError(
                f"decoder {type(decoder).__name__} gives editing pairs, and {name} trains text to image; {editing_families()}; "
                f"or set data.init_args.decoder to lit_lora.datamodules.ImageDecoder"
            )
        if pairs is False and family.takes_sources:
            warnings.warn(
                f"{name} is trained without source images, as text to image; to train on editing pairs set "
                f"data.init_args.decoder to lit_lora.datamodules.EditDecoder",
                stacklevel=2,
            )


def check_precision(precision: str, base_dtype: str) -> None:
    """Check that a trainer's precision leaves the adapter in float32.

    Args:
        precision: Precision of the trainer.
        base_dtype: Name of the base's dtype, for the message.

    Raises:
        UserError: If the adapter would have another dtype.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision={precision!r} would cast the adapter and its optimizer state too; leave it at 32-true and "
            f"set model.base_dtype, which is {base_dtype!r} now"
        )


def check_run(module: LoraDiffusion, stage: str) -> None:
    """Check that precision, strategy and device can train a module with its options.

    Args:
        module: Module with its trainer.
        stage: Stage of the trainer, such as ``fit``.

    Raises:
        UserError: If they exclude each other; the message names the keys.
    """
    trainer = module.trainer
    precision = str(trainer.precision)
    check_precision(precision, str(module.base_dtype).removeprefix("torch."))
    if module.base_dtype == torch.float16 and stage == "fit" and precision != "16-mixed":
        raise UserError(
            f"model.base_dtype='float16' needs a scaled loss: set trainer.precision to '16-mixed' (it is {precision!r}), or "
            f"model.base_dtype to 'bfloat16'"
        )

    check_lr_finder(trainer, module)
    check_guidance_rescale(module.family.pipeline_class, module.sampling.guidance_rescale)
    strategy = trainer.strategy
    check_strategy(strategy)
    for config in module.adapter_configs:
        check_sharded_training(config, strategy)
        if stage == "fit":
            _check_module_dropout(config, strategy)
    if module.adapter is None and shards_weights(strategy):
        raise UserError(
            f"model.adapter is null, and {type(strategy).__name__} loads the denoiser block by block with its adapter; use "
            f"strategy ddp, or give the denoiser an adapter"
        )
    if module.convolutions != "plain" and is_ours(strategy):
        raise UserError(
            f"model.convolutions={module.convolutions!r} is for one device and for strategy ddp: {type(strategy).__name__} needs "
            f"contiguous weights; use 'plain', or strategy ddp"
        )
    if module.convolutions == "channels_last" and module.memory.offload_folder is not None:
        raise UserError(
            "model.convolutions='channels_last' would copy weights from memory.offload_folder into memory; use 'plain', or leave "
            "the folder out"
        )
    if module.convolutions == "packed" and strategy.root_device.type != "cpu":
        raise UserError(
            f"model.convolutions='packed' is for CPUs, and this run computes on {strategy.root_device}; use 'plain' or "
            f"'channels_last'"
        )
    if module.convolutions == "packed" and not can_pack(module.base_dtype):
        name = str(module.base_dtype).removeprefix("torch.")
        raise UserError(
            f"convolutions='packed' needs a CPU that computes in {name}, as those with AVX-512 do, and this one does not; use "
            f"'plain', or base_dtype float32"
        )
    if module.compile_blocks and getattr(strategy, "zero_stage_3", False):
        raise UserError(
            "model.compile_blocks gains nothing under ZeRO-3, whose hooks split the blocks into single layers; set it to false, "
            "or use strategy lit_lora_fsdp or lit_lora_deepspeed_stage_2"
        )
    datamodule = getattr(trainer, "datamodule", None)
    if stage != "predict":
        sets = [one.shards for one in getattr(datamodule, "training_sets", ())]
        others = getattr(datamodule, "train_shards", None) or getattr(datamodule, "val_shards", None)
        shards = sets[0] if len(sets) == 1 else sets or others
        module.text_training.check_cached(getattr(datamodule, "cached", ()), shards and redact(str(shards)))
    device = strategy.root_device
    module.quantization.check(device)
    if module.memory.text_encoder_quantization is not None:
        module.memory.text_encoder_quantization.check(device)
    if module.memory.offload_folder is not None and not module.memory.offload_blocks:
        raise UserError(
            f"memory.offload_folder={module.memory.offload_folder!r} has no effect without memory.offload_blocks; set that to "
            f"true, or leave the folder out"
        )
    for name in module.memory.offloads:
        check_offload(f"memory.{name}", device, strategy if is_ours(strategy) else None)
    if module.memory.optimizer_in_backward and stage == "fit":
        for config in module.adapter_configs:
            check_optimizer_in_backward(trainer, config)


def _check_module_dropout(config: PeftConfig, strategy: Strategy) -> None:
    if config.peft_type not in (PeftType.LOHA, PeftType.LOKR):  # others leave out parts of a layer
        return
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, DDPStrategy):
        return
    dropout = getattr(config, "module_dropout", 0)
    if dropout and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise UserError(
            f"module_dropout={dropout} leaves layers out of a step, and ddp waits for the gradients of all layers; set "
            "trainer.strategy to ddp_find_unused_parameters_true, or module_dropout to 0"
        )


def has_validation(data: Any) -> bool:
    """Whether a datamodule has validation data."""
    if hasattr(data, "val_samples"):
        return bool(data.val_shards or data.val_samples)
    return hasattr(data, "val_dataloader") and type(data).val_dataloader is not LightningDataModule.val_dataloader


def warn_if_never_validated(trainer: Trainer) -> None:
    """Warn, where training begins, that its validation data will not be used.

    Args:
        trainer: Trainer with its loaders.
    """
    if isinstance(trainer.logger, DummyLogger):  # of fast_dev_run and of the tuner's short runs
        return
    datamodule = getattr(trainer, "datamodule", None)
    given: bool = trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
    if not given or not (datamodule is None or has_validation(datamodule)):
        return
    if (reason := never_validates(trainer)) is not None:
        held_out = getattr(datamodule, "val_samples", 0)
        lost = f"; what val_samples={held_out} holds out is not trained on either" if held_out else ""
        rank_zero_warn(f"this run has validation data and never validates, since {reason}{lost}")
