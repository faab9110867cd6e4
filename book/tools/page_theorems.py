"""The gallery of theorems: the statement, what was measured, and where it breaks."""

import hashlib
import inspect
import json
import pathlib

HEAD = """# The theorems

A theorem here is a file: its statement, what it assumes, a `check` that measures the quantity
it bounds, and a `counter_check` that drops an assumption and shows the bound breaking. The
tables below are what the two measured when this page was built.

"""


def pages(root: pathlib.Path) -> dict[str, str]:
    """`theorems.md`."""
    import theory

    found = theory.theorems()
    theorems = list(found.values()) if isinstance(found, dict) else list(found)
    evidence = measured(theorems, root)
    return {"theorems.md": HEAD + "\n".join(section(t, *evidence[t.id]) for t in theorems)}


def measured(theorems: list, root: pathlib.Path) -> dict[str, list[str]]:
    """Both experiments of every theorem as HTML, remembered until a source they use changes."""
    paths = [p for room in ("theory", "attnlab/core") for p in sorted((root / room).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    ledger = root / "build" / "theorems.json"
    old = json.loads(ledger.read_text("utf-8")) if ledger.exists() else {}
    if old.get("digest") != digest or set(old["evidence"]) != {t.id for t in theorems}:
        evidence = {t.id: [html(t.check), html(t.counter_check)] for t in theorems}
        old = {"digest": digest, "evidence": evidence}
        ledger.parent.mkdir(exist_ok=True)
        ledger.write_text(json.dumps(old, indent=1), "utf-8")
    return old["evidence"]


def html(experiment) -> str:
    """Run an experiment, from a fixed key where it wants one."""
    import jax

    needs_key = any(p.default is p.empty for p in inspect.signature(experiment).parameters.values())
    return experiment(jax.random.key(0))._repr_html_() if needs_key else experiment()._repr_html_()


def section(theorem, check: str, counter: str) -> str:
    """One theorem."""
    given = "\n".join(f"- {assumption}" for assumption in theorem.assumptions)
    proof = f"::::{{dropdown}} Proof\n{theorem.proof}\n::::\n" if theorem.proof else ""
    source = theorem.source
    cite = f"[{source.title}]({source.url})" if source.url else f"*{source.title}*"
    title = theorem.title[:1].upper() + theorem.title[1:]
    return f"""## {title}

::::{{prf:theorem}} {title}
:label: theorem-{theorem.id}

{theorem.statement}

Assuming

{given}
::::

{proof}
Source: {source.authors} ({source.year}), {cite}.
Run it: `theory.theorems()["{theorem.id}"].check()`.

:::::{{tab-set}}
::::{{tab-item}} Checked
<div class="atlas-scroll">{check}</div>
::::
::::{{tab-item}} Without an assumption
<div class="atlas-scroll">{counter}</div>
::::
:::::
"""
