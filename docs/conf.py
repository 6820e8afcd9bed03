"""Settings of Sphinx. `make docs` builds from the repository's root, so links work both here and in the site."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["COLUMNS"] = "90"  # width of the commands' help
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import megatron_aspo  # noqa: E402

project = "megatron_aspo"
version = release = megatron_aspo.__version__
author = "the megatron_aspo authors"
project_copyright = author

root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/lab/*.md", "docs/reference/*.rst", "examples/**/*.md"]
exclude_patterns = [".*", "**/.pytest_cache", "build", "dist", "models", "report", "runs"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_ext"]
myst_heading_anchors = 4
myst_fence_as_directive = ["math"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_legacy_class_based = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # allows several names per line
default_role = "code"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"megatron_aspo {version}"
html_extra_path = ["site"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
