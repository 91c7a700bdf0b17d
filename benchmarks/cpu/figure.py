"""The plot of a result: one bar an arm, its stages stacked; and the same as a table for docs/performance.md.

python benchmarks/cpu/figure.py benchmarks/cpu/result.json docs/images/cpu_performance.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = 10
PARTS = ("vision", "prefix", "denoise", "rest")
LABELS = {
    "vision": "vision", "prefix": "prefix", "denoise": f"{STEPS} denoise steps", "rest": "preprocessing, Python",
}  # fmt: skip
COLORS = ("#3b6ea5", "#7aa6c2", "#d08c3f", "#999999")


def parts(row: dict[str, Any]) -> list[float]:
    """Return the seconds of each part of a chunk."""
    stages = [row["vision_ms"], row["prefix_ms"], STEPS * row["denoise_ms"]]
    return [value / 1e3 for value in (*stages, max(0.0, row["chunk_ms"] - sum(stages)))]


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    names = sorted(result["arms"], key=lambda name: result["arms"][name]["chunk_ms"])
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.4), layout="constrained")
    left = np.zeros(len(names))
    for index, part in enumerate(PARTS):
        widths = np.array([parts(result["arms"][name])[index] for name in names])
        axes.barh(names, widths, left=left, color=COLORS[index], label=LABELS[part])
        left += widths
    for position, name in enumerate(names):  # stages are medians of their own, the chunk too
        seconds = result["arms"][name]["chunk_ms"] / 1e3
        axes.text(left[position] + 0.03, position, f"{seconds:.2f}", va="center", fontsize=9)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("quantvla") else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.08)
    axes.set_xlabel("seconds for one chunk of full-size SmolVLA")
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def table(result: dict[str, Any]) -> str:
    """Return the rows as Markdown, slowest first."""
    arms = result["arms"]
    slowest = arms["lerobot eager float32"]["chunk_ms"]
    lines = [
        "| | vision ms | prefix ms | step ms | chunk ms | p99 | times faster than lerobot | resident MiB | load ms | action error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(arms.items(), key=lambda item: -item[1]["chunk_ms"]):
        bold = "**" if name.startswith("quantvla") else ""
        cells = [
            f"{bold}{name}{bold}",
            *(f"{row[f'{stage}_ms']:.0f}" for stage in ("vision", "prefix")),
            f"{row['denoise_ms']:.1f}", f"{row['chunk_ms']:.0f}", f"{row['chunk_p99_ms']:.0f}",
            f"{slowest / row['chunk_ms']:.2f}", f"{row['resident_mb']:.0f}", f"{row['load_ms']:.0f}",
            f"{row['error_nrmse']:.1e}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| stage | GOP | achieved GOP/s | share of the int8 ceiling | share of the float ceiling |",
        "|---|---|---|---|---|",
    ]
    ceiling = result["roofline"]
    for stage, entry in ceiling["stages"].items():
        lines.append(
            f"| {stage} | {entry['gop']:.1f} | {entry['gops']:.0f} | {entry['gops'] / ceiling['int8_gops']:.0%} "
            f"| {entry['gops'] / ceiling['float_gops']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Draw the first argument's result to the second; print the table."""
    result = json.loads(Path(sys.argv[1]).read_text())
    draw(result, Path(sys.argv[2]))
    print(table(result))


if __name__ == "__main__":
    main()
