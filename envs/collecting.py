"""What makers of demonstrations share: episodes by several processes, and data made once."""

import fcntl
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

SEEDS_PER_DATASET = 1_000_000
"""Data set ``seed`` draws its episodes from this many environment seeds of its own."""


class Episode(Protocol):
    """What came of playing one episode."""

    @property
    def seed(self) -> int:
        """Of the episode."""
        ...

    @property
    def solved(self) -> bool:
        """Whether the benchmark counts the episode as solved."""
        ...


def solved_episodes[E: Episode](
    play: Callable[..., E],
    arguments: tuple[Any, ...],
    n_episodes: int,
    seed: int,
    n_workers: int,
    failed: list[int],
    mend: str,
    progress: bool,
) -> Generator[E]:
    """Play episodes until enough are solved: the same ones whatever the number of workers.

    Args:
        play: Plays one episode, ``play(seed, *arguments)``; a function of a module, so that
            another process finds it.
        arguments: Of ``play``, after the seed.
        n_episodes: Solved episodes to give.
        seed: Of the data set; different seeds share no start.
        n_workers: Processes; this one alone when 0.
        failed: Takes the seeds of unsolved episodes, whose place the next seeds take.
        mend: What to do when the expert keeps failing.
        progress: Show a progress bar.

    Raises:
        RuntimeError: When a process ends before its work is done.
        ValueError: When the expert keeps failing.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not progress,
    )
    first_seed = seed * SEEDS_PER_DATASET
    # Closing ends the workers now, not whenever the generator is collected.
    with (
        bar,
        closing(_episodes(play, arguments, first_seed, min(n_workers, n_episodes))) as episodes,
    ):
        shown = bar.add_task("Demonstrations", total=n_episodes)
        n_solved = 0
        for episode in episodes:
            if not episode.solved:
                failed.append(episode.seed)
                if len(failed) > 20 + n_episodes:
                    raise ValueError(
                        f"the expert failed {len(failed)} times and solved {n_solved} episodes: "
                        f"{mend}"
                    )
                continue
            yield episode
            n_solved += 1
            bar.advance(shown)
            if n_solved == n_episodes:
                return


def _episodes[E](
    play: Callable[..., E], arguments: tuple[Any, ...], first_seed: int, n_workers: int
) -> Generator[E]:
    """Endless, in the order of the seeds, whatever the number of workers."""
    if n_workers == 0:
        seed = first_seed
        while True:
            yield play(seed, *arguments)
            seed += 1
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(n_workers):
            idle.put(stack.enter_context(closing(_Worker())))

        def played(seed: int) -> E:
            worker = idle.get()
            try:
                return worker.play(play, seed, arguments)
            finally:
                idle.put(worker)

        executor = stack.enter_context(ThreadPoolExecutor(n_workers))
        try:
            pending: deque[Future[E]] = deque()
            seed = first_seed
            while True:
                while len(pending) < 3 * n_workers:
                    pending.append(executor.submit(played, seed))
                    seed += 1
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """A process that plays episodes.

    Not one of ``multiprocessing``'s: its children import the main script again, and with it
    everything that training needs and playing does not.
    """

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from envs.collecting import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for the parent, who closes its workers.
            process_group=0,
        )

    def play[E](self, play: Callable[..., E], seed: int, arguments: tuple[Any, ...]) -> E:
        """Like ``play(seed, *arguments)``, elsewhere."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            pickle.dump((play, seed, arguments), requests)
            requests.flush()
            return pickle.load(answers)
        except (BrokenPipeError, EOFError) as error:
            raise RuntimeError(
                f"seed {seed}: the worker process ended with code {self._process.wait()}; its "
                "message is above; n_workers=0 plays in this process instead"
            ) from error

    def close(self) -> None:
        """End the process, in the middle of an episode if need be."""
        self._process.kill()
        # Also closes the pipes.
        self._process.communicate()


def serve() -> None:
    """Play the episodes that come in on standard input, until it closes."""
    with os.fdopen(os.dup(1), "wb") as answers:
        # Whatever a library prints must not end up among the answers.
        os.dup2(2, 1)
        while True:
            try:
                play, seed, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(play(seed, *arguments), answers)
            answers.flush()


def worker_count(n_workers: int | None) -> int:
    """As asked for; one per core when None."""
    return len(os.sched_getaffinity(0)) if n_workers is None else n_workers


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Wait until no other process or thread looks after a cached file or folder.

    Args:
        path: Of the data; its parent folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        # Released by the kernel, whatever becomes of this process.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
