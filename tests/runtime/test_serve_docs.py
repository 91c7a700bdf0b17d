"""The snippets and options of docs/serve.md work as written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from served import serving
from tiny_engine import ACTION_DIM, HORIZON, observation

from quantvla.cli.serve import serve
from quantvla.runtime.policy import Policy

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def test_snippets_run(pristine_engine: Path, policy: Policy) -> None:
    blocks = [part.split("```")[0] for part in TEXT.split("```python\n")[1:]]
    assert len(blocks) == 2
    with serving(pristine_engine) as served:
        for block in blocks:
            names: dict[str, object] = {"observation": observation()}
            exec(block.replace("8000", str(served.port)), names)
            chunk = names["chunk"]
            assert isinstance(chunk, np.ndarray) and chunk.shape == (HORIZON, ACTION_DIM)
            policy.reset(seed=0)
            np.testing.assert_array_equal(chunk, policy.predict_action_chunk(observation()))


def test_options_in_the_text_exist() -> None:
    options = {name for parameter in serve.params for name in parameter.opts}
    text = TEXT.partition("## Figures")[0]
    named = {word.strip("`,.:;()") for word in text.split() if word.startswith(("--", "`--"))}
    assert named - options == set(), named - options
    assert {"--host", "--api-key-file", "--tls-cert", "--max-clients", "--rename"} <= named
