"""The site that `make docs` builds from this folder, offline too: for the case that PyTorch's list of its names cannot
be fetched, those to which docstrings refer stand in `inventories/torch.inv`."""

import re
from importlib.metadata import version as version_of

project = "fused_losses"
author = "the authors of fused_losses"
copyright = "the authors, MIT licence"
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
napoleon_use_rtype = False

intersphinx_timeout = 5
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", (None, "inventories/torch.inv"))}

nitpicky = True  # a name of this package that no page explains is an error; those of others are not ours to explain
nitpick_ignore_regex = [(r"py:.*", r"(?!fused_losses\b).*")]

# Files of the repository that are pages of the site, too: where a page links to them, GitHub shows them as they are.
ALSO_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def link_to_pages(app, name, source):
    for file, page in ALSO_PAGES.items():
        source[0] = source[0].replace(f"](../{file})", f"]({page})")


def escape_bars(app, what, name, object, options, lines):
    """|x| is a length in our docstrings, and a substitution in reStructuredText."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``|`[^`]*`)", line)  # literals as they are
            lines[number] = "".join(part if part[:1] == "`" else part.replace("|", "\\|") for part in parts)


def setup(app):
    app.connect("source-read", link_to_pages)
    app.connect("autodoc-process-docstring", escape_bars)
