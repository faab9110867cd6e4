r"""A Sphinx extension: docstrings in attnlab's plain style, made into reStructuredText.

The style is what one would type into a terminal: `code` in single backticks, formulas indented
by four spaces, $mathematics$ between dollars, asterisks and underscores meaning themselves.
"""

import re

SECTION = re.compile(r"^(Args|Arguments|Returns|Yields|Raises|Attributes|Examples?|Notes?):$")
ITEM = re.compile(r"^([*+-]|\d+\.) ")
# What is taken out before the rest is escaped: ``code``, :role:`x`, `code`, $x$, **x**.
SPAN = re.compile(
    r"``[^`]+``|:[a-z:]+:`[^`]+`|`[^`]+`|(?<![\w$])\$[^$\s](?:[^$\n]*[^$\s])?\$(?!\w)|\*\*\S.*?\*\*"
)


def inline(prose: str) -> str:
    """A paragraph of prose: code and mathematics marked up, everything else escaped."""
    out, end = [], 0
    for match in SPAN.finditer(prose):
        out += [escape(prose[end : match.start()]), span(match[0])]
        end = match.end()
        if prose[end : end + 1].isalnum():
            out.append("\\ ")  # `Name`s: markup must not touch a letter
    return "".join([*out, escape(prose[end:])])


def span(text: str) -> str:
    """One marked-up span in reStructuredText."""
    if text.startswith("``") or text.startswith(":") or text.startswith("**"):
        return text
    if text.startswith("$"):
        return f":math:`{text[1:-1]}`"
    return f"``{text[1:-1].strip()}``"


def escape(text: str) -> str:
    """Prose in which no character has a second meaning; a bullet's dash or star stays."""
    escaped = re.sub(r"([\\*|`]|_(?!\w)|(?<!\w)_)", r"\\\1", text)
    return re.sub(r"^(\s*)\\\* ", r"\1* ", escaped, flags=re.MULTILINE)


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The runs of lines between blank lines."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [lines for lines in found if lines]


def depth(line: str) -> int:
    """How far a line is indented."""
    return len(line) - len(line.lstrip())


def convert(lines: list[str]) -> list[str]:
    """The docstring with its indented paragraphs as literal blocks and its prose escaped."""
    out: list[str] = []
    literal = nested = False  # inside a literal block; below a list item or a section's heading
    for block in paragraphs(lines):
        first = block[0]
        if depth(first) == 0:
            literal, nested = False, bool(SECTION.match(first) or ITEM.match(first))
        elif depth(first) >= 4 and not nested and not literal:
            out += ["::", ""]
            literal = True
        verbatim = literal or first.lstrip().startswith(">>>")
        out += [*(block if verbatim else inline("\n".join(block)).split("\n")), ""]
    return out


def process(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """The hook: rewrite a docstring in place before napoleon reads its sections."""
    lines[:] = convert(lines)


def setup(app) -> dict[str, bool]:
    """Register with Sphinx, ahead of napoleon."""
    app.connect("autodoc-process-docstring", process, priority=300)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
