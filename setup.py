"""What setup.cfg cannot say: recipes/ stands beside the package, and inside it once installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dreamkit*"]), "dreamkit.recipes"],
    package_dir={"dreamkit.recipes": "recipes"},
)
