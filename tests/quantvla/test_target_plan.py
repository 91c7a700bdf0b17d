"""What runs in which format on a board, from the plan and the roofline alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from quantvla.cli.export import export
from quantvla.cli.plan import plan as plan_command
from quantvla.plan import Plan, PlanEntry
from quantvla.runtime.errors import QuantVLAError
from quantvla.runtime.targets import (
    BOARDS,
    FORMATS,
    TARGETS,
    Board,
    board_named,
    boards_of,
    formats_of,
    target_named,
)
from quantvla.schemes import DROPPED, FLOAT, Scheme
from quantvla.target_plan import TABLE, plan_target, relax

ORIN, THOR, ADA = BOARDS["agx-orin-64"], BOARDS["agx-thor"], BOARDS["rtx-4090"]
W4A8, W8A8 = Scheme("w4a8", 4, 8, 32), Scheme("w8a8", 8, 8, 32)


def entry(site: str, scheme: Scheme, *, out: int = 2048, width: int = 1024) -> PlanEntry:
    return PlanEntry(
        site=site, stage="denoise", part="expert", kind="q_proj", layer=0, out_features=out,
        in_features=width, scheme=scheme, bytes_before=2 * out * width, bytes_after=0, reason="because",
    )  # fmt: skip


def planned(scheme: Scheme, tokens: int, board: Board = ORIN, **options: str) -> tuple[str, str]:
    plan = Plan("r", (entry("site", scheme),))
    made = plan_target(plan, {"site": tokens}, TARGETS[board.target], board, **options)
    return made.entries[0].format, made.entries[0].reason


def test_few_tokens_run_weight_only_and_many_in_int8() -> None:
    assert "memory-bound with 8 tokens" in planned(W4A8, 8)[1]
    assert planned(W4A8, 1024)[0] == "int8"
    assert "compute-bound with 1024 tokens, so int8 on the 4-bit grid" in planned(W4A8, 1024)[1]


def test_the_choice_flips_once_with_the_number_of_tokens() -> None:
    found = [planned(W4A8, tokens)[0] for tokens in (1, 16, 64, 256, 1024, 4096)]
    assert found == sorted(found) and set(found) == {"int4", "int8"}


def test_bytes_count_codes_and_scales() -> None:
    plan = Plan("r", (entry("a", W4A8), entry("b", W8A8), entry("c", FLOAT)))
    made = plan_target(plan, {"a": 1, "b": 1, "c": 1}, TARGETS["jetson-orin"], ORIN)
    elements = 2048 * 1024
    assert [e.weight_bytes for e in made.entries] == [
        elements // 2 + 2 * elements // 32,
        elements + 2 * 2048,
        2 * elements,
    ]


def test_dropped_sites_are_left_out_and_float_ones_keep_their_reason() -> None:
    plan = Plan("r", (entry("a", DROPPED), entry("b", FLOAT)))
    made = plan_target(plan, {"b": 4}, TARGETS["jetson-orin"], ORIN, activations="bf16")
    assert [(e.site, e.format, e.reason) for e in made.entries] == [("b", "bf16", "because")]
    assert made.refused == ()


def test_a_scheme_without_kernel_runs_in_half_precision_and_is_listed() -> None:
    plan = Plan("r", (entry("a", Scheme("w3a8", 3, 8, 32)),))
    made = plan_target(plan, {"a": 4}, TARGETS["jetson-orin"], ORIN)
    assert made.refused == made.entries
    assert "no kernel for w3a8" in made.entries[0].reason


def test_a_format_can_be_asked_for() -> None:
    assert planned(W4A8, 1, ADA, precision="fp8")[0] == "fp8"
    assert planned(W4A8, 4096, ADA, precision="int4")[0] == "int4"
    assert planned(W4A8, 1, ADA, precision="float")[0] == "fp16"
    format_, reason = planned(W8A8, 1, ADA, precision="int4")
    assert format_ == "fp16" and "8 bits" in reason


def test_a_site_that_one_scale_does_not_fit_leaves_int8_alone() -> None:
    plan = Plan("r", (entry("four", W4A8), entry("eight", W8A8), entry("fits", W8A8)))
    tokens = {"four": 4096, "eight": 4096, "fits": 4096}
    for precision, four in (("auto", "int4"), ("int8", "fp16")):
        made = plan_target(plan, tokens, TARGETS["jetson-orin"], ORIN, precision=precision)
        assert {e.format for e in made.entries} == {"int8"}
        found = relax(made, plan, {"four": 0.07, "eight": 0.03})
        assert [e.format for e in found.entries] == [four, "fp16", "int8"]
        assert "would cost 7.0% of its output" in found.entries[0].reason
        assert found.entries[1].weight_bytes == made.entries[1].half_bytes
        assert found.entries[2] == made.entries[2]


def test_a_site_of_the_time_alone_is_a_table_in_every_format() -> None:
    plan = Plan("r", (entry("time", W4A8), entry("other", W4A8)))
    for precision in ("auto", "float", "int8"):
        made = plan_target(
            plan, {"time": 1, "other": 64}, TARGETS["jetson-orin"], ORIN, precision=precision,
            tables={"time": 10},
        )  # fmt: skip
        table, other = made.entries
        assert table.format == TABLE and table.weight_bytes == 10 * 2048 * 2 < other.weight_bytes
        assert "at the 10 times of the schedule" in table.reason
        assert other.format != TABLE and table not in made.refused


def test_a_weight_of_a_single_block_is_not_planned_in_int4() -> None:
    plan = Plan("r", (entry("a", W4A8, width=32), entry("b", W4A8, width=64)))
    made = plan_target(plan, {"a": 1, "b": 1}, TARGETS["jetson-orin"], ORIN, precision="int4")
    assert [e.format for e in made.entries] == ["fp16", "int4"]
    assert "two blocks or more" in made.entries[0].reason


def test_4_bit_floats_are_planned_where_they_exist_and_fit() -> None:
    board = BOARDS["rtx-5090"]
    assert planned(W8A8, 8, board, precision="nvfp4")[0] == "nvfp4"
    assert "rounded a second time" in planned(W4A8, 8, THOR, precision="nvfp4")[1]
    plan = Plan("r", tuple(entry(f"w{width}", W8A8, width=width) for width in (16, 72, 1024)))
    tokens = {"w16": 1, "w72": 1, "w1024": 1}
    made = plan_target(plan, tokens, TARGETS["rtx"], board, precision="nvfp4")
    assert [e.format for e in made.entries] == ["fp16", "fp16", "nvfp4"]
    assert "two or more whole blocks of 16 inputs, the site has 72" in made.entries[1].reason
    assert made.entries[2].weight_bytes == 2048 * 1024 // 2 + 2048 * 1024 // 16
    with pytest.raises(QuantVLAError, match=r"nvfp4 on GeForce RTX 4090 .*choose one of fp16"):
        planned(W8A8, 8, ADA, precision="nvfp4")


def test_what_a_board_cannot_run_is_refused() -> None:
    with pytest.raises(QuantVLAError, match=r"fp8 on Jetson AGX Orin.*choose one of fp16, bf16"):
        planned(W4A8, 1, precision="fp8")
    with pytest.raises(QuantVLAError, match=r"precision 'int9': unknown; did you mean 'int8'"):
        planned(W4A8, 1, precision="int9")
    with pytest.raises(QuantVLAError, match=r"board agx-thor: belongs to target jetson-thor"):
        plan_target(Plan("r", ()), {}, TARGETS["jetson-orin"], THOR)
    with pytest.raises(QuantVLAError, match=r"target 'jetson-orim'.*did you mean 'jetson-orin'"):
        target_named("jetson-orim")
    with pytest.raises(QuantVLAError, match=r"board 'rtx-4091': unknown; did you mean 'rtx-4090'"):
        board_named("rtx-4091")
    with pytest.raises(QuantVLAError, match=r"SM90: not a GPU these targets know"):
        formats_of(90)
    with pytest.raises(QuantVLAError, match=r"board agx-orin-64: no published rate for fp8"):
        ORIN.peak("fp8")


def test_export_offers_the_nearest_of_all_targets(tmp_path: Path) -> None:
    options = [str(tmp_path), "--target", "jetson-orim", "-o", str(tmp_path / "engine")]
    error = CliRunner().invoke(export, options).exception
    assert isinstance(error, QuantVLAError)
    assert "target 'jetson-orim': unknown; did you mean 'jetson-orin'" in str(error)


def test_the_tables_agree_with_each_other() -> None:
    for target in TARGETS.values():
        assert boards_of(target.name) and set(target.compute_capabilities) <= FORMATS.keys()
    for board in BOARDS.values():
        assert board.compute_capability in TARGETS[board.target].compute_capabilities
        assert board.verified
        assert board.source and set(board.peak_tera_per_s) - {"fp32"} <= set(
            formats_of(board.compute_capability)
        )
        for number_format in formats_of(board.compute_capability):
            assert board.peak(number_format) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "CHECKPOINT", "--embedding", "int4", "-o", "OUT"], "--embedding: is for GPU targets, got --target cpu"),
        (["export", "CHECKPOINT", "--frames", "4", "-o", "OUT"], "--frames: is for GPU targets, got --target cpu"),
        (["plan", "--policy.path", "CHECKPOINT", "--board", "rtx-4090"], "--board: is for GPU targets, got no --target"),
        (["export", "CHECKPOINT", "--target", "rtx", "--threads", "1", "-o", "OUT"], "target rtx: runs TensorRT's kernels; leave --threads out"),
        (["export", "CHECKPOINT", "--target", "rtx", "--guidance", "-o", "OUT"], "target rtx: has no guidance graph; .*leave --guidance out"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_to_a_target_are_refused(
    arguments: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    places = {"CHECKPOINT": str(tiny_checkpoint), "OUT": str(tmp_path / "engine")}
    command = {"export": export, "plan": plan_command}[arguments[0]]
    given = [places.get(word, word) for word in arguments[1:]]
    with pytest.raises(QuantVLAError, match=message):
        CliRunner().invoke(command, given, catch_exceptions=False)
    assert not (tmp_path / "engine").exists()
