"""Whether the parts of a manifest fit together, checked before anything is loaded."""

from __future__ import annotations

from pathlib import PurePosixPath

import msgspec

from quantvla.runtime.errors import QuantVLAError, explain, nearest
from quantvla.runtime.manifest import EulerSampler, Manifest, TensorSpec
from quantvla.runtime.processing_steps import (
    AddState,
    Images,
    Normalize,
    PreprocessStep,
    ResampledImages,
    Tokenize,
    Unnormalize,
)
from quantvla.runtime.sampler import SAME_TIME

_REMEDY = "export the engine again"


def check_wiring(manifest: Manifest) -> None:
    """Raise `QuantVLAError` unless every stage finds its inputs and sampler and action agree.

    Each stage's inputs must be made by preprocessing or by an earlier stage with the same dtype
    and shape. The sampler drives the last stage, once per timestep; the others run once, or once
    for each row of what they read. Every file that a stage or step names must be listed with its checksum.
    """
    _check_files(manifest)
    _check_action(manifest)
    _check_sampler(manifest)
    made: dict[str, TensorSpec] = {}
    for step in manifest.preprocess:
        _add(made, _outputs(step, manifest))
    for stage in manifest.stages:
        if stage.name == manifest.sampler.stage:
            _add(made, _sampler_tensors(manifest))
        rows = 1 if stage.name == manifest.sampler.stage else stage.repeat
        for spec in stage.inputs:
            _check_input(stage.name, _rows(stage.name, spec, rows), made)
        _add(made, tuple(_rows(stage.name, spec, rows) for spec in stage.outputs))
    _check_loop(manifest, made)
    _check_guidance(manifest, made)
    for post in manifest.postprocess:
        if isinstance(post, AddState):
            _check_origin(post, made, manifest.action.dim)


def _check_loop(manifest: Manifest, made: dict[str, TensorSpec]) -> None:
    """Raise `QuantVLAError` unless the graph of all steps finds its inputs and returns the chunk."""
    loop, sampler = manifest.loop, manifest.sampler
    if loop is None:
        return
    given = {name: spec for name, spec in made.items() if name != sampler.time}
    for spec in loop.inputs:
        _check_input(loop.name, spec, given)
    shapes = [(spec.dtype, spec.shape) for spec in loop.outputs]
    if shapes != [("float32", sampler.noise_shape)]:
        raise _error(
            f"stage {loop.name!r}",
            f"expected one output, float32 {list(sampler.noise_shape)}",
            got=[f"{o.name} {o.dtype} {list(o.shape)}" for o in loop.outputs],
        )


def _check_guidance(manifest: Manifest, made: dict[str, TensorSpec]) -> None:
    """Raise `QuantVLAError` unless the guidance graph finds its inputs and returns velocity and correction."""
    guidance, shape = manifest.guidance, manifest.sampler.noise_shape
    if guidance is None:
        return
    target = TensorSpec(name=guidance.target, dtype="float32", shape=shape)
    weights = TensorSpec(name=guidance.weights, dtype="float32", shape=(1, shape[1], 1))
    known = {**made, target.name: target, weights.name: weights}
    for spec in guidance.stage.inputs:
        _check_input(guidance.stage.name, spec, known)
    outputs = tuple(
        TensorSpec(name=name, dtype="float32", shape=shape)
        for name in (manifest.sampler.velocity, guidance.correction)
    )
    if guidance.stage.outputs != outputs:
        raise _error(
            "guidance outputs",
            f"expected {[spec.name for spec in outputs]} of the sampler's shapes",
            got=[spec.name for spec in guidance.stage.outputs],
        )


def _check_origin(step: AddState, made: dict[str, TensorSpec], dim: int) -> None:
    """Raise `QuantVLAError` unless the state that actions are relative to is there and long enough."""
    source = made.get(step.tensor)
    if source is None:
        raise _error(
            f"postprocessing tensor {step.tensor!r}",
            "nothing makes it",
            remedy=f"{nearest(step.tensor, made)}; {_REMEDY}",
        )
    if len(step.mask) > min(dim, source.shape[-1]):
        raise _error(
            f"postprocessing tensor {step.tensor!r}",
            f"expected a mask of at most {min(dim, source.shape[-1])}",
            got=len(step.mask),
        )


def _add(made: dict[str, TensorSpec], specs: tuple[TensorSpec, ...]) -> None:
    for spec in specs:
        if spec.name in made:
            raise _error(f"tensor {spec.name!r}", "is made twice")
        made[spec.name] = spec


def _outputs(step: PreprocessStep, manifest: Manifest) -> tuple[TensorSpec, ...]:
    """Return the tensors that a preprocessing step makes."""
    if isinstance(step, Images | ResampledImages):
        return (TensorSpec(name=step.output, dtype="float32", shape=_image_shape(step, manifest)),)
    if isinstance(step, Normalize):
        return (TensorSpec(name=step.output, dtype="float32", shape=(1, step.pad_to)),)
    shape = (1, step.max_length)
    return (
        TensorSpec(name=step.tokens, dtype="int64", shape=shape),
        TensorSpec(name=step.mask, dtype="bool", shape=shape),
    )


def _image_shape(step: Images | ResampledImages, manifest: Manifest) -> tuple[int, ...]:
    cameras = {camera.key: camera for camera in manifest.cameras}
    for key in step.keys:
        if key not in cameras:
            raise _error(
                "images", f"unknown camera {key!r}", remedy=nearest(key, cameras) + f"; {_REMEDY}"
            )
    if isinstance(step, ResampledImages):
        return (len(step.keys), 3, *step.size)
    first = cameras[step.keys[0]]
    height, width = step.resize or (first.height, first.width)
    return (len(step.keys), 3, height, width)


def _sampler_tensors(manifest: Manifest) -> tuple[TensorSpec, TensorSpec]:
    sampler = manifest.sampler
    return (
        TensorSpec(name=sampler.state, dtype="float32", shape=sampler.noise_shape),
        TensorSpec(name=sampler.time, dtype="float32", shape=(1,)),
    )


def _check_input(stage: str, spec: TensorSpec, made: dict[str, TensorSpec]) -> None:
    where = f"stage {stage!r} input {spec.name!r}"
    source = made.get(spec.name)
    if source is None:
        raise _error(where, "nothing makes it", remedy=f"{nearest(spec.name, made)}; {_REMEDY}")
    if source != spec:
        raise _error(
            where,
            f"expected {spec.dtype} {list(spec.shape)}",
            got=f"{source.dtype} {list(source.shape)}",
        )


def _rows(stage: str, spec: TensorSpec, rows: int) -> TensorSpec:
    """Return ``spec`` as it is for all rows of a stage that takes them one by one."""
    if rows == 1:
        return spec
    if spec.shape[:1] != (1,):
        raise _error(
            f"stage {stage!r} tensor {spec.name!r}",
            f"runs {rows} times a chunk, expected one row",
            got=list(spec.shape),
        )
    return msgspec.structs.replace(spec, shape=(rows, *spec.shape[1:]))


def _check_sampler(manifest: Manifest) -> None:
    sampler = manifest.sampler
    names = [stage.name for stage in manifest.stages]
    if not names or names[-1] != sampler.stage:
        raise _error("sampler", f"stage {sampler.stage!r} must be the last one", got=names)
    if len(set(names)) != len(names):
        raise _error("stages", "two have the same name", got=names)
    repeated, repeat = manifest.stages[-1], len(sampler.timesteps)
    if repeated.repeat != repeat:
        raise _error(f"stage {repeated.name!r}", f"expected repeat {repeat}", got=repeated.repeat)
    _check_times(sampler)
    velocity = TensorSpec(name=sampler.velocity, dtype="float32", shape=sampler.noise_shape)
    if velocity not in repeated.outputs:
        raise _error(
            f"stage {repeated.name!r}",
            f"expected an output {velocity.name!r} float32 {list(velocity.shape)}",
            got=[f"{o.name} {o.dtype} {list(o.shape)}" for o in repeated.outputs],
        )


def _check_times(sampler: EulerSampler) -> None:
    """Raise `QuantVLAError` unless every step leads from its time to the next, all in one direction."""
    times, sizes = sampler.timesteps, sampler.sizes
    if len(sizes) != len(times):
        raise _error("sampler", f"expected {len(times)} step sizes", got=len(sizes))
    leads = all(
        abs(t + size - after) <= SAME_TIME
        for t, size, after in zip(times[:-1], sizes[:-1], times[1:], strict=True)
    )
    if not leads or len({size > 0 for size in sizes}) != 1 or 0 in sizes:
        raise _error("sampler", "steps must lead from each time to the next", got=list(times))


def _check_action(manifest: Manifest) -> None:
    action, shape = manifest.action, manifest.sampler.noise_shape
    kept = next((s.horizon for s in manifest.postprocess if isinstance(s, Unnormalize)), None)
    if (
        len(shape) != 3
        or shape[0] != 1
        or min(shape[1], kept or shape[1]) != action.horizon
        or shape[2] < action.dim
    ):
        raise _error(
            "sampler",
            f"expected noise of shape [1, {action.horizon}, at least {action.dim}]",
            got=list(shape),
        )
    if action.execute > action.horizon:
        raise _error("action", f"cannot execute more than {action.horizon}", got=action.execute)
    for step in manifest.postprocess:
        if isinstance(step, Unnormalize) and step.dim != action.dim:
            raise _error("postprocessing", f"expected dim {action.dim}", got=step.dim)
    for name, spec in (("action", action), ("state", manifest.state)):
        if spec.names and len(spec.names) != spec.dim:
            raise _error(name, f"expected {spec.dim} names", got=len(spec.names))


def _check_files(manifest: Manifest) -> None:
    named = [stage.file for stage in manifest.stages]
    named += [step.file for step in manifest.preprocess if isinstance(step, Tokenize)]
    if manifest.loop is not None:
        named.append(manifest.loop.file)
    if manifest.guidance is not None:
        named.append(manifest.guidance.stage.file)
    for name in named:
        if name not in manifest.files:
            raise _error("files", f"{name!r} has no checksum")
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise _error("files", "must lie inside the engine directory", got=repr(name))


def _error(part: str, wrong: str, *, got: object = None, remedy: str = _REMEDY) -> QuantVLAError:
    return explain(f"manifest {part}", wrong, got=got, remedy=remedy)
