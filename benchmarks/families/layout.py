"""What the paper's layout makes of the released pi0, pi0.5 and GR00T N1.7: counted from their shapes, without weights.

Run as ``python -m benchmarks.families.layout``; writes ``benchmarks/families/layout.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from lerobot.policies.groot.groot_n1_7 import GR00TN17Config
from rich.console import Console
from rich.table import Table

from quantvla.families import groot as groot_family
from quantvla.families.base import Site
from quantvla.families.pi import KINDS, describe_sites, empty_policy
from quantvla.layout import make_plan
from quantvla.recipe import read_recipe
from quantvla.runtime.files import write_atomic
from quantvla.testing import groot, pi

RESULT = Path(__file__).parent / "layout.json"
RECIPE = "quantvla-w4a8"


class Layout(msgspec.Struct, frozen=True):
    """Linears and bytes of one policy. Bytes of a linear before are FP16, after with scales.

    ``modulation_bytes``, ``table_bytes``: float32 weights that depend on the time alone, and the
    tables over the denoise steps that an engine has instead. ``embodiment_bytes``: float32 weights of
    embodiments other than the one that is compiled.
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
    embodiment_bytes: int = 0


def count_pi(kind: str) -> Layout:
    """Count the released pi0 or pi0.5."""
    size = pi.FULL_SIZE
    policy = empty_policy(KINDS[kind], pi.make_config(kind, size), size.widths)
    return count(kind, describe_sites(policy, size.widths), size.denoise_steps)


def count_groot() -> Layout:
    """Count the released GR00T N1.7, whose configuration is lerobot's default."""
    base: Any = GR00TN17Config()
    policy = groot_family.empty_policy(groot.make_config(Path(), groot.FULL_SIZE), base)
    per_embodiment = sum(
        4 * value.numel()
        for name, value in policy.named_parameters()
        if name.endswith((".W", ".b"))
    )
    others = per_embodiment * (base.max_num_embodiments - 1) // base.max_num_embodiments
    sites = groot_family.describe_sites(policy)
    found = count("groot", sites, base.num_inference_timesteps)
    return msgspec.structs.replace(found, embodiment_bytes=others)


_OF_TIME = ("time_mlp_in", "time_mlp_out", "linear_1", "linear_2")
"""Linears of the time that modulate no norm themselves."""


def count(policy: str, sites: Sequence[Site], steps: int) -> Layout:
    """Count a policy with these linears that is denoised in ``steps`` steps."""
    plan = make_plan(sites, read_recipe(RECIPE))
    layout = [e for e in (*plan.quantized, *plan.dropped) if e.kind != "lm_head"]
    half = sum(entry.bytes_before for entry in plan.quantized)
    integer = sum(entry.bytes_after for entry in plan.quantized)
    modulation = [s for s in sites if s.role == "modulation" and s.kind not in _OF_TIME]
    of_time = [s for s in sites if s.kind in _OF_TIME] if modulation else []
    return Layout(
        policy=policy,
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
        table_bytes=sum(4 * steps * s.out_features for s in modulation),
    )


def main() -> None:
    """Count, print and write."""
    found = [*(count_pi(kind) for kind in KINDS), count_groot()]
    table = Table("", *(layout.policy for layout in found))
    for field in Layout.__struct_fields__[1:]:
        table.add_row(field, *(f"{getattr(layout, field):,}" for layout in found))
    Console().print(table)
    write_atomic(RESULT, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


if __name__ == "__main__":
    main()
