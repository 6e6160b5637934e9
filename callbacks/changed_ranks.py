"""What callbacks that change the ranks of LoRA while it trains have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_lora.adapters.ranked_layer import RankedLayer, match_checkpoint, ranked_layers
from lit_lora.errors import UserError


class ChangedRanks(Callback):
    """Finds the LoRA layers, and gives them the ranks of a checkpoint before it is loaded.

    Subclasses change the ranks inside :func:`~lit_lora.distributed.resized.resizing` and then call :meth:`changed`.
    """

    def __init__(self) -> None:
        self.layers: list[RankedLayer] = []
        """The layers whose ranks change, once the model is loaded."""
        self._load_hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._check_run(trainer, pl_module)
        self._remove_load_hook()  # Lightning tears no callback down after an exception
        self.layers = []
        self._load_hook = pl_module.register_load_state_dict_pre_hook(partial(self._match_checkpoint, trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_load_hook()

    def find_layers(self, module: nn.Module) -> None:
        """Set :attr:`layers`, if they are not known yet.

        Raises:
            UserError: If there is no LoRA layer, or the adapter is none of LoRA, rsLoRA and DoRA.
        """
        if self.layers:
            return
        self.layers = ranked_layers(module, type(self).__name__)
        if not self.layers:
            raise UserError(
                f"{type(self).__name__} found no LoRA layer in the module; adapt it with peft.LoraConfig before training starts"
            )

    def changed(self, trainer: Trainer, hook: str, *arguments: Any) -> None:
        """Tell other callbacks of new ranks or values, in all processes.

        Args:
            trainer: Trainer whose callbacks are told.
            hook: Name of the callbacks' method, which is called with trainer, module and the arguments.
            *arguments: Further arguments of the method.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if method := getattr(callback, hook, None):
                method(trainer, trainer.lightning_module, *arguments)

    def _check_run(self, trainer: Trainer, module: Any) -> None:
        """Refuse strategies and options that exclude the callback; refuses nothing by default."""

    def _match_checkpoint(self, trainer: Trainer, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """Give the layers the ranks of a checkpoint that is about to be loaded."""
        self.find_layers(module)
        match_checkpoint(self.layers, state_dict, trainer.optimizers)

    def _remove_load_hook(self) -> None:
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None


def refuse_saved_values(module: Any, callback: str) -> None:
    """Refuse to replace the values of a saved adapter by first values.

    Args:
        module: Module to be trained.
        callback: Name of the callback that would do so.

    Raises:
        UserError: If the module goes on with a saved adapter.
    """
    if (saved := getattr(module, "saved", None)) is not None:
        raise UserError(
            f"{callback} would replace the trained values of {saved.path}, with which FromFile goes on; remove {callback} from "
            f"trainer.callbacks"
        )
