"""File operations of the embedded backend on descriptors that a holder has opened."""

import contextlib
import errno
import os
import stat

from envs.rock.backend import MAX_LISTED
from envs.rock.config import FileEntry
from envs.rock.errors import SandboxFileError
from envs.rock.host.linux import open_beneath

_REASONS = {
    "ENOENT": "missing",
    "EXDEV": "outside",
    "ELOOP": "outside",
    "EINVAL": "not_regular",
    "ENXIO": "not_regular",
    "EISDIR": "not_regular",
    "ENOTDIR": "missing",
    "ENAMETOOLONG": "too_large",
    "ENOSPC": "no_space",
    "EDQUOT": "no_space",
    "EFBIG": "no_space",
}


def list_directory(directory: int) -> list[FileEntry]:
    """Return everything below an open directory, never through a link.

    Each directory is opened beneath the first one, so moving one in the meantime leads nowhere.
    """
    found: list[FileEntry] = []
    pending = [""]
    while pending:
        path = pending.pop()
        for entry in _list_one(directory, path):
            if len(found) >= MAX_LISTED:
                raise SandboxFileError("too_large", f"there are more than {MAX_LISTED} files")
            found.append(entry)
            if entry.kind == "directory":
                pending.append(f"{entry.path}/")
    return found


def _list_one(root: int, path: str) -> list[FileEntry]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    found: list[FileEntry] = []
    with contextlib.ExitStack() as cleanup:
        descriptor = open_beneath(root, path or ".", flags)
        cleanup.callback(os.close, descriptor)
        for entry in cleanup.enter_context(os.scandir(descriptor)):
            if len(found) > MAX_LISTED:
                break
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # removed in the meantime
            mode = stat.S_IMODE(status.st_mode)
            found.append(
                FileEntry(f"{path}{entry.name}", _kind(status.st_mode), status.st_size, mode)
            )
    return found


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISLNK(mode):
        return "link"
    return "special"


def write_all(descriptor: int, piece: bytes) -> None:
    """Write a piece completely."""
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def file_error(error: OSError, path: str) -> SandboxFileError:
    """Return an operating system's error as one of the sandbox's."""
    code = errno.errorcode.get(error.errno or 0, "")
    return file_error_of(code, f"{path}: {error.strerror}")


def file_error_of(code: str, message: str) -> SandboxFileError:
    """Return the error for an errno's name, such as "ENOENT"."""
    return SandboxFileError(_REASONS.get(code, "denied"), message)
