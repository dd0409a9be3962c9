"""The site of the documents. Sphinx reads them where they lie, so a link between files is a link between pages.

`make site` builds it into build/site. A link or an anchor that leads nowhere is an error.
"""

project = "TwoTower Serve"
extensions = ["myst_parser"]
root_doc = "docs/site/index"
include_patterns = [
    "docs/*.md",
    "docs/adr/*.md",
    "docs/site/*.md",
    "*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "deploy/README.md",
    "tests/golden/FORMAT.md",
    "twotower/demo/checkpoint/README.md",
    "twotower_client/README.md",
]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # as repositories show them: ports of `## Ports` is #ports
suppress_warnings = ["myst.header"]  # cards begin some sections two levels down
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
