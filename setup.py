"""What pyproject.toml cannot say: the folder ``engine/`` is installed as the package ``dpo_engine``."""

from setuptools import find_packages, setup

FOLDERS = {"dpo_kernels": "dpo_kernels", "dpo_engine": "engine"}
"""Package -> its folder. ``engine`` alone is a name that other projects use."""

setup(
    packages=[
        package + found.removeprefix(folder)
        for package, folder in FOLDERS.items()
        for found in find_packages(include=[folder, f"{folder}.*"])
    ],
    package_dir=FOLDERS,
)
