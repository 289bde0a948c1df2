"""What the user granted to projects: trust, and rules that "allow always" added.

Both are kept in the user's own folder. A file in a project cannot forge them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from rome.agent.iflow.specs.spec_files import SpecError
from rome.files import write_atomically


class Projects:
    """The user's record of projects, in ~/.iflow/projects.json unless another path is given."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self.path = path or pathlib.Path.home() / ".iflow" / "projects.json"

    def is_trusted(self, project: pathlib.Path) -> bool:
        """Return whether the user trusts a project, or a folder that it lies in."""
        known = self._read()
        project = project.resolve()
        return any(
            known.get(str(folder), {}).get("trusted") is True
            for folder in (project, *project.parents)
        )

    def is_decided(self, project: pathlib.Path) -> bool:
        """Return whether the user said whether a project is to be trusted."""
        return "trusted" in self._read().get(str(project.resolve()), {}) or self.is_trusted(project)

    def trust(self, project: pathlib.Path, trusted: bool = True) -> None:
        """Note that the user trusts a project: its hooks, servers and rules then hold."""
        with self._changing() as known:
            known.setdefault(str(project.resolve()), {})["trusted"] = trusted

    def rules(self, project: pathlib.Path) -> tuple[str, ...]:
        """Return the rules that the user allowed for a project."""
        rules = self._read().get(str(project.resolve()), {}).get("allow", [])
        return tuple(rule for rule in rules if isinstance(rule, str))

    def add_rule(self, project: pathlib.Path, rule: str) -> None:
        """Note a rule that the user allowed for a project."""
        with self._changing() as known:
            rules = known.setdefault(str(project.resolve()), {}).setdefault("allow", [])
            if rule not in rules:
                rules.append(rule)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise SpecError(f"{self.path} cannot be read; repair or remove it: {error}") from error
        if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
            raise SpecError(f"{self.path} must hold an object of objects; repair or remove it")
        return known

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Yield the record to be changed; other processes wait meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = self._read()
            yield known
            write_atomically(self.path, json.dumps(known, indent=1) + "\n")
