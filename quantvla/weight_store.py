"""Integer weights on disk while passes make them: a folder a pass, the newest counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quantvla.plan import Plan
from quantvla.quantizer import QuantizedWeight, StaticInput
from quantvla.runtime.errors import explain
from quantvla.runtime.files import write_atomic
from quantvla.schemes import Inputs


class DirectoryStore:
    """Integer weights, one file a site, each written atomically; a later folder hides an earlier one."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root
        self._newest: dict[str, Path] = {}

    def open_folder(self, folder: Path) -> None:
        """Write to ``folder`` from now on; what it holds counts, what earlier ones hold stays readable."""
        self._folder = folder
        self._newest |= {path.stem: path for path in sorted(folder.glob("*.safetensors"))}

    def __contains__(self, site: str) -> bool:
        return site in self._newest

    def put(self, site: str, weight: QuantizedWeight) -> None:
        """Keep the weight of a site."""
        tensors = {"codes": weight.codes, "scales": weight.scales}
        if weight.static is not None:
            tensors |= {"transform": weight.static.transform, "input_scales": weight.static.scales}
        metadata = {"bits": str(weight.bits), "block": str(weight.block), "inputs": weight.inputs}
        path = self._folder / f"{site}.safetensors"
        write_atomic(path, save(tensors, metadata))
        self._newest[site] = path

    def get(self, site: str) -> QuantizedWeight:
        """Return the weight of a site that is in the store."""
        path = self._newest[site]
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata()
                static = None
                if metadata["inputs"] == "int8_static":
                    static = StaticInput(
                        stored.get_tensor("transform"), stored.get_tensor("input_scales")
                    )
                return QuantizedWeight(
                    stored.get_tensor("codes"), stored.get_tensor("scales"),
                    bits=int(metadata["bits"]), block=int(metadata["block"]),
                    inputs=msgspec.convert(metadata["inputs"], Inputs), static=static,
                )  # fmt: skip
        except (SafetensorError, OSError) as error:
            raise explain(
                path,
                "intermediate result is damaged",
                got=error,
                remedy=f"remove {self._root} and run again",
            ) from error

    def view(self, plan: Plan) -> Mapping[str, QuantizedWeight]:
        """Return the weights of the plan's sites, read from disk as they are asked for."""
        return _StoreView(self, tuple(entry.site for entry in plan.quantized))


class _StoreView(Mapping[str, QuantizedWeight]):
    def __init__(self, store: DirectoryStore, sites: tuple[str, ...]) -> None:
        self._store, self._sites = store, sites

    def __getitem__(self, site: str) -> QuantizedWeight:
        return self._store.get(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
