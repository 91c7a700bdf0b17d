"""Train a small policy on the recorded demonstrations, on a CPU, within a time budget.

    python examples/metaworld/train.py --minutes 80
    python examples/metaworld/train.py --policy-type groot --minutes 100

Vision tower and language model run once per observation; the action head learns from several noise draws on what they
found. The learning rate is one cycle over the *training time*, so a run ends when asked however busy the machine is; with
``--steps`` over the steps instead. A killed run resumes from ``<out>/state.pt``, to the same steps as if it had not been
killed; a longer ``--minutes`` continues a finished one. The exported weights are an exponential moving average.
``--from-export`` goes on from an exported checkpoint and the small file beside it where there is no ``state.pt``, with
the checkpoint's normalization, whatever ``--tasks`` are trained on now.
An auxiliary head (not exported) predicts where object and goal are relative to the hand, which teaches the vision
tower faster than actions alone.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from frames import Sampler, load_shard, normalization
from learner import Collator, Learner
from make_dataset import BUILD
from policies import POLICY_TYPES, load_for_training, write_trained, write_untrained
from robot import CAMERA_KEYS
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from training import Run, Schedule

from quantvla.evaluate.metaworld import find_task

TASK_WEIGHT = {
    "reach-v3": 0.8,
    "push-v3": 1.5,
    "pick-place-v3": 1.8,
    "door-open-v3": 1.2,
    "drawer-open-v3": 0.8,
    "drawer-close-v3": 0.5,
    "button-press-topdown-v3": 1.2,
    "window-open-v3": 1.0,
    "window-close-v3": 1.0,
}


@dataclass(frozen=True)
class Options:
    """What a run is asked to do; ``stop_after``: a step at which it is left to be resumed."""

    policy_type: str
    schedule: Schedule
    stop_after: int | None
    out: Path
    export: Path
    from_export: bool
    frames: Path
    batch_size: int
    save_every_s: float
    workers: int
    shift: int
    tasks: tuple[str, ...]
    weight: tuple[tuple[str, float], ...]

    @property
    def state(self) -> Path:
        """The whole state of the run."""
        return self.out / "state.pt"

    @property
    def compact_state(self) -> Path:
        """The small file that lets a run go on from its exported checkpoint."""
        return self.export.with_name(self.export.name + ".training.safetensors")


def prefetch(
    sampler: Sampler, collate: Collator, size: int, rank: int, step: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this worker from ``step`` on, which a thread prepares two ahead."""
    ready: queue.Queue[dict[str, Tensor]] = queue.Queue(maxsize=2)

    def work(at: int) -> None:
        while True:
            ready.put(collate(sampler.draw(size, np.random.default_rng((rank, at)))))
            at += 1

    threading.Thread(target=work, args=(step,), daemon=True).start()
    while True:
        yield ready.get()


def worker(rank: int, options: Options) -> None:
    """Train until the time is used up; worker 0 saves the state and exports the moving average every few minutes."""
    torch.set_num_threads(1)
    store = f"file://{(options.out / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    shards = [load_shard(task, options.frames) for task in options.tasks]
    resumed = options.state.exists()
    going_on = resumed or options.from_export
    start = options.export if going_on else options.out / "untrained"
    if rank == 0 and not going_on:
        stats = normalization(shards)
        tensors = {k: {n: torch.from_numpy(v) for n, v in s.items()} for k, s in stats.items()}
        write_untrained(options.policy_type, start, tensors)
    dist.barrier()
    loaded = load_for_training(options.policy_type, start)
    torch.manual_seed(0)  # of the head
    learner = Learner(POLICY_TYPES[options.policy_type].objective(loaded)).train()
    interface = loaded.interface
    _, chunk, width = interface.sampler.noise_shape
    run = Run(learner, options.schedule, width, rank)
    if resumed:
        run.resume(options.state)
    elif options.from_export:
        run.resume_compact(options.compact_state, loaded.policy.state_dict())
    weights = {**TASK_WEIGHT, **dict(options.weight)}
    sampler = Sampler(shards, weights, chunk, options.shift)
    collate = Collator(interface, [find_task(shard.task) for shard in shards], CAMERA_KEYS)
    size = options.batch_size // options.workers
    batches = prefetch(sampler, collate, size, rank, run.step)

    def save() -> None:
        if rank == 0:
            write_trained(loaded, run.trained_policy(), options.export)
            run.save_compact(options.compact_state)
            run.save(options.state)  # last: where there is a state, the export is of this run

    count = sum(parameter.numel() for parameter in run.parameters.values())
    log(rank, f"{count / 1e6:.2f} M parameters, from step {run.step}, {run.trained_s / 60:.1f} min")
    first, began_s = run.step, time.process_time()
    train(run, batches, options, save)
    a_step_s = (time.process_time() - began_s) / max(1, run.step - first)
    save()
    done = f"stopped at step {run.step}, {run.progress:.0%} of the schedule"
    log(rank, f"{done}; {a_step_s:.2f} processor seconds a step")
    dist.barrier()
    dist.destroy_process_group()


def train(
    run: Run, batches: Iterator[dict[str, Tensor]], options: Options, save: Callable[[], None]
) -> None:
    """Take steps until the schedule or ``stop_after`` ends, calling ``save`` from time to time."""
    losses: list[tuple[float, float]] = []
    saved_s = run.trained_s
    while run.progress < 1 and run.step != options.stop_after:
        losses.append(run.train_step(next(batches)))
        if run.step % 25 == 0:
            flow, objects = np.mean(losses, axis=0)
            losses.clear()
            lr = run.optimizer.param_groups[0]["lr"]
            log(
                run.rank,
                f"step {run.step} {run.trained_s / 60:.1f} min flow {flow:.4f} objects {objects:.4f} lr {lr:.1e}",
            )
        if run.trained_s - saved_s > options.save_every_s:
            saved_s = run.trained_s
            save()


def task_weight(text: str) -> tuple[str, float]:
    """Parse ``push-v3=2`` into a task name and how often it is drawn relative to the others."""
    name, _, value = text.partition("=")
    return find_task(name).name, float(value)


def log(rank: int, line: str) -> None:
    """Print a line with the time of day, from worker 0 only."""
    if rank == 0:
        print(time.strftime("%H:%M:%S"), line, flush=True)


def parse(arguments: list[str] | None = None) -> Options:
    """Return the options that a command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy-type", choices=sorted(POLICY_TYPES), default="smolvla")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time, over all resumed runs")
    length.add_argument("--steps", type=int, help="training steps, over all resumed runs")
    add("--stop-after", type=int, metavar="STEP", help="leave the run there, to be resumed")
    add("--out", type=Path, help="state of the run (build/metaworld/run-TYPE)")
    add("--export", type=Path, help="checkpoint directory (the policy type's, beside this file)")
    add("--from-export", action="store_true", help="without a state, go on from --export")
    add("--frames", type=Path, default=BUILD / "frames")
    add("--batch-size", type=int, default=48, help="observations a step, over all workers")
    add("--peak-lr", type=float, default=7e-4)
    add("--ema", type=float, default=0.998)
    add("--object-weight", type=float, default=0.5)
    add("--save-every-s", type=float, default=180.0)
    add("--workers", type=int, default=2, help="processes of one thread each")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    add("--shift", type=int, default=4, help="random shift of pictures, pixels")
    add("--tasks", nargs="+", default=list(TASK_WEIGHT), choices=list(TASK_WEIGHT), metavar="TASK")
    add("--weight", type=task_weight, action="extend", nargs="+", default=[], metavar="TASK=W")
    given = vars(parser.parse_args(arguments))
    names = ("minutes", "steps", "peak_lr", "ema", "object_weight", "bf16")
    schedule = Schedule(**{name: given.pop(name) for name in names})
    kind = given["policy_type"]
    given["out"] = given["out"] or BUILD / f"run-{kind}"
    given["export"] = given["export"] or Path(__file__).parent / POLICY_TYPES[kind].directory
    given["tasks"] = tuple(given["tasks"])
    given["weight"] = tuple(given["weight"])
    return Options(schedule=schedule, **given)


def main() -> None:
    """Parse the command line and start the workers."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rendezvous").unlink(missing_ok=True)
    spawn(worker, args=(options,), nprocs=options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
