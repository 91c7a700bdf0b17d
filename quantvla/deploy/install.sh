#!/usr/bin/env bash
# Make ./venv with the runtime on a Jetson (JetPack 6 or 7) or a desktop with an NVIDIA GPU. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")"

echo "checking the package"
sha256sum --quiet --check SHA256SUMS

python=${PYTHON:-python3}
"$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $python is older than 3.10 or lacks venv (sudo apt install python3-venv)" >&2; exit 2; }

target=$(sed -n 's/^ *"target": "\(.*\)",$/\1/p' engine/manifest.json)
case "$target" in
  jetson-*)
    "$python" -c 'import tensorrt' || {
      echo "error: $python cannot import tensorrt; sudo apt install nvidia-jetpack python3-libnvinfer" >&2; exit 2; }
    case "$target" in jetson-orin) cuda='cuda-bindings>=12.6,<13' ;; *) cuda='cuda-bindings>=13,<14' ;; esac
    "$python" -m venv --system-site-packages venv
    venv/bin/python -m pip install --quiet wheel/quantvla-*.whl "$cuda" ;;
  rtx)
    "$python" -m venv venv
    venv/bin/python -m pip install --quiet "$(echo wheel/quantvla-*.whl)[tensorrt-rtx]" ;;
  *) echo "error: engine/manifest.json names target '$target', which is not for TensorRT" >&2; exit 2 ;;
esac

venv/bin/quantvla doctor engine || { echo "error: fix what doctor says, then run this again" >&2; exit 1; }
venv/bin/quantvla build engine
