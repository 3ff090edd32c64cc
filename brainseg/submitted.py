"""Submitted: what stands behind `brainseg submit` and `brainseg jobs`, as commands.py stands behind the other words."""

from brainseg import submit as jobs
from brainseg.console import Voice
from brainseg.errors import UsageError, one_line


def submit(spec: str, address: str, voice: Voice, *, kind: str | None = None, detach: bool = False) -> int:
    """Submit a spec, or find the job that is at it; follow it unless told otherwise. Returns its exit code."""
    if kind not in (None, "train", "segment", "report"):
        raise UsageError(f"--job {one_line(str(kind))[:40]}: expected train, segment or report")
    made = jobs.submit(spec, address, kind=kind)  # type: ignore[arg-type]
    voice.say(f"job {made.id}" if made.is_new else f"job {made.id} is at this already")
    if detach:
        voice.result({"job": made.id, "is_new": made.is_new}, f"{jobs.again(made.id)}")
        return 0
    code = follow_job(made.id, address, voice)
    voice.result({"job": made.id, "is_new": made.is_new, "exit_code": code}, f"job {made.id} ended with exit code {code}")
    return code


def follow_job(job: str, address: str, voice: Voice) -> int:
    """Show a job's log until it ends; returns its exit code. Interrupted, it leaves the job running and says so."""
    try:
        return jobs.follow(address, job, voice.hear, voice.say)
    except KeyboardInterrupt:
        voice.say(f"the job goes on; {jobs.again(job)}, `brainseg jobs stop {job}` ends it")
        return 130


def list_jobs(address: str, voice: Voice) -> None:
    """Say which jobs the cluster remembers."""
    found = jobs.listed(address)
    voice.result({"jobs": found}, "\n".join(map(jobs.described, found)) or "no jobs of brainseg")


def stop_job(job: str, address: str, voice: Voice) -> None:
    """Ask a job to end."""
    jobs.stop(address, job)
    voice.say(f"job {job} is being stopped; what it has finished is kept")
