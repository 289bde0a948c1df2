"""A check of the work that lies where the agent can edit it, as tests of a repository do."""

from __future__ import annotations

import dataclasses

from envs.rock import Sandbox

CHECK_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Check:
    """A script that tells whether the base task is done.

    Attributes:
      path: where it lies.
      also: a shell condition that it asks for beside the base task; "" for none.
    """

    path: str
    also: str = ""

    def script(self, verifier: str) -> str:
        """Return its text: it succeeds where a verifier prints 1 last, and `also` holds.

        Args:
          verifier: a bash script of the terminal curriculum.
        """
        also = f" && {self.also}" if self.also else ""
        return f"(\n{verifier.rstrip()}\n) | tail -n 1 | grep -qx 1{also}\n"

    async def passes(self, sandbox: Sandbox, path: str) -> bool:
        """Return whether what lies at a path now succeeds. It may be anything, also nothing."""
        result = await sandbox.execute(f"bash {path}", timeout=CHECK_SECONDS)
        return result.exit_code == 0 and not result.timed_out
