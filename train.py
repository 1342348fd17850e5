"""Train, validate, test or predict: ``python train.py [fit|validate|test|predict] -c CONFIG``.

Without arguments it trains ``configs/demo.yaml``. Every run has a folder of its own,
``<output_dir>/<name>/<time>/``; ``--ckpt_path last`` continues the newest run of a name in its
folder, exactly where it stopped. With a checkpoint and no ``-c``, the configuration of its run is
used.
"""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import (
    Any,
    NoReturn,
    override,
)

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
)
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console
from rich.markup import escape

from callbacks.checkpoints import AtomicCheckpointIO, LastCheckpoint, sweep_parts
from callbacks.dashboard import Dashboard
from callbacks.exact_resume import ExactResume
from callbacks.interruption import (
    Reason,
    StopOnSignal,
    Stopped,
    ignore_termination,
    leaving_in_order,
    requeue,
)
from callbacks.loggers import CSV_FILE, CsvLog, WandbLog
from callbacks.non_finite import NonFiniteStop
from callbacks.progress import RunProgress
from callbacks.report import Report
from callbacks.resources import Resources
from callbacks.run_config import (
    CONFIG_FILE,
    RunConfig,
    check_config,
    mend_refusal,
    only_trusted_imports,
)
from callbacks.run_folder import (
    CHECKPOINTS,
    MEDIA,
    RunFolderError,
    RunLock,
    create_run_folder,
    job_link,
    last_run_folder,
    named_folder,
    point_last_at,
    run_folder_of_job,
)
from callbacks.summary import RunSummary
from policies.checkpoint_files import (
    CHECKPOINT_SUFFIX,
    RESUME_KEYS,
    CheckpointError,
    newest_valid_checkpoint,
    read_checkpoint,
)

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "configs" / "demo.yaml"
DEFAULT_OUTPUT_DIR = "outputs"
DEFAULT_NAME = "run"
TRACEBACK_VARIABLE = "POLICYSCOPE_TRACEBACK"

DATA_LINKS = ("cameras", "state_dim", "action_dim", "chunk_size", "d_in")
"""Properties of a data module that a model takes as arguments of the same name, if it has them."""

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


class TrainingStarted(Callback):
    """Notes when the first batch is near: from then on the run is worth keeping.

    It also tells all processes the run folder that the first one made.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.started = False
        self.finished = False
        """Whether training came to its end, whatever happens after it."""
        self.first_step: int | None = None
        """Step at which this process began to train; None before."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.run_folder = Path(trainer.strategy.broadcast(str(self.run_folder)))
        # Lightning has no public way to set it once the processes know each other.
        setattr(trainer, "_default_root_dir", str(self.run_folder))  # noqa: B010

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        self.first_step = trainer.global_step
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            point_last_at(self.run_folder)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.finished = True

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.started = True

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True


class Parser(LightningArgumentParser):
    """Says what is wrong, without fifty lines of usage before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A key cut short is more often a slip than a wish.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        name = parser.prog.replace(" [options]", "")
        _fail(f"{mend_refusal(_plain(message))}\nAll options: {name} --help", EXIT_USAGE)


class TrainCLI(LightningCLI):
    """LightningCLI with run folders, safe checkpoints and the callbacks every run needs."""

    def __init__(self, args: Sequence[str]) -> None:
        self._words = list(args)
        self._checkpoint: Path | None = None
        self._continued: Path | None = None
        self._job: str | None = None
        self._lock: RunLock | None = None
        self._config_text = ""
        self.run_folder = Path()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            # Saliency needs gradients in validation, which inference mode makes impossible. Data
            # modules deal samples to processes themselves, in an order that can be resumed.
            trainer_defaults={"inference_mode": False, "use_distributed_sampler": False},
            args=list(args),
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {
            name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()
        }

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default=DEFAULT_NAME, help="Name of the run.")
        parser.add_argument(
            "--output_dir",
            type=str,
            default=DEFAULT_OUTPUT_DIR,
            help="Folder of all runs; this one goes to <output_dir>/<name>/<time>/.",
        )
        parser.add_argument(
            "--safe",
            action="store_true",
            help="Refuse configurations that name classes outside this project.",
        )
        for key in DATA_LINKS:
            parser.link_arguments(f"data.{key}", f"model.init_args.{key}", apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning warns when arguments are passed while sys.argv has some: tests do that.
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint to load.

        Lightning's own method lets the hyper-parameters of the file replace the configuration
        without a word, and instantiates whatever class the file names.
        """
        config = self._config()
        if not isinstance(config.trainer, Namespace):
            raise ValueError(
                f"trainer: {type(config.trainer).__name__} given, it must be keys and their values"
            )
        needed = RESUME_KEYS if self.config["subcommand"] == "fit" else ()
        if self._continue_job(config):
            return
        asked = config.get("ckpt_path")
        if not asked:
            return
        if asked in {"last", "auto", "best"}:
            try:
                run = last_run_folder(config.output_dir, config.name)
                newest = newest_valid_checkpoint(run / CHECKPOINTS, needed)
            except ValueError:
                if asked != "auto":
                    raise
                config["ckpt_path"] = None
                return
            for error in newest.damaged:
                rank_zero_warn(f"passed over: {error}")
            self._checkpoint = newest.path
            if newest.damaged:
                rank_zero_warn(f"using {newest.path} instead")
            if asked == "best":
                self._checkpoint = _best(newest.checkpoint, newest.path)
            elif self.config["subcommand"] == "fit":
                self._continued = run
                config["ckpt_path"] = None  # config.yaml starts a fresh run
        else:
            read_checkpoint(asked, needed=needed)
            self._checkpoint = Path(asked)

    def _continue_job(self, config: Namespace) -> bool:
        """Go on with the run that an earlier start of this job began, whatever was asked then."""
        subcommand = self.config["subcommand"]
        # One job may run many commands; the same one has the same settings in its next life.
        text = self._parser(subcommand).dump(config, skip_unset=False)
        self._job = job_link(f"{subcommand}\n{text}")
        if subcommand != "fit":
            return False
        run = run_folder_of_job(config.output_dir, config.name, self._job)
        if run is None:
            return False
        if not any((run / CHECKPOINTS).glob(f"*{CHECKPOINT_SUFFIX}")):
            self._continued = run  # stopped before its first checkpoint: there it starts afresh
            return False
        newest = newest_valid_checkpoint(run / CHECKPOINTS, RESUME_KEYS)
        for error in newest.damaged:
            rank_zero_warn(f"passed over: {error}")
        self._checkpoint, self._continued = newest.path, run
        config["ckpt_path"] = None
        return True

    def _config(self) -> Namespace:
        """Return the configuration of the subcommand."""
        return self.config[self.config["subcommand"]]

    @override
    def before_instantiate_classes(self) -> None:
        config = self._config()
        self._config_text = self._parser(self.subcommand).dump(config, skip_unset=False)
        self._claim_run_folder(config)
        trainer = config.trainer
        trainer.default_root_dir = str(self.run_folder)
        for logger in _as_list(trainer.logger):
            _fill_in(logger, "save_dir", str(self.run_folder))
        for callback in _as_list(trainer.callbacks):
            _fill_in(callback, "dirpath", str(self.run_folder / CHECKPOINTS))
        self._drop_links_without_target()

    def _claim_run_folder(self, config: Namespace) -> None:
        if getattr(rank_zero_only, "rank", 0) != 0:
            # Only the first process writes; it tells the others where once they can talk.
            self.run_folder = self._continued or Path(config.output_dir)
            return
        suffix = "" if self.subcommand == "fit" else f"-{self.subcommand}"
        self.run_folder = self._continued or create_run_folder(
            config.output_dir, config.name, suffix
        )
        self._lock = RunLock(self.run_folder)
        sweep_parts(self.run_folder)
        if self._continued and self._checkpoint is None:
            (self.run_folder / CSV_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.run_folder / MEDIA, ignore_errors=True)
        if self.subcommand == "fit" and self._job:
            point_last_at(self.run_folder, self._job)

    def _drop_links_without_target(self) -> None:
        """Link only what the chosen model takes.

        jsonargparse ignores the other links, but Lightning would save their values as
        hyper-parameters, and the checkpoint could not be reloaded into a class without them.
        """
        links = self._parser(self.subcommand)._links_group._group_actions  # pyright: ignore
        config = self._config()
        links[:] = [link for link in links if link.target[0] in config]

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        plugins = _as_list(trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if not TorchElasticEnvironment.detect() and SLURMEnvironment.detect():
            given = [plugin for plugin in plugins if isinstance(plugin, ClusterEnvironment)]
            # Its own requeueing saves in the middle of a batch; StopOnSignal's waits for the end.
            plugins += [] if given else [SLURMEnvironment(auto_requeue=False)]
        loggers = trainer.logger
        if loggers is not False:
            given = [logger for logger in _as_list(loggers) if isinstance(logger, Logger)]
            if not any(isinstance(logger, CsvLog) for logger in given):
                given.insert(0, CsvLog(str(self.run_folder)))
            loggers = given
        callbacks = _as_list(trainer.callbacks)
        callbacks += [
            callback for callback in self._always(trainer) if not _present(callback, callbacks)
        ]
        try:
            return super().instantiate_trainer(
                plugins=plugins, logger=loggers, callbacks=callbacks, **kwargs
            )
        except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            # Lightning checks some values only by using them.
            raise ValueError(
                "trainer: has a value that Lightning cannot use "
                f"({type(error).__name__}: {error}); see train.py fit --help"
            ) from error

    def _always(self, trainer: Namespace) -> list[Callback]:
        """Return the callbacks of every run; a configured one of the same class replaces them."""
        always: list[Callback] = [
            TrainingStarted(self.run_folder),
            StopOnSignal(),
            RunConfig(self._config_text, ["python", "train.py", *self._words]),
            ExactResume(),
            NonFiniteStop(),
            Resources(),
            Dashboard(),
            Report(),
            RunSummary(),
        ]
        if trainer.enable_progress_bar is not False:
            always.append(RunProgress())
        if trainer.enable_checkpointing is not False:
            always.append(LastCheckpoint())
        return always

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException:
            self._clean_up(keep=False)
            raise

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        checkpoint = None if self._checkpoint is None else str(self._checkpoint)
        return kwargs | {"ckpt_path": checkpoint, "weights_only": True}

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Wait: :meth:`run` does it, when ``main`` has hold of this object."""

    @property
    def started(self) -> bool:
        """Whether data and model were set up and the loops began."""
        return self._callback(TrainingStarted).started

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return self._callback(TrainingStarted).finished

    def queue_again(self) -> str:
        """Put the job back into the queue, unless it twice gained no step.

        Returns:
            What was done, or why not: a sentence for the user.
        """
        config = self._config()
        first = self._callback(TrainingStarted).first_step
        idle = named_folder(config.output_dir, config.name) / f"{self._job}.idle"
        if first is not None and self.trainer.global_step > first:
            idle.unlink(missing_ok=True)
        elif idle.exists():
            idle.unlink()
            return "the job is not queued again (twice without a step gained; ask for more time)"
        else:
            idle.parent.mkdir(parents=True, exist_ok=True)
            idle.touch()
        return requeue()

    def run(self) -> None:
        """Run the subcommand and leave the run folder in order, whatever happens."""
        keep = False
        exit_code = 1
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            assert self.subcommand is not None
            super()._run_subcommand(self.subcommand)
            keep, exit_code = True, 0
        except BaseException as error:
            ignore_termination()
            keep = self.started
            done = self.finished and isinstance(error, SIGTERMException)
            if self.trainer.is_global_zero and keep and self.trainer.global_step:
                # What ended the run is worth more words than a disk that is full for this, too.
                with contextlib.suppress(RunFolderError):
                    self._callback(RunSummary).write(
                        self.trainer, "finished" if done else "stopped"
                    )
            raise
        finally:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, interrupt)  # Lightning leaves it ignored
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLog):
                    logger.close(exit_code)
            self._clean_up(keep)

    def _callback[Kind: Callback](self, kind: type[Kind]) -> Kind:
        callbacks: list[Any] = self.trainer.callbacks  # pyright: ignore
        return next(callback for callback in callbacks if isinstance(callback, kind))

    def _clean_up(self, keep: bool) -> None:
        if self._lock is None:
            return
        self._lock.release()
        self._lock = None
        if not keep and self._continued is None:
            # Nothing but our own notes of a run that never began.
            shutil.rmtree(self.run_folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.run_folder.parent.rmdir()


def _best(checkpoint: dict[str, Any], beside: Path) -> Path:
    """Return the best checkpoint according to the newest one, in the same folder.

    Raises:
        CheckpointError: If that run ranked none.
    """
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("best_model_path"):
            best = beside.parent / Path(state["best_model_path"]).name
            read_checkpoint(best)
            return best
    raise CheckpointError(f"{beside.parent}: that run has not ranked checkpoints; use last")


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _fill_in(component: Any, key: str, value: str) -> None:
    """Set an unset argument of a configured class that has it."""
    arguments = component.get("init_args") if isinstance(component, Namespace) else None
    if isinstance(arguments, Namespace) and key in arguments and arguments[key] is None:
        arguments[key] = value


def _present(callback: Callback, callbacks: Sequence[Callback]) -> bool:
    kind = ProgressBar if isinstance(callback, ProgressBar) else type(callback)
    return any(isinstance(each, kind) for each in callbacks)


def with_run_config(words: Sequence[str]) -> tuple[list[str], bool]:
    """Add the configuration of a checkpoint's run where none is given, and check those that are.

    Returns:
        Words: Of the command line to use.
        Trusted: Whether they may name any class.

    Raises:
        ConfigError: If a configuration is too large, or names classes that are not to be trusted:
            those of a run outside ``--output_dir``, or of any with ``--safe``.
    """
    safe = any(word.partition("=")[0] == "--safe" for word in words)
    place = next((n for n, word in enumerate(words) if word in TrainCLI.subcommands()), None)
    if place is None:
        return list(words), not safe
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("-c", "--config", action="append", default=[])
    peek.add_argument("--ckpt_path")
    peek.add_argument("--name", default=DEFAULT_NAME)
    peek.add_argument("--output_dir", default=DEFAULT_OUTPUT_DIR)
    try:
        given, _ = peek.parse_known_args([*words[:place], *words[place + 1 :]])
    except argparse.ArgumentError:
        return list(words), not safe
    files = [Path(name) for name in given.config if _is_file(name)]
    for file in files:
        content = check_config(file, any_class=True)
        safe |= any(
            isinstance(part, dict) and part.get("safe") is True
            for part in (content, content.get(words[place]))
        )
    for file in files:
        check_config(file, any_class=not safe)
    if not given.ckpt_path or given.config:
        return list(words), not safe
    config = None
    if given.ckpt_path in {"last", "auto", "best"}:
        with contextlib.suppress(RunFolderError):
            config = last_run_folder(given.output_dir, given.name) / CONFIG_FILE
    else:
        config = Path(given.ckpt_path).absolute().parent.parent / CONFIG_FILE
    if config is None or not _is_file(config):
        return list(words), not safe
    # What lies among one's own runs was one's own code once.
    own = config.resolve().is_relative_to(Path(given.output_dir).expanduser().resolve())
    check_config(config, any_class=own and not safe)
    return [*words[: place + 1], "-c", str(config), *words[place + 1 :]], own and not safe


def _is_file(name: str | Path) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _quieter() -> Iterator[None]:
    """Silence advice that does not apply here; each with its cause."""

    def not_advertising(record: logging.LogRecord) -> bool:
        return "Tip: For seamless cloud" not in record.getMessage()

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(not_advertising)
    try:
        with warnings.catch_warnings():
            for message in (
                # Frames are gathered from memory in one read; workers would only copy them.
                ".*does not have many workers.*",
                # A continued run keeps its folder.
                ".*Checkpoint directory .* exists and is not empty.*",
                # ExactResume puts the sampler where it was.
                ".*ended before the epoch ended and your dataloader is not resumable.*",
                # Lightning 2.6 asks torch in a way that torch 2.11 deprecates.
                ".*isinstance.treespec, LeafSpec.. is deprecated.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        log.removeFilter(not_advertising)


def _root(error: Exception) -> BaseException:
    """Return what a class raised, from inside jsonargparse's report on all types it tried."""
    root: BaseException = error
    while str(root).startswith("Does not validate against any") and root.__cause__ is not None:
        root = root.__cause__
    return root


def _plain(message: str) -> str:
    """Drop the lines in which jsonargparse lists what else would have been accepted."""
    noise = (
        "Does not validate against any",
        "Subtypes:",
        "Errors:",
        "- Expected a <class 'NoneType'>",
        "Given value",
    )
    lines = [line for line in message.splitlines() if not line.strip().startswith(noise)]
    return "\n".join(lines) if len(lines) > 1 else message


def _is_users(error: BaseException, cli: TrainCLI | None) -> bool:
    """Tell an error that the user can mend from a defect that needs its traceback."""
    if cli is None or not cli.started:
        return isinstance(error, ValueError | MisconfigurationException | OSError)
    # Later on, an unexplained ValueError is a defect; one of our own classes explains itself.
    file = Path(getattr(sys.modules.get(type(error).__module__), "__file__", None) or "/")
    ours = file.resolve().is_relative_to(ROOT) and "site-packages" not in file.parts
    return isinstance(error, ValueError) and ours


def _unmade(error: BaseException, wrapped: Exception) -> str | None:
    """Explain what a class of the configuration raised, from under all types it was tried as."""
    if error is wrapped or isinstance(error, ValueError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {error} (all of it with {TRACEBACK_VARIABLE}=1)"


def _misfit(error: BaseException, cli: TrainCLI | None) -> str | None:
    """Explain a checkpoint whose weights do not fit the model, in terms of the configuration."""
    if cli is None or cli._checkpoint is None or "loading state_dict" not in str(error):
        return None
    saved = read_checkpoint(cli._checkpoint).get("hyper_parameters", {})
    configured = dict(cli.model.hparams)
    differences = [
        f"{key}: {saved[key]!r} in the checkpoint, {configured[key]!r} configured"
        for key in saved
        if key in configured and saved[key] != configured[key]
    ]
    lines = [line.strip() for line in str(error).splitlines()[1:3]]
    reason = "; ".join(differences[:4] or lines)
    return f"{cli._checkpoint}: does not fit the configured model ({reason})"


def _lost_worker(error: BaseException, cli: TrainCLI | None) -> str | None:
    """Explain the death of a loader's process: something outside ended it."""
    if "DataLoader worker" not in str(error) or cli is None:
        return None
    saved = (
        f"; continue with --ckpt_path last --name {cli._config().name}"
        if cli.trainer.global_step
        else ""
    )
    return (
        f"{str(error).splitlines()[0]} A process that loads data was ended from outside, mostly "
        "because memory ran out: use fewer with --data.init_args.num_workers, give the container "
        f"more shared memory (--shm-size), or a smaller batch{saved}"
    )


def _lost_process(error: BaseException, cli: TrainCLI | None) -> str | None:
    """Explain the error of a process whose only fault is to have lost another one."""
    if cli is None or cli.trainer.world_size == 1 or not isinstance(error, RuntimeError):
        return None
    lost = ("closed by peer", "reset by peer", "remote process exited", "Socket Timeout")
    if not isinstance(error, torch.distributed.DistError) and not any(
        words in str(error) for words in lost
    ):
        return None
    return (
        f"process {cli.trainer.global_rank} of {cli.trainer.world_size} lost another one "
        f"({str(error).splitlines()[0][-120:]}); the first error above says why; continue with "
        "--ckpt_path last"
    )


def _fail(message: str, exit_code: int = 1) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] [red]{escape(message)}[/]")
    raise SystemExit(exit_code)


def _message(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    # A loader worker sends its traceback along; the last line is the error.
    return text.splitlines()[-1] if "Original Traceback" in text else text


def main(args: Sequence[str] | None = None) -> TrainCLI:
    """Run one command line.

    Args:
        args: Words after the program's name; those of the process when None.

    Raises:
        SystemExit: 1 after an error, 2 for a wrong command line, 130 after Ctrl-C, 143 after
            SIGTERM.
    """
    words = list(sys.argv[1:] if args is None else args) or ["fit", "-c", str(DEMO)]
    cli: TrainCLI | None = None
    with _quieter(), leaving_in_order():
        try:
            words, trusted = with_run_config(words)
            with contextlib.nullcontext() if trusted else only_trusted_imports():
                cli = TrainCLI(words)
            cli.run()
            return cli
        except SIGTERMException as stop:
            reason = Reason.TERMINATED if cli is None else cli._callback(StopOnSignal).reason
            if isinstance(stop, Stopped):
                reason = stop.reason
            if cli is not None:
                _say_how_to_continue(cli)
            if reason is Reason.REQUEUE and getattr(rank_zero_only, "rank", 0) == 0:
                _queue_again(cli)
            by_hand = reason is Reason.INTERRUPTED
            raise SystemExit(EXIT_INTERRUPTED if by_hand else EXIT_TERMINATED) from None
        except KeyboardInterrupt:
            raise SystemExit(EXIT_INTERRUPTED) from None
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise SystemExit(EXIT_INTERRUPTED) from None
            raise
        except Exception as wrapped:
            error = _root(wrapped)
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            explained = (
                _unmade(error, wrapped)
                or _misfit(error, cli)
                or _lost_worker(error, cli)
                or _lost_process(error, cli)
            )
            if explained is None and not _is_users(error, cli):
                raise
            _fail(explained or _message(error))


def _queue_again(cli: TrainCLI | None) -> None:
    if cli is not None:
        if not cli.finished:
            print(cli.queue_again())
    elif int(os.environ.get("SLURM_RESTART_COUNT") or 0) < 2:
        print(requeue())
    else:
        print("the job is not queued again (stopped before it had read its configuration)")


def _say_how_to_continue(cli: TrainCLI) -> None:
    if cli.subcommand != "fit" or cli.finished or not cli.trainer.is_global_zero:
        return
    if not cli.trainer.global_step or not any(
        (cli.run_folder / CHECKPOINTS).glob(f"*{CHECKPOINT_SUFFIX}")
    ):
        return
    config = cli._config()
    words = ["python train.py fit"]
    if config.output_dir != DEFAULT_OUTPUT_DIR:
        words.append(f"--output_dir {shlex.quote(config.output_dir)}")
    words += [f"--name {shlex.quote(config.name)}", "--ckpt_path last"]
    print(f"stopped at step {cli.trainer.global_step}; continue with: {' '.join(words)}")


if __name__ == "__main__":
    main()
