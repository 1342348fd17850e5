"""Work for worker processes: they import this module, so it imports little."""

import os
import signal
import time
from dataclasses import dataclass

import torch

from envs.push_t import PushTTask


@dataclass(frozen=True)
class BriefPushT(PushTTask):
    """For ``--task pieces.BriefPushT``."""

    max_steps: int = 12


def square(number):
    # The first piece takes longest: answers come in another order than they were asked for.
    time.sleep(0.05 if number == 0 else 0)
    return number * number, torch.get_num_threads(), os.getpid()


def die_at_two(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number):
    raise ValueError(f"{number} is no good")


class UnreadableError(ValueError):
    def __init__(self, path, problem):
        super().__init__(f"{path} {problem}")


def refuse_unreadably(number):
    raise UnreadableError(f"file {number}", "is broken")


def note_and_wait(item):
    folder, number = item
    (folder / str(number)).touch()
    if number == 0:
        raise ValueError("the disk is full")
    time.sleep(60)
