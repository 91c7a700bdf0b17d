"""The builder's own account of an engine: which layer computes what, in which types.

TensorRT falls back silently: a product planned in int8 can run in half precision. The account comes
from the engine inspector where a GPU is there to load the engine, and from the builder's verbose
listing (the same text) where not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from quantvla.runtime.site_formats import SiteFormat

_TYPES = {
    "Half": "fp16", "FP16": "fp16", "BFloat16": "bf16", "BF16": "bf16", "Float": "fp32", "FP32": "fp32",
    "Int8": "int8", "INT8": "int8", "Int4": "int4", "INT4": "int4", "FP8": "fp8", "Fp8": "fp8",
    "FP4": "nvfp4", "Fp4": "nvfp4", "FP4E2M1": "nvfp4",
}  # fmt: skip
_NARROW = ("nvfp4", "int8", "fp8", "int4")  # nvfp4 first: its scales are fp8
_LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$")
_SECTION = re.compile(r"(Inputs|Constants|Outputs): \[([^]]*?\{.*?\})\]", re.DOTALL)
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
POINTWISE = "kgen"  # generated kernels; matrix products are other kinds wherever there is a choice


class Layer(msgspec.Struct, frozen=True):
    """One layer of the engine: number formats of inputs, constants and outputs, and the graph's nodes in it."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]


class SiteResult(msgspec.Struct, frozen=True):
    """One linear: what was planned, what it runs in ("not named" when no layer lists it), by which layer."""

    site: str
    planned: str
    ran: str
    layer: str
    kind: str

    @property
    def kept(self) -> bool:
        """True when the plan was kept."""
        return self.planned == self.ran


def layers_of_listing(text: str) -> tuple[Layer, ...]:
    """Return the layers of a verbose listing ("Layers: ..." with a line for each)."""
    return tuple(_of_line(match) for line in text.splitlines() if (match := _LINE.match(line)))


def layers_of_json(text: str) -> tuple[Layer, ...]:
    """Return the layers of the engine inspector's JSON."""
    return tuple(_of_json(entry) for entry in json.loads(text)["Layers"] if isinstance(entry, dict))


def site_results(sites: Sequence[SiteFormat], layers: Sequence[Layer]) -> tuple[SiteResult, ...]:
    """Return for every planned linear what the engine really runs it in."""
    by_node: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            by_node.setdefault(node, []).append(layer)
    return tuple(_result(site, by_node.get(site.node, [])) for site in sites)


def _result(site: SiteFormat, layers: list[Layer]) -> SiteResult:
    products = [layer for layer in layers if layer.kind != POINTWISE] or layers
    if not products:
        return SiteResult(site.site, site.format, "not named", "", "")
    chosen = max(products, key=lambda layer: _rank(layer, site.format))
    return SiteResult(site.site, site.format, _ran(chosen), chosen.name, chosen.kind)


def _rank(layer: Layer, planned: str) -> bool:
    return _ran(layer) == planned


def _ran(layer: Layer) -> str:
    """Return the narrowest format that enters the layer's product."""
    entering = (*layer.inputs, *layer.constants)
    for narrow in _NARROW:
        if narrow in entering:
            return narrow
    for wide in ("bf16", "fp16"):
        if wide in entering:
            return wide
    return "fp32"


def _of_line(match: re.Match[str]) -> Layer:
    rest = match["rest"]
    found = {name: _formats(_TYPE.findall(body)) for name, body in _SECTION.findall(rest)}
    tactic = re.search(r"TacticName: ([^,]*)", rest)
    return Layer(
        match["name"], match["kind"], found.get("Inputs", ()), found.get("Constants", ()),
        found.get("Outputs", ()), tactic[1] if tactic else "", tuple(_NODE.findall(rest)),
    )  # fmt: skip


def _of_json(entry: dict[str, Any]) -> Layer:
    def types(section: str) -> tuple[str, ...]:
        tensors = entry.get(section) or []
        return _formats(
            str(tensor.get("Datatype", tensor.get("Format/Datatype", ""))).split()[-1:][0]
            if isinstance(tensor, dict) and str(tensor.get("Datatype", tensor.get("Format/Datatype", "")))
            else ""
            for tensor in tensors
        )  # fmt: skip

    return Layer(
        str(entry.get("Name", "")), str(entry.get("LayerType", "")), types("Inputs"), types("Constants"),
        types("Outputs"), str(entry.get("TacticName", "")), tuple(_NODE.findall(str(entry.get("Metadata", "")))),
    )  # fmt: skip


def _formats(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(_TYPES.get(name, name.lower()) for name in names)
