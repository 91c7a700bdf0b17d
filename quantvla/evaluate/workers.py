"""Worker processes that run (task, episode) items: every arm of an item in one process, one after the other."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection as mp_connection
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from quantvla.evaluate.arms import Arm, ChunkPolicy
from quantvla.evaluate.environment import Environment, Simulator
from quantvla.evaluate.episode import environment_seed, run_episode
from quantvla.evaluate.journal import EpisodeRecord, Outcome
from quantvla.fidelity.smoothness import executed_smoothness
from quantvla.runtime.errors import QuantVLAError, explain

_JOIN_S = 5.0
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Item:
    """One unit of work: an episode of a task, run by all arms."""

    task: str
    episode: int

    def __str__(self) -> str:
        """Return how messages name the episode."""
        return f"{self.task} episode {self.episode}"


@dataclass(frozen=True)
class Job:
    """What is the same for all items. Sent to every worker, so it must pickle; ``load`` is a module-level function."""

    arms: tuple[Arm, ...]
    simulator: Simulator
    load: Callable[[Arm], ChunkPolicy]
    seed: int
    execute: int | None


@dataclass(frozen=True)
class _Failure:
    message: str


class EpisodeRunner:
    """Runs items of a job. Policies are loaded once; the environment is kept while the task stays the same."""

    def __init__(self, job: Job) -> None:
        """Prepare to run; nothing is loaded before the first item."""
        self.where = "start"
        self._job = job
        self._policies: dict[str, ChunkPolicy] = {}
        self._environment: Environment | None = None
        self._task = ""

    def run(self, item: Item) -> EpisodeRecord:
        """Return how every arm did in the episode."""
        outcomes: dict[str, Outcome] = {}
        for arm in self._job.arms:
            self.where = f"arm {arm.name}"
            policy = self._policy(arm)
            self.where = f"{item}, arm {arm.name}"
            trajectory = run_episode(
                policy,
                arm.contract,
                self._open(item.task),
                item.task,
                item.episode,
                seed=self._job.seed,
                execute=self._job.execute,
            )
            outcomes[arm.name] = Outcome(
                success=trajectory.success,
                steps=len(trajectory.actions),
                total_reward=trajectory.total_reward,
                smoothness=executed_smoothness(
                    trajectory.actions, execute=self._job.execute or arm.contract.execute
                ),
            )
        return EpisodeRecord(
            task=item.task,
            episode=item.episode,
            environment_seed=environment_seed(self._job.seed, item.episode),
            outcomes=outcomes,
        )

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _policy(self, arm: Arm) -> ChunkPolicy:
        if arm.name not in self._policies:
            self._policies[arm.name] = self._job.load(arm)
        return self._policies[arm.name]

    def _open(self, task: str) -> Environment:
        if self._environment is None or task != self._task:
            self.close()
            self._environment, self._task = self._job.simulator.open(task), task
        return self._environment


def run_items(job: Job, items: Sequence[Item], processes: int) -> Iterator[EpisodeRecord]:
    """Yield the record of every item as it is finished, in no particular order.

    Raises `QuantVLAError` naming the episode when a worker fails or dies. The workers are stopped
    however the iteration ends.
    """
    workers = [_Worker(job) for _ in range(min(processes, len(items)))]
    queue = deque(items)
    try:
        for worker in workers:
            worker.assign(queue.popleft())
        while busy := [worker for worker in workers if worker.item is not None]:
            ready = mp_connection.wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection not in ready:
                    continue
                record = worker.receive()
                if queue:
                    worker.assign(queue.popleft())
                yield record
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, job: Job) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.item: Item | None = None
        self._process: SpawnProcess = context.Process(target=_work, args=(theirs, job), daemon=True)
        with _single_threaded():
            self._process.start()
        theirs.close()

    def assign(self, item: Item) -> None:
        self.item = item
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> EpisodeRecord:
        try:
            reply = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(reply, _Failure):
            raise QuantVLAError(reply.message)
        self.item = None
        assert isinstance(reply, EpisodeRecord)
        return reply

    def stop(self) -> None:
        """End the process: by closing the pipe when it waits for work, else by terminating it."""
        self.connection.close()
        if self.item is not None:
            self._process.terminate()
        self._process.join(_JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> QuantVLAError:
        self._process.join(_JOIN_S)
        code = self._process.exitcode
        killed = code is not None and code < 0
        return explain(
            str(self.item),
            "the worker process died",
            got=f"signal {signal.Signals(-code).name}" if killed and code else f"exit code {code}",
            remedy="look above for its last words, or for memory with fewer --processes; "
            "the same command resumes",
        )


def _work(connection: Connection, job: Job) -> None:
    """Run items until the parent closes the pipe. Ctrl-C is the parent's business; stdout carries its result only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runner = EpisodeRunner(job)
    try:
        while True:
            item = connection.recv()
            try:
                connection.send(runner.run(item))
            except QuantVLAError as error:
                connection.send(_Failure(f"{runner.where}: {error}"))
            except Exception as error:
                traceback.print_exc()
                connection.send(_Failure(_unexpected(runner.where, error)))
    except (EOFError, OSError):
        pass
    finally:
        runner.close()


def _unexpected(where: str, error: Exception) -> str:
    found = f"{type(error).__name__}: {error}".splitlines()[0]
    return str(explain(where, "failed", got=found, remedy="the traceback is printed above"))


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Let processes started in the block use one thread in numerical libraries, which read these at import."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
