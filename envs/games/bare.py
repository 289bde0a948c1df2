"""FrozenLake and Sokoban in a form for models too small to read rules: the board and nothing else.

An observation is the board, without rules and words; Sokoban's is shown without its outer walls,
which are always there. The demonstrator answers with the bare action, such as `Right`. Boards,
rewards and what counts as an action are those of the games with words.
"""

from __future__ import annotations

from envs.games.base import TextGame
from envs.games.frozen_lake import FrozenLake
from envs.games.sokoban import Sokoban
from envs.gem import Info


class _Bare(TextGame):
    """What both games change: what the player is shown, and what the demonstrator writes."""

    def demonstrator_action(self) -> str | None:
        """Return the planner's next move without markup, or None where the game cannot be won."""
        action = super().demonstrator_action()
        return action and action.removeprefix("<answer>").removesuffix("</answer>")

    def _rows(self) -> list[str]:
        """Return the rows of the board."""
        return self._board().splitlines()[1:]  # the first line has words

    def _tell(self, observation: str, info: Info) -> str:
        del observation, info  # all words are left out
        return "\n".join(self._rows())


class BareFrozenLake(_Bare, FrozenLake):
    """FrozenLake, shown as its board alone."""


class BareSokoban(_Bare, Sokoban):
    """Sokoban, shown as its board alone, without the outer walls."""

    def _rows(self) -> list[str]:
        return [row[1:-1] for row in super()._rows()[1:-1]]
