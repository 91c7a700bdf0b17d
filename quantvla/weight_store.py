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
        self._folders: list[Path] = []

    def open_folder(self, folder: Path) -> None:
        """Write to ``folder`` from now on; what earlier ones hold stays readable."""
        self._folders.append(folder)

    def _path(self, site: str) -> Path | None:
        paths = (folder / f"{site}.safetensors" for folder in reversed(self._folders))
        return next((path for path in paths if path.is_file()), None)

    def __contains__(self, site: str) -> bool:
        return self._path(site) is not None

    def put(self, site: str, weight: QuantizedWeight) -> None:
        """Keep the weight of a site."""
        tensors = {"codes": weight.codes, "scales": weight.scales}
        if weight.static is not None:
            tensors |= {"transform": weight.static.transform, "input_scales": weight.static.scales}
        metadata = {"bits": str(weight.bits), "block": str(weight.block), "inputs": weight.inputs}
        write_atomic(
            self._folders[-1] / f"{site}.safetensors",
            save(tensors, metadata),
        )

    def get(self, site: str) -> QuantizedWeight:
        """Return the weight of a site that is in the store."""
        path = self._path(site)
        assert path is not None, site
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
