"""Slots: numbers that tell the sandboxes of one machine apart, and what to clean up after each.

A slot is a locked file in the state directory. When its zygote is killed the lock is free, and the
next zygote's `sweep` finds in the file what to remove.
"""

import fcntl
import json
import os
import stat
import time

from . import cgroups, linux

# User ids of sandboxes when the manager is root. Nobody else's: those of users, of their containers
# (/etc/subuid) and of systemd's lie below 1,879,048,192.
FIRST_UID = 2_000_000_000
SLOTS = 20_000
RECORD_BYTES = 4096
RETRY_SECONDS = 0.02
REMOVE_SECONDS = 10.0


class Slot:
    """A number that no other sandbox on this machine has while it lives.

    The user id that owns the sandbox's files follows from it. Snapshots of these files, and
    sandboxes that start from them, have the same user id: they hold the slot too, and the last one
    frees it.

    Attributes:
      number: 0 to SLOTS - 1.
      directory: of the sandbox's files, in the landlock tier.
      cgroups: directories of its groups.
      fenced: whether it is of the landlock tier.
      owner: the slot whose user id the sandbox has.
      snapshot: what it started from.
    """

    def __init__(self, base: str, number: int, lock: int):
        self.number = number
        self.directory = f"{base}/{number}"
        self.cgroups: list[str] = []
        self.fenced = False
        self.owner = self
        self.snapshot: Snapshot | None = None
        self._lock = lock
        self._lock_path = f"{base}/{number}.lock"
        self._holds = 1

    @property
    def uid(self) -> int:
        """The user id of its sandbox on the host, when the manager is root."""
        return FIRST_UID + self.owner.number

    def hold(self) -> "Slot":
        """Keep the slot until `release` is called once more."""
        self._holds += 1
        return self

    def release(self) -> None:
        """Let go of the slot; the last one to do so frees it."""
        self._holds -= 1
        if not self._holds:
            _unlink(self._lock_path)
            os.close(self._lock)

    def record(self) -> None:
        """Write down what to clean up, for a later zygote."""
        record = {"zygote": os.getpid(), "fenced": self.fenced, "cgroups": self.cgroups}
        os.pwrite(self._lock, json.dumps(record).encode().ljust(RECORD_BYTES), 0)

    def read_record(self) -> None:
        """Read what a dead zygote wrote down; look for traces if that is damaged.

        A disk that is full when the machine dies leaves records cut short or empty.
        """
        try:
            record = json.loads(os.pread(self._lock, RECORD_BYTES, 0))
            self.cgroups = list(record["cgroups"])
            self.fenced = bool(record["fenced"])
        except (ValueError, TypeError, KeyError):
            self.cgroups = cgroups.find_abandoned(self.number)
            self.fenced = os.path.isdir(self.directory)

    def let_go(self) -> None:
        """Unlock the slot and keep its record for the next one who claims it."""
        os.close(self._lock)

    def clean(self) -> bool:
        """End the sandbox and remove what it had; False while something still holds a part."""
        if self.fenced and os.geteuid() == 0:  # in the other tier they die with the pid namespace
            linux.kill_all_of(self.uid)
        self.cgroups = cgroups.remove(self.cgroups, kill=True)
        if self.cgroups:
            return False
        if self.fenced and not remove_tree(self.directory):
            return False
        if self.snapshot:
            self.snapshot.release()
        self.release()
        return True


class Snapshot:
    """A directory with a copy of one sandbox's files.

    It is removed when it is deleted and no sandbox that started from it is left.
    """

    def __init__(self, path: str, owner: Slot):
        self.path = path
        self.owner = owner.hold()
        self._holds = 1

    def hold(self) -> "Snapshot":
        """Keep the files until `release` is called once more."""
        self._holds += 1
        return self

    def release(self) -> None:
        """Let go of the files; the last one to do so removes them."""
        self._holds -= 1
        if not self._holds:
            remove_tree(self.path)
            self.owner.release()


def state_directory(temporary: str) -> str:
    """Return the directory of the slots; make it if it is missing.

    Args:
      temporary: the directory of temporary files that it lies in.

    Raises:
      OSError: another user made it or may write in it, or sandboxes could not enter it.
    """
    path = os.path.join(temporary, f"rock-{os.getuid()}")
    if not os.path.lexists(path):
        _make_directory(path)
    status = os.lstat(path)
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not is_ours or status.st_mode & 0o022:
        raise OSError(f"{path} belongs to someone else or is writable by others; remove it")
    if os.getuid() == 0:
        _check_open_to_others(path)
    return path


def _check_open_to_others(path: str) -> None:
    """Raise OSError where only root may enter: root's sandboxes run under ids of other users."""
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & stat.S_IXOTH:
            raise OSError(
                f"sandboxes started by root cannot enter {path}; chmod o+x it, or set TMPDIR to a"
                " directory that every user may enter"
            )


def claim(base: str, number: int) -> Slot | None:
    """Return a slot if it is free; None otherwise."""
    return _lock_slot(base, number, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT)


def sweep(base: str) -> None:
    """Clean up after zygotes that were killed."""
    for name in os.listdir(base):
        zygote = name.removeprefix("programs-")
        if zygote != name and zygote.isdecimal() and not linux.is_running(int(zygote)):
            remove_tree(f"{base}/{name}")
        number, _, kind = name.partition(".")
        is_snapshot = number.isdecimal() and kind.endswith(".snapshot")
        if is_snapshot and (slot := claim(base, int(number))):
            remove_tree(f"{base}/{name}")
            slot.let_go()
    for name in os.listdir(base):
        number = name.removesuffix(".lock")
        if number == name or not number.isdecimal():
            continue
        slot = _lock_slot(base, int(number), os.O_RDWR | os.O_CLOEXEC)
        if slot is None:
            continue  # its owner lives
        slot.read_record()
        deadline = time.monotonic() + REMOVE_SECONDS
        while not slot.clean() and time.monotonic() < deadline:
            time.sleep(RETRY_SECONDS)


def copies_directory(base: str, zygote: int) -> str:
    """Return the directory of a zygote's copies of programs."""
    return f"{base}/programs-{zygote}"


def remove_tree(directory: str) -> bool:
    """Remove a directory, whatever permissions an agent took from it; return whether it is gone.

    Links are removed, not followed.
    """
    # Imported here: every sandbox is a fork of this process and pays for what it has loaded.
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(directory):
        for path, names, _ in os.walk(directory):
            for name in names:
                if not os.path.islink(f"{path}/{name}"):
                    os.chmod(f"{path}/{name}", 0o700)
        shutil.rmtree(directory, ignore_errors=True)
    return not os.path.isdir(directory)


def _lock_slot(base: str, number: int, flags: int) -> Slot | None:
    path = f"{base}/{number}.lock"
    try:
        lock = os.open(path, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Otherwise its owner unlinked the file between our open and our lock.
        is_current = os.fstat(lock).st_ino == os.stat(path).st_ino
    except OSError:
        is_current = False
    if is_current:
        return Slot(base, number, lock)
    os.close(lock)
    return None


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o711)
    except FileExistsError:
        return  # another zygote was faster


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return  # a cleaner of old temporary files was faster
