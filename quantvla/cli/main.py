"""The ``quantvla`` command. Commands are imported when they are called, so the robot needs no compiler."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from quantvla import __version__
from quantvla.runtime.errors import QuantVLAError, nearest

BAD_INPUT = 2
COMMANDS = {
    "plan": "plan:plan",
    "profile": "profile:profile",
    "quantize": "quantize:quantize",
    "schedule": "schedule:schedule",
    "export": "export:export",
    "build": "build:build",
    "targets": "targets:targets",
    "estimate": "estimate:estimate",
    "package": "package:package",
    "doctor": "doctor:doctor",
    "inspect": "inspect:inspect",
    "verify": "verify:verify",
    "compare": "compare:command",
    "bench": "bench:bench",
    "serve": "serve:serve",
    "eval": "eval:evaluate",
    "run": "run:run",
    "replay": "replay:replay",
    "calib": "calib:calib",
    "demo": "demo:demo",
}
_EXTRAS = {
    "compile": {
        "torch",
        "lerobot",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "scipy",
        "matplotlib",
        "jinja2",
        "zstandard",
    },
    "serve": {"websockets", "prometheus_client"},
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise QuantVLAError(f"command {cmd_name!r}: unknown; {nearest(cmd_name, COMMANDS)}")
        module, attribute = COMMANDS[cmd_name].split(":")
        try:
            command: Any = getattr(importlib.import_module(f"quantvla.cli.{module}"), attribute)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            extra = next((name for name, modules in _EXTRAS.items() if missing in modules), None)
            if extra is None:
                raise
            raise QuantVLAError(
                f"quantvla {cmd_name}: {missing} is not installed here; "
                f"install it with: pip install 'quantvla[{extra}]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, _SUMMARIES[name]) for name in COMMANDS]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


_SUMMARIES = {
    "plan": "Print which linear gets which scheme; with a budget, choose.",
    "profile": "Measure the kernels of a policy on this machine.",
    "quantize": "Calibrate and quantize a LeRobot checkpoint.",
    "schedule": "Fit the times of fewer denoise steps.",
    "export": "Turn a checkpoint into an engine directory.",
    "build": "Compile an engine with TensorRT for a GPU.",
    "targets": "Print the targets and boards engines are made for.",
    "estimate": "Estimate latency on a board (roofline, not measured).",
    "package": "Pack an engine with all a robot needs to run it.",
    "doctor": "Check that this machine can build and run engines.",
    "inspect": "Print what an engine is made of.",
    "verify": "Compare an engine with the float policy.",
    "compare": "Compare arms by errors, distributions and smoothness.",
    "bench": "Measure latency and memory of an engine.",
    "serve": "Serve an engine over the network.",
    "eval": "Run policies and engines in closed loop.",
    "run": "Drive a robot with an engine.",
    "replay": "Run a trace again and compare bit by bit.",
    "calib": "Look at, build or record calibration sets.",
    "demo": "All of it on the bundled policy, with a report.",
}


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantvla")
def cli() -> None:
    """An edge quantization compiler for Vision-Language-Action models."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        code = cli.main(args=arguments, standalone_mode=False)
    except QuantVLAError as error:
        click.echo(f"error: {error}", err=True)
        code = BAD_INPUT
    except click.ClickException as error:
        error.show()
        code = BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
