"""Files through the editor, where it offers them: what is not saved yet is read as it is shown."""

from __future__ import annotations

from typing import Any

from acp import RequestError
from acp.schema import ClientCapabilities

from rome.agent.iflow.places.workspace import Workspace, WorkspaceError


class EditorFiles:
    """Makes workspaces that read and write text files through an editor.

    Args:
      client: connection to the editor.

    Attributes:
      session: id of the session; set once it is open.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.session = ""

    @classmethod
    def offered(cls, can: ClientCapabilities, client: Any) -> EditorFiles | None:
        """Return what the client offers; None where it does not both read and write."""
        files = can.fs
        is_offered = files is not None and files.read_text_file and files.write_text_file
        return cls(client) if is_offered else None

    def wrap(self, workspace: Workspace) -> Workspace:
        """Return a workspace with the editor's files; a sandbox has others, and stays as it is."""
        return workspace if workspace.is_isolated else _EditorWorkspace(workspace, self)


class _EditorWorkspace:
    """A workspace whose text files are the editor's; all else is done by the one within."""

    def __init__(self, within: Workspace, editor: EditorFiles) -> None:
        self._within = within
        self._editor = editor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._within, name)

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        """Return a file's content as the editor shows it; files that it has not, from the disk."""
        on_disk = await self._within.read(path, limit)
        if b"\0" in on_disk:
            return on_disk
        try:
            on_disk.decode()
            shown = await self._editor.client.read_text_file(
                session_id=self._editor.session, path=self._absolute(path)
            )
        except (UnicodeDecodeError, RequestError, ConnectionError):
            return on_disk
        return str(shown.content).encode()

    async def write(self, path: str, content: bytes) -> None:
        """Write a file through the editor; one that is no text, to the disk."""
        try:
            text = content.decode()
        except UnicodeDecodeError:
            await self._within.write(path, content)
            return
        try:
            await self._editor.client.write_text_file(
                session_id=self._editor.session, path=self._absolute(path), content=text
            )
        except (RequestError, ConnectionError) as error:
            raise WorkspaceError(f"the editor did not write {path}: {error}") from error

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._within.root}/{path}"
