"""The pages made from the library: atlas, theorems, support, kernels, benchmarks, API reference."""

import pathlib

import page_api
import page_atlas
import page_bench
import page_kernels
import page_support
import page_theorems
from stage import Tree


def pages(root: pathlib.Path) -> Tree:
    """All generated pages, keyed by their place in the staged tree."""
    rows = page_support.load(root)
    text = page_atlas.pages(rows)
    text |= page_support.pages(rows)
    text |= page_theorems.pages(root)
    text |= page_kernels.pages(root)
    text |= page_bench.pages(root)
    text |= page_api.pages(root)
    return {name: content.encode("utf-8") for name, content in text.items()}
