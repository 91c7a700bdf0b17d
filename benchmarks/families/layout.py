"""What the paper's layout makes of the released pi0 and pi0.5: counted from their shapes, without weights.

Run as ``python -m benchmarks.families.layout``; writes ``benchmarks/families/layout.json``.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from quantvla.families.pi import KINDS, describe_sites, empty_policy
from quantvla.layout import make_plan
from quantvla.recipe import read_recipe
from quantvla.runtime.files import write_atomic
from quantvla.testing import pi

RESULT = Path(__file__).parent / "layout.json"
RECIPE = "quantvla-w4a8"


class Layout(msgspec.Struct, frozen=True):
    """Linears and bytes of one policy. Bytes of a linear before are FP16, after with scales.

    ``modulation_bytes``, ``table_bytes``: float32 weights that depend on the time alone, and the
    tables over the denoise steps that an engine has instead.
    """

    policy: str
    llm_linears: int
    head_linears: int
    quantized: int
    dropped: int
    half_bytes: int
    integer_bytes: int
    saving: float
    effective_bits: float
    dropped_half_bytes: int
    modulation_bytes: int
    table_bytes: int


def count(kind: str) -> Layout:
    """Count the released model of a kind."""
    size = pi.FULL_SIZE
    policy = empty_policy(KINDS[kind], pi.make_config(kind, size), size.widths)
    sites = describe_sites(policy, size.widths)
    plan = make_plan(sites, read_recipe(RECIPE))
    layout = [e for e in (*plan.quantized, *plan.dropped) if e.kind != "lm_head"]
    half = sum(entry.bytes_before for entry in plan.quantized)
    integer = sum(entry.bytes_after for entry in plan.quantized)
    modulation = [s for s in sites if s.role == "modulation"]
    of_time = [s for s in sites if s.kind.startswith("time_mlp")] if modulation else []
    return Layout(
        policy=kind,
        llm_linears=sum(entry.part == "llm" for entry in layout),
        head_linears=sum(entry.part == "expert" for entry in layout),
        quantized=len(plan.quantized),
        dropped=len(plan.dropped),
        half_bytes=half,
        integer_bytes=integer,
        saving=round(1 - integer / half, 4),
        effective_bits=round(16 * integer / half, 3),
        dropped_half_bytes=sum(entry.bytes_before for entry in plan.dropped),
        modulation_bytes=sum(
            4 * (s.in_features + s.bias) * s.out_features for s in (*modulation, *of_time)
        ),
        table_bytes=sum(4 * size.denoise_steps * s.out_features for s in modulation),
    )


def main() -> None:
    """Count, print and write."""
    found = [count(kind) for kind in KINDS]
    table = Table("", *(layout.policy for layout in found))
    for field in Layout.__struct_fields__[1:]:
        table.add_row(field, *(f"{getattr(layout, field):,}" for layout in found))
    Console().print(table)
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


if __name__ == "__main__":
    main()
