"""How fast is it: both arms beside eager PyTorch, a conventional loop, Hugging Face's Trainer, and the floor.

reads   data/train.bin where there is one (else random tokens: the cost does not depend on them)
writes  DIR/results_bench.json, DIR/results_bench.png; prints the table that the README shows

    python tests/bench.py                           everything, in one run
    python tests/bench.py --only baseline trainer   only these
    python tests/bench.py --seconds 5 --out /tmp    longer timings, results elsewhere

On a GPU everything has the size of train.py: 8 rows of 128 tokens a step, the 70M model, bfloat16. Elsewhere it runs a
small version in float32, which only shows that it works.

Contenders take turns, in alternating order, so that a drift of the clock hits all alike; a number is the median of the
rounds, its spread their lowest and highest, and a ratio is taken within each round. Compilation is warm-up.

The floor is the time that no training step of this model can beat, if arithmetic and memory traffic do not overlap:

    floor      = arithmetic / measured bf16 matrix-product rate + bytes / measured copy bandwidth (read + written)
    arithmetic = 6 P N C + 6 N L C (C + 1) D        N rows of C tokens, L layers, D width, P parameters, all of them in
                                                    matrices that multiply (the output matrix included), V vocabulary
    bytes      = 24 P        float32 weights and AdamW's m and v: each read and written
               + 4 P         bf16 gradients: written, read
               + 6 P         bf16 weights: written, read forward, read backward
               + 12 N C V    bf16 logits: written, read for the loss, gradient in and out of it, read for two products
"""

import argparse
import copy
import gc
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train                                                                # noqa: E402
from add_memory import make_models                                          # noqa: E402
from models import (EOT, GPT, SIZES, Memory, RevenaConfig, StageError, default_root, load_split,  # noqa: E402
                    lower_precision, pick_device, run_stage, sha256, write_atomic, write_json)

ROUNDS = 3
CAP = 8e9                       # bytes that training may take: a small consumer GPU
WARM_STEPS = 5                  # untimed, before a contender's first window and in each of the Trainer's
CALLS = 10_000                  # at most, in one window
GENERATED = 64                  # tokens timed after a context
BLOCK = 128                     # tokens of a context read at once
LOG_INTERVAL = 10               # nanoGPT's: the conventional loop reads its loss so often

FULL = SimpleNamespace(size="70M", batch=train.BATCH, seconds=1.5, document=16, documents=(8, 32),
                       lengths=(128, 512, 2048, 4096), product=8192, copied=1 << 30)
SMALL = SimpleNamespace(size="quick", batch=train.QUICK["BATCH"], seconds=0.4, document=2, documents=(4, 8),
                        lengths=(128, 256), product=1024, copied=1 << 26)      # document: in rows of 128 tokens

LABELS = {"baseline": "train.py, baseline", "with_ltm": "train.py, with_ltm", "compiled": "the same step, torch.compile",
          "eager": "the same step, eager", "conventional": "conventional compiled loop",
          "trainer": "Hugging Face Trainer, GPT-2", "floor": "floor"}
PARTS = ("evaluation", "length", "generation")
COLORS = {"baseline": "#d98a2b", "with_ltm": "#17497a"}                     # plot_eval.py's
INK, GREY = "#1a1a1a", "#a3a3a3"


class Skip(Exception):
    """What is not measured here, and why."""


# ------------------------------------------------------------------------------------ how things are timed

class Case:
    """A contender: run(n) does n calls, each worth `units` (steps, tokens, operations, bytes)."""

    def __init__(self, device, run, units=1, most=CALLS):
        self.run, self.units, self.most = run, units, most
        self.sync = getattr(torch, device).synchronize

    def time(self, calls):
        """Seconds that `calls` calls take."""
        self.sync()
        began = time.perf_counter()
        self.run(calls)
        self.sync()
        return time.perf_counter() - began


class Bench:
    """What a run shares: device, sizes, data, initial weights; and what became of each entry."""

    def __init__(self, root, seconds=None):
        self.device = pick_device()
        self.cuda = self.device == "cuda"
        self.setting = FULL if self.cuda else SMALL
        self.seconds = seconds or self.setting.seconds
        self.failed, self.skipped, self.start_up, self.trainings = {}, {}, {}, {}
        self.hybrid = make_models(self.setting.size, 0)[1]
        try:
            self.rows, self.data = load_split(root, "train")[0], f"{root}/data/train.bin"
        except StageError:
            self.rows = np.random.default_rng(0).integers(0, EOT, (4096, BLOCK)).astype(np.uint16)
            self.data = "random tokens"

    def model(self, arm):
        """A copy of the initial weights, float32, on the device."""
        model = copy.deepcopy(self.hybrid)
        model.config.ltm_enabled = arm == "with_ltm"
        return model.to(self.device)

    def training(self, arm):
        steps = 2 * (ROUNDS + 1) * CALLS
        order = train.row_order(len(self.rows), steps, self.setting.batch, 0)
        return train.Training(self.model(arm), self.rows, order)

    @contextmanager
    def isolated(self, name):
        """Whatever fails in here is noted under `name`, and the rest goes on."""
        try:
            yield
        except Skip as reason:
            self.skipped[name] = str(reason)
            print(f"{name}: skipped, {reason}", file=sys.stderr)
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}: FAILED, {self.failed[name]}", file=sys.stderr)

    def measure(self, unit, builders):
        """{name: units per second in each round} of {name: function that makes a Case}; what fails is left out."""
        cases, calls, rates = {}, {}, {}
        for name, build in builders.items():
            with self.isolated(name):
                case = build()
                warm = min(WARM_STEPS, case.most)
                case.time(warm)
                calls[name] = max(1, min(case.most, int(self.seconds * warm / case.time(warm)))) if case.most > 1 else 1
                cases[name], rates[name] = case, []
        for turn in range(ROUNDS):
            for name in list(cases)[::-1 if turn % 2 else 1]:
                with self.isolated(name):
                    rates[name].append(calls[name] * cases[name].units / cases[name].time(calls[name]))
            cases = {name: case for name, case in cases.items() if name not in self.failed}
        for name in cases:
            print(f"{name}: {summary(rates[name])['median']:,.4g} {unit}/s", flush=True)
        return {name: rates[name] for name in cases}


def summary(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": values}


# ------------------------------------------------------------------------------------ training, and its floor

def accelerated(bench, arm):
    """train.py's step as it is, made and warmed up while the process is capped at 8 GB; kept for other contenders."""
    if arm in bench.trainings:
        return bench.trainings[arm]
    gc.collect()
    if bench.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
        torch.cuda.reset_peak_memory_stats()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    try:
        training = bench.training(arm)
        began = time.perf_counter()
        how = training.accelerate()
        facts = {"step": how, "seconds": time.perf_counter() - began}
        training.run(WARM_STEPS)
        if bool(training.halted):
            raise StageError("the loss or its gradient is not finite")
        if bench.cuda:
            torch.cuda.synchronize()
            facts["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2 ** 30
            facts["peak_reserved_gib"] = (torch.cuda.max_memory_reserved() - reserved) / 2 ** 30
            facts["ran_capped_at_bytes"] = min(total, CAP)
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    bench.trainings[arm], bench.start_up[arm] = training, facts
    return training


def compiled_step(bench):
    """The baseline's compiled step, launched kernel by kernel and not as a graph."""
    training = accelerated(bench, "baseline")
    if training.graph is None:
        raise Skip(f"on {bench.device} the step is the plain one")

    def run(steps):
        graph, training.graph = training.graph, None
        try:
            training.run(steps)
        finally:
            training.graph = graph
    return Case(bench.device, run)


def eager_step(bench):
    if not bench.cuda:
        raise Skip(f"on {bench.device} the step is the plain one")
    return Case(bench.device, bench.training("baseline").run)


def conventional(bench, folder):
    """The same model trained as nanoGPT's train.py does it: its batches, its precision, its optimizer, its logging."""
    device, rows, context = bench.device, bench.setting.batch, bench.rows.shape[1]
    path = Path(folder) / "train.bin"
    np.asarray(bench.rows).tofile(path)
    model = bench.model("baseline").train()
    parameters = list(model.backbone.parameters())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": train.WEIGHT_DECAY},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=train.LR, betas=train.BETAS, fused=bench.cuda)
    rates = train.learning_rates(2 * (ROUNDS + 1) * CALLS).tolist()

    def loss_of(tokens, targets):
        logits = model.logits(model.states(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def batch():
        data = np.memmap(path, np.uint16, mode="r")
        starts = torch.randint(len(data) - context, (rows,))
        pair = [torch.stack([torch.from_numpy(data[i + shift:i + shift + context].astype(np.int64)) for i in starts])
                for shift in (0, 1)]
        return [x.pin_memory().to(device, non_blocking=True) if bench.cuda else x.to(device) for x in pair]

    loss_of = torch.compile(loss_of) if bench.cuda else loss_of
    state = {"step": 0, "batch": batch()}

    def run(steps):
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rates[state["step"]]
            with torch.autocast(device, torch.bfloat16, enabled=bench.cuda):
                loss = loss_of(*state["batch"])
            state["batch"] = batch()                                # while the GPU is still at the forward pass
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if state["step"] % LOG_INTERVAL == 0:
                loss.item()
            state["step"] += 1
    return Case(device, run)


def hugging_face(bench, folder):
    """Trainer as it comes, with GPT-2 of the same layers, width, heads, batch and precision; no dropout, no logging."""
    if not importlib.util.find_spec("accelerate"):
        raise Skip("the Trainer wants accelerate (pip install accelerate)")
    transformers.utils.logging.set_verbosity_error()
    context = bench.rows.shape[1]
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **SIZES[bench.setting.size], n_positions=context, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    data = [{"input_ids": row, "labels": row} for row in np.asarray(bench.rows[:CALLS]).astype(np.int64)]

    class Clock(transformers.TrainerCallback):
        """Seconds from the end of step WARM_STEPS to the end of the last."""

        def on_step_end(self, arguments, state, control, **_):
            if state.global_step in (WARM_STEPS, state.max_steps):
                case.sync()
                self.began, self.seconds = time.perf_counter(), time.perf_counter() - getattr(self, "began", 0)

    class TrainerCase(Case):
        def time(self, steps):
            arguments = transformers.TrainingArguments(
                output_dir=folder, per_device_train_batch_size=bench.setting.batch, max_steps=WARM_STEPS + steps,
                bf16=bench.cuda, use_cpu=bench.device == "cpu", learning_rate=train.LR, adam_beta2=train.BETAS[1],
                weight_decay=train.WEIGHT_DECAY, max_grad_norm=train.CLIP, logging_strategy="no", save_strategy="no",
                eval_strategy="no", report_to="none", disable_tqdm=True)
            clock = Clock()
            trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return clock.seconds

    case = TrainerCase(bench.device, run=None)
    return case


def matrix_product(bench):
    n, dtype = bench.setting.product, torch.bfloat16 if bench.cuda else torch.float32
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Case(bench.device, lambda calls: [torch.mm(a, b, out=out) for _ in range(calls)], 2 * n ** 3, most=200)


def device_copy(bench):
    source = torch.randint(0, 256, (bench.setting.copied,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Case(bench.device, lambda calls: [target.copy_(source) for _ in range(calls)], 2 * len(source), most=200)


def unavoidable(bench):
    """Operations and bytes of one training step of the baseline, as the docstring counts them."""
    config, N, C = bench.hybrid.config, bench.setting.batch, bench.rows.shape[1]
    L, D, V, width = config.n_layer, config.n_embd, config.vocab_size, 2 if bench.cuda else 4
    P = L * (12 * D * D + config.n_head * D) + V * D                # layers, the heads' gates, embedding = output
    copies = 3 if bench.cuda else 2                                 # in float32 the weights are no copies to write
    return {"parameters": P, "operations": 6 * P * N * C + 6 * N * L * C * (C + 1) * D,
            "bytes": 24 * P + 2 * width * P + copies * width * P + 6 * width * N * C * V}


def bench_training(bench, wanted):
    """Steps per second of all contenders, and of the floor."""
    with tempfile.TemporaryDirectory() as folder:
        builders = {"baseline": lambda: Case(bench.device, accelerated(bench, "baseline").run),
                    "with_ltm": lambda: Case(bench.device, accelerated(bench, "with_ltm").run),
                    "compiled": lambda: compiled_step(bench), "eager": lambda: eager_step(bench),
                    "conventional": lambda: conventional(bench, folder),
                    "trainer": lambda: hugging_face(bench, folder)}
        builders = {name: build for name, build in builders.items() if name in wanted}
        if "floor" in wanted:
            builders |= {"product": lambda: matrix_product(bench), "copy": lambda: device_copy(bench)}
        rates = bench.measure("(steps, operations or bytes)", builders)
    bench.trainings.clear()
    limits = {name: rates.pop(name) for name in ("product", "copy") if name in rates}
    if len(limits) == 2:
        need = unavoidable(bench)
        rates["floor"] = [1 / (need["operations"] / product + need["bytes"] / copied)
                          for product, copied in zip(limits["product"], limits["copy"])]
    return rates, limits


# ------------------------------------------------------------------------------------ evaluation and generation

@torch.no_grad()
def bench_evaluation(bench, wanted):
    """Tokens per second: both arms on a pack of documents; one long document beside as many rows of short ones."""
    rows_each, (few, many) = bench.setting.document, bench.setting.documents

    def scoring(arm, documents, length):
        """Whole documents, packed row after row, as eval.py scores them."""
        rows = documents * length
        tokens = torch.from_numpy(np.resize(bench.rows, (rows, bench.rows.shape[1])).astype(np.int64)).to(bench.device)
        targets = F.pad(tokens.flatten()[1:], (0, 1), value=EOT).view_as(tokens)
        opens = torch.arange(rows, device=bench.device) % length == 0
        model = lower_precision(bench.model(arm)).eval()
        faster = bench.cuda and importlib.util.find_spec("triton")
        score = torch.compile(lambda: model.score(tokens, targets, opens), dynamic=False) if faster else (
            lambda: model.score(tokens, targets, opens))
        return Case(bench.device, lambda calls: [score() for _ in range(calls)] and None, tokens.numel())

    rates = {}
    if "evaluation" in wanted:
        rates |= bench.measure("tokens", {f"evaluation, {arm}": lambda arm=arm: scoring(arm, few, rows_each)
                                          for arm in COLORS})
    if "length" in wanted:
        rates |= bench.measure("tokens", {"short documents": lambda: scoring("with_ltm", many, rows_each),
                                          "one long document": lambda: scoring("with_ltm", 1, many * rows_each)})
    return rates


@torch.no_grad()
def bench_generation(bench):
    """Tokens per second after a context, one at a time, one sequence: the hybrid and GPT with a growing KV cache."""
    text = torch.from_numpy(np.resize(bench.rows, (1, max(bench.setting.lengths))).astype(np.int64)).to(bench.device)
    gpt = GPT(RevenaConfig(**SIZES[bench.setting.size], stm_window=None, n_positions=text.size(1) + GENERATED))
    models = {"with_ltm": bench.model("with_ltm"), "gpt": gpt.to(bench.device)}

    class Generation(Case):
        def __init__(self, model, length):
            super().__init__(bench.device, self.generate, GENERATED, most=1)
            self.model, self.length = lower_precision(model).eval(), length

        def time(self, calls):
            self.memory = Memory(self.model)
            for block in text[:, :self.length].split(BLOCK, dim=1):
                log_p = self.model.stream(block, self.memory)
            self.token = log_p[:, -1:].argmax(-1)
            return super().time(calls)

        def generate(self, _):
            for _ in range(GENERATED):
                self.token = self.model.stream(self.token, self.memory).argmax(-1)

    return bench.measure("tokens", {f"generation, {name}, {length}": lambda model=model, length=length:
                                    Generation(model, length)
                                    for length in bench.setting.lengths for name, model in models.items()})


# ------------------------------------------------------------------------------------ what it shows

def comparisons(bench, rates):
    """The table's rows: what, measured {median, low, high}, unit, the bound it must keep: (">=" or "<=", number)."""
    rows = []

    def ratio(what, above, below, bound=None):
        if above in rates and below in rates:
            rows.append((what, summary([a / b for a, b in zip(rates[above], rates[below])]), "x", bound))

    ratio("steps/s over Hugging Face Trainer", "baseline", "trainer", (">=", 6.0))
    ratio("steps/s over the conventional compiled loop", "baseline", "conventional", (">=", 4.5))
    ratio("steps/s over the same step with torch.compile", "baseline", "compiled")
    ratio("steps/s over the same step, eager", "baseline", "eager")
    ratio("step time over the floor", "floor", "baseline", ("<=", 1.8))
    ratio("with_ltm over baseline, training", "with_ltm", "baseline", (">=", 0.95))
    ratio("with_ltm over baseline, evaluation", "evaluation, with_ltm", "evaluation, baseline", (">=", 0.95))
    rows_long = bench.setting.documents[1] * bench.setting.document
    ratio(f"one document of {rows_long * BLOCK:,} tokens over documents of {bench.setting.document * BLOCK:,}, tokens/s",
          "one long document", "short documents", (">=", 0.9))
    for length in bench.setting.lengths:
        bound = {128: (">=", 0.5), 2048: (">=", 1.0), 4096: (">=", 1.0)}.get(length)
        ratio(f"generation at {length:,} tokens over KV-cached GPT", f"generation, with_ltm, {length}",
              f"generation, gpt, {length}", bound)
    for arm, facts in bench.start_up.items():
        if "peak_gib" in facts:
            rows.append((f"peak memory in training, {arm} (ran capped at 8 GB)", summary([facts["peak_gib"]]), " GiB",
                         ("<=", 2.0)))
            rows.append((f"compilation and capture, {arm}", summary([facts["seconds"]]), " s", ("<=", 40.0)))
    return rows


def keeps(value, bound):
    return value >= bound[1] if bound[0] == ">=" else value <= bound[1]


def table(bench, rates, compared):
    """Markdown: rates, then comparisons."""
    def span(s, form):
        return f"{s['median']:{form}} | {s['low']:{form}} to {s['high']:{form}}"

    lines = ["| | median | spread |", "|---|---|---|"]
    for name, values in rates.items():
        unit = "steps/s" if name in LABELS else "tokens/s"
        values = summary(values)
        lines.append(f"| {LABELS.get(name, name)}, {unit} | {span(values, ',.0f' if values['median'] > 100 else '.1f')} |")
    lines += ["", "| | measured | spread | at least / at most | |", "|---|---|---|---|---|"]
    for what, measured, unit, bound in compared:
        demanded = f"{bound[0].replace('>=', '≥').replace('<=', '≤')} {bound[1]:g}{unit}" if bound else ""
        verdict = ("met" if keeps(measured["median"], bound) else "**missed**") if bound and bench.cuda else ""
        lines.append(f"| {what} ({unit.strip()}) | {span(measured, '.2f')} | {demanded} | {verdict} |")
    lines += [f"| {name} | {kind}: {why.replace('|', '/')} | | | |" for kind, notes in
              (("failed", bench.failed), ("skipped", bench.skipped)) for name, why in notes.items()]
    return "\n".join(lines)


def picture(bench, rates, machine):
    """Training steps per second as bars from zero, the floor as a line; PNG bytes."""
    shown = sorted((name for name in rates if name in LABELS and name != "floor"),
                   key=lambda name: statistics.median(rates[name]))
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(shown):
        s = summary(rates[name])
        error = [[s["median"] - s["low"]], [s["high"] - s["median"]]]
        axes.barh(place, s["median"], 0.62, color=COLORS.get(name, GREY), xerr=error, ecolor=INK, capsize=3)
        axes.annotate(f"{s['median']:,.3g}", (s["high"], place), (6, 0), textcoords="offset points", va="center")
    most = max(max(rates[name]) for name in rates if name in LABELS)
    if "floor" in rates:
        floor = statistics.median(rates["floor"])
        axes.axvline(floor, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate(f"floor: {floor:,.3g}", (floor, -0.5), (-5, 2), textcoords="offset points", ha="right")
    axes.set(xlim=(0, 1.1 * most), ylim=(-0.7, len(shown) - 0.4))
    axes.set_yticks(range(len(shown)), [LABELS[name] for name in shown])
    axes.set_title(f"Training steps per second, {bench.setting.batch} x {BLOCK} tokens, {bench.setting.size} model, "
                   f"{machine}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
    return stream.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*LABELS, *PARTS]
    parser.add_argument("--root", metavar="DIR", help="folder of data/ (default: this one; quick/ without a GPU)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, metavar="S", help="of a timing window (1.5; 0.4 without a GPU)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: that of data/)")
    args = parser.parse_args(argv)
    if args.seconds is not None and not 0 < args.seconds < float("inf"):
        parser.error("--seconds must be above 0")
    wanted, began = args.only or names, time.time()
    root = Path(default_root(args.root, quick=pick_device() != "cuda"))
    out = args.out or root
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch.name            # the first arm compiles as on a new machine
    torch._dynamo.config.recompile_limit = 64                       # one function, many models

    bench = Bench(root, args.seconds)
    machine = torch.cuda.get_device_name() if bench.cuda else f"{torch.get_num_threads()} CPU threads"
    small = "" if bench.cuda else f"A small version: no CUDA GPU here ({bench.device}); it says nothing about one."
    print(f"{machine}, torch {torch.__version__}, {bench.data}\n{small}".strip(), flush=True)
    rates, limits = bench_training(bench, wanted)
    for part in (lambda: bench_evaluation(bench, wanted), lambda: bench_generation(bench) if "generation" in wanted else {}):
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        with bench.isolated("evaluation or generation"):
            rates |= part()

    compared = comparisons(bench, rates)
    project = Path(__file__).resolve().parent.parent
    write_json(out / "results_bench.json", {
        "run": {"device": machine, "torch": torch.__version__, "transformers": transformers.__version__,
                "data": bench.data, "size": bench.setting.size, "batch": bench.setting.batch, "note": small,
                "seconds": time.time() - began, "code": {n: sha256(project / n) for n in ("models.py", "train.py")}},
        "per_second": {name: summary(values) for name, values in rates.items()},
        "floor": {**unavoidable(bench), "per_second": {name: summary(values) for name, values in limits.items()}},
        "start_up": bench.start_up, "failed": bench.failed, "skipped": bench.skipped,
        "compared": [{"what": what, **measured, "unit": unit.strip(), "bound": bound}
                     for what, measured, unit, bound in compared]})
    files = "results_bench.json"
    if any(name in rates for name in LABELS):
        write_atomic(out / "results_bench.png", picture(bench, rates, machine))
        files += " and results_bench.png"
    print(f"\n{table(bench, rates, compared)}\n\n{small}\nwrote {files} to {out}/ in {time.time() - began:.0f} s")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    run_stage(main)
