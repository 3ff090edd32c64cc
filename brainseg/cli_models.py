"""The command line's words for models that are given away: `models` lists those that ship, `models release` makes one."""

from typing import Annotated

import typer

models = typer.Typer(
    invoke_without_command=True,
    help="The models that come with brainseg: what each was trained on, what it scores on whom, what it is not for.",
)


@models.callback()
def list_(
    context: typer.Context, json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False
) -> None:
    """List the models that come with brainseg: trained on what, scoring what on whom, and what they are not for."""
    if context.invoked_subcommand:
        return
    from brainseg import given_away
    from brainseg.console import Voice

    given_away.list_models(Voice(as_json=json_))


@models.command()
def release(
    model: Annotated[str, typer.Argument(help="A trained model's folder.")],
    out: Annotated[str, typer.Option(help="The folder to make: weights in float16, and the card with these terms.")],
    name: Annotated[str, typer.Option(help="What it will be called.")],
    data: Annotated[str, typer.Option(help="What it was trained on, whose that is, and where it comes from.")],
    licence: Annotated[str, typer.Option(help="Of the weights, such as 'CC BY 4.0'.")],
    unfit_for: Annotated[str, typer.Option(help="What it must not be used for.")],
    noncommercial: Annotated[
        bool, typer.Option("--noncommercial", help="The licence allows no commercial use: `segment` will ask first.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Make a trained model ready to be given away: half as large, with the terms it is given on."""
    from brainseg import given_away
    from brainseg.console import Voice

    words = {"data": data, "licence": licence, "unfit_for": unfit_for, "commercial": not noncommercial}
    given_away.release_model(model, out, name, words, Voice(quiet=quiet))
