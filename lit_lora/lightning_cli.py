"""LightningCLI for ``fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

import argparse
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import peft  # noqa: F401  makes its configs available as short class paths
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from transformers.utils.logging import disable_progress_bar

from lit_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lit_lora.callbacks.finite_gradients import FiniteGradients
from lit_lora.callbacks.preemption import Preemption
from lit_lora.callbacks.schedule_free import ScheduleFree
from lit_lora.callbacks.step_metrics import StepMetrics
from lit_lora.callbacks.step_progress import StepProgress
from lit_lora.checkpoint_io import SafeCheckpointIO, read_checkpoint
from lit_lora.class_help import with_named_class
from lit_lora.config_errors import explain, null_options, reasons, two_of_a_kind
from lit_lora.config_files import shipped_config
from lit_lora.config_parser import RUNS, Parser, parser_options
from lit_lora.console import print_error
from lit_lora.datamodules.remote.transfer import is_remote
from lit_lora.distributed import check_strategy_name
from lit_lora.distributed.check import check_ranks
from lit_lora.distributed.end_on_error import EndOnError
from lit_lora.dropped_options import dropped_options
from lit_lora.early_stopping import ResumedEarlyStopping
from lit_lora.errors import UserError, check_least, check_most
from lit_lora.files import remedy, writable_folder
from lit_lora.harmless_warnings import harmless_ignored
from lit_lora.lazy import public_names
from lit_lora.module import LoraDiffusion
from lit_lora.report_text import format_table
from lit_lora.run_folder import why_none_is_last
from lit_lora.save_config import SaveConfig
from lit_lora.trainer_options import check_trainer_options

for _module in dict.fromkeys(public_names().values()):
    import_module(_module)  # the public names are short class paths, which jsonargparse finds among imported classes

_MAX_SEED = 2**32 - 1
"""The highest seed that NumPy takes."""

_HELP = {
    "ckpt_path": "Path or URL of the checkpoint to resume from or to read; last is the newest one of the run's folder.",
    "verbose": "Show the results as Lightning's table, with all digits.",
    "weights_only": argparse.SUPPRESS,  # no checkpoint is ever unpickled
}
"""Help of options in place of Lightning's, which tells of what is not here."""

CLI = TypeVar("CLI", bound="LitLoraCLI")


class LitLoraCLI(LightningCLI):
    """The commands that run a trainer; checks outputs and checkpoint before a run starts, and reports errors in short.

    Args:
        *classes: Classes of module and datamodule.
        args: The command's arguments, with its name first if ``run`` is set.
        run: Whether to call the trainer.
        **options: Further arguments of :class:`~lightning.pytorch.cli.LightningCLI`.

    Attributes:
        goes_on: How a run that a signal stops is gone on with.
    """

    goes_on: ClassVar[str] = "resume with --ckpt_path last"

    def __init__(self, *classes: Any, args: list[str], run: bool, **options: Any) -> None:
        self._command = args[0] if run else None
        options |= {"args": args, "run": run}
        super().__init__(*classes, **options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", ["lit_lora config"])
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML format.")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        assert parser.groups is not None
        # Lightning's own titles are the first sentences of its docstrings.
        parser.groups["trainer"].title = "Options of the trainer"
        parser.groups["data"].title = "Datamodule"

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        parser._actions[-1].help = "Seed of the global random number generators; true draws one."
        parser.add_argument(
            "--must_resume",
            type=bool,
            default=False,
            help="Refuse to start from the beginning if --ckpt_path last finds no checkpoint.",
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != self._command:  # it parses nothing, and its options take time
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser._action_groups[-1].title = "Options of the run"
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)
        for action in parser._actions:
            action.help = _HELP.get(action.dest, action.help)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        for dropped in dropped_options(args or [], self.config.get(self.config.get("subcommand") or "", self.config)):
            rank_zero_warn(dropped)

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool):
            check_least(0, seed_everything=seed)
            check_most(_MAX_SEED, seed_everything=seed)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's hyperparameters override the user's config."""

    def instantiate_classes(self) -> None:
        self.check_strategy()
        check_trainer_options(self._get(self.config, "trainer") or {})
        try:
            with self.mistakes_told():
                super().instantiate_classes()
        except RuntimeError as error:
            if told := two_of_a_kind(str(error)):
                raise UserError(told) from error
            raise

    @contextmanager
    def mistakes_told(self) -> Iterator[None]:
        """A context in which errors of classes that cannot be built are those of the config."""
        try:
            yield
        except (UserError, MisconfigurationException):
            raise
        except (TypeError, ValueError, ImportError) as error:
            if null := null_options(self.config.get(self.subcommand or "", self.config)):
                raise UserError(f"{null[0]} is null; leave it out, or give its options") from error
            raise UserError(reasons(str(error)) or f"a part of the config cannot be built: {error}") from None

    def check_strategy(self) -> None:
        """Refuse the name of a strategy that no trainer can be built with."""
        check_strategy_name(self._get(self.config, "trainer.strategy"))

    def before_fit(self) -> None:
        """Check that outputs can be written and the checkpoint can be read; add the callbacks that end a run in order."""
        check_ranks(self.trainer.strategy)
        writable_folder(self.trainer.default_root_dir)
        for logger in self.trainer.loggers:
            if logger.save_dir:
                writable_folder(logger.save_dir)
            if self.trainer.is_global_zero and isinstance(logger, TensorBoardLogger | CSVLogger):
                _claim_version(logger)
        self._read_safely()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, EndOnError(explain))
        for kind in (ResumedEarlyStopping, StepMetrics, ScheduleFree, FiniteGradients):
            if not any(isinstance(callback, kind) for callback in callbacks):
                callbacks.insert(1, kind())
        given = self._get(self.config, "trainer.callbacks") or []
        configured = [entry.class_path for entry in (given if isinstance(given, list) else [given])]
        _save_adapters(self.trainer, configured)
        if not any(path.endswith("ProgressBar") for path in configured):
            _show_progress(callbacks)
        asked = self._get(self.config, "trainer.enable_model_summary") or any(
            "ModelSummary" in one for one in configured
        )
        # StepProgress tells what is trained.
        if not asked and any(isinstance(callback, StepProgress) for callback in callbacks):
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ModelSummary)]
        if self._get(self.config, "must_resume") and self._get(self.config, "ckpt_path") is None:
            raise UserError("must_resume is true, and no ckpt_path is given; set ckpt_path to last or to a checkpoint")
        if self._get(self.config, "ckpt_path") == "last":
            _say_if_none_is_last(self.trainer, self._get(self.config, "must_resume"))
        if not any(isinstance(callback, Preemption) for callback in callbacks):
            callbacks.append(preemption := Preemption())
            preemption.advice = self.goes_on

    def _read_safely(self) -> None:
        """Look at the checkpoint before anything is loaded, and have it read without unpickling, wherever it is."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = SafeCheckpointIO()
        path = self._get(self.config, "ckpt_path")
        if path and path not in ("last", "best", "hpc", "registry") and not is_remote(path):
            read_checkpoint(path, "meta")

    def before_validate(self) -> None:
        """Check the checkpoint; tell what runs without one; add the callback that ends a failed process."""
        check_ranks(self.trainer.strategy)
        self._read_safely()
        self.trainer.callbacks.insert(0, EndOnError(explain))  # type: ignore[attr-defined]
        if not self._get(self.config, "ckpt_path") and self.model.saved is None:
            rank_zero_warn(
                f"no ckpt_path is given, so {self.subcommand} runs with an adapter that is not trained, as the base alone"
            )

    before_test = before_validate

    def after_validate(self) -> None:
        """Print the results."""
        if self.trainer.is_global_zero and not self._get(self.config, "verbose"):
            rows = [[name, f"{float(value):.4g}"] for name, value in self.trainer.callback_metrics.items()]
            for line in format_table(rows):
                print(line)

    after_test = after_validate

    def before_predict(self) -> None:
        """Check the checkpoint; tell what runs without one, and that nothing writes the images."""
        self.before_validate()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, BasePredictionWriter) for callback in callbacks):
            rank_zero_warn("no callback writes the images that predict draws: add ImageWriter to trainer.callbacks")


class ToolCLI(LitLoraCLI):
    """A command with the options of ``fit`` and those of a function; it builds module and datamodule, but no trainer.

    Attributes:
        command: Name of the command, such as ``lit-lora plan``.
        function: Function with the command's own options.
        parts: Names of its parameters that are not options.
    """

    command: ClassVar[str]
    function: ClassVar[Callable[..., Any]]
    parts: ClassVar[frozenset[str]]

    def __init__(self, *classes: Any, **options: Any) -> None:
        # Nothing is saved, so that no hyperparameters are, and writing out the config for them takes time.
        super().__init__(*classes, load_from_checkpoint_support=False, **options)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        summary = (inspect.getdoc(self.function) or "").partition("\n\n")[0]
        return super().init_parser(**parser_options(self.command, summary), **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self._names = parser.add_function_arguments(self.function, skip=set(self.parts))
        # The first group of --help, before the options of fit.
        parser._action_groups[-1].title = f"Options of {self.command}"
        super().add_core_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Configs of fit may set these; here they have no effect.
        ignored = parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        for action in parser._actions:
            if action.dest in (*ignored, "must_resume"):
                action.help = argparse.SUPPRESS

    def check_strategy(self) -> None:
        """Check nothing: no trainer is built, and the machine of a cache need not have that of the training."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Build no trainer."""

    @property
    def options(self) -> dict[str, Any]:
        """Values of the function's options."""
        return {name: self.config[name] for name in self._names}


def build_cli(arguments: Sequence[str], run: bool = True, cli_class: type[CLI] = LitLoraCLI) -> CLI:  # type: ignore[assignment]
    """Parse the arguments, build trainer, model and data, and call the trainer.

    Args:
        arguments: ``["fit", "--config", …]``.
        run: Whether to call the trainer; False only builds the parts. Defaults to True.
        cli_class: Class that parses the arguments and builds the parts; defaults to :class:`LitLoraCLI`.
    """
    disable_progress_bar()  # of transformers, one for each text encoder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    arguments = with_named_class(
        [shipped_config(part) for argument in arguments for part in _config_and_path(argument)]
    )
    with harmless_ignored():
        return cli_class(
            LoraDiffusion,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            parser_kwargs={} if not run else RUNS,
            seed_everything_default=0,
            args=arguments if run else arguments[1:],
            run=run,
        )


def run(arguments: Sequence[str], cli_class: type[LitLoraCLI] = LitLoraCLI) -> LitLoraCLI:
    """Run one of the commands ``fit``, ``validate``, ``test`` and ``predict``.

    Args:
        arguments: ``["fit", "--config", …]``.
        cli_class: See :func:`build_cli`.

    Raises:
        UserError: If the config or a file is wrong, or the run itself raises a UserError.
    """
    try:
        return build_cli(arguments, cli_class=cli_class)
    except MisconfigurationException as error:
        raise UserError(explain(str(error))) from error
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        todo = f"; {remedy(error)}" if isinstance(error, PermissionError) else ""
        raise UserError(f"{error.strerror}: {error.filename}{todo}") from error


def _say_if_none_is_last(trainer: Trainer, required: bool) -> None:
    """Have the trainer say, before anything is loaded, that ``ckpt_path="last"`` finds no checkpoint; an error if it must."""
    connector: Any = trainer._checkpoint_connector
    select = connector._select_ckpt_path

    def select_loudly(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*but there is no last checkpoint available")
            path = select(*args, **kwargs)
        if path is None:
            found = why_none_is_last(trainer)
            if required:
                raise UserError(f"ckpt_path=last: {found}; name a checkpoint, or set must_resume to false")
            if trainer.is_global_zero:
                print_error(f"ckpt_path=last: {found}; training starts from the beginning", "warning")
        return path

    connector._select_ckpt_path = select_loudly


def _show_progress(callbacks: list[Callback]) -> None:
    """Tell what is trained and where the files are, and show our progress bar in place of Lightning's, if there is one."""
    others = [callback for callback in callbacks if not isinstance(callback, TQDMProgressBar | RichProgressBar)]
    if any(isinstance(callback, ProgressBar) for callback in others):  # of the user's own project
        return
    progress = StepProgress()
    progress.shows_steps = len(others) < len(callbacks)
    place = next((place for place, one in enumerate(others) if isinstance(one, Checkpoint)), len(others))
    callbacks[:] = [*others[:place], progress, *others[place:]]


def _save_adapters(trainer: Trainer, configured: Sequence[str]) -> None:
    """Save adapters where no callback is configured that saves: Lightning's own would save the whole base, and not the end."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(path.endswith("ModelCheckpoint") for path in configured):
        ours = AdapterCheckpoint(save_last="link", enable_version_counter=False)
        callbacks[:] = [ours if type(callback) is ModelCheckpoint else callback for callback in callbacks]
    if not trainer.checkpoint_callbacks and not getattr(trainer, "fast_dev_run", False) and trainer.is_global_zero:
        print_error(
            "nothing saves what is trained: set trainer.enable_checkpointing to true, or add the callback AdapterCheckpoint",
            "warning",
        )


def _claim_version(logger: TensorBoardLogger | CSVLogger) -> None:
    """Create the log folder of a run now: two runs that start at the same time would both find the same next number."""
    if logger._version is not None or is_remote(str(logger.save_dir)):
        return
    while True:
        folder = Path(logger.log_dir)  # with the next number
        try:
            folder.mkdir(parents=True)
            return
        except FileExistsError:
            if not folder.is_dir():
                return
            logger._version = None


def _config_and_path(argument: str) -> list[str]:
    """Split ``--config=FILE`` into two arguments: from one, jsonargparse 4.47 loses the file's ``class_path`` of ``data``."""
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]
