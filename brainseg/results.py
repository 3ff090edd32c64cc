"""Results: what a finished command says to a person, from the figures that `--json` gives to a program."""

from collections.abc import Mapping
from typing import Any

from brainseg.aggregate import in_words
from brainseg.card import ModelCard
from brainseg.config import TrainConfig


def describe_model(card: ModelCard, out: str) -> str:
    """A trained model in a few lines: its held-out figures and those of the baselines, with their rule."""
    lines = [f"model '{card.name}' -> {out}"]
    for region, s in card.metrics.get("held_out", {}).items():
        lines.append(f"held-out fold, {region}: {_figures(s)} ({s['rule']}, {s['num_scans']} scans)")
        for name, summaries in card.baselines.items():
            if region in summaries:
                lines.append(f"  baseline {name.replace('_', ' ')}: {_figures(summaries[region])}")
    for region, s in card.metrics.get("held_out_chosen", {}).items():
        lines.append(f"{choice_words(card.chosen)}, {region}: {_figures(s)} ({s['rule']}, {s['num_scans']} scans)")
    if card.selection_biased:
        lines.append("selection_biased: the held-out fold also chose the checkpoint")
    return "\n".join(lines)


def choice_words(chosen: Mapping[str, Any]) -> str:
    """What a model's validation patients chose, or that they chose nothing."""
    flip = ", flipped" if chosen["settings"]["flip"] else ""
    what = f"threshold {chosen['threshold']:g}, smallest component {chosen['smallest_component']}{flip}"
    who = f"on {chosen['num_scans']} validation scans" if chosen["chosen_on"] else f"by nobody: {chosen['why']}"
    return f"held-out fold as chosen {who} ({what})"


def _figures(s: Mapping[str, Any]) -> str:
    mean, median = (f"{s[k]:.4f}" if s[k] is not None else "none" for k in ("dice_mean", "dice_median"))
    return f"Dice mean {mean}, median {median}; missed {s['states']['missed']}, spurious {s['states']['spurious']}"


def evaluation_lines(s: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> list[str]:
    """An evaluation in a few lines: denominators, then per split and region the figures with their rule."""
    c = s["counts"]
    counted = ", ".join(f"{c[k]} {k}" for k in ("found", "eligible", "segmented", "labelled", "evaluated", "failed"))
    lines = [f"scans: {counted}; rule {s['rule']}, threshold {_threshold(s)}"]
    lines += [f"! {line}" for line in s["alerts"]]
    for group in s["groups"]:
        for region in group["regions"]:
            lines.append(f"{group['split']}, {region['region']}: {_region_words(region)}")
            if group["split"] == s["headline"]:
                lines += [_baseline_words(b) for b in s["baselines"] if b["region"] == region["region"]]
    return lines + [_comparison_words(region, c) for region, c in (comparison or {}).items()]


def _comparison_words(region: str, c: Mapping[str, Any]) -> str:
    if c["difference"] is None:
        return f"against the other run, {region}: no scan that both scored"
    low, high = c["interval"]
    interval = "" if low is None else f" (95 % {low:+.4f} to {high:+.4f})"
    over = in_words(c["num_pairs"], c["num_patients"], c["num_unnamed"])
    return (
        f"against the other run, {region}: Dice {c['difference']:+.4f}{interval} over {over} "
        f"({c['num_left_out']} left out, both rightly empty), Wilcoxon p {c['wilcoxon_p']:.3g}"
    )


def _threshold(s: Mapping[str, Any]) -> str:
    """Threshold and, where one was used, component rule, with who chose them."""
    run = s["runs"][0]
    words = [f"{run['threshold']['value']}{_chosen_on(run['threshold'])}"]
    smallest = run.get("smallest_component") or {"value": 0}
    if smallest["value"]:
        words.append(f"smallest component {smallest['value']}{_chosen_on(smallest)}")
    return ", ".join(words)


def _chosen_on(setting: Mapping[str, Any]) -> str:
    return f" (chosen on {setting['chosen_on']})" if setting["chosen_on"] else ""


def _region_words(r: Mapping[str, Any]) -> str:
    low, high = r["dice_interval"]
    interval = f" (95 % {low:.4f} to {high:.4f})" if isinstance(low, float) and isinstance(high, float) else ""
    mean, median = (f"{r['dice'][k]:.4f}" if r["dice"][k] is not None else "none" for k in ("mean", "median"))
    counts = ", ".join(f"{r['states'][k]} {k.replace('_', ' ')}" for k in ("missed", "spurious", "both_empty"))
    over = in_words(r["num_scored"], r["num_patients_scored"], r["num_unnamed"])
    return f"Dice mean {mean}{interval}, median {median} over {over}; {counts}"


def _baseline_words(b: Mapping[str, Any]) -> str:
    tumours = "" if b["labelled_mean"] is None else f", {b['labelled_mean']:.4f} where the label is not empty"
    mean = "none" if b["mean"] is None else f"{b['mean']:.4f}"
    return f"  baseline {b['name'].replace('_', ' ')}: Dice mean {mean}{tumours}"


def recipe_line(p: TrainConfig) -> str:
    """A recipe by what it eats, what it answers, and how it learns."""
    eats = f"{p.prepare.size:>4} px  {', '.join(p.modalities) or 'any modality':<22}"
    return f"{p.name:<16} {eats} {', '.join(p.regions):<12} {p.loss.kind}, {p.optimiser.kind}, {p.epochs} epochs"


def shipped_words(model: Mapping[str, Any]) -> str:
    """A model that ships, in a few lines: what it eats, on whom it learnt, what it scores, its terms, what it is not for."""
    learnt, terms = model["trained_on"], model["terms"]
    unit = "images" if learnt["unit"] == "scan" else "patients"
    lines = [
        f"{model['name']}: {', '.join(model['modalities'])} -> {', '.join(model['regions'])}",
        f"  trained on    {learnt['train']} {unit}, chosen on {learnt['validation']}: {terms['data']}",
    ]
    for region, s in model["held_out"].items():
        lines.append(f"  scores        {_figures(s)} ({region}, {learnt['test']} {unit} kept back, {s['rule']})")
    commercial = "" if terms["commercial"] else "; no commercial use (--accept-noncommercial)"
    return "\n".join([*lines, f"  licence       {terms['licence']}{commercial}", f"  not for       {terms['unfit_for']}"])
