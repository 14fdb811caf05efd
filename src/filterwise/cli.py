"""The command ``filterwise``: its doors are `filterwise.lab.commands`, behind the extra ``lab``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

NEEDED = {
    "faster_coco_eval": "faster-coco-eval",
    "filelock": "filelock",
    "h5py": "h5py",
    "jinja2": "jinja2",
    "lightning_fabric": "lightning-fabric",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "rich": "rich",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "trimesh": "trimesh",
    "typer": "typer",
    "yaml": "pyyaml",
}
"""Modules of the extra ``lab``, and the packages they come in."""


def main() -> None:
    """Run the command line, or say in one line what it needs."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        sys.exit(
            f"filterwise: the command line needs {', '.join(missing)}; install its extra with"
            " pip install 'filterwise[lab]'"
        )
    # Only now, since the doors import what may be missing.
    from filterwise.lab.commands import app

    app()
