"""Answer the question: bits per character and long-range recall of both arms, on the same text and questions.

reads   data/val.bin, data/meta.json, trained/baseline/, trained/with_ltm/ (and trained/seedN/ where there are more)
writes  results.json

    python eval.py                  what the README reports
    python eval.py --quick          the small models under quick/

bpc                 bits of all validation tokens / their characters; whole documents, memory empty at each start
long_range_recall   8 facts planted in real text, one asked for 160 to 384 tokens later, beyond the 128-token window:
                    how often the right value is the likeliest of the 8 (chance 1/8)
memory_hit_rate     share of predictions that retrieved at least one item
tokens_per_sec      scoring those documents, both arms in turn in this process
"""

import argparse
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
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
    """Lay sequences out in Packs of PACK rows, longest first, so that little is left over; a longer one has its own."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))

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

    waiting, used = [], 0
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
    before, _, stop = FORMATS[form]
    key_at = before.index("{key}")
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
        parts = [pieces[0], *(np.concatenate(pair) for pair in zip(facts, pieces[1:]))]
        return np.concatenate(parts).astype(np.int64)

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
        # in order of their ids: where two are equally likely (bfloat16 has few digits) the right one has no advantage
        choices = torch.from_numpy(np.stack([np.sort(asked[i].choices) for i in numbers])).to(device)
        picked = choices.gather(1, p.gather(1, choices).argmax(1, keepdim=True))[:, 0]
        right[numbers] = (picked == truth).cpu().numpy()
        top[numbers] = (p.argmax(1) == truth).cpu().numpy()
    return right, top, stored, retrieved


# ------------------------------------------------------------------------------------ statistics

def wilson(successes, trials):
    """95% interval of a proportion (Wilson 1927): [low, high]."""
    z, share = 1.959964, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return [max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))]      # none or all: exactly 0 or 1


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
    """For each target of a document: 0 new in it, 1 last seen inside the window, 2 beyond it but in memory, 3 neither.

    `window`: positions that attention sees, so that the target's own distance from what it sees goes up to this.
    `stored` (len(tokens) - 1,): whether each target was stored; it is in memory until `slots` more have been.
    """
    count = np.concatenate(([0], np.cumsum(stored)))
    last, kept, kinds = {}, {}, np.empty(len(tokens) - 1, int)
    for place, token in enumerate(tokens.tolist()):
        if place:
            seen, held = last.get(token), kept.get(token)
            if seen is None:
                kinds[place - 1] = 0
            elif place - seen <= window:
                kinds[place - 1] = 1
            else:
                kinds[place - 1] = 2 if held is not None and count[place - 1] - held <= slots else 3
            if stored[place - 1]:
                kept[token] = count[place - 1]
        last[token] = place
    return kinds


# ------------------------------------------------------------------------------------ the evaluation

def train_command(root, seed, arm, quick):
    """The command that makes an arm."""
    flag = "--with-ltm" if arm == "with_ltm" else "--baseline"
    return f"python train.py {flag} --root {root}" + f" --seed {seed}" * bool(seed) + " --quick" * quick


def load_arm(root, seed, arm, device, quick):
    """(model, entry for results.json, settings) of one trained arm, its weights verified against their manifest.

    Damaged weights are named, and the newest whole checkpoint is used; none: StageError.
    """
    folder, made_by = arm_folder(root, seed, arm), train_command(root, seed, arm, quick)
    weights, source = folder / "model.safetensors", folder
    # the hash first: a training at work names new weights in the manifest before it puts them in place
    digest = sha256(weights) if weights.is_file() else None
    manifest = read_json(folder / "manifest.json", made_by)
    known, settings = manifest.get("weights"), manifest.get("settings")
    if not isinstance(known, dict) or not isinstance(settings, dict):
        raise StageError(f"{folder / 'manifest.json'} is damaged; train again: {made_by} --fresh")
    if digest not in known:
        checkpoints = (folder / "checkpoints").glob("step-*")
        for source in sorted(checkpoints, key=lambda path: (len(path.name), path.name), reverse=True):
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
    if sha256(source / "model.safetensors") != digest:
        return load_arm(root, seed, arm, device, quick)                # training has replaced them in between
    if not all(p.isfinite().all() for p in model.parameters()):
        raise StageError(f"{source / 'model.safetensors'} holds weights that are NaN or infinite; "
                         f"train again: {made_by} --fresh")
    if step != settings.get("steps"):
        tqdm.write(f"note: {folder} is at step {step} of {settings.get('steps')}")
    entry = {"seed": seed, "folder": str(source.relative_to(root)), "sha256": digest, "step": step}
    return lower_precision(model), entry, settings


def seeds_of(root):
    """Seeds of which both arms are there."""
    names = [path.name[4:] for path in (Path(root) / "trained").glob("seed*")]
    found = sorted({0, *(int(name) for name in names if name.isdecimal())})
    both = [seed for seed in found if all((arm_folder(root, seed, arm) / "manifest.json").is_file() for arm in ARMS)]
    return both or [0]                                                 # load_arm says what is missing


def gather_models(root, meta, device, quick):
    """Every trained model: ({(arm, seed): model}, {arm: entries for results.json}, the settings they share).

    Raises StageError where the memory is not the only thing that differs: the data, the settings, the steps taken
    and, within a seed, the initial weights have to be the same.
    """
    again = f"./run_all.sh --fresh --root {root}" + " --quick" * quick
    models, entries, shared = {}, {arm: [] for arm in ARMS}, None
    for seed in seeds_of(root):
        inits = set()
        for arm in ARMS:
            models[arm, seed], entry, settings = load_arm(root, seed, arm, device, quick)
            entries[arm].append(entry)
            inits.add(settings.get("init"))
            settings = {name: value for name, value in settings.items() if name not in ("arm", "init", "seed")}
            if settings.get("data") != meta["splits"]["train"]["sha256"]:
                raise StageError(f"{entry['folder']} was trained on other data than {root}/data now holds; put that "
                                 f"data back, or train again: {train_command(root, seed, arm, quick)} --fresh")
            shared = shared or settings
            if settings != shared or len(inits) > 1:
                raise StageError(f"{entry['folder']} was trained differently from {entries[ARMS[0]][0]['folder']}; "
                                 f"train all again: {again}")
    furthest = max(entry["step"] for arm in ARMS for entry in entries[arm])
    for arm, entry in ((arm, entry) for arm in ARMS for entry in entries[arm]):
        if entry["step"] != furthest:
            raise StageError(f"{entry['folder']} is at step {entry['step']}, not at {furthest} as others are; go on "
                             f"with: {train_command(root, entry['seed'], arm, quick)} --resume")
    return models, entries, shared


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


class Measured(NamedTuple):
    """What was measured, before any mean or interval."""

    tallies: dict               # {(arm, seed): Tally of the documents}
    windows: dict               # {(arm, seed): (documents,) bits of the rows taken alone}
    window_characters: np.ndarray       # (documents,) of the tokens that `windows` counts
    recall: dict                # {(arm, seed, (form, distance)): what `answer` gives}
    speed: dict                 # {arm: {"median", "runs"}}


def measure(models, texts, rows, asked, per_token, device):
    """Score the documents, the rows alone and the questions with every model, then time both arms: Measured."""
    width, seeds = rows.shape[1], sorted({seed for _, seed in models})
    compiled = torch.compile(lambda model, tokens, targets, opens: model.score(tokens, targets, opens), dynamic=False)

    def scorer(model):
        """How `model` scores packs: compiled where there is a GPU."""
        if device != "cuda":
            return model.score
        return lambda tokens, targets, opens: compiled(model, tokens, targets, opens)

    opening = np.cumsum(rows[:, 0] == EOT) - 1                         # document of each row
    of_target = np.pad(per_token[rows[:, 1:]], ((0, 0), (0, 1)))
    tallies, windows, recall = {}, {}, {}
    with tqdm(total=len(models) * (len(texts) + sum(map(len, asked.values()))), unit="sequence", disable=None) as bar:
        for key, model in models.items():
            tallies[key] = score_text(scorer(model), texts, width, device, bar.update)
            bits, counted = score_windows(model.score, rows, device)
            windows[key] = np.bincount(opening, np.where(counted, bits, 0).sum(1))
        for (arm, seed), model in models.items():
            for cell, block in asked.items():
                recall[arm, seed, cell] = answer(model, block, width, device)
                bar.update(len(block))
        speed = throughput({arm: scorer(models[arm, seeds[0]]) for arm in ARMS}, texts, width, device)
    return Measured(tallies, windows, np.bincount(opening, np.where(counted, of_target, 0).sum(1)), recall, speed)


def summarise_recall(recall, seeds, config):
    """The recall part of results.json: over formats and seeds, the same questions for every model."""
    def gather(arm, measure, distances, forms=FORMATS):
        """Outcomes of one measure of `answer` on some cells, all seeds."""
        return np.concatenate([recall[arm, seed, (form, distance)][measure]
                               for seed in seeds for form in forms for distance in distances])

    share = lambda outcomes: {"mean": float(outcomes.mean()), "ci95": wilson(int(outcomes.sum()), len(outcomes))}
    summary = {"chance": 1 / FACTS, "window": config.stm_window, "distances": list(DISTANCES),
               "receptive_field": config.n_layer * (config.stm_window - 1) + 1,
               "trials_per_distance": len(FORMATS) * TRIALS, "seeds": len(seeds)}
    for arm in ARMS:
        part = summary[arm] = {}
        for measure, name in enumerate(("forced_choice", "top1", "stored", "retrieved")):
            shares = [share(gather(arm, measure, [distance])) for distance in DISTANCES]
            part[name], part[f"{name}_ci95"] = [x["mean"] for x in shares], [x["ci95"] for x in shares]
        for measure, name in enumerate(("by_format", "top1_by_format")):
            part[name] = {form: [float(gather(arm, measure, [distance], [form]).mean()) for distance in DISTANCES]
                          for form in FORMATS}
        pairs = [(gather(arm, 0, [distance]), gather(arm, 3, [distance])) for distance in DISTANCES]
        part["retrieved_of_answered"] = [float(found[right].mean()) if right.any() else 0.0 for right, found in pairs]
    summary["mcnemar_p"] = [mcnemar(*(gather(arm, 0, [distance]) for arm in ARMS)) for distance in DISTANCES]

    far = summary["long_range"] = {"distances": list(LONG_RANGE)}
    for arm in ARMS:
        top = share(gather(arm, 1, LONG_RANGE))
        far[arm] = {**share(gather(arm, 0, LONG_RANGE)), "top1": top["mean"], "top1_ci95": top["ci95"],
                    "by_format": {form: float(gather(arm, 0, LONG_RANGE, [form]).mean()) for form in FORMATS}}
    p = far["mcnemar_p"] = mcnemar(*(gather(arm, 0, LONG_RANGE) for arm in ARMS))
    better = far["with_ltm"]["mean"] > far["baseline"]["mean"]
    far["verdict"] = "inconclusive" if p > 0.05 else "helps" if better else "hurts"
    return summary


def summarise_gain(tallies, texts, per_token, seeds, config):
    """Where the gain in bits comes from, mean over seeds: (by place in the document, by kind of target)."""
    place = np.concatenate([np.arange(len(text) - 1) for text in texts])
    characters = np.concatenate([per_token[text[1:]] for text in texts])
    bits = {arm: np.mean([np.concatenate(tallies[arm, seed].bits) for seed in seeds], 0) for arm in ARMS}

    edges = [0, 64, 128, 256, 512, 1024, 2048]
    inside = [((place >= low) & (place < high), low, high) for low, high in zip(edges, edges[1:])]
    inside = [(mask, low, high) for mask, low, high in inside if characters[mask].any()]
    position = {"edges": [low for _, low, _ in inside] + [inside[-1][2]],
                **{arm: [float(bits[arm][mask].sum() / characters[mask].sum()) for mask, *_ in inside] for arm in ARMS}}

    kinds = np.concatenate([kinds_of_target(text, stored > 0, config.stm_window, config.ltm_slots)
                            for text, stored in zip(texts, tallies["with_ltm", seeds[0]].stored)])
    gain, targets = bits["baseline"] - bits["with_ltm"], {}
    for number, name in enumerate(("new in the document", "last seen inside the window",
                                   "last seen beyond the window, in memory", "last seen beyond both")):
        kind = kinds == number
        targets[name] = {"share_of_tokens": float(kind.mean()),
                         "share_of_gain": float(gain[kind].sum() / (gain.sum() or 1.0)),
                         **{arm: float(bits[arm][kind].mean()) if kind.any() else 0.0 for arm in ARMS}}
    return position, targets


def print_table(results):
    """The four numbers of each arm, two more, and what they say."""
    detail = results["detail"]
    bpc, windows, far = detail["bpc"], detail["bpc_windows"], detail["recall"]["long_range"]
    print(f"\n{'':22}" + "".join(f"{arm:>12}" for arm in ARMS))
    for name, form in (("bpc", ".4f"), ("long_range_recall", ".3f"), ("memory_hit_rate", ".3f"),
                       ("tokens_per_sec", ",.0f")):
        print(f"{name:22}" + "".join(f"{results[arm][name]:>12{form}}" for arm in ARMS))
    for name, form, values in (
            ("bpc, windows alone", ".4f", [statistics.fmean(windows[arm]["per_seed"]) for arm in ARMS]),
            ("top-1 recall", ".3f", [far[arm]["top1"] for arm in ARMS])):
        print(f"{name:22}" + "".join(f"{value:>12{form}}" for value in values))
    low, high = bpc["difference"]["ci95"]
    print(f"\nThe memory {bpc['verdict'].replace('inconclusive', 'makes no clear difference to')} BPC: "
          f"{bpc['difference']['mean']:+.4f} [{low:+.4f}, {high:+.4f}], x {bpc['ratio']:.4f} "
          f"(windows alone x {windows['ratio']:.4f}); recall beyond the window: {far['verdict']} "
          f"({far['baseline']['mean']:.3f} to {far['with_ltm']['mean']:.3f}, chance {1 / FACTS:.3f}).")


def commit():
    """The commit of this code, "-dirty" where it was changed since; "unknown" outside a checkout."""
    try:
        return subprocess.run(["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"],
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", metavar="DIR", help="folder of data/ and trained/ (default: this one)")
    parser.add_argument("--quick", action="store_true", help="the small setting, under quick/")
    args = parser.parse_args(argv)
    if args.quick:
        globals().update(QUICK)
    began, root, device = time.time(), Path(default_root(args.root, args.quick)), pick_device()
    tokenizer = load_tokenizer(root)
    rows, meta = load_split(root, "val")
    texts = [text for text in documents(rows) if len(text) > 1]
    per_token = characters_per_token(tokenizer)
    characters = np.array([per_token[text].sum() for text in texts], float)
    models, entries, settings = gather_models(root, meta, device, args.quick)
    seeds = [entry["seed"] for entry in entries["with_ltm"]]
    hybrid = models["with_ltm", seeds[0]]
    asked = {(form, distance): questions(texts, tokenizer, form, distance, TRIALS)
             for form in FORMATS for distance in DISTANCES}
    tokens = sum(map(len, texts)) - len(texts)
    print(f"{len(texts):,} documents, {tokens:,} tokens; seeds {seeds}; on {device}", flush=True)
    measured = measure(models, texts, rows, asked, per_token, device)

    bits = {key: np.array([b.sum() for b in tally.bits]) for key, tally in measured.tallies.items()}
    stack = lambda per_model: {arm: np.stack([per_model[arm, seed] for seed in seeds]) for arm in ARMS}
    bpc = paired_bootstrap(stack(bits), characters)
    windows = paired_bootstrap(stack(measured.windows), measured.window_characters)
    if not np.isfinite([bpc["ratio"], windows["ratio"]]).all():
        raise StageError(f"a metric is NaN or infinite: the weights are not sane; train again: ./run_all.sh --fresh "
                         f"--root {root}" + " --quick" * args.quick)
    mean = lambda field: [float(np.concatenate(getattr(measured.tallies["with_ltm", seed], field)).mean())
                          for seed in seeds]
    hits, speed = mean("hit"), measured.speed
    recall = summarise_recall(measured.recall, seeds, hybrid.config)
    position, targets = summarise_gain(measured.tallies, texts, per_token, seeds, hybrid.config)

    results = {arm: {"bpc": statistics.fmean(bpc[arm]["per_seed"]),
                     "long_range_recall": recall["long_range"][arm]["mean"],
                     "memory_hit_rate": statistics.fmean(hits) if arm == "with_ltm" else 0.0,
                     "tokens_per_sec": speed[arm]["median"]} for arm in ARMS}
    results["detail"] = {
        "data": {"source": meta["source"], "quick": bool(meta["quick"]), "val_documents": len(texts),
                 "val_tokens": tokens, "val_characters": int(characters.sum()),
                 "val_sha256": meta["splits"]["val"]["sha256"]},
        "run": {"device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__,
                "transformers": transformers.__version__, "python": platform.python_version(), "commit": commit(),
                "seeds": seeds, "steps": entries["baseline"][0]["step"], "settings": settings,
                "parameters": sum(parameters_by_group(hybrid).values()), "checkpoints": entries},
        "bpc": bpc, "bpc_windows": windows, "recall": recall,
        "tokens_per_sec": {**speed, "ratio": speed["with_ltm"]["median"] / speed["baseline"]["median"]},
        "memory_hit_rate": {"baseline": 0.0, "with_ltm": statistics.fmean(hits), "per_seed": hits,
                            "routed_token_ratio": statistics.fmean(mean("stored"))},
        "position": position, "targets_bits_per_token": targets}
    write_json(root / "results.json", results)
    print_table(results)
    print(f"wrote {root / 'results.json'} in {time.time() - began:.0f} s; next: python plot_eval.py --root {root}")


if __name__ == "__main__":
    run_stage(main)
