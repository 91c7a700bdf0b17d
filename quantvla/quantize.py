"""`quantvla quantize`: checkpoint + calibration set + recipe -> quantized checkpoint, resumable."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from quantvla.calib_sets import CalibrationSet, check_robot
from quantvla.checkpoint import SCHEMA_VERSION, CalibrationUse, CheckpointCard, write_checkpoint
from quantvla.families import load_policy
from quantvla.families.base import LoadedPolicy
from quantvla.float_weights import FloatWeights
from quantvla.layout import make_plan
from quantvla.observer import CalibrationObserver
from quantvla.passes.base import PassReport, Subject
from quantvla.pipeline import EquivalenceCheck, Pipeline
from quantvla.plan import Plan
from quantvla.progress import Progress
from quantvla.recipe import Recipe
from quantvla.runtime.errors import explain
from quantvla.runtime.files import atomic_directory, sha256_tree, write_atomic
from quantvla.versions import compiler_versions
from quantvla.weight_store import DirectoryStore


@dataclass(frozen=True)
class QuantizeResult:
    """Where the checkpoint is and what is in it."""

    directory: Path
    plan: Plan
    reports: tuple[PassReport, ...]


def quantize(
    checkpoint: Path,
    calibration: CalibrationSet,
    recipe: Recipe,
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> QuantizeResult:
    """Quantize a LeRobot checkpoint and write it to ``output``, whole or not at all.

    Intermediate results are kept in ``<output>.work`` until then; a run with the same checkpoint,
    frames, recipe and seed continues from there, another one starts over. Same input, same bytes.
    """
    if output.exists() and not overwrite:
        raise explain(output, "already exists", remedy="choose another output or pass --overwrite")
    loaded = load_policy(checkpoint)
    plan = make_plan(loaded.sites, recipe)
    check_robot(
        calibration.robot,
        loaded.interface.cameras,
        loaded.interface.state,
        where=calibration.card.name,
    )
    source = sha256_tree(checkpoint)
    work = _open_work(output, source, calibration.checksum, recipe, seed)
    store = DirectoryStore(work)
    pipeline = make_pipeline(
        loaded, plan, calibration, store, seed=seed, work=work, progress=progress
    )
    reports = pipeline.run(recipe.passes)
    _require_complete(plan, store, recipe)
    card = CheckpointCard(
        schema_version=SCHEMA_VERSION,
        family=loaded.family,
        recipe=recipe,
        plan=plan,
        calibration=CalibrationUse(
            name=calibration.card.name, sha256=calibration.checksum, robot=calibration.robot,
            frames=len(calibration), seed=seed,
            samples={site.site: site.rows for report in reports for site in report.sites},
        ),
        reports=reports,
        source_sha256=source,
        files={},
        versions=compiler_versions(),
    )  # fmt: skip
    _write(output, loaded, store, card, overwrite=overwrite)
    shutil.rmtree(work)
    return QuantizeResult(output, plan, reports)


def make_pipeline(
    loaded: LoadedPolicy, plan: Plan, calibration: CalibrationSet, store: DirectoryStore,
    *, seed: int, work: Path, progress: Progress,
) -> Pipeline:  # fmt: skip
    """Return the passes' pipeline for a policy, with its intermediate results in ``work``."""
    check = EquivalenceCheck(loaded, calibration, seed)
    floats = FloatWeights(loaded.policy)
    observer = CalibrationObserver(
        loaded, plan, calibration, floats, store, seed=seed, work=work, progress=progress
    )
    siblings = {site.name: tuple(sorted((site.name, *site.siblings))) for site in loaded.sites}
    subject = Subject(
        loaded.policy, plan, loaded.structure, siblings, floats, store, observer, work / "scratch"
    )
    return Pipeline(subject, observer, store, check, work, progress)


def _write(
    output: Path,
    loaded: LoadedPolicy,
    store: DirectoryStore,
    card: CheckpointCard,
    *,
    overwrite: bool,
) -> None:
    with atomic_directory(output, overwrite=overwrite) as directory:
        write_checkpoint(directory, loaded, store.view(card.plan), card)


def _require_complete(plan: Plan, store: DirectoryStore, recipe: Recipe) -> None:
    for entry in plan.quantized:
        if entry.site not in store:
            raise explain(
                entry.site,
                f"planned as {entry.scheme.name}, but no pass of recipe {recipe.name!r} quantizes it",
                remedy="add a pass that does (round_weights)",
            )
        weight, scheme = store.get(entry.site), entry.scheme
        found = (weight.bits, weight.block, weight.inputs)
        if found != (scheme.weight_bits, scheme.block, scheme.inputs):
            raise explain(
                entry.site,
                f"a pass of recipe {recipe.name!r} left another format than the planned {scheme.name} "
                f"({scheme.weight_bits} bits, block {scheme.block}, inputs {scheme.inputs})",
                got=f"{weight.bits} bits, block {weight.block}, inputs {weight.inputs}",
                remedy="this is a defect of that pass: report it",
            )


def _open_work(output: Path, source: str, calibration: str, recipe: Recipe, seed: int) -> Path:
    """Return the work directory, emptied if it belongs to another job."""
    job = msgspec.json.encode([source, calibration, recipe, seed, compiler_versions()])
    key = hashlib.sha256(job).hexdigest()
    work = output.with_name(output.name + ".work")
    key_file = work / "job"
    if work.exists() and not (key_file.is_file() and key_file.read_text() == key):
        shutil.rmtree(work)
    write_atomic(key_file, key.encode())
    return work
