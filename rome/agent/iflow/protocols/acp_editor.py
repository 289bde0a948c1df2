"""Files through the editor, where it offers them: what is not saved yet is read as it is shown."""

from __future__ import annotations

from typing import Any

from acp import RequestError
from acp.schema import ClientCapabilities

from rome.agent.iflow.places.workspace import Workspace, WorkspaceError


def offers_files(can: ClientCapabilities) -> bool:
    """Return whether a client both reads and writes files."""
    files = can.fs
    return bool(files is not None and files.read_text_file and files.write_text_file)


class EditorWorkspace:
    """A workspace whose text files are the editor's; all else is done by the one within.

    Args:
      within: on this machine; a sandbox has other files than the editor.
      client: connection to the editor.

    Attributes:
      session: id of the session; set once it is open.
    """

    def __init__(self, within: Workspace, client: Any) -> None:
        self.session = ""
        self._within = within
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._within, name)

    async def read(self, path: str, limit: int = 4 << 20) -> bytes:
        """Return a file's content as the editor shows it; files that it has not, from the disk."""
        on_disk = await self._within.read(path, limit)
        if b"\0" in on_disk:
            return on_disk
        try:
            on_disk.decode()
            shown = await self._client.read_text_file(
                session_id=self.session, path=self._absolute(path)
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
            await self._client.write_text_file(
                session_id=self.session, path=self._absolute(path), content=text
            )
        except (RequestError, ConnectionError) as error:
            raise WorkspaceError(f"the editor did not write {path}: {error}") from error

    def _absolute(self, path: str) -> str:
        return path if path.startswith("/") else f"{self._within.root}/{path}"
