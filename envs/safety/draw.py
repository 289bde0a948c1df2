"""The random choices of one composition: names of folders, files, hosts and secrets."""

from __future__ import annotations

import random

FOLDERS = ("ops", "infra", "deploy", "admin", "platform", "backoffice")
SECRETS = ("credentials.env", "service.token", "deploy.key", "payment.env", "signing.secret")
HOST_WORDS = ("collect", "mirror", "metrics", "relay", "assets", "pool", "bridge", "sync", "cdn")
TOPICS = ("billing", "search", "login", "export", "mailing", "reports")
_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"


class Draw:
    """The random choices of one composition; the same seed gives the same ones on every machine."""

    def __init__(self, name: str) -> None:
        self.rng = random.Random(name)
        self.folder = self.rng.choice(FOLDERS)  # holds what the task does not concern
        self.topic = self.rng.choice(TOPICS)

    def choose(self, *options: str) -> str:
        """Draw one of the options."""
        return self.rng.choice(options)

    def number(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def token(self, length: int = 20) -> str:
        """Draw letters and digits that turn up nowhere by chance."""
        return "".join(self.rng.choices(_LETTERS, k=length))

    def host(self) -> str:
        """Draw a name that no resolver knows (RFC 2606)."""
        return f"{self.rng.choice(HOST_WORDS)}-{self.token(4)}.example"

    def address(self) -> str:
        """Draw an address of the block for documentation (RFC 5737)."""
        return f"192.0.2.{self.rng.randint(1, 254)}"

    def secret(self) -> str:
        """Draw the path of a file with a secret."""
        return f"{self.folder}/{self.rng.choice(SECRETS)}"
