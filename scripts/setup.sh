#!/usr/bin/env bash
# Make .venv with everything the compiler, the simulator and the tests need. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

works() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3; do
    [ -n "$candidate" ] && candidate=$(command -v "$candidate" 2>/dev/null) && works "$candidate" && { echo "$candidate"; return; }
  done
  if command -v pyenv >/dev/null 2>&1; then
    for candidate in "$(pyenv root)"/versions/*/bin/python3; do
      works "$candidate" && { echo "$candidate"; return; }
    done
  fi
  if command -v uv >/dev/null 2>&1; then
    candidate=$(uv python find '>=3.12' 2>/dev/null) && works "$candidate" && { echo "$candidate"; return; }
  fi
  return 1
}

if ! { [ -x .venv/bin/python ] && works .venv/bin/python; }; then
  if ! python=$(find_python); then
    echo "error: no Python 3.12 or newer found (lerobot needs it); install one, or set PYTHON=/path/to/python3.12" >&2
    exit 2
  fi
  echo "using $("$python" --version) at $python"
  rm -rf .venv
  "$python" -m venv .venv
fi

stamp=.venv/.installed
wanted=$(cat setup.cfg constraints.txt scripts/setup.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9"
  # uv resolves and installs in half a minute what takes pip several; an extra index set for pip is passed on.
  .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt \
    ${PIP_INDEX_URL:+--index-url "$PIP_INDEX_URL"} -e '.[compile,tensorrt-rtx,serve,rerun,sim,dev]' \
    -e ./plugins/lerobot_policy_quantvla
  # Tests talk to the server with the client that robots use. Its metadata asks for numpy < 2, its code does not.
  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
    ${PIP_INDEX_URL:+--index-url "$PIP_INDEX_URL"} "openpi-client==0.1.2"
  echo "$wanted" > "$stamp"
fi

# The CPU kernels: rebuilt when their sources change; without a compiler engines run on ONNX Runtime's operators.
.venv/bin/python runtime/kernels/build.py --if-changed || true
