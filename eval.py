"""Answer the question: bits per character and long-range recall of both arms, on the same text and questions.

reads   data/val.bin, data/meta.json, trained/baseline/, trained/with_ltm/ (and trained/seedN/ where there are more)
writes  results.json

    python eval.py                  what the README reports
    python eval.py --controls       the same, and what the gain depends on: other thresholds, sizes, models (first seed)
    python eval.py --quick          the small models under quick/

bpc                 bits of all validation tokens / their characters; whole documents, memory empty at each start
long_range_recall   8 facts planted in real text, one asked for 160 to 384 tokens later, beyond the 128-token window:
                    how often the right value is the likeliest of the 8 (chance 1/8)
memory_hit_rate     share of predictions that retrieved at least one item
tokens_per_sec      scoring those documents, both arms in turn in this process
"""

import argparse
import codecs
import copy
import functools
import itertools
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
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models import (EOT, GPT, Address, Reading, RevenaHybridTiny, Scores, StageError, arm_folder,
                    characters_per_token, command, compiled, default_root, has_compiler, load_model, load_split,
                    load_tokenizer, lower_precision, mix, parameters_by_group, pick_device, read_json, read_manifest,
                    run_stage, sha256, write_json)

ARMS = ("baseline", "with_ltm")
PACK = 128                      # rows of 128 tokens scored at once; a control takes up to 2.5 GB of GPU memory
FACTS = 8                       # planted in a sequence; their values are the choices
TRIALS = 336                    # questions per distance and format
DISTANCES = (32, 64, 96, 160, 192, 256, 320, 384, 512, 1024)    # tokens from the value to the place to repeat it
LONG_RANGE = (160, 192, 256, 320, 384)
LEAD = 64                       # tokens of real text before the facts
DISTRACTORS = (0, 8, 64, 300)   # facts more between the one asked for and the question; 300 evict it
DISTRACTED = 256                # tokens from the value to the place to repeat it, where the distractors fit in there
BOOTSTRAP = 10_000              # resamples of seeds and documents
REPEATS = 5                     # timed passes over TIMED packs, each arm in turn
TIMED = 16
SHOWN, READS, SOURCES = 420, 4, 3       # the picture of a memory: tokens of a document, reads, items of each
CONTROL_TRIALS = 96             # questions per distance and format for each control
FITTED = 200                    # documents of train.bin that the caches' few parameters are fitted to
SEED = 0                        # of questions, bootstrap and controls: the same for every model
QUICK = dict(PACK=16, TRIALS=8, DISTANCES=(64, 160, 256), LONG_RANGE=(160, 256), DISTRACTORS=(0, 64), TIMED=1, FITTED=6)


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


def packs(sequences, width, device, size=None):
    """Lay sequences out in Packs of `size` rows (default PACK), longest first, so that little is left over.

    A longer one has its own.
    """
    size, order = size or PACK, sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))

    def rows_of(i):
        return -(-len(sequences[i]) // width)

    def emit(chosen):
        count = max(size, sum(rows_of(i) for i in chosen))
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
        if waiting and used + rows_of(i) > size:
            yield emit(waiting)
            waiting, used = [], 0
        waiting.append(i)
        used += rows_of(i)
    if waiting:
        yield emit(waiting)


@functools.cache
def compiled_method(method):
    """A method of the models as one graph: their weights are its inputs, so it is compiled once for all of them."""
    return compiled(lambda model, *given: getattr(model, method)(*given), dynamic=False)


def fast(method, model, *given):
    """model.method(*given); on a GPU compiled, where model and pack are of the usual class and shape."""
    usual = type(model) is RevenaHybridTiny and given[0].shape[:2] == (PACK, model.config.stm_window)
    if usual and has_compiler(model.device):
        return compiled_method(method)(model, *given)
    return getattr(model, method)(*given)


def states(model, pack):
    """Final states (N, C, D) of a pack."""
    if model.config.stm_window is None:                                # GPT: each row is a whole sequence
        return model.states(pack.tokens)
    return fast("states", model, pack.tokens, pack.opens)


def score(pack, *variants):
    """Scores of a pack's targets by each of some models that differ in nothing but their memory.

    The parts of model.score one by one: the arms have the first two in common, so that these are compiled once. What
    only one of several variants does is not compiled: that would take longer than it saves.
    """
    model = variants[0]
    h = states(model, pack)
    log_p, log_z = fast("log_p", model, h, pack.targets)
    if not model.config.ltm_enabled:
        nothing = torch.zeros_like(pack.targets, dtype=torch.bool)
        return [Scores(log_p, log_p, log_p, nothing, nothing)]
    given = h, pack.tokens, pack.targets, log_p, log_z, pack.opens
    if len(variants) == 1:
        return [fast("score_states", model, *given)]
    return [variant.score_states(*given) for variant in variants]


class Tally(NamedTuple):
    """Per sequence, arrays over its targets (length - 1)."""

    bits: list                  # of the model
    stm: list                   # of its backbone alone
    hit: list
    stored: list


@torch.no_grad()
def score_text(model, sequences, width, device, note=None):
    """Tally of every token of the sequences given what came before it."""
    kept = Tally(*([None] * len(sequences) for _ in Tally._fields))
    for pack in packs(sequences, width, device):
        scores, = score(pack, model)
        flat = torch.stack([x.float() for x in (scores.log_p, scores.log_p_stm, scores.hit, scores.stored)])
        flat = flat.flatten(1).cpu().double().numpy()
        flat[:2] /= -math.log(2)
        for i, first, length in pack.places:
            for field, values in zip(kept, flat[:, first:first + length - 1]):
                field[i] = values
        if note:
            note(len(pack.places))
    return kept


def score_windows(model, rows, device):
    """Bits of each target of the rows taken alone: (bits (N, C - 1), which of them count as bool (N, C - 1))."""
    tally = score_text(model, list(rows.astype(np.int64)), rows.shape[1], device)
    fresh = (rows[:, :1] == EOT) | (np.arange(1, rows.shape[1]) >= rows.shape[1] // 2)
    return np.stack(tally.bits), fresh & (rows[:, 1:] != EOT)


# ------------------------------------------------------------------------------------ recall

FORMATS = {                     # how a fact is written; the question stops before the value
    "pair": (" {key}", " {value}", "."),
    "colon": (" {key}:", " {value}", "."),
    "sentence": (" The code of {key} is", " {value}", "."),
}


@functools.cache
def single_words(tokenizer):
    """Tokens that are one lower-case English-looking word of four letters or more with its space before it."""
    words = [(word, index) for word, index in tokenizer.get_vocab().items()
             if word[0] == "Ġ" and len(word) > 4 and word[1:].isascii() and word[1:].isalpha() and word[1:].islower()]
    return np.array([index for _, index in sorted(words)])


class Question(NamedTuple):
    tokens: np.ndarray          # the whole sequence; its last token is the last of the question
    choices: np.ndarray         # (FACTS,) values planted in it, the right one first
    place: int                  # where the right value stands
    begin: int                  # where the question begins


def fact_tokens(tokenizer, form):
    """The tokens of a fact but for its key and value: (before the key, between the two, after the value)."""
    before, _, stop = FORMATS[form]
    key_at = before.index("{key}")
    encode = lambda text: tokenizer.encode(text) if text else []
    return encode(before[:key_at].rstrip()), encode(before[key_at + len("{key}"):]), encode(stop)


def distracted_distance(tokenizer, form, extra):
    """The distance at which `extra` distractors are asked over: DISTRACTED, or the least that has room for them."""
    return max(DISTRACTED, (FACTS + extra) * (2 + sum(map(len, fact_tokens(tokenizer, form)))))


def questions(texts, tokenizer, form, distance, count, extra=0):
    """`count` Questions: FACTS facts planted in real text, the value asked for `distance` tokens after it stood.

    Example (pair): "EOT ..text.. lamp seven. ..text.. door north. ..text.. lamp" -> " seven"; 8 such facts, half of
    the others after the one asked for, as far as they fit. Keys and values are single tokens from disjoint sets.
    `extra` facts more, distractors that are never asked for, stand between the one asked for and the question, as many
    as fit.
    """
    draw = np.random.default_rng((SEED, list(FORMATS).index(form), distance, extra))
    opening, middle, closing = fact_tokens(tokenizer, form)
    words = np.random.default_rng(SEED).permutation(single_words(tokenizer))
    keys, values = words[:len(words) // 2], words[len(words) // 2:]
    fact = lambda key, value: [*opening, key, *middle, value, *closing]
    asked = len(opening) + 1 + len(middle)                             # tokens of the question
    size = asked + 1 + len(closing)                                    # tokens of a fact
    least = LEAD + max(distance - extra * size, size)                  # tokens of real text, at most
    long_enough = [text for text in texts if len(text) > least]
    if not long_enough:
        raise StageError(f"no validation document is longer than {least} tokens; prepare more text, or take "
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
        made.append(Question(tokens, chosen[1][:FACTS], place, len(tokens) - asked))
    return made


OUTCOMES = ("forced_choice", "top1", "stored", "retrieved")


@torch.no_grad()
def answer(variants, asked, width, device, wiped=False, size=None, note=None):
    """What models that differ in their memory only say: of each a bool array (4, len(asked)), rows as OUTCOMES.

    `wiped`: nothing that came before the question is in memory. width, size: as in `packs`.
    """
    said, memory = [np.zeros((len(OUTCOMES), len(asked)), bool) for _ in variants], variants[0].config.ltm_enabled
    for pack in packs([question.tokens for question in asked], width, device, size):
        numbers, first, length = map(np.array, zip(*pack.places))
        if wiped:                                                      # what is no target is not stored
            kept = np.zeros(pack.targets.shape, bool).reshape(-1)
            for i, start, count in pack.places:
                kept[start + asked[i].begin - 1:start + count - 1] = True
            kept = torch.from_numpy(kept).to(device).view_as(pack.targets)
            pack = pack._replace(targets=torch.where(kept, pack.targets, EOT))
        h = states(variants[0], pack)
        row, column = (torch.from_numpy(x).to(device) for x in divmod(first + length - 1, width))
        p_stm = variants[0].logits(h[row, column]).log_softmax(-1)
        log_p, log_z = fast("log_p", variants[0], h, pack.targets) if memory else (None, None)
        truth = torch.tensor([asked[i].choices[0] for i in numbers], device=device)
        fact = torch.tensor([f + asked[i].place - 1 for i, f in zip(numbers, first)], device=device)
        # in order of their ids: where two are equally likely (bfloat16 has few digits) the right one has no advantage
        choices = torch.from_numpy(np.stack([np.sort(asked[i].choices) for i in numbers])).to(device)
        for model, outcomes in zip(variants, said):
            p, stored, retrieved = p_stm, torch.zeros_like(truth), torch.zeros_like(truth)
            if memory:
                read, values, kept, odds = model.read(h, pack.tokens, pack.targets, log_p, log_z, pack.opens)
                weight = read.weights(odds)[row, column]
                p = mix(p[:, None], weight[:, None], values[row])[:, 0]
                stored, retrieved = kept.flatten()[fact], ((weight > 0) & (values[row] == truth[:, None])).any(1)
            picked = choices.gather(1, p.gather(1, choices).argmax(1, keepdim=True))[:, 0]
            found = torch.stack((picked == truth, p.argmax(1) == truth, stored > 0, retrieved > 0))
            outcomes[:, numbers] = found.cpu().numpy()
        if note:
            note(len(numbers))
    return said


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


def paired_difference(first, second):
    """Share of `second` minus that of `first`, paired bool arrays (seeds, questions): {"mean", "ci95"}.

    The interval is Wald's after half an observation is added to each of the four cells (Agresti & Min 2005), so none is
    ever a point. The seeds' answers to a question are not independent: together they count as one.
    """
    n = first.shape[1]
    only, other = ((one & ~two).sum() / len(one) for one, two in ((first, second), (second, first)))
    centre, spread = (other - only) / (n + 2), only + other + 1
    half = 1.959964 * math.sqrt(spread - (other - only) ** 2 / (n + 2)) / (n + 2)
    return {"mean": (other - only) / n, "ci95": [max(-1.0, centre - half), min(1.0, centre + half)]}


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
    return command("train.py --with-ltm" if arm == "with_ltm" else "train.py --baseline", root, quick, seed or None)


def load_arm(root, seed, arm, device, quick):
    """(model, entry for results.json, settings) of one trained arm, config and weights verified by its manifest.

    Damaged weights are named, and the newest whole checkpoint is used; none: StageError.
    """
    folder, made_by = arm_folder(root, seed, arm), train_command(root, seed, arm, quick)
    weights, source = folder / "model.safetensors", folder
    # the hash first: a training at work names new weights in the manifest before it puts them in place
    digest = sha256(weights) if weights.is_file() else None
    manifest = read_json(folder / "manifest.json", made_by)
    known, settings = manifest.get("weights"), manifest.get("settings")
    if not isinstance(settings, dict) or not isinstance(known, dict) or any(type(n) is not int for n in known.values()):
        raise StageError(f"{folder / 'manifest.json'} is damaged; train again: {made_by} --fresh")
    config = folder / "config.json"
    if not config.is_file() or sha256(config) != manifest.get("config"):
        raise StageError(f"{config} is missing or not the file its manifest names; put that back, or train again: "
                         f"{made_by} --fresh")
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
    entry = {"seed": seed, "folder": str(source.relative_to(root)), "sha256": digest, "step": step,
             "config_sha256": manifest["config"]}
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
    again = command("./run_all.sh --fresh", root, quick)
    models, entries, shared = {}, {arm: [] for arm in ARMS}, None
    for seed in seeds_of(root):
        inits = set()
        for arm in ARMS:
            models[arm, seed], entry, settings = load_arm(root, seed, arm, device, quick)
            entries[arm].append(entry)
            inits.add(str(settings.get("init")))
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


def throughput(models, sequences, width, device):
    """Tokens per second that each of {name: model} scores, in turn: {name: {"median", "runs"}}."""
    ready = [pack for _, pack in zip(range(TIMED), packs(sequences, width, device))]
    tokens = sum(length - 1 for pack in ready for _, _, length in pack.places)
    runs = {name: [] for name in models}
    for repeat in range(REPEATS + 1):                                  # the first warms up
        for name, model in models.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                for pack in ready:
                    last = score(pack, model)[0].log_p
            last.sum().item()                                          # waits for the device
            if repeat:
                runs[name].append(tokens / (time.perf_counter() - start))
    return {name: {"median": statistics.median(values), "runs": values} for name, values in runs.items()}


class Measured(NamedTuple):
    """What was measured, before any mean or interval."""

    tallies: dict               # {(arm, seed): Tally of the documents}
    windows: dict               # {(arm, seed): (documents,) bits of the rows taken alone}
    window_characters: np.ndarray       # (documents,) of the tokens that `windows` counts
    recall: dict                # {(arm, seed, (form, distance, distractors)): what `answer` gives}
    speed: dict                 # {arm: {"median", "runs"}}


def measure(models, texts, rows, asked, per_token, device):
    """Score the documents, the rows alone and the questions with every model, then time both arms: Measured."""
    width, seeds = rows.shape[1], sorted({seed for _, seed in models})
    opening = np.cumsum(rows[:, 0] == EOT) - 1                         # document of each row
    tallies, windows, recall = {}, {}, {}
    block = [question for cell in asked.values() for question in cell]
    starts = np.cumsum([0, *map(len, asked.values())])
    with tqdm(total=len(models) * (len(texts) + len(block)), unit="sequence", disable=None) as bar:
        for key, model in models.items():
            tallies[key] = score_text(model, texts, width, device, bar.update)
            bits, counted = score_windows(model, rows, device)
            windows[key] = np.bincount(opening, np.where(counted, bits, 0).sum(1))
        for (arm, seed), model in models.items():
            outcomes, = answer([model], block, width, device, note=bar.update)
            for cell, start in zip(asked, starts):
                recall[arm, seed, cell] = outcomes[:, start:start + len(asked[cell])]
        speed = throughput({arm: models[arm, seeds[0]] for arm in ARMS}, texts, width, device)
    characters = np.bincount(opening, np.where(counted, per_token[rows[:, 1:]], 0).sum(1))
    return Measured(tallies, windows, characters, recall, speed)


def summarise_recall(recall, seeds, config, distracted):
    """The recall part of results.json: means over formats and seeds, the same questions for every model.

    `distracted`: {distractors: {form: distance}}.
    """
    def gather(arm, outcome, cells):
        """One of the OUTCOMES on some cells: bool (seeds, questions)."""
        return np.stack([np.concatenate([recall[arm, seed, cell][OUTCOMES.index(outcome)] for cell in cells])
                         for seed in seeds])

    def share(*cells):
        """The mean, and Wilson's interval: the seeds' answers to a question count as one."""
        right = gather(*cells)
        return {"mean": float(right.mean()), "ci95": wilson(right.sum() / len(seeds), right.shape[1])}

    def of_answered(arm, cells):
        """Of the questions answered rightly, the share where the right item had been retrieved."""
        right = gather(arm, "forced_choice", cells)
        return float(gather(arm, "retrieved", cells)[right].mean()) if right.any() else 0.0

    at = lambda distances, forms=FORMATS: [(form, distance, 0) for form in forms for distance in distances]
    summary = {"chance": 1 / FACTS, "window": config.stm_window, "distances": list(DISTANCES),
               "receptive_field": config.n_layer * (config.stm_window - 1) + 1,
               "trials_per_distance": len(FORMATS) * TRIALS, "seeds": len(seeds)}
    for arm in ARMS:
        part = summary[arm] = {}
        for name in OUTCOMES:
            shares = [share(arm, name, at([distance])) for distance in DISTANCES]
            part[name], part[f"{name}_ci95"] = [x["mean"] for x in shares], [x["ci95"] for x in shares]
        for outcome, name in (("forced_choice", "by_format"), ("top1", "top1_by_format")):
            part[name] = {form: [share(arm, outcome, at([distance], [form]))["mean"] for distance in DISTANCES]
                          for form in FORMATS}
        part["retrieved_of_answered"] = [of_answered(arm, at([distance])) for distance in DISTANCES]
    # of the seed where the arms differ least
    test = lambda distances: max(map(mcnemar, *(gather(arm, "forced_choice", at(distances)) for arm in ARMS)))
    summary["mcnemar_p"] = [test([distance]) for distance in DISTANCES]

    far = summary["long_range"] = {"distances": list(LONG_RANGE)}
    right = {arm: gather(arm, "forced_choice", at(LONG_RANGE)) for arm in ARMS}
    for arm in ARMS:
        top = share(arm, "top1", at(LONG_RANGE))
        far[arm] = {**share(arm, "forced_choice", at(LONG_RANGE)), "per_seed": right[arm].mean(1).tolist(),
                    "top1": top["mean"], "top1_ci95": top["ci95"],
                    "by_format": {form: share(arm, "forced_choice", at(LONG_RANGE, [form]))["mean"]
                                  for form in FORMATS},
                    "retrieved_of_answered": of_answered(arm, at(LONG_RANGE))}
    p = far["mcnemar_p"] = test(LONG_RANGE)
    far["difference"] = paired_difference(*right.values())
    signs = {np.sign(b - a) for a, b in zip(*(far[arm]["per_seed"] for arm in ARMS))}
    far["verdict"] = "inconclusive" if p > 0.05 or len(signs) > 1 else "helps" if signs == {1} else "hurts"

    summary["distractors"] = []
    for extra, distances in distracted.items():
        row, cells = {"facts": extra, "distance": distances}, [(*item, extra) for item in distances.items()]
        for arm in ARMS:
            shares = {name: share(arm, name, cells) for name in OUTCOMES}
            row[arm] = {name: x["mean"] for name, x in shares.items()} | {
                "ci95": shares["forced_choice"]["ci95"], "retrieved_of_answered": of_answered(arm, cells),
                "by_format": {cell[0]: share(arm, "forced_choice", [cell])["mean"] for cell in cells}}
        summary["distractors"].append(row)
    return summary


def summarise_speed(speed):
    """The throughput part of results.json: what `throughput` gives, and the ratio of the medians with its interval."""
    runs = np.array([speed[arm]["runs"] for arm in ARMS])              # (2, REPEATS): both arms in turn
    chosen = np.random.default_rng(SEED).integers(0, runs.shape[1], (BOOTSTRAP, runs.shape[1]))
    medians = np.median(runs[:, chosen], axis=2)
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975)).tolist()
    return {**speed, "ratio": speed["with_ltm"]["median"] / speed["baseline"]["median"], "ratio_ci95": [low, high],
            "verdict": "helps" if low > 1 else "hurts" if high < 1 else "inconclusive"}


def summarise_gain(tallies, texts, per_token, seeds, config):
    """Where the gain in bits comes from, mean over seeds: (by place in the document, by kind of target).

    What is in memory is what the first seed's model stored.
    """
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


# ------------------------------------------------------------------------------------ one memory at work

def pieces(tokenizer, tokens):
    """The text that each token adds; a character spread over several tokens stands in the last of them."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return [decode(bytes(map(byte_of.get, word))) for word in tokenizer.convert_ids_to_tokens(tokens)]


@torch.no_grad()
def observe(model, texts, tally, tokenizer):
    """What the memory did in the first SHOWN tokens of one document, for results.json.

    The document: of those long enough (of all, if none is), the first in which READS words gain a bit or more although
    the window has lost sight of them; if there is none, that with the most. The reads: the words that gained most, of
    those that the window has lost and whose heaviest item lies beyond it; no word twice. All in float32, the reads off
    a Memory.
    """
    config, window = model.config, model.config.stm_window
    is_word = np.array([any(map(str.isalnum, text)) for text in tokenizer.batch_decode(np.arange(EOT + 1)[:, None])])

    def lost_and_found(i):
        tokens = texts[i][:SHOWN + 1]
        bits, stm, stored = (field[i][:SHOWN] for field in (tally.bits, tally.stm, tally.stored))
        lost = kinds_of_target(tokens, stored > 0, window, config.ltm_slots) == 2
        return min(READS, len(set(tokens[1:][lost & (stm - bits >= 1) & is_word[tokens[1:]]].tolist())))
    long_enough = [i for i, text in enumerate(texts) if len(text) > SHOWN] or range(len(texts))
    number = max(long_enough, key=lost_and_found)                      # of equals, the first

    model = altered(model).float()
    ids = torch.from_numpy(texts[number][None, :SHOWN + 1]).to(model.device)
    cost = lambda model: (model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0].cpu() / -math.log(2)).tolist()
    bits, mixture, tokens = cost(altered(model, ltm_enabled=False)), cost(model), ids[0, 1:].tolist()
    words, memory, reads = pieces(tokenizer, tokens), model.new_memory(), []
    gains = sorted((mixed - alone, at) for at, (alone, mixed) in enumerate(zip(bits, mixture))
                   if at >= window and mixed < alone and is_word[tokens[at]]
                   and tokens[at] not in tokens[at - window:at])
    for gain, at in sorted(gains[:64], key=lambda pair: pair[1]):
        model(ids[:, memory.length:at + 1], past_key_values=memory, logits_to_keep=1)
        found = [{"at": item["position"] - 1, "share": item["share"], "cosine": item["cosine"]}
                 for item in memory.retrieved() if item["token"] == tokens[at]]
        if found and at - found[0]["at"] > window:
            reads.append((gain, at, found[:SOURCES]))
    chosen = {}
    for _, at, found in sorted(reads, key=lambda read: read[:2]):
        if len(chosen) < READS:
            chosen.setdefault(words[at].strip().lower(), {"at": at, "from": found})
    return {"document": number, "window": window, "threshold": config.ltm_surprisal_bits,
            "tokens": [{"text": word, "bits": alone, "bits_mixture": mixed, "stored": alone > config.ltm_surprisal_bits}
                       for word, alone, mixed in zip(words, bits, mixture)],
            "reads": sorted(chosen.values(), key=lambda read: read["at"])}


# ------------------------------------------------------------------------------------ controls

def altered(model, kind=RevenaHybridTiny, **settings):
    """A model of the same weights, not copied, as another class or with other settings (of its config)."""
    config = copy.deepcopy(model.config)
    config.update(settings)
    with torch.device("meta"):                                         # no weights of its own
        twin = kind(config)
    mine, weights = twin.state_dict().keys(), model.state_dict()
    twin.load_state_dict({name: weights[name] for name in mine if name != "backbone.rotary"}, strict=False, assign=True)
    return twin.to(model.device).eval()


class OtherReads(RevenaHybridTiny):
    """What is retrieved and the odds of looking up are changed: config.change(Reading, odds) gives both."""

    def read(self, *given):
        read, values, stored, odds = super().read(*given)
        read, odds = self.config.change(read, odds)
        return read, values, stored, odds


class RandomTokens(RevenaHybridTiny):
    """Each token is stored with probability config.rate, whatever its surprisal."""

    def route(self, log_p, targets):
        bits, _ = super().route(log_p, targets)
        draw = torch.rand(targets.shape, generator=torch.Generator().manual_seed(SEED)).to(targets.device)
        return bits, (targets != EOT) & (draw < self.config.rate)


class ShuffledValues(RevenaHybridTiny):
    """The values of the items of a sequence change places: at a key, there may even be one that is yet to come."""

    def candidates(self, address, targets, stored, opens=None):
        items = stored.flatten().nonzero()[:, 0]
        sequence = opens.cumsum(0)[items // targets.size(1)]
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(SEED)).to(items.device)
        order = order[sequence[order].argsort(stable=True)]
        values = targets.flatten().index_copy(0, items, targets.flatten()[items[order]])
        return super().candidates(address, values.view_as(targets), stored, opens)


class NeuralCache(RevenaHybridTiny):
    """Grave et al. 2017: (1 - share) p_stm + share p_cache, p_cache = softmax_i(theta h_t . h_i) over the last tokens.

    That is the mixture of this model where the items, all tokens, weigh share / (1 - share) p_cache. config.theta,
    config.share; the size is ltm_slots.
    """

    def read(self, h, tokens, targets, log_p, log_z, opens=None):
        stored = targets != EOT
        address = Address(*[targets] * len(Address._fields))._replace(key=h)           # only the key is asked for
        items, values, visible = self.candidates(address, targets, stored, opens)
        match = self.config.theta * (h.float() @ items.key.float().mT)                 # (N, C, I)
        cache = match.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()        # at the start there is none
        weight = self.config.share / (1 - self.config.share) * cache
        return Reading(weight, torch.zeros_like(weight), None), values, stored, -torch.ones_like(log_p)


@torch.no_grad()
def fit_cache(model, texts, slots, width):
    """A NeuralCache of that size on the backbone of `model`, fitted to texts: theta on a grid, share exactly."""
    cache = functools.partial(altered, model, NeuralCache, ltm_enabled=True, ltm_slots=slots)
    grid = [2 ** (power / 2) / model.config.n_embd for power in range(16)]             # h . h is n_embd: 1 to 181
    variants, p, mixed = [cache(theta=theta, share=0.5) for theta in grid], [], []
    for pack in packs(texts, width, model.device):
        scores, real = score(pack, *variants), pack.targets != EOT
        p.append(scores[0].log_p_stm[real].cpu().double().exp())
        mixed.append(torch.stack([one.log_p[real] for one in scores]).cpu().double().exp())
    p, fits = torch.cat(p), []
    for theta, half in zip(grid, torch.cat(mixed, 1)):
        of_cache, low, high = 2 * half - p, 0.0, 1.0                   # where the cache is empty, that is p
        for _ in range(30):                                            # the likelihood is concave in the share
            share = (low + high) / 2
            rises = ((of_cache - p) / (p + share * (of_cache - p))).mean() > 0
            low, high = (share, high) if rises else (low, share)
        fits.append(((p + low * (of_cache - p)).log().mean().item(), theta, low))
    _, theta, share = max(fits)
    return cache(theta=theta, share=share)


@torch.no_grad()
def fit_grams(model, texts, width):
    """The memory with no learned part, on the backbone of `model`: exact addresses alone, a weight each.

    The log weights are fitted to texts, one after the other and twice, on a grid.
    """
    config = model.config

    def cache(trust):
        twin = altered(model, ltm_enabled=True, ltm_exact_trust=0.0)
        twin.memory = copy.deepcopy(twin.memory)
        for weight in twin.memory.parameters():
            weight.zero_()
        _, trusts, _, is_open = twin.memory.from_state.bias[:sum(twin.memory.sizes)].split(twin.memory.sizes)
        trusts[:config.ltm_ngrams] = torch.tensor(trust)
        is_open.fill_(-1.0)
        return twin

    # of each target p_stm and, through one address at a time, how many items matched with its value and how many at all
    alone, seen = [cache(trust) for trust in torch.eye(config.ltm_ngrams).log().tolist()], []
    for pack in packs(texts, width, model.device):
        h, columns, real = states(model, pack), [], pack.targets != EOT
        log_p, log_z = fast("log_p", model, h, pack.targets)
        for twin in alone:
            read, values, *_ = twin.read(h, pack.tokens, pack.targets, log_p, log_z, pack.opens)
            right = values[:, None] == pack.targets[..., None]
            columns += [torch.where(right, read.exact, 0.0).sum(-1), read.exact.sum(-1)]
        seen.append(torch.stack([log_p.exp(), *columns], -1)[real].cpu().double())
    seen = torch.cat(seen)
    p, right, every = seen[:, 0], seen[:, 1::2], seen[:, 2::2]

    def likelihood(trust):
        weight = torch.tensor(trust).double().exp()
        return ((p + right @ weight) / (1 + every @ weight)).log().sum().item()

    best = [-2.0] * config.ltm_ngrams
    for n in [*range(config.ltm_ngrams)] * 2:
        best = max(([*best[:n], float(weight), *best[n + 1:]] for weight in range(-7, 3)), key=likelihood)
    return cache(best), best


def memory_controls(model, rate):
    """[(group, name, model)]: the memory as trained, and with one thing changed in each."""
    def ladder(group, setting, values):
        trained = getattr(model.config, setting)
        return [(group, ("none" if value < -1 else f"{value:g}") + " (as trained)" * (value == trained),
                 model if value == trained else altered(model, **{setting: value}))
                for value in sorted({*values, trained})]
    def reads(change):
        return altered(model, OtherReads, change=change)
    nothing = torch.zeros_like
    return [("reads", "as trained", model),
            ("reads", "reads off", reads(lambda read, odds: (Reading(*map(nothing, read)), odds))),
            ("reads", "values shuffled", altered(model, ShuffledValues)),
            ("what is stored", "random tokens, same rate", altered(model, RandomTokens, rate=rate)),
            ("what is stored", "every token", altered(model, ltm_surprisal_bits=-1)),
            *ladder("cosine threshold", "ltm_cosine", (-2, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
            *ladder("surprisal threshold, bits", "ltm_surprisal_bits", (0, 2, 3, 4.5, 6, 8)),
            *ladder("slots", "ltm_slots", (16, 64, 128, 256, 512, 1024)),
            ("look-ups", "made at every position", reads(lambda read, odds: (read, torch.ones_like(odds)))),
            ("look-ups", "exact addresses only", reads(lambda read, odds: (read, nothing(odds)))),
            ("look-ups", "learned addresses only", reads(lambda read, odds: (
                read._replace(exact=nothing(read.exact)), odds))),
            ("look-ups", "exact matches trusted as in training", altered(model, ltm_exact_trust=0.0)),
            ("look-ups", "learned matches weighed as in training", altered(model, ltm_crowding=0.0))]


def evaluate_controls(hybrid, baseline, bits, rate, texts, training, asked, device):
    """Rows of results.json, {"group", "name", "bpc_ratio", "recall", ..} each: what the gain depends on.

    Args:
        hybrid, baseline: the arms of one seed. bits: of all texts, by the second. rate: of storing, by the first.
        training: documents to fit on. asked: as in `measure`; of each long-range cell the first CONTROL_TRIALS.
    """
    window, longest = hybrid.config.stm_window, max(map(len, texts))
    block = [question for (_, distance, extra), block in asked.items() if distance in LONG_RANGE and not extra
             for question in block[:CONTROL_TRIALS]]
    size = lambda width: max(1, PACK * window // width)                # as many tokens in a pack, whatever the width

    @torch.no_grad()
    def compression(variants, width):
        totals = np.zeros((len(variants), 4))                          # targets, bits, hits, stored
        for pack in packs(texts, width, device, size(width)):
            real = pack.targets != EOT
            for total, one in zip(totals, score(pack, *variants)):
                nats = -one.log_p[real].cpu().double().sum().item()
                total += int(real.sum()), nats / math.log(2), int(one.hit[real].sum()), int(one.stored[real].sum())
        return [{"bpc_ratio": total[1] / bits, "hit_rate": total[2] / total[0], "stored": total[3] / total[0]}
                for total in totals]

    def recall(variants, width, wiped=False):
        said = answer(variants, block, width, device, wiped, size(width))
        return [{"recall": float(right.mean()), "recall_ci95": wilson(int(right.sum()), len(block)),
                 "top1": float(first.mean()), "trials": len(block)} for right, first, *_ in said]

    rows = []

    def add(table, width=window, question=window):
        """Rows for [(group, name, model, further fields)]; each model once, and all with the first one's backbone."""
        models = list({id(model): model for _, _, model, *_ in table}.values())
        fields = zip(compression(models, width), recall(models, question))
        found = {id(model): {**one, **other} for model, (one, other) in zip(models, fields)}
        for group, name, model, *more in table:
            rows.append({"group": group, "name": name, **found[id(model)], **(more[0] if more else {})})

    add(memory_controls(hybrid, rate))
    wiped, = recall([hybrid], window, wiped=True)
    rows.insert(2, {"group": "reads", "name": "memory wiped between fact and question", "bpc_ratio": None, **wiped})
    caches = [fit_cache(baseline, training, slots, window) for slots in (hybrid.config.ltm_slots, longest)]
    add([("other models", f"neural cache on the baseline, {cache.config.ltm_slots:,} tokens", cache,
          {"theta": cache.config.theta, "share": cache.config.share}) for cache in caches])
    grams, trust = fit_grams(baseline, training, window)
    add([("other models", "exact addresses on the baseline", grams, {"log_weights": trust})])
    question = max(len(question.tokens) for question in block)
    gpt = altered(baseline, GPT, stm_window=None, n_positions=max(longest, question))
    add([("other models", f"GPT, full attention (trained at {window})", gpt)], longest, question)
    return rows


def print_controls(rows):
    """Each control's bits per character by the baseline's, its recall (forced choice and top-1), and what it stores."""
    print(f"\n{'':70}{'x bpc':>8}{'recall':>8}{'top-1':>8}{'stored':>8}")
    for group, part in itertools.groupby(rows, lambda row: row["group"]):
        for row, head in zip(part, itertools.chain([group], itertools.repeat(""))):
            numbers = [row.get(field) for field in ("bpc_ratio", "recall", "top1", "stored")]
            print(f"{head:27}{row['name']:43}" + "".join(f"{'-' if x is None else f'{x:.3f}':>8}" for x in numbers))


def print_table(results):
    """The four numbers of each arm, two more, and what the differences say."""
    detail = results["detail"]
    bpc, windows, speed = detail["bpc"], detail["bpc_windows"], detail["tokens_per_sec"]
    far = detail["recall"]["long_range"]
    interval = lambda low, high, form: f" [{low:{form}}, {high:{form}}]"
    gap = lambda part, form: f"{part['difference']['mean']:{form}}" + interval(*part["difference"]["ci95"], form)
    times = lambda part, form: f"x {part['ratio']:{form}}"
    headline = lambda name: [results[arm][name] for arm in ARMS]
    print(f"\n{'':20}" + "".join(f"{arm:>11}" for arm in ARMS) + "   difference, 95% interval")
    for name, form, values, difference, verdict in (
            ("bpc", ".4f", headline("bpc"), gap(bpc, "+.4f"), f"{bpc['verdict']}, {times(bpc, '.4f')}"),
            ("bpc, windows alone", ".4f", [statistics.fmean(windows[arm]["per_seed"]) for arm in ARMS],
             gap(windows, "+.4f"), f"{windows['verdict']}, {times(windows, '.4f')}"),
            ("long_range_recall", ".3f", headline("long_range_recall"), gap(far, "+.3f"),
             f"{far['verdict']}, chance {1 / FACTS:.3f}"),
            ("top-1 recall", ".3f", [far[arm]["top1"] for arm in ARMS], "", ""),
            ("memory_hit_rate", ".3f", headline("memory_hit_rate"), "", ""),
            ("tokens_per_sec", ",.0f", headline("tokens_per_sec"),
             times(speed, ".3f") + interval(*speed["ratio_ci95"], ".3f"), speed["verdict"])):
        values = "".join(f"{value:>11{form}}" for value in values)
        print(f"{name:20}{values}   {difference:27} {verdict}".rstrip())


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
    parser.add_argument("--controls", action="store_true", help="also measure what the gain depends on (first seed)")
    args = parser.parse_args(argv)
    if args.quick:
        globals().update(QUICK)
    began, root, device = time.time(), Path(default_root(args.root, args.quick)), pick_device()
    tokenizer = load_tokenizer(root, args.quick)
    rows, meta = load_split(root, "val", args.quick)
    texts = [text for text in documents(rows) if len(text) > 1]
    per_token = characters_per_token(tokenizer)
    characters = np.array([per_token[text].sum() for text in texts], float)
    models, entries, settings = gather_models(root, meta, device, args.quick)
    seeds = [entry["seed"] for entry in entries["with_ltm"]]
    hybrid = models["with_ltm", seeds[0]]
    distracted = {extra: {form: distracted_distance(tokenizer, form, extra) for form in FORMATS}
                  for extra in DISTRACTORS}
    cells = [(form, distance, 0) for form in FORMATS for distance in DISTANCES]
    cells += [(form, distance, extra) for extra, row in distracted.items() for form, distance in row.items()]
    asked = {(form, distance, extra): questions(texts, tokenizer, form, distance, TRIALS, extra)
             for form, distance, extra in dict.fromkeys(cells)}
    tokens = sum(map(len, texts)) - len(texts)
    print(f"{len(texts):,} documents, {tokens:,} tokens; seeds {seeds}; on {device}", flush=True)
    measured = measure(models, texts, rows, asked, per_token, device)

    bits = {key: np.array([b.sum() for b in tally.bits]) for key, tally in measured.tallies.items()}
    stack = lambda per_model: {arm: np.stack([per_model[arm, seed] for seed in seeds]) for arm in ARMS}
    bpc = paired_bootstrap(stack(bits), characters)
    windows = paired_bootstrap(stack(measured.windows), measured.window_characters)
    if not np.isfinite([bpc["ratio"], windows["ratio"]]).all():
        raise StageError(f"a metric is NaN or infinite: the weights are not sane; train again: "
                         f"{command('./run_all.sh --fresh', root, args.quick)}")
    mean = lambda field: [float(np.concatenate(getattr(measured.tallies["with_ltm", seed], field)).mean())
                          for seed in seeds]
    hits, stored, speed = mean("hit"), mean("stored"), summarise_speed(measured.speed)
    recall = summarise_recall(measured.recall, seeds, hybrid.config, distracted)
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
        "bpc": bpc, "bpc_windows": windows, "recall": recall, "tokens_per_sec": speed,
        "memory_hit_rate": {"baseline": 0.0, "with_ltm": statistics.fmean(hits), "per_seed": hits,
                            "routed_token_ratio": statistics.fmean(stored)},
        "position": position, "targets_bits_per_token": targets,
        "memory": observe(hybrid, texts, measured.tallies["with_ltm", seeds[0]], tokenizer)}
    if args.controls:
        training = [text for text in documents(load_split(root, "train", args.quick)[0]) if len(text) > 1][:FITTED]
        rows = results["detail"]["controls"] = evaluate_controls(
            hybrid, models["baseline", seeds[0]], bits["baseline", seeds[0]].sum(), stored[0], texts, training, asked,
            device)
        print_controls(rows)
    write_json(root / "results.json", results)
    print_table(results)
    print(f"wrote {root / 'results.json'} in {time.time() - began:.0f} s; next: "
          + command("plot_eval.py", root, args.quick))


if __name__ == "__main__":
    run_stage(main)
