"""Action error of recipes' formats on held-out frames, in the torch reference, weights rounded.

python benchmarks/mixed_precision/heldout.py w4a8 benchmarks/mixed_precision/mixed.toml vision8 w4a8-vision8

Quicker than quantize, export and verify, and without their kernels: it shows what the formats do. The
passes of the recipes are not run; weights are rounded as `quantvla plan` does when it measures errors.
"""

from __future__ import annotations

import sys
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

from quantvla.calib_sets import limit, open_set
from quantvla.cli.progress import progress_bar
from quantvla.families import load_policy
from quantvla.layout import make_plan
from quantvla.mixed.sensitivity import Sensitivity, Subject
from quantvla.recipe import read_recipe
from quantvla.runtime.files import sha256_tree

POLICY, SET = Path("examples/metaworld/policy"), Path("calib_sets/metaworld")
FRAMES, HELDOUT_FRAMES, SEED = 32, 24, 0


def main(recipes: list[str]) -> None:
    """Print the nrmse of every recipe."""
    loaded = load_policy(POLICY)
    frames = limit(open_set(SET), frames=FRAMES, heldout_frames=HELDOUT_FRAMES, seed=SEED)
    subject = Subject(
        loaded, sha256_tree(POLICY), frames.part("calibration"), frames.part("heldout"), SEED
    )
    with TemporaryDirectory() as work, progress_bar() as progress:
        sensitivity = Sensitivity(subject, Path(work), progress)
        for name in recipes:
            entries = make_plan(loaded.sites, read_recipe(name)).quantized
            choice = {entry.site: (entry, entry.scheme) for entry in entries}
            mib = sum(entry.bytes_after for entry in entries) / 2**20
            error = sqrt(sensitivity.together(choice))
            print(f"{name}: {len(entries)} sites, {mib:.3f} MiB, nrmse {error:.3%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
