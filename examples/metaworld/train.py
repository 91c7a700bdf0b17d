"""Train the small SmolVLA on the recorded demonstrations, on a CPU, within a time budget.

    python examples/metaworld/train.py --minutes 80 --out build/metaworld/run

The vision tower and the language model run once per observation; the action expert learns from ``DRAWS`` noise draws on
the same cached keys and values. The learning rate is one cycle over the *training time*, so a run ends when asked
however busy the machine is. A killed run resumes from ``<out>/state.pt``; a longer ``--minutes`` continues a finished one.
The exported weights are an exponential moving average. An auxiliary head (not exported) predicts where object and goal
are relative to the hand from the prefix's state token, which teaches the vision tower faster than actions alone.
"""

from __future__ import annotations

import argparse
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from build_policy import build_policy, save_policy
from frames import Sampler, load_shard, normalization
from learner import Collator, Learner
from make_dataset import BUILD
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from quantvla.evaluate.metaworld import TASKS, find_task

DRAWS = 4
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


LONGEST_STEP_S = 10.0
"""A step counts for no more than this: a suspended run does not use up its schedule."""


@dataclass(frozen=True)
class Options:
    """What a run is asked to do; ``minutes`` counts training time over all resumed runs."""

    minutes: float
    out: Path
    export: Path
    frames: Path
    batch_size: int
    peak_lr: float
    ema: float
    object_weight: float
    save_every_s: float
    workers: int
    bf16: bool
    shift: int
    weight: tuple[tuple[str, float], ...]


class Run:
    """Everything that a resumed run needs: learner, optimizer, moving average, step, training seconds."""

    def __init__(self, learner: Learner, options: Options) -> None:
        """Start from scratch; ``resume`` replaces the state."""
        self.learner = learner
        self.options = options
        self.parameters = [p for p in learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.peak_lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.average = {n: p.detach().clone() for n, p in learner.policy.named_parameters()}
        self.step = 0
        self.trained_s = 0.0
        self._last_s = time.monotonic()

    def resume(self, path: Path) -> None:
        """Load ``path`` if it exists."""
        if path.exists():
            state = torch.load(path, weights_only=False)
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.trained_s = (
                state["average"],
                state["step"],
                state["trained_s"],
            )

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "trained_s": self.trained_s,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def export(self, stats: dict[str, dict[str, Any]]) -> None:
        """Write the moving average as a LeRobot checkpoint directory."""
        current = {n: p.detach().clone() for n, p in self.learner.policy.named_parameters()}
        tensors = {k: {n: torch.from_numpy(v) for n, v in s.items()} for k, s in stats.items()}
        self._assign(self.average)
        save_policy(self.learner.policy, tensors, self.options.export)
        self._assign(current)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.learner.policy.named_parameters():
            parameter.copy_(values[name])

    def train_step(self, batches: Iterator[dict[str, Tensor]]) -> tuple[float, float]:
        """Update the parameters once, from the mean gradient of all workers; return the two losses."""
        batch = next(batches)
        size, chunk = batch["action"].shape[:2]
        policy = self.learner.policy
        noise = torch.randn(size, DRAWS, chunk, policy.config.max_action_dim)
        draw_time = policy.model.sample_time(size * DRAWS, noise.device).reshape(size, DRAWS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.options.bf16):
            flow, objects = self.learner(batch, noise, draw_time)
        (flow + self.options.object_weight * objects).backward()
        now = time.monotonic()
        elapsed_s = min(now - self._last_s, LONGEST_STEP_S)
        shared = torch.tensor([flow.item(), objects.item(), elapsed_s])
        self._last_s = now
        self._average_over_workers(shared)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = min(1.0, self.trained_s / (60 * self.options.minutes))
        self.optimizer.param_groups[0]["lr"] = self.options.peak_lr * one_cycle(progress)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        self.step += 1
        self.trained_s += float(shared[2])
        return float(shared[0]), float(shared[1])

    def _average_over_workers(self, shared: Tensor) -> None:
        """Replace every gradient, and the numbers in ``shared``, by the mean over the workers."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([shared, *[g.reshape(-1) for g in gradients]])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        shared.copy_(flat[: len(shared)])
        offset = len(shared)
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def one_cycle(progress: float) -> float:
    """Return the learning-rate factor at ``progress`` in [0, 1]: 3 % linear warm-up, then a cosine to 1 %."""
    if progress < 0.03:
        return max(progress / 0.03, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97))


def prefetch(sampler: Sampler, collate: Collator, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches that a thread prepares two ahead."""
    ready: queue.Queue[dict[str, Tensor]] = queue.Queue(maxsize=2)

    def work() -> None:
        while True:
            ready.put(collate(sampler.draw(size)))

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def worker(rank: int, options: Options) -> None:
    """Train until the time is used up; worker 0 saves the state and exports the moving average every few minutes."""
    torch.set_num_threads(1)
    store = f"file://{(options.out / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    shards = [load_shard(task.name, options.frames) for task in TASKS]
    stats = normalization(shards)
    learner = Learner(build_policy(options.out / f"vlm{rank}")).train()
    vision = learner.policy.model.vlm_with_expert.get_vlm_model().vision_model
    vision.config._attn_implementation = (
        "eager"  # on a CPU, faster than the fused kernel in bfloat16; not exported
    )
    run = Run(learner, options)
    run.resume(options.out / "state.pt")
    torch.manual_seed(1_000_000 * rank + run.step)
    rng = np.random.default_rng((rank, run.step))
    weights = {**TASK_WEIGHT, **dict(options.weight)}
    sampler = Sampler(shards, weights, learner.policy.config.chunk_size, options.shift, rng)
    batches = prefetch(
        sampler, Collator(learner.policy, stats, shards), options.batch_size // options.workers
    )
    log(
        rank,
        f"start at step {run.step}, {run.trained_s / 60:.1f} min, tasks {[s.task for s in shards]}",
    )
    losses: list[tuple[float, float]] = []
    saved_s = run.trained_s
    while run.trained_s < 60 * options.minutes:
        losses.append(run.train_step(batches))
        if run.step % 25 == 0:
            flow, objects = np.mean(losses, axis=0)
            losses.clear()
            lr = run.optimizer.param_groups[0]["lr"]
            log(
                rank,
                f"step {run.step} {run.trained_s / 60:.1f} min flow {flow:.4f} objects {objects:.4f} lr {lr:.1e}",
            )
        if rank == 0 and run.trained_s - saved_s > options.save_every_s:
            saved_s = run.trained_s
            run.save(options.out / "state.pt")
            run.export(stats)
    if rank == 0:
        run.save(options.out / "state.pt")
        run.export(stats)
    log(rank, "finished")
    dist.barrier()
    dist.destroy_process_group()


def task_weight(text: str) -> tuple[str, float]:
    """Parse ``push-v3=2`` into a task name and how often it is drawn relative to the others."""
    name, _, value = text.partition("=")
    return find_task(name).name, float(value)


def log(rank: int, line: str) -> None:
    """Print a line with the time of day, from worker 0 only."""
    if rank == 0:
        print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> None:
    """Parse the command line and start the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, required=True, help="training time, over all resumed runs"
    )
    parser.add_argument("--out", type=Path, default=BUILD / "run", help="state of the run")
    parser.add_argument(
        "--export", type=Path, default=Path(__file__).parent / "policy", help="checkpoint directory"
    )
    parser.add_argument("--frames", type=Path, default=BUILD / "frames")
    parser.add_argument(
        "--batch-size", type=int, default=48, help="observations a step, over all workers"
    )
    parser.add_argument("--peak-lr", type=float, default=7e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--object-weight", type=float, default=0.5)
    parser.add_argument("--save-every-s", type=float, default=180.0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast"
    )
    parser.add_argument("--shift", type=int, default=4, help="random shift of pictures, pixels")
    parser.add_argument(
        "--weight", type=task_weight, action="extend", nargs="+", default=[], metavar="TASK=W"
    )
    arguments = vars(parser.parse_args())
    options = Options(**{**arguments, "weight": tuple(arguments["weight"])})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rendezvous").unlink(missing_ok=True)
    spawn(worker, args=(options,), nprocs=options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
