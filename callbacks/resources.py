"""What a run holds on its machine: over days, none of it may keep growing."""

import ctypes
import gc
import shutil
from typing import override

import psutil
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.dashboard import Dashboard

GIB, MIB = 2**30, 2**20


class Resources(Callback):
    """Logs ``resources/...`` in each validation's row: memory, files, threads, room on the disk.

    They are those of the first process and of all that it started (other processes of a node, W&B),
    after the diagnostics; ``resources/disk_free_gib`` is what the run folder's disk has left.

    Before it looks, and where diagnostics drew something, what they left behind is freed and given
    back to the system: else Python collects its cycles, pictures among them, whenever it comes to
    it, and glibc keeps what is free between blocks that are not.

    Args:
        min_free_gib: Warns once when the disk has less left, in GiB; 0 never warns.
    """

    def __init__(self, min_free_gib: float = 1.0) -> None:
        if not min_free_gib >= 0:
            raise ValueError(f"min_free_gib {min_free_gib:g}: must not be negative; 0 never warns")
        self.min_free_gib = min_free_gib
        self._has_warned = False

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if Dashboard.of(trainer).has_media:
            give_back_memory()
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        free_gib = shutil.disk_usage(trainer.default_root_dir).free / GIB
        numbers = {**held(psutil.Process()), "disk_free_gib": free_gib}
        Dashboard.of(trainer).note({f"resources/{name}": n for name, n in numbers.items()})
        if free_gib < self.min_free_gib and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{trainer.default_root_dir}: the disk has {free_gib:.2f} GiB left; make room, or "
                "the next checkpoint may not fit"
            )


def give_back_memory() -> None:
    """Free what only cycles hold, and return it to the system where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held(process: psutil.Process) -> dict[str, float]:
    """Return what a process and all that it started hold.

    Args:
        process: The one that trains.

    Returns:
        ``memory_mib``, and of it ``memory_training_mib`` of the process itself and
        ``memory_children_mib`` of the others: proportional set size, which counts a page that is
        shared once (where the system does not tell it, the resident set size); ``open_files``,
        ``threads``, ``processes``.

    Raises:
        psutil.NoSuchProcess: If the process is gone.
    """
    names = ("memory_training_mib", "memory_children_mib", "open_files", "threads", "processes")
    total = dict.fromkeys(names, 0.0)
    for each in [process, *process.children(recursive=True)]:
        part = "memory_training_mib" if each.pid == process.pid else "memory_children_mib"
        try:
            with each.oneshot():
                memory = each.memory_full_info()
                total[part] += getattr(memory, "pss", memory.rss) / MIB
                total["open_files"] += each.num_fds()
                total["threads"] += each.num_threads()
                total["processes"] += 1
        except psutil.Error:
            continue  # It ended while we looked.
    memory_mib = total["memory_training_mib"] + total["memory_children_mib"]
    return {"memory_mib": memory_mib, **total}
