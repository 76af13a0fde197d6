"""Draw results.json: one look tells whether the memory helped.

  reads   ROOT/results.json (eval.py); of each checkpoint it names, the hash of model.safetensors and history.jsonl
          (train.py: trained/<arm>/ and trained/seedN/<arm>/)
  writes  ROOT/results.png; where results.json holds them, ROOT/results_controls.png (detail.controls) and
          ROOT/results_memory.png (detail.memory: what the memory did on one document)
  next    nothing: this is the last stage

Results of other checkpoints than those in ROOT are refused. The same results give the same picture, byte for byte.
The pictures also go to wandb: offline unless you are logged in, and not at all with WANDB_MODE=disabled.

  python plot_eval.py
  python plot_eval.py --quick
"""

import argparse
import collections
import io
import itertools
import json
import re
import string
import textwrap
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from models import StageError, Wandb, command, read_json, run_stage, sha256, write_atomic

PROJECT = Path(__file__).resolve().parent
WIDTH, DPI = 9.0, 200       # inches, pixels per inch: sharp at twice the 900 pixels that a README gives
INK, QUIET, NEUTRAL, FAINT, SHADE = "#1a1a1a", "#595959", "#a3a3a3", "#d9d9d9", "#f1f1f1"
ARMS = {                    # colours apart for colour-blind eyes and, with hatch, marker and dash, in grey print
    "baseline": dict(label="without memory (baseline)", color="#d98a2b", hatch="////", marker="s", line="--"),
    "with_ltm": dict(label="with memory (with_ltm)", color="#17497a", hatch="", marker="o", line="-"),
}
VERDICTS = {"helps": "helps", "hurts": "hurts", "inconclusive": "has no clear effect on"}
SMOOTHING = 0.04            # share of the logged steps that one point of the smoothed hit rate averages
RESAMPLES, SEED = 10_000, 0     # of the bootstrap over the repeats of the throughput measurement
BLUE = ARMS["with_ltm"]["color"]
MONO, LETTER = "DejaVu Sans Mono", 9.5      # font and size, in points, of the text in results_memory.png
CELL = (0.08, 0.245)        # inches: width of a character (0.602 of its size, in whole pixels) and height of a line
COLUMNS = 105               # characters in a line
MOST_BITS = 16              # where the scale of a token's cost ends: about log2 of the vocabulary
SOURCES, LEAST_SHARE = 3, 0.05      # how many of the stored tokens that a prediction drew on are shown, if they matter
# what a token costs without the memory, in the baseline's colour; its brightness alone tells it, too
SURPRISAL = LinearSegmentedColormap.from_list("surprisal", ["#ffffff", "#fae6cd", "#efbd80", "#d98a2b", "#8c500c"])
STYLE = {"font.size": 9, "text.color": INK, "axes.edgecolor": QUIET, "axes.spines.top": False, "axes.axisbelow": True,
         "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.6, "hatch.color": "white",
         "hatch.linewidth": 0.8, "text.parse_math": False}      # a $ in a name is a $


def verify(root, checkpoints, again):
    """[(arm, folder)] of all checkpoints, and those that are gone; raises StageError where one was changed since."""
    folders, gone = [], []
    for arm, entry in ((arm, entry) for arm in ARMS for entry in checkpoints[arm]):
        name = Path(entry["folder"])
        if name.is_absolute() or ".." in name.parts:
            raise StageError(f"results.json names a folder outside of {root}: {name}; make it again with: {again}")
        weights = root / name / "model.safetensors"
        if not weights.is_file():
            gone.append(str(name))
        elif sha256(weights) != entry["sha256"]:
            raise StageError(f"results.json is of another checkpoint than {weights}; rerun: {again}")
        config = root / (name.parent.parent if name.parent.name == "checkpoints" else name) / "config.json"
        if config.is_file() and sha256(config) != entry["config_sha256"]:
            raise StageError(f"results.json is of another model than {config} describes; rerun: {again}")
        folders.append((arm, root / name))
    return folders, gone


def hit_rates(path):
    """The memory's hit rate at each logged step of a history.jsonl, (2, N); nothing where there is none."""
    rates, unread = {}, 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line, parse_constant=int)                  # int("NaN") is a ValueError
            rates[int(row["step"])] = float(row["ltm_hit_rate"])        # of a step that was taken twice, the last
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            unread += 1
    if unread:
        print(f"warning: {path}: lines left out, as no hit rate can be read from them: {unread:,}")
    return np.array(sorted(rates.items()), float).reshape(-1, 2).T


def heading(axes, title, what):
    """A panel's title in bold, below it what is measured, in which unit, and which direction is good."""
    axes.set_title(what, loc="left", fontsize=8.5, color=QUIET, pad=7)
    axes.annotate(title, (0, 1), (0, 21), xycoords="axes fraction", textcoords="offset points", weight="bold",
                  fontsize=10.5)


def share(axes, title, what="share right, higher is better", chance=None):
    """Title, y axis and grid of a panel of shares, with the line that guessing reaches."""
    heading(axes, title, what)
    axes.set(ylim=(0, 1.16), yticks=np.arange(0, 1.01, 0.2))
    axes.grid(axis="y")
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=1, linestyle=":")
        axes.annotate(f"chance {chance:.3g}", (0, chance), (3, 3), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", fontsize=8)


def spread(values, bounds):
    """[low, high] of each value as matplotlib's yerr, (2, N), which is never negative."""
    low, high = np.array(bounds, float).T
    return np.clip([values - low, high - values], 0, None)


def draw_bars(axes, form, groups):
    """Pairs of bars from zero. groups: {label: ({arm: (value, [low, high])}, note above the pair)}."""
    for side, (arm, look) in zip((-0.2, 0.2), ARMS.items()):
        values, bounds = zip(*(pair[arm] for pair, _ in groups.values()))
        bars = axes.bar(np.arange(len(groups)) + side, values, 0.38, color=look["color"], hatch=look["hatch"],
                        edgecolor="white", linewidth=0, yerr=spread(values, bounds), capsize=3, ecolor=INK)
        axes.bar_label(bars, fmt=form, padding=3)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.4)
    for place, (_, note) in enumerate(groups.values()):
        axes.text(place, axes.get_ylim()[1], note, ha="center", va="top", fontsize=8.5)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def draw_headline_bars(compression, recall, speed, results):
    """Documents differ, so an arm's interval of BPC is wide; the note is of the difference on the same documents."""
    detail, groups, pair, rng = results["detail"], {}, {}, np.random.default_rng(SEED)
    for label, part in (("whole documents", detail["bpc"]), ("128-token windows", detail["bpc_windows"])):
        bpc = {arm: (np.mean(part[arm]["per_seed"]), part[arm]["ci95"]) for arm in ARMS}
        low, high = (100 * bound / bpc["baseline"][0] for bound in part["difference"]["ci95"])
        groups[label] = bpc, f"{100 * (part['ratio'] - 1):+.1f}%\n({low:+.1f} to {high:+.1f})"
    draw_bars(compression, "{:.3f}", groups)
    heading(compression, "Compression", "bits per character (BPC), lower is better")
    far = detail["recall"]["long_range"]
    draw_bars(recall, "{:.2f}", {f"{reach(far)} tokens back": (
        {arm: (results[arm]["long_range_recall"], far[arm]["ci95"]) for arm in ARMS}, "")})
    recall.set_xlim(-0.85, 0.45)
    share(recall, "Long-range recall", chance=detail["recall"]["chance"])
    for arm in ARMS:
        runs = detail["tokens_per_sec"][arm]["runs"]
        medians = np.median(rng.choice(runs, (RESAMPLES, len(runs))), axis=1)
        pair[arm] = results[arm]["tokens_per_sec"], np.percentile(medians, [2.5, 97.5])
    draw_bars(speed, "{:,.0f}", {"evaluation": (pair, f"{100 * (detail['tokens_per_sec']['ratio'] - 1):+.1f}%")})
    speed.yaxis.set_major_formatter("{x:,.0f}")
    heading(speed, "Speed", "tokens/s, higher is better")


def draw_curve(axes, recall):
    """Recall over the distance between a fact and the question for it."""
    places, window = recall["distances"], recall["window"]
    low, high = min(places) / 1.15, max(places) * 1.15
    axes.set_xscale("log", base=2)
    axes.axvspan(low, window, color=SHADE, linewidth=0)
    for place, label in (window, "attention window"), (recall.get("receptive_field") or 0, "receptive field"):
        if low < place < high:
            axes.axvline(place, color=QUIET, linewidth=1, linestyle="-.")
            axes.text(place / 1.03, 1.1, f"{label} {place:,}", ha="right", va="center", fontsize=8)
    for arm, look in ARMS.items():
        values = recall[arm]["forced_choice"]
        axes.errorbar(places, values, spread(values, recall[arm]["forced_choice_ci95"]), color=look["color"],
                      linestyle=look["line"], marker=look["marker"], markersize=5, linewidth=1.8, capsize=2.5)
    axes.set_xlim(low, high)
    axes.set_xticks(places, [f"{place:,}" for place in places], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("tokens from fact to question")
    share(axes, "Recall over distance", chance=recall["chance"])


def draw_hit_rate(axes, folders, evaluated):
    """Share of predictions that retrieved something, as training went on: the first seed in full, the others thin."""
    drawn = set()
    for arm, folder in folders:
        (steps, rates), look, first = hit_rates(folder / "history.jsonl"), ARMS[arm], arm not in drawn
        if len(steps):
            half = int(len(steps) * SMOOTHING / 2)
            smooth = [np.mean(rates[max(0, at - half):at + half + 1]) for at in range(len(steps))]
            axes.plot(steps, rates, ".", color=look["color"], markersize=4, alpha=0.2 * first, markeredgewidth=0)
            axes.plot(steps, smooth, look["line"], color=look["color"], linewidth=2 if first else 0.8)
            drawn.add(arm)
    if not drawn:
        axes.text(0.5, 0.5, "no history.jsonl\nto draw it from", ha="center", color=QUIET, transform=axes.transAxes)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("training step")
    share(axes, "Memory hits in training", f"share of predictions; in evaluation {evaluated:.2f}")


def reach(far):
    return f"{min(far['distances']):,}\u2013{max(far['distances']):,}"


def headline(results):
    """The verdict in one line, and the numbers it stands on in another."""
    bpc, recall = results["detail"]["bpc"], results["detail"]["recall"]
    one, two = bpc["verdict"], recall["long_range"]["verdict"]
    base, memory = (results[arm] for arm in ARMS)
    return (f"Memory {VERDICTS[one]} compression and {VERDICTS[two] + ' ' if two != one else ''}long-range recall",
            f"With memory: BPC {memory['bpc']:.3f} vs {base['bpc']:.3f} ({100 * (bpc['ratio'] - 1):+.1f}%, {one}), "
            f"recall {reach(recall['long_range'])} tokens back {memory['long_range_recall']:.2f} vs "
            f"{base['long_range_recall']:.2f} (chance {recall['chance']:.3g}, {two})")


def new_figure(height, results, gone, title, sentence, notes, badge=0.8):
    """A figure `height` inches tall with title, sentence and, at its foot, where the numbers come from.

    `badge`: how many inches down it says that this is a quick run, where it is one.
    """
    figure, detail = Figure((WIDTH, height)), results["detail"]
    data, run = detail["data"], detail["run"]
    figure.text(0.03, 1 - 0.14 / height, title, fontsize=14, weight="bold", va="top")
    figure.text(0.03, 1 - 0.48 / height, sentence, fontsize=9.5, va="top")
    if data["quick"]:
        figure.text(0.97, 1 - badge / height, "QUICK RUN: shows that it runs, not what it is worth", weight="bold",
                    color="white", ha="right", va="top", bbox=dict(facecolor=INK, edgecolor=INK))
    words = ("Quick run. " * data["quick"] + f"Data: {textwrap.shorten(data['source'], 100)}; "
             f"{data['val_documents']:,} validation documents, "
             f"{data['val_characters']:,} characters. Model: {run['parameters'] / 1e6:.1f}M parameters, "
             f"{run['steps']:,} training steps, seeds: {', '.join(map(str, run['seeds']))}. Hardware: {run['device']}, "
             f"torch {run['torch']}, commit {run.get('commit', 'unknown')}.{notes}"
             + f" Checkpoints gone, not compared: {textwrap.shorten(', '.join(gone), 100)}." * bool(gone))
    figure.text(0.03, 0.1 / height, textwrap.fill(words, 156), fontsize=7.5, color=QUIET, linespacing=1.35)
    return figure


def arms_legend(figure, handle):
    """The legend of both arms; handle(look) makes what stands before a label."""
    figure.legend([handle(look) for look in ARMS.values()], [look["label"] for look in ARMS.values()],
                  loc="upper left", bbox_to_anchor=(0.022, 1 - 0.66 / figure.get_figheight()), ncols=2, frameon=False)


def draw_results(results, folders, gone):
    height, trials = 7.7, results["detail"]["recall"]["trials_per_distance"]
    notes = (f" Recall: forced choice, {trials:,} questions per distance. Per cent: the change with memory. Error "
             f"bars, brackets: 95% intervals.")
    figure = new_figure(height, results, gone, *headline(results), notes)
    arms_legend(figure, lambda look: Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor="white",
                                           linewidth=0))
    panels = figure.subplot_mosaic("AAAAAA.BBBB..CCCC;DDDDDDDDDD.EEEEEE", gridspec_kw=dict(
        left=0.065, right=0.975, top=1 - 1.55 / height, bottom=1 / height, hspace=0.5, wspace=0))
    draw_headline_bars(panels["A"], panels["B"], panels["C"], results)
    draw_curve(panels["D"], results["detail"]["recall"])
    draw_hit_rate(panels["E"], folders, results["with_ltm"]["memory_hit_rate"])
    return figure


def draw_controls(results, gone):
    """A table of bars, group by group: each control's BPC by the baseline's, and its long-range recall."""
    detail, rows = results["detail"], []
    for row in detail["controls"]:
        if not rows or row.get("group") != rows[-1].get("group"):
            rows.append({"name": row.get("group") or "", "group": row.get("group"), "title": True})
        rows.append(row)
    height = 2.7 + 0.22 * len(rows)
    trials = max(row.get("trials") or 0 for row in detail["controls"])
    notes = (f" Recall: forced choice, {trials:,} questions. Lines: all seeds; bars: seed {detail['run']['seeds'][0]}, "
             f"the first, not trained again.")
    figure = new_figure(height, results, gone, "Controls: what the gain depends on", headline(results)[1], notes)
    arms_legend(figure, lambda look: Line2D([], [], color=look["color"], linestyle=look["line"]))
    columns = figure.subplots(1, 2, sharey=True, gridspec_kw=dict(
        left=0.34, right=0.94, top=1 - 1.55 / height, bottom=0.95 / height, wspace=0.22))
    arms = {"bpc_ratio": (1, detail["bpc"]["ratio"]), "recall": [results[arm]["long_range_recall"] for arm in ARMS]}
    for axes, key, origin in zip(columns, arms, (1, 0)):
        for place, row in enumerate(rows):
            value, none = row.get(key), "" if "title" in row else "\u2013"
            axes.barh(place, 0 if value is None else value - origin, 0.62, left=origin, color=NEUTRAL)
            axes.text(1.02, place, none if value is None else f"{value:.3f}", va="center", fontsize=8,
                      transform=axes.get_yaxis_transform())
        for look, value in zip(ARMS.values(), arms[key]):
            axes.axvline(value, color=look["color"], linestyle=look["line"], linewidth=1.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    axes.set(xlim=(0, 1.02), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [textwrap.shorten(row["name"], 42) for row in rows], fontsize=8.5)
    for label, row in zip(columns[0].get_yticklabels(), rows):
        label.set(weight="bold" if "title" in row else "normal", fontsize=8.5)
    heading(columns[0], "BPC by the baseline's", "left of 1 is better than the baseline")
    heading(columns[1], "Long-range recall", f"share right, higher is better; chance {detail['recall']['chance']:.3g}")
    return figure


def flow(texts):
    """The texts run on in lines of COLUMNS: [[(line, column, character)] of each], what the font lacks as a box.

    A line ends between words, and at newlines past its middle; a word longer than a line goes on in the next.
    """
    glyphs, line, column, cells = get_font(findfont(MONO)).get_charmap(), 0, 0, []
    for word in re.findall(r"[^\S\n]*\S+\n*|\s+", "".join(texts)):
        if column and column + len(word) > COLUMNS:
            line, column = line + 1, 0
        for letter in word:
            if column == COLUMNS:
                line, column = line + 1, 0
            shown = "\u00b6" if letter == "\n" else " " if letter.isspace() else letter
            cells.append((line, column, shown if shown.isprintable() and ord(shown) in glyphs else "\u25a1"))
            column += column > 0 or shown != " "                # a line begins with its first word
        if "\n" in word and column > COLUMNS / 2:
            line, column = line + 1, 0
    cells = iter(cells)
    return [[next(cells) for _ in text] for text in texts]


def spans(cells):
    """[(line, first column, the one past the last)] that a token takes, without the spaces around it."""
    found = {}
    for line, column, _ in [cell for cell in cells if cell[2] != " "] or cells:
        found[line] = found.get(line, (column,))[0], column + 1
    return [(line, *columns) for line, columns in found.items()]


def draw_token(axes, cells, bits, stored):
    """A token on a ground that is the darker the more bits it cost (None: unknown), underlined where it was stored."""
    ground = SURPRISAL(min((bits or 0) / MOST_BITS, 1.0))
    ink = "white" if np.dot(ground[:3], (0.299, 0.587, 0.114)) < 0.45 else "black"
    for line, start, stop in spans(cells):
        axes.add_patch(Rectangle((start, line + 0.17), stop - start, 0.67, color=ground, linewidth=0))
        if stored:
            axes.add_patch(Rectangle((start + 0.1, line + 0.86), stop - start - 0.2, 0.07, color=BLUE, linewidth=0))
        word = "".join(letter for at, _, letter in cells if at == line).strip(" ")
        axes.text(start, line + 0.67, word, family=MONO, fontsize=LETTER, color=ink,
                  alpha=1 if word.strip("\u00b6") else 0.5)


def chip(axes, x, y, letter, predicted):
    """The letter of a prediction in a disc: a dark one for the prediction itself, a light one for what it drew on."""
    axes.text(x, y, letter, fontsize=6.5, weight="bold", ha="center", va="center", zorder=6,
              color="white" if predicted else BLUE, bbox=dict(
                  boxstyle="circle,pad=0.22", facecolor=BLUE if predicted else "white", edgecolor=BLUE, linewidth=1))


def frame(axes, cells, letter, predicted, beside=0):
    """A box around a token, with the letter of its prediction; `beside`: letters that stand there already."""
    for line, start, stop in spans(cells):
        axes.add_patch(Rectangle((start - 0.15, line + 0.1), stop - start + 0.3, 0.84, fill=False, zorder=5,
                                 edgecolor=BLUE, linewidth=1.8 if predicted else 1.2))
    line, start, _ = spans(cells)[0]
    chip(axes, start - 0.4 + 1.7 * beside, line + 0.14, letter, predicted)


def arrow(axes, start, stop, bend):
    """An arrow, edged in white, over the grounds of the text, but under its letters."""
    for width, color, height in (3, "white", 2.4), (1.4, BLUE, 2.5):
        axes.add_patch(FancyArrowPatch(start, stop, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", shrinkA=0,
                                       shrinkB=0, mutation_scale=9, linewidth=width, color=color, zorder=height))


def heaviest(read):
    """The stored tokens that are shown for a prediction: the first in any case, others where they matter."""
    return [source for rank, source in enumerate(read["from"][:SOURCES]) if not rank or source["share"] >= LEAST_SHARE]


def draw_reads(axes, reads, texts):
    """Each prediction and the stored tokens it drew on, framed, with arrows from these to it."""
    framed = collections.Counter()
    for letter, read, bend in zip(string.ascii_uppercase, reads, itertools.cycle((0.12, -0.12))):
        line, start, stop = spans(texts[read["at"]])[0]
        for at in [source["at"] for source in heaviest(read)] + [read["at"]]:
            if at != read["at"]:
                above, first, last = spans(texts[at])[-1]
                arrow(axes, ((first + last) / 2, above + 0.95), ((start + stop) / 2, line + 0.1), bend)
            frame(axes, texts[at], letter, at == read["at"], framed[at])
            framed[at] += 1


def draw_scale(axes, threshold):
    """The grounds by bits, with the `threshold` above which a token is stored."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=SURPRISAL, extent=(0, MOST_BITS, 0, 1), aspect="auto")
    axes.set(yticks=[], xticks=[0, threshold, 8, 12, MOST_BITS])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(threshold, color=INK, linewidth=1)


def draw_key(axes, threshold):
    """What the marks in the text mean, in two lines of cells."""
    spell = lambda line, column: [(line, column + at, letter) for at, letter in enumerate("token")]
    for line, column, more in (0, 1, 1), (1, 1, 1), (1, 11, -2):
        draw_token(axes, spell(line, column), threshold + more, more > 0)
    frame(axes, spell(1, 1), "A", False)
    arrow(axes, (6.2, 1.52), (10.8, 1.52), 0)
    frame(axes, spell(1, 11), "A", True)
    axes.text(18, 0.67, f"stored in memory: cost more than {threshold:g} bits")
    axes.text(18, 1.67, "prediction A, and the stored token it drew on")


def draw_costs(words, bars, found, reads, tokens, texts):
    """A row for each prediction: the token, its bits without and with the memory, and the stored tokens it drew on."""
    for side, key, look in zip((-0.19, 0.19), ("bits", "bits_mixture"), ARMS.values()):
        drawn = bars.barh(np.arange(len(reads)) + side, [tokens[read["at"]][key] for read in reads], 0.34,
                          color=look["color"], hatch=look["hatch"], edgecolor="white", linewidth=0)
        first, *labels = bars.bar_label(drawn, fmt="{:.1f}", padding=3, fontsize=8.5)
        first.set_text(f"{first.get_text()} {'memory on' if key == 'bits_mixture' else 'memory off'}")
    for row, (letter, read) in enumerate(zip(string.ascii_uppercase, reads)):
        chip(words, 0.08, row, letter, True)
        word = "".join(shown for _, _, shown in texts[read["at"]]).strip()
        words.text(0.22, row, word if len(word) < 15 else word[:14] + "\u2026", family=MONO, va="center")
        found.text(0, row, "\n".join(f"{read['at'] - source['at']:,} tokens back: share {source['share']:.2g}, "
                                     f"cosine {source['cosine']:.2f}" for source in heaviest(read)),
                   fontsize=8.5, va="center")
    for axes in words, bars, found:
        axes.set(ylim=(len(reads) - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[["bottom", "left"]].set_visible(False)
    bars.axvline(0, color=QUIET, linewidth=1)
    heading(words, "Prediction", "the token that came")
    heading(bars, "What it cost", "bits, lower is better")
    heading(found, "What it drew on from memory", "share of all probability; cosine of the addresses")


def draw_memory(results, gone):
    """The text of a document with what was stored of it, and predictions with the stored tokens they drew on.

    detail.memory: document, window (tokens), threshold (bits); tokens: [{text, bits, bits_mixture, stored}]; reads:
    [{at, from: [{at, share, cosine}]}], `at` counting tokens; raises ValueError where a read is outside of them.
    """
    memory = results["detail"]["memory"]
    tokens, reads, threshold = memory["tokens"], memory["reads"], memory["threshold"]
    if not all(0 <= at < read["at"] < len(tokens) for read in reads for at in [0, *(x["at"] for x in read["from"])]):
        raise ValueError("detail.memory.reads: one is outside of the text, or draws on a later token")
    back = [read["at"] - source["at"] for read in reads for source in heaviest(read)]
    texts = flow([token["text"] for token in tokens])
    places = texts[:]
    for at in reversed(range(len(texts) - 1)):          # a character of several tokens is the text of the last of them
        places[at] = places[at] or places[at + 1]
    lines = 1 + max(line for cells in texts for line, _, _ in cells)
    row, head, foot = 0.42, 1.6 + 0.3 * results["detail"]["data"]["quick"], 0.6 + 0.75 * bool(reads)
    under = head + lines * CELL[1]                      # inches from the top down to the end of the text
    height = under + foot + row * len(reads)
    figure = new_figure(
        height, results, gone, "What the memory keeps, and what it finds again",
        f"The start of validation document {memory['document']:,}. Attention reaches {memory['window']:,} tokens back; "
        + (f"the memory, along the arrows, up to {max(back):,}." if back else "nothing was drawn from memory."),
        " Cost: -log2 of the token's probability, of one model with its memory off and on.", badge=1.52)

    def panel(left, down, wide, high, **limits):
        """Axes at so many inches from the left margin and from the top."""
        return figure.add_axes((0.03 + left / WIDTH, 1 - (down + high) / height, wide / WIDTH, high / height), **limits)

    def page(left, down, columns, lines):
        """Axes whose unit is a character's cell."""
        axes = panel(left, down, columns * CELL[0], lines * CELL[1], xlim=(0, columns), ylim=(lines, 0))
        axes.axis("off")
        return axes

    figure.text(0.03, 1 - 0.96 / height, "cost of a token, memory off, bits")
    draw_scale(panel(0, 1.04, 2.1, 0.15), threshold)
    draw_key(page(3.2, 0.82, 65, 2), threshold)
    text = page(0, head, COLUMNS, lines)
    for token, cells in zip(tokens, texts):
        draw_token(text, cells, token["bits"], token["stored"])
    draw_reads(text, reads, places)
    if reads:
        most = max(tokens[read["at"]][key] for read in reads for key in ("bits", "bits_mixture"))
        draw_costs(*(panel(left, under + 0.65, wide, row * len(reads), xlim=(0, end))
                     for left, wide, end in ((0, 1.5, 1.5), (1.6, 2.1, most), (5.2, 3.2, 3.2))), reads, tokens, places)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="DIR",
                        help="folder of results.json (default: the project folder; with --quick its quick/)")
    parser.add_argument("--quick", action="store_true", help="draw the quick run")
    flags = parser.parse_args(argv)
    root, start = flags.root or (PROJECT / "quick" if flags.quick else PROJECT), time.monotonic()
    again = command("eval.py", root, flags.quick)

    results, figures = read_json(root / "results.json", again), {}
    matplotlib.use("Agg")
    try:
        json.dumps(results, allow_nan=False)                    # NaN is for no picture
        data, run = results["detail"]["data"], results["detail"]["run"]
        seed, config = run["seeds"][0], {**run, "data": data}
        folders, gone = verify(root, run["checkpoints"], again)
        # whatever the user's matplotlibrc says
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)              # the mean of nothing, a division by zero
            warnings.filterwarnings("ignore", "Glyph .* missing")       # a name in a script that the font lacks
            figures[root / "results.png"] = draw_results(results, folders, gone)
            if results["detail"].get("controls"):
                figures[root / "results_controls.png"] = draw_controls(results, gone)
            if results["detail"].get("memory"):
                figures[root / "results_memory.png"] = draw_memory(results, gone)
            pictures = {path: io.BytesIO() for path in figures}
            for path, figure in figures.items():
                figure.savefig(pictures[path], format="png", dpi=DPI, metadata={"Software": None})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeWarning) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StageError(f"{root}/results.json lacks a field or has a wrong one ({why}); make it again with: {again}"
                         ) from None
    if gone:
        print(f"warning: gone, so not compared with results.json: {', '.join(gone)}")
    for name, flag in ("results_controls.png", " --controls"), ("results_memory.png", ""):
        if root / name not in pictures and (root / name).exists():
            print(f"warning: {root / name} is of an earlier evaluation; for a new one: {again}{flag}")
    for path, picture in pictures.items():
        write_atomic(path, picture.getvalue())
    print(headline(results)[1])
    print(f"wrote {', '.join(map(str, pictures))} in {time.monotonic() - start:.1f} s", flush=True)
    wandb = Wandb(root, seed, "eval", config, __file__, lambda what: print(f"warning: {what}; {root} has the pictures"))
    wandb.log_pictures(list(pictures))
    wandb.finish()


if __name__ == "__main__":
    run_stage(main)
