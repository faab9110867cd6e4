"""The scripts that pages need, from installed packages: no network when building or reading."""

import importlib.metadata
import pathlib

from stage import Tree


def assets() -> Tree:
    """MathJax with its fonts, and Plotly: what is under `_extra/` goes to the root of the site."""
    return mathjax() | plotly()


def mathjax() -> Tree:
    """MathJax 3 for TeX input and CHTML output, as sphinx-mathjax-offline packages it."""
    prefix = "sphinx-mathjax-offline/static/mathjax/"
    wanted = ("tex-chtml.js", "output/chtml/fonts/woff-v2/", "input/tex/extensions/", "LICENSE")
    found = {}
    for file in importlib.metadata.files("sphinx-mathjax-offline") or []:
        name = file.as_posix()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(wanted):
            found["_extra/_static/mathjax/" + name.removeprefix(prefix)] = file.read_binary()
    if "_extra/_static/mathjax/tex-chtml.js" not in found:
        raise SystemExit("sphinx-mathjax-offline is installed without MathJax; run `make book`")
    return found


def plotly() -> Tree:
    """plotly.min.js, shared by every chapter's figures."""
    import plotly as package

    script = pathlib.Path(package.__file__).parent / "package_data" / "plotly.min.js"
    return {"_extra/_static/plotly.min.js": script.read_bytes()}
