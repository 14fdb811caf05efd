"""Settings of the documentation: Sphinx, furo and MyST; built with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import filterwise

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "filterwise"
author = "filterwise contributors"
release = version = filterwise.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "generated",
    "math_without_scripts",
    "every_public_name",
    "offline",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Single backticks of docstrings are names of this library wherever one has that name.
default_role = "obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "filterwise"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["filterwise.css"]
pygments_style = "friendly"
pygments_dark_style = "github-dark"
