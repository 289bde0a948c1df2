"""Made tasks: generators that know no model, their Harbor folders, and the proof of verifiers.

    from envs.tasks.made import FAMILIES, write_draft

    write_draft(FAMILIES["logs"].make(7), pathlib.Path("out/logs-7"))

Every task asks for one program (or query, settings, module), which the verifier runs on hidden
cases in an environment of its own.
"""

from types import ModuleType

from envs.tasks.made import (
    apis,
    databases,
    logs,
    programs,
    services,
    tables,
    text_tools,
    version_control,
)
from envs.tasks.made.draft import Case, Draft, files_of, write_draft
from envs.tasks.made.prove import Mutants, score_mutants

# Generators by name; each has `make(seed) -> Draft`.
FAMILIES: dict[str, ModuleType] = {
    "apis": apis,
    "databases": databases,
    "git": version_control,
    "logs": logs,
    "programs": programs,
    "services": services,
    "tables": tables,
    "text": text_tools,
}

__all__ = ["FAMILIES", "Case", "Draft", "Mutants", "files_of", "score_mutants", "write_draft"]
