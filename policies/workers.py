"""Many pieces of work over worker processes of this machine, or over the nodes of a Ray cluster.

Every worker computes with one thread, so a piece gives the same numbers whichever worker computes
it and however many there are; without workers, this process gives them when it has one thread, too.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, get_args

Engine = Literal["processes", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class WorkerError(ValueError):
    """A worker process died, or an engine is not there; the message says what to change."""


def map_over[Item, Result](
    function: Callable[[Item], Result],
    items: Sequence[Item],
    n_workers: int,
    engine: Engine = "processes",
) -> Iterator[Result]:
    """Give ``function(item)`` for each item, in the order of the items.

    The first piece that fails ends all others at once.

    Args:
        function: Of a module, not a closure: workers import it. What it gives is pickled.
        items: Pickled, too; a worker takes the next one when it is done with one.
        n_workers: Processes, of one thread each; 0 computes in this process with its threads.
        engine: Where they run: ``processes`` of this machine, or tasks of the Ray cluster that
            ``RAY_ADDRESS`` names, which is started on this machine where none is named.

    Raises:
        WorkerError: If a worker was killed, Ray is not installed, or what a worker raised cannot
            be sent to this process; then with its text.
        ValueError: If ``n_workers`` is negative.
    """
    if n_workers < 0:
        raise ValueError(f"n_workers is {n_workers}: give 0 for none, or more")
    if n_workers == 0:
        yield from map(function, items)
    elif engine == "ray":
        yield from _over_ray(function, items, n_workers)
    else:
        yield from _over_processes(function, items, n_workers)


def _over_processes(
    function: Callable[[Any], Any], items: Sequence[Any], n_workers: int
) -> Iterator[Any]:
    pool = ProcessPoolExecutor(
        max(min(n_workers, len(items)), 1),
        # A fork would copy locks that threads of this process hold, and cannot use CUDA.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
    )
    waiting = deque(items)
    asked: deque[Future[Any]] = deque()
    try:
        while waiting or asked:
            running = [future for future in asked if not future.done()]
            # One more than compute, so that none has to wait for this process.
            while waiting and len(running) <= n_workers:
                running.append(pool.submit(_answer, function, waiting.popleft()))
                asked.append(running[-1])
            wait(running, return_when=FIRST_COMPLETED)
            for future in running:
                if future.done():
                    future.result()
            while asked and asked[0].done():
                yield asked.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerError(
            f"a worker process (of {n_workers}) died: it was killed, ran out of memory, or "
            "crashed; start again with fewer workers, or with 0 to see what crashes"
        ) from error
    except BaseException:
        # What they are at may take hours, and nobody wants it any more.
        for process in [*pool._processes.values()]:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _answer(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            # It would break the pool, and nobody would read what it says.
            raise WorkerError(f"{type(error).__name__}: {error}") from error
        raise


def _begin() -> None:
    """Make a fresh process a worker: one thread, and no life without its parent."""
    import torch

    torch.set_num_threads(1)
    # Ctrl-C ends it without a traceback; the parent says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _over_ray(
    function: Callable[[Any], Any], items: Sequence[Any], n_workers: int
) -> Iterator[Any]:
    ray = start_ray(n_workers)
    remote = ray.remote(_with_one_thread)
    waiting = deque(items)
    running: deque[Any] = deque()
    try:
        while waiting or running:
            while waiting and len(running) < n_workers:
                running.append(remote.remote(function, waiting.popleft()))
            yield ray.get(running.popleft())
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise WorkerError(
            "a Ray worker died again and again: it ran out of memory, or crashed; start again "
            "with fewer workers, or with 0 to see what crashes"
        ) from error
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _with_one_thread(function: Callable[[Any], Any], item: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return _answer(function, item)


def start_ray(n_cpus: int) -> Any:
    """Import Ray and connect to its cluster; start one on this machine where there is none.

    Args:
        n_cpus: Of a cluster on this machine.

    Raises:
        WorkerError: If Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise WorkerError(
            "Ray is not installed: uv sync --extra ray, or leave the engine as it is"
        ) from error
    if ray.is_initialized():
        return ray
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        else:
            ray.init(
                num_cpus=n_cpus,
                include_dashboard=False,
                log_to_driver=False,
                # A cluster of one machine talks to nobody else.
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"Ray does not start ({str(error).splitlines()[0]}); look at RAY_ADDRESS, or leave "
            "the engine as it is"
        ) from error
    return ray
