"""The site that `make docs` builds from this folder, offline too: the names of PyTorch to which pages link stand in
`inventories/torch.inv` for the case that its own list cannot be fetched."""

from importlib.metadata import version as version_of

project = "fused_losses"
author = "the authors of fused_losses"
copyright = "MIT licence"
version = release = version_of("fused_losses")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fused_losses {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4  # links to headings are those of GitHub
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False

intersphinx_timeout = 5
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", (None, "inventories/torch.inv"))}

nitpicky = True  # a name of this package that no page explains is an error; those of others are not ours to explain
nitpick_ignore_regex = [(r"py:.*", r"(?!fused_losses\b).*")]
