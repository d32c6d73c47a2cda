"""What pyproject.toml cannot say: the name under which ``engine/`` is installed, and the native library, which is built
where there is a C++ compiler; without one the installation goes on."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
try:
    import build_native as native
finally:
    sys.path.pop(0)

FOLDERS = {"dpo_kernels": "dpo_kernels", "dpo_engine": "engine"}
"""Package -> its folder. ``engine`` alone is a name that other projects use."""
KERNELS = sorted(path.name for path in (ROOT / "csrc").glob("hopper_*.cu*"))


class BuildWithLibrary(build_py):
    """Puts the library beside the modules that load it: of the build, or of the checkout if that is what is used."""

    def run(self):
        super().run()
        if not self.editable_mode:
            # Compiled where it runs; a checkout has it in csrc/.
            for name in KERNELS:
                self.copy_file(str(ROOT / "csrc" / name), str(Path(self.build_lib) / "dpo_kernels" / name))
        library = self.library()
        try:
            library.unlink(missing_ok=True)
            native.build(library)
        except (native.BuildError, OSError) as reason:
            print(f"dpo-kernels: the native library is left out: {reason}", file=sys.stderr)

    def library(self):
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        return folder / "dpo_kernels" / native.LIBRARY

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        if not self.editable_mode:
            outputs = [*outputs, *(str(Path(self.build_lib) / "dpo_kernels" / name) for name in KERNELS)]
        return [*outputs, str(self.library())] if self.library().exists() else outputs


class WheelOfPlatform(bdist_wheel):
    """A wheel with the library is for one platform and any Python; without it, for all."""

    def run(self):
        self.run_command("build_py")
        if self.get_finalized_command("build_py").library().exists():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(
    packages=[
        package + found.removeprefix(folder)
        for package, folder in FOLDERS.items()
        for found in find_packages(include=[folder, f"{folder}.*"])
    ],
    package_dir=FOLDERS,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfPlatform},
)
