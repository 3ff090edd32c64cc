"""Submit: hand a spec to a Ray cluster as a job, follow its log, and come back with the job's own exit code.

What travels is this package, with the models that ship in it, and the spec, nothing else. Data stays where it is; software
stands in the image of the nodes. A job is called after what it makes, so that asking twice for one run finds the job that is
at it. Scheduling, queueing and keeping the log are Ray's.
"""

import asyncio
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args
from urllib.parse import urlsplit

from brainseg.errors import ClusterError, ConfigError, ExitCode, PreflightError, UsageError, one_line
from brainseg.specs import KINDS, Kind, Spec, made_by, read_spec

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PREFIX = "brainseg"
PATIENCE_S = 600.0
"""A cluster that has not answered for so long is given up; the job goes on without us."""
RECONNECT_S = (0.5, 15.0)
"""Pause before the first try to reach the cluster again, and the longest one."""
LOST = (RuntimeError, OSError)
"""What Ray's client raises: RuntimeError with the page of a refusal in it, ConnectionError, or what its HTTP library has."""
SPEC = "spec.yaml"
NO_BYTECODE = shutil.ignore_patterns("__pycache__", "*.pyc")
Say = Callable[[str], None]
Hear = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """A job on a cluster. `is_new` is False where one was at this very run already."""

    id: str
    is_new: bool


def submit(path: str, address: str, *, kind: Kind | None = None) -> Submission:
    """Submit the spec's job, or find the one that is at the same output already.

    Raises ConfigError where the spec is none, PreflightError where the cluster cannot be reached or refuses us, and
    UsageError where a job with another spec is at this output.
    """
    kind = kind or kind_of(path)
    spec = read_spec(KINDS[kind], path)
    client = connect(address)
    name, mark = called(kind, spec), spec.fingerprint()
    before = [job for job in _jobs(client) if _is_attempt(job, name)]
    living = next((job for job in before if not job.status.is_terminal()), None)
    if living is not None:
        if (living.metadata or {}).get("spec") != mark:
            raise UsageError(f"job {living.submission_id} is making {made_by(spec)} from another spec; stop it first")
        return Submission(str(living.submission_id), is_new=False)
    attempt = f"{name}-{len(before) + 1}"
    about = {"job_submission_id": attempt, "kind": kind, "makes": made_by(spec), "spec": mark}
    with packed(Path(path)) as folder, _answered(address):
        made: str = client.submit_job(
            entrypoint=f"python -m brainseg.job {kind} {SPEC}",
            submission_id=attempt,
            runtime_env={"working_dir": str(folder)},
            metadata=about,
        )
    return Submission(made, is_new=True)


def kind_of(path: str) -> Kind:
    """The only kind of job whose keys the spec has; ConfigError where that is none. Some specs could be of several kinds."""
    named = re.match(r"(train|segment|report)\b", Path(path).name)
    fitting: list[str] = []
    problems: dict[str, ConfigError] = {}
    for kind in get_args(Kind):
        try:
            read_spec(KINDS[kind], path)
        except ConfigError as error:
            problems[kind] = error
        else:
            fitting.append(kind)
    wanted = named[1] if named else None
    if wanted in problems:
        raise problems[wanted]
    if wanted is None and len(fitting) != 1:
        could = " or ".join(fitting) or "none"
        raise ConfigError(f"{path}: it could be a spec of {could}; say which with --job train, segment or report")
    return cast(Kind, wanted or fitting[0])


def called(kind: Kind, spec: Spec) -> str:
    """The name of the jobs that make this output, whichever attempt."""
    return f"{PREFIX}-{kind}-{hashlib.sha256(made_by(spec).encode()).hexdigest()[:12]}"


def _is_attempt(job: "JobDetails", name: str) -> bool:
    return bool(job.submission_id) and str(job.submission_id).rpartition("-")[0] == name


@contextmanager
def packed(spec: Path) -> Iterator[Path]:
    """A folder with the code that runs here and the spec: what travels to the cluster."""
    with tempfile.TemporaryDirectory(prefix="brainseg-") as place:
        shutil.copytree(Path(__file__).parent, Path(place) / "brainseg", ignore=NO_BYTECODE)
        shutil.copyfile(spec, Path(place) / SPEC)
        yield Path(place)


# ---- the cluster ---------------------------------------------------------------------------------------------------------


def connect(address: str) -> "JobSubmissionClient":
    """Reach a cluster's dashboard. PreflightError says in one line why that failed; no key is ever part of an address."""
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise UsageError("--address cannot carry a password; the token is found as Ray finds it (RAY_AUTH_TOKEN)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--address {one_line(address)[:100]}: expected the dashboard's, such as http://head:8265")
    from ray.job_submission import JobSubmissionClient

    with _answered(address):
        return JobSubmissionClient(address, verify=True)


@contextmanager
def _answered(address: str) -> Iterator[None]:
    """What Ray's client raises where a cluster does not answer as it should, or does not let us in, as one line."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, *LOST) as error:
        said = one_line(str(error))
        if isinstance(error, AuthenticationError) or re.search(r"\b401\b|[Uu]nauthori[sz]ed", said):
            text = f"{address} wants a token, or another one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            raise PreflightError(text) from error
        raise PreflightError(f"{address} does not answer as a Ray dashboard: {said[:200]}") from error


def _jobs(client: "JobSubmissionClient") -> "list[JobDetails]":
    """Every job of brainseg that the cluster remembers, the newest last."""
    with _answered(client.get_address()):
        known = [job for job in client.list_jobs() if str(job.submission_id or "").startswith(f"{PREFIX}-")]
    return sorted(known, key=lambda job: job.start_time or 0)


def listed(address: str) -> list[dict[str, Any]]:
    """Every job of brainseg on the cluster: id, status, exit code, what it makes, when it began and ended."""
    return [
        {
            "id": job.submission_id,
            "status": job.status.value,
            "exit_code": job.driver_exit_code,
            "makes": (job.metadata or {}).get("makes"),
            "started_at": _moment(job.start_time),
            "ended_at": _moment(job.end_time),
        }
        for job in _jobs(connect(address))
    ]


def described(job: dict[str, Any]) -> str:
    """A line of the list for a person."""
    code = "" if job["exit_code"] is None else f" (exit code {job['exit_code']})"
    return f"{job['id']}  {job['status'].lower()}{code}  {job['started_at'] or ''}  makes {one_line(str(job['makes']))}"


def _moment(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else None


def stop(address: str, job: str) -> None:
    """Ask a job to end. What it has finished is kept, and submitting the same spec goes on from there."""
    client = connect(address)
    with _answered(address):
        client.stop_job(job)


# ---- following -----------------------------------------------------------------------------------------------------------


def follow(address: str, job: str, hear: Hear, say: Say, *, patience_s: float = PATIENCE_S) -> int:
    """Pass the job's log on as it grows, through dropped connections, until it ends; returns the driver's exit code.

    ClusterError where the cluster has not been heard of for `patience_s`: the job goes on all the same.
    """
    client, heard, pause = connect(address), 0, RECONNECT_S[0]
    last_contact = time.monotonic()
    while True:
        for text in _tail(client, job, heard):
            heard += len(text)
            hear(text)
            last_contact, pause = time.monotonic(), RECONNECT_S[0]
        info = _look(client, job)
        if info is None:
            if time.monotonic() - last_contact > patience_s:
                raise ClusterError(f"{address} has not answered for {patience_s:.0f} s; the job goes on: {again(job)}")
            say(f"the connection to {address} is gone; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, RECONNECT_S[1])
        elif info.status.is_terminal():
            with suppress(*LOST):  # what came after the last word of the tail
                hear(client.get_job_logs(job)[heard:])
            return _exit_code(info, say)
        else:
            last_contact = time.monotonic()
            time.sleep(RECONNECT_S[0])


def _look(client: "JobSubmissionClient", job: str) -> "JobDetails | None":
    """How a job stands; None where the cluster cannot be reached now. UsageError where it does not know the job."""
    try:
        return client.get_job_info(job)
    except LOST as error:
        if "does not exist" in str(error):
            raise UsageError(f"the cluster knows no job {one_line(job)[:100]}; see `brainseg jobs list`") from error
        return None


def again(job: str) -> str:
    """How a person comes back to a job."""
    return f"`brainseg jobs logs {job}` follows it again"


def _tail(client: "JobSubmissionClient", job: str, skip: int) -> Iterator[str]:
    """The log's text as it comes, without the first `skip` characters, until it ends or the connection is lost."""
    from aiohttp import ClientError

    lines: AsyncIterator[str] = client.tail_job_logs(job)
    with asyncio.Runner() as runner, suppress(ClientError, *LOST):
        while (text := runner.run(_next(lines))) is not None:
            fresh, skip = text[skip:], max(0, skip - len(text))
            if fresh:
                yield fresh


async def _next(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)


def _exit_code(info: "JobDetails", say: Say) -> int:
    """The driver's own; a job that never had one, or was stopped, counts as a crash."""
    status, code = str(info.status.value), info.driver_exit_code
    if status == "STOPPED":
        say("the job was stopped; what is finished is kept, and submitting it again goes on from there")
        return int(ExitCode.CRASH)
    if code is None:
        say(f"the job {status.lower()}: {one_line(info.message or 'Ray does not say why')[:300]}")
        return int(ExitCode.OK if status == "SUCCEEDED" else ExitCode.CRASH)
    return int(code) if code >= 0 else int(ExitCode.CRASH)
