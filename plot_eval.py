"""Draw results.json: one look tells whether the memory helped.

  reads   ROOT/results.json (eval.py); of each checkpoint it names, the hash of model.safetensors and history.jsonl
          (train.py: trained/<arm>/ and trained/seedN/<arm>/)
  writes  ROOT/results.png; where results.json holds controls (detail.controls), ROOT/results_controls.png as well
  next    nothing: this is the last stage

Results of other checkpoints than those in ROOT are refused. The same results give the same picture, byte for byte.

  python plot_eval.py
  python plot_eval.py --quick
"""

import argparse
import io
import json
import shlex
import textwrap
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from models import StageError, read_json, run_stage, sha256, write_atomic

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


def new_figure(height, results, gone, title=None):
    """A figure `height` inches tall with headline, legend and, at its foot, where the numbers come from."""
    figure, (verdict, sentence), detail = Figure((WIDTH, height)), headline(results), results["detail"]
    data, run = detail["data"], detail["run"]
    figure.text(0.03, 1 - 0.14 / height, title or verdict, fontsize=14, weight="bold", va="top")
    figure.text(0.03, 1 - 0.48 / height, sentence, fontsize=9.5, va="top")
    figure.legend([Line2D([], [], color=look["color"], linestyle=look["line"]) if title else
                   Patch(facecolor=look["color"], hatch=look["hatch"], edgecolor="white", linewidth=0)
                   for look in ARMS.values()], [look["label"] for look in ARMS.values()],
                  loc="upper left", bbox_to_anchor=(0.022, 1 - 0.66 / height), ncols=2, frameon=False)
    if data["quick"]:
        figure.text(0.97, 1 - 0.8 / height, "QUICK RUN: shows that it runs, not what it is worth", weight="bold",
                    color="white", ha="right", va="top", bbox=dict(facecolor=INK, edgecolor=INK))
    words = ("Quick run. " * data["quick"] + f"Data: {textwrap.shorten(data['source'], 100)}; "
             f"{data['val_documents']:,} validation documents, "
             f"{data['val_characters']:,} characters. Model: {run['parameters'] / 1e6:.1f}M parameters, "
             f"{run['steps']:,} training steps, seeds: {', '.join(map(str, run['seeds']))}. Hardware: {run['device']}, "
             f"torch {run['torch']}, commit {run.get('commit', 'unknown')}. Recall: forced choice, "
             f"{detail['recall']['trials_per_distance']:,} trials per distance. "
             "Per cent: the change with memory. Error bars, brackets: 95% intervals."
             + f" Checkpoints gone, not compared: {textwrap.shorten(', '.join(gone), 100)}." * bool(gone))
    figure.text(0.03, 0.1 / height, textwrap.fill(words, 156), fontsize=7.5, color=QUIET, linespacing=1.35)
    return figure


def draw_results(results, folders, gone):
    height = 7.7
    figure = new_figure(height, results, gone)
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
    figure = new_figure(height, results, gone, "Controls: what the gain depends on")
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="DIR",
                        help="folder of results.json (default: the project folder; with --quick its quick/)")
    parser.add_argument("--quick", action="store_true", help="draw the quick run")
    flags = parser.parse_args(argv)
    root, start = flags.root or (PROJECT / "quick" if flags.quick else PROJECT), time.monotonic()
    again = f"python eval.py --root {shlex.quote(str(root))}" + " --quick" * flags.quick

    results, figures = read_json(root / "results.json", again), {}
    matplotlib.use("Agg")
    try:
        json.dumps(results, allow_nan=False)                    # NaN is for no picture
        folders, gone = verify(root, results["detail"]["run"]["checkpoints"], again)
        # whatever the user's matplotlibrc says
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)              # the mean of nothing, a division by zero
            warnings.filterwarnings("ignore", "Glyph .* missing")       # a name in a script that the font lacks
            figures[root / "results.png"] = draw_results(results, folders, gone)
            if results["detail"].get("controls"):
                figures[root / "results_controls.png"] = draw_controls(results, gone)
            pictures = {path: io.BytesIO() for path in figures}
            for path, figure in figures.items():
                figure.savefig(pictures[path], format="png", dpi=DPI, metadata={"Software": None})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeWarning) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StageError(f"{root}/results.json lacks a field or has a wrong one ({why}); make it again with: {again}"
                         ) from None
    if gone:
        print(f"warning: gone, so not compared with results.json: {', '.join(gone)}")
    if len(pictures) == 1 and (root / "results_controls.png").exists():
        print(f"warning: {root}/results_controls.png is of an earlier evaluation; for a new one: {again} --controls")
    for path, picture in pictures.items():
        write_atomic(path, picture.getvalue())
    print(headline(results)[1])
    print(f"wrote {' and '.join(map(str, pictures))} in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run_stage(main)
