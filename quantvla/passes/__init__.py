"""The passes a recipe can list: one file each, one line here."""

from __future__ import annotations

from quantvla.passes.atm import MatchTemperature
from quantvla.passes.correct_output import CorrectOutputs
from quantvla.passes.fold_norms import FoldNorms
from quantvla.passes.gptq import Gptq
from quantvla.passes.ohb import BalanceOutputs
from quantvla.passes.permute import Permute
from quantvla.passes.published import Published
from quantvla.passes.rotate import Rotate
from quantvla.passes.round_weights import RoundWeights
from quantvla.passes.smooth import Smooth
from quantvla.passes.tune_scales import TuneScales

EquivalencePass = FoldNorms | Smooth | Rotate | Permute
Correction = MatchTemperature | BalanceOutputs | CorrectOutputs | TuneScales
Pass = EquivalencePass | RoundWeights | Gptq | Published | Correction
