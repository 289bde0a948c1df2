"""The isolation that a machine can give: guarantees, and the reasons and remedies for missing ones.

`probe` (embedded/probe.py) and `probe_docker` (docker/probe.py) find it out by trying.
"""

from typing import NamedTuple

from envs.rock.errors import IsolationError

GUARANTEES = {
    "filesystem": "commands read and change only system programs and their workspace",
    "network": "commands reach no network, the host's own services included",
    "syscalls": "dangerous system calls are refused",
    "processes": "commands see no process but their own, and none outlives its command",
    "view": "what the verifier writes leaves the agent's files as they are",
    "verifier": "what the verifier's shell runs cannot look into it",
    "disk": "the workspace is limited in bytes and files",
    "pids": "the number of processes is limited",
    "memory": "the memory of a sandbox is limited in total",
    "cpu": "the processor time of a sandbox is limited",
}
REQUIRED = frozenset(GUARANTEES) - {"cpu"}  # a deadline bounds processor time anyway


class Missing(NamedTuple):
    """A guarantee that is not given.

    Attributes:
      guarantee: its name in GUARANTEES.
      reason: why it is not given.
      remedy: what to do about it.
    """

    guarantee: str
    reason: str
    remedy: str


class TierReport(NamedTuple):
    """What a tier enforces on this machine.

    Attributes:
      tier: the best tier that works; None if no sandbox can be had at all.
      guarantees: names of GUARANTEES that it enforces.
      missing: the other ones.
    """

    tier: str | None
    guarantees: frozenset[str]
    missing: tuple[Missing, ...]

    @classmethod
    def nothing(cls, reason: str, remedy: str) -> "TierReport":
        """Return the report of a machine where no sandbox can be had."""
        missing = tuple(Missing(name, reason, remedy) for name in GUARANTEES)
        return cls(None, frozenset(), missing)

    def banner(self) -> str:
        """Return a warning for people before a run in a weaker tier; "" if nothing is missing."""
        if not self.missing:
            return ""
        lines = [
            f"SANDBOX ISOLATION IS WEAK: tier {self.tier or 'none'}. NOT enforced on this machine:"
        ]
        for item in self.missing:
            lines.append(f"  {item.guarantee:<10} {GUARANTEES[item.guarantee]}: {item.reason}")
        for remedy in dict.fromkeys(item.remedy for item in self.missing):
            lines.append(f"  remedy: {remedy}")
        rule = "!" * max(map(len, lines))
        return "\n".join([rule, *lines, rule])

    def require(self, isolation: str) -> None:
        """Check the report against what a config asks for.

        Args:
          isolation: "required" needs every guarantee of REQUIRED, "best_available" only a tier.

        Raises:
          IsolationError: something is missing; says why, and the remedies.
        """
        refused: list[Missing] = []
        if isolation == "required":
            refused = [item for item in self.missing if item.guarantee in REQUIRED]
        if self.tier is not None and not refused:
            return
        shown = refused or list(self.missing)
        names = ", ".join(item.guarantee for item in shown)
        causes = dict.fromkeys(f"{item.reason}; remedy: {item.remedy}" for item in shown)
        raise IsolationError(
            f"isolation={isolation!r} cannot be enforced here ({names}): {' | '.join(causes)}"
        )
