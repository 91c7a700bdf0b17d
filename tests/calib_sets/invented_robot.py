"""The robot of the calibration-set tests: two small cameras, three joints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from quantvla.calib_sets import Observation

HEIGHT, WIDTH = 16, 24
TOP, WRIST = "observation.images.top", "observation.images.wrist"
Observe = Callable[..., Observation]
Episodes = Callable[..., Iterator[tuple[Observation, int, int]]]
