"""Faults from below: in every Python process that has this folder on its path, opening certain files has consequences.

`BRAINSEG_FAULTS` says which: `die:NAME` the process is killed, as by a decoder that crashes; `hang:NAME` the open does not
return, as on a mount that is dead; `freeze:NAME` the same, with Python's lock held; `memory:NAME` there is no memory. NAME is
any part of a path. The code under test is as it is.
"""

import os
import sys


def _consequence(what: str) -> None:
    import ctypes
    import signal
    import time

    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        time.sleep(3600)
    elif what == "freeze":
        ctypes.PyDLL(None).sleep(3600)
    elif what == "memory":
        raise MemoryError


def _install(rules: list[tuple[str, str]]) -> None:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path = str(arguments[0])
            for what, name in rules:
                if name in path:
                    _consequence(what)

    sys.addaudithook(hook)


if os.environ.get("BRAINSEG_FAULTS"):
    _install([(what, name) for what, _, name in (rule.partition(":") for rule in os.environ["BRAINSEG_FAULTS"].split(","))])
