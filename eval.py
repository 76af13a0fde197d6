"""Answer the question: bits per character and long-range recall of every arm, on the same text and
questions.

reads   data/val.bin, data/meta.json; with --on NAME data/NAME.bin, data/NAME.json
        trained/baseline/, trained/with_ltm/, .. (and trained/seedN/ where there are more)
writes  trained/<arm>/evaluation.safetensors   what was measured of an arm, and of which weights, code and data
        results.json                           the tables, assembled from these files alone
        trained/explored.json                  with --explore: what each arm makes of a text of yours

    python eval.py --report         what the README reports: three quarters of the validation documents
    python eval.py                  the fourth quarter: on it anything may be chosen, nothing is reported
    python eval.py --on NAME        documents of your own (prepare_data.py --into NAME): results_on_NAME.json
    python eval.py --controls       also what the gain depends on (first seed)
    python eval.py --study          the trainings of ./run_all.sh --study: results_study.json
    python eval.py --quick          the small models under quick/
    python eval.py --explore FILE   a text of your own, with the arms that are trained; - is
                                    standard input. plot_eval.py shows it first in results.html

Every fourth document of val.bin is the choosing part. Settings are searched on it alone (once not:
LongTermMemory); its words and formats of facts are never those of the reported part. Each part has
files of its own (evaluation_choosing.safetensors; evaluation_on_NAME.safetensors), so that neither replaces the
other; results.json says which part it is of, and the hash of all settings.

An arm is measured once: again only where its weights, the code, the data or the settings below
have changed since. So arms may be trained and measured on different days and machines: bring an
arm's manifest.json and evaluation.safetensors here, and its weights may stay where they are.

bpc                 bits of all validation tokens / their characters; whole documents, memory empty
                    at each start
long_range_recall   8 facts planted in real text, one asked for 160 to 384 tokens later, beyond the
                    128-token window: how often the right value is the likeliest of the 8 (chance 1/8);
                    verbatim: the question repeats the fact's words (detail.indirect: where it does not)
memory_hit_rate     share of predictions that the memory had a hand in: its `hit_means` says how
tokens_per_sec      scoring those documents, runs of all seeds; the same model with its memory off is timed in turn
"""

import codecs
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

from models import (EOT, GPT, Address, Final, LongTermMemory, Memory, Reading, Scores, Vectors, graph_settings,
                    lagged, mix, of_asked, of_rows, recorded)
from stages import (ARMS, PROJECT, REGIME, SPECIFIED, STUDY, StageError, about, arm_flag, arm_folder, byte_level,
                    characters_per_token, command, commit, compiled, default_root, device_name, documents,
                    encoded, has_compiler, init_command, init_name, is_hosted, load_model, load_own, load_split,
                    load_tokenizer, lower_precision, own_name, parser_of, pick_device, read_json, read_manifest,
                    read_meta, regime_flags, run_stage, seal, sha256, spaced_words, write_atomic, write_json)

FORMATS = {                     # how a fact is written; the question stops before the value
    "pair": (" {key}", " {value}", "."),
    "colon": (" {key}:", " {value}", "."),
    "sentence": (" The code of {key} is", " {value}", "."),
    # of the reported part: nothing was chosen on these
    "bare": (" {key}", " {value}", ";"),
    "dash": (" {key} -", " {value}", ";"),
    "log": (" In my log {key} is", " {value}", ";"),
}
WHOLE, CHOOSING, REPORTED = "all", "choosing", "reported"
CHAINS = {                      # how the end of a chain of facts is asked for
    CHOOSING: (" From", " one comes to"),
    REPORTED: (" Starting at", " we end up at"),
}
FOURTH = 4                      # every fourth document is of the choosing part


@dataclass(frozen=True)
class Settings:
    """What is asked of every arm, and how often; edit it here."""

    pack: int = 128             # rows of 128 tokens scored at once; takes up to 2.5 GB of a GPU
    lane: int = 16              # rows of a lane of them: the longest document
    facts: int = 8              # planted in a sequence; their values are the choices
    trials: int = 336           # questions per distance and format
    forms: tuple = ("pair", "colon", "sentence")
    forms_reported: tuple = ("bare", "dash", "log")     # in their place in the reported part
    part: str = WHOLE           # of the documents and words; main says which
    # tokens from the value of a fact to the place to repeat it, and those beyond the window
    distances: tuple = (32, 64, 96, 160, 192, 256, 320, 384, 512, 1024)
    long_range: tuple = (160, 192, 256, 320, 384)
    lead: int = 64              # tokens of real text before the facts
    # facts more between the one asked for and the question; 300 evict it
    distractors: tuple = (0, 8, 64, 300)
    distracted: int = 256       # the distance there, where they fit into it
    dialogues: int = 64         # of three turns: facts, other text, a question
    turn: int = 100             # tokens of a turn
    needles: tuple = (2_048, 4_096, 8_192, 16_384)      # tokens of a text that begins with the facts
    hops: tuple = (1, 2, 3, 4)  # facts of a chain whose end is asked for, ..
    hop_tokens: int = 512       # .. in a text of so many tokens
    streamed: int = 64          # questions of each of these
    indirect: tuple = (64, 160, 256, 384, 512)          # distances of questions that word the fact otherwise
    indirect_trials: int = 96   # of each, per format planted and format asked in
    together: int = 32          # texts at a time: each token has log p of the whole vocabulary
    repeats: int = 5            # timed passes, memory on and off in turn, over ..
    timed: int = 16             # .. so many packs
    shown: int = 420            # the picture of a memory: tokens of a document, ..
    reads: int = 4              # .. what it read in how many places, ..
    sources: int = 3            # .. and how many items of each
    explored: int = 8           # the page's explorer: documents, ..
    seen: int = 512             # .. tokens of each: more than the LTM has slots for, ..
    own: int = 2_048            # .. or of a text of the user's; ..
    drawn: int = 6              # .. items of each prediction, ..
    moment: int = 64            # .. what a further memory holds once in so many tokens, or ..
    moments: int = 8            # .. in as many more as make so many moments of a text, ..
    slots: int = 32             # .. and, of one that has slots instead of tokens, so many of them
    seed: int = 0               # of questions, bootstrap and controls: the same for every model
    bootstrap: int = 10_000     # resamples of seeds and documents
    control_trials: int = 96    # questions per distance and format for each control
    fitted: int = 200           # documents of train.bin that the caches' parameters are fitted to
    eot: int = EOT              # what opens a document and is never a target: as data/meta.json has it

    def of_an_arm(self):
        """The settings on which it depends what is measured of an arm: {name: value}."""
        later = "bootstrap", "control_trials", "fitted"
        return {name: value for name, value in jsonable(self).items() if name not in later}

    def of_part(self, part):
        """The same settings for a part of the documents: its formats in place of the others."""
        forms = self.forms_reported if part == REPORTED else self.forms
        return dataclasses.replace(self, part=part, forms=forms)


def jsonable(settings):
    """Settings as a JSON file gives them back: {name: value}."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


FULL = Settings()
QUICK = Settings(pack=16, trials=8, distances=(64, 160, 256), long_range=(160, 256), distractors=(0, 64),
                 dialogues=4, needles=(512,), hops=(1, 2), hop_tokens=256, streamed=2, indirect=(160,),
                 indirect_trials=1, repeats=2, timed=1, fitted=6)

REFERENCE = "baseline"          # what every other arm is compared with
SIGNIFICANT = 0.05


# ------------------------------------------------------------ text in packs of rows

class Pack(NamedTuple):
    """Several sequences laid out as lanes of rows; what is left over is rows of EOT (settings.eot)."""

    tokens: torch.Tensor        # (N, C) int64, N = L R
    targets: torch.Tensor       # (N, C) int64, EOT where there is none
    opens: torch.Tensor         # (L, R) bool: a sequence starts here
    places: list                # (number of the sequence, first flat position, length)
    usual: bool                 # of the shape that most packs have


def rows_of(sequence, width):
    """Rows that a sequence takes."""
    return -(-len(sequence) // width)


def lanes_of(sequences, width, rows):
    """Share sequences out among lanes of `rows` rows: for each lane the numbers of its sequences.

    Longest first, each into the fullest lane that has room for it. One that is longer than
    a lane has its own.
    """
    lanes = []
    with_room = [[] for _ in range(rows + 1)]               # the lanes that have so many rows left
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        need = rows_of(sequences[i], width)
        room = next((left for left in range(need, rows + 1) if with_room[left]), None)
        if room is None:
            lane, room = [], max(rows, need)
            lanes.append(lane)
        else:
            lane = with_room[room].pop()
        lane.append(i)
        with_room[room - need].append(lane)
    return lanes


def lay_out(sequences, lanes, rows, width, eot=EOT):
    """(tokens, targets, opens, places) of a Pack of these lanes of `rows` rows; an empty
    lane holds nothing."""
    tokens = np.full(len(lanes) * rows * width, eot, np.int64)
    targets = tokens.copy()
    opens = np.ones((len(lanes), rows), bool)
    places = []
    for number, lane in enumerate(lanes):
        row = 0
        for i in lane:
            text = sequences[i]
            first = (number * rows + row) * width
            tokens[first:first + len(text)] = text
            targets[first:first + len(text) - 1] = text[1:]
            end = row + rows_of(text, width)
            opens[number, row + 1:end] = False
            places.append((i, first, len(text)))
            row = end
    return tokens.reshape(-1, width), targets.reshape(-1, width), opens, places


def sent(array, device):
    """An array as a tensor of a device, which is not waited for."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def packs(sequences, width, device, settings, shape=None):
    """Lay sequences out in Packs of lanes that no sequence crosses.

    `shape`: (lanes, rows of a lane), by default settings.pack rows in lanes of
    settings.lane. Sequences longer than a lane have lanes of their own length, beside others
    of that length where there is room for them.
    """
    usual = settings.pack // settings.lane, settings.lane
    count, rows = shape or usual
    waiting = {}                                            # {rows of a lane: lanes}

    def emit(size):
        lanes = waiting.pop(size)
        if size == rows:
            lanes += [[] for _ in range(count - len(lanes))]
        *arrays, places = lay_out(sequences, lanes, size, width, settings.eot)
        return Pack(*(sent(x, device) for x in arrays), places, (len(lanes), size) == usual)

    for lane in lanes_of(sequences, width, rows):
        size = max(rows, sum(rows_of(sequences[i], width) for i in lane))
        beside = waiting.setdefault(size, [])
        beside.append(lane)
        if len(beside) == max(1, count * rows // size):
            yield emit(size)
    for size in list(waiting):
        yield emit(size)


# ------------------------------------------------------------ scores

@functools.cache
def compiled_method(name):
    """A method of the models as one graph: their weights are its inputs, so it is compiled
    once for all of a kind."""
    from torch._dynamo import config

    # one graph for each kind of memory; beyond its usual limit dynamo goes on without one, and
    # without a word
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, 64)

    def call(model, *given):
        return getattr(model, name)(*given)

    return compiled(call, dynamic=False)


def made_fast(model):
    """A model that learns no more, in the precision that its device is made for and, where
    that is a GPU, with its kernels and a table of what its weights alone say."""
    model = lower_precision(model)
    if has_compiler(model.device) and not is_hosted(model):
        model.fuse().active.tabulate(model.embed_detached)
    return model


def is_compiled(model, pack):
    """Whether what a model makes of a pack is compiled: on a GPU, where the pack has the usual
    shape and the memory is one of the arms'."""
    memory = getattr(model, "memory", None)
    return (pack.usual and not is_hosted(model) and type(memory) in Memory.kinds.values()
            and has_compiler(model.device))


def fast(name, model, pack, *given):
    """model.name(*given), compiled where it can be."""
    if is_compiled(model, pack):
        return compiled_method(name)(model, *given)
    return getattr(model, name)(*given)


def memory_off(model):
    """The same model, of the same weights, with its memory off."""
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.memory_enabled = False
    return twin


def states(model, pack):
    """Final states (N, C, D) of a pack, and what the memory noted."""
    if model.config.stm_window is None:  # GPT: each row is a whole sequence
        return model.states(pack.tokens)
    if not model.active.places and model.config.memory_enabled:
        model = memory_off(model)  # at the output only: the states are the baseline's, and so is the graph
    return fast("states", model, pack, pack.tokens, pack.opens)


def score(pack, *variants):
    """Scores of a pack's targets by each of some models that differ in nothing but their
    memory at the output; on a GPU a Replay of what is asked of one alone."""
    model = variants[0]
    if len(variants) == 1 and pack.tokens.is_cuda and is_compiled(model, pack) and not torch.is_grad_enabled():
        return [replay_of(model, pack.tokens.shape, pack.opens.shape)(pack)]
    return scores_by_parts(pack, *variants)


def scores_by_parts(pack, *variants):
    """`score`, the parts of model.score one by one: the arms have the first two in common, so
    that these are compiled once. What only one of several variants does is not compiled: that
    would take longer than it saves.
    """
    model = variants[0]
    h, notes = states(model, pack)
    log_p, log_z = fast("log_p", model, pack, h, pack.targets)
    given = h, notes, pack.tokens, pack.targets, log_p, log_z, pack.opens
    if len(variants) == 1 and isinstance(model.active, LongTermMemory):
        return [fast("score_states", model, pack, *given)]
    return [variant.score_states(*given) for variant in variants]


@functools.lru_cache(maxsize=2)                             # a model, and itself with its memory off
def replay_of(model, *shapes):
    """The Replay of a model for packs of these shapes. It holds what a pass takes: who is done with
    the packs clears this cache."""
    return Replay(model)


class Replay:
    """A model's scores of packs of one shape, recorded with the first as one CUDA graph: to start
    its kernels one by one takes a host about as long as they take a large GPU."""

    def __init__(self, model):
        self.model, self.settings = model, None

    def __call__(self, pack):
        if self.settings != graph_settings(self.model):     # a graph has those it was made with
            self.record(pack)
        for kept, x in zip(self.pack, pack[:3]):
            kept.copy_(x)
        self.graph.replay()
        *fields, watched = self.scores
        return Scores(*(x.clone() for x in fields), {name: x.clone() for name, x in watched.items()})

    def record(self, pack):
        """Record what is done with a pack, which is done once before: it compiles."""
        self.pack = pack._replace(**{name: getattr(pack, name).clone() for name in pack._fields[:3]})
        self.graph = self.scores = None                     # those before give their room back
        run = functools.partial(scores_by_parts, self.pack, self.model)
        self.graph, (self.scores,) = recorded(run, run, pack.tokens.device)
        self.settings = copy.deepcopy(graph_settings(self.model))


class Tally(NamedTuple):
    """Per sequence, arrays over its targets (length - 1)."""

    log_p: list                 # float32, of the model
    log_p_stm: list             # float32, of its backbone alone
    hit: list                   # bool
    stored: list                # bool


def bits(log_p):
    """Bits, float64, of natural logarithms of probabilities."""
    return np.asarray(log_p, np.float64) / -math.log(2)


@torch.no_grad()
def score_text(model, sequences, width, settings, note=None):
    """Tally of every token of the sequences given what came before it."""
    kept = Tally(*([None] * len(sequences) for _ in Tally._fields))
    for pack in packs(sequences, width, model.device, settings):
        scores, = score(pack, model)
        found = [getattr(scores, name).flatten().cpu().numpy() for name in Tally._fields]
        for i, first, length in pack.places:
            for field, values in zip(kept, found):
                field[i] = values[first:first + length - 1].copy()
        if note:
            note(len(pack.places))
    replay_of.cache_clear()
    return kept


def counted_targets(rows, eot=EOT):
    """Which targets of rows (N, C) count where each is taken alone, so that each token
    counts once: (N, C - 1)."""
    width = rows.shape[1]
    fresh = (rows[:, :1] == eot) | (np.arange(1, width) >= width // 2)
    return fresh & (rows[:, 1:] != eot)


def score_windows(model, rows, settings, width=None):
    """log p of each target of the rows taken alone, (N, C - 1) float32. width: of the model's own
    rows, where they are wider."""
    tally = score_text(model, list(rows.astype(np.int64)), width or rows.shape[1], settings)
    return np.stack(tally.log_p)


def rows_for(model, exam):
    """(width, settings) of the packs that a model scores: rows of its own window, which one of the
    study has wider, and about as many tokens."""
    width, usual, settings = model.config.stm_window, exam.rows.shape[1], exam.settings
    if width <= usual:
        return usual, settings
    lane = max(1, settings.lane * usual // width)
    lanes = max(1, settings.pack * usual // width // lane)
    return width, dataclasses.replace(settings, pack=lanes * lane, lane=lane)


# ------------------------------------------------------------ questions

@functools.cache
def single_words(tokenizer):
    """Tokens that are one lower-case English-looking word of four letters or more with its
    space before it."""
    words = [(word, index) for word, index in spaced_words(tokenizer) if len(word) > 3 and word.islower()]
    return np.array([index for _, index in sorted(words)])


class Question(NamedTuple):
    """A text with facts planted in it that ends with the question for one of them."""

    tokens: np.ndarray          # the whole sequence; its last token is the last of the question
    choices: np.ndarray         # (facts,) values planted in it, the right one first
    place: int                  # where the right value stands
    begin: int                  # where the question begins


class Form(NamedTuple):
    """The tokens of a fact but for its key and value."""

    opening: list               # before the key
    middle: list                # between the two
    closing: list               # after the value

    @property
    def asked(self):
        """Tokens of a question."""
        return len(self.opening) + 1 + len(self.middle)

    @property
    def size(self):
        """Tokens of a fact."""
        return self.asked + 1 + len(self.closing)

    def fact(self, key, value):
        """The tokens of a fact."""
        return [*self.opening, key, *self.middle, value, *self.closing]


@functools.cache
def form_of(tokenizer, name):
    """The Form of that name."""
    before, _, stop = FORMATS[name]
    key_at = before.index("{key}")
    parts = before[:key_at].rstrip(), before[key_at + len("{key}"):], stop
    return Form(*(encoded(tokenizer, part) if part else [] for part in parts))


def keys_and_values(tokenizer, settings):
    """The words that facts are made of, two disjoint halves of single_words; of each the two
    parts have every other word."""
    words = np.random.default_rng(settings.seed).permutation(single_words(tokenizer))
    own = {WHOLE: slice(None), CHOOSING: slice(0, None, 2), REPORTED: slice(1, None, 2)}[settings.part]
    return words[:len(words) // 2][own], words[len(words) // 2:][own]


def places_in(length, count, draw):
    """`count` random places in a text of that length, ascending; its two ends are places too."""
    return sorted(draw.integers(0, length + 1, count).tolist())


def plant(text, facts, places):
    """The tokens of a text with each of some facts before the token at its place: ascending, and
    where several stand at one place, the first comes first."""
    of_tokens = [place for fact, place in zip(facts, places) for _ in fact]
    return np.insert(text, of_tokens, [token for fact in facts for token in fact])


def distracted_distance(tokenizer, name, extra, settings):
    """The distance at which `extra` distractors are asked over: settings.distracted, or the
    least with room for them."""
    return max(settings.distracted, (settings.facts + extra) * form_of(tokenizer, name).size)


def text_needed(tokenizer, name, distance, extra, settings):
    """Tokens of real text, at most, in a question: a document has to be longer."""
    size = form_of(tokenizer, name).size
    return settings.lead + max(distance - extra * size, size)


def before_and_after(facts, room, draw, most):
    """Share the facts but the first out, before it and after it: (early, late, room left
    between it and the question).

    Half of the `most` first ones stand after it, as far as they fit; the distractors, which
    come after those, all do, as far as they fit, or are left out.
    """
    early, late, size = [], [], len(facts[0])               # all are of one size
    for other, wanted in zip(facts[1:most], draw.random(most - 1) < 0.5):
        if wanted and room >= size:
            late.append(other)
            room -= size
        else:
            early.append(other)
    distractors = facts[most:][:max(0, room) // size]
    return early, late + distractors, room - size * len(distractors)


def questions(texts, tokenizer, name, distance, count, settings, extra=0):
    """`count` Questions: facts planted in real text, the value of one asked for `distance`
    tokens after it stood.

    Example (pair): "EOT ..text.. lamp seven. ..text.. door north. ..text.. lamp" ->
    " seven"; 8 such facts, half of the others after the one asked for, as far as they fit.
    Keys and values are single tokens from disjoint sets. `extra` facts more, distractors
    that are never asked for, stand between the one asked for and the question, as many as
    fit. Texts that are too short are passed over; there has to be one that is not.
    """
    draw = np.random.default_rng((settings.seed, list(FORMATS).index(name), distance, extra))
    form = form_of(tokenizer, name)
    keys, values = keys_and_values(tokenizer, settings)
    needed = text_needed(tokenizer, name, distance, extra, settings)
    long_enough = [text for text in texts if len(text) > needed]
    made = []
    for _ in range(count):
        own_keys = draw.choice(keys, settings.facts + extra, replace=False)
        own_values = draw.choice(values, settings.facts + extra, replace=False)
        facts = [form.fact(*pair) for pair in zip(own_keys.tolist(), own_values.tolist())]
        room = distance - 1 - len(form.closing) - form.asked    # between the fact and the question
        early, late, room = before_and_after(facts, room, draw, settings.facts)
        question = facts[0][:form.asked]
        tokens, begins = laid(long_enough, facts[0], early, late, question, room, settings, draw)
        place = begins + form.asked
        assert len(tokens) - place == distance
        made.append(Question(tokens, own_values[:settings.facts], place, len(tokens) - form.asked))
    return made


def laid(texts, fact, early, late, question, room, settings, draw):
    """A question's tokens and where its fact begins: a piece of one of the texts, settings.lead
    tokens before the fact and `room` after it, with other facts scattered over both."""
    lead = settings.lead
    text = texts[draw.integers(len(texts))][1:]
    offset = draw.integers(0, len(text) - lead - room + 1)
    real = text[offset:offset + lead + room]
    before = places_in(lead, len(early), draw)
    after = [lead + place for place in places_in(room, len(late), draw)]
    tokens = plant(real, [[settings.eot], *early, fact, *late, question], [0, *before, lead, *after, len(real)])
    return tokens, 1 + lead + sum(map(len, early))


class Dialogues(NamedTuple):
    """Texts in turns: facts in the first, other text, a question at the end of the last."""

    turns: np.ndarray           # (count, turns, tokens of a turn)
    choices: np.ndarray         # (count, facts) values planted, the right one first


def make_dialogues(texts, tokenizer, settings):
    """Dialogues of three turns of the same document, facts planted in the first and asked
    for in the third; None where no document is long enough."""
    draw = np.random.default_rng((settings.seed, 3))
    keys, values = keys_and_values(tokenizer, settings)
    turn, facts = settings.turn, settings.facts
    long_enough = [text for text in texts if len(text) > 3 * turn]
    if not long_enough:
        return None
    turns, choices = [], []
    for number in range(settings.dialogues):
        form = form_of(tokenizer, settings.forms[number % len(settings.forms)])
        own_values = draw.choice(values, facts, replace=False)
        own_keys = draw.choice(keys, facts, replace=False)
        planted = [form.fact(key, value) for key, value in zip(own_keys, own_values)]
        free = turn - 1 - facts * form.size
        assert free >= 0, "a turn has no room for its facts: see turn and facts in Settings"
        text = long_enough[draw.integers(len(long_enough))][1:]
        offset = draw.integers(0, len(text) - 3 * turn + 1)
        real = text[offset:offset + free + 2 * turn - form.asked]
        first, second, third = np.split(real, (free, free + turn))
        shuffled = [planted[i] for i in draw.permutation(facts)]
        question = planted[0][:form.asked]
        first = plant(first, shuffled, places_in(free, facts, draw))
        turns.append([[settings.eot, *first], second, [*third, *question]])
        choices.append(own_values)
    return Dialogues(np.array(turns, np.int64), np.array(choices))


@functools.cache
def chain_words(tokenizer, part):
    """The tokens before and after the key where the end of a chain is asked for."""
    return [encoded(tokenizer, words) for words in CHAINS.get(part, CHAINS[CHOOSING])]


def chain_question(key, tokenizer, settings):
    """The tokens that ask for the end of the chain that begins with a key."""
    before, after = chain_words(tokenizer, settings.part)
    return [*before, key, *after]


def make_streamed(line, tokenizer, length, hops, width, settings):
    """Dialogues of one long text each, a piece of `line` with facts in it, read `width` tokens at a
    time; None where the line is not so long.

    A needle (hops 0) is a fact asked for in its own words. Otherwise the facts are chains (a: b.
    .. b: c.) of so many, as in hash-hop (Magic 2024), and the end of one is asked for ("From a one
    comes to" c).
    """
    draw = np.random.default_rng((settings.seed, 4, length, hops))
    keys, values = keys_and_values(tokenizer, settings)
    if len(line) < length:
        return None
    turns, choices = [], []
    for number in range(settings.streamed):
        form = form_of(tokenizer, settings.forms[number % len(settings.forms)])
        ends = draw.choice(values, settings.facts, replace=False)
        links = draw.choice(keys, (settings.facts, max(1, hops)), replace=False)
        chains = np.column_stack((links, ends)).tolist()
        facts = [form.fact(*pair) for chain in chains for pair in itertools.pairwise(chain)]
        question = facts[0][:form.asked]
        if hops:
            question = chain_question(chains[0][0], tokenizer, settings)
        shuffled = [facts[i] for i in draw.permutation(len(facts))]
        room = length - 1 - len(facts) * form.size - len(question)
        offset = draw.integers(0, len(line) - room + 1)
        real = line[offset:offset + room]
        places = places_in(settings.lead, len(shuffled), draw)
        text = plant(real, [[settings.eot], *shuffled, question], [0, *places, len(real)])
        turns.append(text.reshape(-1, width))
        choices.append(ends)
    return Dialogues(np.array(turns, np.int64), np.array(choices))


def all_streamed(texts, tokenizer, width, settings):
    """{("needle", tokens) or ("hops", facts of a chain): Dialogues} that there is text for."""
    cells = {("needle", length): (length, 0) for length in settings.needles}
    cells |= {("hops", hops): (settings.hop_tokens, hops) for hops in settings.hops}
    line = np.concatenate([text[1:] for text in texts])
    made = {cell: make_streamed(line, tokenizer, *how, width, settings) for cell, how in cells.items()}
    missing = [number for (_, number), streamed in made.items() if streamed is None]
    if missing:
        tqdm.write(f"note: questions over {', '.join(map(str, missing))} tokens or hops are left out: too little text")
    return {cell: streamed for cell, streamed in made.items() if streamed}


# ------------------------------------------------------------ questions that word the fact otherwise

INDIRECT = {                    # what the question does not repeat
    "format": "planted in one format, asked in another (in the same: verbatim)",
    "filler": "a word stands between key and value where the fact was planted, and not in the question",
    "long key": "keys of two words; each word is in other keys too",
    "changed": "the key had another value before: the latest counts",
    "two hops": "a fact names a second key, whose fact has the value",
}


class Planned(NamedTuple):
    """What is planted for one indirect question."""

    facts: list                 # tokens of each, first the one that holds the value asked for
    earlier: list               # facts that stand before that one
    value_at: int               # where the value stands in it
    question: list              # tokens
    choices: np.ndarray         # (facts,) values, the right one first


def keys_of_two(count, keys, draw):
    """`count` pairs of words, few enough words that most stand in several pairs: [(word, word)]."""
    side = math.isqrt(count - 1) + 1
    words = draw.choice(keys, 2 * side, replace=False)
    chosen = draw.permutation(side * side)[:count]
    return [(words[place // side], words[side + place % side]) for place in chosen]


def plan_indirect(kind, forms, words, tokenizer, settings, draw):
    """The Planned of a question of a kind of INDIRECT.

    Args: forms: (planted, asked) Forms. words: (keys, values) to draw from.
    """
    (form, asked), (keys, values), count = forms, words, settings.facts
    ends = draw.choice(values, count, replace=False)
    own = draw.choice(keys, (2, count), replace=False).tolist()
    facts, earlier = [form.fact(*pair) for pair in zip(own[0], ends)], []
    question, value_at = asked.fact(own[0][0], ends[0])[:asked.asked], form.asked
    if kind == "filler":
        facts = [[*fact[:value_at], other, *fact[value_at:]] for fact, other in zip(facts, own[1])]
        value_at += 1
    elif kind == "long key":
        at = len(form.opening) + 1
        pairs = keys_of_two(count, keys, draw)
        facts = [form.fact(second, end) for (_, second), end in zip(pairs, ends)]
        facts = [[*fact[:at - 1], first, *fact[at - 1:]] for (first, _), fact in zip(pairs, facts)]
        value_at += 1
        question = facts[0][:value_at]
    elif kind == "changed":                                 # the last value is the one that was
        facts, earlier = facts[:-1], [form.fact(own[0][0], ends[-1])]
    elif kind == "two hops":
        facts = [form.fact(*pair) for pair in zip(own[1], ends)]
        earlier = [form.fact(*pair) for pair in zip(*own)]
        question = chain_question(own[0][0], tokenizer, settings)
    return Planned(facts, earlier, value_at, question, ends)


def indirect_questions(texts, tokenizer, cell, settings):
    """settings.indirect_trials Questions of a cell (kind, format planted in, format asked in,
    distance): laid out as `questions` are."""
    kind, planted, asked, distance = cell
    places = list(INDIRECT).index(kind), list(FORMATS).index(planted), list(FORMATS).index(asked)
    draw = np.random.default_rng((settings.seed, 5, *places, distance))
    forms = form_of(tokenizer, planted), form_of(tokenizer, asked)
    words = keys_and_values(tokenizer, settings)
    long_enough = [text for text in texts if len(text) > settings.lead + distance]
    made = []
    for _ in range(settings.indirect_trials):
        plan = plan_indirect(kind, forms, words, tokenizer, settings, draw)
        fact, question = plan.facts[0], plan.question
        room = distance - (len(fact) - plan.value_at) - len(question)
        early, late, room = before_and_after(plan.facts, room, draw, len(plan.facts))
        early = [*plan.earlier, *early]
        early = [early[i] for i in draw.permutation(len(early))]
        tokens, begins = laid(long_enough, fact, early, late, question, room, settings, draw)
        place = begins + plan.value_at
        assert len(tokens) - place == distance
        made.append(Question(tokens, plan.choices, place, len(tokens) - len(question)))
    return made


def all_indirect(texts, tokenizer, settings):
    """{(kind, format planted in, format asked in, distance): [Question]}: every format in every
    other, all else in the format it was planted in."""
    longest, cells = max(map(len, texts)) - 1, []
    for distance in settings.indirect:
        if settings.lead + distance > longest:
            tqdm.write(f"note: indirect recall over {distance:,} tokens is left out: too little text")
            continue
        for kind in INDIRECT:
            cells += [(kind, planted, asked, distance) for planted in settings.forms
                      for asked in settings.forms if kind == "format" or planted == asked]
    return {cell: indirect_questions(texts, tokenizer, cell, settings) for cell in cells}


# ------------------------------------------------------------ all that is asked

class Exam(NamedTuple):
    """What every model is asked."""

    settings: Settings
    tokenizer: object
    texts: list                 # of documents, int64 arrays
    rows: np.ndarray            # (N, C) the same as windows
    per_token: np.ndarray       # characters of each token
    asked: dict                 # {(form, distance, distractors): [Question]}
    distances: list             # those that there is text for
    distractors: dict           # {distractors: {form: distance}}, likewise
    dialogues: Dialogues        # None: there is no text for them
    streamed: dict              # {(kind, number): Dialogues}: needles and hops
    identity: dict              # hashes of it all
    indirect: dict = {}         # {(kind, planted in, asked in, distance): [Question]}

    @property
    def questions(self):
        """All questions, cell after cell."""
        return [question for cell in self.asked.values() for question in cell]

    @property
    def indirect_questions(self):
        """All questions that word the fact otherwise, cell after cell."""
        return [question for cell in self.indirect.values() for question in cell]

    @property
    def far(self):
        """The long-range distances that there is text for."""
        return [distance for distance in self.settings.long_range if distance in self.distances]

    def split(self, values):
        """What was measured of all questions (.., Q) by cell: {cell: (.., questions of it)}."""
        return by_cell(self.asked, values)


def by_cell(asked, values):
    """Values (.., Q) of the questions of {cell: [Question]}, cut into cells: {cell: (.., questions of it)}."""
    ends = np.cumsum([len(cell) for cell in asked.values()])
    return dict(zip(asked, np.split(values, ends[:-1], axis=-1)))


def room_for(texts, tokenizer, settings):
    """The distances and distractors that the documents are long enough for: (distances,
    {distractors: {form: distance}}); what is left out is said.
    """
    longest, words = max(map(len, texts)) - 1, len(single_words(tokenizer)) // 2

    def enough(cells, what):
        most = max(text_needed(tokenizer, *cell, settings) for cell in cells)
        if most > longest:
            tqdm.write(f"note: recall {what} is left out: the longest validation document is "
                       f"{most - longest:,} tokens too short for it")
        return most <= longest

    kept, kept_distractors = [], {}
    for distance in settings.distances:
        if enough([(form, distance, 0) for form in settings.forms], f"over {distance:,} tokens"):
            kept.append(distance)
    for extra in settings.distractors:
        distances = {form: distracted_distance(tokenizer, form, extra, settings)
                     for form in settings.forms}
        cells = [(form, distance, extra) for form, distance in distances.items()]
        if settings.facts + extra > words:
            tqdm.write(f"note: recall with {extra} distractors is left out: too few words are one token")
        elif enough(cells, f"with {extra} distractors"):
            kept_distractors[extra] = distances
    return kept, kept_distractors


def digest_of_questions(cells):
    """SHA-256 of what is asked and of the choices."""
    digest = hashlib.sha256()
    for question in itertools.chain(*cells):
        digest.update(question.tokens.tobytes())
        digest.update(question.choices.tobytes())
    return digest.hexdigest()


def make_exam(root, rows, meta, tokenizer, settings, quick):
    """The Exam; raises StageError where the documents are too short to ask over any
    long-range distance."""
    texts = [text for text in documents(rows, settings.eot) if len(text) > 1]
    words, most = len(single_words(tokenizer)), 2 * settings.facts * max((1, *settings.hops))
    if words < most:
        again = command("prepare_data.py --tokenizer MODEL", root, quick)
        raise StageError(f"the tokenizer has {words} words of one token, the questions need {most}; take "
                         f"a model with another: {again}")
    distances, distractors = room_for(texts, tokenizer, settings)
    if not set(distances) & set(settings.long_range):
        nearest = min(settings.long_range)
        least = max(text_needed(tokenizer, form, nearest, 0, settings) for form in settings.forms)
        again = command("prepare_data.py", root, quick)
        raise StageError(f"no validation document has the {least:,} tokens that recall over {nearest} tokens "
                         f"takes; prepare more text, or longer ones: {again} --text FILE")
    cells = [(form, distance, 0) for form in settings.forms for distance in distances]
    for extra, row in distractors.items():
        cells += [(form, distance, extra) for form, distance in row.items()]
    asked = {}
    for form, distance, extra in dict.fromkeys(cells):
        asked[form, distance, extra] = questions(texts, tokenizer, form, distance, settings.trials,
                                                 settings, extra)
    dialogues = make_dialogues(texts, tokenizer, settings)
    if dialogues is None:
        tqdm.write(f"note: dialogues are left out: no validation document has {3 * settings.turn:,} tokens")
    streamed = all_streamed(texts, tokenizer, rows.shape[1], settings)
    indirect = all_indirect(texts, tokenizer, settings)
    identity = {"val": meta["splits"]["val"]["sha256"],
                "questions": digest_of_questions([*asked.values(), *indirect.values()])}
    return Exam(settings, tokenizer, texts, rows, characters_per_token(tokenizer), asked, distances,
                distractors, dialogues, streamed, identity, indirect)


# ------------------------------------------------------------ answers

OUTCOMES = ("forced_choice", "top1", "stored", "retrieved")


class Answers(NamedTuple):
    """What a model says to some questions."""

    outcomes: np.ndarray        # (4, questions) bool, rows as OUTCOMES
    value_nats: np.ndarray      # (questions,) float32, -log p of the right value

    @classmethod
    def of(cls, count):
        """Room for the answers to so many questions."""
        return cls(np.zeros((len(OUTCOMES), count), bool), np.zeros(count, np.float32))


def picked(log_p, choices, right):
    """Whether the likeliest of the choices (B, facts) is the right one (B,), given log p (B, V).

    In order of their ids: where two are equally likely (bfloat16 has few digits) the right
    one has no advantage.
    """
    choices = choices.sort(1).values
    likeliest = log_p.gather(1, choices).argmax(1, keepdim=True)
    return choices.gather(1, likeliest)[:, 0] == right


def wipe(pack, asked, eot=EOT):
    """The pack without the targets that come before the questions: what is no target is not
    stored."""
    kept = torch.zeros_like(pack.targets, dtype=torch.bool).flatten()
    for i, first, length in pack.places:
        kept[first + asked[i].begin - 1:first + length - 1] = True
    kept = kept.view_as(pack.targets)
    return pack._replace(targets=torch.where(kept, pack.targets, eot))


def last_word(model, final, row, column, log_p_stm, truth, fact):
    """At the asked positions (row, column), each (B,): log p (B, V), whether the right
    value was stored, and retrieved.

    `log_p_stm` (B, V): of the backbone. `fact`: flat position whose target is the right value.
    """
    memory, never = model.active, torch.zeros_like(truth, dtype=torch.bool)
    if isinstance(memory, LongTermMemory):
        read, values, stored = memory.read(final, (row, column))
        weight = read.weights
        retrieved = ((weight[:, 0] > 0) & (values == truth[:, None])).any(1)
        log_p = mix(log_p_stm[:, None], weight, values)[:, 0]
        return log_p, stored.flatten()[fact], retrieved
    if type(memory).distribution is not Memory.distribution:
        log_p = memory.distribution(model.logits(final.h), final)[row, column]
        return log_p, never, never
    return log_p_stm, never, never


@torch.no_grad()
def answer(variants, asked, width, settings, wiped=False, shape=None, note=None):
    """What models that differ in their memory at the output only say to some questions:
    Answers of each.

    `wiped`: nothing that came before the question is in memory. width, shape: as in `packs`.
    """
    model, device = variants[0], variants[0].device
    said, log_p, log_z = [], None, None
    for pack in packs([question.tokens for question in asked], width, device, settings, shape):
        if wiped:
            pack = wipe(pack, asked, settings.eot)
        numbers, first, length = map(np.array, zip(*pack.places))
        h, _ = states(model, pack)
        row, column = (sent(x, device) for x in divmod(first + length - 1, width))
        log_p_stm = model.logits(h[row, column]).log_softmax(-1)
        if model.config.memory_enabled:
            log_p, log_z = fast("log_p", model, pack, h, pack.targets)
        final = Final(h, pack.tokens, pack.targets, log_p, log_z, model.embed_detached, pack.opens)
        choices = sent(np.stack([asked[i].choices for i in numbers]), device)
        truth = choices[:, 0]
        fact = sent(first + [asked[i].place - 1 for i in numbers], device)
        for variant in variants:
            p, *known = last_word(variant, final, row, column, log_p_stm, truth, fact)
            found = torch.stack((picked(p, choices, truth), p.argmax(1) == truth, *known))
            said.append((numbers, found, -p.gather(1, truth[:, None])[:, 0]))
        if note:
            note(len(numbers))
    answers = [Answers.of(len(asked)) for _ in variants]
    for (numbers, found, nats), of_one in zip(said, itertools.cycle(answers)):  # waits for the device
        of_one.outcomes[:, numbers] = found.cpu().numpy()
        of_one.value_nats[numbers] = nats.cpu().numpy()
    return answers


@torch.no_grad()
def take_turns(model, dialogues, persistent, settings):
    """What the model says at the end of the last turns, streaming: forced choice (count,)
    bool, value_nats (count,).

    One RevenaCache goes through all turns; unless it is `persistent` it is cleared before each.
    """
    right, nats = [], []
    for start in range(0, len(dialogues.turns), settings.together):
        some = slice(start, start + settings.together)
        turns, choices = (sent(x[some], model.device) for x in (dialogues.turns, dialogues.choices))
        cache = model.new_cache(len(turns))
        for turn in turns.unbind(1):
            if not persistent:
                cache.clear()
            log_p = model(turn, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        truth = choices[:, 0]
        right.append(picked(log_p, choices, truth).cpu().numpy())
        nats.append(-log_p.gather(1, truth[:, None])[:, 0].cpu().numpy())
    return np.concatenate(right), np.concatenate(nats)


@torch.no_grad()
def throughput(models, exam):
    """Tokens per second that each of {name: model} scores documents, in turn: {name:
    (repeats,) float64}."""
    width, settings = rows_for(next(iter(models.values())), exam)
    device = next(iter(models.values())).device
    ready = list(itertools.islice(packs(exam.texts, width, device, settings), settings.timed))
    tokens = sum(length - 1 for pack in ready for _, _, length in pack.places)
    runs = {name: [] for name in models}
    for repeat in range(settings.repeats + 1):                         # the first warms up
        for name, model in models.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for pack in ready:
                last = score(pack, model)[0].log_p
            last.sum().item()                                          # waits for the device
            if repeat:
                runs[name].append(tokens / (time.perf_counter() - start))
    replay_of.cache_clear()
    return {name: np.array(values) for name, values in runs.items()}


# ------------------------------------------------------------ what was measured of an arm

class Measured(NamedTuple):
    """The content of an evaluation.safetensors.

    tensors:
        log_p (T,) float32, hit (T,), stored (T,) bool: of all targets of the documents
        windows (W,) float32: log p of the rows' counted targets
        log_p_stm (T,) float32: the same by the backbone alone, nothing read at the output
        outcomes (4, Q) bool, value_nats (Q,): of the questions
        indirect_outcomes, indirect_value_nats: of those that word the fact otherwise
        speed_on, speed_off (repeats,): the second empty where there is no memory to switch off
        turns_forced_choice (2, dialogues) bool, turns_value_nats: persistent and ephemeral
        streamed_forced_choice (cells, questions) bool, streamed_value_nats: needles and hops
    facts: of what, by what and where it was measured; see `expected_of` and `facts_of`.
    """

    facts: dict
    tensors: dict

    def documents(self, name, texts):
        """A tensor over all targets, cut into documents."""
        ends = np.cumsum([len(text) - 1 for text in texts])
        return np.split(self.tensors[name], ends[:-1])


def digest_of(tensors):
    """SHA-256 of named arrays."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def write_measured(path, measured):
    """Write the file of an arm, atomically."""
    facts = measured.facts | {"tensors": digest_of(measured.tensors)}
    text = json.dumps(facts | {"sha256": seal(facts)}, allow_nan=False)
    write_atomic(path, safetensors.numpy.save(measured.tensors, metadata={"evaluation": text}))


def read_measured(path):
    """The Measured of a file; None where there is none or a byte of it has changed."""
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})["evaluation"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        whole = facts["sha256"] == seal(facts) and facts["tensors"] == digest_of(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return Measured(facts, tensors) if whole else None


@functools.cache
def code_hash(name):
    """SHA-256 of a file of this project, as it was when it was first asked for: about what is
    running.
    """
    return sha256(PROJECT / name)


def code_of(memory, hosted=False):
    """Hashes of the files that decide what is measured of an arm with that memory (of ARMS)."""
    names = ["eval.py", "models.py", "stages.py"]
    if hosted or memory not in {ARMS[arm].memory for arm in SPECIFIED}:
        names.append("memories.py")
    return {name: code_hash(name) for name in names}


def expected_of(found, exam):
    """What the facts of a file have to be for it to speak of this arm, this code, these
    data and these settings."""
    return {"arm": found.arm, "seed": found.seed, "weights": found.weights, "config": found.config,
            "training": found.settings,
            "code": code_of(about(found.arm).memory, bool(found.settings.get("to"))),
            "evaluation": exam.settings.of_an_arm(), "data": exam.identity}


STALE = {
    "arm": "it is of another arm",
    "seed": "it is of another seed",
    "weights": "the weights have changed since",
    "config": "config.json has changed since",
    "training": "it is of a training with other settings",
    "data": "the validation data have changed since",
    "evaluation": "the settings at the top of eval.py have changed since",
}


def why_measure(measured, expected, path):
    """Why an arm has to be measured (again), in words; None: what was measured, and read from
    `path`, holds."""
    if measured is None:
        return f"{path.name} is damaged" if path.exists() else "not measured yet"
    for name, wanted in expected.items():
        known = measured.facts.get(name)
        if known == wanted:
            continue
        if name == "code":
            changed = [file for file, digest in wanted.items() if (known or {}).get(file) != digest]
            return f"{' and '.join(changed)} changed since"
        return STALE[name]
    return None


def settings_of(model):
    """The settings of a model's memory: {name: value}."""
    memory, config = model.active, model.config
    if isinstance(memory, LongTermMemory):
        return {name: value for name, value in vars(config).items() if name.startswith("ltm_")}
    return memory.set


def trained_parameters(model, training):
    """How many parameters a training with such settings changed."""
    frozen = training.get("to") and not training.get("train_backbone")
    learnt = [p.numel() for name, p in model.named_parameters()
              if (name.startswith("memory.") and model.config.memory_enabled)
              or (name.startswith("backbone.") and ("lora_" in name or not frozen))]
    return sum(learnt)


def facts_of(model, device, training):
    """What the tables say of an arm beside what is measured."""
    config, memory = model.config, model.active
    backbone = sum(p.numel() for p in model.backbone.parameters())
    of_memory = sum(p.numel() for p in memory.parameters())
    state = memory.empty(1, model.device)
    about = {"parameters": backbone + of_memory, "memory_parameters": of_memory,
             "trained_parameters": trained_parameters(model, training),
             "state_bytes": sum(x.numel() * x.element_size() for x in state.values()),
             "hit_means": memory.hit_means if config.memory_enabled else "",
             "memory_settings": settings_of(model)}
    shape = {"window": config.stm_window, "layers": config.n_layer, "slots": config.ltm_slots,
             "threshold": config.ltm_surprisal_bits}
    run = {"device": device_name(device), "torch": torch.__version__,
           "transformers": transformers.__version__, "python": platform.python_version(),
           "commit": commit()}
    return about | shape | run


def measure(model, exam, note=None):
    """Score the documents, the rows alone and the questions, hold the dialogues, take the
    time: (tensors, facts of the picture)."""
    width, settings = rows_for(model, exam)
    tally = score_text(model, exam.texts, width, settings, note)
    windows = score_windows(model, exam.rows, settings, width)[counted_targets(exam.rows, settings.eot)]
    asked = [*exam.questions, *exam.indirect_questions]
    answers, = answer([model], asked, width, settings, note=note)
    tensors = {name: np.concatenate(getattr(tally, name)) for name in Tally._fields}
    tensors["windows"] = windows
    outcomes, nats = (np.split(x, [len(exam.questions)], -1) for x in answers)
    tensors |= {"outcomes": outcomes[0], "value_nats": nats[0]}
    tensors |= {"indirect_outcomes": outcomes[1], "indirect_value_nats": nats[1]}
    if exam.dialogues:
        kept, cleared = (take_turns(model, exam.dialogues, how, settings) for how in (True, False))
        forced, nats = map(np.stack, zip(kept, cleared))
        tensors |= {"turns_forced_choice": forced, "turns_value_nats": nats}
    if exam.streamed:
        said = [take_turns(model, streamed, True, settings) for streamed in exam.streamed.values()]
        forced, nats = map(np.stack, zip(*said))
        tensors |= {"streamed_forced_choice": forced, "streamed_value_nats": nats}
    models = {"on": model} | ({"off": memory_off(model)} if model.config.memory_enabled else {})
    runs = throughput(models, exam)
    tensors |= {"speed_on": runs["on"], "speed_off": runs.get("off", np.zeros(0))}
    seen = None
    if isinstance(model.active, LongTermMemory):
        seen = observe(model, exam.texts, tally, exam.tokenizer, settings)
    full = in_float32(model)
    shown = [explored_text(full, exam.texts[i][:settings.seen + 1], exam.tokenizer, settings)
             for i in explored_documents(exam.texts, settings)]
    return tensors, {"observation": seen, "exploration": about_explored(model) | {"texts": shown}}


def measured_arm(found, exam, place):
    """The Found and the Measured of a trained arm: read from its file or, where that does
    not hold, measured and written.

    Raises StageError where it has to be measured and the weights are elsewhere, or where a
    number is NaN.
    """
    path = found.folder / place.file
    measured = read_measured(path)
    reason = why_measure(measured, expected_of(found, exam), path)
    if reason is None:
        return found, measured
    if found.source is None:
        again = command(f"eval.py{place.flags}", place.root, place.quick)
        raise StageError(f"{path} can't be compared ({reason}) and there are no weights here to measure "
                         f"again; where they are, run: {again}")
    print(f"measuring {found.folder.relative_to(place.root)}: {reason}", flush=True)
    model, found = load_arm(found.seed, found.arm, place)
    total = len(exam.texts) + len(exam.questions) + len(exam.indirect_questions)
    with tqdm(total=total, unit="sequence", disable=None, leave=False) as bar:
        tensors, seen = measure(model, exam, bar.update)
    numbers = [x for x in tensors.values() if x.dtype.kind == "f"]
    if not all(np.isfinite(x).all() for x in numbers):
        again = train_command(found.seed, found.arm, place, found.settings)
        raise StageError(f"a metric of {found.folder} is NaN or infinite: the weights are not sane; "
                         f"train again: {again} --fresh")
    facts = expected_of(found, exam) | facts_of(model, place.device, found.settings) | seen
    facts |= {"folder": str(found.source.relative_to(place.root)), "step": found.step, "trained_by": found.trained_by}
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    write_measured(path, Measured(facts, tensors))
    return found, read_measured(path)


# ------------------------------------------------------------ which arms there are

class Place(NamedTuple):
    """Where the arms are, and what they are asked about."""

    root: Path
    quick: bool
    device: str
    flags: str = ""             # of eval.py: " --report", " --on NAME"
    name: str = ""              # that the files of what is measured end in: "_choosing"

    @property
    def file(self):
        """The file of what was measured of an arm."""
        return f"evaluation{self.name}.safetensors"


class Found(NamedTuple):
    """A trained arm, verified by its manifest."""

    seed: int
    arm: str
    folder: Path                # its own
    source: Path                # of its weights: its own, or a checkpoint; None: they are elsewhere
    weights: str                # their hash
    config: str                 # the hash of config.json
    step: int
    settings: dict              # of its training
    trained_by: list            # what took its steps: {"commit", "torch", "device"}


def train_command(seed, arm, place, settings=None):
    """The command that makes an arm, with the flags of a training's settings."""
    return command(f"train.py {arm_flag(arm)}{regime_flags(settings or {})}", place.root, place.quick, seed or None)


def newest_checkpoint(folder):
    """(folder, hash of the weights, step) of the newest checkpoint that is whole; None:
    there is none."""
    def age(path):
        return len(path.name), path.name

    for source in sorted((folder / "checkpoints").glob("step-*"), key=age, reverse=True):
        try:
            return source, read_manifest(source)["files"]["model.safetensors"], int(source.name[5:])
        except (StageError, KeyError, ValueError):
            continue
    return None


def is_finite(value):
    """Whether a value read from JSON holds no NaN and nothing infinite, which 1e999 is read as."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def find_arm(seed, arm, place):
    """The Found of one trained arm, config and weights verified by its manifest.

    Damaged weights are named, and the newest whole checkpoint is used; without any, what
    was measured of weights that the manifest knows. Raises StageError where none of these
    is there.
    """
    folder, made_by = arm_folder(place.root, seed, arm), train_command(seed, arm, place)
    weights = folder / "model.safetensors"
    # the hash first: a training at work names new weights in the manifest before they are in place
    digest = sha256(weights) if weights.is_file() else None
    manifest = read_json(folder / "manifest.json", made_by)
    known, settings, trained_by = manifest.get("weights"), manifest.get("settings"), manifest.get("made_by", [])
    whole = isinstance(settings, dict) and isinstance(known, dict) and is_finite(settings)
    whole = whole and isinstance(trained_by, list) and all(isinstance(one, dict) for one in trained_by)
    if not whole or any(type(step) is not int for step in known.values()):
        raise StageError(f"{folder / 'manifest.json'} is damaged; train again: {made_by} --fresh")
    checkpoint = None if digest in known else newest_checkpoint(folder)
    if digest is None and checkpoint is None:
        measured = read_measured(folder / place.file)
        if measured and measured.facts["weights"] in known:
            digest, config = measured.facts["weights"], manifest.get("config")
            return Found(seed, arm, folder, None, digest, config, known[digest], settings, trained_by)
    config = folder / "config.json"
    if not config.is_file() or sha256(config) != manifest.get("config"):
        wrong = "is not the file its manifest names" if config.is_file() else "is missing"
        raise StageError(f"{config} {wrong}; put that back, or train again: {made_by} --fresh")
    if digest in known:
        return Found(seed, arm, folder, folder, digest, manifest["config"], known[digest], settings, trained_by)
    wrong = "is missing" if digest is None else "is not the file its manifest names"
    if checkpoint is None:
        raise StageError(f"{weights} {wrong}, and no whole checkpoint is left; train again: {made_by} --fresh")
    source, digest, step = checkpoint
    tqdm.write(f"{weights} {wrong}; using {source} instead")
    return Found(seed, arm, folder, source, digest, manifest["config"], step, settings, trained_by)


def load_arm(seed, arm, place):
    """(model, Found) of one trained arm; raises StageError where its weights are NaN,
    infinite or not there."""
    found, made_by = find_arm(seed, arm, place), train_command(seed, arm, place)
    weights = found.source / "model.safetensors"
    model = load_model(found.folder, place.device, made_by, weights=weights)
    if sha256(weights) != found.weights:
        return load_arm(seed, arm, place)  # training has replaced them in between
    if not all(p.isfinite().all() for p in model.parameters()):
        raise StageError(f"{weights} holds weights that are NaN or infinite; "
                         f"train again: {made_by} --fresh")
    if found.step != found.settings.get("steps"):
        tqdm.write(f"note: {found.folder} is at step {found.step} of {found.settings.get('steps')}")
    return made_fast(model), found


def trained_arms(root):
    """{arm: seeds} in the order of ARMS: the seeds of which the baseline and another arm are there.

    Each arm is compared on the seeds that it shares with the baseline.
    """
    names = [path.name[4:] for path in (Path(root) / "trained").glob("seed*")]
    seeds = sorted({0, *(int(name) for name in names if name.isdecimal())})

    def there(arm, seed):
        return (arm_folder(root, seed, arm) / "manifest.json").is_file()

    found = {arm: tuple(seed for seed in seeds if there(REFERENCE, seed) and there(arm, seed))
             for arm in ARMS if arm != REFERENCE}
    found = {arm: own for arm, own in found.items() if own}
    if not found:
        return dict.fromkeys(SPECIFIED, (0,))  # find_arm says what is missing
    return {REFERENCE: tuple(sorted(set().union(*found.values())))} | found


# what trainings that are compared may differ in
OWN = ("arm", "seed", "memory", "memory_settings", "backbone", "config", "replay", "init",
       "init_config", "lora")
OTHER_MODEL = "the model's config"


def shared_settings(found):
    """What the trainings of all arms have to have in common."""
    return {name: value for name, value in found.settings.items() if name not in OWN}


def retrain(one, like, differing, place):
    """The command that trains an arm again as another one was; where no flag tells what differs,
    those that make both again, as the files at hand have it."""
    both = [one] if set(differing) <= set(REGIME) else [like, one]
    again = [f"{train_command(a.seed, a.arm, place, like.settings)} --fresh" for a in both]
    if OTHER_MODEL in differing:
        again = [init_command(a.arm, place.root, place.quick, a.seed or None, a.settings.get("to"))
                 for a in both] + again
    return " && ".join(again)


def alike(one, other, name):
    """Whether a setting of two trainings is the same."""
    return one.settings.get(name) == other.settings.get(name)


def check_comparable(found, meta, place):
    """Raise StageError where the arm is not the only thing that differs: the data, the
    settings, the steps taken, the config of all seeds of an arm and, within a seed, the initial
    weights of the specification's arms have to be the same."""
    first, inits, configs = found[0], {}, {}
    theirs = shared_settings(first)
    for one in found:
        name, mine = one.folder.relative_to(place.root), shared_settings(one)
        if one.settings.get("data") != meta["splits"]["train"]["sha256"]:
            again = train_command(one.seed, one.arm, place, one.settings)
            raise StageError(f"{name} was trained on other data than {place.root}/data now holds; put that "
                             f"data back, or train again: {again} --fresh")
        like, differing = first, sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        if one.arm in SPECIFIED and not alike(one, other := inits.setdefault(one.seed, one), "init"):
            like, differing = other, [*differing, "initial weights"]
        if not alike(one, other := configs.setdefault(init_name(one.arm), one), "init_config"):
            like, differing = other, [*differing, OTHER_MODEL]
        if differing:
            raise StageError(f"{name} was trained differently from {like.folder.relative_to(place.root)} "
                             f"({', '.join(differing)}); train again: "
                             f"{retrain(one, like, differing, place)}")
    furthest = max(one.step for one in found)
    for one in found:
        if one.step != furthest:
            name = (one.source or one.folder).relative_to(place.root)
            again = train_command(one.seed, one.arm, place, one.settings)
            raise StageError(f"{name} is at step {one.step}, not at {furthest} as others are; go on with: "
                             f"{again} --resume")


def gather(exam, meta, place):
    """What was measured of every trained arm, measured now where it has to be: ({(arm,
    seed): Measured}, {arm: seeds}).

    Raises StageError where arms can't be compared.
    """
    arms = trained_arms(place.root)
    found = [find_arm(seed, arm, place) for arm, seeds in arms.items() for seed in seeds]
    check_comparable(found, meta, place)
    measured = {}
    for number, one in enumerate(found):
        found[number], measured[one.arm, one.seed] = measured_arm(one, exam, place)
    check_comparable(found, meta, place)  # a training may have gone on beside this
    return measured, arms


# ------------------------------------------------------------ statistics

def wilson(successes, trials):
    """95% interval of a proportion (Wilson 1927): [low, high]."""
    z, share = 1.959964, successes / trials
    stretch = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / stretch
    variance = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z / stretch * math.sqrt(variance)
    # none or all: exactly 0 or 1
    return [max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))]


def mcnemar(first, second):
    """Two-sided exact p of two paired bool arrays being right equally often (McNemar 1947)."""
    only, other = int((first & ~second).sum()), int((second & ~first).sum())
    n = only + other
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
            for k in range(min(only, other) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs)) if n else 1.0


def paired_difference(first, second):
    """Share of `second` minus that of `first`, paired bool arrays (seeds, questions):
    {"mean", "ci95"}.

    The interval is Wald's after half an observation is added to each of the four cells
    (Agresti & Min 2005), so none is ever a point. The seeds' answers to a question are not
    independent: together they count as one.
    """
    n = first.shape[1]
    only, other = ((one & ~two).sum() / len(one) for one, two in ((first, second), (second, first)))
    centre, spread = (other - only) / (n + 2), only + other + 1
    half = 1.959964 * math.sqrt(spread - (other - only) ** 2 / (n + 2)) / (n + 2)
    return {"mean": (other - only) / n, "ci95": [max(-1.0, centre - half), min(1.0, centre + half)]}


def holm(p):
    """{name: p} adjusted for being several (Holm 1979): the smallest times their number,
    the next times one less .."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def interval(samples):
    """The middle 95% of bootstrap samples: [low, high]."""
    return np.quantile(samples, (0.025, 0.975)).tolist()


def two_sided(samples):
    """Two-sided p of bootstrap samples of a difference: how much of them lies beyond zero,
    both ways.

    It is below 0.05 where the middle 95% exclude zero; never 0, which no number of samples shows.
    """
    beyond = min((samples >= 0).sum(), (samples <= 0).sum())
    return min(1.0, 2 * (int(beyond) + 1) / (len(samples) + 1))


def resample(bits, seeds, characters, settings):
    """Bits per character of each arm, and of the baseline on the arm's seeds, documents and
    seeds drawn again.

    All arms by the same draws; where an arm lacks seeds that the baseline has, its seeds
    are drawn by themselves.
    Args: as `paired_bootstrap`. Returns: {arm: (2, settings.bootstrap)}, its own and the
    baseline's.
    """
    draw, apart = (np.random.default_rng(seed) for seed in (settings.seed, (settings.seed, 1)))
    every, count = seeds[REFERENCE], len(characters)
    groups = sorted(set(seeds.values()) - {every})
    samples = {arm: np.empty((2, settings.bootstrap)) for arm in bits}
    for b in range(settings.bootstrap):
        chosen = np.bincount(draw.integers(0, count, count), minlength=count)
        which = {every: draw.integers(0, len(every), len(every))}
        which |= {group: apart.integers(0, len(group), len(group)) for group in groups}
        sums = {arm: own @ chosen for arm, own in bits.items()}
        total = characters @ chosen
        for arm, own in sums.items():
            theirs = sums[REFERENCE][[every.index(seed) for seed in seeds[arm]]]
            drawn = which[seeds[arm]]
            whole = total * len(drawn)
            samples[arm][:, b] = own[drawn].sum() / whole, theirs[drawn].sum() / whole
    return samples


def paired_bootstrap(bits, seeds, characters, settings):
    """Bits per character of each arm and its difference from the baseline, seeds and
    documents resampled together.

    Args: bits {arm: (seeds, documents)}, seeds {arm: their numbers}, characters (documents,).
    Returns: {arm: {"per_seed", "ci95"} and, but for the baseline, "difference": {"mean",
    "ci95"}, "ratio", "ratio_ci95", "p", "p_holm", "verdict"}.
    """
    samples = resample(bits, seeds, characters, settings)
    result = {}
    for arm, own in bits.items():
        per_seed = own.sum(1) / characters.sum()
        result[arm] = {"per_seed": per_seed.tolist(), "ci95": interval(samples[arm][0])}
    of_baseline = dict(zip(seeds[REFERENCE], result[REFERENCE]["per_seed"]))
    others = [arm for arm in bits if arm != REFERENCE]
    for arm in others:
        mean = statistics.fmean(result[arm]["per_seed"])
        baseline = statistics.fmean(of_baseline[seed] for seed in seeds[arm])
        own, theirs = samples[arm]
        result[arm]["difference"] = {"mean": mean - baseline, "ci95": interval(own - theirs)}
        result[arm] |= {"ratio": mean / baseline, "ratio_ci95": interval(own / theirs)}
        result[arm]["p"] = two_sided(own - theirs)
    for arm, p in holm({arm: result[arm]["p"] for arm in others}).items():
        sign = np.sign(result[arm]["difference"]["mean"])
        result[arm] |= {"p_holm": p, "verdict": verdict(p <= SIGNIFICANT, -sign)}
    return result


def verdict(clear, sign):
    """In a word: whether a difference is clear, and which way it goes (1: for the better)."""
    if not clear:
        return "inconclusive"
    return "helps" if sign > 0 else "hurts"


def kinds_of_target(tokens, stored, window, slots):
    """For each target of a document: 0 new in it, 1 last seen inside the window, 2 beyond
    it but in memory, 3 neither.

    `window`: positions that attention sees, so that the target's own distance from what it
    sees goes up to this. `stored` (len(tokens) - 1,): whether each target was stored; it is
    in memory until `slots` more have been.
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


# ------------------------------------------------------------ the tables

class Evidence(NamedTuple):
    """What was measured of all arms, and of what."""

    measured: dict              # {(arm, seed): Measured}
    seeds: dict                 # {arm: seeds}, the baseline first
    exam: Exam

    @property
    def others(self):
        """All arms but the baseline."""
        return [arm for arm in self.seeds if arm != REFERENCE]

    def of(self, arm):
        """What was measured of an arm, seed by seed."""
        return [self.measured[arm, seed] for seed in self.seeds[arm]]

    def first(self, arm):
        """What was measured of an arm's first seed."""
        return self.of(arm)[0]

    def paired(self, arm):
        """What was measured of the baseline on the seeds of an arm."""
        return [self.measured[REFERENCE, seed] for seed in self.seeds[arm]]

    def bits(self, measured):
        """Bits of all targets of the documents, mean over some seeds: (T,)."""
        return np.mean([bits(one.tensors["log_p"]) for one in measured], 0)


def summarise_bpc(evidence):
    """(bpc, bpc_windows) of results.json: whole documents, and rows alone."""
    exam, settings = evidence.exam, evidence.exam.settings
    whole, alone = {}, {}
    counted = counted_targets(exam.rows, settings.eot)
    opening = np.cumsum(exam.rows[:, 0] == exam.settings.eot) - 1  # document of each row
    for arm in evidence.seeds:
        whole[arm] = np.stack([[bits(part).sum() for part in one.documents("log_p", exam.texts)]
                               for one in evidence.of(arm)])
        alone[arm] = []
        for one in evidence.of(arm):
            each = np.zeros(counted.shape)
            each[counted] = bits(one.tensors["windows"])
            alone[arm].append(np.bincount(opening, each.sum(1)))
        alone[arm] = np.stack(alone[arm])
    characters = np.array([exam.per_token[text].sum() for text in exam.texts], float)
    of_windows = np.bincount(opening, np.where(counted, exam.per_token[exam.rows[:, 1:]], 0).sum(1))
    return (paired_bootstrap(whole, evidence.seeds, characters, settings),
            paired_bootstrap(alone, evidence.seeds, of_windows, settings))


class Said:
    """What the arms said to the questions of some cells, {cell: [Question]}; means over formats and
    seeds, the same questions for every arm. kind: what the names of their tensors begin with."""

    def __init__(self, evidence, asked, kind=""):
        self.evidence, self.exam = evidence, evidence.exam
        self.outcomes, self.nats = {}, {}
        for key, one in evidence.measured.items():
            self.outcomes[key] = by_cell(asked, one.tensors[f"{kind}outcomes"])
            self.nats[key] = by_cell(asked, one.tensors[f"{kind}value_nats"])

    def gather(self, arm, outcome, cells, seeds=None):
        """One of the OUTCOMES on some cells: bool (seeds, questions)."""
        row = OUTCOMES.index(outcome)
        return np.stack([np.concatenate([self.outcomes[arm, seed][cell][row] for cell in cells])
                         for seed in seeds or self.evidence.seeds[arm]])

    def share(self, arm, outcome, cells):
        """The mean, and Wilson's interval: the seeds' answers to a question count as one."""
        right = self.gather(arm, outcome, cells)
        seeds, count = right.shape
        return {"mean": float(right.mean()), "ci95": wilson(right.sum() / seeds, count)}

    def value_nats(self, arm, cells):
        """Mean -ln p of the right value."""
        found = [self.nats[arm, seed][cell] for seed in self.evidence.seeds[arm] for cell in cells]
        return float(np.mean(found, dtype=np.float64))


class Recall(Said):
    """The recall part of results.json."""

    def __init__(self, evidence):
        super().__init__(evidence, evidence.exam.asked)

    def at(self, distances, forms=None):
        """The cells of some distances without distractors."""
        forms = forms or self.exam.settings.forms
        return [(form, distance, 0) for form in forms for distance in distances]

    def places(self, cells):
        """Which questions of all are those of some cells: (n,) int64."""
        numbers = self.exam.split(np.arange(len(self.exam.questions)))
        return np.concatenate([numbers[cell] for cell in cells])

    def by_format(self, arm, outcome, distances):
        """{form: share} over some distances."""
        return {form: self.share(arm, outcome, self.at(distances, [form]))["mean"]
                for form in self.exam.settings.forms}

    def of_answered(self, arm, cells):
        """Of the questions answered rightly, the share where the right item had been retrieved."""
        right = self.gather(arm, "forced_choice", cells)
        return float(self.gather(arm, "retrieved", cells)[right].mean()) if right.any() else 0.0

    def pair(self, arm, distances):
        """Right answers of the baseline and of an arm, on the arm's seeds."""
        seeds, cells = self.evidence.seeds[arm], self.at(distances)
        return (self.gather(REFERENCE, "forced_choice", cells, seeds),
                self.gather(arm, "forced_choice", cells, seeds))

    def test(self, arm, distances):
        """p of the seed where the arm differs least from the baseline."""
        return max(map(mcnemar, *self.pair(arm, distances)))

    def curve(self, arm):
        """One arm, a value for each distance."""
        distances = self.exam.distances
        cells = [self.at([distance]) for distance in distances]
        part = {}
        for name in OUTCOMES:
            shares = [self.share(arm, name, some) for some in cells]
            part[name] = [share["mean"] for share in shares]
            part[f"{name}_ci95"] = [share["ci95"] for share in shares]
        part["value_nats"] = [self.value_nats(arm, some) for some in cells]
        for outcome, name in (("forced_choice", "by_format"), ("top1", "top1_by_format")):
            each = [self.by_format(arm, outcome, [distance]) for distance in distances]
            part[name] = {form: [one[form] for one in each] for form in self.exam.settings.forms}
        part["retrieved_of_answered"] = [self.of_answered(arm, some) for some in cells]
        if arm != REFERENCE:
            part["mcnemar_p"] = [self.test(arm, [distance]) for distance in distances]
        return part

    def long_range(self):
        """Over the distances beyond the window: each arm, and its difference from the baseline."""
        far, arms = self.exam.far, {}
        cells = self.at(far)
        for arm in self.evidence.seeds:
            top = self.share(arm, "top1", cells)
            per_seed = self.gather(arm, "forced_choice", cells).mean(1)
            arms[arm] = self.share(arm, "forced_choice", cells) | {
                "per_seed": per_seed.tolist(),
                "top1": top["mean"],
                "top1_ci95": top["ci95"],
                "value_nats": self.value_nats(arm, cells),
                "by_format": self.by_format(arm, "forced_choice", far),
                "retrieved_of_answered": self.of_answered(arm, cells)}
        tests = {arm: self.test(arm, far) for arm in self.evidence.others}
        for arm, p in holm(tests).items():
            first, second = self.pair(arm, far)
            signs = np.sign(second.mean(1) - first.mean(1))
            clear = p <= SIGNIFICANT and len(set(signs)) == 1
            arms[arm] |= {
                "difference": paired_difference(first, second),
                "mcnemar_p": tests[arm],
                "p_holm": p,
                "verdict": verdict(clear, signs[0])}
        return {"distances": far, "arms": arms}

    def distracted(self, extra, distances):
        """A row for so many distractors."""
        cells = [(form, distance, extra) for form, distance in distances.items()]
        arms = {}
        for arm in self.evidence.seeds:
            shares = {name: self.share(arm, name, cells) for name in OUTCOMES}
            by_format = {cell[0]: self.share(arm, "forced_choice", [cell])["mean"]
                         for cell in cells}
            arms[arm] = {name: share["mean"] for name, share in shares.items()} | {
                "ci95": shares["forced_choice"]["ci95"],
                "retrieved_of_answered": self.of_answered(arm, cells),
                "by_format": by_format}
        return {"facts": extra, "distance": distances, "arms": arms}

    def summary(self):
        """All of it."""
        settings, facts = self.exam.settings, self.evidence.first(REFERENCE).facts
        window, arms = facts["window"], self.evidence.seeds
        return {"what": "verbatim: the question repeats the words of the fact",
                "chance": 1 / settings.facts,
                "window": window,
                "receptive_field": facts["layers"] * (window - 1) + 1,
                "distances": self.exam.distances,
                "trials_per_distance": len(settings.forms) * settings.trials,
                "seeds": len(arms[REFERENCE]),
                "arms": {arm: self.curve(arm) for arm in arms},
                "long_range": self.long_range(),
                "distractors": [self.distracted(*row) for row in self.exam.distractors.items()]}


class Indirect(Said):
    """The part of results.json about questions that word the fact otherwise: forced choice, top-1
    and -ln p of the right value over distance, for every arm; verbatim recall of the same facts
    beside it."""

    def __init__(self, evidence):
        cells = evidence.exam.indirect
        super().__init__(evidence, cells, "indirect_")
        self.distances = list(dict.fromkeys(cell[-1] for cell in cells))
        self.far = [distance for distance in self.distances if distance in self.exam.settings.long_range]

    def cells(self, kind, distances):
        """Its cells at some distances: "verbatim" is the diagonal of "format", which is the rest."""
        found = []
        for cell in self.exam.indirect:
            what, planted, asked, distance = cell
            if what == "format":
                what = "verbatim" if planted == asked else "format"
            if what == kind and distance in distances:
                found.append(cell)
        return found

    def scores(self, arm, cells):
        """The three numbers of an arm on some cells."""
        forced = self.share(arm, "forced_choice", cells)
        return {"forced_choice": forced["mean"], "forced_choice_ci95": forced["ci95"],
                "top1": self.share(arm, "top1", cells)["mean"], "value_nats": self.value_nats(arm, cells)}

    def kind(self, arm, kind):
        """A kind of question, a value for each distance; and over those beyond the window."""
        each = [self.scores(arm, self.cells(kind, [distance])) for distance in self.distances]
        part = {name: [one[name] for one in each] for name in each[0]}
        return part | ({"long_range": self.scores(arm, self.cells(kind, self.far))} if self.far else {})

    def matrix(self, arm):
        """{planted in: {asked in: forced choice}} beyond the window, or over all distances where none is."""
        forms, at = self.exam.settings.forms, self.far or self.distances
        return {planted: {asked: self.share(arm, "forced_choice",
                                            [("format", planted, asked, distance) for distance in at])["mean"]
                          for asked in forms} for planted in forms}

    def summary(self):
        """All of it; None where there was no text for it."""
        if not self.distances:
            return None
        # of one format alone there is no other to ask in
        kinds = [kind for kind in ("verbatim", *INDIRECT) if self.cells(kind, self.distances)]
        arms = {arm: {kind: self.kind(arm, kind) for kind in kinds} | {"matrix": self.matrix(arm)}
                for arm in self.evidence.seeds}
        return {"means": INDIRECT, "chance": 1 / self.exam.settings.facts, "distances": self.distances,
                "long_range": self.far, "trials": self.exam.settings.indirect_trials, "arms": arms}


def summarise_turns(evidence):
    """What each arm knows in the third turn of a dialogue of what was said in the first,
    its cache kept or cleared between turns; None where there was no text for dialogues."""
    if evidence.exam.dialogues is None:
        return None
    summary = {}
    for arm in evidence.seeds:
        right = np.stack([one.tensors["turns_forced_choice"] for one in evidence.of(arm)])
        nats = np.stack([one.tensors["turns_value_nats"] for one in evidence.of(arm)])
        seeds, _, trials = right.shape
        summary[arm] = {}
        for number, name in enumerate(("persistent", "ephemeral")):
            mine = right[:, number]
            summary[arm][name] = {
                "forced_choice": float(mine.mean()),
                "forced_choice_ci95": wilson(mine.sum() / seeds, trials),
                "value_nats": float(nats[:, number].mean(dtype=np.float64))}
        summary[arm]["trials"] = trials
    return summary


def summarise_streamed(evidence):
    """Recall through the cache: {"needle": of a text's tokens, "hops": of a chain's facts}, each with
    the numbers and, by arm, forced choice, its interval and -ln p of the right value at each.
    """
    cells, summary = list(evidence.exam.streamed), {}
    for kind in dict.fromkeys(kind for kind, _ in cells):
        chosen = [i for i, cell in enumerate(cells) if cell[0] == kind]
        arms = {}
        for arm in evidence.seeds:
            right = np.stack([one.tensors["streamed_forced_choice"][chosen] for one in evidence.of(arm)])
            nats = np.stack([one.tensors["streamed_value_nats"][chosen] for one in evidence.of(arm)])
            seeds, _, trials = right.shape
            arms[arm] = {"forced_choice": right.mean((0, 2)).tolist(),
                         "ci95": [wilson(found / seeds, trials) for found in right.sum((0, 2))],
                         "value_nats": nats.mean((0, 2), dtype=np.float64).tolist()}
        summary[kind] = {"at": [cells[i][1] for i in chosen], "trials": evidence.exam.settings.streamed, "arms": arms}
    return summary


def summarise_speed(on, off, settings):
    """The throughput of one arm, and by that of the same model with its memory off, timed
    in turn: runs of all seeds."""
    on, off = np.asarray(on), np.asarray(off)
    part = {"median": float(np.median(on)), "runs": on.tolist()}
    if not len(off):
        return part
    draw = np.random.default_rng(settings.seed)
    chosen = draw.integers(0, len(on), (settings.bootstrap, len(on)))
    ratios = np.median(on[chosen], axis=1) / np.median(off[chosen], axis=1)
    low, high = interval(ratios)
    return part | {"off_runs": off.tolist(),
                   "ratio": part["median"] / float(np.median(off)),
                   "ratio_ci95": [low, high],
                   "verdict": verdict(low > 1 or high < 1, low - 1)}


def summarise_training(folders):
    """What history.jsonl of an arm's trainings says, each in the folder of a seed: median tokens a
    second and the last loss, medians over the seeds; null where none says anything."""
    rates, losses = [], []
    for path in (folder / "history.jsonl" for folder in folders):
        own, loss = [], None
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line, parse_constant=int)           # int("NaN") is a ValueError
                loss = float(entry["loss"])
                own.append(float(entry["tok/sec"]))
            except (ValueError, KeyError, TypeError):
                continue
        rates += [statistics.median(own)] if own else []
        losses += [loss] if loss is not None else []
    return {name: statistics.median(x) if x else None for name, x in (("tokens_per_sec", rates), ("loss", losses))}


def position_of_bits(evidence):
    """Bits per character by the place in the document, mean over seeds."""
    exam = evidence.exam
    place = np.concatenate([np.arange(len(text) - 1) for text in exam.texts])
    characters = np.concatenate([exam.per_token[text[1:]] for text in exam.texts])
    edges = [0, 64, 128, 256, 512, 1024, 2048]
    inside = [((place >= low) & (place < high), low, high) for low, high in zip(edges, edges[1:])]
    inside = [(mask, low, high) for mask, low, high in inside if characters[mask].any()]
    arms = {}
    for arm in evidence.seeds:
        all_bits = evidence.bits(evidence.of(arm))
        arms[arm] = [float(all_bits[mask].sum() / characters[mask].sum()) for mask, *_ in inside]
    return {"edges": [low for _, low, _ in inside] + [inside[-1][2]], "arms": arms}


KINDS = ("new in the document", "last seen inside the window",
         "last seen beyond the window, in memory", "last seen beyond both")


def kinds_of_all(evidence):
    """The kind of every target, the same for all arms (T,): what is in memory is what the
    LTM's first seed stored or, where there is no LTM, what would be stored by the
    baseline's surprisal."""
    texts, facts = evidence.exam.texts, evidence.first(REFERENCE).facts
    if "with_ltm" in evidence.seeds:
        facts = evidence.first("with_ltm").facts
        stored = evidence.first("with_ltm").documents("stored", texts)
    else:
        log_p = evidence.first(REFERENCE).documents("log_p", texts)
        stored = [bits(part) > facts["threshold"] for part in log_p]
    return np.concatenate([kinds_of_target(text, flags, facts["window"], facts["slots"])
                           for text, flags in zip(texts, stored)])


def targets_of_gain(evidence, kinds):
    """Where the gain in bits comes from, by what kind of target it is (kinds_of_all): {kind:
    {"share_of_tokens", "arms", "share_of_gain"}}."""
    own = {arm: evidence.bits(evidence.of(arm)) for arm in evidence.seeds}
    gain = {arm: evidence.bits(evidence.paired(arm)) - own[arm] for arm in evidence.others}
    targets = {}
    for number, name in enumerate(KINDS):
        kind = kinds == number
        costs = {arm: float(x[kind].mean()) if kind.any() else 0.0 for arm, x in own.items()}
        shares = {arm: float(x[kind].sum() / (x.sum() or 1.0)) for arm, x in gain.items()}
        targets[name] = {"share_of_tokens": float(kind.mean()), "arms": costs,
                         "share_of_gain": shares}
    return targets


# ------------------------------------------------------------ calibration

MUCH = 0.1                      # bits by which a token is clearly dearer


def means_of_kinds(values, kinds, texts, settings):
    """The mean of each arm's values over the targets of each of KINDS, documents resampled: {arm:
    {kind: {"mean", "ci95"}}}; None where no target is of the kind.

    Args: values {arm: (T,)}, kinds (T,).
    """
    ends = np.cumsum([len(text) - 1 for text in texts])[:-1]
    means = {arm: dict.fromkeys(KINDS) for arm in values}
    sums, counts, samples = {}, {}, {}
    for number, name in enumerate(KINDS):
        chosen = kinds == number
        if not chosen.any():
            continue
        counts[name] = np.array([part.sum() for part in np.split(chosen, ends)])
        for arm, own in values.items():
            parts = np.split(np.where(chosen, own, 0.0), ends)
            sums[arm, name], samples[arm, name] = np.array([part.sum() for part in parts]), []
            means[arm][name] = {"mean": float(own[chosen].mean())}
    draw = np.random.default_rng((settings.seed, 6))
    # drawn once for all arms and kinds, which takes longest; in parts, as documents may be many
    for start in range(0, settings.bootstrap, 1_000):
        some = min(1_000, settings.bootstrap - start)
        drawn = draw.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), some).astype(float)
        for (arm, name), own in sums.items():
            samples[arm, name].append(drawn @ own / np.maximum(1, drawn @ counts[name]))
    for (arm, name), found in samples.items():
        means[arm][name]["ci95"] = interval(np.concatenate(found))
    return means


def beyond_eviction(evidence, recall, arm):
    """What the right value costs above the baseline, in bits, at distances that outlast the memory
    (those beyond the long range), and how often it is chosen: {"distances", "bits_above",
    "forced_choice"}."""
    exam = evidence.exam
    far = [distance for distance in exam.distances if distance > max(exam.far)]
    cells = [recall.at([distance]) for distance in far]
    gaps = [np.mean([mine.tensors["value_nats"][at] - theirs.tensors["value_nats"][at]
                     for mine, theirs in zip(evidence.of(arm), evidence.paired(arm))], dtype=np.float64)
            for at in map(recall.places, cells)]
    return {"distances": far, "bits_above": [float(gap) / math.log(2) for gap in gaps],
            "forced_choice": [recall.share(arm, "forced_choice", some)["mean"] for some in cells]}


def oracle(evidence, arm, characters):
    """Bits per character if a gate knew at every token whether to use the memory or its backbone
    alone: no gate that weighs the two can do better."""
    best = [bits(np.maximum(one.tensors["log_p"], one.tensors["log_p_stm"])).sum() for one in evidence.of(arm)]
    theirs = [bits(one.tensors["log_p"]).sum() for one in evidence.paired(arm)]
    return {"bpc": float(np.mean(best) / characters), "ratio": float(np.sum(best) / np.sum(theirs))}


def summarise_calibration(evidence, recall, kinds):
    """What each arm costs where it does not help, beside the baseline, token by token: bits above it,
    so less is better.

    worse: share of tokens that got dearer, and of those that did by more than MUCH bits. lost,
    saved: bits a token, over all. by_kind: bits above for each kind of target (kinds_of_all); the
    first are new words. oracle: the bound of every gate; None for a memory inside the backbone,
    which is never without it.
    """
    exam = evidence.exam
    characters = sum(exam.per_token[text].sum() for text in exam.texts)
    dearer = {arm: evidence.bits(evidence.of(arm)) - evidence.bits(evidence.paired(arm)) for arm in evidence.others}
    by_kind, arms = means_of_kinds(dearer, kinds, exam.texts, exam.settings), {}
    for arm, above in dearer.items():
        arms[arm] = {"worse": float((above > 0).mean()),
                     "much_worse": float((above > MUCH).mean()),
                     "lost": float(np.maximum(above, 0).mean()),
                     "saved": float(np.maximum(-above, 0).mean()),
                     "by_kind": by_kind[arm],
                     "evicted": beyond_eviction(evidence, recall, arm),
                     "oracle": oracle(evidence, arm, characters) if about(arm).memory == "ltm" else None}
    return {"much": MUCH, "arms": arms}


# ------------------------------------------------------------ what was measured, of what

def about_checkpoint(seed, facts):
    """Which weights were measured, where, by which code."""
    return {"seed": seed, "folder": facts["folder"], "sha256": facts["weights"],
            "config_sha256": facts["config"], "step": facts["step"],
            "measured_on": facts["device"], "commit": facts["commit"], "trained_by": facts.get("trained_by", [])}


def about_arm(evidence, arm):
    """What an arm is, and which checkpoints were measured."""
    facts = evidence.first(arm).facts
    measured = zip(evidence.seeds[arm], evidence.of(arm))
    return {"label": about(arm).label,
            "parameters": facts["parameters"],
            "memory_parameters": facts["memory_parameters"],
            "trained_parameters": facts["trained_parameters"],
            "state_bytes": facts["state_bytes"],
            "hit_means": facts["hit_means"],
            "settings": facts["memory_settings"],
            "checkpoints": [about_checkpoint(seed, one.facts) for seed, one in measured]}


def about_run(evidence):
    """Where and with what all this was trained and measured."""
    everything = [one.facts for arm in evidence.seeds for one in evidence.of(arm)]

    def all_of(name):
        return ", ".join(dict.fromkeys(facts[name] for facts in everything))

    def trained_by(name):
        every = (one for facts in everything for one in facts.get("trained_by", []))
        return ", ".join(dict.fromkeys(str(one.get(name, "unknown")) for one in every))

    first = everything[0]
    training = {name: value for name, value in first["training"].items() if name not in OWN}
    versions = {name: all_of(name) for name in ("device", "torch", "transformers", "python", "commit")}
    return versions | {"trained_by": {name: trained_by(name) for name in ("device", "torch", "commit")},
                       "seeds": list(evidence.seeds[REFERENCE]),
                       "steps": first["step"],
                       "settings": training,
                       "evaluation": seal(jsonable(evidence.exam.settings)),
                       "settings_sha256": settings_hash(evidence)}


def settings_hash(evidence):
    """One hash of all settings: of memories, trainings and the evaluation, the same for every part
    of the documents and every seed. What was chosen and what is reported are of the same hash."""
    apart = "part", "forms"
    evaluated = {name: value for name, value in jsonable(evidence.exam.settings).items() if name not in apart}
    files = "seed", "data", "planted_data", "init", "init_config"
    arms = {}
    for arm in evidence.seeds:
        facts = evidence.first(arm).facts
        trained = {name: value for name, value in facts["training"].items() if name not in files}
        arms[arm] = {"memory": facts["memory_settings"], "training": trained}
    return seal({"arms": arms, "evaluation": evaluated})


def about_data(exam, meta):
    """The validation text."""
    return {"source": meta["source"],
            "quick": bool(meta["quick"]),
            "vocabulary": meta["vocab_size"],
            "part": exam.settings.part,
            "val_documents": len(exam.texts),
            "val_tokens": sum(len(text) - 1 for text in exam.texts),
            "val_characters": int(sum(exam.per_token[text].sum() for text in exam.texts)),
            "val_sha256": exam.identity["val"]}


def summarise_hits(evidence, arm):
    """memory_hit_rate of one arm, and the share of targets that it stored (LTM)."""
    per_seed = [float(one.tensors["hit"].mean()) for one in evidence.of(arm)]
    stored = [float(one.tensors["stored"].mean()) for one in evidence.of(arm)]
    return {"mean": statistics.fmean(per_seed), "per_seed": per_seed,
            "routed_token_ratio": statistics.fmean(stored)}


def assemble(evidence, meta, root):
    """results.json, from what was measured of the arms."""
    arms, settings = evidence.seeds, evidence.exam.settings
    bpc, windows = summarise_bpc(evidence)
    asked = Recall(evidence)
    recall = asked.summary()
    far = recall["long_range"]["arms"]
    hits = {arm: summarise_hits(evidence, arm) for arm in arms}
    kinds = kinds_of_all(evidence)
    speed, training = {}, {}
    for arm, seeds in arms.items():
        runs = (np.concatenate([one.tensors[name] for one in evidence.of(arm)]) for name in ("speed_on", "speed_off"))
        speed[arm] = summarise_speed(*runs, settings)
        training[arm] = summarise_training([arm_folder(root, seed, arm) for seed in seeds])
    results = {}
    for arm in arms:
        results[arm] = {"bpc": statistics.fmean(bpc[arm]["per_seed"]),
                        "long_range_recall": far[arm]["mean"],
                        "memory_hit_rate": hits[arm]["mean"],
                        "tokens_per_sec": speed[arm]["median"]}
    detail = {"arms": {arm: about_arm(evidence, arm) for arm in arms},
              "data": about_data(evidence.exam, meta),
              "run": about_run(evidence),
              "bpc": bpc,
              "bpc_windows": windows,
              "recall": recall,
              "indirect": Indirect(evidence).summary(),
              "calibration": summarise_calibration(evidence, asked, kinds),
              "turns": summarise_turns(evidence),
              "streamed": summarise_streamed(evidence),
              "tokens_per_sec": speed,
              "training": training,
              "memory_hit_rate": hits,
              "position": position_of_bits(evidence),
              "targets": targets_of_gain(evidence, kinds)}
    if "with_ltm" in arms:
        detail["memory"] = evidence.first("with_ltm").facts["observation"]
    detail["explorer"] = summarise_explorer(evidence)
    return results | {"detail": detail}


# ------------------------------------------------------------ one memory at work

def pieces(tokenizer, tokens):
    """The text that each token adds; a character spread over several tokens stands in the
    last of them."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    words = tokenizer.convert_ids_to_tokens(tokens)
    if not byte_level(tokenizer):
        return [word.replace("\u2581", " ") for word in words]
    return [decode(bytes(map(byte_of.get, word))) for word in words]


@functools.cache
def words_of(tokenizer):
    """Which tokens hold a letter or a digit: bool (vocabulary,)."""
    texts = tokenizer.batch_decode(np.arange(len(tokenizer))[:, None])
    return np.array([any(map(str.isalnum, text)) for text in texts])


def worth_showing(texts, tally, config, is_word, settings):
    """The number of a document to show: of those long enough (of all, if none is), the
    first in which settings.reads words gain a bit or more although the window has lost
    sight of them; if there is none, that with the most."""
    shown = settings.shown

    def lost_and_found(i):
        tokens = texts[i][:shown + 1]
        gain = (bits(tally.log_p_stm[i]) - bits(tally.log_p[i]))[:shown]
        stored = tally.stored[i][:shown]
        kinds = kinds_of_target(tokens, stored, config.stm_window, config.ltm_slots)
        found = (kinds == 2) & (gain >= 1) & is_word[tokens[1:]]
        return min(settings.reads, len(set(tokens[1:][found].tolist())))

    long_enough = [i for i, text in enumerate(texts) if len(text) > shown] or range(len(texts))
    return max(long_enough, key=lost_and_found)                        # of equals, the first


def reads_of(model, ids, gains, sources):
    """What the memory found where it gained: [(gain, place, items of the right token,
    heaviest first)], of those whose heaviest item lies beyond the window. ids (1, T); gains
    [(gain, place)]."""
    cache, found = model.new_cache(), []
    for gain, at in sorted(gains, key=lambda pair: pair[1]):
        model(ids[:, cache.length:at + 1], past_key_values=cache, logits_to_keep=1)
        items = [{"at": item["position"] - 1, "share": item["share"], "cosine": item["cosine"]}
                 for item in cache.retrieved() if item["token"] == ids[0, at + 1]]
        if items and at - items[0]["at"] > model.config.stm_window:
            found.append((gain, at, items[:sources]))
    return found


@torch.no_grad()
def observe(model, texts, tally, tokenizer, settings):
    """What the memory did in the first settings.shown tokens of one document, for results.json.

    The reads: the words that gained most, of those that the window has lost and whose
    heaviest item lies beyond it; no word twice. All in float32, the reads off a
    RevenaCache.
    """
    config, window = model.config, model.config.stm_window
    is_word = words_of(tokenizer)
    number = worth_showing(texts, tally, config, is_word, settings)
    model = in_float32(model)
    ids = sent(texts[number][None, :settings.shown + 1], model.device)

    def cost(model):
        log_p = model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return (log_p.cpu() / -math.log(2)).tolist()

    alone, mixture, tokens = cost(memory_off(model)), cost(model), ids[0, 1:].tolist()
    words = pieces(tokenizer, tokens)
    gains = []
    for at, (without, mixed) in enumerate(zip(alone, mixture)):
        lost = at >= window and tokens[at] not in tokens[at - window:at]
        if lost and mixed < without and is_word[tokens[at]]:
            gains.append((mixed - without, at))
    reads = reads_of(model, ids, sorted(gains)[:64], settings.sources)
    chosen = {}
    for _, at, found in sorted(reads, key=lambda read: read[:2]):
        if len(chosen) < settings.reads:
            chosen.setdefault(words[at].strip().lower(), {"at": at, "from": found})
    threshold = config.ltm_surprisal_bits
    said = [{"text": word, "bits": without, "bits_mixture": mixed, "stored": without > threshold}
            for word, without, mixed in zip(words, alone, mixture)]
    return {"document": number, "window": window, "threshold": threshold, "tokens": said,
            "reads": sorted(chosen.values(), key=lambda read: read["at"])}


# ------------------------------------------------------------ what the page's explorer shows

# Numbers of a text stand in one string, a word for each token: a list would take a line each

def explored_documents(texts, settings):
    """Numbers of the documents that the explorer shows: those of most tokens, as far as tokens
    are shown, and of equals the first."""
    longest = sorted(range(len(texts)), key=lambda i: -min(len(texts[i]) - 1, settings.seen))
    return sorted(longest[:settings.explored])


def brief(number, digits=3):
    """A number in as few characters as hold so many decimals."""
    text = f"{number:.{digits}f}"
    text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def numbers_of(values, digits=3):
    """Numbers in one string."""
    return " ".join(brief(value, digits) for value in np.asarray(values).tolist())


def words_explored(tokenizer, tokens):
    """A text and how many characters of it (Unicode's, not JavaScript's) each token adds."""
    parts = pieces(tokenizer, tokens)
    return {"text": "".join(parts), "lengths": " ".join(str(len(part)) for part in parts)}


def about_explored(model):
    """What the explorer says of an arm beside its texts."""
    config, memory = model.config, model.active
    if isinstance(memory, LongTermMemory):
        return {"kind": "items", "slots": config.ltm_slots, "threshold": config.ltm_surprisal_bits,
                "cosine": config.ltm_cosine, "window": config.stm_window}
    return {"kind": "contents" if config.memory_enabled else "none", "window": config.stm_window}


def pack_of(text, model):
    """One text alone as a Pack."""
    width, settings = model.config.stm_window, dataclasses.replace(FULL, eot=model.config.pad_token_id)
    pack, = packs([text], width, model.device, settings, (1, rows_of(text, width)))
    return pack


@torch.no_grad()
def bits_explored(model, text):
    """Bits of each target of one text."""
    scores, = score(pack_of(text, model), model)
    return bits(scores.log_p.flatten()[:len(text) - 1].cpu().numpy())


@torch.no_grad()
def draws_of(model, text, most):
    """What an LTM draws on for each target of one text: {"stored", "share", "items"}.

    As one row, whatever its length: then the item that position i files is candidate i. An item
    is said as at,share,cosine, where `at` counts targets and a cosine may be "exact" or "word".
    """
    pack, length = pack_of(text, model), len(text) - 1
    h, _ = states(model, pack)
    log_p, log_z = model.log_p(h, pack.targets)
    parts = [x.flatten(0, 1)[None, :length] for x in (h, pack.tokens, pack.targets, log_p, log_z)]
    read, _, stored = model.memory.read(Final(*parts, model.embed_detached, None))
    weight = read.weights[0]                                # (T, T)
    share = weight / (1 + weight.sum(-1, keepdim=True))
    best = share.topk(min(most, length))
    cosine = read.cosine[0].amax(0).gather(1, best.indices).tolist()
    exact, words = ((through[0] > 0).gather(1, best.indices).tolist() for through in (read.exact, read.words))
    items = []
    for row in zip(best.indices.tolist(), best.values.tolist(), cosine, exact, words):
        said = [f"{at},{brief(part, 4)},{'exact' if same else 'word' if word else brief(near)}"
                for at, part, near, same, word in zip(*row) if part >= 0.0005]
        items.append(" ".join(said))
    return {"stored": "".join(str(int(flag)) for flag in stored[0].tolist()),
            "share": numbers_of(share.sum(-1).cpu(), 4), "items": ";".join(items)}


def cell_of(value):
    """A value of `contents` as a cell of a table."""
    if isinstance(value, list):
        return " \u00b7 ".join(cell_of(one) for one in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("\n", "\u00b6").replace("\t", "\u21e5").replace("\r", "\u00b6")


def ranges_of(numbers):
    """Ascending numbers as ranges: "0-3 7-9"."""
    found = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(f"{low}-{high}" for low, high in found)


def listed(rows, settings):
    """What is shown of `contents`: all rows that speak of the text; of slots, which there are as
    many of as there are settings, those that are chosen most."""
    if len(rows) <= settings.slots or any("token" in row for row in rows):
        return rows
    return sorted(rows, key=lambda row: (-row.get("chosen", 0), -row.get("norm", 0)))[:settings.slots]


@torch.no_grad()
def contents_of(model, text, tokenizer, settings):
    """What a further memory's `contents` says at moments of one text: {"columns", "rows",
    "moments": [{"after", "held", "of"}]}.

    A row that is the same at several moments stands there once. The memory of a moment is that
    of the predictions from target `after` on; `held` are the numbers of its rows, `of` is how
    many `contents` gave.
    """
    ids = sent(text[None], model.device)
    cache, moments, numbers, same = model.new_cache(), [], {}, False
    step = settings.moment * -(-len(text) // (settings.moment * settings.moments))
    stops = [*range(step - 1, len(text) - 1, step), len(text) - 1]
    for stop in stops:
        model(ids[:, cache.length:stop], past_key_values=cache, logits_to_keep=1)
        if same and stop != stops[-1]:
            continue
        rows, shown = cache.contents(tokenizer), []
        # slots that any text has, and each costs a look at the vocabulary: asked twice
        same = len(rows) > settings.slots and not any("token" in row for row in rows)
        for row in listed(rows, settings):
            row = tuple((name, cell_of(value)) for name, value in row.items() if name != "token")
            shown.append(numbers.setdefault(row, len(numbers)))
        moments.append({"after": stop - 1, "held": ranges_of(sorted(set(shown))), "of": len(rows)})
    columns = list(dict.fromkeys(name for row in numbers for name, _ in row))
    lines = ["\t".join(dict(row).get(name, "") for name in columns) for row in numbers]
    return {"columns": " ".join(columns), "rows": "\n".join(lines), "moments": moments}


def explored_text(model, text, tokenizer, settings):
    """What the explorer shows of one text, EOT before it, by one arm in float32."""
    shown = {"bits": numbers_of(bits_explored(model, text))}
    if not model.config.memory_enabled:
        return shown
    shown["bits_off"] = numbers_of(bits_explored(memory_off(model), text))
    if isinstance(model.active, LongTermMemory):
        return shown | draws_of(model, text, settings.drawn)
    return shown | contents_of(model, text, tokenizer, settings)


def summarise_explorer(evidence):
    """detail.explorer: the texts, and what each arm's first seed makes of them; controls are left
    out."""
    exam, settings = evidence.exam, evidence.exam.settings
    texts = []
    for i in explored_documents(exam.texts, settings):
        tokens = exam.texts[i][1:settings.seen + 1].tolist()
        texts.append({"name": f"validation document {i:,}", **words_explored(exam.tokenizer, tokens)})
    arms = {arm: evidence.first(arm).facts["exploration"] for arm in evidence.seeds
            if not about(arm).control}
    return {"texts": texts, "arms": arms}


def own_text(name, most):
    """The first characters of a file, or of standard input (-)."""
    try:
        if name == "-":
            text = sys.stdin.read(most)
        else:
            with open(name, encoding="utf-8") as file:
                text = file.read(most)
    except UnicodeDecodeError:
        raise StageError(f"{name} is not UTF-8 text; save it as that and run again") from None
    if not text.strip():
        raise StageError(f"there is no text in {name}; write some and run again")
    return text


def explore(name, place, settings):
    """What the trained arms make of a text of the user's, for plot_eval.py."""
    began, arms = time.time(), {}
    text = own_text(name, 50 * settings.own)
    tokenizer = load_tokenizer(place.root, place.quick)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) > settings.own:
        print(f"note: the first {settings.own:,} tokens are taken")
    tokens = tokens[:settings.own]
    if len(tokens) < 2:
        raise StageError(f"{name} has one token; the explorer needs two or more")
    for arm, seeds in trained_arms(place.root).items():
        if about(arm).control:
            continue
        if find_arm(seeds[0], arm, place).source is None:
            print(f"note: the weights of {arm} are elsewhere; it is left out")
            continue
        model, found = load_arm(seeds[0], arm, place)
        shown = explored_text(in_float32(model), np.array([model.config.pad_token_id, *tokens]), tokenizer, settings)
        arms[arm] = about_explored(model) | {"weights": found.weights, "text": shown}
    if not arms:
        raise StageError(f"no arm of {place.root}/trained has its weights here; train one with: "
                         f"{train_command(0, 'with_ltm', place)}")
    path = place.root / "trained" / "explored.json"
    title = "standard input" if name == "-" else Path(name).name
    write_json(path, {"name": title, **words_explored(tokenizer, tokens), "arms": arms})
    print(f"wrote {path} ({len(tokens):,} tokens; {', '.join(arms)}) in {time.time() - began:.0f} s; "
          f"next: {command('plot_eval.py', place.root, place.quick)}")


# ------------------------------------------------------------ controls

def altered(model, memory_class=None, model_class=None, **settings):
    """A model of the same weights, not copied, with another memory, as another class or
    with other settings.

    memory_class: a LongTermMemory of another kind, or what makes one of a config.
    """
    config = copy.deepcopy(model.config)
    config.update(settings)
    with torch.device("meta"):                                         # no weights of its own
        twin = (model_class or type(model))(config)
        if memory_class:
            twin.memory = memory_class(config)
    mine, weights = twin.state_dict().keys(), model.state_dict()
    shared = {name: weights[name] for name in mine if name != "backbone.rotary"}
    twin.load_state_dict(shared, strict=False, assign=True)
    if is_hosted(model):                                               # it has buffers that no state dict names
        twin.backbone = copy.deepcopy(model.backbone)
    twin = twin.to(model.device).eval()
    return twin.fuse() if model.fused else twin


def in_float32(model):
    """The same, all of it in float32: without the kernels and the table of bfloat16 weights."""
    return altered(model).float()


class OtherReads(LongTermMemory):
    """What is retrieved is changed: change(Reading) is another one."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change = change

    def read(self, final, asked=None):
        read, values, stored = super().read(final, asked)
        return self.change(read), values, stored


def reads_off(read):
    """Nothing is retrieved."""
    return Reading(*map(torch.zeros_like, read))


def exact_alone(read):
    """Learned addresses and rare words find nothing."""
    return only_exact(read.exact)


def learned_alone(read):
    """Exact addresses and rare words find nothing."""
    nothing = torch.zeros_like(read.exact)
    return read._replace(exact=nothing, words=nothing)


def only_exact(weight):
    """A Reading of these weights (N, C, I) alone."""
    nothing = torch.zeros_like(weight)
    return Reading(weight, nothing, nothing, None)


class RandomTokens(LongTermMemory):
    """Each token is stored with probability `rate`, whatever its surprisal."""

    def __init__(self, config, rate):
        super().__init__(config)
        self.rate = rate

    def route(self, log_p, targets):
        surprisal, _ = super().route(log_p, targets)
        generator = torch.Generator().manual_seed(FULL.seed)
        draw = torch.rand(targets.shape, generator=generator).to(targets.device)
        return surprisal, (targets != self.eot) & (draw < self.rate)


class ShuffledValues(LongTermMemory):
    """The values of the items of a sequence change places: at a key, there may even be one
    that is yet to come."""

    def candidates(self, address, targets, stored, opens=None):
        items = stored.flatten().nonzero()[:, 0]
        sequence = opens.flatten().cumsum(0)[items // targets.size(1)]
        generator = torch.Generator().manual_seed(FULL.seed)
        order = torch.randperm(len(items), generator=generator).to(items.device)
        order = order[sequence[order].argsort(stable=True)]
        values = targets.flatten().index_copy(0, items, targets.flatten()[items[order]])
        return super().candidates(address, values.view_as(targets), stored, opens)


class NeuralCache(LongTermMemory):
    """Grave et al. 2017: (1 - share) p_stm + share p_cache, p_cache = softmax_i(theta h_t .
    h_i) over the last tokens.

    That is the mixture of the LTM where the items, all tokens, weigh share / (1 - share)
    p_cache. The size is config.ltm_slots.
    """

    def __init__(self, config, theta, share):
        super().__init__(config)
        self.theta, self.share = theta, share

    def read(self, final, asked=None):
        h, targets = final.h, final.targets
        stored = targets != self.eot
        # only the key is asked for
        address = Address(*[targets] * len(Address._fields))._replace(key=h)
        items, values, *numbers = self.candidates(address, targets, stored, final.opens)
        match = self.theta * (h.float() @ items.key.float().mT)         # (N, C, I)
        # at the start there is none
        cache = match.masked_fill(~self.visible(self.ages(*numbers)), -math.inf).softmax(-1).nan_to_num()
        weight = self.share / (1 - self.share) * cache
        return only_exact(of_asked(weight, asked)), of_rows(values, asked), stored


def neural_cache(model, slots, theta, share=0.5):
    """A NeuralCache of that size on the backbone of a model."""
    memory = functools.partial(NeuralCache, theta=theta, share=share)
    return altered(model, memory, memory="ltm", memory_enabled=True, ltm_slots=slots)


@torch.no_grad()
def fit_cache(model, texts, slots, width, settings):
    """A neural_cache fitted to texts: theta on a grid, share exactly."""
    # h . h is n_embd: theta from 1 to 181 of it
    grid = [2 ** (power / 2) / model.config.n_embd for power in range(16)]
    variants = [neural_cache(model, slots, theta) for theta in grid]
    p, mixed = [], []
    for pack in packs(texts, width, model.device, settings):
        scores, real = score(pack, *variants), pack.targets != settings.eot
        p.append(scores[0].log_p_stm[real].cpu().double().exp())
        mixed.append(torch.stack([one.log_p[real] for one in scores]).cpu().double().exp())
    p, fits = torch.cat(p), []
    for theta, half in zip(grid, torch.cat(mixed, 1)):
        of_cache = 2 * half - p                             # where the cache is empty, that is p
        low, high = 0.0, 1.0
        for _ in range(30):                                 # the likelihood is concave in the share
            share = (low + high) / 2
            rises = ((of_cache - p) / (p + share * (of_cache - p))).mean() > 0
            low, high = (share, high) if rises else (low, share)
        fits.append(((p + low * (of_cache - p)).log().mean().item(), theta, low))
    _, theta, share = max(fits)
    return neural_cache(model, slots, theta, share)


class ExactOnly(LongTermMemory):
    """Nothing is learned: exact addresses have these log weights."""

    def __init__(self, config, trust):
        super().__init__(config)
        self.log_weights = trust

    def of_tokens(self, tokens, embed):
        return None

    def vectors(self, h, of_tokens, shift):
        nothing = h.new_zeros(*h.shape[:2], self.config.ltm_learned, self.config.ltm_dim)       # similar to nothing
        trust = torch.tensor(self.log_weights, device=h.device).expand(*h.shape[:2], -1)
        return Vectors(nothing, nothing, torch.nn.functional.pad(trust, (0, self.config.ltm_learned)))


def exact_only(model, trust):
    """The LTM with no learned part, on the backbone of a model: exact addresses alone, with
    these log weights."""
    memory = functools.partial(ExactOnly, trust=trust)
    return altered(model, memory, memory="ltm", memory_enabled=True, ltm_same=0.0, ltm_near=0.0, ltm_exact_fade=0.0)


@torch.no_grad()
def matches(model, texts, width, settings):
    """Of each target p_stm, and through one exact address at a time, how many items matched
    with its value and how many at all: (p (T,), right (T, E), every (T, E)), float64."""
    one_at_a_time = torch.eye(model.config.ltm_ngrams).log().tolist()
    alone = [exact_only(model, trust) for trust in one_at_a_time]
    seen = []
    for pack in packs(texts, width, model.device, settings):
        h, _ = states(model, pack)
        log_p, log_z = fast("log_p", model, pack, h, pack.targets)
        final = Final(h, pack.tokens, pack.targets, log_p, log_z, model.embed_detached, pack.opens)
        columns, real = [log_p.exp()], pack.targets != settings.eot
        for twin in alone:
            read, values, *_ = twin.memory.read(final)
            right = values[:, None] == pack.targets[..., None]
            columns += [torch.where(right, read.exact, 0.0).sum(-1), read.exact.sum(-1)]
        seen.append(torch.stack(columns, -1)[real].cpu().double())
    seen = torch.cat(seen)
    return seen[:, 0], seen[:, 1::2], seen[:, 2::2]


@torch.no_grad()
def fit_grams(model, texts, width, settings):
    """(model, log weights): `exact_only`, the log weights fitted to texts, one after the
    other and twice, on a grid."""
    p, right, every = matches(model, texts, width, settings)

    def likelihood(trust):
        weight = torch.tensor(trust).double().exp()
        return ((p + right @ weight) / (1 + every @ weight)).log().sum().item()

    best = [-2.0] * model.config.ltm_ngrams
    for n in [*range(len(best))] * 2:
        tried = [[*best[:n], float(weight), *best[n + 1:]] for weight in range(-7, 3)]
        best = max(tried, key=likelihood)
    return exact_only(model, best), best


class Scalars(NamedTuple):
    """All that is fitted of a Mixture."""

    trust: tuple                # log weight of an item found through the exact address of 1, 2, .. tokens
    cache: float                # log weight of the neural cache
    theta: float                # its sharpness
    slope: float                # by which all these grow with a nat of the entropy of p_stm


class Mixture(LongTermMemory):
    """What can be had of a model without training: exact addresses and the neural cache over the
    last config.ltm_slots tokens, both as far as the entropy of p_stm says that they are needed.

    p = (p_stm + e^(slope H) (sum_n e^trust_n matches_n + e^cache p_cache)) / what that sums to. A
    one-token address exists where that token was surprising, as the LTM's. `logits`: of the
    backbone's final states.
    """

    def __init__(self, config, logits, scalars):
        super().__init__(config)
        self.backbones_logits, self.scalars = logits, scalars

    def entropy(self, h):
        """Entropy of p_stm in nats, (N, C); some rows at a time, as there are 50,257 of each."""
        parts = [self.backbones_logits(rows).float().log_softmax(-1) for rows in h.split(8)]
        return torch.cat([-(log_p.exp() * log_p).sum(-1) for log_p in parts])

    def found(self, final):
        """What matches through each exact address (E of (N, C, I) bool), products of states (N, C,
        I), visible (N, C, I), values (N, I) and stored (N, C)."""
        h, targets, opens = final.h, final.targets, final.opens
        stored = targets != self.eot
        _, surprising = self.route(final.log_p, targets)
        grams = [lagged(final.tokens, lag, self.eot, opens) for lag in range(self.config.ltm_ngrams)]
        address = Address(*[targets] * len(Address._fields))._replace(
            grams=torch.stack(grams, -1), known=lagged(surprising, 1, False, opens), key=h)
        items, values, *numbers = self.candidates(address, targets, stored, opens)
        visible = self.visible(self.ages(*numbers))
        return self.matches(address, items, visible), h.float() @ items.key.float().mT, visible, values, stored

    def read(self, final, asked=None):
        matches, products, visible, values, stored = self.found(final)
        trust, cache, theta, slope = self.scalars
        weight = math.exp(cache) * (theta * products).masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
        weight = weight + sum(math.exp(one) * found for one, found in zip(trust, matches))
        weight = weight * (slope * self.entropy(final.h)).exp()[..., None]
        return only_exact(of_asked(weight, asked)), of_rows(values, asked), stored


def training_free(model, slots, scalars):
    """A Mixture of that many tokens on the backbone of a model."""
    memory = functools.partial(Mixture, logits=model.logits, scalars=scalars)
    return altered(model, memory, memory="ltm", memory_enabled=True, ltm_slots=slots)


@torch.no_grad()
def seen_of_mixture(model, texts, slots, thetas, width, settings):
    """What a Mixture's likelihood depends on, float64, a row a target: p_stm, entropy (T,); items
    found through each exact address, those of the right value and all (T, E); whether there is a
    cache (T,) and its probability of the target for each theta (T, thetas)."""
    twin, seen = training_free(model, slots, Scalars((0.0,) * model.config.ltm_ngrams, 0.0, 0.0, 0.0)), []
    for pack in packs(texts, width, model.device, settings):
        h, _ = states(model, pack)
        log_p, log_z = fast("log_p", model, pack, h, pack.targets)
        final = Final(h, pack.tokens, pack.targets, log_p, log_z, model.embed_detached, pack.opens)
        matches, products, visible, values, _ = twin.memory.found(final)
        right = values[:, None] == pack.targets[..., None]
        columns = [log_p.exp(), twin.memory.entropy(h)]
        columns += [(one & right).sum(-1) for one in matches] + [one.sum(-1) for one in matches] + [visible.any(-1)]
        for theta in thetas:
            cache = (theta * products).masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
            columns.append(torch.where(right, cache, 0.0).sum(-1))
        real = pack.targets != settings.eot
        seen.append(torch.stack([column[real].cpu().double() for column in columns], -1))
    E = model.config.ltm_ngrams
    p, entropy, right, every, there, cache = torch.cat(seen).split((1, 1, E, E, 1, len(thetas)), -1)
    return p[:, 0], entropy[:, 0], right, every, there[:, 0], cache


def fit_mixture(model, texts, slots, width, settings):
    """A training_free model fitted to texts: theta on a grid, the other scalars by gradient."""
    thetas = [2 ** (power / 2) / model.config.n_embd for power in range(16)]
    p, entropy, right, every, there, of_cache = seen_of_mixture(model, texts, slots, thetas, width, settings)
    fits = []
    for theta, cache in zip(thetas, of_cache.unbind(-1)):
        free = torch.tensor([-2.0] * right.size(1) + [-2.0, 0.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")

        def loss():
            *trust, share, slope = free.clamp(-12, 12)
            gate, trust = (slope * entropy).exp(), torch.stack(trust).exp()
            gained = gate * (right @ trust + share.exp() * cache)
            total = gate * (every @ trust + share.exp() * there)
            return ((1 + total) / (p + gained)).log().mean()

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        *trust, share, slope = free.detach().clamp(-12, 12).tolist()
        fits.append((loss().item(), Scalars(tuple(trust), share, theta, slope)))
    _, scalars = min(fits)
    return training_free(model, slots, scalars)


def ladder(model, group, setting, values):
    """[(group, name, model)]: the memory with other values of one of its settings, and with
    that of its training."""
    trained, found = getattr(model.config, setting), []
    for value in sorted({*values, trained}):
        name = "none" if value < -1 else f"{value:g}"
        if value == trained:
            found.append((group, f"{name} (as trained)", model))
        else:
            found.append((group, name, altered(model, **{setting: value})))
    return found


def memory_controls(model, rate):
    """[(group, name, model)]: the memory as trained, and with one thing changed in each."""
    def reads(change):
        return altered(model, functools.partial(OtherReads, change=change))

    def ladder_of(group, setting, *values):
        return ladder(model, group, setting, values)

    at_random = altered(model, functools.partial(RandomTokens, rate=rate))
    return [("reads", "as trained", model),
            ("reads", "reads off", reads(reads_off)),
            ("reads", "values shuffled", altered(model, ShuffledValues)),
            ("what is stored", "random tokens, same rate", at_random),
            ("what is stored", "every token", altered(model, ltm_surprisal_bits=-1)),
            *ladder_of("cosine threshold", "ltm_cosine", -2, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
            *ladder_of("surprisal threshold, bits", "ltm_surprisal_bits", 0, 2, 3, 4.5, 6, 8),
            *ladder_of("slots", "ltm_slots", 16, 64, 128, 256, 512, 1024),
            ("addresses", "exact ones only", reads(exact_alone)),
            ("addresses", "learned ones only", reads(learned_alone)),
            ("addresses", "no rare words", altered(model, ltm_same=0.0, ltm_near=0.0)),
            ("addresses", "rare words in their place only", altered(model, ltm_near=0.0))]


class Controls:
    """Rows of results.json, {"group", "name", "bpc_ratio", "recall", ..} each: what the
    gain depends on.

    Args:
        hybrid, baseline: the arms of one seed. of_baseline: bits of all texts by the second.
        rate: of storing, by the first. training: documents to fit on.
    """

    def __init__(self, hybrid, baseline, of_baseline, rate, training, exam):
        self.hybrid, self.baseline = hybrid, baseline
        self.of_baseline, self.rate = of_baseline, rate
        self.training, self.exam = training, exam
        self.window = hybrid.config.stm_window
        self.block, most = [], exam.settings.control_trials
        for (_, distance, extra), cell in exam.asked.items():
            if distance in exam.far and not extra:
                self.block += cell[:most]
        self.found = []

    def shape(self, width):
        """Of a pack of about as many tokens, whatever the width: one row a sequence, where
        it is not the window."""
        if width == self.window:
            return None
        return max(1, self.exam.settings.pack * self.window // width), 1

    @torch.no_grad()
    def compression(self, variants, width):
        """bpc_ratio, hit_rate and stored of models of one backbone."""
        totals, texts, settings = np.zeros((len(variants), 4)), self.exam.texts, self.exam.settings
        for pack in packs(texts, width, self.hybrid.device, settings, self.shape(width)):
            real = pack.targets != settings.eot
            for total, one in zip(totals, score(pack, *variants)):
                nats = -one.log_p[real].cpu().double().sum().item()
                counts = [int(x[real].sum()) for x in (one.hit, one.stored)]
                total += int(real.sum()), nats / math.log(2), *counts
        return [{"bpc_ratio": cost / self.of_baseline, "hit_rate": hits / targets,
                 "stored": stored / targets} for targets, cost, hits, stored in totals]

    def recall(self, variants, width, wiped=False):
        """recall, top1 and value_nats of models of one backbone."""
        shape, trials = self.shape(width), len(self.block)
        rows = []
        for answers in answer(variants, self.block, width, self.exam.settings, wiped, shape):
            right, top, *_ = answers.outcomes
            rows.append({"recall": float(right.mean()),
                         "recall_ci95": wilson(int(right.sum()), trials),
                         "top1": float(top.mean()),
                         "value_nats": float(answers.value_nats.mean(dtype=np.float64)),
                         "trials": trials})
        return rows

    def add(self, table, width=None, question=None):
        """Rows for [(group, name, model)]; each model once, and all with the first one's backbone.

        width, question: of the rows that texts and questions are laid out in; None: the window.
        """
        models = list({id(model): model for _, _, model in table}.values())
        compression = self.compression(models, width or self.window)
        recall = self.recall(models, question or self.window)
        found = {id(model): one | other for model, one, other in zip(models, compression, recall)}
        self.found += [{"group": group, "name": name, **found[id(model)]}
                       for group, name, model in table]

    def add_other(self, name, model, width=None, question=None, **fitted):
        """A row for another model, and what was fitted of it."""
        self.add([("other models", name, model)], width, question)
        self.found[-1] |= fitted

    def rows(self):
        """All of them."""
        hybrid, baseline, window = self.hybrid, self.baseline, self.window
        longest = max(map(len, self.exam.texts))
        self.add(memory_controls(hybrid, self.rate))
        wiped, = self.recall([hybrid], window, wiped=True)
        name = "memory wiped between fact and question"
        self.found.insert(2, {"group": "reads", "name": name, "bpc_ratio": None, **wiped})
        self.training_free()
        question = max(len(question.tokens) for question in self.block)
        positions = max(longest, question)
        gpt = altered(baseline, model_class=GPT, stm_window=None, n_positions=positions)
        self.add_other(f"GPT, full attention (trained at {window})", gpt, longest, question)
        return self.found

    def training_free(self):
        """Rows for what is fitted on the frozen baseline."""
        baseline, texts = self.baseline, self.training
        rest, longest = (self.window, self.exam.settings), max(map(len, self.exam.texts))
        for slots in (baseline.config.ltm_slots, longest):
            cache = fit_cache(baseline, texts, slots, *rest)
            fitted = {"theta": cache.memory.theta, "share": cache.memory.share}
            self.add_other(f"neural cache on the baseline, {slots:,} tokens", cache, **fitted)
            mixture = fit_mixture(baseline, texts, slots, *rest)
            self.add_other(f"six scalars, no training, {slots:,} tokens", mixture,
                           scalars=mixture.memory.scalars._asdict())
        grams, trust = fit_grams(baseline, texts, *rest)
        self.add_other("exact addresses on the baseline", grams, log_weights=trust)
        return self.found


def texts_to_fit(place, settings):
    """The documents of train.bin that something is fitted to: a list of (n,) int64 arrays."""
    rows, _ = load_split(place.root, "train", place.quick)
    return [text for text in documents(rows, settings.eot) if len(text) > 1][:settings.fitted]


def measured_controls(evidence, meta, place):
    """The rows of Controls of the LTM's first seed, from their file or, where that does not
    hold, measured and written."""
    exam, seed = evidence.exam, evidence.seeds["with_ltm"][0]
    path = arm_folder(place.root, seed, "with_ltm") / f"controls{place.name}.json"
    arms = {arm: evidence.measured[arm, seed] for arm in SPECIFIED}
    expected = {"weights": {arm: one.facts["weights"] for arm, one in arms.items()},
                "configs": {arm: one.facts["config"] for arm, one in arms.items()},
                "code": code_of(None),
                "data": exam.identity | {"train": meta["splits"]["train"]["sha256"]},
                "evaluation": jsonable(exam.settings)}
    try:
        kept = read_json(path, "eval.py --controls")
    except StageError:
        kept = {}
    holds = all(kept.get(name) == wanted for name, wanted in expected.items())
    if holds and kept.get("sha256") == seal(kept):
        return kept["rows"]
    print(f"measuring the controls of {path.parent.relative_to(place.root)}", flush=True)
    baseline, hybrid = (load_controlled(one, seed, arm, place) for arm, one in arms.items())
    if is_hosted(hybrid):
        raise StageError("--controls changes this project's own backbone, and these arms have that of "
                         "another model; leave --controls out")
    training = texts_to_fit(place, exam.settings)
    of_baseline = bits(arms[REFERENCE].tensors["log_p"]).sum()
    rate = float(arms["with_ltm"].tensors["stored"].mean())
    controls = Controls(hybrid, baseline, of_baseline, rate, training, exam)
    kept = expected | {"rows": controls.rows()}
    write_json(path, kept | {"sha256": seal(kept)})
    return kept["rows"]


def load_controlled(measured, seed, arm, place):
    """The model of an arm that is here with the weights that were measured; else StageError."""
    found = find_arm(seed, arm, place)
    if found.source is None or found.weights != measured.facts["weights"]:
        raise StageError(f"the weights of {found.folder} that were measured are not here, and --controls "
                         f"needs them; put them back, or leave --controls out")
    return load_arm(seed, arm, place)[0]


# ------------------------------------------------------------ the study

USUAL = "baseline_x1", "with_ltm_x1"    # of the study: trained as the two arms are


def settings_in_study(name, usual, width):
    """What a training of the study has to have been made with, given the settings of USUAL[0] and
    the width of its rows."""
    arm = STUDY[name]
    return usual | dict(steps=arm.steps_of(usual["steps"]), batch=arm.batch_of(usual["batch"], width)) | arm.training


def of_study(exam, meta, place):
    """Evidence of all of the study that is trained, USUAL[0] as the reference; raises StageError
    where that is missing, or where one was trained on other data, not to its end, or otherwise than
    the study has it."""
    there = [name for name in STUDY if (arm_folder(place.root, 0, name) / "manifest.json").is_file()]
    every = {name: find_arm(0, name, place) for name in dict.fromkeys([USUAL[0], *there])}
    measured, usual = {}, shared_settings(every[USUAL[0]])
    for name, found in every.items():
        if found.settings.get("data") != meta["splits"]["train"]["sha256"]:
            raise StageError(f"{name} was trained on other data than {place.root}/data now holds; train again: "
                             f"{train_command(0, name, place, found.settings)} --fresh")
        if found.step != found.settings.get("steps"):
            raise StageError(f"{name} is at step {found.step} of {found.settings.get('steps')}; go on with: "
                             f"{train_command(0, name, place, found.settings)} --resume")
        wanted = settings_in_study(name, usual, meta["window"])
        if differing := sorted(key for key, value in wanted.items() if found.settings.get(key) != value):
            raise StageError(f"{name} was trained otherwise than {USUAL[0]} ({', '.join(differing)}); train again: "
                             f"{train_command(0, name, place, wanted)} --fresh")
        _, measured[REFERENCE if name == USUAL[0] else name, 0] = measured_arm(found, exam, place)
    return Evidence(measured, {name: (0,) for name, _ in measured}, exam)


def rows_of_study(evidence, place):
    """One row for each training of the study: what it is, its bits, its recall inside the window and
    beyond it."""
    whole, alone = summarise_bpc(evidence)
    asked = Recall(evidence)
    far, window = evidence.exam.far, evidence.first(REFERENCE).facts["window"]
    near = asked.at([distance for distance in evidence.exam.distances if distance <= window])
    rows = []
    for key in evidence.seeds:
        name, facts = USUAL[0] if key == REFERENCE else key, evidence.first(key).facts
        its, part = STUDY[name], whole[key]
        same = {"ratio": 1.0, "difference": {"mean": 0.0, "ci95": [0.0, 0.0]}, "verdict": ""}
        rows.append({"name": name, "group": its.group, "label": its.label, "memory": its.memory or "",
                     "steps": facts["step"], "parameters": facts["parameters"], "window": facts["window"],
                     "lr": facts["training"]["lr"], "bpc": part["per_seed"][0],
                     **{field: part.get(field, none) for field, none in same.items()},
                     "bpc_windows": alone[key]["per_seed"][0],
                     "recall": asked.share(key, "forced_choice", asked.at(far)),
                     "recall_inside": asked.share(key, "forced_choice", near) if near else None,
                     "top1": asked.share(key, "top1", asked.at(far))["mean"],
                     **summarise_hits(evidence, key),
                     "training": summarise_training([arm_folder(place.root, 0, name)])})
    return rows


def curve_of(rows):
    """What both arms reach over steps: {"steps", "baseline", "with_ltm" (bits), "ratio"}; and the
    steps at which the baseline comes to the bits that the LTM has after the usual ones: None where
    it does not in what was trained."""
    both = {}
    for row in rows:
        if row["group"] == "steps":
            both.setdefault(row["steps"], {})[bool(row["memory"])] = row["bpc"]
    pairs = sorted((steps, *(one[memory] for memory in (False, True))) for steps, one in both.items() if len(one) == 2)
    steps, base, memory = map(list, zip(*pairs)) if pairs else ([], [], [])
    wanted = next((row["bpc"] for row in rows if row["name"] == USUAL[1]), None)
    reaches = None
    for at in range(1, len(steps)):
        if wanted is not None and base[at] <= wanted < base[at - 1]:        # a straight line over the steps' logarithm
            share = (base[at - 1] - wanted) / (base[at - 1] - base[at])
            reaches = steps[at - 1] * (steps[at] / steps[at - 1]) ** share
    return {"steps": steps, "baseline": base, "with_ltm": memory,
            "ratio": [one / other for one, other in zip(memory, base)], "baseline_reaches": reaches}


def study(exam, meta, place):
    """results_study.json: a row for each training, the curve over steps, and what is had without training."""
    evidence = of_study(exam, meta, place)
    rows = rows_of_study(evidence, place)
    baseline, _ = load_arm(0, USUAL[0], place)
    texts = texts_to_fit(place, exam.settings)
    of_baseline = bits(evidence.first(REFERENCE).tensors["log_p"]).sum()
    free = Controls(baseline, baseline, of_baseline, 0.0, texts, exam).training_free()
    return {"rows": rows, "curve": curve_of(rows), "training_free": free,
            "detail": {"data": about_data(exam, meta), "run": about_run(evidence),
                       "arms": {REFERENCE: {"parameters": evidence.first(REFERENCE).facts["parameters"]}},
                       "chance": 1 / exam.settings.facts, "distances": exam.far}}


def print_study(results):
    """A line a training."""
    print(f"\n{'':46}{'steps':>8}{'bpc':>9}{'x':>8}{'recall':>8}{'inside':>8}{'top-1':>8}")
    for row in results["rows"]:
        inside = f"{row['recall_inside']['mean']:8.3f}" if row["recall_inside"] else f"{'-':>8}"
        print(f"{row['group']:15}{row['label'][:31]:31}{row['steps']:8,}{row['bpc']:9.4f}{row['ratio']:8.4f}"
              f"{row['recall']['mean']:8.3f}{inside}{row['top1']:8.3f}")
    print_controls(results["training_free"])
    reaches = results["curve"]["baseline_reaches"]
    said = f"after {reaches:,.0f} steps" if reaches else "in none of these trainings"
    print(f"\nthe baseline reaches the LTM's bits of the usual steps {said}")


# ------------------------------------------------------------ which documents

PARTS = {                       # what eval.py says of the documents
    WHOLE: "all of val.bin: too few documents for parts",
    CHOOSING: "the choosing part of val.bin: never reported; for that: python eval.py --report",
    REPORTED: "the reported part of val.bin: look at it when nothing is to be chosen any more",
}


def documents_of(rows, part, eot=EOT):
    """The rows of a part's documents; every FOURTH document, from the first on, is of the choosing part."""
    document = np.cumsum(rows[:, 0] == eot) - 1
    chosen = document % FOURTH == 0
    return rows[{WHOLE: slice(None), CHOOSING: chosen, REPORTED: ~chosen}[part]]


def open_documents(args, root):
    """(rows, meta, settings, Place) of the documents that the flags name; raises StageError where
    they are missing or damaged."""
    device, meta = pick_device(), read_meta(root, command("prepare_data.py", root, args.quick))
    settings = dataclasses.replace(QUICK if args.quick else FULL, eot=meta["eot"])
    if args.on:
        rows, own = load_own(root, args.on, args.quick)
        meta = meta | {"source": own["source"], "splits": meta["splits"] | {"val": own["split"]}}
        place = Place(root, args.quick, device, f" --on {args.on}", f"_on_{args.on}")
        return rows, meta, settings.of_part(REPORTED), place
    rows, _ = load_split(root, "val", args.quick)
    part = REPORTED if args.report else CHOOSING
    if (rows[:, 0] == meta["eot"]).sum() < FOURTH:
        part = WHOLE
    flags = " --report" if args.report else ""
    place = Place(root, args.quick, device, flags, "_choosing" if part == CHOOSING else "")
    return documents_of(rows, part, meta["eot"]), meta, settings.of_part(part), place


# ------------------------------------------------------------ what is said

def print_controls(rows):
    """Each control's bits per character by the baseline's, its recall (forced choice and
    top-1), and what it stores."""
    print(f"\n{'':70}{'x bpc':>8}{'recall':>8}{'top-1':>8}{'stored':>8}")
    for group, part in itertools.groupby(rows, lambda row: row["group"]):
        for row, head in zip(part, itertools.chain([group], itertools.repeat(""))):
            numbers = [row.get(field) for field in ("bpc_ratio", "recall", "top1", "stored")]
            shown = ["-" if number is None else f"{number:.3f}" for number in numbers]
            print(f"{head:27}{row['name']:43}" + "".join(f"{number:>8}" for number in shown))


def with_interval(value, bounds, form):
    """A value and its interval: "+0.875 [+0.731, +0.949]"."""
    low, high = bounds
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def differences(results, arm):
    """[(metric, difference from the baseline with its interval, verdict)] of one arm."""
    detail = results["detail"]
    far, speed = detail["recall"]["long_range"]["arms"][arm], detail["tokens_per_sec"][arm]
    lines = []
    for name, part in (("bpc", detail["bpc"]), ("bpc, windows alone", detail["bpc_windows"])):
        part = part[arm]
        gap = with_interval(part["difference"]["mean"], part["difference"]["ci95"], "+.4f")
        lines.append((name, gap, f"{part['verdict']}, x {part['ratio']:.4f}"))
    gap = with_interval(far["difference"]["mean"], far["difference"]["ci95"], "+.3f")
    chance = detail["recall"]["chance"]
    lines.append(("long_range_recall", gap, f"{far['verdict']}, chance {chance:.3f}"))
    if "ratio" in speed:                                    # an arm without a memory has none to switch off
        gap = "x " + with_interval(speed["ratio"], speed["ratio_ci95"], ".3f")
        says = f"{speed['verdict']}, by the same model with its memory off"
        lines.append(("tokens_per_sec", gap, says))
    return lines


def print_indirect(detail, arms):
    """Forced choice of the questions that word the fact otherwise, beyond the window, and what the
    memory costs where it does not help."""
    indirect = detail["indirect"]
    if indirect and indirect["long_range"]:
        print(f"\nright value among {1 / indirect['chance']:.0f}, beyond the window")
        for kind in next(iter(indirect["arms"].values())):
            if kind == "matrix":
                continue
            shares = [indirect["arms"][arm][kind]["long_range"]["forced_choice"] for arm in arms]
            print(f"{kind:20}" + "".join(f"{share:>12.3f}" for share in shares))
    for arm, part in detail["calibration"]["arms"].items():
        new = part["by_kind"][KINDS[0]]
        said = f"; new words {new['mean']:+.3f} bits" if new else ""
        if part["oracle"]:
            said += f"; an oracle for a gate: x {part['oracle']['ratio']:.4f}"
        print(f"\n{arm}: {part['worse']:.1%} of tokens got dearer, {part['much_worse']:.1%} by more than "
              f"{detail['calibration']['much']} bits{said}")


def print_table(results):
    """The four numbers of each arm, two more, and what the differences from the baseline say."""
    detail = results["detail"]
    arms = list(detail["arms"])
    far, windows = detail["recall"]["long_range"]["arms"], detail["bpc_windows"]
    values = {"bpc": (".4f", [results[arm]["bpc"] for arm in arms]),
              "bpc, windows alone": (".4f", [np.mean(windows[arm]["per_seed"]) for arm in arms]),
              "long_range_recall": (".3f", [results[arm]["long_range_recall"] for arm in arms]),
              "top-1 recall": (".3f", [far[arm]["top1"] for arm in arms]),
              "memory_hit_rate": (".3f", [results[arm]["memory_hit_rate"] for arm in arms]),
              "tokens_per_sec": (",.0f", [results[arm]["tokens_per_sec"] for arm in arms])}
    print(f"\n{'':20}" + "".join(f"{arm:>12}" for arm in arms))
    for name, (form, numbers) in values.items():
        print(f"{name:20}" + "".join(f"{number:>12{form}}" for number in numbers))
    for arm in arms:
        if arm == REFERENCE:
            continue
        print(f"\n{arm} - {REFERENCE}, 95% interval")
        for name, gap, says in differences(results, arm):
            print(f"  {name:20}{gap:28} {says}")


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--controls", action="store_true",
                        help="also measure what the gain depends on (first seed)")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--report", action="store_true",
                       help="the reported part of val.bin, for publication (default: the choosing part)")
    asked.add_argument("--on", type=own_name, metavar="NAME",
                       help="documents of your own (prepare_data.py --into NAME)")
    asked.add_argument("--explore", metavar="FILE",
                       help="show what the trained arms make of this text instead; -: standard input")
    parser.add_argument("--study", action="store_true",
                        help="what else would have bought the gain: the trainings of ./run_all.sh --study")
    args = parser.parse_args(argv)
    if args.study and (args.controls or args.on or args.explore):
        parser.error("--study goes without --controls, --on and --explore")
    if args.explore and args.controls:
        parser.error("--explore measures nothing: it goes without --controls")
    began, root = time.time(), default_root(args.root, args.quick)
    if args.explore:
        explore(args.explore, Place(root, args.quick, pick_device()), QUICK if args.quick else FULL)
        return
    tokenizer = load_tokenizer(root, args.quick)
    rows, meta, settings, place = open_documents(args, root)
    if args.study:
        results = study(make_exam(root, rows, meta, tokenizer, settings, args.quick), meta, place)
        write_json(root / "results_study.json", results)
        print_study(results)
        print(f"wrote {root / 'results_study.json'} in {time.time() - began:.0f} s; next: "
              + command("plot_eval.py --study", root, args.quick))
        return
    arms = trained_arms(place.root)
    if args.controls and "with_ltm" not in arms:
        raise StageError(f"--controls asks about with_ltm, which is not here; train it with: "
                         f"{train_command(0, 'with_ltm', place)}")
    exam = make_exam(place.root, rows, meta, tokenizer, settings, args.quick)
    tokens = sum(len(text) - 1 for text in exam.texts)
    which = f"data/{args.on}.bin" if args.on else PARTS[settings.part]
    print(f"{len(exam.texts):,} documents, {tokens:,} tokens ({which}); {', '.join(arms)}; "
          f"seeds {list(arms[REFERENCE])}; on {place.device}", flush=True)
    measured, arms = gather(exam, meta, place)
    evidence = Evidence(measured, arms, exam)
    results = assemble(evidence, meta, place.root)
    if args.controls:
        results["detail"]["controls"] = measured_controls(evidence, meta, place)
        print_controls(results["detail"]["controls"])
    path = root / (f"results{place.name}.json" if args.on else "results.json")
    write_json(path, results)
    print_table(results)
    print_indirect(results["detail"], list(results["detail"]["arms"]))
    following = command("plot_eval.py", root, args.quick)
    if args.on:                                             # plot_eval.py draws results.json alone
        following = f"read {path}, where the intervals stand under detail; nothing draws it"
    print(f"wrote {path} in {time.time() - began:.0f} s; next: {following}")


if __name__ == "__main__":
    run_stage(main)
