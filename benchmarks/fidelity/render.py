"""A page of the documentation and its figures from the committed results of one policy.

    python benchmarks/fidelity/render.py                                                        # SmolVLA: docs/fidelity.md
    python benchmarks/fidelity/render.py --source benchmarks/fidelity/groot -o docs/fidelity_groot.md

Reads results/*.json, intro.md and, where they are there, full_size/*.json, hard_bed.json and findings.md (what a person
says about the numbers) of the source, fills page.md.jinja and writes the page and, beside it, a folder of figures.
Nothing is measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from arm_result import REFERENCE, ArmRecord, read_record
from fidelity_figures import beds_png, size_png, sweep_png
from jinja2 import Environment, StrictUndefined
from sweep import Sweep
from tables import (
    COST_COLUMNS,
    DISTRIBUTION_COLUMNS,
    error_columns,
    format_success,
    loop_table,
    table,
)

from quantvla.fidelity.action_error import SWITCHED
from quantvla.fidelity.compare import ArmComparison, Comparison, Reference
from quantvla.recipe import bundled_recipes
from quantvla.report.comparison import comparison_png
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEMPLATE = HERE / "page.md.jinja"
ORDER = (
    REFERENCE, "rtn-w4a8", "layout-w4a8", "transform-w4a8", "atm-w4a8", "ohb-w4a8", "quantvla-w4a8",
    "published", "w4a8", "gptq-w4a8", "best-w4a8", "all-w4a8", "smoothquant-w8a8", "awq-w4a16", "int8", "vision8", "w4a8-vision8", "w4a8-fast", "gptq-w4a8-fast",
)  # fmt: skip
"""The float policy, the ablation of the published method, then the rivals; arms that are not named come last."""


def read_results(directory: Path) -> list[ArmRecord]:
    """Return every arm's record in the order of the tables."""
    names = sorted((path.stem for path in directory.glob("*.json")), key=_position)
    records = [read_record(directory, name) for name in names]
    found = [record for record in records if record is not None]
    if not found or found[0].arm != REFERENCE:
        raise explain(
            directory, "holds no result of the float arm", remedy="run benchmarks/fidelity/run.py"
        )
    return found


def _position(name: str) -> tuple[int, str]:
    return (ORDER.index(name), "") if name in ORDER else (len(ORDER), name)


def comparison(records: Sequence[ArmRecord]) -> Comparison | None:
    """Return the arms' results as `quantvla compare` gives them, equal ones as one arm; None without any."""
    compared = [(r.arm, r.compared) for r in records if r.compared is not None]
    same: list[tuple[ArmComparison, list[str]]] = []
    for name, found in compared:
        if found.result is None:
            continue
        twin = next((names for result, names in same if result.error == found.result.error), None)
        if twin is None:
            same.append((found.result, [name]))
        else:
            twin.append(name)
    if not same:
        return None
    arms = {"\n= ".join(names): result for result, names in same}
    first = compared[0][1]
    return Comparison(
        reference=Reference(
            name=REFERENCE,
            kind="engine",
            sha256=first.reference_sha256,
            smoothness=first.reference_smoothness,
        ),
        arms=arms,
        frames=first.frames,
        noises=first.noises,
        set="calib_sets/metaworld",
        set_sha256=first.set_sha256,
        seed=first.seed,
        execute=0,
        dimensions=first.dimensions,
        versions={},
    )


@dataclass(frozen=True)
class Words:
    """What a page says beside its tables: text, the folder of figures, where the results are."""

    intro: str
    findings: str
    folder: str
    results: str


def page(
    records: Sequence[ArmRecord], sweep: Sweep | None, full: Sequence[ArmRecord], words: Words
) -> str:
    """Return the whole page: page.md.jinja with the tables in it."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    result = comparison(records)
    return environment.from_string(TEMPLATE.read_text()).render(
        intro=words.intro.strip(),
        findings=words.findings.strip(),
        folder=words.folder,
        results=words.results,
        comparison=result,
        unmeasured=[name for name in bundled_recipes() if name not in {r.arm for r in records}],
        errors="" if result is None else table(records, error_columns(result.dimensions)),
        distribution=table(records, DISTRIBUTION_COLUMNS),
        beds={bed: loop_table(records, bed) for bed in ("reference", "hard")},
        switched=f"{100 * SWITCHED:.0f}",
        sweep=sweep,
        sweep_change=None if sweep is None else _change(sweep),
        sweep_success=None if sweep is None else format_success(sweep.chosen),
        cost=table(records, COST_COLUMNS),
        full_cost=table(full, COST_COLUMNS) if full else "",
        full_machine=full[0].machine if full else "",
        first=records[0],
    )


def _change(sweep: Sweep) -> str:
    """Return the option of `quantvla eval` that makes the bed."""
    changes = sweep.bed.perturbation.as_dict()
    if not changes:
        return f"--steps {sweep.bed.denoise_steps}"
    return " ".join(f"--perturb {name}={strength}" for name, strength in changes.items())


def main() -> None:
    """Render the page and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=HERE)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "fidelity.md")
    options = parser.parse_args()
    source = options.source.resolve()
    records = read_results(source / "results")
    full_size = source / "full_size"
    names = sorted((path.stem for path in full_size.glob("*.json")), key=_position)
    full = [r for r in (read_record(full_size, name) for name in names) if r is not None]
    hard_bed, findings = source / "hard_bed.json", source / "findings.md"
    sweep = None
    if hard_bed.is_file():
        sweep = msgspec.json.decode(hard_bed.read_bytes(), type=Sweep)
    folder = options.output.with_suffix("")
    words = Words(
        intro=(source / "intro.md").read_text(),
        findings=findings.read_text() if findings.is_file() else "",
        folder=folder.name,
        results=(source / "results").relative_to(ROOT).as_posix(),
    )
    result = comparison(records)
    if result is not None:
        write_atomic(folder / "comparison.png", comparison_png(result))
        write_atomic(folder / "size.png", size_png(records))
    if any(record.beds for record in records):
        write_atomic(folder / "closed_loop.png", beds_png(records))
    if sweep is not None:
        write_atomic(folder / "sweep.png", sweep_png(sweep))
    write_atomic(options.output, page(records, sweep, full, words).encode())


if __name__ == "__main__":
    main()
