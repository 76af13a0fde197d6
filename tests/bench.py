"""How fast is it: every arm in both regimes, beside eager PyTorch, a conventional loop, Hugging Face's Trainer, the floor.

reads   data/train.bin where there is one (else random tokens: the cost does not depend on them)
writes  results_bench.json and results_bench.png into --out; prints the tables; README shows a part of them

    python tests/bench.py                           everything, in one run (the Trainer: pip install accelerate)
    python tests/bench.py --only baseline trainer   only these
    python tests/bench.py --only "baseline, chained" "with_gru, chained"
    python tests/bench.py --only processes          trainings that two GPUs share, of 400 steps
    python tests/bench.py --seconds 5 --out /tmp    longer timings, results elsewhere

On a CUDA GPU all has the size of train.py: 8 x 128 tokens a step, the 70M model, bfloat16. Elsewhere a small version
runs in float32, which shows only that it works. Contenders take turns, in alternating order, so that a drift hits all
alike; a number is the median of the rounds, its spread their lowest and highest; a ratio is taken within each round.
A memory is compared with the baseline of its regime; what its compilation takes and the memory that its training peaks
at come out of the same run.

The floor is the time no step of this training can beat as long as arithmetic and memory traffic do not overlap:

    floor      = arithmetic / measured bf16 matrix-product rate + bytes / measured copy bandwidth (read + written)
    arithmetic = 6 P N C + 6 N L C (C + 1) D        N rows of C tokens, L layers, D width, V vocabulary, P parameters,
                                                    all of them in matrices that multiply, output matrix included
    bytes      = 24 P        float32 weights and AdamW's m and v: each read and written
               + 4 P         bf16 gradients: written, read
               + 6 P         bf16 weights: written, read forward, read backward
               + 12 N C V    bf16 logits: written, read for the loss, read and written as gradient, read twice for its
                             two products

How to read it, from runs on H100 machines (torch 2.11):

* What waits for the host varies with the host: on four machines the loop like nanoGPT's took 64 to 78 steps/s and the
  Trainer 32 to 40, so that the ratios to them were 4.5 to 5.5 and 8.9 to 11. (The loop's logits are cut to the 50,257
  tokens, where nanoGPT's are padded: in our own step that cost 0.05 of 2.7 ms.)
* Generation by a hybrid is replayed as a CUDA graph, whose shapes never change; a cache that grows cannot be, and its
  time is the host's. Compiled (new_cache(compiled=True), some 20 s) the LTM makes 1,816 tokens/s on an H200, else 866.
* Left alone, the compiler chooses how a kernel sums by timing it, now this, now that: one kernel took 25 or 64
  microseconds a step, and the ratio of two arms 0.93 to 0.97 in eight pairs. It is told to go by rule
  (stages.compiled).
* The first arm that a machine compiles has what later ones share to do as well: 22 s, where the second, with a memory's
  own, took 13 s. The stages' import of torch and transformers, some 7 s each, is in none of these numbers.
* Evaluation's rounds depend on their order: on one H200, the first round aside, the LTM made 2.77 to 2.82 million
  tokens/s right after the baseline and 2.91 to 2.94 right after the store, so that its ratio is 0.92 to 0.96.
* torchrun's processes share a batch; the sum of their gradients is part of the graph. Two H200 make 457,000 tokens/s at
  8 rows a step, where one makes 472,000; at 64 rows 1.44 million, where one makes 0.84.
* An estimate, not a measurement, for a card of 30 TFLOP/s (bfloat16, float32 sums) and 272 GB/s, an RTX 4060: the floor
  is 26 ms a step there, and twice that, as on an H100 at its published rates, some 9 minutes for 10,000 steps.
"""

import argparse
import gc
import io
import os
import statistics
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure

import contenders
from contenders import PROJECT, REFERENCE, SPECIFIED_MEMORY, C, Setup, Skip, has_memory, in_regime
from stages import (ARMS, SPECIFIED, arm_flag, commit, default_root, pick_device, run_stage, sha256, write_atomic,
                    write_json)

ROUNDS = 3
CODE = ("models.py", "memories.py", "stages.py", "train.py", "eval.py", "tests/contenders.py")
COMPARED = [arm for arm in ARMS if has_memory(arm) and not ARMS[arm].control]
MEMORIES = [arm for arm in COMPARED if arm != REFERENCE]
OWN = {in_regime(arm, chained): (arm, chained) for chained in (False, True) for arm in COMPARED}
TRAINING = {name: f"train.py {arm_flag(arm)}{' --chained' * chained}" for name, (arm, chained) in OWN.items()}
TRAINING |= {"compiled": f"step of {REFERENCE}, torch.compile", "eager": f"step of {REFERENCE}, eager",
             "conventional": "conventional compiled loop", "trainer": "Hugging Face Trainer, GPT-2", "floor": "floor"}
PARTS = ("evaluation", "generation", "processes")
SHARES = {f"{rows} rows a step, {n} process{'es' * (n > 1)}": (rows, n) for rows in (8, 64) for n in (1, 2)}
SHARE = {SPECIFIED_MEMORY: 0.95, "with_store": 0.8, "with_gru": 0.8}    # of the baseline's steps/s that a memory keeps
SHARE_OF_ANY = 0.7
COMPILED = f"generation, {SPECIFIED_MEMORY}, compiled"
RATIOS = (                      # what, numerator, denominator, the bound that one GPU must keep
    ("steps/s over Hugging Face Trainer", REFERENCE, "trainer", ("≥", 10.0)),
    ("steps/s over the conventional compiled loop", REFERENCE, "conventional", ("≥", 5.5)),
    ("steps/s over its own step with torch.compile alone", REFERENCE, "compiled", None),
    ("steps/s over its own step, eager", REFERENCE, "eager", None),
    ("step time over the floor", "floor", REFERENCE, ("≤", 1.6)),
    *((f"{name} over {in_regime(REFERENCE, chained)}, training", name, in_regime(REFERENCE, chained),
       ("≥", SHARE.get(arm, SHARE_OF_ANY))) for name, (arm, chained) in OWN.items() if arm != REFERENCE),
    *((f"{arm} over {REFERENCE}, evaluation", f"evaluation, {arm}", f"evaluation, {REFERENCE}",
       ("≥", 0.95) if arm == SPECIFIED_MEMORY else None) for arm in MEMORIES),
    ("evaluation, one long document over many", "evaluation, one document", f"evaluation, {SPECIFIED_MEMORY}",
     ("≥", 0.9)),
    *((f"two GPUs over one, {rows} rows a step", f"{rows} rows a step, 2 processes", f"{rows} rows a step, 1 process",
       ("≥", least)) for rows, least in ((8, 0.8), (64, 1.7))),
    *((f"generation over KV-cached GPT after {n:,} tokens", f"generation, {SPECIFIED_MEMORY}, {n:,}",
       f"generation, GPT, {n:,}", bound)
      for n, bound in ((128, ("≥", 0.5)), (512, None), (2048, ("≥", 1.0)), (4096, ("≥", 1.0)))),
    (f"generation, {SPECIFIED_MEMORY}, compiled over not", COMPILED, f"generation, {SPECIFIED_MEMORY}, 128", None))
PEAK = {arm: ("≤", 2.0) for arm in SPECIFIED}           # GiB
PEAK_OF_ANY = ("≤", 3.0)
START_UP = {arm: ("≤", 25.0) for arm in SPECIFIED}      # seconds
START_UP_OF_ANY = ("≤", 60.0)
INK, GREY, ORANGE, BLUE = "#1a1a1a", "#a3a3a3", "#d98a2b", "#17497a"    # of text, of others, of baselines, of memories


class Turns:
    """Times contenders in turn; `failed` and `skipped` say what has no number, and why."""

    def __init__(self, warm):
        self.warm, self.notes = warm, {"failed": {}, "skipped": {}}

    @contextmanager
    def noted(self, name):
        """What fails in here is noted under `name`; the rest goes on."""
        try:
            yield
        except Exception as error:
            kind = "skipped" if isinstance(error, Skip) else "failed"
            why = f"{type(error).__name__}: {error}" if kind == "failed" else str(error)
            self.notes[kind][name] = " ".join(why.split())[:300]
            print(f"{name}: {kind}, {self.notes[kind][name]}", file=sys.stderr)

    def measure(self, builders, seconds, rounds=ROUNDS):
        """{name: units per second in each round} of {name: function that makes a Case}, without those that fail."""
        cases, calls, rates = {}, {}, {name: [] for name in builders}
        for name, build in builders.items():
            with self.noted(name):
                case, n, began = build(), self.warm, time.time()
                case.seconds(min(n, case.most))                     # compiles
                print(f"{name}: ready in {time.time() - began:.0f} s", flush=True)
                calls[name] = 1 if case.most == 1 else max(1, min(case.most, int(seconds * n / case.seconds(n))))
                cases[name] = case
        for turn in range(rounds):
            for name in list(cases)[::-1 if turn % 2 else 1]:
                with self.noted(name):
                    rates[name].append(calls[name] * cases[name].units / cases[name].seconds(calls[name]))
            cases = {name: case for name, case in cases.items() if len(rates[name]) > turn}
        for name in cases:
            print(f"{name}: {statistics.median(rates[name]):,.4g}/s", flush=True)
        return {name: rates[name] for name in cases}


def unavoidable(setup):
    """What a training step of the baseline must do: the docstring's formulas, with 4 bytes for 2 where not bf16."""
    config, N, width = setup.model(REFERENCE).config, setup.settings.batch, 2 if setup.cuda else 4
    L, D, V = config.n_layer, config.n_embd, config.vocab_size
    P = L * (12 * D * D + config.n_head * D) + V * D                # layers, the heads' gates, embedding = output
    weights = 3 if setup.cuda else 2                                # passes: in float32 there is no copy to write
    return {"parameters": P, "operations": 6 * P * N * C + 6 * N * L * C * (C + 1) * D,
            "bytes": 24 * P + (2 + weights) * width * P + 6 * width * N * C * V}


def bench_training(setup, turns, wanted, seconds):
    """Steps per second of all contenders and of the floor; the two limits it was computed from."""
    make = contenders
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        builders = {name: partial(make.own_step, setup, *which) for name, which in OWN.items()}
        builders |= {"compiled": partial(make.without_graph, setup, REFERENCE, compile=True),
                     "eager": partial(make.without_graph, setup, REFERENCE, compile=False),
                     "conventional": partial(make.conventional, setup, REFERENCE, folder),
                     "trainer": partial(make.hugging_face, setup, folder)}
        builders = {name: build for name, build in builders.items() if name in wanted}
        if "floor" in wanted:
            builders |= {"matrix product": partial(make.matrix_product, setup),
                         "copy": partial(make.device_copy, setup)}
        rates = turns.measure(builders, seconds)
    limits = {name: rates.pop(name) for name in ("matrix product", "copy") if name in rates}
    if len(limits) == 2:
        need = unavoidable(setup)
        rates["floor"] = [1 / (need["operations"] / a + need["bytes"] / b) for a, b in zip(*limits.values())]
    return rates, limits


@torch.no_grad()
def bench_evaluation(setup, turns, wanted, seconds):
    """Tokens per second of every arm on documents, one a lane, and of one document of as many rows."""
    if "evaluation" not in wanted:
        return {}
    length, many = setup.set.documents
    builders = {f"evaluation, {arm}": partial(contenders.scoring, setup, arm, many, length) for arm in COMPARED}
    builders["evaluation, one document"] = partial(contenders.scoring, setup, SPECIFIED_MEMORY, 1, many * length)
    # as long as the others, in shorter turns: at full load a card's clock moves within a second
    return turns.measure(builders, seconds / 3, 3 * ROUNDS)


@torch.no_grad()
def bench_generation(setup, turns, wanted, seconds):
    """Tokens per second after contexts of several lengths."""
    if "generation" not in wanted:
        return {}
    models = {arm: contenders.generator(setup, arm) for arm in MEMORIES} | {"GPT": contenders.generator(setup)}
    builders = {f"generation, {name}, {length:,}": partial(contenders.generating, setup, model, length)
                for length in setup.set.lengths for name, model in models.items()}
    compiled = partial(contenders.generating, setup, models[SPECIFIED_MEMORY], setup.set.lengths[0], compiled=True)
    return turns.measure(builders | {COMPILED: compiled}, seconds)


def bench_processes(setup, turns, wanted, seconds):
    """Steps per second of one training that the processes of torchrun share, each with a GPU of its own."""
    rates = {}
    for name, (rows, processes) in SHARES.items() if "processes" in wanted else ():
        with turns.noted(name):
            if setup.cuda and torch.cuda.device_count() < 2:
                raise Skip("needs two GPUs")
            rates[name] = contenders.shared(setup.root, rows, processes)
            print(f"{name}: {statistics.median(rates[name]):,.4g}/s", flush=True)
    return rates


# ------------------------------------------------------------------------------------ what it shows

def summary(values, **more):
    return {**more, "median": statistics.median(values), "low": min(values), "high": max(values), "rounds": values}


def compare(setup, rates):
    """The second table: what, unit, bound and whether it is kept (None where nothing is demanded here), the values."""
    rows = [summary([a / b for a, b in zip(rates[above], rates[below])], what=what, unit="x", bound=bound)
            for what, above, below, bound in RATIOS if above in rates and below in rates]
    for name, facts in setup.started.items() if setup.cuda else ():
        arm, _ = OWN[name]
        rows += [summary([facts["peak_gib"]], what=f"peak memory of training, {name}, which runs capped at 8 GB",
                         unit="GiB", bound=PEAK.get(arm, PEAK_OF_ANY)),
                 summary([facts["seconds"]], what=f"compilation and capture, {name}", unit="s",
                         bound=START_UP.get(arm, START_UP_OF_ANY))]
    for row in rows:
        sign, bound = row["bound"] if setup.cuda and row["bound"] else (None, 0)
        row["kept"] = row["median"] >= bound if sign == "≥" else row["median"] <= bound if sign else None
    return rows


def tables(rates, compared, notes):
    """Both tables, and what has no number, as markdown."""
    lines = ["| | median | lowest to highest |", "|---|---|---|"]
    for name, values in rates.items():
        s, unit = summary(values), "steps/s" if name in TRAINING or name in SHARES else "tokens/s"
        form = ",.0f" if s["median"] >= 100 else ".2f"
        lines.append(f"| {TRAINING.get(name, name)} | {s['median']:{form}} {unit} "
                     f"| {s['low']:{form}} to {s['high']:{form}} |")
    lines += ["", "| | measured | lowest to highest | demanded | |", "|---|---|---|---|---|"]
    for row in compared:
        demanded = "{} {}".format(*row["bound"]) if row["bound"] else ""
        lines.append(f"| {row['what']} | {row['median']:.2f} {row['unit']} | {row['low']:.2f} to {row['high']:.2f} "
                     f"| {demanded} | {({True: 'met', False: '**missed**', None: ''})[row['kept']]} |")
    return "\n".join(lines + [f"\n{kind}: {name}: {why}" for kind, of in notes.items() for name, why in of.items()])


def picture(rates, run):
    """Training steps per second as bars from zero, the floor as a line: PNG bytes; `run` as in results_bench.json."""
    shown = sorted(rates.keys() & TRAINING.keys() - {"floor"}, key=lambda name: statistics.median(rates[name]))
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(shown):
        s = summary(rates[name])
        color = GREY if name not in OWN else ORANGE if OWN[name][0] == REFERENCE else BLUE
        axes.barh(place, s["median"], 0.62, color=color, ecolor=INK, capsize=3,
                  xerr=[[s["median"] - s["low"]], [s["high"] - s["median"]]])
        axes.annotate(f"{s['median']:,.3g}", (s["high"], place), (6, 0), textcoords="offset points", va="center")
    if "floor" in rates:
        floor = statistics.median(rates["floor"])
        axes.axvline(floor, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate(f"floor {floor:,.3g}", (floor, -0.6), (-5, 0), textcoords="offset points", ha="right")
    axes.set(xlim=(0, axes.get_xlim()[1] * 1.1), ylim=(-0.7, len(shown) - 0.4))
    axes.set_yticks(range(len(shown)), [TRAINING[name] for name in shown])
    axes.set_title(f"Training steps per second, {run['batch']} x {C} tokens, {run['size']} model, {run['device']}",
                   loc="left", fontsize=10)
    foot = (f"Bars: median; whiskers: lowest to highest of {ROUNDS} rounds; orange: no memory; blue: memories. "
            f"torch {run['torch']}, commit {run['commit']}. {run['note']}")
    axes.set_xlabel(textwrap.fill(foot, 100), loc="left", fontsize=8, color="#555555", multialignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TRAINING, *PARTS]
    parser.add_argument("--root", metavar="DIR", help="folder of data/ (default: this one; without a GPU its quick/)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names, help=", ".join(names))
    parser.add_argument("--seconds", type=float, metavar="S", help="of a timing window (1.5; without a GPU 0.3)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: that of data/)")
    args = parser.parse_args(argv)
    if args.seconds is not None and not 0 < args.seconds <= 600:
        parser.error("--seconds must be above 0 and at most 600")
    args.root = Path(args.root) if args.root else PROJECT / default_root(None, quick=pick_device() != "cuda")
    args.out = args.out or args.root
    return args


def main(argv=None):
    args, began = parse(argv), time.time()
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name              # the first arm compiles as on a new machine
    torch._dynamo.config.recompile_limit = 64                       # one function, many models

    setup = Setup(args.root)
    turns, seconds = Turns(setup.set.warm), args.seconds or setup.set.seconds
    machine = torch.cuda.get_device_name() if setup.cuda else f"{setup.device}, {torch.get_num_threads()} threads"
    small = "" if setup.cuda else f"a small version ({machine}, no CUDA GPU): it shows only that everything works"
    print(f"{machine}, torch {torch.__version__}, {setup.data}\n{small}".strip(), flush=True)
    rates, limits = bench_training(setup, turns, args.only, seconds)
    setup.trainings.clear()
    for part in (bench_evaluation, bench_generation, bench_processes):
        gc.collect()
        if setup.cuda:
            torch.cuda.empty_cache()
        with turns.noted(part.__name__):
            rates |= part(setup, turns, args.only, seconds / 3)     # less noise where the GPU has much to do

    compared = compare(setup, rates)
    run = {"device": machine, "note": small, "commit": commit(), "torch": torch.__version__,
           "transformers": transformers.__version__, "data": setup.data, "size": setup.set.size,
           "batch": setup.settings.batch, "seconds": time.time() - began,
           "code": {name: sha256(PROJECT / name) for name in CODE if (PROJECT / name).exists()}}
    write_json(args.out / "results_bench.json", {
        "run": run,
        "per_second": {name: summary(values) for name, values in rates.items()},
        "floor": unavoidable(setup) | {name: summary(values) for name, values in limits.items()},
        "start_up": setup.started, "compared": compared, **turns.notes})
    if rates.keys() & TRAINING.keys() - {"floor"}:
        write_atomic(args.out / "results_bench.png", picture(rates, run))
    print(f"\n{tables(rates, compared, turns.notes)}\n\n{small}".rstrip())
    print(f"wrote {args.out}/results_bench.json and .png in {time.time() - began:.0f} s")
    return 1 if turns.notes["failed"] else 0


if __name__ == "__main__":
    run_stage(main)
