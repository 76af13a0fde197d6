"""Four further memories for the same backbone, and the model that knows them: store, bank, MAG,
GRU.

Store   keys and values of hidden states in two layers, up to 10,000 slots each, beside a short-term state that fades
Bank    1,024 learned vectors, read by cross-attention in every layer; nothing of the text: a control
Mag     the weights of a small network in one layer, rewritten by the gradient of its own surprise
Gru     a vector that fades, at the embedding, in the middle and at the final state

RevenaHosted, at the end of the file, puts any memory on a model that is trained already.

Each computes one function in two forms, as models.py has it: `rows` whole sequences at once, in
closed form where the equations allow it, `mix` a few tokens at a time with constant memory. What
happens at the end of a row (128 tokens) is kept apart from what happens at a token: see
RowMemory. The output matrices start at zero, so that each arm starts as the baseline.

Axes: as in models.py; beside these S sequences (N rows alone, or L lanes), T tokens of one, H
heads, d dimensions of a head, U units of a state that fades, I items of a store, c tokens of a
chunk, n chunks of a row. `place` is where in the backbone a memory acts, `i` its number among the
memory's places.
"""

import copy
import functools
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, DynamicCache

try:
    from .models import (Affine, Memory, RevenaCache, RevenaConfig, RevenaHybridTiny, at_places, digest, dtype_for,
                         into_slots, lagged, norm, noted_change, operator, region, text_of, tl, triton, where)
except ImportError:
    if __package__:
        raise
    from models import (Affine, Memory, RevenaCache, RevenaConfig, RevenaHybridTiny, at_places, digest, dtype_for,
                        into_slots, lagged, norm, noted_change, operator, region, text_of, tl, triton, where)


# ------------------------------------------------------------ what decays, without a loop

SPAN = 2048                     # tokens of a sequence whose recurrence is computed at once; more: one after another
CHUNK = 16                      # tokens of a chunk of it


def decay(log_a, begins=None):
    """Products of factors a: log_a (.., n) -> (.., n, n), at (i, j) that of all a_t with j < t <=
    i; 0 for j > i.

    `begins` (.., n) bool: what lies before such a place does not reach it. Masked before the
    exponential: after it, infinity times zero would make the gradient NaN.
    """
    n = log_a.size(-1)
    total = log_a.cumsum(-1)
    passed = total[..., :, None] - total[..., None, :]
    hidden = torch.ones(n, n, dtype=torch.bool, device=log_a.device).triu(1)
    if begins is not None:
        part = begins.long().cumsum(-1)
        hidden = hidden | (part[..., :, None] != part[..., None, :])
    return passed.masked_fill(hidden, -math.inf).exp()


def scan(log_a, b, first=None, opens=None):
    """h_t = a_t h_{t-1} + b_t in closed form over chunks and within them, float32.

    Args:
        log_a, b: (S, T, U). first: (S, U) the h before; None: 0.
        opens: (S, R) bool, of R equal rows of a sequence those that h does not reach from before; None: it reaches all.

    Returns: h (S, T, U) and the last one, (S, U).
    """
    T, rows = b.size(1), 1 if opens is None else opens.size(1)
    length = T // rows                                                  # of a row
    if T > SPAN:
        step = SPAN if opens is None else max(1, SPAN // length) * length
        parts = []
        for start in range(0, T, step):
            part = slice(start, start + step)
            those = None if opens is None else opens[:, start // length:(start + step) // length]
            h, first = scan(log_a[:, part], b[:, part], first, those)
            parts.append(h)
        return torch.cat(parts, 1), first
    c = CHUNK if opens is None else math.gcd(CHUNK, length)
    more = -T % c
    log_a, b = (F.pad(x, (0, 0, 0, more)).unflatten(1, (-1, c)) for x in (log_a, b))    # (S, n, c, U)

    def line(x):                                                        # what decays comes last
        return x.transpose(-1, -2)

    within = (decay(line(log_a)) * line(b)[..., None, :]).sum(-1)       # (S, n, U, c)
    total = log_a.sum(2)                                                # (S, n, U)
    begins = None
    if opens is not None:
        begins = F.pad(opens[..., None], (0, length // c - 1)).flatten(1)[:, None]      # (S, 1, n)
    # in float64: strong gates make sums of hundreds, whose differences float32 knows to a thousandth
    lasts = decay(line(total).double(), begins).to(b.dtype)
    ends = (lasts * line(within[..., -1])[..., None, :]).sum(-1)        # (S, U, n)
    if first is not None:
        reach = line(total).cumsum(-1).exp()
        if begins is not None:
            reach = reach.masked_fill(begins.cumsum(-1) > 0, 0.0)
        ends = ends + reach * first[..., None]
    before = F.pad(ends, (1, -1)) if first is None else torch.cat((first[..., None], ends[..., :-1]), -1)
    if begins is not None:
        before = before.masked_fill(begins, 0.0)
    h = line(within) + log_a.cumsum(2).exp() * line(before)[:, :, None]
    return h.flatten(1, 2)[:, :T], ends[..., -1]


# The same as one kernel each way, for whole sequences from their start: see GPT.fuse

if triton:
    @triton.jit
    def _composed(a, b, then_a, then_b):
        """h -> a h + b, and then h -> then_a h + then_b."""
        return a * then_a, b * then_a + then_b

    @triton.jit
    def _tile(T, U, BLOCK: tl.constexpr, UNITS: tl.constexpr):
        """A program's sequence, the places t of it, where they and its units stand in (S, T, U), and which
        of these there are.
        """
        s, t, u = tl.program_id(0), tl.arange(0, BLOCK), tl.program_id(1) * UNITS + tl.arange(0, UNITS)
        return s, t, (s * T + t[:, None]) * U + u[None, :], (t[:, None] < T) & (u[None, :] < U)

    @triton.jit
    def _factors(log_a, opens, where, t, inside, s, R, C):
        """a_t (BLOCK, UNITS) of places t; 0 where a sequence starts, and where nothing is."""
        starts = tl.load(opens + s * R + t // C, mask=t // C < R, other=0) & (t % C == 0)
        a = tl.exp(tl.load(log_a + where, mask=inside, other=float("-inf")))
        return tl.where(starts[:, None] != 0, 0.0, a)

    @triton.jit
    def _scan_forward(log_a, b, opens, h, T, U, R, C, BLOCK: tl.constexpr, UNITS: tl.constexpr):
        """Some units of one sequence: h of all its tokens."""
        s, t, where, inside = _tile(T, U, BLOCK, UNITS)
        a = _factors(log_a, opens, where, t, inside, s, R, C)
        _, found = tl.associative_scan((a, tl.load(b + where, mask=inside, other=0.0)), 0, _composed)
        tl.store(h + where, found, mask=inside)

    @triton.jit
    def _scan_backward(log_a, opens, h, grad, of_log_a, of_b, T, U, R, C, BLOCK: tl.constexpr, UNITS: tl.constexpr):
        """Gradients of the same: that of b_t is the recurrence from the end, by the factors of t + 1."""
        s, t, where, inside = _tile(T, U, BLOCK, UNITS)
        after = _factors(log_a, opens, where + U, t + 1, inside & (t[:, None] < T - 1), s, R, C)
        given = tl.load(grad + where, mask=inside, other=0.0)
        _, summed = tl.associative_scan((after, given), 0, _composed, reverse=True)
        a = _factors(log_a, opens, where, t, inside, s, R, C)
        before = tl.load(h + where - U, mask=inside & (t[:, None] > 0), other=0.0)
        tl.store(of_log_a + where, summed * a * before, mask=inside)
        tl.store(of_b + where, summed, mask=inside)

    def _scan_sizes(log_a, opens):
        """Grid and sizes for log_a (S, T, U) in rows as `opens` (S, R) has them."""
        S, T, U = log_a.shape
        told = dict(T=T, U=U, R=opens.size(1), C=T // opens.size(1), BLOCK=triton.next_power_of_2(T), UNITS=4)
        return (S, triton.cdiv(U, told["UNITS"])), told

    @operator("scan")
    def fused_scan(log_a: torch.Tensor, b: torch.Tensor, opens: torch.Tensor) -> torch.Tensor:
        """h (S, T, U) of `scan`, where nothing came before."""
        log_a, b, opens = log_a.contiguous(), b.contiguous(), opens.contiguous()
        grid, told = _scan_sizes(log_a, opens)
        h = torch.empty_like(b)
        _scan_forward[grid](log_a, b, opens, h, **told, num_warps=8)
        return h

    @operator("scan_backward")
    def _scan_gradient(log_a: torch.Tensor, opens: torch.Tensor, h: torch.Tensor,
                       grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_a, opens, h, grad = (x.contiguous() for x in (log_a, opens, h, grad))
        grid, told = _scan_sizes(log_a, opens)
        of_log_a, of_b = torch.empty_like(h), torch.empty_like(h)
        _scan_backward[grid](log_a, opens, h, grad, of_log_a, of_b, **told, num_warps=8)
        return of_log_a, of_b

    @fused_scan.register_fake
    def _(log_a, b, opens):
        return b.new_empty(b.shape)

    @_scan_gradient.register_fake
    def _(log_a, opens, h, grad):
        return h.new_empty(h.shape), h.new_empty(h.shape)

    def _keep_scan(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[2], output)

    def _scan_back(ctx, grad):
        log_a, opens, h = ctx.saved_tensors
        return *_scan_gradient(log_a, opens, h, grad), None

    fused_scan.register_autograd(_scan_back, setup_context=_keep_scan)


def sequences(x, opens):
    """x (N, C, ..) of rows as sequences (S, T, ..): each row alone, or (L, R C, ..) where `opens`
    (L, R) chains them.
    """
    return x if opens is None else x.unflatten(0, opens.shape).flatten(1, 2)


class Fading(nn.Module):
    """A vector of which every unit fades at its own pace: the gated recurrence of Gru and of
    Store's short-term part.

        z_t = sigmoid(W_z x_t + b_z)        candidate_t = tanh(W_h x_t + b_h)
        h_t = sigmoid(fade) (1 - z_t) h_{t-1} + z_t candidate_t

    minGRU (Feng et al. 2024, section 3.1: gates of the input alone, so that no loop is needed)
    with a decay that is learned, as RG-LRU's (De et al. 2024, section 2.4). Start: 1 / z spread
    from 4 to 1,024 tokens over the units, and sigmoid(fade) = 0.9997 a token: what starts at 0.97
    a token is a 4e-4 after 256 and learns nothing from there. Read: units of like pace are
    normalised together, or the fast ones, which move most, would drown the slow.
    """

    FASTEST, SLOWEST = 4, 1024          # tokens
    GROUPS = 8                          # of units that are normalised together
    fused = False                       # whether the kernel made for it may be called

    def __init__(self, units):
        super().__init__()
        self.fade = nn.Parameter(torch.full((units,), 8.0))

    def start(self, bias):
        """Set the part of a bias that makes the gates, (2 U,), to the start above."""
        tokens = torch.linspace(math.log(self.FASTEST), math.log(self.SLOWEST), len(self.fade)).exp()
        with torch.no_grad():
            bias.copy_(torch.cat((-(tokens - 1).log(), torch.zeros_like(tokens))))

    def forward(self, gates, first=None, opens=None, real=None):
        """gates (S, T, 2 U) float32 -> (h (S, T, U), the last h, mean of z, mean of log a); see
        `scan`.
        """
        gate, candidate = gates.chunk(2, -1)
        log_a = F.logsigmoid(-gate) + F.logsigmoid(self.fade)
        z = gate.sigmoid()
        b = z * candidate.tanh()
        if real is not None:
            log_a = log_a.masked_fill(~real[..., None], 0.0)
            b = b.masked_fill(~real[..., None], 0.0)
        if self.fused and first is None and b.size(1) <= SPAN:
            starts = torch.ones_like(b[:, :1, 0], dtype=torch.bool) if opens is None else opens
            h = fused_scan(log_a, b, starts)
            last = h[:, -1]
        else:
            h, last = scan(log_a, b, first, opens)
        return h, last, z.mean(), log_a.mean()

    def half_lives(self, bias):
        """Tokens after which half is left of each unit, where the gate is what its bias (2 U,)
        alone makes of it.
        """
        units = len(self.fade)
        log_a = F.logsigmoid(-bias[:units].float()) + F.logsigmoid(self.fade.float())
        return math.log(0.5) / log_a


def by_pace(h):
    """h (.., U), each group of neighbouring units normalised."""
    return norm(h.unflatten(-1, (Fading.GROUPS, -1))).flatten(-2)


# ------------------------------------------------------------ memories that know rows

def places_of(placement, layers):
    """Numbers of layers: "all", "first", "last", "every 3", "upper" (the middle, half-way up and the
    final state), or a list of them. Raises ValueError where there is no such place.
    """
    if isinstance(placement, str) and placement.startswith("every "):
        return tuple(range(0, layers, int(placement.split()[1])))
    named = {"all": range(layers), "first": [0], "last": [layers - 1], "upper": [layers // 2, 3 * layers // 4, layers]}
    chosen = named.get(placement) if isinstance(placement, str) else placement
    if not chosen or not all(-1 <= place <= layers for place in chosen):
        raise ValueError(f"placement={placement!r} names no place of {layers} layers: give {', '.join(named)}, "
                         f"every N, or numbers from -1 (the embedding) to {layers} (the final state)")
    return tuple(sorted(set(chosen)))


class Arrival(NamedTuple):
    """Which new tokens came, n of each of B sequences."""

    real: torch.Tensor          # (B, n) bool: text, not padding
    slots: torch.Tensor         # (B, n) place of each within its row; C: padding
    ended: torch.Tensor         # (B,) bool: with these, a row is full
    whole: bool                 # they are all of a row of each


class RowMemory(Memory):
    """A memory that knows where in a row of C tokens it is, so that something can happen at a row's
    end.

    A subclass gives `held`, `step` and, where whole sequences are had faster than row by row,
    `whole`. Sequences of a batch may be at different places of their rows; a block of new tokens
    never goes beyond a row's end (`room`), where `by_row` says that this matters.

    Settings of all: carry: False forgets everything at each row's end (the control "does carrying
    matter?"). placement: where it acts, as `places_of` has it; None: the kind's own places.

    The state: `filled` (B,), tokens of the current row so far, and what `held` gives.
    """

    own = {"carry": True, "placement": None}
    by_row = False
    embedding = None            # () -> the backbone's TokenMatrix, for `contents`; RevenaHybrid sets it

    def __init__(self, config):
        super().__init__(config)
        placement = self.set["placement"]
        self.places = self.default_places() if placement is None else places_of(placement, config.n_layer)

    @property
    def row_length(self):
        return self.config.stm_window

    def default_places(self):
        """Two in the middle: layers 3 and 6 of 8, counted from 1."""
        layers = self.config.n_layer
        return tuple(sorted({layers // 3, 2 * layers // 3}))

    def width_of(self, name, share, least):
        """A setting that is a size, a multiple of 8; None: so much of the model's width, at least
        `least`. Raises ValueError where it is none.
        """
        chosen = self.set[name]
        if chosen is not None and (chosen <= 0 or chosen % 8):
            raise ValueError(f"{name}={chosen} is no multiple of 8")
        return max(least, int(share * self.config.n_embd) // 8 * 8) if chosen is None else chosen

    # ---- state

    def held(self, batch, device):
        """{name: tensor (batch, ..)} of sequences that have read nothing."""
        return {}

    def empty(self, batch, device):
        filled = torch.zeros(batch, dtype=torch.long, device=device)
        return {**self.held(batch, device), "filled": filled}

    def room(self, state):
        free = self.row_length - state["filled"]
        return free if self.by_row or not self.set["carry"] else None

    # ---- the two forms

    def rows(self, place, x, y, opens, notes):
        return self.whole(place, x, y, opens if self.set["carry"] else None, notes)

    def whole(self, place, x, y, opens, notes):
        """`rows`, with `opens` as it is to be understood."""
        return super().rows(place, x, y, opens, notes)

    def mix(self, place, x, y, state, real, notes):
        came = self.arrival(x, state, real)
        y, state = self.step(place, x, y, state, came, notes)
        if place != self.places[-1]:
            return y, state
        filled = state["filled"] + came.real.sum(1)
        if not self.set["carry"]:
            empty = self.empty(len(x), x.device)
            state = {name: where(came.ended, empty[name], kept) for name, kept in state.items()}
        return y, {**state, "filled": filled % self.row_length}

    def step(self, place, x, y, state, came, notes):
        """What becomes of y (B, n, D) at a place: (y, next state), of which only what changed here
        is new.
        """
        raise NotImplementedError

    def arrival(self, x, state, real):
        """The Arrival of new tokens whose states are x (B, n, D)."""
        whole = real is None and x.size(1) == self.row_length
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        count = real.long().cumsum(1)
        slots = (state["filled"][:, None] + count - 1).masked_fill(~real, self.row_length)
        ended = state["filled"] + count[:, -1] >= self.row_length
        return Arrival(real, slots, ended, whole)

    # ---- to be seen

    def raised(self, vectors, tokenizer, best=5):
        """The tokens whose logits vectors (.., D) in the residual stream raise most: a list of
        texts, or of numbers.
        """
        if self.embedding is None:
            return []
        matrix = self.embedding()
        logits = matrix(vectors.to(dtype_for(matrix)))[..., :self.config.vocab_size]
        found = logits.topk(best).indices.tolist()

        def words(tokens):
            return [text_of(token, tokenizer) if tokenizer else token for token in tokens]

        return [words(tokens) for tokens in found] if vectors.dim() > 1 else words(found)


def put_in_row(row, came, new):
    """A row's buffer (B, C, ..) with new (B, n, ..) at its slots."""
    return new.to(row.dtype) if came.whole else into_slots(row, came.slots, new)


def from_row(row, came):
    """What a row's buffer (B, C, ..) holds for the new tokens: (B, n, ..)."""
    if came.whole:
        return row
    return at_places(row, came.slots.clamp(max=row.size(1) - 1))


def note(notes, **scalars):
    """Leave statistics of this pass for history.jsonl."""
    for name, value in scalars.items():
        notes.setdefault(name, []).append(torch.as_tensor(value).detach().float())


def aligned(size):
    """A matrix's rows, rounded up for tensor cores."""
    return -(-size // 16) * 16


# ------------------------------------------------------------ the store

class Items(NamedTuple):
    """Items of a store at one place."""

    keys: torch.Tensor          # (B, I, H d) unit vectors a head
    values: torch.Tensor        # (B, I, H d)
    facts: torch.Tensor         # (B, I, 4) float32: see FACTS


FACTS = ("importance", "count", "token", "position")       # importance: its logarithm; -inf: the slot is empty


REACH = 12.0                    # nats below the best score, where a weight is 6e-6 of it: nothing is looked for there
HALVINGS = 14                   # of that: scores are told apart by 0.0007


def threshold(score, best, top):
    """The least threshold, as near as halving comes, that at most `top` of the scores (.., I)
    reach; best (.., 1). Where more tie for the best, all of these do.

    A compiler makes all of it one pass over the scores; sorting them, or torch.topk, takes more
    time than the rest.
    """
    low, high = best - REACH, best
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        few = (score >= middle).sum(-1, keepdim=True) <= top
        low = torch.where(few, low, middle)
        high = torch.where(few, middle, high)
    return high


@region
def look_once(store, *given):
    """Store.look where no gradient is wanted: who compiles many of them compiles one."""
    return store.look(*given)


class Store(RowMemory, kind="store"):
    """Keys and values of hidden states, found again by content, beside a state that fades; in two
    middle layers.

    Follows LMCODE's dual memory (short-term and long-term, consolidation, replay); of one kin
    with the Memorizing Transformer (Wu et al. 2022, section 3), LongMem (Wang et al. 2023) and
    CAMELoT (He et al. 2024: items that are alike are merged). At one place, x_s (D) the layer's
    normalised input, H heads:

        item s      key k_s = unit(W_k x_{s-1}), value v_s = W_v x_s (what followed),
                    importance i_s = log sigmoid(w x_s)
        score       a_ts = scale_h cos(W_q x_t, k_s) + i_s  for s <= t of the same sequence, the best `top` of them
                    (of those that tie for the last place all, or none)
        read        r_t = sigmoid(g x_t)_h softmax(0, a_t)(0, v): a null item of logit 0 lets a head find nothing
        output      y_t + W_o (r_t, h_t), h_t the short-term state of `Fading` with U units

    Keys know no position, so what is learned within a row holds across rows. A sequence's first
    token follows nothing and is no item. In training nothing is written into slots: while a lane
    has no more tokens than slots, and nothing is merged, all is one masked attention over the
    lane.

    At a row's end, its items join the slots. With `merge_above` below 1, an item whose key has a
    greater cosine (mean over heads) with an older one is merged into it: keys and values become
    means weighted by counts (kept in the model's precision), importances add. When full, the least
    important of the older half go first.

    Start: W_o = 0, scale 10, importance and gates 0.5; W_o learns four times as fast. Tried at
    5,000 chained steps (seed 0, nats a token over the last 1,000, all of them of text not seen
    before; baseline 4.908): as it is 4.854, W_o no faster 4.860, scale 20 and no faster 4.861, in
    layers 6 and 8 of 8 and no faster 4.877.

    Settings: heads; dim: of a head (None: a fifth of the width); slots; top; scale; cosine_above:
    nothing below is found; merge_above; units: U (None: a fifth of the width).

    The state, at each place p: `keys.p`, `values.p`, `facts.p` (B, M, ..), oldest first,
    empty slots among them; the same of the current row, `row_keys.p` .. (B, C, ..); `last.p` the last
    token's W_k x; `fading.p`; `merged.p` and `dropped.p`, how many items were; `read.p` (B,),
    tokens read. Watched: `found`, the share of attention that is not the null item's; `gate`;
    `held`, the share of slots in use; `merged`, items merged a sequence.
    """

    own = RowMemory.own | dict(heads=2, dim=None, slots=10_000, top=32, scale=10.0, cosine_above=-1.0, merge_above=1.0,
                               units=None)
    watched = ("found", "gate", "held", "merged")
    by_row = True

    def __init__(self, config):
        super().__init__(config)
        self.heads, self.dim = self.set["heads"], self.width_of("dim", 0.2, 16)
        self.units = self.width_of("units", 0.2, 32)
        D, width = config.n_embd, self.heads * self.dim
        self.sizes = (3 * width, 2 * self.units, self.heads, 1)
        total = aligned(sum(self.sizes))
        self.into = nn.ModuleList(Affine(D, total) for _ in self.places)
        self.out = nn.ModuleList(nn.Linear(width + self.units, D, bias=False) for _ in self.places)
        self.rates = {f"out.{i}.weight": 4.0 for i in range(len(self.places))}
        self.fading = nn.ModuleList(Fading(self.units) for _ in self.places)
        scale = torch.full((self.heads,), math.log(self.set["scale"]))
        self.scale = nn.ParameterList(nn.Parameter(scale.clone()) for _ in self.places)
        for into, out, fading in zip(self.into, self.out, self.fading):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(into.bias)
            fading.start(into.bias[3 * width:3 * width + 2 * self.units].data)

    def held(self, batch, device):
        M, C, dtype = self.set["slots"], self.row_length, dtype_for(self.out[0])
        width = self.heads * self.dim

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        def nothing(count):
            facts = zeros(count, len(FACTS))
            facts[..., 0] = -math.inf
            return facts

        state = {}
        for p in self.places:
            state |= {f"keys.{p}": zeros(M, width, dtype=dtype), f"values.{p}": zeros(M, width, dtype=dtype),
                      f"facts.{p}": nothing(M), f"row_keys.{p}": zeros(C, width, dtype=dtype),
                      f"row_values.{p}": zeros(C, width, dtype=dtype), f"row_facts.{p}": nothing(C),
                      f"last.{p}": zeros(width), f"fading.{p}": zeros(self.units),
                      f"merged.{p}": zeros(), f"dropped.{p}": zeros(),
                      f"read.{p}": zeros(dtype=torch.long)}
        return state

    # ---- what both forms share

    def project(self, i, x):
        """Of x (.., D), float32: queries, keys of the next item, values (.., H d); the fading
        state's gates; the read gates (.., H); log importance (..).
        """
        made = self.into[i](x)[..., :sum(self.sizes)]
        three, gates, read, importance = made.split(self.sizes, -1)
        return *three.chunk(3, -1), gates, read.sigmoid(), F.logsigmoid(importance[..., 0])

    def unit(self, x):
        """x (.., H d), each head a unit vector, in the matrices' dtype."""
        return F.normalize(x.unflatten(-1, (self.heads, -1)), dim=-1).flatten(-2).to(dtype_for(self.out[0]))

    def look(self, i, query, items, seen):
        """What queries (S, T, H d) read of Items (S, I, ..), `seen` (S or 1, T, I): (S, T, H, d),
        and the share of attention that found something (S, H, T).
        """
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        top, above = self.set["top"], self.set["cosine_above"]
        q, k, v = split(query), split(items.keys), split(items.values)
        cosine = (q @ k.mT).float()                                     # (S, H, T, I)
        hidden = ~seen[:, None]
        if above > -1:
            hidden = hidden | (cosine < above)
        scale = self.scale[i].exp()[:, None, None]
        score = cosine * scale + items.facts[:, None, None, :, 0]
        score = score.masked_fill(hidden, -math.inf)
        best = score.detach().amax(-1, keepdim=True)
        if top < score.size(-1):
            score = score.masked_fill(score < threshold(score.detach(), best, top), -math.inf)
        peak = best.clamp(min=0)
        weight = (score - peak).exp()
        weight = weight / (weight.sum(-1, keepdim=True) + (-peak).exp())
        read = weight.to(v.dtype) @ v
        return read.transpose(1, 2), weight.sum(-1)

    def answer(self, i, y, read, gate, h):
        """y (.., D) with what was read (.., H, d) and the short-term state (.., U) added."""
        gated = (read.float() * gate[..., None]).flatten(-2)
        both = torch.cat((gated, by_pace(h)), -1)
        return y + self.out[i](both.to(dtype_for(self.out[i])))

    # ---- whole sequences

    def whole(self, place, x, y, opens, notes):
        i, (N, C) = self.places.index(place), x.shape[:2]
        T = C if opens is None else C * opens.size(1)
        if T > self.set["slots"] or self.set["merge_above"] < 1:
            return super().whole(place, x, y, opens, notes)
        q, k, v, gates, gate, importance = self.project(i, x)
        first = torch.zeros(N, C, dtype=torch.bool, device=x.device)
        first[:, 0] = True if opens is None else opens.flatten()
        facts = importance.masked_fill(first, -math.inf)[..., None]
        dtype = dtype_for(self.out[i])
        items = Items(self.unit(lagged(k, 1, 0.0, opens)), v.to(dtype), facts)
        items = Items(*(sequences(part, opens) for part in items))
        place_in = torch.arange(T, device=x.device)
        seen = (place_in <= place_in[:, None])[None]
        if opens is not None:
            part = sequences(first, opens).cumsum(1)
            seen = seen & (part[:, :, None] == part[:, None])
        read, found = self.look_apart(i, sequences(self.unit(q), opens), items, seen)
        h, _, _, _ = self.fading[i](sequences(gates, opens), None, opens)
        note(notes, found=found.mean(), gate=gate.mean(), held=torch.full_like(found[0, 0, 0], T / self.set["slots"]),
             merged=torch.zeros_like(found[0, 0, 0]))
        return self.answer(i, y, read.reshape(N, C, self.heads, self.dim), gate, h.reshape(N, C, -1))

    def look_apart(self, i, query, items, seen):
        """`look` of a few sequences at a time, to bound the scores: 2^20 a head."""
        S, T = query.shape[:2]
        size = max(1, 2 ** 20 // T ** 2)
        once, found = not torch.is_grad_enabled(), []
        for start in range(0, S, size):
            some = slice(start, start + size)
            part = Items(*(x[some] for x in items))
            given = i, query[some], part, seen if len(seen) == 1 else seen[some]
            found.append(look_once(self, *given) if once else self.look(*given))
        reads, shares = zip(*found)
        return torch.cat(reads), torch.cat(shares)

    # ---- a few tokens

    def step(self, place, x, y, state, came, notes):
        i, p = self.places.index(place), place
        M, C, real = self.set["slots"], self.row_length, came.real
        q, k, v, gates, gate, importance = self.project(i, x)
        before = torch.cat((state[f"last.{p}"][:, None], k[:, :-1]), 1)
        position = state[f"read.{p}"][:, None] + real.long().cumsum(1) - 1
        importance = importance.masked_fill(position < 1, -math.inf)    # what follows nothing is no item
        tokens = notes.get("arriving", torch.zeros_like(position))
        facts = torch.stack((importance, torch.ones_like(importance), tokens.float(), position.float()), -1)
        new = Items(self.unit(before), v, facts)
        row = Items(*(state[f"row_{name}.{p}"] for name in Items._fields))
        row = Items(*(put_in_row(part, came, fresh) for part, fresh in zip(row, new)))
        old = Items(*(state[f"{name}.{p}"] for name in Items._fields))
        items = Items(*(torch.cat(parts, 1) for parts in zip(old, row)))
        of_row = torch.arange(C, device=x.device) <= came.slots[..., None]      # (B, n, C)
        seen = F.pad(of_row, (M, 0), value=True)
        read, found = self.look(i, self.unit(q), items, seen)
        h, fading, _, _ = self.fading[i](gates, state[f"fading.{p}"], None, real)
        last = torch.where(real[:, -1:], k[:, -1], state[f"last.{p}"])
        settled, merged, dropped = self.settle(old, items, came.ended)
        merged, dropped = merged + state[f"merged.{p}"], dropped + state[f"dropped.{p}"]
        held = (settled.facts[..., 0] > -math.inf).float().mean()
        note(notes, found=found.mean(), gate=gate.mean(), held=held, merged=merged.mean())
        state = {**state, f"last.{p}": last, f"fading.{p}": fading, f"merged.{p}": merged, f"dropped.{p}": dropped}
        state |= {f"{name}.{p}": part for name, part in settled._asdict().items()}
        state |= {f"row_{name}.{p}": part for name, part in row._asdict().items()}
        state[f"read.{p}"] = state[f"read.{p}"] + real.sum(1)
        return self.answer(i, y, read, gate, h), state

    # ---- a row's end

    def settle(self, old, items, ended):
        """What the M slots hold next: `old`, or where a row ended the best of `items` (B, M + C,
        ..); and how many items were merged and dropped, (B,) each.
        """
        none = torch.zeros_like(old.facts[:, 0, 0])
        asks = items.facts.device.type == "cpu" and not torch.compiler.is_compiling()
        if asks and not ended.any():                        # cheaper there than what follows
            return old, none, none
        M, above = self.set["slots"], self.set["merge_above"]
        merged = none
        if above < 1:
            items, merged = self.merge(items, M, above)
        kept = self.kept(items.facts[..., 0], M)
        there = (items.facts[..., 0] > -math.inf).sum(1)
        dropped = (there - M).clamp(min=0).float()
        settled = Items(*(where(ended, at_places(part, kept), was) for part, was in zip(items, old)))
        return settled, torch.where(ended, merged, none), torch.where(ended, dropped, none)

    def kept(self, importance, count):
        """Places (B, count), in order, of the items that stay, given their importance (B, I),
        oldest first: empty slots go first, then the least important of the older half, then the
        oldest.
        """
        I = importance.size(1)
        order = torch.arange(I, device=importance.device)
        rank = torch.where(order < I // 2, importance, 1e4 + order)
        rank = rank.masked_fill(importance == -math.inf, -math.inf)
        return rank.topk(count).indices.sort().values

    def merge(self, items, first, above):
        """Merge each of the items from number `first` on into the oldest one whose key is like its
        own: (Items, how many were merged (B,)). What is merged leaves an empty slot.
        """
        importance, count = items.facts[..., 0], items.facts[..., 1]
        B, I = importance.shape
        keys, values = items.keys.float(), items.values.float()
        order = torch.arange(I, device=keys.device)
        there = importance > -math.inf
        cosine = keys[:, first:] @ keys.mT / self.heads                 # (B, I - first, I)
        older = order < order[first:, None]
        like = (cosine > above) & older & there[:, None] & there[:, first:, None]
        target = torch.where(like, order, I).amin(-1)
        alone = target == I
        into = torch.cat((order[:first].expand(B, -1), torch.where(alone, order[first:], target)), 1)
        for _ in range(max(1, (I - first - 1).bit_length())):           # an item's target may be merged itself
            into = into.gather(1, into)
        sent = (into[:, None, first:] == order[:, None]).float()        # (B, I, I - first) one-hot
        mass = torch.where(there, count, 0.0)
        weight = torch.where(there, importance, 0.0).exp() * there

        def summed(x):
            stays = torch.cat((x[:, :first], torch.zeros_like(x[:, first:])), 1)
            return stays + sent @ x[:, first:]

        total = summed(mass[..., None])
        mean_key = summed(keys * mass[..., None])
        mean_value = summed(values * mass[..., None]) / total.clamp(min=1)
        weight = summed(weight[..., None])
        left = weight > 0
        logs = torch.where(left, weight, 1.0).log().masked_fill(~left, -math.inf)
        facts = torch.cat((logs, total, items.facts[..., 2:]), -1)
        untouched = (total == mass[..., None])
        changed = Items(torch.where(untouched, items.keys, self.unit(mean_key)),
                        torch.where(untouched, items.values, mean_value.to(items.values.dtype)),
                        torch.where(untouched & there[..., None], items.facts, facts))
        return changed, (~alone).sum(1).float()

    # ---- on demand

    def consolidate(self, state, threshold):
        """Merge items whose keys have a cosine above `threshold`, in the slots and at every place:
        (next state, how many were merged). Items of the current row join in at its end.
        """
        total = 0
        for p in self.places:
            items = Items(*(state[f"{name}.{p}"] for name in Items._fields))
            count = items.facts.size(1)
            used = int((items.facts[..., 0] > -math.inf).any(0).sum())
            if not used:
                continue
            kept = self.kept(items.facts[..., 0], used)                 # of those in use only: I x I cosines
            small = Items(*(at_places(x, kept) for x in items))
            small, merged = self.merge(small, 0, threshold)
            whole = Items(*(F.pad(x, (0, 0, count - used, 0)) for x in small))
            whole.facts[:, :count - used, 0] = -math.inf
            state = {**state, f"merged.{p}": state[f"merged.{p}"] + merged}
            state |= {f"{name}.{p}": part for name, part in whole._asdict().items()}
            total += int(merged.sum())
        return state, total

    def all_items(self, state, place, sequence):
        """Items (I, ..) of one sequence that are there, oldest first, those of the current row
        included.
        """
        filled = int(state["filled"][sequence])
        old = [state[f"{name}.{place}"][sequence] for name in Items._fields]
        row = [state[f"row_{name}.{place}"][sequence, :filled] for name in Items._fields]
        items = Items(*(torch.cat(parts) for parts in zip(old, row)))
        there = items.facts[:, 0] > -math.inf
        return Items(*(part[there] for part in items))

    def search(self, state, place, x, count, sequence=0):
        """Numbers of the items of one sequence that best match a query x (D), their scores and
        cosines (mean over heads), best first.
        """
        i, items = self.places.index(place), self.all_items(state, place, sequence)
        query = self.unit(self.project(i, x)[0]).float().view(self.heads, -1)
        keys = items.keys.float().unflatten(-1, (self.heads, -1))
        cosine = (keys * query).sum(-1)                                 # (I, H)
        score = (cosine * self.scale[i].exp()).mean(-1) + items.facts[:, 0]
        best = score.topk(min(count, len(score)))
        found = zip(best.indices.tolist(), best.values.tolist(), cosine.mean(-1)[best.indices].tolist())
        return items, list(found)

    # ---- to be seen

    def contents(self, state, tokenizer=None, sequence=0):
        """The items of one sequence, place by place, oldest first: dicts with place, token, text,
        position, importance (0 to 1; more where items were merged), count (of items merged into
        it).
        """
        found = []
        for p in self.places:
            for facts in self.all_items(state, p, sequence).facts.tolist():
                found.append({"place": p, **told(facts, tokenizer)})
        return found

    def statistics(self, state, sequence=0):
        """Of one sequence, place by place: dicts with place, items, slots, merged, dropped, tokens
        read, and tokens read for each item held (what merging saves).
        """
        found = []
        for p in self.places:
            read = int(state[f"read.{p}"][sequence])
            items = len(self.all_items(state, p, sequence).facts)
            found.append(dict(place=p, items=items, slots=self.set["slots"], merged=int(state[f"merged.{p}"][sequence]),
                              dropped=int(state[f"dropped.{p}"][sequence]), read=read,
                              tokens_per_item=read / max(1, items)))
        return found


def told(facts, tokenizer):
    """An item's FACTS as a dict in words and numbers."""
    importance, count, token, position = facts
    return dict(token=int(token), text=text_of(int(token), tokenizer), position=int(position),
                importance=math.exp(importance), count=int(count))


# ------------------------------------------------------------ the bank

class Bank(RowMemory, kind="bank"):
    """Learned vectors, the same for every text, read by cross-attention beside attention in every
    layer.

    Follows the Memory-Augmented Transformer (Mixture of Chapters); of one kin with memory layers
    (Berges et al. 2024) and persistent vectors (Sukhbaatar et al. 2019). It remembers nothing of
    the text: a control for "more parameters". A bank B (slots x D), normal 0.02, shared by all
    layers, with one W_k, W_v; x_t (D) the layer's normalised input:

        chapter     log p_t = log softmax(R x_t) over 16 chapters of 64 slots each; the best 4 of each token are read
                    (and what ties with them)
        read        r_t = softmax(scale_h q_t k_j / sqrt(d) + log p_t(chapter of j)) v_j, q, k normalised
        output      y_t + W_o r_t

    The relative routes by the mean of a sequence, which looks ahead; here each token routes for
    itself ("token"), by a fading mean of what came before it and itself ("rolling": half of it is
    ROLLING tokens old or less), or by the mean of both ("hybrid"). The router's log p stands in
    the logits, so the language model's own gradient reaches it (Mixture of Chapters); beside it a
    loss that balances the chapters (Fedus et al. 2021, section 2.2; of several processes each
    balances those of its own rows) and one that keeps the router's logits small (Zoph et al.
    2022, section 3.3). Weight decay leaves the bank alone.

    Start: W_o = 0. Tried as the store was (baseline 4.908): as it is 4.896, in layers 3 and 6 alone
    4.909, without chapters 4.904, its vectors four times as fast 4.897.

    Settings: slots; heads; dim: of a head (None: a tenth of the width); chapters
    (1: no router); best; rank: of a bank that is a product of two matrices, 0: it is none; width:
    of its vectors, 0: the model's; shared: one bank for all layers; after: the query has seen
    what attention found (block variant A: attention, memory, feed-forward), else the layer's
    input (after the last feed-forward: variant B); routing; balance, z_loss: weights of the two
    losses.

    The state, at each place p: `chosen.p` (B, chapters), how often each was, and `routed.p`, the
    fading mean, where routing is not by token. Watched: `chapters`, how many are in use (the
    exponential of the entropy); `sharpest`, the mean weight of the slot that is read most.
    """

    own = RowMemory.own | dict(slots=1024, heads=2, dim=None, chapters=16, best=4, rank=0, width=0, shared=True,
                               after=False, routing="token", balance=0.01, z_loss=0.001)
    watched = ("chapters", "sharpest")
    ROLLING = 32

    def __init__(self, config):
        super().__init__(config)
        self.heads, self.dim = self.set["heads"], self.width_of("dim", 0.1, 8)
        self.routed = self.set["chapters"] > 1
        if self.set["routing"] not in ("token", "rolling", "hybrid"):
            raise ValueError(f"routing {self.set['routing']!r} is none of token, rolling, hybrid")
        if self.set["slots"] % self.set["chapters"]:
            raise ValueError(f"{self.set['slots']} slots do not make {self.set['chapters']} equal chapters")
        D, inner = config.n_embd, self.heads * self.dim
        width, count = self.set["width"] or D, 1 if self.set["shared"] else len(self.places)
        rank, slots = self.set["rank"], self.set["slots"]
        self.bank = nn.ParameterList(nn.Parameter(0.02 * torch.randn(slots, rank or width)) for _ in range(count))
        self.spread = nn.ModuleList(nn.Linear(rank, width, bias=False) for _ in range(count if rank else 0))
        self.keys_values = nn.ModuleList(nn.Linear(width, 2 * inner, bias=False) for _ in range(count))
        self.sizes = (inner, self.set["chapters"] if self.routed else 0)
        self.ask = nn.ModuleList(Affine(D, aligned(sum(self.sizes))) for _ in self.places)
        self.out = nn.ModuleList(nn.Linear(inner, D, bias=False) for _ in self.places)
        self.scale = nn.ParameterList(nn.Parameter(torch.zeros(self.heads)) for _ in self.places)
        self.undecayed = (*(f"bank.{b}" for b in range(count)),
                          *(f"spread.{b}.weight" for b in range(len(self.spread))))
        for ask, out in zip(self.ask, self.out):
            nn.init.zeros_(ask.bias)
            nn.init.zeros_(out.weight)

    def default_places(self):
        return tuple(range(self.config.n_layer))

    def held(self, batch, device):
        def zeros():
            return torch.zeros(batch, self.set["chapters"], device=device)

        state = {f"chosen.{p}": zeros() for p in self.places if self.routed}
        if self.routed and self.set["routing"] != "token":
            state |= {f"routed.{p}": zeros() for p in self.places}
        return state

    def slots_of(self, i, notes):
        """Keys and values (H, slots, d) of the bank that place i reads; made once a pass."""
        b = 0 if self.set["shared"] else i
        made = notes.setdefault("slots", {})
        if b not in made:
            bank = self.bank[b]
            if self.set["rank"]:
                bank = self.spread[b](bank)
            both = self.keys_values[b](norm(bank.float()).to(bank.dtype))
            k, v = both.unflatten(-1, (2, self.heads, self.dim)).permute(1, 2, 0, 3)
            made[b] = norm(k), v
        return made[b]

    def route(self, logits, mean, notes):
        """log p (.., chapters) of the chapters that are read, -inf of the others, given the
        router's logits and their fading mean; and which are read. The two losses go into notes.
        """
        if self.set["routing"] == "rolling":
            logits = mean
        elif self.set["routing"] == "hybrid":
            logits = (logits + mean) / 2
        log_p, chapters = logits.log_softmax(-1), self.set["chapters"]
        better = (logits[..., None, :] > logits[..., None]).sum(-1)     # chapters, of each one; cheaper than topk
        read = better < self.set["best"]
        p = log_p.exp().flatten(0, -2).mean(0)
        share = read.float().flatten(0, -2).mean(0) / self.set["best"]
        balance = chapters * (share * p).sum()
        small = logits.logsumexp(-1).square().mean()
        penalty = self.set["balance"] * balance + self.set["z_loss"] * small
        notes.setdefault("penalty", []).append(penalty)
        note(notes, chapters=torch.special.entr(p).sum().exp())
        return log_p.masked_fill(~read, -math.inf), read

    def read(self, i, x, y, mean_of, notes):
        """What becomes of y (N, T, D), which chapters were read, and what mean_of(logits) gave
        beside the mean.
        """
        asked = norm(x.float() + y.float()).to(x.dtype) if self.set["after"] else x
        query, logits = self.ask[i](asked)[..., :sum(self.sizes)].split(self.sizes, -1)
        k, v = self.slots_of(i, notes)
        q = norm(query.unflatten(-1, (self.heads, -1))) * self.scale[i].exp()[:, None]
        q = q.to(v.dtype).permute(2, 0, 1, 3).flatten(1, 2)             # (H, N T, d)
        score = (q @ k.mT).float() / self.dim ** 0.5                    # (H, N T, slots)
        chosen, state = None, None
        if self.routed:
            mean, state = mean_of(logits)
            log_p, chosen = self.route(logits, mean, notes)
            bias = log_p.flatten(0, 1)[..., None]                       # (N T, chapters, 1)
            score = (score.unflatten(-1, (self.set["chapters"], -1)) + bias).flatten(-2)
        else:
            note(notes, chapters=torch.ones((), device=x.device))
        weight = score.softmax(-1)
        note(notes, sharpest=weight.amax(-1).mean())
        found = weight.to(v.dtype) @ v                                  # (H, N T, d)
        found = found.transpose(0, 1).flatten(1).view(*x.shape[:2], -1)
        return y + self.out[i](found), chosen, state

    def fading(self, logits, first, opens, real):
        """The fading mean of the router's logits (S, T, chapters) up to each token, and the last
        one.
        """
        if self.set["routing"] == "token":
            return None, None
        keep = 0.5 ** (1 / self.ROLLING)
        log_a, b = torch.full_like(logits, math.log(keep)), (1 - keep) * logits
        if real is not None:
            log_a = log_a.masked_fill(~real[..., None], 0.0)
            b = b.masked_fill(~real[..., None], 0.0)
        return scan(log_a, b, first, opens)

    def whole(self, place, x, y, opens, notes):
        def mean_of(logits):
            mean, last = self.fading(sequences(logits, opens), None, opens, None)
            return mean if mean is None else mean.reshape(logits.shape), last

        return self.read(self.places.index(place), x, y, mean_of, notes)[0]

    def step(self, place, x, y, state, came, notes):
        def mean_of(logits):
            return self.fading(logits, state.get(f"routed.{place}"), None, came.real)

        y, chosen, last = self.read(self.places.index(place), x, y, mean_of, notes)
        changed = {}
        if chosen is not None:
            counted = (chosen & came.real[..., None]).float().sum(1)
            changed[f"chosen.{place}"] = state[f"chosen.{place}"] + counted
        if last is not None:
            changed[f"routed.{place}"] = last
        return y, {**state, **changed}

    def contents(self, state, tokenizer=None, sequence=0):
        """The slots as the last place that has them reads them: dicts with slot, chapter, chosen
        (share of the tokens read, at that place, that chose its chapter), norm of what it adds,
        and the tokens that this raises.
        """
        place, i = self.places[-1], len(self.places) - 1
        _, v = self.slots_of(i, {})
        added = self.out[i](v.transpose(0, 1).flatten(1)).float()       # (slots, D)
        size = self.set["slots"] // self.set["chapters"]
        share = torch.ones(self.set["chapters"])
        if self.routed:
            counts = state[f"chosen.{place}"][sequence]
            share = counts * self.set["best"] / counts.sum().clamp(min=1)
        norms, words = added.norm(dim=-1).tolist(), self.raised(added, tokenizer) or [[]] * len(added)
        share = share.tolist()
        return [dict(slot=j, chapter=j // size, chosen=share[j // size], norm=norms[j], raises=words[j])
                for j in range(len(added))]


# ------------------------------------------------------------ fast weights

class Course(NamedTuple):
    """How weights and momentum go on over n chunks, as matrices: chunk i's weights are by_update[i]
    u + by_weights[i] W + by_momentum[i] S, its momentum momentum_by_update[i] u +
    momentum_by_itself[i] S, where W, S stand before the first, and u (n) are the chunks' updates.
    (S, H, n, n) or (S, H, n).
    """

    by_update: torch.Tensor
    by_weights: torch.Tensor
    by_momentum: torch.Tensor
    momentum_by_update: torch.Tensor
    momentum_by_itself: torch.Tensor

    def forward(self):
        """From before the first chunk to after the last: (.., 2, n + 2), for weights and momentum,
        by u, W and S.
        """
        weights, momentum = self.by_update[..., -1, :], self.momentum_by_update[..., -1, :]
        kept, moved, goes_on = (x[..., -1:] for x in (self.by_weights, self.by_momentum, self.momentum_by_itself))
        weights = torch.cat((weights, kept, moved), -1)
        momentum = torch.cat((momentum, torch.zeros_like(kept), goes_on), -1)
        return torch.stack((weights, momentum), -2)


def course_of(log_eta, log_keep, begins=None):
    """The Course of S_i = eta_i S_{i-1} + u_i, W_i = keep_i W_{i-1} + S_i; where it `begins` W is
    the first again, and S is 0. (S, H, n) each.
    """
    momentum, keep = decay(log_eta, begins), decay(log_keep, begins)
    itself = log_eta.cumsum(-1).exp()
    if begins is not None:
        itself = itself.masked_fill(begins.cumsum(-1) > 0, 0.0)
    lost = -torch.expm1(log_keep)                                       # alpha
    by_weights = 1 - (keep * lost[..., None, :]).sum(-1)                # what is left of the first weights
    by_momentum = (keep * itself[..., None, :]).sum(-1)
    return Course(keep @ momentum, by_weights, by_momentum, momentum, itself)


class Slopes(NamedTuple):
    """What the gradient at a row's weights is made of, of T = n c tokens: of W_1 it is keys^T dz,
    of W_2 transposed errors^T f.
    """

    keys: torch.Tensor          # (.., T, d)
    dz: torch.Tensor            # (.., T, h)
    errors: torch.Tensor        # (.., T, d), times the step's size
    f: torch.Tensor             # (.., T, h)
    surprise: torch.Tensor      # (.., n, c), the error's square


def slopes_of(k, v, theta, weights):
    """The Slopes of theta_t / 2 |W_2 silu(W_1 k_t) - v_t|^2 at the row's weights, each chunk's mean
    divided by n times the loss's curvature there.

    That is bounded by |f|^2 + |W_2 diag(silu')|^2 for keys of length 1 (Gauss-Newton), so that
    all chunks of a row together, taken at the same weights, cannot overshoot where theta < 2.

    Args:
        k, v: (.., n, c, d). theta: (.., n, c). weights: (.., 2, d, h): W_1, and W_2 transposed.
    """
    n, c = theta.shape[-2:]
    one, two = weights.unbind(-3)
    keys, wanted = k.flatten(-3, -2), v.flatten(-3, -2)
    z = keys @ one
    gate = z.sigmoid()
    f, slope = z * gate, gate * (1 + z * (1 - gate))
    error = f @ two.transpose(-1, -2) - wanted
    size = two.detach().square().sum(-2, keepdim=True)                  # (.., 1, h)
    curvature = (f.detach().square() + slope.detach().square() * size).unflatten(-2, (n, c)).sum((-2, -1))
    rate = theta / (n * curvature[..., None])                           # of the chunk's sum
    errors = error * rate.flatten(-2)[..., None]
    dz = (errors @ two) * slope
    return Slopes(keys, dz, errors, f, error.square().sum(-1).unflatten(-1, (n, c)))


def updates(slopes, chunks, dtype):
    """What each of n chunks adds to the momentum of W_1 and of W_2 transposed, (.., n, d, h) each, of
    the Slopes of a row.
    """
    keys, dz, errors, f = (x.to(dtype).unflatten(-2, (chunks, -1)) for x in slopes[:4])
    return -(keys.transpose(-1, -2) @ dz), -(errors.transpose(-1, -2) @ f)


def carried(slopes, forward, held):
    """Weights and momentum (S, H, 2, 2, d, h) after a row, of what is `held` before it: all its
    chunks' updates are summed as they are made.

    forward: (S, H, 2, n + 2), the last line of the row's Course, for weights and for momentum,
    each for the n updates, the weights and the momentum.
    """
    shares, kept = forward.split((forward.size(-1) - 2, 2), -1)
    share = shares.mT.repeat_interleave(slopes.keys.size(-2) // shares.size(-1), 2)     # (S, H, n c, 2)
    left = torch.stack((slopes.keys, slopes.errors), 2)
    right = torch.stack((slopes.dz, slopes.f), 2)[..., None, :] * share[:, :, None, ..., None]
    added = (left.transpose(-1, -2) @ right.flatten(-2)).unflatten(-1, (2, -1))         # (S, H, 2, d, 2, h)
    weights, momentum = held.unbind(2)
    of_weights, of_momentum = kept[..., None, None, None].unbind(3)                     # (S, H, 2, 1, 1, 1)
    return of_weights * weights[:, :, None] + of_momentum * momentum[:, :, None] - added.movedim(-2, 2)


class Parts(NamedTuple):
    """What MAG makes of rows, float32; R rows of S sequences in n chunks of c tokens."""

    q: torch.Tensor             # (S, H, R, n, c, d) unit vectors
    k: torch.Tensor             # the same
    v: torch.Tensor             # the same
    theta: torch.Tensor         # (S, H, R, n, c), times 1 - eta of the chunk
    log_eta: torch.Tensor       # (S, H, R, n)
    log_keep: torch.Tensor      # (S, H, R, n)


class Mag(RowMemory, kind="mag"):
    """Memory as a gate: the weights of a small two-layer network, rewritten while reading.

    Follows MemoryMAG and Titans (Behrouz et al. 2024, section 3.1 and, memory as a gate, 4.2). At
    one place, x_t (D) the layer's normalised input, H heads, M(k; W) = W_2 silu(W_1 k), d -> h ->
    d:

        q, k, v     W_q x, W_k x, W_v x, each mixed with its own of the token before by a learned
                    share (the key begins as that of the token before: a short convolution that is
                    not optional); q, k, v unit
        surprise    l_t = 1/2 |M(k_t) - v_t|^2
        chunk i     u_i = - mean over its c tokens of theta_t grad l_t / (chunks of a row x curvature)
                    S_i = eta_i S_{i-1} + (1 - eta_i) u_i,  W_i = (1 - alpha_i) W_{i-1} + S_i
        read        r_t = norm(M(q_t; W_{i-1})) + softmax(q_t P_k) P_v: what earlier chunks wrote,
                    and 16 persistent tokens
        output      (1 - g_t) y_t + g_t W_o r_t,  g_t = sigmoid(G x_t + b), D gates

    The relatives' step is a gradient with a bound on its norm. With it, and values of size 1 a
    dimension, the memory's error grew from row to row, by a factor of 40 within 8 rows of keys
    that have anything in common, and training was lost. A step that is a share of what the
    curvature allows (`slopes_of`; the normalised LMS of Nagumo & Noda 1967) cannot do that.

    What is carried on is float32; what only the row's own queries read has the model's precision.
    The gradients of a row are all taken at the weights with which the row began, so that both
    recurrences are matrices over its chunks, and over all chunks of a lane. In training that
    weight is a constant of the gradient grad l (first order, as in Nichol et al. 2018): what was
    written is learned through what it adds, not through where later gradients are taken. So only
    the weights at the rows' starts need a loop, without gradients. Query refinement, where it has
    several places: the earlier one's output is projected into the next one's query.

    Start: alpha = sigmoid(-6), eta = sigmoid(0), theta = 2 sigmoid(0), g = sigmoid(-3): near
    attention; W_o = 0, so that an arm begins as the baseline with 0.953 of attention at its
    places; the refinement 0. Tried as the store was (baseline 4.908), of four heads in layers 3 and 6
    of 8: as it is 4.908, gate 0 4.908, theta at most 0.5 4.908; in layers 6 and 8 4.906. By the bits
    of documents that are not reported: in layers 3 and 6 1, at 0.67 of the baseline's steps a second;
    in layer 6 or 4 alone 1.0002 and 1.0003, at 0.80. So it has one place and, for it, twice the
    heads; an early one, since in two layers that are to carry pairs from row to row the first learns
    it in 700 steps, and the second half of it in 1,400.

    Settings: heads; dim: d (None: a tenth of the width); inner: h
    (None: 2 d); chunk; theta; persistent; forget, momentum, gate: the logits above.

    The state, at each place p: `weights.p`, `momentum.p` (B, H, 2, d, h) at the row's start;
    `row.p` (B, C, ..), the current row's q, k, v and rates; `last.p` the last token's;
    `row_about` (B, C, 2), its tokens and gates. Watched: `gate`; `surprise`, the error's square
    (1: nothing is known); `distance` of the weights from their first, relative.
    """

    own = RowMemory.own | dict(heads=8, dim=None, inner=None, chunk=16, theta=2.0, persistent=16, forget=-6.0,
                               momentum=0.0, gate=-3.0)
    watched = ("gate", "surprise", "distance")
    by_row = True

    def __init__(self, config):
        super().__init__(config)
        H, d = self.heads, self.dim = self.set["heads"], self.width_of("dim", 0.1, 16)
        self.inner = self.set["inner"] or 2 * d
        D, width = config.n_embd, H * d
        self.chunk = math.gcd(self.set["chunk"], self.row_length)
        self.sizes = (3 * width, H, H, H)                               # q k v, theta, eta, alpha
        self.mixed = sum(self.sizes)
        total = aligned(self.mixed)
        self.into = nn.ModuleList(Affine(D, total) for _ in self.places)
        self.gate = nn.ModuleList(Affine(D, D) for _ in self.places)
        self.out = nn.ModuleList(nn.Linear(width, D, bias=False) for _ in self.places)
        self.refine = nn.ModuleList(nn.Linear(D, width, bias=False) for _ in self.places[1:])
        shift = torch.cat((torch.full((width,), -2.0), torch.full((width,), 2.0), torch.full((width,), -2.0)))
        self.shift = nn.ParameterList(nn.Parameter(shift.clone()) for _ in self.places)
        spread = torch.tensor([d ** -0.5, 0.02]).view(2, 1, 1)          # of W_1 and W_2
        self.first = nn.ParameterList(nn.Parameter((torch.randn(H, 2, d, self.inner) * spread).flatten(1))
                                      for _ in self.places)
        tokens = self.set["persistent"]
        self.persistent = nn.ParameterList(nn.Parameter(torch.randn(2, H * tokens * d))
                                           for _ in (self.places if tokens else ()))
        self.undecayed = tuple(f"{name}.{i}" for name in ("first", "persistent")
                               for i in range(len(getattr(self, name))))
        for into, gate, out in zip(self.into, self.gate, self.out):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, self.set["gate"])
            nn.init.zeros_(into.bias)
            nn.init.zeros_(into.weight[3 * width:])
            into.bias.data[3 * width + H:3 * width + 2 * H] = self.set["momentum"]
            into.bias.data[3 * width + 2 * H:3 * width + 3 * H] = self.set["forget"]
        for refine in self.refine:
            nn.init.zeros_(refine.weight)

    def default_places(self):
        """One, at a third: layer 3 of 8, counted from 1."""
        return (self.config.n_layer // 3,)

    def first_weights(self, i):
        """(H, 2, d, h) float32."""
        return self.first[i].float().view(self.heads, 2, self.dim, self.inner)

    def held(self, batch, device):
        C, state = self.row_length, {}

        def zeros(*shape):
            return torch.zeros(batch, *shape, device=device)

        for i, p in enumerate(self.places):
            first = self.first_weights(i).detach().expand(batch, -1, -1, -1, -1)
            state |= {f"weights.{p}": first, f"momentum.{p}": torch.zeros_like(first),
                      f"row.{p}": zeros(C, self.mixed), f"last.{p}": zeros(self.sizes[0])}
        return state | {"row_about": zeros(C, 2)}

    # ---- what both forms share

    def project(self, i, x, notes):
        """(.., 3 H d) before they are mixed with the token before, and the rates' logits (.., 3 H)."""
        made = self.into[i](x)[..., :self.mixed]
        three, rates = made.split((self.sizes[0], 3 * self.heads), -1)
        if i > 0:
            refined = self.refine[i - 1](notes["read"].to(x.dtype)).float()
            three = three + F.pad(refined, (0, 2 * refined.size(-1)))
        return three, rates

    def blend(self, i, three, before):
        """Each token's q, k, v (.., 3 H d) with those of the token before."""
        return three + (before - three) * self.shift[i].float().sigmoid()

    def parts(self, made, rows):
        """The Parts of (S, T, 3 H d + 3 H): R rows of each of S sequences."""
        H, n = self.heads, made.size(1) // rows // math.gcd(self.chunk, made.size(1) // rows)
        three, theta, eta, alpha = made.split(self.sizes, -1)

        def by_chunk(x):                                                # (S, T, H, ..) -> (S, H, R, n, c, ..)
            return x.unflatten(1, (rows, n, -1)).movedim(4, 1)

        q, k, v = by_chunk(three.unflatten(-1, (3, H, -1)).movedim(3, 2)).unbind(-2)
        eta, alpha = by_chunk(eta).mean(-1), by_chunk(alpha).mean(-1)   # of a chunk
        theta = self.set["theta"] * by_chunk(theta).sigmoid() * (-eta).sigmoid()[..., None]
        q, k, v = (F.normalize(x, dim=-1) for x in (q, k, v))
        return Parts(q, k, v, theta, F.logsigmoid(eta), F.logsigmoid(-alpha))

    def recall(self, i, q, one, two):
        """What queries (S, H, n, c, d) read of W_1 and W_2 transposed (S, H, n, d, h) before their
        chunk, and of the persistent tokens: (S, n c, H d).
        """
        found = norm((F.silu(q.to(one.dtype) @ one) @ two.mT).float())
        if self.set["persistent"]:
            keys, values = self.persistent[i].float().view(2, self.heads, 1, -1, self.dim)
            found = found + (q @ keys.mT).softmax(-1) @ values
        return found.flatten(2, 3).transpose(1, 2).flatten(2)

    def answer(self, i, x, y, read, notes):
        """y (.., D) given way to what was read (.., H d), by the gate; the gate's mean (..) too."""
        gate = self.gate[i](x).sigmoid()
        added = self.out[i](read.to(dtype_for(self.out[i])))
        notes["read"] = added
        note(notes, gate=gate.mean())
        return (y + gate * (added.float() - y)).to(y.dtype), gate.mean(-1)

    # ---- whole sequences

    def row_starts(self, i, parts, opens):
        """Weights (S, H, R, 2, d, h) with which each row begins, of sequences from their start; no
        gradients.
        """
        first = self.first_weights(i).detach().expand(len(parts.q), -1, -1, -1, -1)
        rows = parts.q.size(2)
        if rows == 1:
            return first[:, :, None]
        parts = Parts(*(x.detach() for x in parts))
        forward = course_of(parts.log_eta, parts.log_keep).forward()    # of each row by itself
        empty = torch.stack((first, torch.zeros_like(first)), 2)
        held, starts = empty, [first]
        for r in range(1, rows):
            slopes = slopes_of(*(x[:, :, r - 1] for x in parts[1:4]), held[:, :, 0])
            held = where(opens[:, r], empty, carried(slopes, forward[:, :, r - 1], held))
            starts.append(held[:, :, 0])
        return torch.stack(starts, 2)

    def whole(self, place, x, y, opens, notes):
        i, (N, C) = self.places.index(place), x.shape[:2]
        three, rates = self.project(i, x, notes)
        three = self.blend(i, three, lagged(three, 1, 0.0, opens))
        rows = 1 if opens is None else opens.size(1)
        parts = self.parts(sequences(torch.cat((three, rates), -1), opens), rows)
        starts = self.row_starts(i, parts, opens)
        slopes, n = slopes_of(*parts[1:4], starts), parts.k.size(3)
        begins = None
        if opens is not None:
            begins = F.pad(opens[..., None], (0, n - 1)).flatten(1)[:, None]        # (S, 1, R n)
        course = course_of(parts.log_eta.flatten(2), parts.log_keep.flatten(2), begins)
        first = self.first_weights(i)
        found = [self.before_chunks(course, u.flatten(2, 3), w, None, begins)
                 for u, w in zip(updates(slopes, n, y.dtype), first.unbind(1))]
        read = self.recall(i, parts.q.flatten(2, 3), *found)
        last = (starts[:, :, -1] - first).detach()
        note(notes, surprise=slopes.surprise.mean(), distance=last.norm() / (len(last) ** 0.5 * first.detach().norm()))
        return self.answer(i, x, y, read.reshape(N, C, -1), notes)[0]

    def before_chunks(self, course, u, weights, momentum, begins=None):
        """What W_1, or W_2 transposed, is where each of n chunks finds it, (S, H, n, d, h) like all
        its updates u; what stood before the first: weights (.., H, d, h), momentum or None: 0.
        """
        def earlier(x, fill):                                           # the line of the chunk before
            moved = F.pad(x, (0, 0) * (x.dim() - 3) + (1, 0), value=fill)[:, :, :-1]
            if begins is None:
                return moved
            flag = begins.view(len(begins), 1, -1, *[1] * (x.dim() - 3))
            return moved.masked_fill(flag, fill)

        shares = [earlier(course.by_update, 0.0), earlier(course.by_weights, 1.0)[..., None]]
        stood = [u, weights.expand_as(u[:, :, 0])[:, :, None]]
        if momentum is not None:
            shares.append(earlier(course.by_momentum, 0.0)[..., None])
            stood.append(momentum[:, :, None])
        # one product, also for its gradients; with room, so that tensor cores find them aligned
        more = -(u.size(2) + len(stood) - 1) % 8
        shares = F.pad(torch.cat(shares, -1), (0, more)).to(u.dtype)
        stood = F.pad(torch.cat([x.flatten(3).to(u.dtype) for x in stood], 2), (0, 0, 0, more))
        return (shares @ stood).view_as(u)

    # ---- a few tokens

    def step(self, place, x, y, state, came, notes):
        i, p = self.places.index(place), place
        three, rates = self.project(i, x, notes)
        three = three * came.real[..., None]
        before = torch.cat((state[f"last.{p}"][:, None], three[:, :-1]), 1)
        row = put_in_row(state[f"row.{p}"], came, torch.cat((self.blend(i, three, before), rates), -1))
        parts = self.parts(row, 1)
        weights, momentum = state[f"weights.{p}"], state[f"momentum.{p}"]
        slopes = slopes_of(*(x[:, :, 0] for x in parts[1:4]), weights.detach())        # as `row_starts` has them
        course = course_of(parts.log_eta[:, :, 0], parts.log_keep[:, :, 0])
        us = updates(slopes, parts.k.size(3), y.dtype)
        found = [self.before_chunks(course, *three) for three in zip(us, weights.unbind(2), momentum.unbind(2))]
        read = from_row(self.recall(i, parts.q[:, :, 0], *found), came)
        held = torch.stack((weights, momentum), 2)                      # (B, H, 2, 2, d, h)
        after = where(came.ended, carried(slopes, course.forward(), held), held)
        last = torch.where(came.real[:, -1:], three[:, -1], state[f"last.{p}"])
        changed = {f"row.{p}": row, f"last.{p}": last,
                   f"weights.{p}": after[:, :, 0], f"momentum.{p}": after[:, :, 1]}
        y, gate = self.answer(i, x, y, read, notes)
        if place == self.places[-1]:
            tokens = notes.get("arriving", torch.zeros_like(came.slots))
            about = torch.stack((tokens.float(), gate.float()), -1)
            changed["row_about"] = put_in_row(state["row_about"], came, about)
        first = self.first_weights(i)
        distance = (weights - first).norm() / (len(weights) ** 0.5 * first.norm())
        note(notes, surprise=slopes.surprise.mean(), distance=distance)
        return y, {**state, **changed}

    # ---- to be seen

    def contents(self, state, tokenizer=None, sequence=0):
        """Of one sequence, place by place: a dict with place, distance (of the weights from their
        first, relative) and momentum (its norm), then one for each token of the current row with
        place, token, text, surprise (square of the error), theta (times 1 - eta), eta, alpha (means over
        heads) and, at the last place, gate.
        """
        filled, found = int(state["filled"][sequence]), []
        tokens, gates = state["row_about"][sequence, :filled].unbind(-1)
        for i, p in enumerate(self.places):
            weights, first = state[f"weights.{p}"][sequence], self.first_weights(i).detach()
            found.append(dict(place=p, distance=float((weights - first).norm() / first.norm()),
                              momentum=float(state[f"momentum.{p}"][sequence].norm())))
            row = state[f"row.{p}"][sequence:sequence + 1].clone()
            begun = filled // self.chunk * self.chunk
            if filled > begun:                              # a chunk's rates are means of what it has so far
                row[:, filled:begun + self.chunk] = row[:, begun:filled].mean(1, keepdim=True)
            parts = self.parts(row, 1)
            k, v, theta = (x[0, :, 0] for x in (parts.k, parts.v, parts.theta))
            surprise, theta = slopes_of(k, v, theta, weights).surprise.mean(0).flatten(), theta.mean(0).flatten()
            eta, alpha = parts.log_eta[0, :, 0].exp().mean(0), 1 - parts.log_keep[0, :, 0].exp().mean(0)
            for t in range(filled):
                token, chunk = int(tokens[t]), t // self.chunk
                about = dict(place=p, token=token, text=text_of(token, tokenizer), surprise=float(surprise[t]),
                             theta=float(theta[t]), eta=float(eta[chunk]), alpha=float(alpha[chunk]))
                found.append(about | (dict(gate=float(gates[t])) if p == self.places[-1] else {}))
        return found


# ------------------------------------------------------------ a state that fades

class Gru(RowMemory, kind="gru"):
    """A vector that fades, at the embedding, between the fourth and the fifth of eight layers, and
    at the final state.

    Follows GPT-2 with a GRU memory and decay; of one kin with minGRU (Feng et al. 2024), RG-LRU
    (De et al. 2024) and block-recurrent transformers (Hutchins et al. 2022). At one place, x_t
    (D) what stands there, normalised, U units:

        h_t = sigmoid(fade) (1 - z_t) h_{t-1} + z_t tanh(W_h x_t + b_h),  z_t = sigmoid(W_z x_t + b_z)      (Fading)
        y_t + W_o norm(h_t)

    With `cell`, the relative's own: a true GRU cell (Cho et al. 2014) that is updated once a row
    by the mean of its tokens' x and decays by `fade` a row; a token reads what earlier rows left:

        h_r = fade GRU(mean x, h_{r-1})

    Start: W_o = 0; see Fading. Tried as the store was (baseline 4.908): at its relative's places
    4.905, with 512 units there 4.917, with W_o four times as fast 4.959; at "upper" 4.897, so that
    is where the arm has it.

    Settings: units: U (None: 0.4 of the width); cell; fade: of the cell.

    The state, at each place p: `fading.p` (B, U); with `cell`, `sum.p` (B, 3 U), of the current
    row's projections, too. `reset` is `cache.clear()`; a turn that is given a new cache is
    ephemeral. Watched: `half_life`, tokens after which half of a unit is left, at its mean rate;
    `gate`, the mean of z.
    """

    own = RowMemory.own | dict(units=None, cell=False, fade=0.97)
    watched = ("half_life", "gate")

    def __init__(self, config):
        super().__init__(config)
        D, units = config.n_embd, self.width_of("units", 0.4, 32)
        self.units, self.by_row = units, self.set["cell"]
        gates = 3 if self.by_row else 2
        self.into = nn.ModuleList(Affine(D, gates * units) for _ in self.places)
        self.out = nn.ModuleList(nn.Linear(units, D, bias=False) for _ in self.places)
        self.fading = nn.ModuleList(Fading(units) for _ in self.places if not self.by_row)
        self.again = nn.ModuleList(Affine(units, 3 * units) for _ in self.places if self.by_row)
        for out in self.out:
            nn.init.zeros_(out.weight)
        for into, fading in zip(self.into, self.fading):
            fading.start(into.bias)

    def default_places(self):
        return (-1, self.config.n_layer // 2, self.config.n_layer)

    def held(self, batch, device):
        def zeros(size):
            return torch.zeros(batch, size, device=device)

        state = {f"fading.{p}": zeros(self.units) for p in self.places}
        return state | {f"sum.{p}": zeros(3 * self.units) for p in self.places if self.by_row}

    def answer(self, i, y, h):
        return y + self.out[i](by_pace(h).to(dtype_for(self.out[i])))

    def noted(self, notes, gate, log_a):
        half_life = math.log(0.5) / log_a.detach()
        note(notes, gate=gate, half_life=half_life)

    def whole(self, place, x, y, opens, notes):
        i, (N, C) = self.places.index(place), x.shape[:2]
        gates = self.into[i](x.to(dtype_for(self.out[i])))
        if self.by_row:
            return self.whole_cell(i, gates, y, opens, notes)
        h, _, gate, log_a = self.fading[i](sequences(gates, opens), None, opens)
        self.noted(notes, gate, log_a)
        return self.answer(i, y, h.reshape(N, C, -1))

    def step(self, place, x, y, state, came, notes):
        i = self.places.index(place)
        gates, h = self.into[i](x.to(dtype_for(self.out[i]))), state[f"fading.{place}"]
        if not self.by_row:
            h, last, gate, log_a = self.fading[i](gates, h, None, came.real)
            self.noted(notes, gate, log_a)
            return self.answer(i, y, h), {**state, f"fading.{place}": last}
        total = state[f"sum.{place}"] + (gates * came.real[..., None]).sum(1)
        after, gate = self.cell(i, total / self.row_length, h)
        self.noted(notes, gate, torch.full_like(gate, math.log(self.set["fade"]) / self.row_length))
        changed = {f"fading.{place}": where(came.ended, after, h),
                   f"sum.{place}": where(came.ended, torch.zeros_like(total), total)}
        return self.answer(i, y, h[:, None]), {**state, **changed}

    # ---- the true cell

    def cell(self, i, gates, h):
        """The state (B, U) after a row whose projections' mean is gates (B, 3 U), and the mean of
        z.
        """
        r, z, candidate = gates.chunk(3, -1)
        r_again, z_again, again = self.again[i](h.to(dtype_for(self.again[i]))).chunk(3, -1)
        z = (z + z_again).sigmoid()
        candidate = (candidate + (r + r_again).sigmoid() * again).tanh()
        return self.set["fade"] * ((1 - z) * h + z * candidate), z.mean()

    def whole_cell(self, i, gates, y, opens, notes):
        means = gates.mean(1) if opens is None else gates.mean(1).unflatten(0, opens.shape)
        means = means.view(-1, 1 if opens is None else opens.size(1), 3 * self.units)   # (S, R, 3 U)
        h, before, opened = means.new_zeros(len(means), self.units), [], []
        for r in range(means.size(1)):
            if opens is not None:
                h = where(opens[:, r], torch.zeros_like(h), h)
            before.append(h)
            h, gate = self.cell(i, means[:, r], h)
            opened.append(gate)
        self.noted(notes, torch.stack(opened).mean(), torch.full_like(gate, math.log(self.set["fade"]) / y.size(1)))
        # the last row's end is read by nobody: times zero, so that what made it has a gradient,
        # zero, and not none
        before = torch.stack(before, 1) + 0.0 * h[:, None]
        return self.answer(i, y, before.flatten(0, 1)[:, None])

    def contents(self, state, tokenizer=None, sequence=0):
        """Of one sequence, a dict for each place: place, norm of the state, the units' half-lives
        in tokens (fastest, median, slowest), gates at rest (mean), and the tokens that W_o
        norm(h) raises.
        """
        found = []
        for i, p in enumerate(self.places):
            h = state[f"fading.{p}"][sequence]
            added = self.answer(i, 0.0, h).float()
            about = dict(place=p, norm=float(h.norm()), raises=self.raised(added, tokenizer))
            if not self.by_row:
                bias = self.into[i].bias.detach()
                lives = self.fading[i].half_lives(bias).sort().values
                about |= dict(half_lives=[float(lives[j]) for j in (0, len(lives) // 2, -1)],
                              gate=float(bias[:self.units].sigmoid().mean()))
            found.append(about)
        return found


# ------------------------------------------------------------ the model

class RevenaHybrid(RevenaHybridTiny):
    """RevenaHybridTiny in the file that knows the further memories, with what a store is asked for
    by its user.

    `cache` is a RevenaCache: model.new_cache(). Texts are strings, for which a tokenizer is
    needed, or token ids.
    """

    def __init__(self, config):
        super().__init__(config)
        self.memory.embedding = self.get_input_embeddings

    def ids_of(self, text, tokenizer):
        """Token ids (1, T) of a text, or of ids in whatever form they came."""
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("a text needs a tokenizer: pass tokenizer=.., or token ids")
            text = tokenizer(text)["input_ids"]
        ids = torch.as_tensor(text, device=self.device).view(1, -1)
        if ids.size(1) == 0:
            raise ValueError("the text is empty: there is nothing to remember or to ask for")
        return ids

    @torch.no_grad()
    def store_experience(self, cache, text, tokenizer=None):
        """Let the memory read a text; returns how many tokens were read."""
        ids = self.ids_of(text, tokenizer)
        ids = ids.expand(len(cache.real), -1)
        self(ids, past_key_values=cache, logits_to_keep=1)
        return ids.size(1)

    @torch.no_grad()
    def query_memory(self, cache, text, top_k=5, tokenizer=None, sequence=0):
        """The items of a store that its last token would look for after a text, best first: dicts
        with place, token, text, position, importance, count, cosine and score. The cache stays as
        it is.
        """
        if not isinstance(self.memory, Store):
            raise ValueError(f"a {self.config.memory} holds no items to ask for; see cache.contents()")
        if not all(0 <= place < self.config.n_layer for place in self.memory.places):
            raise ValueError("what a store at the embedding or the final state would look for is not told")
        ids, trial = self.ids_of(text, tokenizer), copy.deepcopy(cache)
        ids = ids.expand(len(cache.real), -1)
        into = self(ids, past_key_values=trial, output_hidden_states=True).hidden_states
        found = []
        for place in self.memory.places:
            x = norm(into[place][sequence, -1].float()).to(dtype_for(self.memory.out[0]))
            items, best = self.memory.search(cache.state, place, x, top_k, sequence)
            for number, score, cosine in best:
                about = told(items.facts[number].tolist(), tokenizer)
                found.append({"place": place, **about, "cosine": cosine, "score": score})
        return sorted(found, key=_score, reverse=True)[:top_k]

    def consolidate(self, cache, threshold):
        """Merge a store's items whose keys have a cosine above `threshold`; returns how many were
        merged.
        """
        if not isinstance(self.memory, Store):
            raise ValueError(f"a {self.config.memory} holds no items to merge")
        cache.state, merged = self.memory.consolidate(cache.state, threshold)
        return merged


def _score(item):
    return item["score"]


# ------------------------------------------------------------ on a model that is trained already

class HostedConfig(RevenaConfig):
    """A RevenaConfig whose backbone is another model, the host; `stm_window` is only a row's length.

    Args:
        host: {name: value} of the host's own config, model_type included.
        attention_window: positions that its attention sees, the current one included; None: all that it can.
        lora: rank of the low-rank matrices beside each of its linear ones (Hu et al. 2021); None: none.
    """

    model_type = "revena_hosted"

    def __init__(self, host=None, attention_window=None, lora=None, **kwargs):
        self.host, self.attention_window, self.lora = host, attention_window, lora
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config, eot, **more):
        """That of a memory on a model of this config; eot: the token that opens its documents."""
        host = config.to_diff_dict() | {"model_type": config.model_type, "dtype": "float32"}
        host.pop("_name_or_path", None)
        ends = dict(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=eot)
        return cls(host, vocab_size=config.vocab_size, n_layer=config.num_hidden_layers, n_embd=config.hidden_size,
                   n_head=config.num_attention_heads, **ends, **more)


class Host(nn.Module):
    """A causal language model of transformers in the place of Backbone: its layers as they are, and
    its output matrix.

    A memory acts in it by hooks: behind a layer's attention `mix` says what becomes of what that adds,
    before the first layer or the final norm what becomes of the stream. `span`: positions that it has
    vectors for, beyond which its attention begins anew; None: they are rotary or the like.
    """

    ATTENTION = ("self_attn", "attn", "attention", "self_attention")

    def __init__(self, config):
        super().__init__()
        about = AutoConfig.for_model(**config.host)
        self.trunk = AutoModel.from_config(about)
        self.head = None if about.tie_word_embeddings else nn.Linear(about.hidden_size, about.vocab_size, bias=False)
        first = self.trunk.get_input_embeddings()
        learned = [part for part in self.trunk.children() if isinstance(part, nn.Embedding) and part is not first]
        self.span = about.max_position_embeddings if learned else None
        heads = about.num_attention_heads                               # of the keys that it keeps of a token
        self.heads = getattr(about, "num_key_value_heads", None) or heads
        self.size = getattr(about, "head_dim", None) or about.hidden_size // heads
        self.mix, self.inputs = None, {}

    def add_lora(self, rank):
        """Put a pair of low-rank matrices beside each linear one; the second starts at zero."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ImportError("LoRA needs PEFT: pip install peft") from None
        about = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                           fan_in_fan_out=self.trunk.config.model_type == "gpt2")       # whose matrices lie
        self.trunk = inject_adapter_in_model(about, self.trunk)

    def take(self, model):
        """Take the weights of a causal language model of this config."""
        theirs = model.base_model.state_dict()
        own = {name: theirs.get(name.replace(".base_layer", ""), x) for name, x in self.trunk.state_dict().items()}
        self.trunk.load_state_dict(own)
        if self.head is not None:
            self.head.load_state_dict({"weight": model.get_output_embeddings().weight})

    def train(self, mode=True):
        """In training too, without dropout: what an arm is compared with has none."""
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def embed(self):
        """The module whose weight (V, D) is the output matrix."""
        return self.trunk.get_input_embeddings() if self.head is None else self.head

    def hook(self, places):
        """Let `mix` act at these places; ValueError where they are not found in this kind of model."""
        parts = list(self.trunk.children())
        layers = next((part for part in parts if isinstance(part, nn.ModuleList)), ())
        norms = [part for part in parts if "norm" in type(part).__name__.lower()]
        attentions = [next((getattr(layer, name) for name in self.ATTENTION if hasattr(layer, name)), None)
                      for layer in layers]
        if places and not (layers and norms and all(attentions)):
            raise ValueError(f"where attention and the last norm of a {self.trunk.config.model_type} are is not "
                             f"known, and this memory acts there; only the LTM can be put on it")
        for place in places:
            if 0 <= place < len(layers):
                layers[place].register_forward_pre_hook(functools.partial(self.note, place), with_kwargs=True)
                attentions[place].register_forward_hook(functools.partial(self.attended, place))
            else:
                part = layers[0] if place < 0 else norms[-1]
                part.register_forward_pre_hook(functools.partial(self.stream, place))

    def note(self, place, _, given, named):
        self.inputs[place] = given[0] if given else named["hidden_states"]

    def attended(self, place, _, given, output):
        """Behind attention: what it adds to the stream."""
        if self.mix is None:
            return None
        y, *more = output if isinstance(output, tuple) else (output,)
        changed = self.mix(place, norm(self.inputs.pop(place).float()).to(y.dtype), y).to(y.dtype)
        return (changed, *more) if isinstance(output, tuple) else changed

    def stream(self, place, _, given):
        """Before the first layer or the final norm: the stream."""
        if self.mix is None:
            return None
        x = given[0]
        return (self.mix(place, norm(x.float()).to(x.dtype), x.float()).to(x.dtype), *given[1:])

    def forward(self, tokens, place=None, seen=None, past=None, mix=None, collect=None):
        """Final states (B, n, D) of tokens (B, n), after the host's own last norm.

        place (B, n) of each token in its text and seen (B, n, past + n) bool; None: one text a row,
        all before it. past: a Cache of the host's. mix, collect: as in Backbone.forward.
        """
        mask = None
        if seen is not None:
            mask = torch.zeros(seen.shape, dtype=self.embed.weight.dtype, device=tokens.device)
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None]
            place = place.clamp(min=0) if self.span is None else place.clamp(min=0) % self.span
        self.mix = mix
        try:
            out = self.trunk(input_ids=tokens, attention_mask=mask, position_ids=place, past_key_values=past,
                             use_cache=past is not None, output_hidden_states=collect is not None)
        finally:
            self.mix, self.inputs = None, {}
        if collect is not None:
            collect += out.hidden_states[:-1]
        return out.last_hidden_state


class HostedCache(RevenaCache):
    """A RevenaCache of the host's own keys and values, (B, heads, past, size) a layer, past less than
    a window where it has one. place: (B,) tokens read, without padding.
    """

    @staticmethod
    def grows(model):
        """Always, until a window is full, if there is one."""
        return True

    def clear(self, batch_size=None):
        super().clear(batch_size)
        model, B = self.model, len(self.digest)
        empty = torch.zeros(B, model.backbone.heads, 0, model.backbone.size, dtype=model.dtype, device=model.device)
        self.keys, self.values = ([empty] * model.config.n_layer for _ in range(2))
        self.real, self.place = self.real[:, :0], torch.zeros(B, dtype=torch.long, device=model.device)

    def replay(self, tokens, real, keep=0):
        return self.model.stream(tokens, self, real, keep=keep)

    def tensors(self):
        return super().tensors() | {"place": self.place}

    @staticmethod
    def shapes(tensors):
        """As RevenaCache.shapes, but for how much of a text is held."""
        return {name: (x.shape[1:2] + x.shape[3:], x.dtype) for name, x in tensors.items() if name != "real"}


class RevenaHosted(RevenaHybrid):
    """A memory on a model that is trained already: GPT-2, Llama, Qwen3, GPT-NeoX, and what is built
    alike. With the memory off all is the host's. Attention is quadratic in the length of a lane.
    """

    config_class = HostedConfig
    backbone_class = Host

    def __init__(self, config):
        super().__init__(config)
        if config.lora:                     # after post_init, which would draw these matrices, too
            self.backbone.add_lora(config.lora)
        self.backbone.hook(self.memory.places)
        self.memory.embedding = self.get_output_embeddings

    def get_input_embeddings(self):
        return self.backbone.trunk.get_input_embeddings()

    def get_output_embeddings(self):
        return self.backbone.embed

    def resize_token_embeddings(self, new_num_tokens=None, *more, **settings):
        """Refused: the host's vocabulary is what the memory stores."""
        if new_num_tokens in (None, self.config.vocab_size):
            return self.get_input_embeddings()
        raise ValueError("this model's vocabulary is its host's: resize that, then add_memory.py --to its folder")

    def new_cache(self, batch_size=1, compiled=False):
        return HostedCache(self, batch_size, compiled)

    def all_logits(self, h):
        head, embed = self.backbone.head, self.backbone.embed
        return F.linear(h, embed.weight) if head is None else head(h)

    def embed_detached(self, tokens):
        return F.embedding(tokens, self.backbone.embed.weight).detach()

    @property
    def reach(self):
        """The most positions that one of its tokens sees; None: all."""
        return min(filter(None, (self.config.attention_window, self.backbone.span)), default=None)

    def sees(self, query, key):
        """Whether the tokens at places query (.., n) see those at key (.., m): bool (.., n, m)."""
        query, key = query[..., :, None], key[..., None, :]
        seen = (query >= key) & (query - key < (self.config.attention_window or math.inf))
        if span := self.backbone.span:
            seen = seen & (query // span == key // span)
        return seen

    def states(self, tokens, opens=None, embedded=None, collect=None):
        """As GPT.states; `embedded` is not heeded."""
        memory, notes, shape = self.active, {}, tokens.shape

        def mix(place, x, y):
            x, y = x.view(*shape, -1), y.reshape(*shape, -1)
            return noted_change(y, memory.rows(place, x, y, opens, notes), notes).view(*line.shape, -1)

        place, seen = None, None
        line = tokens if opens is None else tokens.reshape(len(opens), -1)
        # in training the mask is ours: to make theirs they may ask a GPU for its values
        if opens is not None or self.training or shape[1] > (self.reach or shape[1]):
            count = torch.arange(line.size(1), device=tokens.device).expand_as(line)
            start = torch.zeros_like(count)
            if opens is not None:                                       # where the sequence of each row began
                start = count[:, ::shape[1]].masked_fill(~opens, 0).cummax(1).values.repeat_interleave(shape[1], 1)
            place = count - start
            seen = self.sees(place, place) & (start[:, :, None] == start[:, None])
        h = self.backbone(line, place, seen, None, mix if memory.places else None, collect)
        return h.reshape(*shape, -1), notes

    def advance(self, tokens, cache, real, collect=None):
        """As GPT.advance, on the host's own cache."""
        memory, notes, n = self.active, {"arriving": tokens}, tokens.size(1)

        def mix(place, x, y):
            y, cache.state = memory.mix(place, x, y, cache.state, real, notes)
            return y

        known = torch.cat((cache.real, real), dim=1)
        place = cache.place[:, None] + real.long().cumsum(1) - 1
        later = known.long().flip(1).cumsum(1).flip(1) - known.long()   # tokens after each key
        seen = self.sees(place, place[:, -1:] - later) & known[:, None]
        itself = torch.eye(n, dtype=torch.bool, device=tokens.device)   # padding, too, sees something
        seen = seen | F.pad(itself, (known.size(1) - n, 0))
        past = DynamicCache(zip(cache.keys, cache.values))
        h = self.backbone(tokens, place, seen, past, mix if memory.places else None, collect)
        gone = 0 if self.reach is None else max(0, known.size(1) - (self.reach - 1))
        cache.keys = [layer.keys[:, :, gone:] for layer in past.layers]
        cache.values = [layer.values[:, :, gone:] for layer in past.layers]
        cache.real, cache.place = known[:, gone:], place[:, -1] + 1
        cache.digest = digest(tokens, real, cache.digest)
        return h
