"""Run by path as a small program: become the given command, and be killed when the parent process is.

`python -I -S die_with_parent.py PARENT_PID COMMAND...`. It stands between fork and exec because a `preexec_fn` may
dead-lock in a parent with threads. The kernel sends the signal when the parent's *thread* that forked ends, so the
parent must start it from a thread that lives as long as the parent.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for the signal, look whether the parent died meanwhile, become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # SIGKILL, not a polite signal: a part that is slow to stop would hold its port and its data against the successor
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # a shell that runs its commands in the background has SIGINT ignored, which would be inherited for good
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
