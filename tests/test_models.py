"""models.py: both forms of both memories against a slow, literal reference, and what no change to them may break.

Small models with a small vocabulary, so that whole distributions are cheap; weights drawn so that they act like trained
ones: about half the tokens are stored, half the learned look-ups open, and what is found outweighs the backbone.
"""

import inspect
import math
from collections import deque

import pytest
import torch
from torch.nn import functional as F

import add_memory
import models
from models import GPT, SIZES, Memory, RevenaConfig, RevenaHybridTiny, StageError, load_model, parameters_by_group

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
    return RevenaConfig(**dict(vocab_size=VOCAB, n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_slots=SLOTS,
                               ltm_surprisal_bits=7.0, ltm_sharpness=5.0, ltm_plausibility=0.3, ltm_shown=4) | settings)


@torch.no_grad()
def enliven(model, spread=0.12):
    """Draw weights that keep the memory busy (see this file's docstring); the larger `spread`, the surer the model."""
    for p in model.backbone.blocks.parameters():
        p.mul_(6)
    model.backbone.embed.weight.normal_(std=spread)
    memory, D = model.memory, model.config.n_embd
    memory.from_state.weight.normal_(std=0.09)
    memory.from_state.weight[memory.width:] *= 0.3                      # what has read the token filed
    memory.from_tokens.weight.normal_(std=0.09)
    memory.from_tokens.weight[:memory.width] *= 0.7                     # the token filed
    memory.from_tokens.weight.view(-1, memory.width, D)[:, sum(memory.sizes) - 1] = 0   # open: by the state alone
    memory.from_state.bias[memory.sizes[0]:memory.width].zero_()
    return model


def lively(seed=21, **settings):
    """A busy RevenaHybridTiny."""
    torch.manual_seed(seed)
    return enliven(RevenaHybridTiny(config(**settings)).eval())


def text(length=LENGTH, seed=0):
    """(1, length) tokens: five phrases said again and again, and now and then two stray tokens, <|endoftext|> too."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda below: int(torch.randint(0, below, (1,), generator=draw))
    phrases = [[number(EOT) for _ in range(5)] for _ in range(5)]
    tokens = []
    while len(tokens) < length:
        tokens += phrases[number(5)] if number(4) else [number(VOCAB), number(VOCAB)]
    tokens[length // 2] = EOT
    return torch.tensor([tokens[:length]])


def rows_of(*sequences):
    """Sequences (1, T) of any length as `score` takes them: tokens, targets (rows, WINDOW), opens (rows,)."""
    tokens, targets, opens = [], [], []
    for ids in sequences:
        after = F.pad(ids[:, 1:], (0, 1), value=EOT)
        room = -ids.size(1) % WINDOW
        tokens.append(F.pad(ids, (0, room), value=EOT).view(-1, WINDOW))
        targets.append(F.pad(after, (0, room), value=EOT).view(-1, WINDOW))
        opens.append(torch.arange(len(tokens[-1])) == 0)
    return torch.cat(tokens), torch.cat(targets), torch.cat(opens)


def read(model, tokens, targets, opens):
    """What every position of the rows retrieves: what `model.read` returns."""
    h = model.states(tokens, opens)
    return model.read(h, tokens, targets, *model.log_p(h, targets), opens)


def streamed(model, ids, sizes, memory=None):
    """Log-probabilities (1, T, V) and the memory after reading `ids` in blocks of these sizes, again and again."""
    memory = memory or Memory(model)                        # a Memory is true, however little it has read
    parts, at, turn = [], 0, 0
    while at < ids.size(1):
        size = sizes[turn % len(sizes)]
        parts.append(model(ids[:, at:at + size], past_key_values=memory).logits)
        at, turn = at + size, turn + 1
    return torch.cat(parts, 1), memory


# ------------------------------------------------------------------------------------ the reference, in float64

def rms(x):
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def reference_states(model, ids, window):
    """Final states (T, D) of one sequence (T,): each position attends, by itself, to the last `window`."""
    D, heads = model.config.n_embd, model.config.n_head
    T, half = len(ids), D // heads // 2
    turns = torch.outer(torch.arange(T).double(), 10_000.0 ** (-torch.arange(half).double() / half))
    turn = torch.polar(torch.ones_like(turns), turns)[:, None]                         # (T, 1, D/H/2)

    def rotated(x):                                         # absolute positions; only differences can matter
        y = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((y.real, y.imag), -1)

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
        y = rms(x) @ up.T
        x = x + 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3))) @ down.T
    return rms(x)


@torch.no_grad()
def reference(model, ids):
    """One sequence (T,), token by token, with a list of items: what the model claims to compute, said again slowly.

    Returns: dict of (T, V) tables log_p, stm (the backbone's), with and without (had each look-up through the learned
    addresses been made, or none); and of lists by position: stored (was x_t?), open, hit, found ({where a
    retrieved item stood: cosine}), items (all that were held: token, bits, position).
    """
    c, memory = model.config, model.memory
    E, K, A, D = c.ltm_ngrams, c.ltm_learned, c.ltm_dim, c.n_embd
    h = reference_states(model, ids, c.stm_window)
    embed = model.backbone.embed.weight.double()
    stm = (h @ embed[:VOCAB].T).log_softmax(-1)
    linear, next_linear = memory.from_state.weight.double().view(2, -1, D)
    bias, next_bias = memory.from_state.bias.double().view(2, -1)
    value_linear, *by_lag = memory.from_tokens.weight.double().view(1 + E, -1, D)

    token = lambda t: int(ids[t]) if t >= 0 else EOT
    bits = [0.0] * (len(ids) + 1)                                       # the last: before the start
    names = ("log_p", "with", "without", "stored", "open", "hit", "found", "items")
    held, out = deque(maxlen=c.ltm_slots), {name: [] for name in names}

    def vector(t):
        """All that is linear in position t, and its exact addresses: the last one, two, .. tokens, or None."""
        known = lambda token: rms(embed[token]) * (token != EOT)
        y = linear @ h[t] + sum(by_lag[lag] @ known(token(t - lag)) for lag in range(E)) + bias
        exact = [tuple(token(t - lag) for lag in range(n)) for n in range(1, E + 1)]
        return y, [exact[0] if bits[t] > c.ltm_surprisal_bits else None, *exact[1:]]

    for t in range(len(ids)):
        # write: the token that has just come, filed under the state before it
        bits[t] = -float(stm[t - 1, token(t)]) / math.log(2) if t > 0 and token(t) != EOT else 0.0
        stored = bits[t] > c.ltm_surprisal_bits
        if stored:
            y, exact = vector(t - 1)
            v = value_linear @ rms(embed[token(t)]) + next_linear @ h[t] + next_bias
            learned = (y[:K * A] + v[:K * A]).view(K, A)
            held.append(dict(key=[*exact, *(k / k.norm() for k in learned)], value=token(t), bits=bits[t], position=t,
                             strength=(y + v)[K * A + E + K:K * A + 2 * (E + K)]))
        # read
        y, exact = vector(t)
        query = [*exact, *(q / q.norm() for q in y[:K * A].view(K, A))]
        trust, is_open = y[K * A:K * A + E + K], bool(y[K * A + 2 * (E + K)] > 0)
        weights, found = {True: torch.zeros(VOCAB).double(), False: torch.zeros(VOCAB).double()}, {}
        for item in held:
            for head in range(E + K):
                if head < E:
                    cosine = float(query[head] is not None and query[head] == item["key"][head])
                else:
                    cosine = float(query[head] @ item["key"][head])
                if cosine > c.ltm_cosine:
                    score = trust[head] + item["strength"][head]
                    if head < E:
                        score += (head + 1) * c.ltm_exact_trust
                    else:
                        score += c.ltm_sharpness * (cosine - 1) + c.ltm_plausibility * stm[t, item["value"]]
                    crowd = 1.0 if head < E else max(1.0, len(held) / c.ltm_shown) ** c.ltm_crowding
                    weights[head >= E][item["value"]] += math.exp(min(float(score), 10)) / crowd
                    if head < E or is_open:
                        found[item["position"]] = max(cosine, found.get(item["position"], 0.0))
        mixed = {looked: ((stm[t].exp() + w) / (1 + w.sum())).log()
                 for looked, w in ((False, weights[False]), (True, weights[False] + weights[True]))}
        for name, entry in (("log_p", mixed[is_open]), ("stored", stored), ("open", is_open), ("hit", bool(found)),
                            ("found", found), ("with", mixed[True]), ("without", mixed[False]),
                            ("items", [(i["value"], i["bits"], i["position"]) for i in held])):
            out[name].append(entry)
    return out | {name: torch.stack(out[name]) for name in names[:3]} | {"stm": stm}


@pytest.fixture(scope="module")
def case():
    """A busy model, a text, and what the reference makes of it; checked to exercise each branch."""
    model, ids = lively(), text()
    truth = reference(model, ids[0])
    share = lambda name: sum(truth[name]) / LENGTH
    assert 3 * SLOTS < sum(truth["stored"]) < 0.9 * LENGTH, "more than the slots hold, but not every token"
    assert 0.2 < share("open") < 0.8 and 0.2 < share("hit") < 0.95
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
    log_p, memory = streamed(model, ids, sizes)
    T = ids.size(1)
    torch.testing.assert_close(log_p[0].double(), truth["log_p"][:T], **CLOSE)
    contents = memory.contents()
    assert [(i["token"], i["position"]) for i in contents] == [(v, p) for v, _, p in truth["items"][T - 1]]
    assert [i["bits"] for i in contents] == pytest.approx([bits for _, bits, _ in truth["items"][T - 1]], abs=1e-4)
    assert int(memory.count) == sum(truth["stored"][:T])


def test_one_long_call_with_a_cache_is_the_reference(case):
    """A prompt longer than the window may be given to the cache at once; logits_to_keep cuts, it changes nothing."""
    model, ids, truth = case
    torch.testing.assert_close(model(ids, use_cache=True).logits[0].double(), truth["log_p"], **CLOSE)
    kept = model(ids, use_cache=True, logits_to_keep=21).logits
    torch.testing.assert_close(kept[0].double(), truth["log_p"][-21:], **CLOSE)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits[0].double(), truth["log_p"][-3:], **CLOSE)


def test_score_is_the_reference(case):
    """`score` gives the targets' probabilities, what was stored and hit, and the objective made of both outcomes."""
    model, ids, truth = case
    tokens, targets, opens = rows_of(ids)
    scores = model.score(tokens, targets, opens)
    flat = lambda x: x.flatten()[:LENGTH - 1]
    real = flat(targets) != EOT
    at = lambda table: table[:-1].gather(1, flat(targets)[:, None])[:, 0]
    for got, wanted in ((scores.log_p, truth["log_p"]), (scores.log_p_stm, truth["stm"])):
        torch.testing.assert_close(flat(got)[real].double(), at(wanted)[real], **CLOSE)
    assert flat(scores.stored).tolist() == truth["stored"][1:]
    assert flat(scores.hit).tolist() == truth["hit"][:-1]

    odds = flat(read(model, tokens, targets, opens)[3]).double()
    assert (odds > 0).tolist() == truth["open"][:-1]
    pays = odds.sigmoid()
    wanted = (pays * (at(truth["with"]) - model.config.ltm_price) + (1 - pays) * at(truth["without"])
              + model.config.ltm_stm_loss * at(truth["stm"]))
    torch.testing.assert_close(flat(scores.objective)[real].double(), wanted[real], **CLOSE)


def test_what_training_does_not_know_is_added_after_it(case):
    """In eval mode only: more trust, of exact matches; less weight, of learned ones, the more items a query sees."""
    ids, plain = case[1], lively(ltm_exact_trust=0.0, ltm_crowding=0.0)
    rows = rows_of(ids)
    trusting, crowded, neither, training = (read(model, *rows)[0] for model in (
        lively(ltm_crowding=0.0), lively(ltm_exact_trust=0.0), plain, lively().train()))
    assert torch.equal(trusting.learned, neither.learned) and torch.equal(crowded.exact, neither.exact)

    def alone(n, **settings):
        """What the exact address of n tokens finds."""
        model = lively(ltm_crowding=0.0, **settings)
        trusts = model.memory.from_state.bias.data[:sum(model.memory.sizes)].split(model.memory.sizes)[1]
        trusts[[i for i in range(3) if i != n - 1]] = -100.0
        return read(model, *rows)[0].exact
    for n in (1, 2, 3):
        assert (alone(n) > 1e-9).any()
        torch.testing.assert_close(alone(n), math.exp(0.5 * n) * alone(n, ltm_exact_trust=0.0))
    held = torch.tensor([len(items) for items in case[2]["items"]])
    less, text_of = (held / plain.config.ltm_shown).clamp(min=1) ** -0.6, lambda x: x.flatten(0, 1)[:LENGTH]
    assert (text_of(neither.learned)[less < 0.9] > 0).any() and less.max() == 1
    torch.testing.assert_close(text_of(crowded.learned), less[:, None] * text_of(neither.learned))
    assert torch.equal(training.exact, neither.exact) and torch.equal(training.learned, neither.learned)
    torch.testing.assert_close(streamed(lively().train(), ids, [7, 1])[0], plain(ids).logits, **CLOSE)


@pytest.mark.parametrize("slots", [SLOTS, 4])
def test_rows_without_opens_are_sequences_of_their_own(slots):
    """Training's call, rows and no `opens`: every row starts empty, forgets as any, and equals the row's reference."""
    model = lively(ltm_slots=slots, ltm_surprisal_bits=6.0)
    tokens, targets, _ = rows_of(text(3 * WINDOW))
    scores = model.score(tokens, targets)
    for row in range(3):
        truth = reference(model, tokens[row])
        wanted = truth["log_p"].gather(1, targets[row][:, None])[:, 0]
        real = targets[row] != EOT
        torch.testing.assert_close(scores.log_p[row][real].double(), wanted[real], **CLOSE)
        # the row's last target comes after it: only there does `targets` say more than `tokens` of the same row
        assert scores.stored[row, :-1].tolist() == truth["stored"][1:] and scores.hit[row].tolist() == truth["hit"]


def test_packed_sequences_equal_each_alone():
    """Sequences of different lengths in one `score(opens=...)` call give each exactly what it gives alone."""
    model = lively(3, ltm_surprisal_bits=5.0)
    # where one fills its last row, its end stands right before the next one's start
    sequences = [text(n, seed=n) for n in (50, 3, WINDOW, 70, 1, 2 * WINDOW, 25, 3 * WINDOW, 40, WINDOW + 1)]
    packed = model.score(*rows_of(*sequences))
    start = 0
    for ids in sequences:
        tokens, targets, opens = rows_of(ids)
        alone = model.score(tokens, targets, opens)
        real = targets != EOT
        mine = slice(start, start + len(tokens))
        torch.testing.assert_close(packed.log_p[mine][real], alone.log_p[real], **CLOSE)
        assert torch.equal(packed.stored[mine], alone.stored) and torch.equal(packed.hit[mine][real], alone.hit[real])
        wanted = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(alone.log_p[real], wanted[ids[:, 1:] != EOT], **CLOSE)
        start += len(tokens)


# ------------------------------------------------------------------------------------ nothing leaks

@pytest.mark.parametrize("place", [1, WINDOW - 1, WINDOW, 37, LENGTH - 1])
def test_a_future_token_changes_no_earlier_probability(case, place):
    """One token flipped anywhere: every probability before it is the same, bit for bit, in all three forms."""
    model, ids, _ = case
    flipped = ids.clone()
    flipped[0, place] = (ids[0, place] + 17) % EOT
    assert torch.equal(model(ids).logits[:, :place], model(flipped).logits[:, :place])
    assert not torch.equal(model(ids).logits[:, place:], model(flipped).logits[:, place:])

    before, after = model.score(*rows_of(ids)), model.score(*rows_of(flipped))
    real = rows_of(ids)[1].flatten()[:place - 1] != EOT                 # position place - 1 has the flipped target
    assert all(torch.equal(a.flatten()[:place - 1][real], b.flatten()[:place - 1][real]) for a, b in zip(before, after))

    sizes = [WINDOW, 5, 1]
    assert torch.equal(streamed(model, ids, sizes)[0][:, :place], streamed(model, flipped, sizes)[0][:, :place])


def test_a_prefix_says_what_the_whole_says(case):
    """Cut off after any position, the text gives that position the same probabilities: nothing came from behind it."""
    model, ids, _ = case
    whole = model(ids).logits
    for T in (1, 2, WINDOW, WINDOW + 1, 63):
        torch.testing.assert_close(model(ids[:, :T]).logits, whole[:, :T], **CLOSE)


def test_no_item_is_visible_to_the_prediction_that_stored_it():
    """Where everything matches everything, the first stored token is found one position later, not by its own."""
    model = lively(ltm_surprisal_bits=0.0)
    model.memory.from_state.weight.zero_()
    model.memory.from_tokens.weight.zero_()
    model.memory.from_state.bias.fill_(1.0)                             # all cosines 1, all look-ups open
    ids = text(WINDOW)
    scores = model.score(*rows_of(ids))
    assert scores.stored[0, 0] and scores.hit[0].tolist() == [False] + [True] * (WINDOW - 1)
    assert scores.log_p[0, 0] == pytest.approx(float(scores.log_p_stm[0, 0]), abs=1e-5)
    memory = Memory(model)
    model(ids[:, :1], past_key_values=memory)
    assert memory.retrieved() == []
    model(ids[:, 1:2], past_key_values=memory)
    assert [item["token"] for item in memory.retrieved()] == [int(ids[0, 1])]


def test_rows_of_a_batch_share_nothing():
    """A batch of different texts, in either form, equals each of them alone; each memory holds its own items."""
    model = lively()
    batch = torch.cat([text(50, seed) for seed in (5, 6, 7)])
    memory = Memory(model, 3)
    together = {"parallel": model(batch).logits, "streaming": streamed(model, batch, [WINDOW, 3], memory)[0]}
    for row in range(3):
        alone, own = streamed(model, batch[row:row + 1], [WINDOW, 3])
        for logits in together.values():
            torch.testing.assert_close(logits[row:row + 1], alone, **CLOSE)
        held, alone = memory.contents(sequence=row), own.contents()
        assert [(i["token"], i["position"]) for i in held] == [(i["token"], i["position"]) for i in alone]
        assert [i["bits"] for i in held] == pytest.approx([i["bits"] for i in alone], abs=1e-4)


def test_memory_is_empty_at_each_start():
    """The first prediction is the backbone's own, a fresh memory holds nothing, and a cleared one is as good as new."""
    model, ids = lively(ltm_surprisal_bits=0.0), text(40)
    stm = model.logits(model.states(ids[:, :1])).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits[:, :1], stm, **CLOSE)
    memory = Memory(model)
    assert memory.contents() == [] == memory.retrieved() and memory.get_seq_length() == 0
    first = model(ids, past_key_values=memory).logits
    torch.testing.assert_close(first[:, :1], stm, **CLOSE)
    stored = [t for t in range(1, 40) if ids[0, t] != EOT]
    assert [item["position"] for item in memory.contents()] == stored[-SLOTS:]
    again = model(ids, past_key_values=memory).logits                   # went on: it remembers the first time
    assert not torch.allclose(again, first, **CLOSE)
    memory.clear()
    assert memory.contents() == [] == memory.retrieved() and memory.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=memory).logits, first)


def test_never_more_than_the_slots_and_the_oldest_goes_first():
    """After each token the ring holds the newest surprising ones, up to `ltm_slots`, in order, and no others."""
    model, ids = lively(3), text(60, seed=1)
    memory, expected = Memory(model), deque(maxlen=SLOTS)
    tokens, _, opens = rows_of(ids)
    stm = model.logits(model.states(tokens, opens)).log_softmax(-1).flatten(0, 1)
    for t in range(60):
        model(ids[:, t:t + 1], past_key_values=memory)
        token = int(ids[0, t])
        if t and token != EOT and -float(stm[t - 1, token]) / math.log(2) > model.config.ltm_surprisal_bits:
            expected.append((token, t))
        held = [(item["token"], item["position"]) for item in memory.contents()]
        assert held == list(expected) and len(held) <= SLOTS
    assert int(memory.count) > 2 * SLOTS


def test_an_evicted_item_is_out_of_reach_in_the_parallel_form():
    """With everything stored and everything matching, a position retrieves exactly the last `ltm_slots` items."""
    model = lively(ltm_surprisal_bits=0.0)
    model.memory.from_state.weight.zero_()
    model.memory.from_tokens.weight.zero_()
    model.memory.from_state.bias.fill_(1.0)
    ids = torch.randint(0, EOT, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    reading = read(model, *rows_of(ids))[0]
    assert (reading.learned > 0).sum(-1).flatten()[:LENGTH].tolist() == [min(t, SLOTS) for t in range(LENGTH)]


def test_retrieved_is_what_the_reference_found(case):
    """After each token, `retrieved` names the very items that the reference found, with all of their share of p."""
    model, ids, truth = case
    memory = Memory(model)
    for t in range(50):
        log_p = model(ids[:, t:t + 1], past_key_values=memory).logits[0, 0]
        found = memory.retrieved()
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

def test_ltm_off_is_gpt_bit_for_bit_within_a_window():
    """The hybrid that add_memory makes, LTM off, gives GPT's very bits on a whole window; LTM on, it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", dict(vocab_size=VOCAB, n_layer=2, n_embd=64, n_head=2))
        gpt, hybrid = add_memory.make_models("tiny", seed=0)
    assert hybrid.config.stm_window == 128 and gpt.config.stm_window is None
    ids = torch.cat([text(128, seed) for seed in (0, 1)])
    hybrid.config.ltm_enabled = False
    assert torch.equal(gpt(ids).logits, hybrid(ids).logits)
    targets = F.pad(ids[:, 1:], (0, 1), value=EOT)
    assert all(torch.equal(a, b) for a, b in zip(gpt.score(ids, targets), hybrid.score(ids, targets)))
    torch.testing.assert_close(gpt(ids, use_cache=True).logits, gpt(ids).logits, **CLOSE)
    hybrid.config.ltm_enabled = True
    assert not torch.equal(gpt(ids).logits, hybrid(ids).logits)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 55])
def test_baseline_is_masked_attention_of_any_length(length):
    """LTM off, both forms equal softmax attention over the last WINDOW positions, written as a loop over positions."""
    model, ids = lively(ltm_enabled=False), text(length, seed=length)
    wanted = (reference_states(model, ids[0], WINDOW) @ model.backbone.embed.weight.double()[:VOCAB].T).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits[0].double(), wanted, **CLOSE)
    torch.testing.assert_close(streamed(model, ids, [WINDOW, 5])[0][0].double(), wanted, **CLOSE)
    scores = model.score(*rows_of(ids))
    assert not scores.stored.any() and not scores.hit.any()


def test_gpt_sees_everything_and_says_when_it_cannot():
    """GPT without a window attends to all that came, in both forms, and refuses text beyond its table of positions."""
    torch.manual_seed(0)
    model, ids = GPT(config(stm_window=None, ltm_enabled=False, n_positions=40)).eval(), text(40)
    wanted = (reference_states(model, ids[0], 40) @ model.backbone.embed.weight.double()[:VOCAB].T).log_softmax(-1)
    torch.testing.assert_close(model(ids).logits[0].double(), wanted, **CLOSE)
    torch.testing.assert_close(streamed(model, ids, [11, 1])[0][0].double(), wanted, **CLOSE)
    for refused in (dict(), dict(use_cache=True)):
        with pytest.raises(ValueError, match="at most 40"):
            model(text(41), **refused)


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
    model, cache = lively(ltm_enabled="off" not in form), "streaming" in form
    # 60 is the longest: padded on the left, the text of 12 begins with a block of the streaming form, at 48
    sequences = [text(n, seed=n) for n in (WINDOW + 9, 60, 7, 12, 1)]
    ids, mask = padded(sequences, side)
    if side == "right" and cache:
        with pytest.raises(ValueError, match="left"):
            model(ids, attention_mask=mask, use_cache=True)
        return
    out = model(ids, attention_mask=mask, use_cache=cache, output_hidden_states=True)
    for row, one in enumerate(sequences):
        alone = model(one, output_hidden_states=True)
        mine = mask[row].bool()
        torch.testing.assert_close(out.logits[row, mine], alone.logits[0], **CLOSE)
        for states, wanted in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(states[row, mine], wanted[0], **CLOSE)
    if cache:                                               # and what is remembered is right too: the next token agrees
        after = model(torch.full((5, 1), 9), past_key_values=out.past_key_values,
                      attention_mask=F.pad(mask, (0, 1), value=1)).logits
        for row, one in enumerate(sequences):
            torch.testing.assert_close(after[row], model(F.pad(one, (0, 1), value=9)).logits[0, -1:], **CLOSE)


def test_masks_with_holes_are_refused():
    """Padding inside a text, or a row of nothing but padding, is an error in either form, never a silent guess."""
    model, ids = lively(), text(20)
    mask = torch.ones_like(ids)
    mask[0, 8] = 0
    with pytest.raises(ValueError, match="holes"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="left"):
        model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="holes"):
        model(ids, attention_mask=torch.zeros_like(ids))


@pytest.mark.parametrize("enabled", [True, False], ids=["LTM", "LTM off"])
def test_a_cache_refuses_what_it_cannot_take(enabled):
    """Padding after a text has begun, another number of rows, and no token at all are refused, each with its reason."""
    model, ids = lively(ltm_enabled=enabled), torch.cat([text(20), text(20, seed=1)])
    memory = Memory(model, 2)
    model(ids, past_key_values=memory)
    late = torch.ones(2, 5, dtype=torch.long)
    late[1, :2] = 0
    with pytest.raises(ValueError, match="before the first token"):
        model(ids[:, :5], past_key_values=memory, attention_mask=late)
    with pytest.raises(ValueError, match="2 sequences, not 1"):
        model(ids[:1], past_key_values=memory)
    with pytest.raises(ValueError, match="no tokens"):
        model(ids[:, :0], past_key_values=memory)
    assert memory.get_seq_length() == 20


def test_hidden_states_are_those_of_each_layer(case):
    """n_layer + 1 of them, the last being what the logits are made of; the streaming form gives the same."""
    model, ids, _ = case
    whole, cached = (model(ids, output_hidden_states=True, use_cache=c).hidden_states for c in (False, True))
    assert len(whole) == model.config.n_layer + 1 and {x.shape for x in whole} == {(1, LENGTH, 64)}
    for a, b in zip(whole, cached, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    tokens, _, opens = rows_of(ids)
    torch.testing.assert_close(whole[-1][0], model.states(tokens, opens).flatten(0, 1)[:LENGTH], **CLOSE)
    torch.testing.assert_close(whole[0][0], models.norm(model.backbone.embed.weight[ids[0]]), **CLOSE)


@pytest.mark.parametrize("cache", [False, True])
def test_labels_give_the_mean_loss(case, cache):
    """`loss` is the mean -log p of each label given what is before it, -100 left out; a kept tail scores that tail."""
    model, ids, truth = case
    labels = ids.clone()
    labels[0, :30] = -100
    wanted = -truth["log_p"][29:-1].gather(1, ids[0, 30:, None]).mean()
    assert float(model(ids, labels=labels, use_cache=cache).loss) == pytest.approx(float(wanted), abs=1e-5)
    kept = model(ids, labels=ids, logits_to_keep=10, use_cache=cache).loss
    assert float(kept) == pytest.approx(-float(truth["log_p"][-10:-1].gather(1, ids[0, -9:, None]).mean()), abs=1e-5)


def test_every_parameter_gets_a_finite_gradient():
    """The training objective reaches the backbone and all of the memory, and no masked branch lets a NaN through."""
    with torch.enable_grad():
        model = lively().train()
        tokens, targets, _ = rows_of(text(6 * WINDOW))
        scores = model.score(tokens, targets)
        torch.where(targets != EOT, scores.objective, 0.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------------------------ sizes, seeds, settings

def test_70m_is_70m():
    """The real configuration has 65 to 75 million parameters, all of them in a group, and the specified memory."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(models, "EOT", 50256)
        model = RevenaHybridTiny(RevenaConfig(**SIZES["70M"]))
    groups = parameters_by_group(model)
    assert 65e6 <= sum(groups.values()) == sum(p.numel() for p in model.parameters()) <= 75e6
    c = model.config
    assert (c.stm_window, c.ltm_slots, c.ltm_surprisal_bits, c.ltm_cosine) == (128, 256, 4.5, 0.8)


def test_initial_weights_follow_the_seed():
    """A seed gives the same weights each time, another seed others."""
    def weights(seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, "tiny", dict(vocab_size=VOCAB, n_layer=1, n_embd=64, n_head=2))
            return add_memory.make_models("tiny", seed)[1].state_dict()
    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.embed.weight"], other["backbone.embed.weight"])


def test_settings_survive_the_config_file(tmp_path):
    """Every setting, changed from its default, comes back from config.json, and the model made of it is the same."""
    changed = dict(n_positions=999, stm_window=WINDOW, ltm_slots=9, ltm_surprisal_bits=5.5, ltm_cosine=0.7,
                   ltm_ngrams=2, ltm_learned=3, ltm_dim=32, ltm_sharpness=6.0, ltm_plausibility=0.2, ltm_price=0.5,
                   ltm_stm_loss=0.6, ltm_exact_trust=0.3, ltm_crowding=0.4, ltm_shown=5)
    settings = {name for name in inspect.signature(RevenaConfig).parameters if name.startswith(("ltm_", "stm_"))}
    assert settings == changed.keys() - {"n_positions"} | {"ltm_enabled"}
    model = lively(**changed)
    model.save_pretrained(tmp_path)
    back = RevenaConfig.from_pretrained(tmp_path)
    defaults = RevenaConfig()
    for name, value in changed.items() | {("n_embd", 64), ("n_layer", 2), ("n_head", 2), ("vocab_size", VOCAB)}:
        assert getattr(back, name) == value and (value != getattr(defaults, name)), name
    assert back.ltm_enabled and (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (EOT,) * 3
    ids = text(50)
    torch.testing.assert_close(model(ids).logits[0].double(), reference(model, ids[0])["log_p"], **CLOSE)
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    assert torch.equal(RevenaHybridTiny.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("damage, says", [
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing; make it with"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing; make it with"),
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000]),
     "not a whole safetensors file"),
    (lambda folder: lively(n_embd=32).save_pretrained(folder / "b") or (folder / "b/config.json").replace(
        folder / "config.json"), "do not fit"),
], ids=["no config", "half a config", "no weights", "half the weights", "another model's config"])
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage, says):
    """`load_model` says what is wrong with a folder and which command makes it again."""
    lively().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(StageError, match=says) as error:
        load_model(tmp_path, made_by="python train.py")
    assert "\n" not in str(error.value) and "python train.py" in str(error.value)


def test_log_p_is_the_same_as_written_for_a_gpu():
    """There it hides the columns of no token instead of leaving them out, and sums instead of picking."""
    class OnGPU(torch.Tensor):
        is_cuda = True
    model, draw, found = lively(), torch.Generator().manual_seed(0), []
    h, targets = torch.randn(3, WINDOW, model.config.n_embd, generator=draw), rows_of(text(3 * WINDOW))[1]
    for kind in (torch.Tensor, OnGPU):
        with torch.enable_grad():
            given = h.clone().requires_grad_()
            log_p, log_z = model.log_p(given.as_subclass(kind), targets)
            total = log_p.sum() + 0.1 * log_z.square().sum()
        gradients = torch.autograd.grad(total, [given, model.backbone.embed.weight])
        found.append([x.as_subclass(torch.Tensor) for x in (log_p, log_z, *gradients)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert len(found[1][3]) > model.config.vocab_size and not found[1][3][model.config.vocab_size:].any()


def test_a_compiler_that_fails_is_none(monkeypatch):
    """Whatever torch.compile needs and does not find, the stages go on without; on a CPU it is not even tried."""
    tried = []

    def no_c_compiler(function, **given):
        tried.append(given["options"]["deterministic"])
        raise RuntimeError("Failed to find C compiler")
    monkeypatch.setattr(torch, "compile", no_c_compiler)
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)             # there need not be a GPU
    assert not models.has_compiler(torch.device("cpu")) and tried == []
    assert not models.has_compiler(torch.device("cuda", 7)) and tried == [True]
    monkeypatch.setattr(torch, "compile", lambda function, **given: lambda x: None)
    assert models.has_compiler(torch.device("cuda", 6)) and not models.has_compiler(torch.device("cuda", 7))
    models.has_compiler.cache_clear()
