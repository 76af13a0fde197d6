"""models.py: both forms of both memories against a slow, literal reference, and what no change to them may break.

Small models with a small vocabulary, so that whole distributions are cheap; weights drawn so that they act like trained
ones: about half the tokens are stored, every kind of address finds some, and what is found outweighs the backbone.
"""

import ast
import copy
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import add_memory
import models
import stages
from models import GPT, SIZES, Final, RevenaConfig, RevenaHybridTiny, Vectors
from stages import StageError, load_model

VOCAB, WINDOW, SLOTS = 97, 16, 12
EOT = VOCAB - 1
LENGTH = 100                    # several windows, and several times as many stored items as there are slots
CLOSE = dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary():
    """Let <|endoftext|> be the last of VOCAB tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "EOT", EOT)
        yield


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def config(**settings):
    small = dict(vocab_size=VOCAB, n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_learned_fade=0.6)
    busy = dict(ltm_slots=SLOTS, ltm_surprisal_bits=7.0, ltm_sharpness=5.0, ltm_plausibility=0.3, ltm_hidden=24,
                ltm_rare_bits=8.0, ltm_near=0.2)
    return RevenaConfig(**small | busy | settings)


@torch.no_grad()
def enliven(model, spread=0.12):
    """Draw weights that keep the memory busy (see this file's docstring); the larger `spread`, the surer the model."""
    for p in model.backbone.blocks.parameters():
        p.mul_(6)
    model.backbone.embed.weight.normal_(std=spread)
    memory = model.memory
    from_state, from_tokens = memory.from_state.weight, memory.from_tokens.weight
    from_state.normal_(std=0.09)
    address = memory.sizes[0]
    from_state[memory.width:memory.width + address] *= 0.3      # what has read the token filed
    from_state[memory.width + address:].normal_(std=0.2)        # hidden units
    from_tokens.normal_(std=0.09)
    from_tokens[:address] *= 0.7                                # the token filed
    memory.from_hidden.weight.normal_(std=0.1)
    return model


def lively(seed=21, **settings):
    """A busy RevenaHybridTiny."""
    torch.manual_seed(seed)
    return enliven(RevenaHybridTiny(config(**settings)).eval())


class Alike(models.LongTermMemory):
    """All positions look for the same, are filed under it and trust it."""

    def vectors(self, *given):
        found = super().vectors(*given)
        same = torch.full_like(found.query, found.query.size(-1) ** -0.5)
        return Vectors(same, same, torch.ones_like(found.trust))


def everything_matches(**settings):
    """A model whose LTM stores every token, and in which all cosines are 1 and old items weigh as new ones."""
    model = lively(**dict(ltm_surprisal_bits=0.0, ltm_exact_fade=0.0, ltm_learned_fade=0.0) | settings)
    for weight in (*model.memory.parameters(),):
        weight.zero_()
    model.memory.__class__ = Alike
    return model


def text(length=LENGTH, seed=0):
    """(1, length) tokens: five phrases said again and again, and now and then two stray tokens, <|endoftext|> too."""
    draw = torch.Generator().manual_seed(seed)

    def number(below):
        return int(torch.randint(0, below, (1,), generator=draw))

    phrases = [[number(EOT) for _ in range(5)] for _ in range(5)]
    tokens = []
    while len(tokens) < length:
        tokens += phrases[number(5)] if number(4) else [number(VOCAB), number(VOCAB)]
    tokens[length // 2] = EOT
    return torch.tensor([tokens[:length]])


def lane_of(*sequences, rows=None):
    """Sequences (1, T) of any length as one lane: tokens, targets (rows, WINDOW) each, opens (1, rows).

    A lane of more `rows` than they fill is filled up with sequences of nothing.
    """
    tokens, targets, opens = [], [], []
    for ids in sequences:
        after = F.pad(ids[:, 1:], (0, 1), value=EOT)
        room = -ids.size(1) % WINDOW
        tokens.append(F.pad(ids, (0, room), value=EOT).view(-1, WINDOW))
        targets.append(F.pad(after, (0, room), value=EOT).view(-1, WINDOW))
        opens.append(torch.arange(len(tokens[-1])) == 0)
    tokens, targets, opens = (torch.cat(parts) for parts in (tokens, targets, opens))
    spare = (rows or len(tokens)) - len(tokens)
    tokens, targets = (F.pad(x, (0, 0, 0, spare), value=EOT) for x in (tokens, targets))
    return tokens, targets, F.pad(opens, (0, spare), value=True)[None]


def read(model, tokens, targets, opens):
    """What every position of the rows retrieves: what the LTM's `read` returns."""
    h, _ = model.states(tokens, opens)
    return model.memory.read(Final(h, tokens, targets, *model.log_p(h, targets), model.embed_detached, opens))


def backbone_log_p(model, tokens, opens=None):
    """(N, C, V) what the backbone alone says."""
    return model.logits(model.states(tokens, opens)[0]).log_softmax(-1)


def per_target(scores):
    """The tensors of some Scores, without what stands for the whole."""
    return scores[:5]


def streamed(model, ids, sizes, cache=None):
    """Log-probabilities (B, T, V) and the cache after reading `ids` in blocks of these sizes, again and again."""
    cache = cache or model.new_cache()                      # a cache is true, however little it has read
    parts, at, turn = [], 0, 0
    while at < ids.size(1):
        size = sizes[turn % len(sizes)]
        parts.append(model(ids[:, at:at + size], past_key_values=cache).logits)
        at, turn = at + size, turn + 1
    return torch.cat(parts, 1), cache


def held_by(cache, sequence=0):
    """[(token, position)] of what a cache holds."""
    return [(item["token"], item["position"]) for item in cache.contents(sequence=sequence)]


# ------------------------------------------------------------------------------------ the reference, in float64

def rms(x):
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def reference_states(model, ids, window):
    """Final states (T, D) of one sequence (T,): each position attends, by itself, to the last `window`."""
    D, heads = model.config.n_embd, model.config.n_head
    T, half = len(ids), D // heads // 2
    speed = 10_000.0 ** (-torch.arange(half).double() / half)
    turns = torch.outer(torch.arange(T).double(), speed)
    turn = torch.polar(torch.ones_like(turns), turns)[:, None]          # (T, 1, D/H/2)

    def rotated(x):                                         # absolute positions; only differences can matter
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((y.real, y.imag), -1)

    def gelu(y):
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))

    x = rms(model.backbone.embed.weight.double()[ids])
    for block in model.backbone.blocks:
        qkvg, out, up, down = (m.weight.double() for m in (block.qkvg, block.out, block.up, block.down))
        y = rms(x) @ qkvg.T
        q, k, v = (y[:, i * D:(i + 1) * D].view(T, heads, -1) for i in range(3))
        q, k = rotated(rms(q)), rotated(rms(k))
        gate = 2 / (1 + (-y[:, 3 * D:3 * D + heads, None]).exp())
        heads_out = torch.zeros_like(v)
        for t in range(T):
            past = slice(max(0, t - window + 1), t + 1)
            share = (torch.einsum("hd,shd->sh", q[t], k[past]) / math.sqrt(2 * half)).softmax(0)
            heads_out[t] = torch.einsum("sh,shd->hd", share, v[past])
        x = x + (heads_out * gate).reshape(T, D) @ out.T
        x = x + gelu(rms(x) @ up.T) @ down.T
    return rms(x)


def reference_backbone(model, ids, window):
    """(T, V) log p of the backbone alone, for one sequence (T,)."""
    embed = model.backbone.embed.weight.double()
    return (reference_states(model, ids, window) @ embed[:model.config.vocab_size].T).log_softmax(-1)


class ReferenceLTM:
    """One sequence (T,), token by token, with a list of items: what the LTM claims to compute, said again slowly."""

    def __init__(self, model, ids):
        self.config, self.sizes, self.ids = model.config, model.memory.sizes, ids
        D, E = model.config.n_embd, model.config.ltm_ngrams
        self.h = reference_states(model, ids, model.config.stm_window)
        self.embed = model.backbone.embed.weight.double()
        self.stm = (self.h @ self.embed[:model.config.vocab_size].T).log_softmax(-1)
        memory = model.memory
        self.own, self.after = self.of_state(memory).split((memory.width, self.sizes[0]), 1)
        self.ahead, self.by_lag = memory.from_tokens.weight.double().split((self.sizes[0], E * memory.width))
        self.by_lag = self.by_lag.view(E, -1, D)
        K, learned = model.config.ltm_learned, model.config.ltm_learned_fade
        self.fade = [model.config.ltm_exact_fade] * E + [learned * (1 - k / K) for k in range(K)]
        self.bits = [0.0] * (len(ids) + 1)                  # the last: before the start
        self.held = deque(maxlen=model.config.ltm_slots)
        self.count = 0

    def of_state(self, memory):
        """(T, ..) what a state says of its own position, and of the one before."""
        first, second = memory.from_state.weight.double(), memory.from_hidden.weight.double()
        linear, hidden = (self.h @ first.T).split((memory.width + self.sizes[0], self.config.ltm_hidden), -1)
        return linear + F.linear(F.gelu(hidden), second)

    def token(self, t):
        return int(self.ids[t]) if t >= 0 else EOT

    def known(self, token):
        return rms(self.embed[token]) * (token != EOT)

    def rare(self, t):
        """The last tokens where they are rare words, else None."""
        lags = range(self.config.ltm_ngrams)
        return [self.token(t - lag) if t >= lag and self.bits[t - lag] > self.config.ltm_rare_bits else None
                for lag in lags]

    def parts(self, y):
        """What is linear in a position: unit addresses (K, A), trust."""
        address, trust = y[:sum(self.sizes)].split(self.sizes)
        learned = address.view(self.config.ltm_learned, -1)
        return learned / learned.norm(dim=-1, keepdim=True), trust

    def position(self, t):
        """What position t says of itself, and its exact addresses: the last one, two, .. tokens, or None."""
        y = self.own[t]
        for lag, part in enumerate(self.by_lag):
            y = y + part @ self.known(self.token(t - lag))
        grams = [tuple(self.token(t - lag) for lag in range(n + 1)) for n in range(self.config.ltm_ngrams)]
        stored = self.bits[t] > self.config.ltm_surprisal_bits
        return y, [grams[0] if stored else None, *grams[1:]]

    def write(self, t):
        """The token that has just come, filed under the state before it; whether it was stored."""
        token = self.token(t)
        if t > 0 and token != EOT:
            self.bits[t] = -float(self.stm[t - 1, token]) / math.log(2)
        stored = self.bits[t] > self.config.ltm_surprisal_bits
        if stored:
            y, exact = self.position(t - 1)
            v = self.ahead @ self.known(token) + self.after[t]
            learned = (y[:self.sizes[0]] + v).view(self.config.ltm_learned, -1)
            key = [*exact, *(k / k.norm() for k in learned)]
            self.held.append(dict(key=key, value=token, bits=self.bits[t], position=t,
                                  rare=self.rare(t - 1), number=self.count))
            self.count += 1
        return stored

    def cosine(self, head, query, key):
        if head >= self.config.ltm_ngrams:
            return float(query @ key)
        return float(query is not None and query == key)

    def weight(self, t, head, item, cosine, trust):
        """What an item that one head retrieved weighs."""
        c, E, age = self.config, self.config.ltm_ngrams, self.count - item["number"]
        score = float(trust[head]) - self.fade[head] * math.log(age)
        if head >= E:
            score += c.ltm_sharpness * (cosine - 1)
            score += c.ltm_plausibility * float(self.stm[t, item["value"]])
        return math.exp(min(score, 10))

    def by_words(self, t, item):
        """What an item weighs for the rare words that it has in common with position t."""
        c, weight = self.config, 0.0
        for a, asked in enumerate(self.rare(t)):
            for b, filed in enumerate(item["rare"]):
                if asked is not None and asked == filed:
                    weight += c.ltm_same if a == b else c.ltm_near
        return weight * (self.count - item["number"]) ** -c.ltm_rare_fade

    def read(self, t):
        """Position t's: log p, weight through (exact addresses, rare words, learned ones), and {where a retrieved item
        stood: cosine}."""
        E, V = self.config.ltm_ngrams, self.stm.size(1)
        y, exact = self.position(t)
        learned, trust = self.parts(y)
        weights, by, found = torch.zeros(V).double(), [0.0, 0.0, 0.0], {}
        for item in self.held:
            for head, (query, key) in enumerate(zip([*exact, *learned], item["key"], strict=True)):
                cosine = self.cosine(head, query, key)
                if cosine > self.config.ltm_cosine:
                    by[2 * (head >= E)] += (one := self.weight(t, head, item, cosine, trust))
                    weights[item["value"]] += one
                    found[item["position"]] = max(cosine, found.get(item["position"], 0.0))
            if word := self.by_words(t, item):
                by[1] += word
                weights[item["value"]] += word
                found[item["position"]] = 1.0
        return ((self.stm[t].exp() + weights) / (1 + weights.sum())).log(), by, found


@torch.no_grad()
def reference(model, ids):
    """What the model claims to say of one sequence (T,).

    Returns: dict of (T, V) tables log_p, stm (the backbone's); and of lists by position: stored (was x_t?), hit, by
    (weight through exact addresses, rare words, learned addresses), found ({where a retrieved item stood: cosine}),
    items (all that were held: token, bits, position).
    """
    slow = ReferenceLTM(model, ids)
    names = ("stored", "log_p", "by", "found", "items")
    out = {name: [] for name in names}
    for t in range(len(ids)):
        stored = slow.write(t)
        items = [(item["value"], item["bits"], item["position"]) for item in slow.held]
        for name, entry in zip(names, (stored, *slow.read(t), items), strict=True):
            out[name].append(entry)
    hit = [sum(by) / (1 + sum(by)) >= model.config.ltm_share for by in out["by"]]
    return out | {"log_p": torch.stack(out["log_p"]), "stm": slow.stm, "hit": hit}


@pytest.fixture(scope="module")
def case():
    """A busy model, a text, and what the reference makes of it; checked to exercise each branch."""
    model, ids = lively(), text()
    truth = reference(model, ids[0])
    assert 3 * SLOTS < sum(truth["stored"]) < 0.9 * LENGTH, "more than the slots hold, but not every token"
    assert 0.2 < sum(truth["hit"]) / LENGTH < 0.95
    for through in zip(*truth["by"]):
        assert sum(weight > 0.05 for weight in through) > LENGTH // 10, "each kind of address must matter"
    assert sum((truth["log_p"] - truth["stm"]).abs().amax(-1) > 1) > LENGTH // 4, "reading must matter"
    return model, ids, truth


# ------------------------------------------------------------------------------------ one function, three forms

def test_parallel_form_is_the_reference(case):
    """`forward` gives the probabilities of the literal, item by item computation, far beyond window and eviction."""
    model, ids, truth = case
    torch.testing.assert_close(model(ids).logits[0].double(), truth["log_p"], **CLOSE)


@pytest.mark.parametrize("sizes", [[1], [WINDOW], [7, 1, WINDOW, 3, 1, 1]], ids=["tokens", "windows", "mixed"])
def test_streaming_form_is_the_reference(case, sizes):
    """Read by tokens, by windows or in a mixture of blocks: the same probabilities come out, the same items stay."""
    model, ids, truth = case
    if sizes == [1]:
        ids = ids[:, :60]
    log_p, cache = streamed(model, ids, sizes)
    T = ids.size(1)
    torch.testing.assert_close(log_p[0].double(), truth["log_p"][:T], **CLOSE)
    values, bits, positions = zip(*truth["items"][T - 1])
    assert held_by(cache) == list(zip(values, positions))
    assert [item["bits"] for item in cache.contents()] == pytest.approx(bits, abs=1e-4)


def test_one_long_call_with_a_cache_is_the_reference(case):
    """A prompt longer than the window may be given to the cache at once; logits_to_keep cuts, it changes nothing."""
    model, ids, truth = case
    torch.testing.assert_close(model(ids, use_cache=True).logits[0].double(), truth["log_p"], **CLOSE)
    kept = model(ids, use_cache=True, logits_to_keep=21).logits
    torch.testing.assert_close(kept[0].double(), truth["log_p"][-21:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits[0].double(), truth["log_p"][-3:], **CLOSE)


def test_score_is_the_reference(case):
    """`score` gives the targets' probabilities, what was stored and hit, and the objective."""
    model, ids, truth = case
    tokens, targets, opens = lane_of(ids)
    scores = model.score(tokens, targets, opens)

    def flat(x):
        return x.flatten()[:LENGTH - 1]

    wanted, real = flat(targets), flat(targets) != EOT

    def at(name):
        return truth[name][:-1].gather(1, wanted[:, None])[:, 0]

    for got, name in ((scores.log_p, "log_p"), (scores.log_p_stm, "stm")):
        torch.testing.assert_close(flat(got)[real].double(), at(name)[real], **CLOSE)
    assert flat(scores.stored).tolist() == truth["stored"][1:]
    assert flat(scores.hit).tolist() == truth["hit"][:-1]

    objective = at("log_p") + model.config.ltm_stm_loss * at("stm")
    torch.testing.assert_close(flat(scores.objective)[real].double(), objective[real], **CLOSE)


def test_training_and_evaluation_are_one_function(case):
    """Nothing is added to the memory after its training."""
    model, ids, _ = case
    lane = lane_of(ids)
    assert all(map(torch.equal, read(model, *lane)[0], read(lively().train(), *lane)[0]))
    torch.testing.assert_close(streamed(lively().train(), ids, [7, 1])[0], model(ids).logits, **CLOSE)


@pytest.mark.parametrize("slots", [SLOTS, 4])
def test_rows_without_opens_are_sequences_of_their_own(slots):
    """Training's call, rows and no `opens`: every row starts empty, forgets as any, and equals the row's reference."""
    model = lively(ltm_slots=slots, ltm_surprisal_bits=6.0)
    tokens, targets, _ = lane_of(text(3 * WINDOW))
    scores = model.score(tokens, targets)
    for row in range(3):
        truth = reference(model, tokens[row])
        wanted = truth["log_p"].gather(1, targets[row][:, None])[:, 0]
        real = targets[row] != EOT
        torch.testing.assert_close(scores.log_p[row][real].double(), wanted[real], **CLOSE)
        # the row's last target comes after it: only there does `targets` say more than `tokens` of the same row
        assert scores.stored[row, :-1].tolist() == truth["stored"][1:]
        assert scores.hit[row].tolist() == truth["hit"]


def check_packed(model, lanes):
    """Sequences in lanes equal each alone."""
    longest = max(lane_of(*sequences)[0].size(0) for sequences in lanes)
    parts = [lane_of(*sequences, rows=longest) for sequences in lanes]
    packed = model.score(*(torch.cat(part) for part in zip(*parts)))
    for lane, sequences in enumerate(lanes):
        start = lane * longest
        for ids in sequences:
            tokens, targets, opens = lane_of(ids)
            alone = model.score(tokens, targets, opens)
            real = targets != EOT
            mine = slice(start, start + len(tokens))
            torch.testing.assert_close(packed.log_p[mine][real], alone.log_p[real], **CLOSE)
            assert torch.equal(packed.stored[mine], alone.stored)
            assert torch.equal(packed.hit[mine][real], alone.hit[real])
            after = ids[:, 1:]
            wanted = model(ids).logits[:, :-1].gather(2, after[..., None])[..., 0]
            torch.testing.assert_close(alone.log_p[real], wanted[after != EOT], **CLOSE)
            start += len(tokens)


def test_packed_sequences_equal_each_alone():
    """Sequences of different lengths in one `score(opens=...)` call, in one lane or in several, give each exactly what
    it gives alone."""
    model = lively(3, ltm_surprisal_bits=5.0)
    # where one fills its last row, its end stands right before the next one's start
    lengths = (50, 3, WINDOW, 70, 1, 2 * WINDOW, 25, 3 * WINDOW, 40, WINDOW + 1)
    sequences = [text(n, seed=n) for n in lengths]
    check_packed(model, [sequences])
    check_packed(model, [sequences[:3], sequences[3:7], sequences[7:]])


# ------------------------------------------------------------------------------------ nothing leaks

@pytest.mark.parametrize("place", [1, WINDOW - 1, WINDOW, 37, LENGTH - 1])
def test_a_future_token_changes_no_earlier_probability(case, place):
    """One token flipped anywhere: every probability before it is the same, bit for bit, in all three forms."""
    model, ids, _ = case
    flipped = ids.clone()
    flipped[0, place] = (ids[0, place] + 17) % EOT
    before, after = model(ids).logits, model(flipped).logits
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])

    real = lane_of(ids)[1].flatten()[:place - 1] != EOT                 # position place - 1 has the flipped target

    def early(ids):
        return [x.flatten()[:place - 1][real] for x in per_target(model.score(*lane_of(ids)))]

    assert all(map(torch.equal, early(ids), early(flipped)))
    before, after = (streamed(model, x, [WINDOW, 5, 1])[0] for x in (ids, flipped))
    assert torch.equal(before[:, :place], after[:, :place])


def test_a_prefix_says_what_the_whole_says(case):
    """Cut off after any position, the text gives that position the same probabilities: nothing came from behind it."""
    model, ids, _ = case
    whole = model(ids).logits
    for T in (1, 2, WINDOW, WINDOW + 1, 63):
        torch.testing.assert_close(model(ids[:, :T]).logits, whole[:, :T], **CLOSE)


def test_what_is_tabulated_is_what_would_be_computed():
    """Of weights as they are now, in both forms, and no part of what is saved."""
    model, ids = lively(), text(40)
    for _ in range(2):
        before = model(ids).logits, streamed(model, ids, [WINDOW, 5, 1])[0]
        model.active.tabulate(model.embed_detached)
        assert len(model.memory.of_each) == VOCAB and model.memory.of_each[EOT:].abs().max() == 0
        for one, other in zip((model(ids).logits, streamed(model, ids, [WINDOW, 5, 1])[0]), before):
            torch.testing.assert_close(one, other, **CLOSE)
        assert "memory.of_each" not in model.state_dict()
        model.double().float()                                              # converted, it would be of other weights
        assert model.memory.of_each is None
        torch.nn.init.normal_(model.memory.from_tokens.weight, std=0.1)


def test_no_item_is_visible_to_the_prediction_that_stored_it():
    """Where everything matches everything, the first stored token is found one position later, not by its own."""
    model, ids = everything_matches(), text(WINDOW)
    scores = model.score(*lane_of(ids))
    assert scores.stored[0, 0] and scores.hit[0].tolist() == [False] + [True] * (WINDOW - 1)
    assert scores.log_p[0, 0] == pytest.approx(float(scores.log_p_stm[0, 0]), abs=1e-5)
    cache = model.new_cache()
    model(ids[:, :1], past_key_values=cache)
    assert cache.retrieved() == []
    model(ids[:, 1:2], past_key_values=cache)
    assert [item["token"] for item in cache.retrieved()] == [int(ids[0, 1])]


def test_rows_of_a_batch_share_nothing():
    """A batch of different texts, in either form, equals each of them alone; each memory holds its own items."""
    model = lively()
    batch = torch.cat([text(50, seed) for seed in (5, 6, 7)])
    cache = model.new_cache(3)
    together = [model(batch).logits, streamed(model, batch, [WINDOW, 3], cache)[0]]
    for row in range(3):
        alone, own = streamed(model, batch[row:row + 1], [WINDOW, 3])
        for logits in together:
            torch.testing.assert_close(logits[row:row + 1], alone, **CLOSE)
        assert held_by(cache, sequence=row) == held_by(own)
        bits = [item["bits"] for item in own.contents()]
        assert [item["bits"] for item in cache.contents(sequence=row)] == pytest.approx(bits, abs=1e-4)


def test_memory_is_empty_at_each_start():
    """The first prediction is the backbone's own, a fresh memory holds nothing, and a cleared one is as good as new."""
    model, ids = lively(ltm_surprisal_bits=0.0), text(40)
    stm = backbone_log_p(model, ids[:, :1])
    torch.testing.assert_close(model(ids).logits[:, :1], stm, **CLOSE)
    cache = model.new_cache()
    assert cache.contents() == [] == cache.retrieved() and cache.get_seq_length() == 0
    first = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(first[:, :1], stm, **CLOSE)
    stored = [t for t in range(1, 40) if ids[0, t] != EOT]
    assert [item["position"] for item in cache.contents()] == stored[-SLOTS:]
    again = model(ids, past_key_values=cache).logits                    # went on: it remembers the first time
    assert not torch.allclose(again, first, **CLOSE)
    cache.clear()
    assert cache.contents() == [] == cache.retrieved() and cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_never_more_than_the_slots_and_the_oldest_goes_first():
    """After each token the ring holds the newest surprising ones, up to `ltm_slots`, in order, and no others."""
    model, ids = lively(3), text(60, seed=1)
    cache, expected, stored = model.new_cache(), deque(maxlen=SLOTS), 0
    tokens, _, opens = lane_of(ids)
    bits = -backbone_log_p(model, tokens, opens).flatten(0, 1) / math.log(2)
    for t in range(60):
        model(ids[:, t:t + 1], past_key_values=cache)
        token = int(ids[0, t])
        if t and token != EOT and bits[t - 1, token] > model.config.ltm_surprisal_bits:
            expected.append((token, t))
            stored += 1
        assert held_by(cache) == list(expected) and len(expected) <= SLOTS
    assert stored > 2 * SLOTS


def test_an_evicted_item_is_out_of_reach_in_the_parallel_form():
    """With everything stored and everything matching, a position retrieves exactly the last `ltm_slots` items."""
    model = everything_matches()
    ids = torch.randint(0, EOT, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    reading = read(model, *lane_of(ids))[0]
    retrieved = (reading.learned > 0).sum(-1).flatten()[:LENGTH]
    assert retrieved.tolist() == [min(t, SLOTS) for t in range(LENGTH)]


def test_retrieved_is_what_the_reference_found(case):
    """After each token, `retrieved` names the very items that the reference found, with all of their share of p."""
    model, ids, truth = case
    cache = model.new_cache()
    for t in range(50):
        log_p = model(ids[:, t:t + 1], past_key_values=cache).logits[0, 0]
        found = cache.retrieved()
        assert {item["position"]: item["cosine"] for item in found} == pytest.approx(truth["found"][t], abs=1e-5)
        shares = [item["share"] for item in found]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
        for token in {item["token"] for item in found}:
            through_memory = sum(item["share"] for item in found if item["token"] == token)
            rest = (1 - sum(shares)) * float(truth["stm"][t, token].exp())
            assert through_memory + rest == pytest.approx(float(log_p[token].exp()), abs=1e-5)


def test_probabilities_sum_to_one(case):
    """Over the whole vocabulary, at every position, in both forms; and the logits are those log-probabilities."""
    model, ids, _ = case
    for logits in (model(ids).logits, streamed(model, ids, [WINDOW, 1])[0]):
        assert logits.shape == (1, LENGTH, VOCAB)
        assert (logits.exp().sum(-1) - 1).abs().max() < 1e-5
        torch.testing.assert_close(logits.log_softmax(-1), logits, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ the backbone and the window

@pytest.fixture
def tiny(monkeypatch):
    """Settings of add_memory.py for a model as small as these."""
    monkeypatch.setitem(SIZES, "tiny", dict(vocab_size=VOCAB, n_layer=2, n_embd=64, n_head=2))
    return replace(add_memory.QUICK, size="tiny")


def test_memory_off_is_gpt_bit_for_bit_within_a_window(tiny):
    """The hybrid that add_memory makes, LTM off, gives GPT's very bits on a whole window; LTM on, it does not."""
    gpt, hybrid = add_memory.make_models(tiny, seed=0)
    assert hybrid.config.stm_window == 128 and gpt.config.stm_window is None
    ids = torch.cat([text(128, seed) for seed in (0, 1)])
    hybrid.config.memory_enabled = False
    assert torch.equal(gpt(ids).logits, hybrid(ids).logits)
    targets = F.pad(ids[:, 1:], (0, 1), value=EOT)
    assert all(map(torch.equal, per_target(gpt.score(ids, targets)), per_target(hybrid.score(ids, targets))))
    torch.testing.assert_close(gpt(ids, use_cache=True).logits, gpt(ids).logits, **CLOSE)
    hybrid.config.memory_enabled = True
    assert not torch.equal(gpt(ids).logits, hybrid(ids).logits)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 55])
def test_baseline_is_masked_attention_of_any_length(length):
    """LTM off, both forms equal softmax attention over the last WINDOW positions, written as a loop over positions."""
    model, ids = lively(memory_enabled=False), text(length, seed=length)
    wanted = reference_backbone(model, ids[0], WINDOW)
    torch.testing.assert_close(model(ids).logits[0].double(), wanted, **CLOSE)
    torch.testing.assert_close(streamed(model, ids, [WINDOW, 5])[0][0].double(), wanted, **CLOSE)
    scores = model.score(*lane_of(ids))
    assert not scores.stored.any() and not scores.hit.any()


def test_gpt_sees_everything_and_says_when_it_cannot():
    """GPT without a window attends to all that came, in both forms, and refuses text beyond its table of positions."""
    torch.manual_seed(0)
    model, ids = GPT(config(stm_window=None, memory_enabled=False, n_positions=40)).eval(), text(40)
    wanted = reference_backbone(model, ids[0], 40)
    torch.testing.assert_close(model(ids).logits[0].double(), wanted, **CLOSE)
    torch.testing.assert_close(streamed(model, ids, [11, 1])[0][0].double(), wanted, **CLOSE)
    for refused in (dict(), dict(use_cache=True)):
        with pytest.raises(ValueError, match="at most 40"):
            model(text(41), **refused)


def test_a_wider_network_is_wider_in_both_forms():
    """n_inner widens the feed-forward network, and nothing else."""
    model, usual = lively(memory_enabled=False, n_inner=300), lively()
    assert {name for name, x in model.state_dict().items() if x.shape != usual.state_dict()[name].shape} == {
        f"backbone.blocks.{layer}.{part}.weight" for layer in (0, 1) for part in ("up", "down")}
    assert model.backbone.blocks[0].up.weight.shape == (300, 64)
    wanted = reference_backbone(model, text(40)[0], WINDOW)
    torch.testing.assert_close(model(text(40)).logits[0].double(), wanted, **CLOSE)


# ------------------------------------------------------------------------------------ padding, losses, states

def padded(sequences, side):
    """Sequences (1, T) of unequal lengths as a batch (B, T) with its mask; what stands on padding is noise."""
    T = max(ids.size(1) for ids in sequences)
    ids, mask = torch.full((len(sequences), T), 5), torch.zeros(len(sequences), T, dtype=torch.long)
    for row, one in enumerate(sequences):
        where = slice(T - one.size(1), T) if side == "left" else slice(0, one.size(1))
        ids[row, where], mask[row, where] = one[0], 1
    return ids, mask


@pytest.mark.parametrize("form", ["parallel", "streaming", "LTM off", "LTM off, streaming"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_nothing(side, form):
    """Unequal texts in one padded batch equal each alone: on the left in both forms, on the right without a cache."""
    model, use_cache = lively(memory_enabled="off" not in form), "streaming" in form
    # 60 is the longest: padded on the left, the text of 12 begins with a block of the streaming form, at 48
    sequences = [text(n, seed=n) for n in (WINDOW + 9, 60, 7, 12, 1)]
    ids, mask = padded(sequences, side)
    if side == "right" and use_cache:
        with pytest.raises(ValueError, match="left"):
            model(ids, attention_mask=mask, use_cache=True)
        return
    out = model(ids, attention_mask=mask, use_cache=use_cache, output_hidden_states=True)
    for row, one in enumerate(sequences):
        alone = model(one, output_hidden_states=True)
        mine = mask[row].bool()
        torch.testing.assert_close(out.logits[row, mine], alone.logits[0], **CLOSE)
        for states, wanted in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(states[row, mine], wanted[0], **CLOSE)
    if form == "streaming":                                 # items stand where they do in the text
        for row, one in enumerate(sequences):
            assert held_by(out.past_key_values, row) == held_by(model(one, use_cache=True).past_key_values)
    if use_cache:                                           # and what is remembered is right: the next token agrees
        longer = F.pad(mask, (0, 1), value=1)
        after = model(torch.full((5, 1), 9), past_key_values=out.past_key_values, attention_mask=longer).logits
        for row, one in enumerate(sequences):
            torch.testing.assert_close(after[row], model(F.pad(one, (0, 1), value=9)).logits[0, -1:], **CLOSE)


def test_masks_with_holes_are_refused():
    """Padding inside a text is an error in either form, never a silent guess."""
    model, ids = lively(), text(20)
    mask = torch.ones_like(ids)
    mask[0, 8] = 0
    with pytest.raises(ValueError, match="holes"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="left"):
        model(ids, attention_mask=mask, use_cache=True)


@pytest.mark.parametrize("enabled", [True, False], ids=["LTM", "LTM off"])
def test_a_cache_refuses_what_it_cannot_take(enabled):
    """Padding after a text has begun, another number of rows, and no token at all are refused, each with its reason."""
    model, ids = lively(memory_enabled=enabled), torch.cat([text(20), text(20, seed=1)])
    cache = model.new_cache(2)
    model(ids, past_key_values=cache)
    late = torch.ones(2, 5, dtype=torch.long)
    late[1, :2] = 0
    with pytest.raises(ValueError, match="before the first token"):
        model(ids[:, :5], past_key_values=cache, attention_mask=late)
    with pytest.raises(ValueError, match="2 sequences, not 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="no tokens"):
        model(ids[:, :0], past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_hidden_states_are_those_of_each_layer(case):
    """n_layer + 1 of them, the last being what the logits are made of; the streaming form gives the same."""
    model, ids, _ = case
    whole, cached = (model(ids, output_hidden_states=True, use_cache=c).hidden_states for c in (False, True))
    assert len(whole) == model.config.n_layer + 1 and {x.shape for x in whole} == {(1, LENGTH, 64)}
    for a, b in zip(whole, cached, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    said = model.logits(whole[-1]).log_softmax(-1)
    torch.testing.assert_close(said[0].double(), case[2]["stm"], **CLOSE)
    torch.testing.assert_close(whole[0][0], rms(model.backbone.embed.weight[ids[0]]), **CLOSE)


@pytest.mark.parametrize("use_cache", [False, True])
def test_labels_give_the_mean_loss(case, use_cache):
    """`loss` is the mean -log p of each label given what is before it, -100 left out; a kept tail scores that tail."""
    model, ids, truth = case
    labels = ids.clone()
    labels[0, :30] = -100
    wanted = -truth["log_p"][29:-1].gather(1, ids[0, 30:, None]).mean()
    assert float(model(ids, labels=labels, use_cache=use_cache).loss) == pytest.approx(float(wanted), abs=1e-5)
    kept = model(ids, labels=ids, logits_to_keep=10, use_cache=use_cache).loss
    wanted = -truth["log_p"][-10:-1].gather(1, ids[0, -9:, None]).mean()
    assert float(kept) == pytest.approx(float(wanted), abs=1e-5)


def test_every_parameter_gets_a_finite_gradient():
    """The training objective reaches the backbone and all of the memory, and no masked branch lets a NaN through."""
    with torch.enable_grad():
        model = lively().train()
        tokens, targets, _ = lane_of(text(6 * WINDOW))
        scores = model.score(tokens, targets)
        torch.where(targets != EOT, scores.objective, 0.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_log_p_is_the_same_as_written_for_a_gpu():
    """There it hides the columns of no token instead of leaving them out, and sums instead of picking."""
    class OnGPU(torch.Tensor):
        is_cuda = True

    model, draw, found = lively(), torch.Generator().manual_seed(0), []
    h, targets = torch.randn(3, WINDOW, model.config.n_embd, generator=draw), lane_of(text(3 * WINDOW))[1]
    for kind in (torch.Tensor, OnGPU):
        with torch.enable_grad():
            given = h.clone().requires_grad_()
            log_p, log_z = model.log_p(given.as_subclass(kind), targets)
            total = log_p.sum() + 0.1 * log_z.square().sum()
        gradients = torch.autograd.grad(total, [given, model.backbone.embed.weight])
        found.append([x.as_subclass(torch.Tensor) for x in (log_p, log_z, *gradients)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert len(found[1][3]) > VOCAB and not found[1][3][VOCAB:].any()


# ------------------------------------------------------------------------------------ sizes, seeds, settings

def test_70m_is_70m():
    """The real configuration has 65 to 75 million parameters, all of them in a group, and the specified memory."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(models, "EOT", 50256)
        model = RevenaHybridTiny(RevenaConfig(**SIZES["70M"]))
    groups = add_memory.parameters_by_group(model)
    assert 65e6 <= sum(groups.values()) == sum(p.numel() for p in model.parameters()) <= 75e6
    c = model.config
    assert (c.stm_window, c.ltm_slots, c.ltm_surprisal_bits, c.ltm_cosine) == (128, 256, 4.5, 0.8)


def test_initial_weights_follow_the_seed(tiny):
    """A seed gives the same weights each time, another seed others."""
    first, again, other = (add_memory.make_models(tiny, seed)[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.embed.weight"], other["backbone.embed.weight"])


CHANGED = dict(n_positions=999, n_inner=200, stm_window=WINDOW, ltm_slots=9, ltm_surprisal_bits=5.5, ltm_cosine=0.7,
               ltm_ngrams=2, ltm_learned=3, ltm_dim=32, ltm_sharpness=6.0, ltm_plausibility=0.2,
               ltm_hidden=40, ltm_rare_bits=9.0, ltm_same=0.3, ltm_near=0.1, ltm_rare_fade=0.5,
               ltm_exact_fade=0.3, ltm_learned_fade=0.7, ltm_stm_loss=0.6, ltm_share=0.2)


def test_settings_survive_the_config_file(tmp_path):
    """Every setting, changed from its default, comes back from config.json, and the model made of it is the same."""
    named = inspect.signature(RevenaConfig).parameters.keys() - {"kwargs"}
    size = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2)
    # what is stored at random has no reference to compare with: its digits mean nothing
    RevenaConfig(ltm_random=0.3).save_pretrained(tmp_path)
    assert RevenaConfig.from_pretrained(tmp_path).ltm_random == 0.3 != RevenaConfig().ltm_random
    assert named == CHANGED.keys() | size.keys() | {"memory", "memory_enabled", "memory_settings", "ltm_random"}
    model = lively(**CHANGED)
    model.save_pretrained(tmp_path)
    back, defaults = RevenaConfig.from_pretrained(tmp_path), RevenaConfig()
    for name, value in (CHANGED | size).items():
        assert getattr(back, name) == value != getattr(defaults, name), name
    assert (back.memory, back.memory_enabled, back.memory_settings) == ("ltm", True, {})
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (EOT,) * 3
    ids = text(50)
    torch.testing.assert_close(model(ids).logits[0].double(), reference(model, ids[0])["log_p"], **CLOSE)
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    assert torch.equal(RevenaHybridTiny.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_memory_that_does_not_exist_is_named():
    """Neither another memory nor a setting that the memory does not have is taken without a word."""
    with pytest.raises(ValueError, match="no memory 'bnak' here; there are: .*ltm"):
        RevenaHybridTiny(config(memory="bnak"))
    with pytest.raises(ValueError, match="slots is no setting of this memory"):
        RevenaHybridTiny(config(memory_settings=dict(slots=9)))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_folder_of_the_time_with_one_memory_loads(tmp_path, enabled):
    """Then a config said ltm_enabled, and of the memory's kind nothing: it is the same model, with the same bits."""
    model, ids = lively(), text(50)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("memory", "memory_enabled", "memory_settings", "n_inner"):
        del written[name]
    (tmp_path / "config.json").write_text(json.dumps(written | {"ltm_enabled": enabled}))
    model.config.memory_enabled = enabled
    for back in (load_model(tmp_path), RevenaHybridTiny.from_pretrained(tmp_path)):
        assert back.config.memory_enabled is enabled and torch.equal(back(ids).logits, model(ids).logits)
        back.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert again["memory_enabled"] is enabled and "ltm_enabled" not in again


def no_config(folder):
    (folder / "config.json").unlink()


def half_a_config(folder):
    (folder / "config.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_the_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9000])


def another_models_config(folder):
    lively(n_embd=32).save_pretrained(folder / "other")
    (folder / "other" / "config.json").replace(folder / "config.json")


def another_memory(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"memory_settings": {"slots": 9}}))


@pytest.mark.parametrize("damage, says", [
    (no_config, "config.json is missing; make it with"),
    (half_a_config, "config.json is damaged"),
    (no_weights, "model.safetensors is missing; make it with"),
    (half_the_weights, "not a whole safetensors file"),
    (another_models_config, "do not fit"),
    (another_memory, "slots is no setting of this memory"),
])
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage, says):
    """`load_model` says what is wrong with a folder and which command makes it again."""
    lively().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(StageError, match=says) as error:
        load_model(tmp_path, made_by="python train.py")
    assert "\n" not in str(error.value) and "python train.py" in str(error.value)


def test_tied_weights_are_stored_once(tmp_path):
    """The output matrix is the embedding: one tensor in the file, and no other name for it."""
    model = lively()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert sum(p.shape == model.backbone.embed.weight.shape for p in model.parameters()) == 1


# ------------------------------------------------------------------------------------ compilers

def test_a_compiler_that_fails_is_none(monkeypatch):
    """Whatever torch.compile needs and does not find, the stages go on without; on a CPU it is not even tried."""
    tried = []

    def no_c_compiler(function, **given):
        tried.append(given["options"]["deterministic"])
        raise RuntimeError("Failed to find C compiler")

    def works(function, **given):
        return lambda x: None

    monkeypatch.setattr(torch, "compile", no_c_compiler)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)         # there need not be a GPU
    assert not stages.has_compiler(torch.device("cpu")) and tried == []
    assert not stages.has_compiler(torch.device("cuda", 7)) and tried == [True]
    monkeypatch.setattr(torch, "compile", works)
    assert stages.has_compiler(torch.device("cuda", 6)) and not stages.has_compiler(torch.device("cuda", 7))
    stages.has_compiler.cache_clear()


# ------------------------------------------------------------------------------------ what travels with a checkpoint

PLUMBING = {"argparse", "netrc", "queue", "signal", "subprocess", "threading", "wandb"}


@pytest.mark.parametrize("version, taken", [
    ("4.57.3", False), ("5.0.0", False), ("5.2.9", False), ("5.3.0", True), ("5.10.1", True), ("6.0.0.dev0", True)])
def test_a_version_that_does_not_work_is_named_where_the_code_is_loaded(monkeypatch, version, taken):
    """Nothing of what came with version 5 is asked for before that; "5.10" is more than "5.3"."""
    transformers = importlib.import_module("transformers")  # as the file will find it
    monkeypatch.setattr(transformers, "__version__", version)
    if not taken:
        monkeypatch.delattr(transformers, "PreTrainedConfig")
    again = importlib.util.module_from_spec(importlib.util.spec_from_file_location("again", models.__file__))
    with nullcontext() if taken else pytest.raises(ImportError, match=f"5.3 or later, not {version}: pip install"):
        again.__spec__.loader.exec_module(again)


@pytest.mark.parametrize("name", ["models.py", "memories.py"])
def test_the_code_of_a_checkpoint_is_models_alone(name):
    """A file that travels in checkpoints imports nothing of the pipeline, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse((stages.PROJECT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert "torch" in imported and not imported & (PLUMBING | {"stages", "train", "eval"})


def test_stages_alone_does_not_import_torch():
    """A stage that needs no torch does not wait for it."""
    code = "import stages, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=stages.PROJECT, check=True)


def test_the_study_widens_by_the_ltms_parameters():
    """The control with as many parameters has as many, within two per cent."""
    with torch.device("meta"):
        ltm = RevenaHybridTiny(RevenaConfig()).memory
        backbones = [RevenaHybridTiny(RevenaConfig(**stages.STUDY[name].backbone)).backbone
                     for name in ("baseline_x1", "study_wide")]
    usual, wide = (sum(p.numel() for p in backbone.parameters()) for backbone in backbones)
    assert wide - usual == pytest.approx(sum(p.numel() for p in ltm.parameters()), rel=0.02)


def test_the_gradient_of_what_is_taken_several_times_is_summed():
    draw = torch.Generator().manual_seed(0)
    x, opens = torch.randn(6, 4, 3, 2, generator=draw), torch.tensor([[True, False, False], [True, True, False]])
    places = torch.randint(0, 12, (6, 9), generator=draw) + 12 * (torch.arange(6)[:, None] // 3)    # of its own lane
    weight, found = torch.randn(6, 9, 3, 2, generator=draw), []
    with torch.enable_grad():
        for take in (lambda x: x.flatten(0, 1)[places], lambda x: models.Taken.apply(x, places, opens)):
            one = x.clone().requires_grad_()
            found.append((take(one), *torch.autograd.grad((take(one) * weight).sum(), one)))
    for plain, ours in zip(*found):
        torch.testing.assert_close(ours, plain)


# ------------------------------------------------------------ kernels and their twins

TWINS = """
import sys, torch
import models
from models import (Backbone, Final, RevenaConfig, RevenaHybridTiny, fused_heads, fused_log_p, heads,
                    row_attention)

def attention(C, n_head, half, rows, opens, lay=lambda x: x):
    config = RevenaConfig(n_layer=1, n_embd=2 * half * n_head, n_head=n_head, stm_window=C)
    table = Backbone(config).rotary
    gates = -(-n_head // 16) * 16
    y = torch.randn(rows, C, 3 * config.n_embd + gates).requires_grad_()
    weight = torch.randn(rows, C, config.n_embd)
    pairs = []
    for out in (heads(y, n_head, lambda q, k, v: row_attention(q, k, v, table, opens)),
                fused_heads(lay(y), table, opens, n_head)[0]):
        pairs.append((out, *torch.autograd.grad((out * weight).sum(), y)))
    return pairs

def readings(V, columns):
    logits = (5 * torch.randn(9, columns)).requires_grad_()
    targets = torch.arange(9) * (V - 1) // 8
    weight = torch.randn(2, 9)
    log_z = logits[:, :V].logsumexp(-1)
    plain = logits.gather(-1, targets[:, None])[:, 0] - log_z, log_z
    return [(*two, *torch.autograd.grad((torch.stack(two) * weight).sum(), logits))
            for two in (plain, fused_log_p(logits.T.contiguous().T, targets, V))]

def items(opens, sure=1.0):
    torch.manual_seed(2)
    settings = dict(ltm_slots=32, ltm_dim=16, ltm_learned=3, ltm_cosine=0.1, ltm_sharpness=2.0, ltm_rare_bits=16.5,
                    ltm_surprisal_bits=14.0, ltm_near=0.3, ltm_hidden=16)
    model = RevenaHybridTiny(RevenaConfig(n_layer=1, n_embd=64, n_head=2, stm_window=16, **settings)).eval()
    memory, tokens = model.memory, torch.randint(0, 8, (6, 16))
    torch.nn.init.normal_(model.backbone.embed.weight, std=0.2)
    torch.nn.init.normal_(memory.from_tokens.weight, std=0.2 * sure)
    h, targets, found = model.states(tokens, opens)[0], tokens.roll(-1, 1), []
    final = Final(h, tokens, targets, *model.log_p(h, targets), model.embed_detached, opens)
    read = memory.read(final)[0]
    assert (read.exact.max() > 22_000) == (sure > 1)    # no exponent is above 10
    shares = [(x > 0).float().mean() for x in (read.exact, read.words, read.learned)]
    assert min(shares) > 0.02 and max(shares) < 0.9, shares
    for memory.fused in (False, True):
        with torch.no_grad():
            found.append(memory.find(final)[:2])
    return found

def sequences():
    model = RevenaHybridTiny(RevenaConfig(n_layer=1, n_embd=64, n_head=2, stm_window=16)).eval()
    ids, found = torch.randint(0, 999, (3, 40)), []
    for model.fused in (False, True):
        with torch.no_grad():
            found.append([model(ids).logits])
    return found

torch.manual_seed(0)
lanes = torch.tensor([[1, 0, 0], [1, 0, 1]]).bool()
cases = dict(rows=lambda: attention(16, 2, 16, 3, None), gates=lambda: attention(16, 17, 16, 1, None),
             blocks=lambda: attention(128, 1, 16, 2, None), lanes=lambda: attention(32, 2, 16, 6, lanes),
             far=lambda: attention(128, 1, 16, 6, lanes), logits=lambda: readings(9000, 9024), sequences=sequences,
             whole_blocks=lambda: readings(2048, 2112), short=lambda: readings(900, 960),
             found=lambda: items(None), found_in_lanes=lambda: items(lanes), found_surely=lambda: items(None, 40.0),
             # laid out in memory as no kernel expects it
             lying=lambda: attention(16, 2, 16, 6, lanes[:1].expand(2, 3), lambda y: y.mT.contiguous().mT))
for name, case in cases.items():
    for plain, fused in zip(*case()):
        assert plain.abs().max() > 0.1
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)
    print(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_are_their_twins():
    """What is fused for a GPU, gone through by Triton's interpreter on this machine: values and gradients."""
    done = subprocess.run([sys.executable, "-c", TWINS], cwd=Path(models.__file__).parent, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    names = ["rows", "gates", "blocks", "lanes", "far", "logits", "sequences", "whole_blocks", "short", "found",
             "found_in_lanes", "found_surely", "lying"]
    assert done.stdout.split() == names, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares kernels on a CUDA device")
@pytest.mark.parametrize("opens", [None, [[True, False, False, False], [True, False, True, False]]])
def test_a_fused_model_is_its_twin(opens):
    """On a GPU, in bfloat16: the gradients of a whole model differ from float32's by no more than the plain one's."""
    torch.manual_seed(0)
    exact = RevenaHybridTiny(RevenaConfig(n_layer=2, stm_window=128, memory_enabled=False)).cuda()
    tokens = torch.randint(EOT, (8, 128), device="cuda")
    opens = None if opens is None else torch.tensor(opens, device="cuda")
    found = {}
    plain, fused = (stages.lower_precision(copy.deepcopy(exact)) for _ in range(2))
    if plain.dtype != torch.bfloat16:
        pytest.skip("a GPU without bfloat16 keeps the plain form")
    for name, model in dict(exact=exact, plain=plain, fused=fused.fuse()).items():
        with torch.enable_grad():
            loss = model.score(tokens, tokens.roll(-1, 1), opens).log_p.mean()
            gradients = torch.autograd.grad(loss, list(model.backbone.parameters()))
        with torch.no_grad():
            alone = model.score(tokens, tokens.roll(-1, 1), opens).log_p        # where GELU is the product's
        found[name] = [alone.float().flatten(), loss.float()[None], *(g.float().flatten() for g in gradients)]
    assert fused.fused and not plain.fused
    for exact, plain, fused in zip(found["exact"], found["plain"], found["fused"]):
        assert (fused - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares kernels on a CUDA device")
@pytest.mark.parametrize("opens", [None, [[True, False, False, False], [True, False, True, False]]])
def test_on_a_gpu_what_is_found_is_summed_alike(opens):
    torch.manual_seed(0)
    config = RevenaConfig(n_layer=1, ltm_cosine=0.1, ltm_sharpness=4.0, ltm_surprisal_bits=14.0, ltm_rare_bits=15.6)
    model = stages.lower_precision(RevenaHybridTiny(config).cuda()).eval()
    tokens = torch.randint(0, 30, (8, 128), device="cuda")
    opens = None if opens is None else torch.tensor(opens, device="cuda")
    found = {}
    for name in ("plain", "fused"):
        model.memory.fused = name == "fused" and model.fuse().memory.fused
        scores = model.score(tokens, tokens.roll(-1, 1), opens)
        found[name] = (scores.log_p - scores.log_p_stm).float()
    assert model.memory.fused or model.dtype != torch.bfloat16
    assert found["plain"].abs().max() > 0.1
    assert (found["fused"] - found["plain"]).norm() <= 1e-2 * found["plain"].norm()


@pytest.mark.parametrize("settings", [dict(stm_window=None, memory_enabled=False), dict(stm_window=24),
                                      dict(stm_window=256)])
def test_what_does_not_fit_the_kernels_stays_plain(settings, monkeypatch):
    monkeypatch.setattr(models, "triton", object())
    small = dict(vocab_size=VOCAB, n_layer=1, n_embd=64, n_head=2)
    assert not GPT(RevenaConfig(**small, **settings)).bfloat16().fuse().fused
    fitting = RevenaHybridTiny(RevenaConfig(**small, stm_window=64))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):            # in float32 it is slower
        fitting.to(dtype).fuse()
        parts = fitting, fitting.memory, fitting.backbone.blocks[0]
        assert [part.fused for part in parts] == [dtype == torch.bfloat16] * 3
    assert fitting.bfloat16().fuse().fused and not fitting.float().fused, "what is converted knows it by itself"


def test_gelu_in_the_products_kernel_is_gelu():
    """Without a gradient, and where the matrix is no module of another kind, as an adapter's."""
    block = lively().backbone.blocks[0]
    x = torch.randn(3, 5, block.up.in_features, generator=torch.Generator().manual_seed(1))
    plain = block.feed(x)
    block.fused = True
    close = dict(rtol=0, atol=2e-3 * float(plain.abs().max()))              # a CPU's has no tanh
    torch.testing.assert_close(block.feed(x), plain, **close)
    assert not torch.equal(block.feed(x), plain)
    with torch.enable_grad():
        assert torch.equal(block.feed(x), plain)

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    twice = Twice(block.up.in_features, block.up.out_features, bias=False)
    twice.weight, block.up = block.up.weight, twice
    fused, block.fused = block.feed(x), False
    assert torch.equal(fused, block.feed(x)) and not torch.equal(fused, plain)
