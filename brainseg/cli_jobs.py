"""The command line's words for a cluster that somebody runs: `submit`, and `jobs` to look after what was submitted."""

import sys
from typing import Annotated

import typer

Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's dashboard, such as http://head:8265. A token is found as Ray finds it, never in the address.",
    ),
]
Id = Annotated[str, typer.Argument(help="The job's id, as `submit` and `jobs list` say it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")]

jobs = typer.Typer(no_args_is_help=True, help="Jobs on a cluster: list them, follow one's log, stop one.")


def submit(
    spec: Annotated[str, typer.Argument(help="A job's YAML, such as those in jobs/.")],
    address: Address,
    job: Annotated[str | None, typer.Option(help="train, segment or report, where the spec could be of several.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Come back at once; `jobs logs` follows it later.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Submit a spec to a Ray cluster, follow its log, and end with the job's own exit code. Only code travels."""
    from brainseg import submitted
    from brainseg.console import Voice

    raise typer.Exit(submitted.submit(spec, address, Voice(quiet=quiet, as_json=json_), kind=job, detach=detach))


@jobs.command("list")
def list_(address: Address, json_: Json = False) -> None:
    """Every job of brainseg that the cluster remembers: its id, how it stands, what it makes."""
    from brainseg import submitted
    from brainseg.console import Voice

    submitted.list_jobs(address, Voice(as_json=json_))


@jobs.command()
def logs(job: Id, address: Address, quiet: Quiet = False) -> None:
    """Follow a job's log from its beginning until it ends, and end with its exit code."""
    from brainseg import submitted
    from brainseg.console import Voice

    raise typer.Exit(submitted.follow_job(job, address, Voice(quiet=quiet)))


@jobs.command()
def stop(job: Id, address: Address, quiet: Quiet = False) -> None:
    """Stop a job. What it has finished is kept; submitting its spec again goes on from there."""
    from brainseg import submitted
    from brainseg.console import Voice

    submitted.stop_job(job, address, Voice(quiet=quiet))


def joins_a_cluster() -> bool:
    """Whether the words of this process are for a cluster that somebody else runs."""
    return sys.argv[1:2] in (["submit"], ["jobs"])
