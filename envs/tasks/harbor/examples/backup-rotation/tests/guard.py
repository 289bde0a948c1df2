"""Runs a command and says whether all that it started has ended with it: a program of the agent's that lived on could overwrite the reward.

Ends with 0 if the command did, with 1 if it did not, and with 3 where something lives on. Any other end is this guard's own death.
"""
import ctypes
import os
import subprocess
import sys
import time

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
PATIENCE = 1.0  # seconds for a process that is about to end


def has_children():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return False
    return True


def main(command):
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whoever loses its parent becomes a child of this process, and cannot hide
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    code = subprocess.run(command).returncode
    deadline = time.monotonic() + PATIENCE
    while has_children():
        if time.monotonic() > deadline:
            sys.exit(3)
        time.sleep(0.01)
    sys.exit(0 if code == 0 else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
