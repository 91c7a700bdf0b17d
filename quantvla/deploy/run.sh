#!/usr/bin/env bash
# Build what is not built yet (a no-op afterwards), then run a quantvla command on the engine; default: serve it.
set -euo pipefail
cd "$(dirname "$0")"
[ -x venv/bin/quantvla ] || { echo "error: run ./install.sh first" >&2; exit 2; }
venv/bin/quantvla build engine
if [ $# -eq 0 ]; then set -- serve; fi
command=$1; shift
exec venv/bin/quantvla "$command" engine "$@"
