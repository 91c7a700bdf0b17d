"""The training scripts of examples/metaworld, on a few invented pictures: what they train is what compiles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantvla import staged
from quantvla.evaluate.metaworld import CAMERA_KEY_PREFIX, CAMERAS, STATE_KEY, TASK_KEY, TASKS
from quantvla.families import load_policy
from quantvla.runtime.errors import QuantVLAError

EXAMPLE = Path(__file__).parents[2] / "examples" / "metaworld"
STEPS = 10
NEVER_READ = {
    "smolvla": (),
    "groot": ("language_model.norm.weight",),  # the action head reads what comes before it
}


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        import compact
        import frames
        import learner
        import policies
        import train

        yield SimpleNamespace(
            compact=compact, frames=frames, learner=learner, policies=policies, train=train
        )


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five episodes of two steps for every task."""
    directory = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for task in TASKS:
        (directory / f"{task.name}.raw").write_bytes(
            rng.bytes(STEPS * len(CAMERAS) * 128 * 128 * 3)
        )
        np.savez(
            directory / f"{task.name}.npz",
            states=rng.standard_normal((STEPS, 4), np.float32),
            actions=rng.uniform(-1, 1, (STEPS, 4)).astype(np.float32),
            raw=rng.standard_normal((STEPS, 39)),
            lengths=np.full(5, 2),
            goals=np.zeros((5, 3)),
            seeds=np.arange(5),
        )
    return directory


@pytest.fixture(scope="module", params=["groot", "smolvla"])
def policy_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Trainer:
    """Runs the training script with one worker in this process, every run in a directory of its own."""

    def __init__(self, train: Any, policy_type: str, frames: Path, directory: Path) -> None:
        self.train, self.directory = train, directory
        self.given = ["--policy-type", policy_type, "--frames", str(frames)]
        self.given += ["--batch-size", "2", "--workers", "1"]

    def __call__(self, name: str, *more: str) -> Any:
        out = self.directory / name
        given = [*self.given, "--out", str(out), "--export", str(out / "policy"), *more]
        options = self.train.parse(given)
        out.mkdir(exist_ok=True)
        (out / "rendezvous").unlink(missing_ok=True)
        self.train.worker(0, options)
        return options


@pytest.fixture(scope="module")
def trainer(
    example: SimpleNamespace, policy_type: str, frames: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:  # fmt: skip
    return Trainer(example.train, policy_type, frames, tmp_path_factory.mktemp(policy_type))


@pytest.fixture(scope="module")
def trained(trainer: Trainer) -> Any:
    """The options of a run of two steps."""
    return trainer("whole", "--steps", "2")


def test_the_trained_checkpoint_loads(trained: Any, policy_type: str) -> None:
    loaded = load_policy(trained.export)
    assert loaded.family == policy_type
    action, sampler = loaded.interface.action, loaded.interface.sampler
    assert (sampler.noise_shape[1], action.execute, action.dim) == (16, 8, 4)
    stored = load_file(trained.export / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    size = sum(path.stat().st_size for path in trained.export.rglob("*") if path.is_file())
    assert size < 13.5e6 if policy_type == "smolvla" else size <= 12e6
    assert trained.compact_state.stat().st_size < 1_000_000


def test_everything_that_is_read_learns(trained: Any, policy_type: str) -> None:
    before = load_policy(trained.out / "untrained").policy.state_dict()
    after = torch.load(trained.state, weights_only=True)["parameters"]
    prefix = "objective.policy."
    names = {name for name in after if name.startswith(prefix)}
    same = {name for name in names if torch.equal(after[name], before[name.removeprefix(prefix)])}
    assert {n for n in same if not n.endswith(NEVER_READ[policy_type] or ("-",))} == set()
    assert len(names) > 100


def test_a_resumed_run_takes_the_same_steps(trainer: Trainer, trained: Any) -> None:
    shutil.copytree(trained.out / "untrained", trainer.directory / "parts" / "untrained")
    half = trainer("parts", "--steps", "2", "--stop-after", "1")
    assert torch.load(half.state, weights_only=True)["step"] == 1
    trainer("parts", "--steps", "2")
    whole, parts = (torch.load(o.state, weights_only=True) for o in (trained, half))
    assert whole["step"] == parts["step"] == 2
    for kind in ("parameters", "average"):
        assert all(torch.equal(parts[kind][name], value) for name, value in whole[kind].items())
    for index, state in whole["optimizer"]["state"].items():
        found = parts["optimizer"]["state"][index]
        assert all(torch.equal(found[name], value) for name, value in state.items())


def test_a_run_goes_on_from_its_export(example: SimpleNamespace, trainer: Trainer, trained: Any) -> None:  # fmt: skip
    whole = torch.load(trained.state, weights_only=True)
    parameters = whole["parameters"]
    state = example.compact.load(trained.compact_state, parameters)
    assert state.step == 2 and set(state.head) == {"head.weight", "head.bias"}
    for index, name in enumerate(parameters):
        if name in state.second_moments:
            exact = whole["optimizer"]["state"][index]["exp_avg_sq"]
            found = state.second_moments[name]
            torch.testing.assert_close(found.sum(), exact.sum(), rtol=1e-3, atol=1e-12)
            torch.testing.assert_close(found[0].sum(), exact[0].sum(), rtol=1e-3, atol=1e-12)
    other = trainer.directory / "export"
    shutil.copytree(trained.out / "untrained", other / "untrained")
    shutil.copytree(trained.export, other / "policy")
    shutil.copy(trained.compact_state, other)
    trainer("export", "--steps", "3", "--from-export")
    after = torch.load(other / "state.pt", weights_only=True)
    assert after["step"] == 3
    name = max(parameters, key=lambda name: parameters[name].numel())
    moved = (after["parameters"][name] - whole["average"][name]).abs().max()
    assert 0 < moved < 5e-3


def test_training_sees_what_inference_computes(
    example: SimpleNamespace, trained: Any, policy_type: str, frames: Path
) -> None:
    """The batched forward pass of the loss against the stages on raw observations, one by one."""
    loaded = example.policies.load_for_training(policy_type, trained.out / "untrained")
    shards = [example.frames.load_shard(task.name, frames) for task in TASKS]
    keys = [CAMERA_KEY_PREFIX + camera for camera in CAMERAS]
    sampler = example.frames.Sampler(shards, {task.name: 1.0 for task in TASKS}, 16, 0)
    batch = replace(sampler.draw(2, np.random.default_rng(0)), task=np.array([0, 2]))
    tensors = example.learner.Collator(loaded.interface, TASKS, keys)(batch)
    noise_shape = loaded.interface.sampler.noise_shape
    noisy = torch.randn((2, 2, *noise_shape[1:]), generator=torch.Generator().manual_seed(0))
    time = torch.tensor([[0.75, 0.5], [0.25, 0.5]])
    objective = example.policies.POLICY_TYPES[policy_type].objective(loaded)
    with torch.no_grad():
        _, context = objective.context(tensors)
        found = objective.velocity(context, noisy, time).numpy()
    preprocess = staged.make_preprocessor(loaded.interface)
    for index, task in enumerate((TASKS[0], TASKS[2])):
        observation = {STATE_KEY: batch.states[index], TASK_KEY: task.instruction}
        observation |= dict(zip(keys, batch.images[index], strict=True))
        inputs = staged.prepare(preprocess, observation)
        known = staged.run_context(loaded, inputs)
        assert np.abs(inputs["images"] - tensors["images"][index].numpy()).max() < 1e-6
        for draw in range(2):
            x, t = noisy[index, draw][None].numpy(), float(time[index, draw])
            expected = staged.velocity(loaded, known, x, t)[0]
            assert np.abs(expected - found[index, draw]).max() < 1e-4 * np.abs(expected).max()


def test_actions_are_normalized_as_the_policy_unnormalizes_them(
    example: SimpleNamespace, trained: Any, frames: Path
) -> None:
    from quantvla.runtime.postprocess import Postprocessor

    interface = load_policy(trained.export).interface
    shards = [example.frames.load_shard(task.name, frames) for task in TASKS]
    keys = [CAMERA_KEY_PREFIX + camera for camera in CAMERAS]
    sampler = example.frames.Sampler(shards, {task.name: 1.0 for task in TASKS}, 16, 4)
    batch = sampler.draw(1, np.random.default_rng(1))
    chunk = example.learner.Collator(interface, TASKS, keys)(batch)["action"].numpy()
    back = Postprocessor(interface.postprocess, interface.statistics)(chunk)
    assert len(back) >= interface.action.execute
    assert np.abs(back - batch.actions[0, : len(back)]).max() < 1e-5


def test_a_run_of_another_policy_type_is_refused(
    example: SimpleNamespace, trained: Any, policy_type: str
) -> None:
    other = "smolvla" if policy_type == "groot" else "groot"
    with pytest.raises(QuantVLAError, match=f"expected a checkpoint of policy type '{other}'"):
        example.policies.load_for_training(other, trained.out / "untrained")
