"""Draw results.json: one look tells which memory helps, at what cost, and where.

reads   results.json (eval.py); model.safetensors (its hash) and history.jsonl of the checkpoints it names
writes  results.png; where results.json holds them, results_controls.png (detail.controls) and
        results_memory.png (detail.memory: what the memory did on one document)

    python plot_eval.py
    python plot_eval.py --quick
    python plot_eval.py --study     results_study.png, from results_study.json
    python plot_eval.py --readme    only the tables in README.md, from results.json,
                                    results_arms.json (six arms) and results_bench.json

Two arms give one picture, more of them another. Results of other checkpoints than those in the
root are refused. The same results give the same picture, byte for byte, whatever matplotlib's
settings are. The pictures also go to wandb: offline unless you are logged in, and not at all with
WANDB_MODE=disabled.
"""

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
    Look("#7a7a7a", "//", "*", (0, (3, 2))),
    Look("#c7c7c7", "..", "<", (0, (1, 2)), QUIET),
    Look("#474747", "xx", ">", (0, (6, 1))),
    Look("#adadad", "\\\\", "h", (0, (3, 1, 1, 1)), QUIET),
    Look("#141414", "--", "d", (0, (5, 3))),
    Look("#949494", "||", "H", (0, (6, 1, 2, 1)), QUIET),
    Look("#616161", "++", "8", (0, (2, 2))),
    Look("#2e2e2e", "++++", (4, 1, 0), (0, (1, 1, 3, 1))),
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


def percent_bounds(results, part, arm):
    """The interval of an arm's difference of BPC, in per cent of the baseline's."""
    base = np.mean(part[REFERENCE]["per_seed"])
    return [100 * bound / base for bound in part[arm]["difference"]["ci95"]]


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
            folders.append((arm, root / name))
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
    return axes.get_position().width * WIDTH


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
    """Share of predictions that retrieved something, as training went on: the first seed in
    full, the others thin."""
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
    share(axes, title, f"share of predictions; in evaluation {evaluated:.2f}")


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


def provenance(results, gone, notes):
    """Where the numbers come from, in a few sentences."""
    detail = results["detail"]
    data, run = detail["data"], detail["run"]
    chained = ", chained rows" if run["settings"].get("chained") else ""
    words = [
        "Quick run. " * data["quick"] + f"Data: {textwrap.shorten(data['source'], 100)};",
        f"{data['val_documents']:,} validation documents{PARTS.get(data.get('part'), '')}, "
        f"{data['val_characters']:,} characters.",
        f"Model: {detail['arms'][REFERENCE]['parameters'] / 1e6:.1f}M parameters,",
        f"{run['steps']:,} training steps{chained}, seeds: {', '.join(map(str, run['seeds']))}.",
        f"Hardware: {run['device']}, torch {run['torch']}, commit {run.get('commit', 'unknown')}.",
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
        low, high = percent_bounds(results, part, arms[-1])
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
    draw_bars(axes, "{:,.0f}", {"evaluation": (bars, note)})
    axes.yaxis.set_major_formatter("{x:,.0f}")
    heading(axes, "Speed", "tokens/s, higher is better")


def draw_two(results, folders, gone):
    """results.png of the baseline and one memory."""
    from matplotlib.patches import Patch

    height, arms = 7.7, arms_of(results)
    trials = results["detail"]["recall"]["trials_per_distance"]
    notes = (f"Recall: forced choice, {trials:,} questions per distance. Per cent: the change with memory (of speed: "
             f"by the same model with its memory off). Error bars, brackets: 95% intervals.")
    figure = new_figure(height, results, gone, *headline(results), notes)
    arms_legend(figure, results, arms, lambda look: Patch(**filled(look)))
    panels = figure.subplot_mosaic("AAAAAA.BBBB..CCCC;DDDDDDDDDD.EEEEEE", gridspec_kw=dict(
        left=0.065, right=0.975, top=1 - 1.55 / height, bottom=1 / height, hspace=0.5, wspace=0))
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
        low, high = percent_bounds(results, bpc, arm)
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
    sentence = (f"Without a memory, the LTM's bits take {reaches:,.0f} steps." if reaches else
                "Without a memory, the LTM's bits are reached in none of these trainings.")
    figure = new_figure(height, results, [], "What else would have bought the gain", sentence,
                        "Each training has a schedule of its own. Recall: forced choice, verbatim.")
    page = Page(figure)
    bits = {arm: curve[arm] for arm in (REFERENCE, EXPLAINED)}
    panels = ((bits, ("Bits per character", "lower is better")),
              ({EXPLAINED: curve["ratio"]}, ("By the baseline's", "below 1 is better")),
              (recalls_of_study(results, "recall"), ("Recall beyond", "the window, share right")),
              (recalls_of_study(results, "recall_inside"), ("Recall inside", "the window, share right")))
    for number, (curves, what) in enumerate(panels):
        axes = page.panel(0.35 + 2.15 * number, 1.5, 1.7, 1.5)
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
    return (f"{data['source']}: {data['val_documents']:,} validation documents, {data['val_tokens']:,} tokens. "
            f"{run['device']}, torch {run['torch']}, commit {run['commit']}.")


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


def recall_rows(recall, arm):
    """The two rows of long-range recall: of 8 values, and of all tokens."""
    base, own = (recall["long_range"]["arms"][which] for which in (REFERENCE, arm))
    gap = own["difference"]
    said = f"{gap['mean']:+.3f} ({from_to(gap['ci95'], '+.3f')})"
    of_all = f"95% interval {from_to(own['top1_ci95'], '.3f')}"
    return [
        [f"**long-range recall**, {reach_said(recall)}", f"{base['mean']:.3f}",
         f"{own['mean']:.3f}", said],
        [f"the same, likeliest of all {EOT + 1:,} tokens (top-1)", f"{base['top1']:.3f}",
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
        *recall_rows(detail["recall"], arm),
        ["share of predictions that retrieved something", "", hits, ""],
        training_row(results, arm),
        evaluation_row(results, arm)]
    labels = [cell(label_of(results, which)) for which in (REFERENCE, arm)]
    header = [how_trained(results), *labels, "difference (95% interval)"]
    return markdown(header, rows, where_measured(results))


def row_of_arm(results, arm):
    """An arm of the table of arms."""
    detail = results["detail"]
    about, part = detail["arms"][arm], detail["bpc"][arm]
    label, bpc = cell(about["label"]), f"{results[arm]['bpc']:.4f}"
    recall = f"{detail['recall']['long_range']['arms'][arm]['mean']:.3f}"
    if arm == REFERENCE:
        return [label, "", bpc, "", "", recall, "", ""]
    bounds = [1 + bound / 100 for bound in percent_bounds(results, detail["bpc"], arm)]
    rate = training_ratio(results, arm)
    return [label, added(results, arm), bpc,
            f"{part['ratio']:.3f} ({from_to(bounds, '.3f')})",
            VERDICTS[part["verdict"]].removesuffix(" on"), recall,
            f"x {rate:.2f}" if rate else "", bytes_said(about["state_bytes"])]


def table_of_arms(results):
    """All arms but the controls, each on one line."""
    header = ["arm", "parameters", "bits per character", "x baseline (95%)", "compression",
              f"recall {reach_said(results['detail']['recall'])}", "training speed", "state"]
    rows = [row_of_arm(results, arm) for arm in arms_of(results) if not ARMS[arm].control]
    chained = ", chained" if results["detail"]["run"]["settings"].get("chained") else ""
    return markdown(header, rows, f"{how_trained(results)}{chained}. {where_measured(results)}")


def table_of_speed(bench):
    """Some ratios of tests/bench.py."""
    found = {row["what"]: row for row in bench["compared"]}
    rows = []
    for what in RATIOS:
        row = found[what]
        rows.append([what, f"x {row['median']:.2f}", from_to((row["low"], row["high"]), ".2f")])
    run = bench["run"]
    small_print = f"{run['size']} model, batch {run['batch']}. {run['device']}, torch {run['torch']}."
    return markdown(["", "median", "lowest to highest round"], rows, small_print)


TABLES = {                      # of README.md: what it is made from, and the command that makes that
    "results": ("results.json", table_of_results, "python eval.py --report"),
    "arms": ("results_arms.json", table_of_arms, "./run_all.sh --memories"),
    "speed": ("results_bench.json", table_of_speed, "python tests/bench.py"),
}


def of_old_layout(results):
    """Whether a results.json was written before arms were data."""
    detail = results.get("detail")
    return isinstance(detail, dict) and "arms" not in detail


def tables(root):
    """({name: markdown}, {name: why it is left as it is}) of README.md; raises StageError where
    a field is wrong."""
    made, left = {}, {}
    for name, (file, table_of, again) in TABLES.items():
        if not (root / file).exists():
            left[name] = f"{root / file} is missing; make it with: {again}"
            continue
        value = read_json(root / file, again)
        if of_old_layout(value):
            left[name] = f"{root / file} is of an earlier version; make it again with: {again}"
            continue
        try:
            if name != "speed" and value["detail"]["data"].get("part") == "choosing":
                left[name] = f"{root / file} is of the documents on which settings were chosen; report with: {again}"
                continue
            json.dumps(value, allow_nan=False)
            made[name] = table_of(value)
        except DAMAGE as error:
            raise StageError(f"{root / file} lacks a field or has a wrong one ({why(error)}); "
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


def draw(root, results, folders, gone):
    """{path: PNG} of all pictures."""
    detail, figures, pictures = results["detail"], {}, {}
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
    return pictures


def warn(root, pictures, gone, again):
    """Name the checkpoints that are gone, and pictures that are older than the results."""
    if gone:
        print(f"warning: gone, so not compared with results.json: {', '.join(gone)}")
    for name, flag in ("results_controls.png", " --controls"), ("results_memory.png", ""):
        if root / name not in pictures and (root / name).exists():
            print(f"warning: {root / name} is of an earlier evaluation; for a new one: {again}{flag}")


def plot(root, quick):
    """Draw all pictures of a root, and give them to wandb."""
    start, again = time.monotonic(), command("eval.py --report", root, quick)
    results = read_json(root / "results.json", again)
    try:
        json.dumps(results, allow_nan=False)                        # NaN is for no picture
        seed = results["detail"]["run"]["seeds"][0]
        config = {**results["detail"]["run"], "data": results["detail"]["data"]}
        folders, gone = verify(root, results, again)
        pictures, sentence = draw(root, results, folders, gone), headline(results)[1]
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
