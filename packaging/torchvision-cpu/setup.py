"""Puts the .pth file beside the module: setuptools has no setting for that."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Copies the .pth file to the top of the wheel, which is unpacked into site-packages."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        self.copy_file("torchvision_cpu.pth", self.build_lib)


setup(cmdclass={"build_py": BuildWithPth})
