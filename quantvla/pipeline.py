"""Running a recipe's passes: in order, checked after every fold, continued where a killed run stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantvla.calib_sets import CalibrationSet
from quantvla.calibrate import frame_noise
from quantvla.families.base import LoadedPolicy
from quantvla.observer import CalibrationObserver
from quantvla.passes import EquivalencePass, Pass
from quantvla.passes.base import Equivalence, Fold, PassReport, Subject
from quantvla.progress import Progress
from quantvla.runtime.errors import QuantVLAError, explain
from quantvla.runtime.files import write_atomic
from quantvla.staged import make_preprocessor, prepare, run_context, sample
from quantvla.weight_store import DirectoryStore

CHECK_FRAMES = 4
LEAST_COSINE = 0.99999


class EquivalenceCheck:
    """The action chunks of the untouched policy on a few calibration frames, to compare with later.

    ``remember`` runs them: before the first fold, and not at all when nothing folds.
    """

    def __init__(self, loaded: LoadedPolicy, calibration: CalibrationSet, seed: int) -> None:
        self._loaded = loaded
        preprocess = make_preprocessor(loaded.interface)
        frames = np.linspace(0, len(calibration) - 1, min(CHECK_FRAMES, len(calibration))).astype(
            int
        )
        self._inputs = [prepare(preprocess, calibration[i].observation) for i in frames.tolist()]
        shape = loaded.interface.sampler.noise_shape
        self._noise = [frame_noise(seed, i, shape) for i in frames.tolist()]
        self._expected: NDArray[np.float64] | None = None

    def remember(self) -> None:
        """Keep the chunks of the policy as it is now."""
        self._expected = self._chunks()

    def _chunks(self) -> NDArray[np.float64]:
        action = self._loaded.interface.action
        chunks = [
            action.of(sample(self._loaded, run_context(self._loaded, tensors), noise)).reshape(-1)
            for tensors, noise in zip(self._inputs, self._noise, strict=True)
        ]
        return np.stack(chunks).astype(np.float64)

    def __call__(self) -> Equivalence:
        """Compare the policy as it is now."""
        assert self._expected is not None
        found, expected = self._chunks(), self._expected
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = (found * expected).sum(1) / np.maximum(norms, 1e-12)
        return Equivalence(
            frames=len(cosine),
            cosine_min=float(cosine.min()) if bool(np.isfinite(found).all()) else -1.0,
            max_abs=float(np.abs(found - expected).max()),
        )


@dataclass(frozen=True)
class Pipeline:
    """Everything a run of the passes needs."""

    subject: Subject
    observer: CalibrationObserver
    store: DirectoryStore
    check: EquivalenceCheck
    work: Path
    progress: Progress

    def run(self, passes: Sequence[Pass]) -> tuple[PassReport, ...]:
        """Run the passes; finished ones are read from the work directory instead."""
        if any(isinstance(step, EquivalencePass) for step in passes):
            self.check.remember()
        return tuple(self._one(step, self.work / f"pass-{i}") for i, step in enumerate(passes))

    def _one(self, step: Pass, directory: Path) -> PassReport:
        floats, report_file = self.subject.floats, directory / "report.json"
        floats.correcting = step.phase == "correction"
        finished = report_file.is_file()
        if not finished and step.phase != "rounding":
            shutil.rmtree(
                directory, ignore_errors=True
            )  # a half-done correction would be done twice
        self.store.open_folder(directory / "weights")
        floats.open_folder(directory / "floats")
        if finished:
            floats.reopen_()
            report = msgspec.json.decode(report_file.read_bytes(), type=PassReport)
        else:
            report = (
                self._fold(step)
                if isinstance(step, EquivalencePass)
                else step(self.subject, self.progress)
            )
            floats.commit()
            write_atomic(report_file, msgspec.json.encode(report))
            shutil.rmtree(self.subject.scratch, ignore_errors=True)
        floats.drop_hidden()
        if step.phase == "correction":
            self.observer.corrected()
        elif report.folds or floats.changed():
            # folds count even where later ones have replaced all files of this one
            self.observer.floats_changed()
        return report

    def _fold(self, step: EquivalencePass) -> PassReport:
        """Apply all folds of a pass and compare; if the output changed, find the fold that did it."""
        kind = str(type(step).__struct_config__.tag)
        folds = step.folds(self.subject)
        for index, fold in enumerate(folds):
            self.progress(f"folding {kind}", index, len(folds))
            fold.apply()
        self.progress(f"folding {kind}", len(folds), len(folds))
        found = self.check()
        if found.cosine_min < LEAST_COSINE:
            self.subject.floats.undo_()
            raise self._culprit(kind, step.folds(self.subject), found)
        return PassReport(
            kind=kind, folds=len(folds), equivalence=found, notes=step.notes(self.subject)
        )

    def _culprit(self, kind: str, folds: Sequence[Fold], all_: Equivalence) -> QuantVLAError:
        worst, site = all_, f"all {len(folds)} folds of {kind} together"
        for fold in folds:
            fold.apply()
            found = self.check()
            if found.cosine_min < LEAST_COSINE:
                worst, site = found, fold.site
                break
        return explain(
            site,
            f"folding {kind} here changes the float policy's actions, cosine below {LEAST_COSINE}",
            got=f"{worst.cosine_min:.6f}",
            remedy="the family's structure is wrong there, or the fold loses precision: leave the pass out and report it",
        )
