"""Draw results.json: one look tells which memory helps, at what cost, and where.

reads   results.json (eval.py); model.safetensors (its hash) and history.jsonl of the checkpoints it names;
        trained/explored.json (eval.py --explore), where there is one
writes  results.html, a page that needs no network: the answer, the pictures, a look into the memory;
        results.png; where results.json holds them, results_controls.png (detail.controls) and
        results_memory.png (detail.memory: what the memory did on one document)

    python plot_eval.py
    python plot_eval.py --quick
    python plot_eval.py --study     results_study.png, from results_study.json
    python plot_eval.py --readme    only the tables in README.md, from results.json,
                                    results_arms.json (six arms), results_bench.json, results_frozen.json
                                    and results_gpt2.json (add_memory.py --to MODEL)

Two arms give one picture, more of them another. Results of other checkpoints than those in the
root are refused. The same results give the same picture, byte for byte, whatever matplotlib's
settings are. The pictures also go to wandb: offline unless you are logged in, and not at all with
WANDB_MODE=disabled.
"""

import base64
import collections
import functools
import io
import itertools
import json
import os
import re
import string
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages import (ARMS, EOT, StageError, Wandb, command, default_root, one_line, parser_of,
                    read_json, run_stage, sha256, write_atomic)

# matplotlib is imported where it is used: --help need not wait for it, and its settings are
# ours (own_settings)

WIDTH = 9.0                     # inches
DPI = 200                       # pixels per inch: sharp at twice the 900 pixels that a README gives
INK = "#1a1a1a"
QUIET = "#595959"
NEUTRAL = "#a3a3a3"
FAINT = "#d9d9d9"
SHADE = "#f1f1f1"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "text.parse_math": False,   # a $ in a name is a $
    "svg.hashsalt": "results",  # the names in an SVG are the same every time
}

REFERENCE = "baseline"          # what every other arm is compared with
EXPLAINED = "with_ltm"          # the arm that detail.memory and detail.controls are about
VERDICTS = {"helps": "helps", "hurts": "hurts", "inconclusive": "has no clear effect on"}
SMOOTHING = 0.04                # share of the logged steps that one point of the smoothed hit rate averages
RESAMPLES = 10_000              # of the bootstrap over the repeats of the throughput measurement
SEED = 0

PARTS = {                       # of the validation documents, said; results of before had none
    "choosing": " on which settings were chosen",
    "reported": " (on the others settings were chosen)",
}
RATIOS = (                      # of tests/bench.py, those in README.md
    "steps/s over Hugging Face Trainer",
    "steps/s over the conventional compiled loop",
    "step time over the floor",
    "with_ltm over baseline, training",
    "with_ltm over baseline, evaluation",
    "generation over KV-cached GPT after 2,048 tokens",
)

# what a file of results raises that lacks a field, or has another thing in its place
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeWarning)

# results_memory.png
MONO = "DejaVu Sans Mono"
LETTER = 9.5                    # points
CELL = (0.08, 0.245)            # inches: width of a character (0.602 of its size, in whole pixels), height of a line
COLUMNS = 105                   # characters in a line
MOST_BITS = 16                  # where the scale of a token's cost ends: about log2 of the vocabulary
SOURCES = 3                     # how many of the stored tokens that a prediction drew on are shown ..
LEAST_SHARE = 0.05              # .. if they matter


class Look(NamedTuple):
    """How an arm is drawn: told apart by colour and brightness and, in print, by hatch, marker
    and dash."""

    color: str
    hatch: str
    marker: str
    line: object                # a linestyle of matplotlib's
    edge: str = "white"         # of the hatch


# in the order of ARMS; in grey their brightness tells them apart: 0.59, 0.25, 0.47, 0.83, 0.34, 0.70
LOOKS = (
    Look("#d98a2b", "////", "s", "--"),
    Look("#17497a", "", "o", "-"),
    Look("#2f9e77", "....", "^", "-."),
    Look("#f0c4de", "xxxx", "D", ":", QUIET),
    Look("#a8323e", "\\\\\\\\", "v", (0, (7, 2))),
    Look("#7fc4e8", "----", "P", (0, (4, 1, 1, 1, 1, 1)), QUIET),
    Look("#1f1a2b", "oo", "X", (0, (2, 1))),
    Look("#f7f0b5", "||||", "p", (0, (8, 1, 1, 1)), QUIET),
)
# controls have no colour: they are no designs of their own
CONTROL_LOOKS = (
    Look("#707070", "//", "*", (0, (3, 2))),
    Look("#cccccc", "..", "<", (0, (1, 2)), QUIET),
    Look("#424242", "xx", ">", (0, (6, 1))),
    Look("#b5b5b5", "\\\\", "h", (0, (3, 1, 1, 1)), QUIET),
    Look("#141414", "--", "d", (0, (5, 3))),
    Look("#9e9e9e", "||", "H", (0, (6, 1, 2, 1)), QUIET),
    Look("#595959", "++", "8", (0, (2, 2))),
    Look("#2b2b2b", "++++", (4, 1, 0), (0, (1, 1, 3, 1))),
    Look("#e3e3e3", "**", (5, 1, 0), (0, (9, 2)), QUIET),
    Look("#878787", "///", (6, 1, 0), (0, (9, 1, 3, 1))),
)
BLUE = LOOKS[1].color


def look_of(arm):
    """The look of an arm: the same whichever others are drawn with it."""
    control = ARMS[arm].control
    alike = [name for name in ARMS if ARMS[name].control == control]
    looks = CONTROL_LOOKS if control else LOOKS
    return looks[alike.index(arm) % len(looks)]


# ------------------------------------------------------------------------------------ what is drawn

def arms_of(results):
    """The arms of results.json in the order of ARMS; raises KeyError where one has no place
    there."""
    there = results["detail"]["arms"]
    unknown = [arm for arm in there if arm not in ARMS]
    if unknown:
        raise KeyError(f"{unknown[0]} is no arm of stages.py")
    return [REFERENCE] + [arm for arm in ARMS if arm in there and arm != REFERENCE]


def others_of(results):
    """All arms but the baseline; raises ValueError where there are none."""
    others = arms_of(results)[1:]
    if not others:
        raise ValueError("no arm but the baseline")
    return others


def added(results, arm):
    """The parameters that an arm has more than the baseline, said."""
    arms = results["detail"]["arms"]
    count = arms[arm]["memory_parameters"]
    if count == 0:                                          # a control that changes the backbone
        count = arms[arm]["parameters"] - arms[REFERENCE]["parameters"]
    return f"+{count_said(count)}"


def label_of(results, arm):
    """What an arm is called in a legend."""
    return results["detail"]["arms"][arm]["label"]


def short(results, arm):
    """What an arm is called in a sentence: what stands before the colon of its label."""
    return label_of(results, arm).partition(":")[0]


def per_cent(ratio):
    """A ratio as a change: 0.96 is -4.0."""
    return 100 * (ratio - 1)


def percent_bounds(part, arm):
    """The interval of an arm's change of BPC, in per cent of the baseline's."""
    return [per_cent(bound) for bound in part[arm]["ratio_ci95"]]


def why(error):
    """What is wrong with a file of results, in a few words."""
    return f"{type(error).__name__}: {one_line(error)}"


def verify(root, results, again):
    """[(arm, folder)] of all checkpoints, and those that are gone; raises StageError where one
    was changed since."""
    folders = []
    gone = []
    for arm in arms_of(results):
        for entry in results["detail"]["arms"][arm]["checkpoints"]:
            name = Path(entry["folder"])
            if name.is_absolute() or ".." in name.parts:
                raise StageError(f"results.json names a folder outside of {root}: {name}; make it again with: {again}")
            weights = root / name / "model.safetensors"
            if not weights.is_file():
                gone.append(str(name))
            elif sha256(weights) != entry["sha256"]:
                raise StageError(f"results.json is of another checkpoint than {weights}; rerun: {again}")
            home = name.parent.parent if name.parent.name == "checkpoints" else name
            config = root / home / "config.json"
            if config.is_file() and sha256(config) != entry["config_sha256"]:
                raise StageError(f"results.json is of another model than {config} describes; rerun: {again}")
            folders.append((arm, root / home))
    return folders, gone


def hit_rates(path):
    """The memory's hit rate at each logged step of a history.jsonl, (2, N); nothing where there
    is none."""
    rates = {}
    unread = 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line, parse_constant=int)                  # int("NaN") is a ValueError
            rates[int(row["step"])] = float(row["ltm_hit_rate"])        # of a step that was taken twice, the last
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            unread += 1
    if unread:
        print(f"warning: {path}: lines left out, as no hit rate can be read from them: {unread:,}")
    return np.array(sorted(rates.items()), float).reshape(-1, 2).T


# ------------------------------------------------------------------------------- parts of a picture

def heading(axes, title, what):
    """A panel's title in bold, below it what is measured, in which unit, and which direction is
    good."""
    axes.set_title(what, loc="left", fontsize=8.5, color=QUIET, pad=7)
    axes.annotate(title, (0, 1), (0, 21), xycoords="axes fraction", textcoords="offset points",
                  weight="bold", fontsize=10.5)


def share(axes, title, what="share right, higher is better", chance=None):
    """Title, y axis and grid of a panel of shares, with the line that guessing reaches."""
    heading(axes, title, what)
    axes.set(ylim=(0, 1.16), yticks=np.arange(0, 1.01, 0.2))
    axes.grid(axis="y")
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=1, linestyle=":")
        axes.annotate(f"chance {chance:.3g}", (0, chance), (3, 3), fontsize=8,
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points")


def spread(values, bounds):
    """[low, high] of each value as matplotlib's errors, (2, N), which are never negative."""
    low, high = np.array(bounds, float).T
    return np.clip([values - low, high - values], 0, None)


def filled(look):
    """How a bar of an arm is filled: the keywords that matplotlib takes."""
    return dict(facecolor=look.color, hatch=look.hatch, edgecolor=look.edge, linewidth=0)


def stroke(look):
    """How a curve of an arm is drawn."""
    return dict(color=look.color, linestyle=look.line, marker=look.marker, markersize=5,
                linewidth=1.8)


def inches(axes):
    """How wide a panel is."""
    return axes.get_position().width * axes.get_figure().get_figwidth()


def beside(axes, place, *lines):
    """Words to the right of a row's drawing, one line or two: [(words, how they look)]."""
    middle = (len(lines) - 1) / 2
    for number, (words, look) in enumerate(lines):
        axes.text(1 + BESIDE / inches(axes), place + 0.4 * (number - middle) + 0.03, words,
                  va="center",
                  transform=axes.get_yaxis_transform(), **look)


def distances_axis(axes, recall):
    """An x axis of the distances from a fact to its question, with what attention reaches."""
    places, window = recall["distances"], recall["window"]
    low, high = min(places) / 1.15, max(places) * 1.15
    octave = inches(axes) / np.log2(high / low)
    labels, last = [], 0.0
    for place in places:                                    # numbers that would touch are left out
        free = np.log2(place) * octave - last > 0.22
        labels.append(f"{place:,}" if free else "")
        last = np.log2(place) * octave if free else last
    axes.set_xscale("log", base=2)
    axes.axvspan(low, window, color=SHADE, linewidth=0)
    for place, label in (window, "attention window"), (recall.get("receptive_field") or 0,
                                                       "receptive field"):
        if low < place < high:
            axes.axvline(place, color=QUIET, linewidth=1, linestyle="-.")
            axes.text(place / 1.03, 0.95, f"{label} {place:,}", ha="right", va="center", fontsize=8,
                      transform=axes.get_xaxis_transform())
    axes.set_xlim(low, high)
    axes.set_xticks(places, labels, fontsize=8 if inches(axes) > 4.5 else 7)
    axes.minorticks_off()
    axes.set_xlabel("tokens from fact to question")


def draw_curve(axes, recall, arms):
    """Recall over the distance between a fact and the question for it."""
    distances_axis(axes, recall)
    for arm in arms:
        part = recall["arms"][arm]
        values = part["forced_choice"]
        axes.errorbar(recall["distances"], values, spread(values, part["forced_choice_ci95"]),
                      capsize=2.5, **stroke(look_of(arm)))
    share(axes, "Recall over distance", chance=recall["chance"])


def draw_history(axes, folders, title, evaluated):
    """memory_hit_rate as training went on: the first seed in full, the others thin."""
    drawn = set()
    for arm, folder in folders:
        steps, rates = hit_rates(folder / "history.jsonl")
        if not len(steps):
            continue
        look, first = look_of(arm), arm not in drawn
        half = int(len(steps) * SMOOTHING / 2)
        smooth = [np.mean(rates[max(0, at - half):at + half + 1]) for at in range(len(steps))]
        axes.plot(steps, rates, ".", color=look.color, markersize=4, alpha=0.2 * first,
                  markeredgewidth=0)
        axes.plot(steps, smooth, linestyle=look.line, color=look.color,
                  linewidth=2 if first else 0.8)
        drawn.add(arm)
    if not drawn:
        axes.text(0.5, 0.5, "no history.jsonl\nto draw it from", ha="center", color=QUIET,
                  transform=axes.transAxes)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("training step")
    share(axes, title, f"share of predictions; whole documents: {evaluated:.2f}")


def reach(far):
    """The distances of long-range recall: 160-384, with the dash of a range."""
    return f"{min(far['distances']):,}\u2013{max(far['distances']):,}"


def and_list(names):
    """Names as a sentence lists them: "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


# --------------------------------------------------------------------- the figure around the panels

def numbers_of(results, arm, name):
    """The two numbers that an arm stands on, beside the baseline's, in one line."""
    bpc, recall = results["detail"]["bpc"], results["detail"]["recall"]
    far, base, memory = recall["long_range"], results[REFERENCE], results[arm]
    verdict = far["arms"][arm]["verdict"]
    change = f"{per_cent(bpc[arm]['ratio']):+.1f}%, {bpc[arm]['verdict']}"
    return (f"{name}: BPC {memory['bpc']:.3f} vs {base['bpc']:.3f} ({change}), "
            f"recall {reach(far)} tokens back {memory['long_range_recall']:.2f} vs "
            f"{base['long_range_recall']:.2f} (chance {recall['chance']:.3g}, {verdict})")


def headline_of_two(results, arm):
    """The verdict on the one memory."""
    one = VERDICTS[results["detail"]["bpc"][arm]["verdict"]]
    two = VERDICTS[results["detail"]["recall"]["long_range"]["arms"][arm]["verdict"]]
    again = "" if one == two else f"{two} "
    return f"Memory {one} compression and {again}long-range recall"


def headline_of_many(results, others):
    """Which memories help, and which hurt, by the verdicts: a sentence of clauses. Controls
    stand in the table."""
    others = [arm for arm in others if not ARMS[arm].control] or others
    parts = {"compression": results["detail"]["bpc"],
             "long-range recall": results["detail"]["recall"]["long_range"]["arms"]}
    clauses = {}                                            # {who does what: to what}
    for verdict in ("helps", "hurts"):
        for what, part in parts.items():
            who = [short(results, arm) for arm in others if part[arm]["verdict"] == verdict]
            if not who and verdict == "hurts":
                continue
            do = verdict if len(who) < 2 else verdict[:-1]
            names = and_list(who) if who else "no memory"
            clauses.setdefault(f"{names} {do}", []).append(what)
    sentence = "; ".join(f"{clause} {and_list(whats)}" for clause, whats in clauses.items())
    return sentence[0].upper() + sentence[1:]


def headline(results):
    """The verdict in one line, and the numbers it stands on in another: those of the arm of the
    fewest bits."""
    bpc = results["detail"]["bpc"]
    others = others_of(results)
    for part in bpc, results["detail"]["recall"]["long_range"]["arms"]:
        for arm in others:
            VERDICTS[part[arm]["verdict"]]                  # KeyError: no verdict
    if len(others) == 1:
        return headline_of_two(results, others[0]), numbers_of(results, others[0], "With memory")
    best = min(others, key=lambda arm: bpc[arm]["ratio"])
    return headline_of_many(results, others), numbers_of(results, best,
                                                         f"Best, {short(results, best)}")


def made_on(run):
    """Device, torch and commit of what was measured; those of the trainings too, where they differ."""
    own, theirs = ("{device}, torch {torch}, commit {commit}".format(**part) for part in (run, run["trained_by"]))
    return own if own == theirs or not any(run["trained_by"].values()) else f"{own}; trained on {theirs}"


def provenance(results, gone, notes):
    """Where the numbers come from, in a few sentences."""
    detail = results["detail"]
    data, run = detail["data"], detail["run"]
    chained = ", chained rows" if run["settings"].get("chained") else ""
    steps = f"{run['steps']:,}"
    if "curve" in results:                                  # of the study, where each training has its own
        steps = f"{min(results['curve']['steps']):,} to {max(results['curve']['steps']):,}"
    words = [
        "Quick run. " * data["quick"] + f"Data: {textwrap.shorten(data['source'], 100)};",
        f"{data['val_documents']:,} validation documents{PARTS.get(data.get('part'), '')}, "
        f"{data['val_characters']:,} characters.",
        f"Model: {detail['arms'][REFERENCE]['parameters'] / 1e6:.1f}M parameters,",
        f"{steps} training steps{chained}, seeds: {', '.join(map(str, run['seeds']))}.",
        f"Hardware: {made_on(run)}.",
        notes]
    if gone:
        words.append(f"Checkpoints gone, not compared: {textwrap.shorten(', '.join(gone), 100)}.")
    return " ".join(words)


def new_figure(height, results, gone, title, sentence, notes, badge=0.8):
    """A figure `height` inches tall with title, sentence and, at its foot, where the numbers come from.

    `badge`: how many inches down it says that this is a quick run, where it is one.
    """
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height))
    figure.text(0.03, 1 - 0.14 / height, title, fontsize=14, weight="bold", va="top",
                linespacing=1.3)
    down = 0.48 + 0.28 * title.count("\n")
    figure.text(0.03, 1 - down / height, sentence, fontsize=9.5, va="top")
    if results["detail"]["data"]["quick"]:
        figure.text(0.97, 1 - badge / height, "QUICK RUN: shows that it runs, not what it is worth",
                    weight="bold", color="white", ha="right", va="top",
                    bbox=dict(facecolor=INK, edgecolor=INK))
    words = textwrap.fill(provenance(results, gone, notes), 156)
    figure.text(0.03, 0.1 / height, words, fontsize=7.5, color=QUIET, linespacing=1.35)
    return figure


class Page(NamedTuple):
    """A figure on which axes are placed in inches from the left margin and from the top."""

    figure: object

    def panel(self, left, down, wide, high, **limits):
        """Axes of some width and height."""
        height = self.figure.get_figheight()
        place = (0.03 + left / WIDTH, 1 - (down + high) / height, wide / WIDTH, high / height)
        return self.figure.add_axes(place, **limits)

    def text(self, left, down, columns, lines):
        """Axes whose unit is a character's cell."""
        axes = self.panel(left, down, columns * CELL[0], lines * CELL[1], xlim=(0, columns),
                          ylim=(lines, 0))
        axes.axis("off")
        return axes


def arms_legend(figure, results, arms, handle):
    """The legend of some arms; handle(look) makes what stands before a label."""
    handles = [handle(look_of(arm)) for arm in arms]
    labels = [f"{textwrap.shorten(label_of(results, arm), 40)} ({arm})" for arm in arms]
    figure.legend(handles, labels, loc="upper left", ncols=len(arms), frameon=False,
                  bbox_to_anchor=(0.022, 1 - 0.66 / figure.get_figheight()))


# -------------------------------------------------------------------------- results.png of two arms

def draw_bars(axes, form, groups):
    """Bars side by side from zero. groups: {label: ({arm: (value, [low, high])}, note above the
    bars)}."""
    arms = list(next(iter(groups.values()))[0])
    for number, arm in enumerate(arms):
        side = 0.4 * (number - (len(arms) - 1) / 2)
        values, bounds = zip(*(bars[arm] for bars, _ in groups.values()))
        bars = axes.bar(np.arange(len(groups)) + side, values, 0.38, yerr=spread(values, bounds),
                        capsize=3, ecolor=INK, **filled(look_of(arm)))
        axes.bar_label(bars, fmt=form, padding=3)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.4)
    for place, (_, note) in enumerate(groups.values()):
        axes.text(place, axes.get_ylim()[1], note, ha="center", va="top", fontsize=8.5)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def draw_compression_bars(axes, results, arms):
    """Documents differ, so an arm's interval of BPC is wide; the note is of the difference on
    the same documents."""
    detail, groups = results["detail"], {}
    for label, part in (("whole documents", detail["bpc"]),
                        ("128-token windows", detail["bpc_windows"])):
        bpc = {arm: (np.mean(part[arm]["per_seed"]), part[arm]["ci95"]) for arm in arms}
        low, high = percent_bounds(part, arms[-1])
        change = per_cent(part[arms[-1]]["ratio"])
        groups[label] = bpc, f"{change:+.1f}%\n({low:+.1f} to {high:+.1f})"
    draw_bars(axes, "{:.3f}", groups)
    heading(axes, "Compression", "bits per character (BPC), lower is better")


def draw_recall_bars(axes, results, arms):
    """Long-range recall, with the line of chance."""
    recall = results["detail"]["recall"]
    far = recall["long_range"]
    bars = {arm: (results[arm]["long_range_recall"], far["arms"][arm]["ci95"]) for arm in arms}
    draw_bars(axes, "{:.2f}", {f"{reach(far)} tokens back": (bars, "")})
    axes.set_xlim(-0.85, 0.45)
    share(axes, "Long-range recall", chance=recall["chance"])


def draw_speed_bars(axes, results, arms):
    """Evaluation's tokens a second; the note is of the same model with its memory off, timed in
    turn."""
    speed, rng, bars = results["detail"]["tokens_per_sec"], np.random.default_rng(SEED), {}
    for arm in arms:
        runs = speed[arm]["runs"]
        medians = np.median(rng.choice(runs, (RESAMPLES, len(runs))), axis=1)
        bars[arm] = results[arm]["tokens_per_sec"], np.percentile(medians, [2.5, 97.5])
    note = f"{per_cent(evaluation_ratio(results, arms[-1])):+.1f}%"
    if "ratio_ci95" in speed[arms[-1]]:
        low, high = percent_bounds(speed, arms[-1])
        note += f"\n({low:+.1f} to {high:+.1f})"
    draw_bars(axes, "{:,.0f}", {"evaluation": (bars, note)})
    axes.yaxis.set_major_formatter("{x:,.0f}")
    heading(axes, "Speed", "tokens/s, higher is better")


def draw_two(results, folders, gone):
    """results.png of the baseline and one memory."""
    from matplotlib.patches import Patch

    height, arms = 7.85, arms_of(results)
    trials = results["detail"]["recall"]["trials_per_distance"]
    notes = (f"Recall: forced choice, {trials:,} questions per distance. Per cent: the change with memory (of speed: "
             f"by the same model with its memory off). Error bars, brackets: 95% intervals.")
    figure = new_figure(height, results, gone, *headline(results), notes)
    arms_legend(figure, results, arms, lambda look: Patch(**filled(look)))
    panels = figure.subplot_mosaic("AAAAAA.BBBB..CCCC;DDDDDDDDDD.EEEEEE", gridspec_kw=dict(
        left=0.065, right=0.975, top=1 - 1.55 / height, bottom=1.15 / height, hspace=0.5, wspace=0))
    draw_compression_bars(panels["A"], results, arms)
    draw_recall_bars(panels["B"], results, arms)
    draw_speed_bars(panels["C"], results, arms)
    draw_curve(panels["D"], results["detail"]["recall"], arms)
    draw_history(panels["E"], folders, "Memory hits in training",
                 results[arms[-1]]["memory_hit_rate"])
    return figure


# ------------------------------------------------------------------------- results.png of more arms

ROW = 0.38                      # inches of an arm's row in the table
TABLE = {                       # its columns: inches from the left margin, and the width of what is drawn
    "names": (0.0, 1.5),
    "bpc": (1.4, 0.5),
    "change": (2.5, 0.95),
    "recall": (4.55, 0.75),
    "speed": (6.28, 0.6),
    "size": (7.65, 0.8),
}
BESIDE = 0.07                   # inches from there to the words


def bytes_said(count):
    """A number of bytes in figures that are read at a glance."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            break
        count /= 1000
    else:
        unit = "GB"
    return f"{count:.3g} {unit}"


def count_said(count):
    """A number of parameters: 1.05M, 104k, 6."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            break
        count /= 1000
    else:
        unit = "G"
    return f"{count:.3g}{unit}"


def evaluation_ratio(results, arm):
    """Evaluation's tokens a second by those of the same model with its memory off, timed in turn; by the baseline's
    where the arm has no memory."""
    speed = results["detail"]["tokens_per_sec"]
    if ARMS[arm].memory is None:
        return speed[arm]["median"] / speed[REFERENCE]["median"]
    return speed[arm]["ratio"]


def training_ratio(results, arm):
    """Training's tokens a second by the baseline's; None where a history.jsonl is gone."""
    training = results["detail"]["training"]
    rate, base = training[arm]["tokens_per_sec"], training[REFERENCE]["tokens_per_sec"]
    return rate / base if rate and base else None


def said_verdict(value, verdict, none):
    """A number and its verdict: in bold where it is clear; `none` says that it is not."""
    if verdict == "inconclusive":
        return f"{value} {none}", dict(color=QUIET, fontsize=8.5)
    return f"{value} {VERDICTS[verdict]}", dict(weight="bold", fontsize=8.5)


SMALL = dict(fontsize=8, color=QUIET)


def draw_names(axes, results, arms):
    """Before each row the arm's mark, as in the curves, and its label."""
    for place, arm in enumerate(arms):
        axes.plot([0.0, 0.14, 0.28], [place] * 3, markevery=[1], clip_on=False,
                  **stroke(look_of(arm)))
        label = label_of(results, arm)
        name, _, what = label.partition(":" if ":" in label else ",")
        name = textwrap.fill(name, 20 if what else 13, max_lines=1 if what else 2,
                             placeholder="\u2026")
        axes.text(0.34, place - 0.17 * bool(what), name, weight="bold", va="center", fontsize=8.5)
        axes.text(0.34, place + 0.23, textwrap.shorten(what, 24), va="center", **SMALL)
    axes.set(xlim=(0, 1.5), xticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_bpc(axes, results, arms):
    """Each arm's bits per character, from zero: how small the differences are, is part of the
    answer."""
    for place, arm in enumerate(arms):
        axes.barh(place, results[arm]["bpc"], 0.6, **filled(look_of(arm)))
        beside(axes, place, (f"{results[arm]['bpc']:.3f}", {}))
    axes.set_xlim(0, max(results[arm]["bpc"] for arm in arms))
    axes.locator_params(axis="x", nbins=2)
    heading(axes, "BPC", "bits per char.")


def draw_changes(axes, results, arms):
    """Each arm's BPC in per cent of the baseline's with its interval, and the verdict beside it."""
    bpc, base = results["detail"]["bpc"], look_of(REFERENCE)
    axes.axvline(0, color=base.color, linewidth=1.6, linestyle=base.line)
    edges = [0.0]
    for place, arm in enumerate(arms[1:], 1):
        change = per_cent(bpc[arm]["ratio"])
        low, high = percent_bounds(bpc, arm)
        axes.errorbar(change, place, xerr=spread(np.array([change]), [[low, high]]), capsize=3.5,
                      ecolor=INK,
                      **stroke(look_of(arm)))
        beside(axes, place, said_verdict(f"{change:+.1f}%", bpc[arm]["verdict"], "unclear"),
               (f"{low:+.1f} to {high:+.1f}", SMALL))
        edges += [low, high]
    beside(axes, 0, ("reference", SMALL))
    room = 0.12 * (max(edges) - min(edges)) or 1.0
    axes.set_xlim(min(edges) - room, max(edges) + room)
    axes.locator_params(axis="x", nbins=2)
    axes.xaxis.set_major_formatter("{x:g}%")
    heading(axes, "Change of BPC", "lower is better; 95%")


def draw_recalls(axes, results, arms):
    """Each arm's long-range recall with its interval, the verdict beside the number, and chance."""
    recall = results["detail"]["recall"]
    far = recall["long_range"]["arms"]
    for place, arm in enumerate(arms):
        value, (low, high) = results[arm]["long_range_recall"], far[arm]["ci95"]
        axes.barh(place, value, 0.6, xerr=spread(np.array([value]), [[low, high]]), capsize=2.5,
                  ecolor=INK,
                  **filled(look_of(arm)))
        said = (f"{value:.2f}", {})
        if arm != REFERENCE:
            said = said_verdict(f"{value:.2f}", far[arm]["verdict"], "unclear")
        beside(axes, place, said, (f"{low:.2f} to {high:.2f}", SMALL))
    axes.axvline(recall["chance"], color=INK, linewidth=1, linestyle=":")
    axes.set(xlim=(0, 1))
    axes.set_xticks([recall["chance"], 1], ["chance", "1"])
    heading(axes, "Long-range recall", f"right, {reach(recall['long_range'])} back")


def draw_speeds(axes, results, arms):
    """Speed by that without memory: of evaluation above, of training below."""
    most = 1.0
    for place, arm in enumerate(arms):
        evaluation, training = evaluation_ratio(results, arm), training_ratio(results, arm)
        for side, value in (-0.2, evaluation), (0.2, training or 0):
            axes.barh(place + side, value, 0.32, **filled(look_of(arm)))
            most = max(most, value)
        said = f"{training:.2f} train." if training else "\u2013"
        beside(axes, place, (f"{evaluation:.2f} eval.", dict(fontsize=8)), (said, dict(fontsize=8)))
    axes.axvline(1, color=look_of(REFERENCE).color, linewidth=1.6,
                 linestyle=look_of(REFERENCE).line)
    axes.set_xlim(0, most)
    axes.set_xticks([0, 1], ["0", "\u00d71"])
    heading(axes, "Speed", "higher is better")


def draw_sizes(axes, results, arms):
    """What a memory adds: its parameters, and what a sequence carries along."""
    for place, arm in enumerate(arms):
        about = results["detail"]["arms"][arm]
        parameters = count_said(about["parameters"]) if arm == REFERENCE else added(results, arm)
        state = "no" if about["state_bytes"] == 0 else bytes_said(about["state_bytes"])
        for side, words in (-0.17, f"{parameters} param."), (0.23, f"{state} state"):
            axes.text(0, place + side, words, va="center", fontsize=8)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    heading(axes, "Size", "what it adds")


def draw_table(page, down, results, arms):
    """The table: an arm a row, a measure a column."""
    high = ROW * len(arms)
    axes = {name: page.panel(left, down, wide, high) for name, (left, wide) in TABLE.items()}
    draw_names(axes["names"], results, arms)
    draw_bpc(axes["bpc"], results, arms)
    draw_changes(axes["change"], results, arms)
    draw_recalls(axes["recall"], results, arms)
    draw_speeds(axes["speed"], results, arms)
    draw_sizes(axes["size"], results, arms)
    for one in axes.values():
        one.set(ylim=(len(arms) - 0.5, -0.5), yticks=[])
        one.tick_params(axis="x", labelsize=8)
        one.patch.set_visible(False)                        # words reach past their panels
    rules = page.panel(0, down, WIDTH - 0.54, high, ylim=(len(arms), 0), zorder=-1)
    rules.hlines(range(1, len(arms)), 0, 1, color=FAINT, linewidth=0.6)
    rules.set_xlim(0, 1)
    rules.axis("off")


def draw_nats(axes, recall, arms):
    """What the right value costs each arm, over the distance to it."""
    distances_axis(axes, recall)
    for arm in arms:
        axes.plot(recall["distances"], recall["arms"][arm]["value_nats"], **stroke(look_of(arm)))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.16)
    axes.grid(axis="y")
    heading(axes, "Cost of the right value", "nats, lower is better")


def draw_targets(axes, targets, others):
    """By how many bits each arm differs from the baseline, by where the target was last seen in
    its document."""
    wide, narrow = 0.84 / len(others), len(others) > 6
    for number, arm in enumerate(others):
        side = (number - (len(others) - 1) / 2) * wide
        gaps = [kind["arms"][arm] - kind["arms"][REFERENCE] for kind in targets.values()]
        bars = axes.bar(np.arange(len(gaps)) + side, gaps, 0.9 * wide, **filled(look_of(arm)))
        said = [f"{gap:+.2f}" if abs(gap) >= 0.005 else "0" for gap in gaps]
        axes.bar_label(bars, said, padding=2, fontsize=6 if narrow else 7.5, rotation=90 * narrow)
    axes.axhline(0, color=look_of(REFERENCE).color, linewidth=1.6,
                 linestyle=look_of(REFERENCE).line)
    names = [f"{textwrap.fill(name, 26)}\n({kind['share_of_tokens']:.0%} of tokens)"
             for name, kind in targets.items()]
    axes.set_xticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.3 if narrow else 0.15)
    axes.grid(axis="y")
    heading(axes, "Where it helps",
            "bits a token more or fewer than without memory, by where the token was "
                                    "last seen; below zero is better")


def draw_many(results, gone):
    """results.png of the baseline and several memories: which help, at what cost, and where."""
    detail, arms = results["detail"], arms_of(results)
    title, sentence = headline(results)
    title = textwrap.fill(title, 74)
    quick = 0.32 * detail["data"]["quick"]
    table = 1.38 + 0.28 * title.count("\n") + quick          # inches from the top down to the table ..
    curves = table + ROW * len(arms) + 1.0                  # .. to the curves ..
    where = curves + 2.2 + 1.15                             # .. and to the bars below them
    height = where + 1.7 + 1.4
    trials = detail["recall"]["trials_per_distance"]
    notes = (f"Recall: forced choice, {trials:,} questions per distance. "
             f"Verdicts: Holm over the memories, unclear: neither. Speed: "
             f"evaluation by the same model with its memory off, training by the baseline's. State: what a "
             f"sequence carries beyond attention's keys and values. Error bars: 95% intervals.")
    page = Page(new_figure(height, results, gone, title, sentence, notes,
                           badge=table - 0.6 - quick))
    draw_table(page, table, results, arms)
    draw_curve(page.panel(0.33, curves, 3.9, 2.2), detail["recall"], arms)
    draw_nats(page.panel(4.75, curves, 3.7, 2.2), detail["recall"], arms)
    draw_targets(page.panel(0.33, where, 8.12, 1.7), detail["targets"], arms[1:])
    return page.figure


# ----------------------------------------------------------------------------- results_controls.png

def with_titles(controls):
    """The rows of detail.controls, each group of them below a row with its name."""
    rows = []
    for row in controls:
        if not rows or row.get("group") != rows[-1].get("group"):
            rows.append({"name": row.get("group") or "", "group": row.get("group"), "title": True})
        rows.append(row)
    return rows


def draw_control_bars(axes, rows, key, origin):
    """One number of each control as a bar from `origin`, and in figures."""
    for place, row in enumerate(rows):
        value = row.get(key)
        none = "" if "title" in row else "\u2013"
        axes.barh(place, 0 if value is None else value - origin, 0.62, left=origin, color=NEUTRAL)
        axes.text(1.02, place, none if value is None else f"{value:.3f}", va="center", fontsize=8,
                  transform=axes.get_yaxis_transform())
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def draw_controls(results, gone):
    """A table of bars, group by group: each control's BPC by the baseline's, and its long-range
    recall."""
    from matplotlib.lines import Line2D

    detail = results["detail"]
    rows, arms = with_titles(detail["controls"]), (REFERENCE, EXPLAINED)
    height = 2.7 + 0.22 * len(rows)
    trials = max(row.get("trials") or 0 for row in detail["controls"])
    notes = (f"Recall: forced choice, {trials:,} questions. Lines: all seeds; bars: seed "
             f"{detail['run']['seeds'][0]}, the first, not trained again.")
    sentence = numbers_of(results, EXPLAINED, "With memory")
    figure = new_figure(height, results, gone, "Controls: what the gain depends on", sentence,
                        notes)
    arms_legend(figure, results, arms,
                lambda look: Line2D([], [], color=look.color, linestyle=look.line))
    columns = figure.subplots(1, 2, sharey=True, gridspec_kw=dict(
        left=0.34, right=0.94, top=1 - 1.55 / height, bottom=0.95 / height, wspace=0.22))
    lines = {"bpc_ratio": (1, detail["bpc"][EXPLAINED]["ratio"]),
             "recall": [results[arm]["long_range_recall"] for arm in arms]}
    for axes, key, origin in zip(columns, lines, (1, 0)):
        draw_control_bars(axes, rows, key, origin)
        for arm, value in zip(arms, lines[key]):
            axes.axvline(value, color=look_of(arm).color, linestyle=look_of(arm).line,
                         linewidth=1.6)
    columns[1].set(xlim=(0, 1.02), ylim=(len(rows) - 0.4, -0.6))
    columns[1].set_yticks(range(len(rows)), [textwrap.shorten(row["name"], 42) for row in rows])
    for label, row in zip(columns[0].get_yticklabels(), rows):
        label.set(weight="bold" if "title" in row else "normal", fontsize=8.5)
    chance = f"chance {detail['recall']['chance']:.3g}"
    heading(columns[0], "BPC by the baseline's", "left of 1 is better than the baseline")
    heading(columns[1], "Long-range recall", f"share right, higher is better; {chance}")
    return figure


# -------------------------------------------------------------------------------- results_study.png

LONG = 46                       # characters of a row's name


def rows_of_study(results):
    """Rows for draw_control_bars: the trainings that are no point of the curve, group by group, and what
    is had without training."""
    usual = [row for row in results["rows"] if row["name"] in ("baseline_x1", "with_ltm_x1")]
    rows = [dict(row, group="as published") for row in usual]
    rows += [row for row in results["rows"] if row["group"] != "steps"]
    rows = [{"group": row["group"], "name": row["label"], "ratio": row["ratio"], "recall": row["recall"]["mean"]}
            for row in rows]
    rows += [{"group": "not trained: fitted on the baseline", "name": row["name"], "ratio": row["bpc_ratio"],
              "recall": row["recall"]} for row in results["training_free"]]
    return with_titles(rows)


def draw_steps(axes, steps, curves, what):
    """Curves over the steps of a training: {arm: a value for each}."""
    for arm, values in curves.items():
        axes.plot(steps, values, **stroke(look_of(arm)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [f"{number / 1_000:g}" for number in steps], fontsize=7.5)
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_xlabel("thousand steps")
    heading(axes, *what)


def recalls_of_study(results, field):
    """{arm: a share for each number of steps} of the curve."""
    points = {REFERENCE: {}, EXPLAINED: {}}
    for row in results["rows"]:
        if row["group"] == "steps" and row[field]:
            points[EXPLAINED if row["memory"] else REFERENCE][row["steps"]] = row[field]["mean"]
    steps = results["curve"]["steps"]
    return {arm: [own.get(at, np.nan) for at in steps] for arm, own in points.items()}


def draw_study(results):
    """The curve over steps, and what else would have bought the gain."""
    from matplotlib.lines import Line2D

    curve, rows = results["curve"], rows_of_study(results)
    height = 4.9 + 0.22 * len(rows)
    reaches = curve["baseline_reaches"]
    sentence = (f"Without a memory, the LTM's bits take some {round(reaches, -2):,.0f} steps (interpolated)."
                if reaches else "Without a memory, the LTM's bits are reached in none of these trainings.")
    fitted = results["training_free"]
    asked = f"; of what is fitted, {fitted[0]['trials']:,} questions" if fitted else ""
    figure = new_figure(height, results, [], "What else would have bought the gain", sentence,
                        f"Each training has a schedule of its own. Recall: forced choice, verbatim{asked}.")
    page = Page(figure)
    bits = {arm: curve[arm] for arm in (REFERENCE, EXPLAINED)}
    panels = ((bits, ("Bits per character", "lower is better")),
              ({EXPLAINED: curve["ratio"]}, ("BPC by baseline's", "below 1 is better")),
              (recalls_of_study(results, "recall"), ("Recall beyond", "the window, share right")),
              (recalls_of_study(results, "recall_inside"), ("Recall inside", "the window, share right")))
    for number, (curves, what) in enumerate(panels):
        axes = page.panel(0.4 + 2.15 * number, 1.5, 1.6, 1.5)
        if curve["steps"]:
            draw_steps(axes, curve["steps"], curves, what)
        if number > 1:
            axes.set(ylim=(0, 1.05))
            axes.axhline(results["detail"]["chance"], color=INK, linewidth=1, linestyle=":")
    handles = [Line2D([], [], **stroke(look_of(arm))) for arm in (REFERENCE, EXPLAINED)]
    figure.legend(handles, ["no memory", "LTM"], loc="upper right", bbox_to_anchor=(0.97, 1 - 0.2 / height),
                  ncols=2, frameon=False)
    columns = [page.panel(left, 4.1, wide, 0.22 * len(rows)) for left, wide in ((3.2, 2.2), (6.0, 2.0))]
    for axes, key, origin in zip(columns, ("ratio", "recall"), (1, 0)):
        draw_control_bars(axes, rows, key, origin)
        axes.set(ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), [])
    columns[1].set(xlim=(0, 1.02))
    columns[0].set_yticks(range(len(rows)), [textwrap.shorten(row["name"], LONG) for row in rows])
    for label, row in zip(columns[0].get_yticklabels(), rows):
        label.set(weight="bold" if "title" in row else "normal", fontsize=8.5)
    heading(columns[0], "BPC by the baseline's", "left of 1 is better")
    heading(columns[1], "Recall beyond the window", f"chance {results['detail']['chance']:.3g}")
    return figure


def plot_study(root, quick):
    """Write results_study.png; raises StageError where results_study.json is missing or damaged."""
    again, path = command("eval.py --study --report", root, quick), root / "results_study.png"
    results = read_json(root / "results_study.json", again)
    try:
        json.dumps(results, allow_nan=False)
        with own_settings(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            file = io.BytesIO()
            draw_study(results).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    except DAMAGE as error:
        raise StageError(f"{root}/results_study.json lacks a field or has a wrong one ({why(error)}); "
                         f"make it again with: {again}") from None
    write_atomic(path, file.getvalue())
    print(f"wrote {path}")


# ------------------------------------------------------------------------------- results_memory.png

def flow(texts):
    """The texts run on in lines of COLUMNS: [[(line, column, character)] of each], what the font lacks as a box.

    A line ends between words, and at newlines past its middle; a word longer than a line goes on in the next.
    """
    from matplotlib.font_manager import findfont, get_font

    glyphs = get_font(findfont(MONO)).get_charmap()
    line, column, cells = 0, 0, []
    for word in re.findall(r"[^\S\n]*\S+\n*|\s+", "".join(texts)):
        if column and column + len(word) > COLUMNS:
            line, column = line + 1, 0
        for letter in word:
            if column == COLUMNS:
                line, column = line + 1, 0
            shown = "\u00b6" if letter == "\n" else " " if letter.isspace() else letter
            drawn = shown.isprintable() and ord(shown) in glyphs
            cells.append((line, column, shown if drawn else "\u25a1"))
            column += column > 0 or shown != " "                # a line begins with its first word
        if "\n" in word and column > COLUMNS / 2:
            line, column = line + 1, 0
    cells = iter(cells)
    return [[next(cells) for _ in text] for text in texts]


def spans(cells):
    """[(line, first column, the one past the last)] that a token takes, without the spaces
    around it."""
    found = {}
    for line, column, _ in [cell for cell in cells if cell[2] != " "] or cells:
        found[line] = found.get(line, (column,))[0], column + 1
    return [(line, *columns) for line, columns in found.items()]


@functools.cache
def surprisal_colors():
    """What a token costs without the memory, in the baseline's colour; its brightness alone
    tells it, too."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("surprisal", ["#ffffff", "#fae6cd", "#efbd80",
                                                           "#d98a2b", "#8c500c"])


def draw_token(axes, cells, bits, stored):
    """A token on a ground that is the darker the more bits it cost (None: unknown), underlined
    where it was stored."""
    from matplotlib.patches import Rectangle

    ground = surprisal_colors()(min((bits or 0) / MOST_BITS, 1.0))
    ink = "white" if np.dot(ground[:3], (0.299, 0.587, 0.114)) < 0.45 else "black"
    for line, start, stop in spans(cells):
        wide = stop - start
        axes.add_patch(Rectangle((start, line + 0.17), wide, 0.67, color=ground, linewidth=0))
        if stored:
            axes.add_patch(Rectangle((start + 0.1, line + 0.86), wide - 0.2, 0.07, color=BLUE,
                                     linewidth=0))
        word = "".join(letter for at, _, letter in cells if at == line).strip(" ")
        axes.text(start, line + 0.67, word, family=MONO, fontsize=LETTER, color=ink,
                  alpha=1 if word.strip("\u00b6") else 0.5)


def chip(axes, x, y, letter, predicted):
    """The letter of a prediction in a disc: a dark one for the prediction itself, a light one
    for what it drew on."""
    ink, ground = ("white", BLUE) if predicted else (BLUE, "white")
    disc = dict(boxstyle="circle,pad=0.22", facecolor=ground, edgecolor=BLUE, linewidth=1)
    axes.text(x, y, letter, fontsize=6.5, weight="bold", ha="center", va="center", zorder=6,
              color=ink, bbox=disc)


def frame(axes, cells, letter, predicted, beside=0):
    """A box around a token, with the letter of its prediction; `beside`: letters that stand
    there already."""
    from matplotlib.patches import Rectangle

    for line, start, stop in spans(cells):
        axes.add_patch(Rectangle((start - 0.15, line + 0.1), stop - start + 0.3, 0.84, fill=False,
                                 zorder=5,
                                 edgecolor=BLUE, linewidth=1.8 if predicted else 1.2))
    line, start, _ = spans(cells)[0]
    chip(axes, start - 0.4 + 1.7 * beside, line + 0.14, letter, predicted)


def arrow(axes, start, stop, bend):
    """An arrow, edged in white, over the grounds of the text, but under its letters."""
    from matplotlib.patches import FancyArrowPatch

    form = dict(connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", shrinkA=0, shrinkB=0,
                mutation_scale=9)
    for width, color, height in (3, "white", 2.4), (1.4, BLUE, 2.5):
        axes.add_patch(FancyArrowPatch(start, stop, linewidth=width, color=color, zorder=height,
                                       **form))


def heaviest(read):
    """The stored tokens that are shown for a prediction: the first in any case, others where
    they matter."""
    return [source for rank, source in enumerate(read["from"][:SOURCES])
            if not rank or source["share"] >= LEAST_SHARE]


def draw_reads(axes, reads, texts):
    """Each prediction and the stored tokens it drew on, framed, with arrows from these to it."""
    framed = collections.Counter()
    for letter, read, bend in zip(string.ascii_uppercase, reads, itertools.cycle((0.12, -0.12))):
        line, start, stop = spans(texts[read["at"]])[0]
        for at in [source["at"] for source in heaviest(read)] + [read["at"]]:
            if at != read["at"]:
                above, first, last = spans(texts[at])[-1]
                arrow(axes, ((first + last) / 2, above + 0.95), ((start + stop) / 2, line + 0.1),
                      bend)
            frame(axes, texts[at], letter, at == read["at"], framed[at])
            framed[at] += 1


def draw_scale(axes, threshold):
    """The grounds by bits, with the `threshold` above which a token is stored."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=surprisal_colors(), extent=(0, MOST_BITS, 0, 1),
                aspect="auto")
    axes.set(yticks=[], xticks=[0, threshold, 8, 12, MOST_BITS])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(threshold, color=INK, linewidth=1)


def draw_key(axes, threshold):
    """What the marks in the text mean, in two lines of cells."""
    def spell(line, column):
        return [(line, column + at, letter) for at, letter in enumerate("token")]

    for line, column, more in (0, 1, 1), (1, 1, 1), (1, 11, -2):
        draw_token(axes, spell(line, column), threshold + more, more > 0)
    frame(axes, spell(1, 1), "A", False)
    arrow(axes, (6.2, 1.52), (10.8, 1.52), 0)
    frame(axes, spell(1, 11), "A", True)
    axes.text(18, 0.67, f"stored in memory: cost more than {threshold:g} bits")
    axes.text(18, 1.67, "prediction A, and the stored token it drew on")


def draw_cost_bars(axes, rows, tokens):
    """The bits of each prediction without and with the memory, in pairs of bars."""
    looks = (look_of(REFERENCE), look_of(EXPLAINED))
    for side, key, look, said in zip((-0.19, 0.19), ("bits", "bits_mixture"), looks,
                                     ("memory off", "memory on")):
        drawn = axes.barh(np.arange(len(rows)) + side, [tokens[at][key] for at in rows], 0.34,
                          **filled(look))
        first = axes.bar_label(drawn, fmt="{:.1f}", padding=3, fontsize=8.5)[0]
        first.set_text(f"{first.get_text()} {said}")
    axes.axvline(0, color=QUIET, linewidth=1)


def draw_costs(words, bars, found, reads, tokens, texts):
    """A row for each prediction: the token, its bits without and with the memory, and the stored
    tokens it drew on."""
    draw_cost_bars(bars, [read["at"] for read in reads], tokens)
    for row, (letter, read) in enumerate(zip(string.ascii_uppercase, reads)):
        chip(words, 0.08, row, letter, True)
        word = "".join(shown for _, _, shown in texts[read["at"]]).strip()
        words.text(0.22, row, word if len(word) < 15 else word[:14] + "\u2026", family=MONO,
                   va="center")
        lines = [f"{read['at'] - source['at']:,} tokens back: share {source['share']:.2g}, "
                 f"cosine {source['cosine']:.2f}" for source in heaviest(read)]
        found.text(0, row, "\n".join(lines), fontsize=8.5, va="center")
    for axes in words, bars, found:
        axes.set(ylim=(len(reads) - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[["bottom", "left"]].set_visible(False)
    heading(words, "Prediction", "the token that came")
    heading(bars, "What it cost", "bits, lower is better")
    heading(found, "What it drew on from memory",
            "share of all probability; cosine of the addresses")


def check_reads(reads, tokens):
    """Raise ValueError where a read is outside of the text."""
    for read in reads:
        sources = [source["at"] for source in read["from"]]
        if not all(0 <= at < read["at"] < len(tokens) for at in [0, *sources]):
            raise ValueError("detail.memory.reads: one is outside of the text, or draws on a later token")


def said_of(memory):
    """What the picture of a memory shows, in one sentence."""
    back = [read["at"] - source["at"] for read in memory["reads"] for source in heaviest(read)]
    found = f"the memory, along the arrows, up to {max(back):,}." if back else "nothing was drawn from memory."
    return (f"The start of validation document {memory['document']:,}. Attention reaches {memory['window']:,} "
            f"tokens back; {found}")


def draw_memory(results, gone):
    """The text of a document with what was stored of it, and predictions with the stored tokens they drew on.

    detail.memory: document, window (tokens), threshold (bits); tokens: [{text, bits, bits_mixture, stored}]; reads:
    [{at, from: [{at, share, cosine}]}], `at` counting tokens; raises ValueError where a read is outside of them.
    """
    memory = results["detail"]["memory"]
    tokens, reads, threshold = memory["tokens"], memory["reads"], memory["threshold"]
    check_reads(reads, tokens)
    texts = flow([token["text"] for token in tokens])
    places = texts[:]
    for at in reversed(range(len(texts) - 1)):          # a character of several tokens is the text of the last of them
        places[at] = places[at] or places[at + 1]
    lines = 1 + max(line for cells in texts for line, _, _ in cells)
    head = 1.6 + 0.3 * results["detail"]["data"]["quick"]
    under = head + lines * CELL[1]                      # inches from the top down to the end of the text
    row, foot = 0.42, 0.6 + 0.75 * bool(reads)
    height = under + foot + row * len(reads)
    notes = "Cost: -log2 of the token's probability, of one model with its memory off and on."
    title = "What the memory keeps, and what it finds again"
    page = Page(new_figure(height, results, gone, title, said_of(memory), notes, badge=1.52))
    page.figure.text(0.03, 1 - 0.96 / height, "cost of a token, memory off, bits")
    draw_scale(page.panel(0, 1.04, 2.1, 0.15), threshold)
    draw_key(page.text(3.2, 0.82, 65, 2), threshold)
    text = page.text(0, head, COLUMNS, lines)
    for token, cells in zip(tokens, texts):
        draw_token(text, cells, token["bits"], token["stored"])
    draw_reads(text, reads, places)
    if reads:
        most = max(tokens[read["at"]][key] for read in reads for key in ("bits", "bits_mixture"))
        columns = [page.panel(left, under + 0.65, wide, row * len(reads), xlim=(0, end))
                   for left, wide, end in ((0, 1.5, 1.5), (1.6, 2.1, most), (5.2, 3.2, 3.2))]
        draw_costs(*columns, reads, tokens, places)
    return page.figure


# -------------------------------------------------------------------------- the tables of README.md

def cell(words):
    """Words as a cell of a table, or in the line below one: on one line, without markup."""
    return " ".join(str(words).split()).replace("<", "&lt;").replace("|", "\\|")


def markdown(header, rows, small_print):
    """A table with a line of small print below it."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n<sub>{cell(small_print)}</sub>\n"


def from_to(bounds, form):
    """An interval in words."""
    low, high = bounds
    return f"{low:{form}} to {high:{form}}"


def how_trained(results):
    """10,000 steps of 8 x 128 tokens, seeds 0, 1 and 2."""
    run, window = results["detail"]["run"], results["detail"]["recall"]["window"]
    seeds = and_list([str(seed) for seed in run["seeds"]])
    plural = "s" if len(run["seeds"]) > 1 else ""
    return f"{run['steps']:,} steps of {run['settings']['batch']} x {window} tokens, seed{plural} {seeds}"


def where_measured(results):
    """The small print: data, device, code."""
    data, run = results["detail"]["data"], results["detail"]["run"]
    return f"{data['source']}: {data['val_documents']:,} validation documents. {made_on(run)}."


def reach_said(recall):
    """The distances of long-range recall, and chance, in words."""
    far = recall["long_range"]["distances"]
    return f"{min(far):,} to {max(far):,} tokens back (chance {recall['chance']:.3g})"


def bpc_row(name, part, arm):
    """A row of bits per character: without and with the memory, the difference and its interval."""
    base, own = (np.mean(part[which]["per_seed"]) for which in (REFERENCE, arm))
    gap = part[arm]["difference"]
    said = f"{gap['mean']:+.3f} ({from_to(gap['ci95'], '+.3f')}), x {part[arm]['ratio']:.3f}"
    return [name, f"{base:.4f}", f"{own:.4f}", said]


def recall_rows(recall, arm, tokens):
    """The two rows of long-range recall: of 8 values, and of all tokens of the vocabulary."""
    base, own = (recall["long_range"]["arms"][which] for which in (REFERENCE, arm))
    gap = own["difference"]
    said = f"{gap['mean']:+.3f} ({from_to(gap['ci95'], '+.3f')})"
    of_all = f"95% interval {from_to(own['top1_ci95'], '.3f')}"
    return [
        [f"**long-range recall**, {reach_said(recall)}", f"{base['mean']:.3f}",
         f"{own['mean']:.3f}", said],
        [f"the same, likeliest of all {tokens:,} tokens (top-1)", f"{base['top1']:.3f}",
         f"{own['top1']:.3f}", of_all]]


def training_row(results, arm):
    """Tokens a second of both trainings; nothing where a history.jsonl was gone."""
    training = results["detail"]["training"]
    row = ["training, tokens/s"]
    for which in (REFERENCE, arm):
        rate = training[which]["tokens_per_sec"]
        row.append(f"{rate:,.0f}" if rate else "")
    ratio = training_ratio(results, arm)
    return row + [f"x {ratio:.3f}" if ratio else ""]


def evaluation_row(results, arm):
    """Tokens a second of both evaluations; the ratio is to the same model, memory off, timed in
    turn."""
    base, own = (results[which]["tokens_per_sec"] for which in (REFERENCE, arm))
    part = results["detail"]["tokens_per_sec"][arm]
    said = f"x {part['ratio']:.3f} ({from_to(part['ratio_ci95'], '.3f')}) by memory off"
    return ["evaluation, tokens/s", f"{base:,.0f}", f"{own:,.0f}", said]


def table_of_results(results):
    """The baseline and the one memory of ./run_all.sh, a measure a line."""
    detail, arm = results["detail"], others_of(results)[0]
    hits = f"{results[arm]['memory_hit_rate']:.3f}"
    rows = [
        bpc_row("**bits per character**, whole documents", detail["bpc"], arm),
        bpc_row("bits per character, 128-token windows", detail["bpc_windows"], arm),
        *recall_rows(detail["recall"], arm, detail["data"].get("vocabulary", EOT + 1)),
        ["share of " + detail["arms"][arm]["hit_means"], "", hits, ""],
        training_row(results, arm),
        evaluation_row(results, arm)]
    labels = [cell(label_of(results, which)) for which in (REFERENCE, arm)]
    header = [how_trained(results), *labels, "difference (95% interval)"]
    return markdown(header, rows, where_measured(results))


def row_of_arm(results, arm):
    """An arm of the table of arms."""
    detail = results["detail"]
    about, part = detail["arms"][arm], detail["bpc"][arm]
    seeds = [one["seed"] for one in about["checkpoints"]]
    fewer = f" (seed{'s' * (len(seeds) > 1)} {and_list(map(str, seeds))})" * (seeds != detail["run"]["seeds"])
    label, bpc = cell(about["label"] + fewer), f"{results[arm]['bpc']:.4f}"
    recall = f"{detail['recall']['long_range']['arms'][arm]['mean']:.3f}"
    if arm == REFERENCE:
        return [label, "", bpc, "", "", recall, "", ""]
    rate = training_ratio(results, arm)
    return [label, added(results, arm), bpc,
            f"{part['ratio']:.3f} ({from_to(part['ratio_ci95'], '.3f')})",
            (VERDICTS | {"inconclusive": "unclear"})[part["verdict"]], recall,
            f"x {rate:.2f}" if rate else "", bytes_said(about["state_bytes"])]


def table_of_arms(results):
    """All arms but the controls, each on one line."""
    header = ["arm", "parameters", "bits per character", "x baseline (95%)", "compression",
              f"recall {reach_said(results['detail']['recall'])}", "training speed", "state"]
    rows = [row_of_arm(results, arm) for arm in arms_of(results) if not ARMS[arm].control]
    chained = ", chained" if results["detail"]["run"]["settings"].get("chained") else ""
    return markdown(header, rows, f"{how_trained(results)}{chained}. {where_measured(results)}")


def rows_of_host(results):
    """The arms on a model that was trained already, each on one line."""
    detail = results["detail"]
    bpc, recall, training = detail["bpc"], detail["recall"]["long_range"]["arms"], detail["training"]
    rows = []
    for arm in arms_of(results):
        ratio = "" if arm == REFERENCE else f", x {bpc[arm]['ratio']:.3f}"
        rate = training[arm]["tokens_per_sec"]
        label = cell(short(results, arm))
        if arm == REFERENCE:
            label = f"**{cell(Path(detail['run']['settings']['to']).name)}**, {label}"
        rows.append([label, count_said(detail["arms"][arm]["trained_parameters"]),
                     f"{results[arm]['bpc']:.4f}{ratio}", f"{recall[arm]['mean']:.3f}",
                     f"{rate:,.0f}" if rate else ""])
    return rows


def table_of_hosts(*several):
    """Memories on models that were trained already and stay as they are; their small print, where it
    differs.
    """
    header = ["on a trained model", "learns", "bits per character", "recall", "training, tokens/s"]
    rows = [row for results in several for row in rows_of_host(results)]
    prints = {}
    for results in several:
        run = results["detail"]["run"]
        rows_are = "chained" if run["settings"].get("chained") else "isolated"
        same = f"{how_trained(results)}, {rows_are} rows. {run['device']}"
        prints.setdefault(same, {})[run["commit"]] = None       # an ordered set
    return markdown(header, rows, " ".join(f"{same}, commit {' and '.join(of)}." for same, of in prints.items()))


def table_of_speed(bench):
    """Some ratios of tests/bench.py."""
    found = {row["what"]: row for row in bench["compared"]}
    rows = []
    for what in RATIOS:
        row = found[what]
        rows.append([what, f"x {row['median']:.2f}", from_to((row["low"], row["high"]), ".2f")])
    run = bench["run"]
    small_print = (f"{run['size']} model, batch {run['batch']}. {run['device']}, torch {run['torch']}, "
                   f"commit {run['commit']}.")
    return markdown(["", "median", "lowest to highest round"], rows, small_print)


TABLES = {                      # of README.md: what it is made from, and the command that makes that
    "results": ("results.json", table_of_results, "python eval.py --report"),
    "arms": ("results_arms.json", table_of_arms, "./run_all.sh --memories"),
    "speed": ("results_bench.json", table_of_speed, "python tests/bench.py"),
    "frozen": ("results_frozen.json results_gpt2.json", table_of_hosts, "python add_memory.py --to MODEL"),
}


def of_old_layout(results):
    """Whether a results.json was written before arms were data."""
    detail = results.get("detail")
    return isinstance(detail, dict) and "arms" not in detail


def part_of(results):
    """Which documents a file of results is of; None where it does not say, or says nonsense."""
    data = results.get("detail", {}).get("data") if isinstance(results.get("detail"), dict) else None
    return data.get("part") if isinstance(data, dict) else None


def tables(root):
    """({name: markdown}, {name: why it is left as it is}) of README.md; raises StageError where
    a field is wrong."""
    made, left = {}, {}
    for name, (files, table_of, again) in TABLES.items():
        values, reasons = [], []
        for path in map(root.joinpath, files.split()):
            value = read_json(path, again) if path.exists() else None
            if value is None:
                reasons.append(f"{path} is missing; make it with: {again}")
            elif of_old_layout(value):
                reasons.append(f"{path} is of an earlier version; make it again with: {again}")
            elif part_of(value) == "choosing":
                reasons.append(f"{path} is of the documents on which settings were chosen; report with: {again}")
            values.append(value)
        if reasons:
            left[name] = "; ".join(reasons)
            continue
        try:
            json.dumps(values, allow_nan=False)
            made[name] = table_of(*values)
        except DAMAGE as error:
            where = " or ".join(str(root / file) for file in files.split())
            raise StageError(f"{where} lacks a field or has a wrong one ({why(error)}); "
                             f"make it again with: {again}") from None
    return made, left


def between_markers(name):
    """A pattern of the text that a table of README.md stands in: (what is before, the table,
    what is after)."""
    return re.compile(rf"(<!-- table: {name} -->\r?\n)((?:(?!<!-- ).)*)(<!-- end of table -->)",
                      re.DOTALL)


def write_readme(root):
    """Write the tables of README.md, and nothing else of it."""
    path = root / "README.md"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise StageError(f"{path} is not UTF-8; mend that and run again") from None
    made, left = tables(root)
    before = text
    for name, table in made.items():
        found = between_markers(name).findall(text)
        if len(found) != 1:
            raise StageError(f"{path} needs the line <!-- table: {name} --> once, and <!-- end of table --> "
                             f"below it; put them there and run again")
        text = between_markers(name).sub(lambda match: match[1] + table + match[3], text)
    for name, reason in left.items():
        print(f"note: the table of {name} is left as it is: {reason}")
    if text != before:
        write_atomic(path, text)
    print(f"wrote {path}: {', '.join(made) or 'nothing'}")


# ----------------------------------------------------------------------------------- results.html

LINE = (WIDTH - 0.4) / 2        # inches of a picture that stands beside another
ASKED_AGAIN = ("results.json holds nothing of what the explorer shows: it was made by an earlier "
               "eval.py, or without its text. To fill it: ")


class Finding(NamedTuple):
    """A part of the page: a question, what was found in sentences, pictures and a table."""

    title: str
    words: list = []
    pictures: list = []         # names of pictures_of_page
    table: tuple = ()           # header, rows


def luminance(color):
    """The relative luminance of a colour #rrggbb, as WCAG 2 defines it."""
    parts = [int(color[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    """The contrast of two colours, 1 to 21; WCAG AA asks for 4.5."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def palette():
    """[(ground, ink)] of a token that cost 0, 1, .. MOST_BITS bits: the ink that is told best."""
    from matplotlib.colors import to_hex

    grounds = [to_hex(surprisal_colors()(bits / MOST_BITS)) for bits in range(MOST_BITS + 1)]
    inks = ("#000000", "#ffffff")
    return [(ground, max(inks, key=functools.partial(contrast, ground))) for ground in grounds]


def as_picture(figure):
    """A figure as the address of an SVG that an <img> shows: what it names is its own.

    Its coordinates, of 72 to an inch, come to two decimals, and its hatches are as wide as they
    look on paper: together this is a quarter of its size.
    """
    from matplotlib.patches import Patch

    def rounded(path):
        return re.sub(r"(\.\d\d)\d+", r"\1", path[0])

    for patch in figure.findobj(Patch):
        patch.set_hatch((patch.get_hatch() or "")[:2])
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r' d="[^"]*"', rounded, file.getvalue()).encode()
    return "data:image/svg+xml;base64," + base64.b64encode(text).decode()


def panel_of(draw, results, arms, wide=LINE, high=2.4, left=0.5, right=0.12):
    """One panel with its legend as a picture; draw(axes) fills it. Inches."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(1, int(wide / 1.6))
    rows = -(-len(arms) // columns)
    top, bottom = 0.6, 0.62 + 0.19 * rows
    figure = Figure((wide, top + high + bottom))
    height = figure.get_figheight()
    axes = figure.add_axes((left / wide, bottom / height, (wide - left - right) / wide, high / height))
    draw(axes)
    if arms:
        handles = [Line2D([], [], **stroke(look_of(arm))) for arm in arms]
        labels = [textwrap.shorten(short(results, arm), 24, placeholder="\u2026") for arm in arms]
        figure.legend(handles, labels, loc="lower left", ncols=columns, frameon=False, fontsize=8,
                      handlelength=3)
    return as_picture(figure)


def rows_of_arms(axes, results, arms):
    """The names of arms at a panel's rows."""
    names = [textwrap.fill(short(results, arm), 17, max_lines=2, placeholder="\u2026") for arm in arms]
    axes.set(ylim=(len(arms) - 0.5, -0.5))
    axes.set_yticks(range(len(arms)), names, fontsize=8.5)
    axes.tick_params(axis="y", length=0)


def panel_in_rows(draw, results, arms, right):
    """A panel with a row for each arm."""
    def filled(axes):
        draw(axes, results, arms)
        rows_of_arms(axes, results, arms)

    return panel_of(filled, results, [], high=ROW * len(arms), left=1.3, right=right)


def pictures_of_page(results):
    """{name: address} of the page's pictures."""
    detail, arms = results["detail"], arms_of(results)
    recall = detail["recall"]
    found = {"bpc": panel_in_rows(draw_changes, results, arms, 1.15),
             "recall": panel_in_rows(draw_recalls, results, arms, 1.0),
             "distance": panel_of(lambda axes: draw_curve(axes, recall, arms), results, arms)}
    if all("value_nats" in recall["arms"][arm] for arm in arms):
        found["nats"] = panel_of(lambda axes: draw_nats(axes, recall, arms), results, arms)
    if detail.get("targets"):
        found["targets"] = panel_of(lambda axes: draw_targets(axes, detail["targets"], arms[1:]),
                                    results, arms, wide=WIDTH)
    return found


def interval_said(value, bounds, form):
    """A value and its interval."""
    return f"{value:{form}} ({from_to(bounds, form)})"


def page_row(results, arm):
    """An arm of the page's table: [cell], as HEADER names them."""
    detail = results["detail"]
    about, bpc = detail["arms"][arm], detail["bpc"][arm]
    far = detail["recall"]["long_range"]["arms"][arm]
    recall = interval_said(results[arm]["long_range_recall"], far["ci95"], ".3f")
    row = [about["label"], interval_said(results[arm]["bpc"], bpc["ci95"], ".4f")]
    if arm == REFERENCE:
        return [*row, "reference", recall, "reference", "", "", f"{about['parameters']:,}"]
    low, high = percent_bounds(detail["bpc"], arm)
    change = f"{per_cent(bpc['ratio']):+.2f}% ({low:+.2f} to {high:+.2f}), {bpc['verdict']}"
    gap = interval_said(far["difference"]["mean"], far["difference"]["ci95"], "+.3f")
    rate = training_ratio(results, arm)
    speed = f"\u00d7{evaluation_ratio(results, arm):.2f} evaluation"
    speed += f", \u00d7{rate:.2f} training" if rate else ""
    state = bytes_said(about["state_bytes"]) if about["state_bytes"] else "none"
    return [*row, change, recall, f"{gap}, {far['verdict']}", speed, state, added(results, arm)]


HEADER = ("arm", "bits per character", "change from no memory", "long-range recall",
          "difference from no memory", "speed", "state of a sequence", "parameters")


def designs_of(results):
    """The arms that are compared in words: all but the controls, if there are any but these."""
    others = others_of(results)
    return [arm for arm in others if not ARMS[arm].control] or others


def best_arm(results):
    """The arm of the fewest bits, and of a single one that one."""
    return min(others_of(results), key=lambda arm: results["detail"]["bpc"][arm]["ratio"])


def finding_of_bpc(results):
    """What the memories are worth in bits, in a sentence each."""
    words = []
    for arm in designs_of(results):
        part = results["detail"]["bpc"][arm]
        low, high = percent_bounds(results["detail"]["bpc"], arm)
        alone = results["detail"]["bpc_windows"][arm]
        words.append(f"{label_of(results, arm)} {VERDICTS[part['verdict']]} compression: "
                     f"{per_cent(part['ratio']):+.2f}% bits per character ({low:+.2f} to {high:+.2f}); "
                     f"{per_cent(alone['ratio']):+.2f}% where no text comes before the window.")
    return words


def finding_of_reach(results):
    """How far back the best of the arms recalls, against chance."""
    recall, words = results["detail"]["recall"], []
    for arm in designs_of(results):
        part = recall["arms"][arm]
        beyond = [(distance, value) for distance, value, (low, _) in zip(
            recall["distances"], part["forced_choice"], part["forced_choice_ci95"])
            if low > recall["chance"]]
        told = "at no distance clearly more often than by chance"
        if beyond:
            distance, value = beyond[-1]
            told = f"above chance as far as {distance:,} tokens back ({value:.2f} there)"
        words.append(f"{label_of(results, arm)} finds the right one of {1 / recall['chance']:.0f} "
                     f"values {told}.")
    words.append(f"Attention reaches {recall['window']:,} tokens back; chance is "
                 f"{recall['chance']:.3g}; {recall['trials_per_distance']:,} questions a distance.")
    return words


def finding_of_targets(results):
    """On which tokens the best arm saves and loses."""
    arm, words = best_arm(results), []
    for name, kind in results["detail"]["targets"].items():
        gap = kind["arms"][arm] - kind["arms"][REFERENCE]
        words.append(f"Tokens {name} ({kind['share_of_tokens']:.0%} of all) cost {abs(gap):.2f} bits "
                     f"{'more' if gap > 0 else 'less'} each with {short(results, arm)} than without.")
    return words


def table_of_positions(results):
    """Bits per character by the place in the document."""
    part, arms = results["detail"]["position"], arms_of(results)
    edges = list(itertools.pairwise(part["edges"]))
    rows = [[label_of(results, arm), *(f"{value:.3f}" for value in part["arms"][arm])]
            for arm in arms]
    return ["bits per character of tokens", *(f"{low:,} to {high:,}" for low, high in edges)], rows


def table_of_turns(results):
    """What is recalled two turns later, the memory kept or cleared between turns."""
    part = results["detail"]["turns"]
    rows = [[label_of(results, arm), *(
        interval_said(part[arm][how]["forced_choice"], part[arm][how]["forced_choice_ci95"], ".2f")
        for how in ("persistent", "ephemeral"))] for arm in arms_of(results)]
    return ["share right", "memory kept between turns", "memory cleared"], rows


def table_of_streams(results, kind):
    """Recall through the cache, of needles or chains."""
    part = results["detail"]["streamed"][kind]
    rows = [[label_of(results, arm), *(interval_said(value, bounds, ".2f") for value, bounds in zip(
        part["arms"][arm]["forced_choice"], part["arms"][arm]["ci95"]))] for arm in arms_of(results)]
    unit = "token" if kind == "needle" else "fact"
    return ["share right", *(f"{number:,} {unit}{'s' * (number != 1)}" for number in part["at"])], rows


def findings(results):
    """The page's Findings, of what results.json holds."""
    detail = results["detail"]
    found = [Finding("Does it compress better?", finding_of_bpc(results), ["bpc"]),
             Finding("Does it recall what the window has lost?", finding_of_reach(results),
                     ["recall", "distance", "nats"])]
    if detail.get("targets"):
        found.append(Finding("On which words does it help, and where does it hurt?",
                             finding_of_targets(results), ["targets"]))
    if detail.get("position"):
        found.append(Finding("Early or late in a document?", table=table_of_positions(results)))
    if detail.get("turns"):
        found.append(Finding("Across the turns of a dialogue", table=table_of_turns(results)))
    for kind, title in (("needle", "A fact at the start of a long text"),
                        ("hops", "Facts that have to be joined")):
        if (detail.get("streamed") or {}).get(kind):
            found.append(Finding(title, table=table_of_streams(results, kind)))
    return found


ASKED = {                       # by each group of detail.controls
    "reads": "Is it what is read? Without reading, or reading something else, the gain has to go.",
    "what is stored": "Is surprise what should decide on what is kept?",
    "cosine threshold": "How near has a learned address to be?",
    "surprisal threshold, bits": "How surprising has a token to be?",
    "slots": "How many items does it take?",
    "addresses": "Which of its kinds of address does the work: exact, learned, or rare words?",
    "other models": "How far do simpler means come on the model that was trained without?",
}


def page_controls(results):
    """[(group, what it asks, rows)] of detail.controls as cells."""
    def told(row, key):
        return "" if row.get(key) is None else f"{row[key]:.3f}"

    rows = results["detail"].get("controls") or []
    return [(name or "", ASKED.get(name, ""), [[row["name"], *(told(row, key) for key in (
        "bpc_ratio", "recall", "top1", "stored"))] for row in part])
        for name, part in itertools.groupby(rows, lambda row: row.get("group"))]


def limits(results):
    """What the numbers do not say, each beside those it rests on."""
    detail = results["detail"]
    data, run, recall = detail["data"], detail["run"], detail["recall"]
    seeds, window = len(run["seeds"]), recall["window"]
    spread = ("One seed: the intervals speak of documents, not of runs." if seeds == 1 else
              f"{seeds} seeds: the intervals of bits resample seeds and documents together; those of recall are over "
              f"questions, the seeds' answers to each counted as one.")
    said = [f"One corpus: {data['source']}; {data['val_documents']:,} validation documents of it, "
            f"{data['val_characters']:,} characters.",
            f"One size: {detail['arms'][REFERENCE]['parameters']:,} parameters, trained for "
            f"{run['steps']:,} steps of {run['settings']['batch']} x {window} tokens.",
            spread,
            f"Measured on {made_on(run)}; speeds are of that machine.",
            f"Recall is synthetic: single words planted in real text, {reach_said(recall)}.",
            "The memory is emptied before each document: a longer context with an address, not "
            "knowledge that lasts."]
    unclear = [label_of(results, arm) for arm in others_of(results)
               if detail["bpc"][arm]["verdict"] == "inconclusive"]
    if unclear:
        said.append(f"Not told apart from no memory by these data: {and_list(unclear)}.")
    if data["quick"]:
        said.insert(0, "This is a quick run: it shows that all works, not what a memory is worth.")
    return said


def settings_of_page(results):
    """[(title, [(name, value)])]: data, hardware, commit and all settings."""
    detail = results["detail"]
    data, run = detail["data"], detail["run"]
    tables = [("Data", list(data.items())),
              ("Run", [(name, value) for name, value in run.items() if name != "settings"]),
              ("Training", list(run["settings"].items()))]
    for arm in arms_of(results):
        about = detail["arms"][arm]
        rows = list((about.get("settings") or {}).items())
        rows += [(f"weights of seed {one['seed']}, step {one['step']:,}", one["sha256"])
                 for one in about["checkpoints"]]
        tables.append((about["label"], rows))
    return [(title, [(name, said_value(value)) for name, value in rows]) for title, rows in tables]


def said_value(value):
    """A setting as it is printed."""
    if isinstance(value, list):
        return ", ".join(map(said_value, value))
    return f"{value:,}" if type(value) is int else str(value)


def check_part(part, length):
    """Raise ValueError where what an arm makes of a text is not of a text of so many tokens."""
    for key in {"bits"} | {"bits_off", "share"} & part.keys():
        values = np.array(part[key].split(), float)
        if len(values) != length or not np.isfinite(values).all():
            raise ValueError(f"detail.explorer: {key} is not of each token of its text")
    if not set(part.get("stored", "")) <= set("01") or len(part.get("stored", "0" * length)) != length:
        raise ValueError("detail.explorer: stored is not of each token of its text")
    for item in filter(None, re.split("[ ;]", part.get("items", ""))):
        at, share, _ = item.split(",")
        if not (0 <= int(at) < length and 0 <= float(share) <= 1):
            raise ValueError("detail.explorer: an item is outside of its text")
    for moment in part.get("moments", ()):
        ends = [int(end) for held in moment["held"].split() for end in held.split("-")]
        if not (0 <= moment["after"] <= length and max(ends, default=0) <= part["rows"].count("\n")):
            raise ValueError("detail.explorer: a moment is outside of its text")


def check_explored(texts, arms):
    """Raise ValueError where a text and what an arm makes of it do not go together."""
    for number, text in enumerate(texts):
        lengths = list(map(int, text["lengths"].split()))
        if sum(lengths) != len(text["text"]) or min(lengths, default=-1) < 0:
            raise ValueError("detail.explorer: a text is not cut where its tokens end")
        for arm in arms.values():
            if arm["texts"][number] is not None:
                check_part(arm["texts"][number], len(lengths))


def explorer_of(results, own):
    """What the page's explorer shows: results.json's texts and, before them, the user's own; None
    where there are none."""
    part = results["detail"].get("explorer") or {"texts": [], "arms": {}}
    texts, arms = list(part["texts"]), {}
    known = own["arms"] if own else {}
    for arm in arms_of(results):
        its = part["arms"].get(arm) or known.get(arm)
        if its is None:
            continue
        shown = its["texts"] if arm in part["arms"] else [None] * len(texts)
        if own:
            shown = [known[arm]["text"] if arm in known else None, *shown]
        about = {name: value for name, value in its.items() if name not in ("texts", "text", "weights")}
        arms[arm] = about | {"label": label_of(results, arm), "texts": shown}
    if own:
        texts.insert(0, {"name": f"your text: {own['name']}", "text": own["text"],
                         "lengths": own["lengths"]})
    check_explored(texts, arms)
    return {"texts": texts, "arms": arms, "palette": palette()} if texts and arms else None


def own_text(root, results, explore):
    """What `eval.py --explore` made of a text of the user's, of the arms whose weights results.json
    is of; None where there is none."""
    path = root / "trained" / "explored.json"
    if not path.is_file():
        return None
    own = read_json(path, explore)
    try:
        there = results["detail"]["arms"]
        known = {arm: {one["sha256"] for one in there[arm]["checkpoints"]} for arm in there}
        arms = {arm: its for arm, its in own["arms"].items() if its["weights"] in known.get(arm, ())}
        lacking = sorted(own["arms"].keys() - arms.keys())
        explorer_of({"detail": {"arms": there}}, own | {"arms": arms})
    except DAMAGE as error:
        raise StageError(f"{path} lacks a field or has a wrong one ({why(error)}); make it again with: "
                         f"{explore}, or remove it") from None
    if lacking:
        print(f"warning: {path} is of other weights of {', '.join(lacking)} than results.json; "
              f"these are left out; make it again with: {explore}")
    return own | {"arms": arms} if arms else None


def draw_page(results, gone, own, again):
    """results.html."""
    import jinja2

    detail = results["detail"]
    title, sentence = headline(results)
    explorer = explorer_of(results, own)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    controls = page_controls(results)
    threshold = next((rows for name, _, rows in controls if name.startswith("surprisal threshold")), [])
    return environment.from_string(TEMPLATE).render(
        title=title, sentence=sentence, quick=detail["data"]["quick"], how=how_trained(results),
        window=detail["recall"]["window"], reach=reach_said(detail["recall"]), header=HEADER,
        parameters=f"{detail['arms'][REFERENCE]['parameters'] / 1e6:.1f}M",
        arms=[page_row(results, arm) for arm in arms_of(results)], findings=findings(results),
        pictures=pictures_of_page(results), explorer=explorer, refill=ASKED_AGAIN + again,
        most_bits=MOST_BITS, key=palette()[::4], controls=controls, threshold=threshold,
        control_command=f"{again} --controls", limits=limits(results), script=SCRIPT, style=LOOK,
        settings=settings_of_page(results), provenance=provenance(results, gone, ""))


# the page: its look, its text (filled by jinja2) and what moves on it

LOOK = """
:root { --ink: #1a1a1a; --quiet: #595959; --line: #c9c9c9; --shade: #f1f1f1; --blue: #17497a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; color: var(--ink); background: #fff;
       font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .4rem 0; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-top: 2px solid var(--ink);
     padding-top: .5rem; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .3rem; }
p, ul { margin: .4rem 0; max-width: 70ch; }
ul { padding-left: 1.2rem; }
a { color: var(--blue); }
nav a { margin-right: 1rem; display: inline-block; padding: .25rem 0; }
.small, caption, figcaption { color: var(--quiet); font-size: .875rem; }
.badge { background: var(--ink); color: #fff; padding: .25rem .6rem; font-weight: bold;
         display: inline-block; }
.lead { font-size: 1.1rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
         border-bottom: 1px solid var(--line); }
thead th { font-size: .8125rem; color: var(--quiet); font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
            gap: .5rem 1.5rem; }
.pictures img { width: 100%; max-width: 34rem; height: auto; display: block; }
.pictures .wide { grid-column: 1 / -1; overflow-x: auto; }
.pictures .wide img { min-width: 42rem; max-width: 60rem; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
select, button, input { font: inherit; color: inherit; }
button, select { background: #fff; border: 1px solid var(--quiet); border-radius: 4px;
                 padding: .25rem .6rem;
                 min-height: 2.25rem; max-width: 100%; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend, .bar > label > span { font-size: .8125rem; color: var(--quiet); padding: 0; display: block;
                              }
.bar { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; align-items: end; margin: .8rem 0; }
.choice label { display: inline-block; border: 1px solid var(--quiet); border-radius: 4px;
                padding: .25rem .55rem;
                margin: 0 .25rem .25rem 0; min-height: 2.25rem; cursor: pointer; }
.choice input { margin: 0 .35rem 0 0; accent-color: var(--blue); }
.choice label:has(:checked) { background: var(--blue); color: #fff; border-color: var(--blue); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .875rem; align-items: center; }
.key b { font-weight: normal; padding: 0 .35rem; }
.look { display: grid; grid-template-columns: minmax(0, 1fr) 25rem; gap: 1.5rem;
        align-items: start; }
.sheet { position: relative; }
.sheet svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none;
             overflow: visible; }
.sheet path { fill: none; stroke: var(--blue); stroke-width: 1.6px; }
#words { line-height: 2.05; font-size: 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
         cursor: pointer;
         padding: .3rem .4rem; border: 1px solid var(--line); border-radius: 4px; }
#words span { border-bottom: 3px solid transparent; padding: .1rem 0; border-radius: 2px;
              scroll-margin: 8rem 0 50vh; }
#words .held { border-bottom-color: var(--blue); }
#words .gone { border-bottom: 3px dotted var(--quiet); }
#words .hit { font-weight: bold; }
#words .hit::before { content: "\\25BC"; font-size: .65em; }
#words .hit.lost::before { content: "\\25B2"; }
/* what changes under the pointer takes no room: else the text would move away from it */
#words .source { outline: 2px solid var(--blue); outline-offset: 1px; position: relative; }
#words .source::after { content: attr(data-rank); font: bold .65rem/1.4 system-ui, sans-serif;
                        color: #fff;
                        background: var(--blue); border-radius: 50%; padding: 0 .35em; pointer-events: none;
                        position: absolute; right: -.6em; top: -.8em; z-index: 1; }
#words .at { outline: 3px solid #000; outline-offset: 1px; }
#facts { position: sticky; top: .5rem; max-height: calc(100vh - 1rem); overflow: auto;
         background: #fff;
         border: 2px solid var(--ink); border-radius: 4px; padding: .4rem .9rem .8rem; font-size: .9375rem; }
#facts h3 { margin: .8rem 0 .2rem; }
#facts h3:first-child { font-size: 1.15rem; margin-top: .2rem; overflow-wrap: anywhere; }
#facts table { width: 100%; margin: .2rem 0; }
#facts td, #facts th { padding: .2rem .5rem .2rem 0; }
#facts td.number, #facts th.number { text-align: right; white-space: nowrap; }
#facts .meter { display: block; height: .55rem; background: var(--blue); min-width: 1px; }
#facts .meter.off { background: #fff; border: 1.5px solid var(--quiet); }
#facts details { margin-top: .4rem; }
#facts .list { max-height: 16rem; overflow: auto; font-size: .875rem; }
mark { background: none; color: inherit; font-weight: bold; }
kbd { border: 1px solid var(--quiet); border-radius: 3px; padding: 0 .3rem; font-size: .8125rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 58rem) {
  .look { display: block; }
  #facts { top: auto; bottom: 0; max-height: 42vh; margin-top: .6rem; border-width: 2px 0 0;
           border-radius: 0; }
}
@media (max-width: 46rem) {
  h1 { font-size: 1.4rem; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
                 clip-path: inset(50%); }
  .cards, .cards caption, .cards tbody, .cards tr, .cards td, .cards th { display: block; }
  .cards tr { border-bottom: 2px solid var(--ink); padding: .4rem 0; }
  .cards td, .cards tbody th { border: 0; padding: .1rem 0; }
  .cards td:empty { display: none; }
  .cards td::before { content: attr(data-label); color: var(--quiet); font-size: .8125rem;
                      display: block; }
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro table(header, rows, caption="", kind="") %}
<div class="scroll" tabindex="0" role="region" aria-label="table: {{ caption or header | join(', ') }}">
<table class="{{ kind }}">
{% if caption %}<caption>{{ caption }}</caption>{% endif %}
<thead><tr>{% for name in header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}<td data-label="{{ header[loop.index] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<header>
<p class="small">Does a memory help a small GPT? The same {{ parameters }} model is trained with and without a memory
beyond its attention window of {{ window }} tokens: same initial weights, same data, same steps.</p>
{% if quick %}<p class="badge">QUICK RUN: shows that it runs, not what it is worth</p>{% endif %}
<h1>{{ title }}</h1>
<p class="lead">{{ sentence }}</p>
<nav aria-label="parts of this page">
<a href="#findings">Findings</a><a href="#explorer">Look into the memory</a><a href="#controls">Controls</a>
<a href="#limits">Limits</a><a href="#made">Data and settings</a></nav>
</header>
<main>
<h2 id="answer">The answer, arm by arm</h2>
{{ table(header, arms, how ~ "; in brackets 95% intervals; recall of what stood " ~ reach, "cards") }}
<h2 id="findings">Findings</h2>
{% for finding in findings %}
<section>
<h3>{{ finding.title }}</h3>
{% if finding.words %}<ul>{% for said in finding.words %}<li>{{ said }}</li>{% endfor %}</ul>{% endif %}
{% if finding.pictures %}
<div class="pictures">
{% for name in finding.pictures if name in pictures %}
<div {% if name == "targets" %}class="wide" tabindex="0" role="region" aria-label="picture"{% endif %}>
<img src="{{ pictures[name] }}" alt="{{ finding.title }} The numbers stand in the text and the table above."></div>
{% endfor %}
</div>
{% endif %}
{% if finding.table %}{{ table(finding.table[0], finding.table[1]) }}{% endif %}
</section>
{% endfor %}
<h2 id="explorer">Look into the memory</h2>
{% if explorer %}
<p>Each token is shaded by what it cost the model: -log2 of the probability it was given. Point at
one, or tap it, and see what its prediction drew on and what the memory held at that moment.
Keys: <kbd>&larr;</kbd> <kbd>&rarr;</kbd> <kbd>&uarr;</kbd> <kbd>&darr;</kbd> move,
<kbd>N</kbd> <kbd>P</kbd> go to the next or previous marked token,
<kbd>Enter</kbd> or a click holds the place, <kbd>Esc</kbd> lets it go.</p>
<form class="bar" id="choices" autocomplete="off">
<label><span>Text</span><select id="text">
{% for text in explorer.texts %}<option value="{{ loop.index0 }}">{{ text.name }}</option>{% endfor %}
</select></label>
<fieldset class="choice" id="arms"><legend>Arm</legend>
{% for name, arm in explorer.arms.items() %}
<label><input type="radio" name="arm" value="{{ name }}">{{ arm.label }}</label>
{% endfor %}
</fieldset>
<label><span>Compared with</span><select id="against">
<option value="off">the same model, its memory off</option>
<option value="baseline">no memory: the arm trained without</option></select></label>
<label><span>Shaded by the cost</span><select id="shade">
<option value="on">with the memory</option><option value="off">without it</option></select></label>
<fieldset class="choice" id="marks"><legend>Mark tokens that</legend>
<label><input type="radio" name="mark" value="none" checked>none</label>
<label><input type="radio" name="mark" value="gained">gained more than a bit (<span id="gained">0</span>)</label>
<label><input type="radio" name="mark" value="lost">lost more than a bit (<span id="lost">0</span>)</label>
</fieldset>
<span><button type="button" id="previous">&larr; previous</button>
<button type="button" id="next">next &rarr;</button></span>
</form>
<p class="key">
<span>{% for ground, ink in key %}<b style="background:{{ ground }};color:{{ ink }}">
{{- loop.index0 * 4 }}{{ " bits or more" if loop.last }}</b>{% endfor %}</span>
<span><b style="border-bottom: 3px solid var(--blue)">held</b> in memory</span>
<span><b style="border-bottom: 3px dotted var(--quiet)">evicted</b> by then</span>
<span><b style="outline: 2px solid var(--blue)">drawn on</b></span>
<span><b style="outline: 3px solid #000">looked at</b></span></p>
<div class="look">
<div class="sheet"><div id="words" role="listbox" tabindex="0" aria-label="the text, token by token"></div>
<svg id="lines" aria-hidden="true"></svg></div>
<aside id="facts" tabindex="0" aria-label="the token looked at"><p>Point at a token.</p></aside>
</div>
<script type="application/json" id="data">{{ explorer | tojson }}</script>
{% else %}
<p>{{ refill }}</p>
{% endif %}
<h2 id="controls">Controls: what the gain depends on</h2>
{% if controls %}
{% if threshold %}
<p><label for="threshold">Surprisal threshold, measured at {{ threshold | length }} values:</label>
<input type="range" id="threshold" min="0" max="{{ threshold | length - 1 }}" value="0" step="1">
<output for="threshold" id="said"></output></p>
<script type="application/json" id="thresholds">{{ threshold | tojson }}</script>
{% endif %}
{% for group, asked, rows in controls %}
<h3>{{ group }}</h3>
{% if asked %}<p>{{ asked }}</p>{% endif %}
{{ table(["change", "bits per character, x no memory", "recall", "top-1", "share stored"], rows) }}
{% endfor %}
{% else %}
<p>Not measured in this run: {{ control_command }}</p>
{% endif %}
<h2 id="limits">Limits</h2>
<ul>{% for limit in limits %}<li>{{ limit }}</li>{% endfor %}</ul>
<h2 id="made">Data, hardware, commit, settings</h2>
<p class="small">{{ provenance }}</p>
{% for name, rows in settings %}
<details><summary>{{ name }}</summary><div class="scroll" tabindex="0" role="region" aria-label="{{ name }}">
<table><tbody>{% for key, value in rows %}
<tr><th scope="row">{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div></details>
{% endfor %}
</main>
<script>{{ script | safe }}</script>
</body>
</html>
"""

SCRIPT = r"""
"use strict";
const by = id => document.getElementById(id);
const numbers = text => text === "" ? [] : text.split(" ").map(Number);
const make = (name, attributes = {}, ...inside) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...inside);
  return element;
};
const shown = text => text.replace(/\n/g, "\u00b6").replace(/^ +$/, s => "\u2423".repeat(s.length)) || "\u25af";

if (by("thresholds")) {
  const rows = JSON.parse(by("thresholds").textContent), slider = by("threshold");
  const say = () => {
    const [name, ratio, recall, top, stored] = rows[slider.value];
    by("said").textContent = `${name} bits: \u00d7${ratio} bits per character, recall ${recall}, ${stored} stored`;
    slider.setAttribute("aria-valuetext", by("said").textContent);
  };
  slider.addEventListener("input", say);
  say();
}

if (by("data")) explore(JSON.parse(by("data").textContent));

function explore(data) {
  const words = by("words"), facts = by("facts"), lines = by("lines");
  let text, arm, spans = [], at = -1, pinned = false, view = {};

  const chosen = name => document.querySelector(`input[name=${name}]:checked`).value;

  // ---- what is known of a text by an arm

  function cut(one) {
    const letters = Array.from(one.text);
    let place = 0;
    return numbers(one.lengths).map(length => letters.slice(place, place += length).join(""));
  }

  function itemsOf(line) {
    return line.split(";").map(items => items === "" ? [] : items.split(" ").map(item => {
      const [place, share, cosine] = item.split(",");
      return { place: +place, share: +share, cosine };
    }));
  }

  function viewOf(number, name) {
    const its = data.arms[name], part = its.texts[number], base = data.arms.baseline;
    if (!part) return null;
    const found = { its, part, on: numbers(part.bits) };
    found.off = part.bits_off === undefined ? found.on : numbers(part.bits_off);
    found.baseline = base && base.texts[number] ? numbers(base.texts[number].bits) : null;
    if (part.items !== undefined) {
      found.items = itemsOf(part.items);
      found.share = numbers(part.share);
      found.stored = Array.from(part.stored, Number);
      found.order = found.stored.flatMap((flag, place) => flag ? [place] : []);
    }
    if (part.rows !== undefined) {
      found.columns = part.columns === "" ? [] : part.columns.split(" ");
      found.rows = part.rows === "" ? [] : part.rows.split("\n").map(row => row.split("\t"));
    }
    return found;
  }

  const without = () => by("against").value === "baseline" && view.baseline ? view.baseline : view.off;
  const gain = place => without()[place] - view.on[place];
  const marked = (place, mark) => mark === "gained" ? gain(place) > 1 : mark === "lost" && gain(place) < -1;

  // ---- drawing

  function drawText() {
    const one = data.texts[text];
    view.words = cut(one);
    words.replaceChildren();
    spans = view.words.map((word, place) => {
      const lead = /^ +\S/.test(word) ? word.match(/^ +/)[0] : "";
      const span = make("span", { id: `t${place}`, role: "option", "aria-selected": "false" });
      span.textContent = shown(word.slice(lead.length));
      span.dataset.at = place;
      words.append(lead, span);
      if (word.includes("\n")) words.append("\n");
      return span;
    });
  }

  function paint() {
    const mark = chosen("mark"), costs = by("shade").value === "on" ? view.on : without();
    spans.forEach((span, place) => {
      const hit = marked(place, mark), shaded = mark === "none" || hit;
      const [ground, ink] = data.palette[Math.min(data.palette.length - 1, Math.round(costs[place]))];
      span.style.background = shaded ? ground : "";
      span.style.color = shaded ? ink : "";
      span.className = hit ? `hit ${mark}` : "";
    });
    for (const name of ["gained", "lost"]) {
      by(name).textContent = view.on.filter((_, place) => marked(place, name)).length;
    }
    for (const id of ["previous", "next"]) by(id).disabled = mark === "none";
    show();
  }

  function memoryAt(place) {
    if (view.order) {
      const slots = view.its.slots, until = place < 0 ? Infinity : place;
      const before = view.order.filter(item => item < until), cutoff = Math.max(0, before.length - slots);
      return { held: before.slice(cutoff), gone: before.slice(0, cutoff) };
    }
    if (!view.rows) return { held: [], gone: [] };
    const until = place < 0 ? Infinity : place, moments = view.part.moments.filter(one => one.after <= until);
    const moment = moments[moments.length - 1], column = view.columns.indexOf("position");
    if (!moment) return { held: [], gone: [], rows: [] };
    const rows = moment.held.split(" ").filter(Boolean).flatMap(range => {
      const [low, high] = range.split("-").map(Number);
      return view.rows.slice(low, high + 1);
    });
    const held = column < 0 ? [] : [...new Set(rows.map(row => row[column] - 1))].filter(item => item >= 0);
    return { held, gone: [], rows, moment };
  }

  function curve(from, to, exact) {
    const frame = words.getBoundingClientRect();
    const one = from.getBoundingClientRect(), other = to.getBoundingClientRect();
    const x1 = one.left + one.width / 2 - frame.left, y1 = one.bottom - frame.top;
    const x2 = other.left + other.width / 2 - frame.left, y2 = other.top - frame.top;
    const bend = Math.max(18, (y2 - y1) / 2);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x1} ${y1} C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`);
    if (!exact) path.setAttribute("stroke-dasharray", "7 4");
    lines.append(path);
  }

  function show() {
    const memory = memoryAt(at), held = new Set(memory.held), gone = new Set(memory.gone);
    lines.replaceChildren();
    spans.forEach((span, place) => {
      span.classList.toggle("held", held.has(place));
      span.classList.toggle("gone", gone.has(place));
      span.classList.toggle("at", place === at);
      span.classList.remove("source");
      span.setAttribute("aria-selected", place === at);
    });
    if (at < 0) {
      words.removeAttribute("aria-activedescendant");
      facts.replaceChildren(make("p", {}, "Point at a token. Underlined is what the memory holds at the end."));
      return;
    }
    (view.items ? view.items[at] : []).forEach((item, rank) => {
      spans[item.place].classList.add("source");
      spans[item.place].dataset.rank = rank + 1;
      curve(spans[item.place], spans[at], ["exact", "word"].includes(item.cosine));
    });
    words.setAttribute("aria-activedescendant", `t${at}`);
    facts.replaceChildren(...costs(), ...draws(), ...contents(memory));
    spans[at].setAttribute("aria-label", `${view.words[at]}: ${view.on[at]} bits with the memory, `
      + `${without()[at]} without`);
  }

  // ---- the facts of a token

  function costs() {
    const rows = [], most = Math.max(16, view.on[at], view.off[at]);
    if (view.baseline && arm !== "baseline") rows.push(["no memory (arm)", view.baseline[at], "baseline", "off"]);
    if (view.part.bits_off !== undefined) rows.push(["memory off", view.off[at], "off", "off"]);
    rows.push([view.part.bits_off === undefined ? "no memory" : "memory on", view.on[at], "on", ""]);
    const body = rows.map(([name, bits, key, kind]) => make("tr", {}, make("th", { scope: "row" }, name),
      make("td", { class: "number", "data-is": key }, bits.toFixed(3)), make("td", { style: "width:45%" },
        make("span", { class: `meter ${kind}`, style: `width:${100 * bits / most}%` }))));
    const change = gain(at), said = Math.abs(change) < 0.05 ? "nothing gained or lost"
      : `${change > 0 ? "\u25bc gained" : "\u25b2 lost"} ${Math.abs(change).toFixed(2)} bits`;
    const note = view.stored ? (view.stored[at] ? "; then stored" : "; then not stored") : "";
    return [make("h3", {}, `\u201c${shown(view.words[at]).trim()}\u201d`),
      make("p", { class: "small" }, `token ${at + 1} of ${view.words.length}: `, make("mark", {}, said), note),
      make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "what it cost"),
        make("th", { scope: "col", class: "number" }, "bits"), make("th", { scope: "col" },
          make("span", { class: "unseen" }, "bar")))), make("tbody", {}, ...body))];
  }

  function draws() {
    if (!view.items) return [];
    const items = view.items[at], share = (100 * view.share[at]).toFixed(1);
    if (!items.length) return [make("h3", {}, "Drew on nothing"),
      make("p", {}, "The memory had no say in this prediction.")];
    const rows = items.map((item, rank) => {
      const before = view.words.slice(Math.max(0, item.place - 3), item.place).map(shown).join("");
      return make("tr", { "data-item": item.place }, make("td", {}, String(rank + 1)), make("td", {},
        `${before}`, make("mark", {}, shown(view.words[item.place]))),
        make("td", { class: "number", "data-is": "back" }, String(at - item.place)),
        make("td", { class: "number", "data-is": "cosine" }, item.cosine),
        make("td", { class: "number", "data-is": "share" }, (100 * item.share).toFixed(2) + "%"));
    });
    const head = ["", "item", "back", "cosine", "share"].map((name, number) => make("th", { scope: "col",
      class: number > 1 ? "number" : "" }, name || make("span", { class: "unseen" }, "rank")));
    return [make("h3", {}, `Drew on: ${share}% of the probability is the memory's`), make("table", {},
      make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)), make("p", { class: "small" },
        "The heaviest items. back: tokens from there to here. exact: the last token or tokens were the same; "
        + "word: a rare word was (full lines); cosine: of the learned addresses (dashed).")];
  }

  function contents(memory) {
    if (view.order) {
      const held = memory.held.slice().reverse(), oldest = memory.held[0];
      const list = held.map(place => `${shown(view.words[place]).trim()} (${at - place})`).join("  \u00b7  ");
      const found = [make("h3", {}, "The memory at that moment"), make("p", {}, make("span", { "data-is": "held" },
        String(held.length)), ` of ${view.its.slots} slots held, `, make("span", { "data-is": "gone" },
          String(memory.gone.length)), " evicted so far. ", held.length ? "The oldest, \u201c"
          + `${shown(view.words[oldest]).trim()}\u201d, stood ${at - oldest} tokens back.` : "")];
      if (held.length) found.push(make("details", {}, make("summary", {}, "all that is held, and how far back"),
        make("p", { class: "list", tabindex: "0" }, list)));
      return found;
    }
    if (!view.rows) return [make("h3", {}, "No memory"), make("p", {}, "What left the window is gone: attention "
      + `reaches ${view.its.window} tokens back.`)];
    if (!memory.moment || !memory.rows.length) return [make("h3", {}, "The memory at that moment"),
      make("p", {}, "It holds nothing that can be put into words, or was not asked yet.")];
    const rows = memory.rows.slice().reverse().slice(0, 400);
    const head = make("tr", {}, ...view.columns.map(name => make("th", { scope: "col" }, name.replace("_", " "))));
    const body = rows.map(row => make("tr", {}, ...row.map(cell => make("td", {}, cell))));
    return [make("h3", {}, "The memory at that moment"), make("p", { class: "small" },
      `As it was before token ${memory.moment.after + 1}; ${memory.rows.length} of ${memory.moment.of} entries`
      + `${rows.length < memory.rows.length ? `, the newest ${rows.length}` : ""}:`), make("div", { class:
        "list", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)))];
  }

  // ---- what the user does

  function go(place, scroll) {
    at = Math.max(-1, Math.min(spans.length - 1, place));
    show();
    if (scroll && at >= 0) spans[at].scrollIntoView({ block: "nearest" });
  }

  function step(direction) {
    const mark = chosen("mark"), count = spans.length, start = at < 0 && direction < 0 ? 0 : at;
    for (let far = 1; far <= count; far++) {  // around the end, too
      const place = (start + direction * far + 2 * count) % count;
      if (!marked(place, mark)) continue;
      pinned = true;
      go(place, true);
      return;
    }
  }

  function line(direction) {                  // the token above or below
    if (at < 0) return 0;
    const here = spans[at].getBoundingClientRect(), middle = here.left + here.width / 2;
    let best = at, least = Infinity, level = null;
    for (let place = at + direction; place >= 0 && place < spans.length; place += direction) {
      const box = spans[place].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 6) continue;
      if (level === null) level = box.top;
      if (Math.abs(box.top - level) > 6) break;
      const far = Math.abs(box.left + box.width / 2 - middle);
      if (far < least) [best, least] = [place, far];
    }
    return best;
  }

  function key(event) {
    const moves = { ArrowRight: () => at + 1, ArrowLeft: () => Math.max(0, at - 1), ArrowDown: () => line(1),
      ArrowUp: () => line(-1), Home: () => 0, End: () => spans.length - 1, PageDown: () => at + 50,
      PageUp: () => Math.max(0, at - 50) };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) {
      pinned = true;
      go(moves[event.key](), true);
    } else if ("nNpP".includes(event.key)) {
      step("nN".includes(event.key) ? 1 : -1);
    } else if (event.key === "Enter" || event.key === " ") {
      pinned = !pinned;
    } else if (event.key === "Escape") {
      pinned = false;
      go(-1);
    } else return;
    event.preventDefault();
  }

  const placeOf = event => event.target.dataset && event.target.dataset.at;
  words.addEventListener("keydown", key);
  words.addEventListener("pointerover", event => {
    const place = placeOf(event);
    if (place !== undefined && event.pointerType === "mouse" && !pinned) go(+place);
  });
  words.addEventListener("click", event => {
    const place = placeOf(event);
    if (place === undefined) return;
    pinned = !(pinned && +place === at);
    go(+place);
  });
  by("previous").addEventListener("click", () => step(-1));
  by("next").addEventListener("click", () => step(1));
  by("choices").addEventListener("change", choose);
  by("choices").addEventListener("submit", event => event.preventDefault());
  window.addEventListener("resize", () => show());

  function choose() {
    const number = +by("text").value, fresh = number !== text;
    for (const input of document.querySelectorAll("input[name=arm]")) {
      input.disabled = !data.arms[input.value].texts[number];
    }
    let box = document.querySelector("input[name=arm]:checked");
    if (!box || box.disabled) box = document.querySelector("input[value=with_ltm][name=arm]:enabled")
      || document.querySelector("input[name=arm]:enabled");
    box.checked = true;
    arm = box.value;
    text = number;
    const kept = view.words;
    view = viewOf(text, arm);
    view.words = kept;
    by("against").disabled = arm === "baseline" || !view.baseline;
    if (fresh) {                              // the most telling place in sight is shown at first
      const gains = view.on.slice(0, 150).map((_, place) => gain(place)), most = Math.max(...gains);
      [at, pinned] = [most > 0 ? gains.indexOf(most) : -1, false];
      drawText();
    }
    paint();
  }

  choose();
}
"""


# ------------------------------------------------------------------------------------ the stage

def own_settings():
    """matplotlib, imported with none of the user's settings: a broken one of them would end the stage.

    It reads the first matplotlibrc it finds, and it looks for it here first: in a folder that holds an empty one.
    """
    os.environ["MPLBACKEND"] = "agg"
    here = os.open(".", os.O_RDONLY)                        # as a file: it may have no name any more
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            Path("matplotlibrc").touch()
            import matplotlib
        finally:
            os.chdir(here)
            os.close(here)
    # it may have been imported before
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def draw(root, results, folders, gone, again, explore):
    """{path: its bytes} of all pictures and of the page."""
    detail, figures, pictures = results["detail"], {}, {}
    if len(gone) == len(folders):               # results that came without checkpoints, as published ones do
        gone = []
    with own_settings(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)              # the mean of nothing, a division by zero
        warnings.filterwarnings("ignore", "Glyph .* missing")       # a name in a script that the font lacks
        if len(arms_of(results)) == 2:
            figures[root / "results.png"] = draw_two(results, folders, gone)
        else:
            figures[root / "results.png"] = draw_many(results, gone)
        if detail.get("controls"):
            figures[root / "results_controls.png"] = draw_controls(results, gone)
        if detail.get("memory"):
            figures[root / "results_memory.png"] = draw_memory(results, gone)
        for path, figure in figures.items():
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
            pictures[path] = file.getvalue()
        page = draw_page(results, gone, own_text(root, results, explore), again)
        pictures[root / "results.html"] = page.encode("utf-8", "backslashreplace")
    return pictures


def warn(root, pictures, gone, again):
    """Name the checkpoints that are gone, and pictures that are older than the results."""
    if gone:
        print(f"warning: gone, so not compared with results.json: {', '.join(gone)}")
    for name, flag in ("results_controls.png", " --controls"), ("results_memory.png", ""):
        if root / name not in pictures and (root / name).exists():
            print(f"warning: {root / name} is of an earlier evaluation; for a new one: {again}{flag}")


def plot(root, quick):
    """Draw all pictures of a root and its page, and give them to wandb."""
    start, again = time.monotonic(), command("eval.py --report", root, quick)
    results = read_json(root / "results.json", again)
    try:
        json.dumps(results, allow_nan=False)                        # NaN is for no picture
        seed = results["detail"]["run"]["seeds"][0]
        config = {**results["detail"]["run"], "data": results["detail"]["data"]}
        folders, gone = verify(root, results, again)
        pictures = draw(root, results, folders, gone, again, command("eval.py --explore FILE", root, quick))
        sentence = headline(results)[1]
    except DAMAGE as error:
        raise StageError(f"{root}/results.json lacks a field or has a wrong one ({why(error)}); "
                         f"make it again with: {again}") from None
    warn(root, pictures, gone, again)
    for path, picture in pictures.items():
        write_atomic(path, picture)
    print(sentence)
    print(f"wrote {', '.join(map(str, pictures))} in {time.monotonic() - start:.1f} s", flush=True)

    def left_out(what):
        print(f"warning: {what}; {root} has the pictures")

    wandb = Wandb(root, seed, "eval", config, left_out)
    wandb.log_pictures(list(pictures))
    wandb.finish()


def main(argv=None):
    parser = parser_of(__doc__,
                       "folder of results.json (default: this one; with --quick its quick/)")
    parser.add_argument("--readme", action="store_true",
                        help="write the tables of README.md, and draw nothing")
    parser.add_argument("--study", action="store_true",
                        help="draw results_study.json, and nothing else")
    flags = parser.parse_args(argv)
    if flags.readme and flags.study:
        parser.error("--readme writes tables, --study draws: one at a time")
    if flags.readme and flags.quick:
        parser.error("the tables of README.md are of the full run: --readme goes without --quick")
    if flags.readme:
        write_readme(default_root(flags.root, False))
        return
    (plot_study if flags.study else plot)(default_root(flags.root, flags.quick), flags.quick)


if __name__ == "__main__":
    run_stage(main)
