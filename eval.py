"""Answer the question: bits per character and long-range recall of both arms, on the same text and questions.

reads   data/val.bin, data/meta.json, trained/baseline/, trained/with_ltm/ (and trained/seedN/ where there are more)
writes  results.json

    python eval.py                  what the README reports
    python eval.py --controls       also what each part of the memory is worth (results.json: detail.controls)
    python eval.py --quick          the small models under quick/

bpc                 bits of all validation tokens / their characters; whole documents, memory empty at each start
long_range_recall   8 facts planted in real text, one asked for 160 to 384 tokens later, beyond the 128-token window:
                    how often the right value is the likeliest of the 8 (chance 1/8)
memory_hit_rate     share of predictions that retrieved at least one item
tokens_per_sec      scoring those documents, both arms in turn in this process
"""

import argparse
import copy
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from models import (EOT, StageError, arm_folder, characters_per_token, default_root, load_model, load_split,
                    load_tokenizer, lower_precision, mix, parameters_by_group, pick_device, read_json, read_manifest,
                    run_stage, sha256, write_json)

ARMS = ("baseline", "with_ltm")
PACK = 128                      # rows of 128 tokens scored at once
FACTS = 8                       # planted in a sequence; their values are the choices
TRIALS = 336                    # questions per distance and format
DISTANCES = (32, 64, 96, 160, 192, 256, 320, 384, 512, 1024)    # tokens from the value to the place to repeat it
LONG_RANGE = (160, 192, 256, 320, 384)
LEAD = 64                       # tokens of real text before the facts
BOOTSTRAP = 10_000              # resamples of seeds and documents
REPEATS = 5                     # timed passes over TIMED packs, each arm in turn
TIMED = 16
SEED = 0                        # of the questions and the bootstrap: the same for every model
QUICK = dict(PACK=16, TRIALS=8, DISTANCES=(64, 160, 256), LONG_RANGE=(160, 256), BOOTSTRAP=2_000, REPEATS=3, TIMED=1)


# ------------------------------------------------------------------------------------ text in packs of rows

class Pack(NamedTuple):
    """Several sequences laid out as rows of one window; what is left over is rows of EOT."""

    tokens: torch.Tensor        # (PACK, C) int64
    targets: torch.Tensor       # (PACK, C) int64, EOT where there is none
    opens: torch.Tensor         # (PACK,) bool: a sequence starts here
    places: list                # (number of the sequence, first flat position, length)


def documents(rows):
    """The documents that the rows of a .bin were cut from: list of int64 arrays, each opened by EOT."""
    starts = np.flatnonzero(rows[:, 0] == EOT)
    found = []
    for first, last in zip(starts, [*starts[1:], len(rows)]):
        stride = rows.shape[1] // 2
        tokens = np.concatenate([rows[first], *rows[first + 1:last, stride:]]).astype(np.int64)
        found.append(tokens[:np.flatnonzero(tokens != EOT).max(initial=0) + 1])
    return found


def packs(sequences, width, device):
    """Pack sequences (longest first, so that little is left over) into Packs of PACK rows; longer ones get their own."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    waiting = []
    def rows_of(i):
        return -(-len(sequences[i]) // width)

    def emit(chosen):
        count = max(PACK, sum(rows_of(i) for i in chosen))
        tokens = np.full((count, width), EOT, np.int64)
        targets, opens, places, row = tokens.copy(), np.ones(count, bool), [], 0
        for i in chosen:
            text, flat = sequences[i], row * width
            tokens.reshape(-1)[flat:flat + len(text)] = text
            targets.reshape(-1)[flat:flat + len(text) - 1] = text[1:]
            opens[row + 1:row + rows_of(i)] = False
            places.append((i, flat, len(text)))
            row += rows_of(i)
        return Pack(*(torch.from_numpy(x).to(device) for x in (tokens, targets, opens)), places)

    used = 0
    for i in order:
        if waiting and used + rows_of(i) > PACK:
            yield emit(waiting)
            waiting, used = [], 0
        waiting.append(i)
        used += rows_of(i)
    if waiting:
        yield emit(waiting)


class Tally(NamedTuple):
    """Per sequence, arrays over its targets (length - 1)."""

    bits: list                  # of the model
    stm: list                   # of its backbone alone
    hit: list
    stored: list


@torch.no_grad()
def score_text(score, sequences, width, device, note=None):
    """Tally of every token of the sequences given what came before it; `score` as RevenaHybridTiny.score."""
    kept = Tally(*([None] * len(sequences) for _ in Tally._fields))
    for pack in packs(sequences, width, device):
        scores = score(pack.tokens, pack.targets, pack.opens)
        flat = torch.stack([-scores.log_p.double() / math.log(2), -scores.log_p_stm.double() / math.log(2),
                            scores.hit.double(), scores.stored.double()]).flatten(1).cpu().numpy()
        for i, first, length in pack.places:
            for field, values in zip(kept, flat[:, first:first + length - 1]):
                field[i] = values
        if note:
            note(len(pack.places))
    return kept


@torch.no_grad()
def score_windows(score, rows, device):
    """Bits of each token of the rows taken alone: (bits per row, counted targets per row as bool (N, C))."""
    bits, counted = [], []
    for part in np.array_split(rows, max(1, len(rows) // PACK)):
        tokens = torch.from_numpy(part.astype(np.int64)).to(device)
        targets = F.pad(tokens[:, 1:], (0, 1), value=EOT)
        fresh = (tokens[:, :1] == EOT) | (torch.arange(tokens.size(1), device=device) >= tokens.size(1) // 2 - 1)
        bits.append((-score(tokens, targets).log_p.double() / math.log(2)).cpu().numpy())
        counted.append((fresh & (targets != EOT)).cpu().numpy())
    return np.concatenate(bits), np.concatenate(counted)


# ------------------------------------------------------------------------------------ recall

FORMATS = {                     # how a fact is written; the question stops before the value
    "pair": (" {key}", " {value}", "."),
    "colon": (" {key}:", " {value}", "."),
    "sentence": (" The code of {key} is", " {value}", "."),
}


def single_words(tokenizer):
    """Tokens that are one lower-case English-looking word of four letters or more with its space before it."""
    words = [(word, index) for word, index in tokenizer.get_vocab().items()
             if word[0] == "Ġ" and len(word) > 4 and word[1:].isascii() and word[1:].isalpha() and word[1:].islower()]
    return np.array([index for _, index in sorted(words)])


class Question(NamedTuple):
    tokens: np.ndarray          # the whole sequence; its last token is the last of the question
    choices: np.ndarray         # (FACTS,) values planted in it, the right one first
    place: int                  # where the right value stands


def questions(texts, tokenizer, form, distance, count, extra=0):
    """`count` Questions: FACTS facts planted in real text, the value asked for `distance` tokens after it stood.

    Example (pair): "EOT ..text.. lamp seven. ..text.. door north. ..text.. lamp" -> " seven"; 8 such facts, half of
    the others after the one asked for, as far as they fit. Keys and values are single tokens from disjoint sets.
    `extra` facts more, never asked for, are planted in front of the question, as many as fit.
    """
    draw = np.random.default_rng((SEED, list(FORMATS).index(form), distance, extra))
    before, after, stop = FORMATS[form]
    key_at, value_at = before.index("{key}"), len(before)
    encode = lambda text: tokenizer.encode(text) if text else []
    opening, middle = encode(before[:key_at].rstrip()), encode(before[key_at + len("{key}"):])
    closing = encode(stop)
    words = np.random.default_rng(SEED).permutation(single_words(tokenizer))
    keys, values = words[:len(words) // 2], words[len(words) // 2:]
    fact = lambda key, value: [*opening, key, *middle, value, *closing]
    asked = len(opening) + 1 + len(middle)                             # tokens of the question
    long_enough = [text for text in texts if len(text) > distance + LEAD]
    if not long_enough:
        raise StageError(f"no validation document is longer than {distance + LEAD} tokens; prepare more text, or take "
                         f"{distance} out of DISTANCES in eval.py")

    def scatter(text, facts):
        cuts = np.sort(draw.integers(0, len(text) + 1, len(facts)))
        pieces = np.split(np.asarray(text), cuts)
        return np.concatenate([pieces[0], *(np.concatenate((f, p)) for f, p in zip(facts, pieces[1:]))]).astype(np.int64)

    made = []
    for _ in range(count):
        chosen = draw.choice(keys, FACTS + extra, replace=False), draw.choice(values, FACTS + extra, replace=False)
        facts = [fact(key, value) for key, value in zip(*chosen)]
        room = distance - 1 - len(closing) - asked                     # tokens free between the fact and the question
        early, late = [], []
        for number, other in enumerate(facts[1:]):
            wanted = number >= FACTS - 1 or draw.random() < 0.5
            if wanted and room >= len(other):
                late.append(other)
                room -= len(other)
            elif number < FACTS - 1:
                early.append(other)
        text = long_enough[draw.integers(len(long_enough))][1:]
        offset = draw.integers(0, len(text) - LEAD - room + 1)
        real = text[offset:offset + LEAD + room]
        head = np.concatenate(([EOT], scatter(real[:LEAD], early)))
        place = len(head) + asked
        tokens = np.concatenate((head, facts[0], scatter(real[LEAD:], late), facts[0][:asked]))
        assert len(tokens) - place == distance
        made.append(Question(tokens, chosen[1][:FACTS], place))
    return made


@torch.no_grad()
def answer(model, asked, width, device):
    """What the model says: bool arrays (len(asked),) forced choice right, top-1 right, value stored, retrieved."""
    right, top, stored, retrieved = (np.zeros(len(asked), bool) for _ in range(4))
    for pack in packs([question.tokens for question in asked], width, device):
        h = model.states(pack.tokens, pack.opens)
        numbers, first, length = map(np.array, zip(*pack.places))
        row, column = ((torch.from_numpy(first + length - 1) // width), torch.from_numpy((first + length - 1) % width))
        p = model.logits(h[row, column]).log_softmax(-1)
        truth = torch.tensor([asked[i].choices[0] for i in numbers], device=device)
        if model.config.ltm_enabled:
            log_p, log_z = model.log_p(h, pack.targets)
            read, values, kept, odds = model.read(h, pack.tokens, pack.targets, log_p, log_z, pack.opens)
            weight = (read.exact + read.learned * (odds > 0)[..., None])[row, column]
            p = mix(p[:, None], weight[:, None], values[row])[:, 0]
            retrieved[numbers] = ((weight > 0) & (values[row] == truth[:, None])).any(1).cpu().numpy()
            fact = torch.tensor([f + asked[i].place - 1 for i, f in zip(numbers, first)], device=device)
            stored[numbers] = kept.flatten()[fact].cpu().numpy()
        choices = torch.from_numpy(np.stack([asked[i].choices for i in numbers])).to(device)
        right[numbers] = (p.gather(1, choices).argmax(1) == 0).cpu().numpy()
        top[numbers] = (p.argmax(1) == truth).cpu().numpy()
    return right, top, stored, retrieved


# ------------------------------------------------------------------------------------ statistics

def wilson(successes, trials):
    """95% interval of a proportion (Wilson 1927): [low, high]."""
    z, share = 1.959964, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mcnemar(first, second):
    """Two-sided exact p of two paired bool arrays being right equally often (McNemar 1947)."""
    only, other = int((first & ~second).sum()), int((second & ~first).sum())
    n = only + other
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(min(only, other) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs)) if n else 1.0


def paired_bootstrap(bits, characters):
    """Bits per character of both arms and their difference, seeds and documents resampled together.

    Args: bits {arm: (seeds, documents)}, characters (documents,).
    Returns: {arm: {"per_seed", "ci95"}, "difference": {"mean", "ci95"}, "ratio", "verdict"}.
    """
    draw = np.random.default_rng(SEED)
    seeds, count = bits[ARMS[0]].shape
    samples = {arm: np.empty(BOOTSTRAP) for arm in ARMS}
    for b in range(BOOTSTRAP):
        chosen = np.bincount(draw.integers(0, count, count), minlength=count)
        which = draw.integers(0, seeds, seeds)
        total = (characters @ chosen) * seeds
        for arm in ARMS:
            samples[arm][b] = (bits[arm] @ chosen)[which].sum() / total
    interval = lambda values: np.quantile(values, (0.025, 0.975)).tolist()
    result = {arm: {"per_seed": (bits[arm].sum(1) / characters.sum()).tolist(), "ci95": interval(samples[arm])}
              for arm in ARMS}
    mean = {arm: statistics.fmean(result[arm]["per_seed"]) for arm in ARMS}
    low, high = interval(samples["with_ltm"] - samples["baseline"])
    result["difference"] = {"mean": mean["with_ltm"] - mean["baseline"], "ci95": [low, high]}
    result["ratio"] = mean["with_ltm"] / mean["baseline"]
    result["verdict"] = "helps" if high < 0 else "hurts" if low > 0 else "inconclusive"
    return result


def kinds_of_target(tokens, stored, window, slots):
    """For each target of a document: 0 new in it, 1 last seen inside the window, 2 beyond it but in memory, 3 beyond both.

    `stored` (len(tokens) - 1,): whether each target was stored; it is in memory until `slots` more have been.
    """
    count = np.concatenate(([0], np.cumsum(stored)))
    last, kept, kinds = {}, {}, np.empty(len(tokens) - 1, int)
    for place, token in enumerate(tokens.tolist()):
        if place:
            seen = last.get(token)
            held = kept.get(token)
            inside = seen is not None and place - seen <= window
            kinds[place - 1] = 0 if seen is None else 1 if inside else 2 if held is not None and count[place - 1] - held <= slots else 3
            if stored[place - 1]:
                kept[token] = count[place - 1]
        last[token] = place
    return kinds


# ------------------------------------------------------------------------------------ the evaluation

def load_arm(root, seed, arm, device, quick):
    """(model, entry for results.json, settings) of one trained arm, its weights verified against their manifest.

    Damaged weights are named, and the newest whole checkpoint is used; none: StageError.
    """
    folder = arm_folder(root, seed, arm)
    flag = "--with-ltm" if arm == "with_ltm" else "--baseline"
    made_by = f"python train.py {flag} --root {root}" + f" --seed {seed}" * bool(seed) + " --quick" * quick
    manifest = read_json(folder / "manifest.json", made_by)
    weights, source = folder / "model.safetensors", folder
    digest = sha256(weights) if weights.is_file() else None
    known = manifest.get("weights") if isinstance(manifest.get("weights"), dict) else {}
    if digest not in known:
        for source in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
            try:
                digest, step = read_manifest(source)["files"]["model.safetensors"], int(source.name[5:])
                break
            except (StageError, KeyError, ValueError):
                continue
        else:
            raise StageError(f"{weights} is not the file its manifest names, and no whole checkpoint is left; "
                             f"train again: {made_by} --fresh")
        tqdm.write(f"{weights} is damaged; using {source} instead")
    else:
        step = known[digest]
    model = load_model(folder, device, made_by, weights=source / "model.safetensors")
    settings = manifest.get("settings", {})
    if step != settings.get("steps"):
        tqdm.write(f"note: {folder} is at step {step} of {settings.get('steps')}")
    return lower_precision(model), {"seed": seed, "folder": str(source.relative_to(root)), "sha256": digest, "step": step}, settings


def seeds_of(root):
    """Seeds of which both arms are there."""
    found = [0] + sorted(int(path.name[4:]) for path in (Path(root) / "trained").glob("seed*") if path.name[4:].isdigit())
    both = [seed for seed in found if all((arm_folder(root, seed, arm) / "manifest.json").is_file() for arm in ARMS)]
    return both or [0]                                                 # load_arm says what is missing


def throughput(scorers, sequences, width, device):
    """Tokens per second of each scorer, in turn: {name: {"median", "runs"}}."""
    ready = [pack for _, pack in zip(range(TIMED), packs(sequences, width, device))]
    tokens = sum(length - 1 for pack in ready for _, _, length in pack.places)
    runs = {name: [] for name in scorers}
    for repeat in range(REPEATS + 1):                                  # the first warms up
        for name, score in scorers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                for pack in ready:
                    last = score(pack.tokens, pack.targets, pack.opens).log_p
            last.sum().item()                                          # waits for the device
            if repeat:
                runs[name].append(tokens / (time.perf_counter() - start))
    return {name: {"median": statistics.median(values), "runs": values} for name, values in runs.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", metavar="DIR", help="folder of data/ and trained/ (default: this one)")
    parser.add_argument("--controls", action="store_true", help="also measure what each part of the memory is worth")
    parser.add_argument("--quick", action="store_true", help="the small setting, under quick/")
    args = parser.parse_args(argv)
    if args.quick:
        globals().update(QUICK)
    began, root, device = time.time(), Path(default_root(args.root, args.quick)), pick_device()
    tokenizer = load_tokenizer(root)
    rows, meta = load_split(root, "val")
    width = rows.shape[1]
    texts = documents(rows)
    texts = [text for text in texts if len(text) > 1]
    per_token = characters_per_token(tokenizer)
    characters = np.array([per_token[text].sum() for text in texts], float)
    seeds = seeds_of(root)

    models, entries, trained = {}, {arm: [] for arm in ARMS}, {}
    for seed in seeds:
        for arm in ARMS:
            model, entry, settings = load_arm(root, seed, arm, device, args.quick)
            models[arm, seed] = model
            entries[arm].append(entry)
            trained[arm, seed] = {k: v for k, v in settings.items() if k not in ("arm", "init", "seed")}
            if settings.get("data") != meta["splits"]["train"]["sha256"]:
                raise StageError(f"{entry['folder']} was trained on other data than {root}/data now holds; train again, "
                                 f"or put that data back")
        if trained["baseline", seed] != trained["with_ltm", seed] or \
                entries["baseline"][-1]["step"] != entries["with_ltm"][-1]["step"]:
            raise StageError(f"the arms of seed {seed} were trained differently or not equally far; train both again: "
                             f"./run_all.sh --fresh")
    config = models["with_ltm", seeds[0]].config
    compiled = torch.compile(lambda model, tokens, targets, opens: model.score(tokens, targets, opens), dynamic=False)

    def scorer(model):
        """How `model` scores packs: compiled where there is a GPU (rows alone are few and stay as they are)."""
        if device != "cuda":
            return model.score
        return lambda tokens, targets, opens=None: (model.score(tokens, targets) if opens is None else
                                                    compiled(model, tokens, targets, opens))

    print(f"{len(texts):,} documents, {sum(map(len, texts)) - len(texts):,} tokens; seeds {seeds}; on {device}", flush=True)
    bar = tqdm(total=len(models) * (len(texts) + len(FORMATS) * len(DISTANCES) * TRIALS), unit="sequence", disable=None)
    bits, window_bits, tallies, recall = {}, {}, {}, {}
    window_characters = None
    for (arm, seed), model in models.items():
        tally = tallies[arm, seed] = score_text(scorer(model), texts, width, device, bar.update)
        bits[arm, seed] = np.array([b.sum() for b in tally.bits])
        row_bits, counted = score_windows(model.score, rows, device)
        opening = np.cumsum(rows[:, 0] == EOT) - 1                     # document of each row
        window_bits[arm, seed] = np.bincount(opening, np.where(counted, row_bits, 0).sum(1))
        if window_characters is None:
            of_target = np.pad(per_token[rows[:, 1:]], ((0, 0), (0, 1)))
            window_characters = np.bincount(opening, np.where(counted, of_target, 0).sum(1))
    asked = {(form, distance): questions(texts, tokenizer, form, distance, TRIALS)
             for form in FORMATS for distance in DISTANCES}
    for (arm, seed), model in models.items():
        for cell, block in asked.items():
            recall[arm, seed, cell] = answer(model, block, width, device)
            bar.update(len(block))
    speed = throughput({arm: scorer(models[arm, seeds[0]]) for arm in ARMS}, texts, width, device)
    bar.close()

    stack = lambda per_model: {arm: np.stack([per_model[arm, seed] for seed in seeds]) for arm in ARMS}
    bpc = paired_bootstrap(stack(bits), characters)
    windows = paired_bootstrap(stack(window_bits), window_characters)
    if not np.isfinite([bpc["ratio"], windows["ratio"]]).all():
        raise StageError("a metric is NaN or infinite: the weights are not sane; train again: ./run_all.sh --fresh")
    hits = [float(np.concatenate(tallies["with_ltm", seed].hit).mean()) for seed in seeds]
    routed = [float(np.concatenate(tallies["with_ltm", seed].stored).mean()) for seed in seeds]

    # recall: over formats and seeds, the same questions for every model
    gather = lambda arm, measure, cells: np.concatenate([recall[arm, seed, cell][measure] for seed in seeds for cell in cells])
    at = lambda distance: [(form, distance) for form in FORMATS]
    summary = {"chance": 1 / FACTS, "window": config.stm_window, "distances": list(DISTANCES),
               "receptive_field": config.n_layer * (config.stm_window - 1) + 1,
               "trials_per_distance": len(FORMATS) * TRIALS, "seeds": len(seeds)}
    for arm in ARMS:
        part = summary[arm] = {}
        for measure, name in enumerate(("forced_choice", "top1", "stored", "retrieved")):
            outcomes = [gather(arm, measure, at(distance)) for distance in DISTANCES]
            part[name] = [float(o.mean()) for o in outcomes]
            part[f"{name}_ci95"] = [wilson(int(o.sum()), len(o)) for o in outcomes]
        for measure, name in enumerate(("by_format", "top1_by_format")):
            part[name] = {form: [float(gather(arm, measure, [(form, d)]).mean()) for d in DISTANCES] for form in FORMATS}
        answered = [gather(arm, 0, at(distance)) for distance in DISTANCES]
        found = [gather(arm, 3, at(distance)) for distance in DISTANCES]
        part["retrieved_of_answered"] = [float(f[a].mean()) if a.any() else 0.0 for a, f in zip(answered, found)]
    summary["mcnemar_p"] = [mcnemar(gather("baseline", 0, at(d)), gather("with_ltm", 0, at(d))) for d in DISTANCES]
    far = [(form, distance) for form in FORMATS for distance in LONG_RANGE]
    long_range = {"distances": list(LONG_RANGE)}
    for arm in ARMS:
        outcome, top = gather(arm, 0, far), gather(arm, 1, far)
        long_range[arm] = {"mean": float(outcome.mean()), "ci95": wilson(int(outcome.sum()), len(outcome)),
                           "top1": float(top.mean()), "top1_ci95": wilson(int(top.sum()), len(top)),
                           "by_format": {form: float(gather(arm, 0, [(form, d) for d in LONG_RANGE]).mean()) for form in FORMATS}}
    p = long_range["mcnemar_p"] = mcnemar(gather("baseline", 0, far), gather("with_ltm", 0, far))
    better = long_range["with_ltm"]["mean"] > long_range["baseline"]["mean"]
    long_range["verdict"] = "inconclusive" if p > 0.05 else "helps" if better else "hurts"
    summary["long_range"] = long_range

    # where the gain in bits comes from, seed by seed averaged: by place in the document, by kind of target
    edges = [0, 64, 128, 256, 512, 1024, 2048]
    place = np.concatenate([np.arange(len(text) - 1) for text in texts])
    of_target = np.concatenate([per_token[text[1:]] for text in texts])
    mean_bits = {arm: np.mean([np.concatenate(tallies[arm, seed].bits) for seed in seeds], 0) for arm in ARMS}
    inside = [(place >= low) & (place < high) for low, high in zip(edges, edges[1:])]
    inside = [(mask, low) for mask, low in zip(inside, edges) if mask.any()]
    position = {"edges": [low for _, low in inside] + [edges[edges.index(inside[-1][1]) + 1]],
                **{arm: [float(mean_bits[arm][mask].sum() / of_target[mask].sum()) for mask, _ in inside] for arm in ARMS}}
    stored = tallies["with_ltm", seeds[0]].stored
    kind = np.concatenate([kinds_of_target(text, kept > 0, config.stm_window - 1, config.ltm_slots)
                           for text, kept in zip(texts, stored)])
    gain = mean_bits["baseline"] - mean_bits["with_ltm"]
    targets = {name: {"share_of_tokens": float((kind == k).mean()), "share_of_gain": float(gain[kind == k].sum() / gain.sum()),
                      **{arm: float(mean_bits[arm][kind == k].mean()) if (kind == k).any() else 0.0 for arm in ARMS}}
               for k, name in enumerate(("new in the document", "last seen inside the window",
                                         "last seen beyond the window, in memory", "last seen beyond both"))}

    results = {arm: {"bpc": statistics.fmean(bpc[arm]["per_seed"]), "long_range_recall": long_range[arm]["mean"],
                     "memory_hit_rate": statistics.fmean(hits) if arm == "with_ltm" else 0.0,
                     "tokens_per_sec": speed[arm]["median"]} for arm in ARMS}
    results["detail"] = {
        "data": {"source": meta["source"], "quick": bool(meta["quick"]), "val_documents": len(texts),
                 "val_tokens": len(place), "val_characters": int(characters.sum()), "val_sha256": meta["splits"]["val"]["sha256"]},
        "run": {"device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__,
                "seeds": seeds, "steps": entries["baseline"][0]["step"], "settings": trained["baseline", seeds[0]],
                "parameters": sum(parameters_by_group(models["with_ltm", seeds[0]]).values()), "checkpoints": entries},
        "bpc": bpc, "bpc_windows": windows, "recall": summary,
        "tokens_per_sec": {**speed, "ratio": speed["with_ltm"]["median"] / speed["baseline"]["median"]},
        "memory_hit_rate": {"baseline": 0.0, "with_ltm": statistics.fmean(hits), "per_seed": hits,
                            "routed_token_ratio": statistics.fmean(routed)},
        "position": position, "targets_bits_per_token": targets}
    write_json(root / "results.json", results)

    print(f"\n{'':22}{'baseline':>12}{'with_ltm':>12}")
    for name, form in (("bpc", ".4f"), ("long_range_recall", ".3f"), ("memory_hit_rate", ".3f"), ("tokens_per_sec", ",.0f")):
        print(f"{name:22}" + "".join(f"{results[arm][name]:>12{form}}" for arm in ARMS))
    print(f"{'bpc, windows alone':22}" + "".join(f"{statistics.fmean(windows[arm]['per_seed']):>12.4f}" for arm in ARMS))
    print(f"{'top-1 recall':22}" + "".join(f"{long_range[arm]['top1']:>12.3f}" for arm in ARMS))
    low, high = bpc["difference"]["ci95"]
    print(f"\nThe memory {bpc['verdict'].replace('inconclusive', 'makes no clear difference to')} BPC: "
          f"{bpc['difference']['mean']:+.4f} [{low:+.4f}, {high:+.4f}], x {bpc['ratio']:.4f} "
          f"(windows alone x {windows['ratio']:.4f}); recall beyond the window: {long_range['verdict']} "
          f"({long_range['baseline']['mean']:.3f} to {long_range['with_ltm']['mean']:.3f}, chance {1 / FACTS:.3f}).")
    print(f"wrote {root / 'results.json'} in {time.time() - began:.0f} s; next: python plot_eval.py --root {root}")


if __name__ == "__main__":
    run_stage(main)
