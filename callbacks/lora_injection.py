"""An adapter in any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lit_lora.adapters import check_finite, check_sharded_training, method_of, same_adapter
from lit_lora.adapters.in_place import AdapterInPlace, adapt_in_place, adapter_in
from lit_lora.adapters.names import PREFIX
from lit_lora.adapters.state import warn_of_left_out
from lit_lora.adapters.targets import described_presets
from lit_lora.argument_types import check_types
from lit_lora.blocks import outermost_blocks
from lit_lora.callbacks.checkpoint_files import adapter_folders
from lit_lora.callbacks.injected_optimizers import check_optimizers
from lit_lora.distributed import check_strategy, shards_weights
from lit_lora.distributed.collectives import gather
from lit_lora.errors import UserError, check_kind
from lit_lora.files import atomic_folder
from lit_lora.formats import AdapterFiles, PeftFormat
from lit_lora.loops import number_of_steps
from lit_lora.parameters import trainable_parameters
from lit_lora.quantization import Quantization
from lit_lora.run_checks import check_other_callbacks


class LoraInjection(Callback):
    """Trains an adapter in any LightningModule, which needs no change: everything else in it is frozen.

    The adapter is put in after the module's ``configure_model``, so before the optimizer is made and before a checkpoint is
    restored, in every stage. Layers are replaced where they are, and the module's own attributes stay. Its optimizers keep
    what is trained alone, so that ``configure_optimizers`` may use ``self.parameters()``.

    Use it with :class:`AdapterCheckpoint`, which then saves the adapter alone and beside each checkpoint its files for
    ``peft.PeftModel.from_pretrained``. Adapter and optimizer state are float32.

    BatchNorm layers keep their running statistics and normalize with them, so that the files alone give the trained model;
    those that ``modules_to_save`` names train as usual.

    Args:
        adapter: PEFT config of a method that adapts layers, with ``target_modules``: names, a regular expression or a preset
            such as ``attention+mlp``. ``modules_to_save`` names further layers to train in full.
        module: Path of the part to adapt, such as ``model.backbone``; defaults to the whole module.
        also_train: Glob patterns of parameters outside that part which are trained too, such as ``head.*``; they are in
            checkpoints and not in the adapter's files. Defaults to none.
        quantization: Quantization of the part's frozen Linear and Conv2d weights, such as ``NF4``; defaults to none.
        update_statistics: Whether BatchNorm layers go on updating their running statistics, which then are in the adapter's
            files too. Off by default.

    Raises:
        UserError: If ``adapter`` names no layers; once the run starts, if the module, its optimizer or the strategy cannot
            train the adapter.
    """

    def __init__(
        self,
        adapter: PeftConfig,
        module: str | None = None,
        also_train: Sequence[str] = (),
        quantization: Quantization | None = None,
        update_statistics: bool = False,
    ) -> None:
        check_kind(PeftConfig, 'peft.LoraConfig(target_modules="attention")', adapter=adapter)
        check_kind(Quantization, "NF4()", quantization=quantization)
        check_types(LoraInjection, locals())
        if not any(getattr(adapter, name, None) for name in ("target_modules", "target_parameters")):
            raise UserError(f"adapter: {type(adapter).__name__} needs target_modules; {described_presets()}")
        self.adapter = adapter
        self.module = module
        self.also_train = tuple(also_train)
        self.quantization = quantization
        self.update_statistics = update_statistics
        self._in_place: AdapterInPlace | None = None
        self._undo: list[Callable[[], None]] = []
        self._step = 0
        self._seen: set[int] = set()
        """Optimizers whose first step was looked at."""

    @classmethod
    def of(cls, trainer: Trainer) -> LoraInjection | None:
        """The trainer's :class:`LoraInjection`; None if it has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, cls)), None)

    @property
    def model(self) -> PeftModel:
        """The adapted part with PEFT's methods, as PEFT's own optimizers take it; the module itself does not hold it.

        Raises:
            UserError: If there is no adapter yet.
        """
        if self._in_place is None:
            raise UserError("there is no adapter yet: it is put in after configure_model")
        return self._in_place.model

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter to a folder for ``peft.PeftModel.from_pretrained``.

        A folder with an older adapter is replaced atomically, and a warning names what was trained in the part beside it. If the
        weights are sharded over several processes, all of them must call this method; the first one writes.

        Args:
            folder: Folder to write.

        Raises:
            UserError: If the folder cannot be written or holds other files, the adapter holds NaN or Inf, or there is none yet.
        """
        if self._in_place is None:
            raise UserError("there is no adapter yet: call save_adapter after trainer.fit, in the same process")
        warn_of_left_out(self._in_place.model)
        state, config = self._in_place.files()
        if self.update_statistics:
            state = dict(state) | {f"{PREFIX}{name}": value for name, value in _statistics(self._in_place.root)}
        check_finite(state, "adapter", "train with a lower lr or trainer.gradient_clip_val: 1.0", self._in_place.root)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        with atomic_folder(folder, marker="adapter_config.json") as part:
            PeftFormat().write(AdapterFiles(state, config), part)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, LoraInjection) for callback in callbacks) > 1:
            raise UserError(
                "trainer.callbacks has two LoraInjection, and a module takes one adapter; give one with the target_modules of "
                "both"
            )
        self._restore()
        self._check(trainer, pl_module)
        self._undo = [
            _followed(pl_module, "configure_model", lambda _: self._inject(trainer, pl_module)),
            _followed(pl_module, "configure_optimizers", lambda made: check_optimizers(made, pl_module)),
        ]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        method = method_of(self.adapter)
        if method.scheduled and self._in_place is not None:
            method.start(self._in_place.model, number_of_steps(trainer, type(self.adapter).__name__))
        self._step = trainer.global_step
        self._freeze_statistics()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._freeze_statistics()  # the module may call self.train() between epochs

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradients of the method's penalty; at the first step, warn of layers that the forward pass does not call."""
        self._add_penalty()
        if id(optimizer) in self._seen or hasattr(
            trainer.strategy, "skipped_step"
        ):  # DeepSpeed has taken the gradients
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad and id(p) in held]
        without = [name for name, parameter in named if parameter.grad is None]
        if len(without) == len(named):  # FiniteGradients skips this step
            return
        self._seen.add(id(optimizer))
        if without:
            rank_zero_warn(
                f"{len(without)} of {len(named)} trained tensors have no gradient in the first step, the first is {without[0]}: "
                f"the forward pass does not call that layer. Leave it out of target_modules"
            )

    def _add_penalty(self) -> None:
        # The loss is the module's own, so that the penalty's gradients are added to those of the loss.
        if self._in_place is None or (penalty := method_of(self.adapter).penalty(self._in_place.model)) is None:
            return
        trained = trainable_parameters(self._in_place.model)
        for parameter, gradient in zip(trained, torch.autograd.grad(penalty, trained, allow_unused=True), strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step and self._in_place is not None:
            self._step = trainer.global_step
            method_of(self.adapter).after_step(self._in_place.model, self._step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        paths = [getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks]
        folders = [adapter_folders(path)[0] for path in paths if path]
        folder = next((str(folder) for folder in folders if folder.exists()), None)
        base = ".".join(["module", *(self.module or "").split(".")]).rstrip(".")
        rank_zero_info(
            f"to load the adapter without Lightning: peft.PeftModel.from_pretrained({base}, {folder or 'FOLDER'!r}), where "
            f"module is a new {type(pl_module).__name__} with the same base weights"
            + ("" if folder else "; save_adapter(FOLDER) of LoraInjection writes it")
            + ("; what also_train names is in the checkpoint alone" if self.also_train else "")
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()  # Lightning tears no callback down after an exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._in_place is not None:
            checkpoint["adapter_method"] = method_of(self.adapter).state(self._in_place.model)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._in_place is not None:
            method_of(self.adapter).restore(self._in_place.model, checkpoint.get("adapter_method", {}))

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot train an adapter, before anything is built."""
        check_other_callbacks(trainer, StochasticWeightAveraging)
        strategy: Any = trainer.strategy
        check_strategy(strategy)
        check_sharded_training(self.adapter, strategy)
        if isinstance(strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                f"{type(strategy).__name__} starts processes in which the module and its adapter are lost at the end; run a "
                f"script with strategy ddp"
            )
        if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
            raise UserError(
                "BitsandbytesPrecision would quantize the adapter too; use quantization of LoraInjection, such as NF4"
            )
        if method_of(self.adapter).whole_gradients and not pl_module.automatic_optimization:
            raise UserError(
                f"{type(self.adapter).__name__} reads all gradients after each step, and with manual optimization they may be "
                f"gone; use peft.LoraConfig"
            )
        if str(trainer.precision) in ("bf16-true", "16-true"):
            rank_zero_warn(
                f"trainer.precision={str(trainer.precision)!r} casts the adapter too, which rounds small updates away; use "
                f"bf16-mixed, or 32-true with a module whose own weights are bfloat16"
            )
        if self.quantization is not None:
            self.quantization.check(strategy.root_device)

    def _inject(self, trainer: Trainer, pl_module: LightningModule) -> None:
        new = adapter_in(pl_module) is None
        self._in_place = adapt_in_place(
            pl_module, self.adapter, self.module or "", self.quantization, also_train=self.also_train
        )
        if new and shards_weights(trainer.strategy):
            _shard(pl_module, trainer.strategy)

    def _freeze_statistics(self) -> None:
        if self._in_place is not None and not self.update_statistics:
            for _, layer in _frozen_norms(self._in_place.root):
                layer.eval()

    def _restore(self) -> None:
        """Give the module its own methods back."""
        while self._undo:
            self._undo.pop()()


def adapter_writer(trainer: Trainer) -> Any:
    """What writes the adapter's files: the module, or the callback that has put the adapter into it; None for nothing."""
    module = trainer.lightning_module
    return module if hasattr(module, "save_adapter") else LoraInjection.of(trainer)


def _followed(module: nn.Module, name: str, then: Callable[[Any], None]) -> Callable[[], None]:
    """Make a method call a function with its result; returns a function that undoes this."""
    own, method = module.__dict__.get(name), getattr(module, name)

    def follow() -> Any:
        result = method()
        then(result)
        return result

    module.__dict__[name] = follow

    def undo() -> None:
        del module.__dict__[name]
        if own is not None:  # LightningCLI sets methods of the instance
            module.__dict__[name] = own

    return undo


def _frozen_norms(root: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    """BatchNorm and InstanceNorm layers with running statistics, except for trained copies of them."""
    copies = {
        inner
        for wrapper in root.modules()
        if isinstance(wrapper, AuxiliaryTrainingWrapper)
        for copied in wrapper.children()
        if trainable_parameters(copied)
        for inner in copied.modules()
    }
    for name, layer in root.named_modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats and layer not in copies:
            yield name, layer


def _statistics(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, layer in _frozen_norms(root):
        for buffer, value in layer.named_buffers():
            yield f"{name}.{buffer}", value.detach().cpu().clone()


def _shard(module: LightningModule, strategy: Any) -> None:
    """Shard the parts of a module that have trained parameters, each block of a large model by itself.

    A part is sharded where its ``forward`` gathers it, and ``training_step`` is no ``forward``: so not the module itself.

    Raises:
        UserError: If the processes have different frozen weights, or a trained parameter is in no part.
    """
    loose = [
        name for name, parameter in module._parameters.items() if parameter is not None and parameter.requires_grad
    ]
    if loose:
        raise UserError(
            f"{loose[0]} is a trained parameter of {type(module).__name__} itself, which this strategy cannot shard; put it "
            f"into a submodule, or use strategy ddp"
        )
    same_adapter(module)
    digests = [_digest(parameter.detach()) for parameter in module.parameters() if not parameter.requires_grad]
    if len(set(map(tuple, gather(digests)))) > 1:
        raise UserError(
            "the processes have different frozen weights, and each would keep its part of its own; call seed_everything before "
            "the module is made, or load the weights from a file"
        )
    for part in _parts_with_forward(module):
        blocks = {name for inner in part.modules() for name in getattr(inner, "_no_split_modules", None) or ()}
        for block in outermost_blocks(part, blocks):
            if block is not part:
                strategy.shard(block)
        strategy.shard(part)


def _digest(weight: Tensor) -> int | float:
    return torch.hash_tensor(
        weight.view(torch.uint8) if weight.element_size() == 1 else weight
    ).item()  # fp8 has no hash


def _parts_with_forward(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts_with_forward(child)
        elif trainable_parameters(child):
            yield child
