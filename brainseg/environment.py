"""Environment: what Ray must find in the process's environment before it is imported. Entry points call this first.

Ray reads its authentication mode once, when it is imported. A local Ray that brainseg starts therefore needs its token
set by the entry point; a token or mode that is already there (a submitted job, a cluster's own) is left alone.
"""

import os
import secrets
from pathlib import Path

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Where Ray looks for a token, before ~/.ray/auth_token."""
ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""At 0 a node's address is 127.0.0.1, as it is by default on a Mac, and it listens on loopback alone; else Ray binds to every
network of the machine. A node that finds it at 0 cannot join others."""

FOR_WORKERS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",
}
"""What the processes of a Ray node should find. Threads that spin while they wait starve each other: on a machine that does
anything else a step takes 7 times as long. Some microseconds of it do no harm there, and on a quiet machine a step of two
threads is a sixth shorter than with none. Memory that glibc hands back for every volume and activation is page by page made
anew by the kernel: kept instead, a scan costs about 3 % less CPU time; the peak of a process was 793 MB for 783. One heap for
all threads: what the thread that decodes has freed serves the one that predicts, and a process that
took 40 scans of BraTS was at 1,004 MB from the 16th on; with a heap a thread it came to 1,117 MB, with two heaps to 1,175."""

FOR_A_NODE_OF_OUR_OWN = {
    ONE_MACHINE: "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "5",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""It keeps to itself, and leaves undone what nobody there looks at: new log files ten times a second, for a driver that asked
for no logs; every process's CPU and memory every 5 s, and each task's way, for a dashboard that is not there; the question,
from a process of its own, whether a cloud is about to take the one machine away. On two busy cores Ray's processes
and the driver took 0.16 of a core beside the actors, and without the first four of these 0.13."""


def prepare_environment(*, joins: bool = False) -> None:
    """Ask for token authentication with a token of this process's own, for loopback, for threads that wait quietly, and so on.

    Where the process `joins` a cluster that somebody else runs, its token is the one that Ray finds, if there is one.
    """
    if joins:
        if any(name in os.environ for name in TOKENS) or Path("~/.ray/auth_token").expanduser().is_file():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    elif "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ and "RAY_JOB_ID" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not joins and "RAY_ADDRESS" not in os.environ and "RAY_JOB_ID" not in os.environ:
        for name, value in FOR_A_NODE_OF_OUR_OWN.items():
            os.environ.setdefault(name, value)
    elif os.environ.get(ONE_MACHINE) == "0":  # a process of ours that kept to itself has started this one
        for name in FOR_A_NODE_OF_OUR_OWN:
            os.environ.pop(name, None)
    for name, value in FOR_WORKERS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
