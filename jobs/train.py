"""Train a model as a spec says: `python jobs/train.py jobs/train-lgg.yaml`, here or by `ray job submit`."""

import sys

from brainseg import commands
from brainseg.console import Voice
from brainseg.errors import ExitCode
from brainseg.specs import TrainSpec, run


def train(spec: TrainSpec) -> ExitCode:
    """Build the recipe, train, and say what the model or models score on the patients kept back."""
    recipe = commands.recipe(
        spec.manifest,
        preset=spec.preset,
        config=spec.config,
        assignments=spec.set,
        fold=spec.fold,
        accept_leakage=spec.accept_leakage,
    )
    folds = commands.picked_folds(spec.cv, spec.folds, spec.fold)
    if spec.cv:
        commands.cross_validate(spec.manifest, spec.out, recipe, Voice(), folds=folds, workers=spec.workers)
    else:
        commands.train(spec.manifest, spec.out, recipe, Voice(), workers=spec.workers)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(run(TrainSpec, train, sys.argv[1:]))
