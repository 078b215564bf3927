"""Settings of the site that ``make docs`` builds with Sphinx.

It reads the repository's root, not this folder: so README.md and CONTRIBUTING.md are pages too, and
a relative link is the same on GitHub and on the site, where files that are no pages are downloads.
"""

import re
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

import torchtune_vl

project = html_title = "torchtune-vl"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/**.md"]
exclude_patterns = [".*", "build"]  # folders that Sphinx would walk through
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_extra_path = ["root"]  # index.html, which leads to docs/index.html
html_show_copyright = html_show_sphinx = html_copy_source = False
highlight_language = "text"
myst_heading_anchors = 4  # by the names that GitHub gives them

default_role = "code"
python_maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_default_options = {
    "special-members": "__call__",
    # Those of bases that have no place of their own, and so not of these
    "inherited-members": "ChatTransform, Dataset, Exception, Module, Protocol, dict, tuple",
}
# An import for type checkers alone
autodoc_type_aliases = {"VisionLanguageModel": "torchtune_vl.modules.vision.VisionLanguageModel"}

# What need not have a place here: types of others, since a build asks no network for theirs, ...
nitpick_ignore_regex = [("py:.*", r"(?!torchtune_vl\.).+\..+")]
# ... and types of ours that signatures name, but nobody has to
nitpick_ignore = [
    ("py:class", f"torchtune_vl.{name}")
    for name in (
        "chat._messages.Message",
        "chat._transform.Examined",
        "datasets._record_formats.RecordReader",
        "datasets._sample_sizes.Measured",
        "datasets._tables.Table",
        "files._json.JsonObject",
        "files._tensor_names.T",
        "generation._answer_file.Questions",
        "generation._decoding.Draft",
        "generation._decoding.Tokenizer",
        "media._augment.Change",
        "modules.kv_cache.Continuations",
        "modules.kv_cache.Prefill",
        "modules.kv_cache.Step",
        "validation._server.Server",
    )
]


def _plain_defaults(
    app: Sphinx, what: str, name: str, of: Any, options: Any, signature: str | None, returned: Any
) -> tuple[str, Any] | None:
    """Write ``...`` for defaults that are no expressions, as ``<factory>``: Sphinx reads them."""
    return (re.sub(r"= <.*?>", "= ...", signature), returned) if signature else None


def _public(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element
) -> nodes.Element | None:
    """Find by its public name what a signature calls by the private file that it is in."""
    if node.get("refdomain") != "py":
        return None
    name = re.sub(r"\._\w+(?=\.)", "", node["reftarget"])
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], name, node, content
    )


def _warn_of_names_without_place(app: Sphinx, env: BuildEnvironment) -> None:
    described = {name for name, *_ in env.get_domain("py").get_objects()}
    for package in walk_packages(torchtune_vl.__path__, "torchtune_vl."):
        public = getattr(import_module(package.name), "__all__", ()) if package.ispkg else ()
        for name in {f"{package.name}.{name}" for name in public} - described:
            getLogger(__name__).warning("%s has no place in docs/api", name)


def setup(app: Sphinx) -> None:
    """Register what is done here."""
    app.connect("autodoc-process-signature", _plain_defaults)
    app.connect("missing-reference", _public)
    app.connect("env-check-consistency", _warn_of_names_without_place)
