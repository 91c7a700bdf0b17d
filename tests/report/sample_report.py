"""A made-up report of the size that the demo writes."""

from __future__ import annotations

import numpy as np

from quantvla.evaluate.journal import EpisodeRecord, Outcome
from quantvla.evaluate.results import arm_results, pair_results
from quantvla.evaluate.rollouts import Rollout
from quantvla.report.structure import (
    ActionError,
    ArmReport,
    AttentionFactors,
    ChunkExample,
    Latency,
    MachineReport,
    Memory,
    Report,
    SiteError,
    StepReport,
)

ARMS = ("float_policy", "float", "w4a8")
TITLES = ("Float policy (PyTorch)", "Float engine", "W4A8 engine")
TASKS = ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "window-open-v3")


def records(episodes: int = 20) -> list[EpisodeRecord]:
    generator = np.random.default_rng(0)
    found = []
    for index, task in enumerate(TASKS):
        for episode in range(episodes):
            shared = generator.random()
            outcomes = {
                arm: Outcome(
                    success=bool(shared + 0.03 * generator.standard_normal() < 0.97 - 0.07 * index),
                    steps=80,
                    total_reward=1.0,
                )
                for arm in ARMS
            }
            found.append(
                EpisodeRecord(
                    task=task, episode=episode, environment_seed=episode, outcomes=outcomes
                )
            )
    return found


def sites() -> tuple[SiteError, ...]:
    generator = np.random.default_rng(1)
    kinds = {
        "prefix": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "denoise": ("gate_proj", "up_proj", "down_proj"),
    }
    return tuple(
        SiteError(
            site=f"model.{stage}.layers.{layer}.{kind}",
            stage=stage,
            layer=layer,
            kind=kind,
            scheme="W4A8",
            relative_error=float(np.exp(generator.normal(-3.2, 0.6)) * (1 + (kind == "down_proj"))),
        )
        for stage, names in kinds.items()
        for layer in range(6)
        for kind in names
    )


def factors() -> tuple[AttentionFactors, ...]:
    generator = np.random.default_rng(3)
    found = []
    for kind, heads in (("atm", 4), ("ohb", 1)):
        for layer in range(4):
            raw = np.exp(generator.normal(0, 0.15, heads))
            raw[0] = 1.5 if layer == 2 else raw[0]
            within = np.clip(raw, np.exp(-0.3), np.exp(0.3))
            applied = np.where(np.abs(np.log(raw)) < 0.03, 1.0, within)
            found.append(
                AttentionFactors(
                    kind=kind, site=f"expert.{layer}.{kind}", layer=layer,
                    raw=tuple(raw.tolist()), applied=tuple(applied.tolist()), clip=0.3, band=0.03,
                )
            )  # fmt: skip
    return tuple(found)


def examples() -> tuple[ChunkExample, ...]:
    generator = np.random.default_rng(2)
    found = []
    for task in TASKS[:3]:
        base = np.cumsum(generator.normal(0, 0.2, (16, 4)), axis=0)
        chunks = {
            arm: tuple(map(tuple, (base + generator.normal(0, noise, base.shape)).tolist()))
            for arm, noise in zip(ARMS, (0.0, 1e-5, 0.04), strict=True)
        }
        names = ("dx", "dy", "dz", "gripper")
        found.append(ChunkExample(label=task, execute=8, action_names=names, chunks=chunks))
    return tuple(found)


def arms() -> tuple[ArmReport, ...]:
    results = arm_results(records(), ARMS, TASKS)
    times = ((30.0, 24.0, 7.0), (9.0, 8.0, 1.6), (9.0, 4.5, 1.2))
    parts = (3_900_000, 7_800_000, 1_090_000)
    files = (11_800_000, 23_500_000, 16_800_000)
    return tuple(
        ArmReport(
            name=name,
            title=title,
            success=results[name],
            action_error=None
            if name == "float_policy"
            else ActionError(
                nrmse=error,
                cosine_mean=1 - error**2,
                cosine_p5=1 - 2 * error**2,
                cosine_min=1 - 9 * error**2,
                observations=64,
                lowering_max_abs=4e-6 if name == "float" else None,
                kernel_max_relative=4e-4 if name == "w4a8" else None,
            ),
            chunk_ms=Latency(p50=v + p + 10 * d + 1, p99=1.2 * (v + p + 10 * d)),
            stages_ms={
                "vision": Latency(p50=v, p99=1.1 * v),
                "prefix": Latency(p50=p, p99=1.1 * p),
                "denoise": Latency(p50=d, p99=1.2 * d, repeat=10),
            },
            memory=Memory(
                quantized_parts=part,
                quantized_parts_float16=3_900_000,
                files=size,
                resident_mb=resident,
                peak_rss_mb=resident * 1.2,
            ),
        )
        for name, title, (v, p, d), part, size, resident, error in zip(
            ARMS, TITLES, times, parts, files, (610, 140, 120), (0, 2e-6, 0.021), strict=True
        )
    )


def sample_report() -> Report:
    return Report(
        title="SmolVLA on Meta-World: float and W4A8",
        arms=arms(),
        pairs=pair_results(records(), ARMS),
        tasks=TASKS,
        episodes_per_task=20,
        seed=0,
        sites=sites(),
        factors=factors(),
        examples=examples(),
        steps=(
            StepReport(
                title="quantize",
                command="quantvla quantize --policy.path examples/metaworld/policy "
                "--calib calib_sets/metaworld -o build/demo/w4a8",
                duration_s=41.2,
            ),
            StepReport(title="eval", command="quantvla eval a=b", duration_s=200.4, reused=True),
        ),
        notes=("Meta-World's pick-place is <hard>.",),
        machine=MachineReport(processor="Test CPU", cores=2, memory_gib=23.4, threads=2),
        versions={"quantvla": "0.1.0", "torch": "2.11.0"},
    )


def sample_rollouts() -> tuple[Rollout, ...]:
    rollouts = []
    for number, task in enumerate(TASKS[:3]):
        for arm in ARMS[:2]:
            frames = []
            for index in range(6 + number):
                frame = np.full((60, 60, 3), 60 * number, np.uint8)
                frame[10:20, 5 * index : 5 * index + 10] = (220, 120, 40)
                frames.append(frame)
            success = (number + len(arm)) % 2 == 0
            rollouts.append(
                Rollout(
                    arm=arm,
                    task=task,
                    episode=0,
                    success=success,
                    steps=4 * len(frames),
                    frames=tuple(frames),
                )
            )
    return tuple(rollouts)
