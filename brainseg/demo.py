"""Demo: the whole way on synthetic heads, as a new user would walk it on an archive of their own."""

import shlex
import time
from pathlib import Path
from typing import Any

from brainseg import commands, storage
from brainseg.config import How
from brainseg.console import Voice
from brainseg.errors import ExitCode, UsageError
from brainseg.phantom import write_archive

SCANS, BROKEN, SEED = 46, 5, 7
MADE_HERE = ("archive", "manifest.parquet", "model", "run")


def run_demo(out: str, voice: Voice) -> int:
    """Make an archive, index, train, segment and report below `out`; returns the exit code (3: broken scans, by design).

    Raises UsageError where `out` holds something that is not a demo.
    """
    base = Path(storage.absolute(out))
    strangers = sorted(p.name for p in base.iterdir() if p.name not in MADE_HERE) if base.is_dir() else []
    if strangers:
        raise UsageError(f"{out} holds other things, such as {strangers[0]}; choose an empty folder with --out")
    started = time.monotonic()
    inner = Voice(quiet=voice.quiet)
    archive, manifest, model, run = (str(base / name) for name in MADE_HERE)
    voice.say(f"1/5  making {SCANS} synthetic heads, {BROKEN} of them damaged on purpose")
    if not Path(archive).exists():
        write_archive(archive, "lgg", scans=SCANS, broken=BROKEN, seed=SEED)
    voice.say("2/5  indexing the archive")
    commands.index(archive, manifest, inner)
    voice.say("3/5  training a small U-Net")
    recipe = commands.recipe(manifest, preset="demo", config=None, assignments=[], fold=0, accept_leakage=False)
    card = commands.train(manifest, model, recipe, inner)
    voice.say("4/5  segmenting the whole archive")
    counts = commands.segment(manifest, model, run, inner, How())
    voice.say("5/5  making the report")
    page = commands.report([run], None, inner)
    body = {
        "counts": counts,
        "held_out": card.metrics["held_out"],
        "baselines": card.baselines,
        "report": page,
        "seconds": round(time.monotonic() - started),
    }
    voice.result(body, _closing_words(out, body))
    return int(ExitCode.SOME_FAILED if counts["failed"] else ExitCode.OK)


def _closing_words(out: str, body: dict[str, Any]) -> str:
    """What came of it, where it is, and what to do next."""
    counts, dice = body["counts"], body["held_out"]["tumor"]["dice_mean"]
    copied = body["baselines"]["nearest_training_mask"]["tumor"]["dice_mean"]
    place = shlex.quote(out)
    return f"""
Done in {body["seconds"]} s.
  held-out patients   mean Dice per scan {dice:.3f}  (copying the nearest training mask: {copied:.3f}; predicting nothing: 0)
  archive             {counts["found"]} scans: {counts["ok"]} segmented, {counts["failed"]} quarantined (damaged on purpose)
  report              {body["report"]}
  masks and metrics   {place}/run/scans/*.parquet, {place}/run/metrics.parquet
Exit code {int(ExitCode.SOME_FAILED)} says that some scans failed; the report names each with its reason.

Your own archive:
  brainseg index /path/to/archive --out manifest.parquet
  brainseg train manifest.parquet --out model --fold 0
  brainseg segment manifest.parquet --model model --out run && brainseg report run"""
