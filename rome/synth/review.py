"""Review: accepts a draft only if its verifier can be trusted.

In this order, each a gate: the verifier runs code and never reads its own source or the program's
text; the draft is no duplicate; mutants and fakes of the oracle are rejected; the oracle earns 1
every time, and doing nothing and every cheat earn 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

from envs.tasks.harbor.task import Files
from envs.tasks.made import Draft

MIN_MUTATION_SCORE = 0.9
NEAR_DUPLICATE = 0.97  # Jaccard similarity of the words' 3-grams, estimated
_PERMUTATIONS = 128
_WORD = re.compile(r"\w+|[^\w\s]")
# A verifier that names one of these judges how a program looks, not what it does.
_READS_SOURCE = re.compile(
    r"inspect\.getsource|__file__\)?\.read|open\(__file__|grep [^|;\n]*(?:/app/|\.py\b|\.sh\b)"
    r"|read_text\(\)[^\n]*(?:\bin\b|count\()|ast\.parse\("
)
_RUNS_CODE = re.compile(
    r"subprocess\.|os\.exec|os\.system|Popen\(|importlib\.|\bbash |\bpython3? |\bnode |\bsh -c"
)


def verifier_faults(files: Files) -> list[str]:
    """Return what is wrong with a task's tests, judged by their text; [] for nothing.

    Args:
      files: of the task's folder; those below tests/ count.
    """
    texts = {}
    for name, (content, _) in files.items():
        if name.startswith("tests/") and name.endswith((".py", ".sh", ".js")):
            texts[name] = content.decode(errors="replace")
    if "tests/test.sh" not in texts:
        return ["tests/test.sh is missing"]
    faults = []
    for name, text in sorted(texts.items()):
        match = _READS_SOURCE.search(_without_comments(name, text))
        if match:
            faults.append(f"{name} reads source instead of running it: {match[0][:40]!r}")
    judged = "\n".join(
        text for name, text in texts.items() if name != "tests/test.sh" or len(texts) == 1
    )
    if not _RUNS_CODE.search(judged):
        faults.append("no program is run by the tests")
    return faults


def _without_comments(name: str, text: str) -> str:
    """Return a text without its comments and, for Python, its docstrings."""
    if name.endswith(".py"):
        try:
            return ast.unparse(_undocumented(ast.parse(text)))
        except (SyntaxError, RecursionError, ValueError):
            return text
    return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)


def _undocumented(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if (
            isinstance(body, list)
            and isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.fix_missing_locations(tree)


def find_duplicates(drafts: Sequence[Draft]) -> dict[int, int]:
    """Return {number of a draft: number of the earlier one that it repeats}, exactly or nearly."""
    seen: dict[str, int] = {}
    index = MinHashLSH(threshold=NEAR_DUPLICATE, num_perm=_PERMUTATIONS)
    sketches: dict[int, MinHash] = {}
    found: dict[int, int] = {}
    for number, draft in enumerate(drafts):
        if draft.digest in seen:
            found[number] = seen[draft.digest]
            continue
        sketch = _sketch(draft)
        near = [
            other
            for other in index.query(sketch)
            if sketches[other].jaccard(sketch) >= NEAR_DUPLICATE
        ]
        if near:
            found[number] = min(near)
            continue
        seen[draft.digest] = number
        sketches[number] = sketch
        index.insert(number, sketch)
    return found


def _sketch(draft: Draft) -> MinHash:
    words = _WORD.findall(f"{draft.instruction}\n{draft.oracle[:4000]}\n{_bug(draft)}")
    sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
    for start in range(max(1, len(words) - 2)):
        sketch.update(" ".join(words[start : start + 3]).encode())
    return sketch


def _bug(draft: Draft) -> str:
    """Return the lines around a bug, which alone tell tasks on one program apart, many times."""
    broken = draft.files.get(draft.program, "")
    if not broken:
        return ""
    own = set(draft.oracle.splitlines())
    changed = "\n".join(line for line in broken.splitlines() if line not in own)
    place = f"{draft.origin.get('bug', '')} {draft.origin.get('line', '')}"
    return f"{changed}\n{place}\n" * 20
