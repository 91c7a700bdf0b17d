"""The wheel's build: everything is in setup.cfg, except that the CPU kernels are compiled here.

Without a C++ compiler the wheel has none; engines then run on ONNX Runtime's own operators.
"""

import runpy
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = runpy.run_path(str(Path(__file__).parent / "runtime" / "kernels" / "build.py"))


class BuildWithKernels(build_py):
    """Copies the packages, then builds the library among them (beside its sources if editable)."""

    def run(self):
        super().run()
        here = Path(__file__).parent / "runtime" / "kernels"
        built = Path(self.build_lib) / "quantvla" / "runtime" / "kernels"
        try:
            KERNELS["build"]((here if self.editable_mode else built) / KERNELS["LIBRARY"])
        except KERNELS["BuildError"] as error:
            print(f"warning: CPU kernels not built: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """A wheel with a library is for one platform, whatever the Python."""

    def finalize_options(self):
        super().finalize_options()
        try:
            KERNELS["compiler"]()
        except KERNELS["BuildError"]:
            return
        self.root_is_pure = False

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
