"""What each format at each site alone does to the action: measured in the torch reference, kept on disk.

One site's linear is replaced by its integer version; the whole denoise loop runs with the noise that
the float policy had. The error is of the normalized chunk, squared and relative,

    E |chunk - chunk_float|^2 / E |chunk_float|^2,

the mean over frames, so that its square root is the nrmse of `quantvla verify`. Errors of different
sites are nearly uncorrelated, which is why their squares are added up and optimized; how well that
holds is measured, see `Sensitivity.measure`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import nn

from quantvla import quantizer, staged
from quantvla.calib_sets import CalibrationSet, check_robot, limit
from quantvla.calibrate import collect_statistics, frame_noise
from quantvla.families.base import LoadedPolicy, Stage, replaced
from quantvla.mixed.offers import format_name
from quantvla.plan import PlanEntry
from quantvla.progress import Progress
from quantvla.quantized_linear import QuantizedLinear
from quantvla.quantizer import quantize_weight
from quantvla.runtime.files import sha256_file, sha256_tree, write_atomic
from quantvla.schemes import Scheme
from quantvla.statistics import SiteStatistics
from quantvla.versions import compiler_versions

Array = NDArray[np.float32]
Choice = Mapping[str, tuple[PlanEntry, Scheme]]
Journal = dict[str, dict[str, float]]
TOGETHER = "together"  # no site is called that


@dataclass(frozen=True)
class Subject:
    """The policy whose sites are tried out, and the observations: those that calibrate, those that judge."""

    loaded: LoadedPolicy
    checkpoint_sha256: str
    calibration: CalibrationSet
    probes: CalibrationSet
    seed: int

    def key(self) -> str:
        """Return what the errors depend on, besides site and format."""
        job = (
            self.checkpoint_sha256, self.calibration.checksum, len(self.calibration),
            self.probes.checksum, len(self.probes), self.seed, compiler_versions(),
            sha256_file(Path(quantizer.__file__)),
        )  # fmt: skip
        return hashlib.sha256(msgspec.json.encode(job)).hexdigest()[:16]


def open_subject(
    loaded: LoadedPolicy, recorded: CalibrationSet, *, frames: int, probe_frames: int, seed: int
) -> Subject:
    """Return a policy with so many frames of a set. Raises `QuantVLAError` for a set of another robot.

    Errors are judged on calibration frames too: the held-out ones stay unseen for `verify`.
    """
    check_robot(
        recorded.robot, loaded.interface.cameras, loaded.interface.state, where=recorded.card.name
    )
    calibration, probes = (
        limit(recorded, frames=count, seed=seed).part("calibration")
        for count in (frames, probe_frames)
    )
    return Subject(loaded, sha256_tree(loaded.directory), calibration, probes, seed)


class Sensitivity:
    """Measures action errors; what was measured before is read from ``directory``."""

    def __init__(self, subject: Subject, directory: Path, progress: Progress) -> None:
        """Run the float policy over the frames: once for its chunks; for statistics when they are needed."""
        self._subject, self._progress = subject, progress
        self._work = directory / f"action-error-{subject.key()}"
        self._path = self._work / "errors.json"
        self._errors = _read(self._path)
        loaded = subject.loaded
        self._stages = {stage.name: i for i, stage in enumerate(loaded.stages)}
        self._sites = [site.name for site in loaded.used_sites]
        self._statistics: dict[str, SiteStatistics] | None = None
        preprocess = staged.make_preprocessor(loaded.interface)
        shape = loaded.interface.sampler.noise_shape
        self._noises = [frame_noise(subject.seed, i, shape) for i in range(len(subject.probes))]
        self._contexts: list[staged.Tensors] = []
        self._chunks: list[Array] = []
        for index, frame in enumerate(subject.probes):
            progress("float policy", index, len(subject.probes))
            tensors = staged.prepare(preprocess, frame.observation)
            self._contexts.append(staged.run_context(loaded, tensors))
            self._chunks.append(self._chunk(self._contexts[-1], self._noises[index]))
        progress("float policy", len(subject.probes), len(subject.probes))

    def errors(
        self, offered: Sequence[tuple[PlanEntry, Sequence[Scheme]]]
    ) -> dict[tuple[str, str], float]:
        """Return the squared relative action error by (site, format name); float has none."""
        todo = [
            (entry, missing)
            for entry, schemes in offered
            if (missing := [s for s in schemes if not s.is_float and not self._known(entry, s)])
        ]
        total = sum(len(schemes) for _, schemes in todo)
        done = 0
        for entry, schemes in todo:
            for scheme in schemes:
                self._progress("action errors", done, total)
                found = self.measure({entry.site: (entry, scheme)})
                self._errors.setdefault(entry.site, {})[format_name(scheme)] = found
                done += 1
            self._save()
        if total:
            self._progress("action errors", total, total)
        return {
            (entry.site, format_name(scheme)): 0.0
            if scheme.is_float
            else self._errors[entry.site][format_name(scheme)]
            for entry, schemes in offered
            for scheme in schemes
        }

    def together(self, choice: Choice) -> float:
        """Return `measure` of many sites at once, remembered like the errors of single ones."""
        named = sorted((site, format_name(scheme)) for site, (_, scheme) in choice.items())
        key = hashlib.sha256(msgspec.json.encode(named)).hexdigest()[:16]
        known = self._errors.setdefault(TOGETHER, {})
        if key not in known:
            known[key] = self.measure(choice)
            self._save()
        return known[key]

    def measure(self, choice: Choice) -> float:
        """Return the squared relative action error with all sites of ``choice`` in their formats at once."""
        modules = {
            site: self._integer(entry, scheme)
            for site, (entry, scheme) in choice.items()
            if not scheme.is_float
        }
        if not modules:
            return 0.0
        first = min(self._stages[choice[site][0].stage] for site in modules)
        loaded = self._subject.loaded
        squares = []
        with replaced(loaded.policy, modules):
            for context, noise, chunk in zip(
                self._contexts, self._noises, self._chunks, strict=True
            ):
                known = self._rerun(context, loaded.stages[first:])
                squares.append(np.square(self._chunk(known, noise) - chunk).mean(dtype=np.float64))
        scale = np.mean([np.square(chunk).mean(dtype=np.float64) for chunk in self._chunks])
        return float(np.mean(squares) / max(scale, 1e-30))

    def _save(self) -> None:
        write_atomic(self._path, msgspec.json.format(msgspec.json.encode(self._errors), indent=1))

    def _known(self, entry: PlanEntry, scheme: Scheme) -> bool:
        return format_name(scheme) in self._errors.get(entry.site, {})

    def _rerun(self, context: staged.Tensors, stages: Sequence[Stage]) -> staged.Tensors:
        known = dict(context)
        for stage in stages:
            if stage.name != self._subject.loaded.interface.sampler.stage:
                known.update(staged.run_stage(stage, known))
        return known

    def _chunk(self, context: staged.Tensors, noise: Array) -> Array:
        loaded = self._subject.loaded
        return loaded.interface.action.of(staged.sample(loaded, context, noise))

    def _integer(self, entry: PlanEntry, scheme: Scheme) -> nn.Module:
        linear = self._subject.loaded.policy.get_submodule(entry.site)
        assert isinstance(linear, nn.Linear)
        weight = quantize_weight(
            linear.weight,
            scheme.weight_bits,
            scheme.block,
            self._moments()[entry.site].second_moment,
            scheme.inputs,
        )
        return QuantizedLinear(weight, linear.bias)

    def _moments(self) -> dict[str, SiteStatistics]:
        if self._statistics is None:
            subject = self._subject
            self._statistics = collect_statistics(
                subject.loaded, self._sites, subject.calibration, seed=subject.seed,
                journal=self._work, progress=self._progress,
            )  # fmt: skip
        return self._statistics


def _read(path: Path) -> Journal:
    return msgspec.json.decode(path.read_bytes(), type=Journal) if path.is_file() else {}
