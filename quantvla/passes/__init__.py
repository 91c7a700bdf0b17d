"""The passes a recipe can list: one file each, one line here."""

from __future__ import annotations

from quantvla.passes.round_weights import RoundWeights

Pass = RoundWeights
