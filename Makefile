# Two commands to know: `make demo` (the main job) and `make test`. Both set everything up first.
.PHONY: demo test check lint setup

export HF_HUB_OFFLINE := 1
export MUJOCO_GL ?= egl

demo: setup
	.venv/bin/quantvla demo

test: setup
	.venv/bin/python -m pytest -n auto --dist loadfile

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test

setup:
	@scripts/setup.sh
