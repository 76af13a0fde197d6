"""The models: GPT-70M, and RevenaHybridTiny-70M, which is GPT-70M with a short-term memory and one
memory more.

GPT-70M   pre-norm transformer, rotary positions, tied embeddings, full causal attention
STM       short-term memory: the same attention, but each position sees only itself and the 127 before it
Memory    the one interface of what can be added to that: nothing, the LTM below, or a further design
LTM       long-term memory: at most 256 items outside the network; a token whose surprisal exceeded 4.5 bits is
          stored, filed under the state that failed to predict it (and the one that has read it), found again by
          cosine similarity above 0.8, first in first out
RevenaCache   what generation carries from token to token: attention's last keys and values, the memory's state

A model computes one function in two forms: `score` and `forward` a whole sequence at once
(training, evaluation), `stream` a few tokens at a time with constant memory (generation). This
file travels in every checkpoint and is complete by itself.

Axes: L lanes of R rows, N = L R rows, C positions in a row (128), B sequences, T tokens, D width,
H heads, V vocabulary; of the LTM E exact and K learned addresses, A dimensions of one, I candidate
items, M slots. A sequence longer than the window is laid out as consecutive
rows of a lane; `opens` (L, R) marks the rows that begin a sequence, as the first of each lane
does. Without `opens` each row is a sequence of its own.
"""

import copy
import functools
import glob
import math
import os
import re
import warnings
from hashlib import sha256
from typing import NamedTuple, Optional

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 3):
    raise ImportError(f"this model needs transformers 5.3 or later, not {transformers.__version__}: "
                      f"pip install -U transformers")
from transformers import PreTrainedConfig                   # noqa: E402  (4.57 has none, and would not say so)

try:                                    # a GPU's kernels, which TRITON_INTERPRET lets a CPU go through, too
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ImportError
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None

EOT = 50256                     # <|endoftext|>: opens every document, pads the last window, is never a target

SIZES = {                       # exact names only
    "70M": dict(n_layer=8, n_embd=640, n_head=10),
    "quick": dict(n_layer=2, n_embd=64, n_head=2),
}


class RevenaConfig(PreTrainedConfig):
    """Everything that shapes a model; saved as config.json beside its weights.

    Args:
        stm_window: positions that attention sees, the current one included; None: all (GPT-70M).
        n_positions: longest sequence of a model without a window (it has none with one).
        n_inner: width of the feed-forward network; None: 4 n_embd.
        memory: which memory the model has, a name of Memory.kinds.
        memory_enabled: False switches it off; the weights stay.
        memory_settings: {name: value} of a further memory, where they are not its own defaults.
        pad_token_id: the token that opens every document, pads, and is never a target.
        ltm_slots: items the LTM holds, first in first out.
        ltm_surprisal_bits: a token is stored when -log2 p_stm(token) exceeds this.
        ltm_cosine: an item is retrieved when the cosine of its key with the query exceeds this.
        ltm_ngrams: exact addresses: one for the last token, one for the last two, ... (no parameters).
        ltm_learned: learned addresses. ltm_dim: dimensions of an address. ltm_hidden: width of their network.
        ltm_sharpness, ltm_plausibility: of an item found through a learned address, how its weight grows with the
            cosine and with log p_stm of its value.
        ltm_rare_bits: a word is rare where its surprisal exceeds this. ltm_same, ltm_near: weight of an item for each
            rare word that stands as far before it as before the query; and elsewhere among the last ltm_ngrams tokens.
        ltm_exact_fade, ltm_rare_fade: power of an item's age with which weights fall that exact addresses, and rare
            words, give. ltm_learned_fade: the first learned address: number k of K has 1 - k/K of it.
        ltm_stm_loss: weight in training of log p_stm beside the log p of the mixture.
        ltm_share: share of the probability that comes from items where that counts as a hit.
        ltm_random: a control: this share of all tokens is stored, whatever their surprisal; 0: by surprisal.
    """

    model_type = "revena"
    attribute_map = {"ltm_enabled": "memory_enabled"}       # its name while there was one memory

    def __init__(self, vocab_size=50257, n_layer=8, n_embd=640, n_head=10, n_inner=None, n_positions=2048,
                 stm_window=128, memory="ltm", memory_enabled=True, memory_settings=None,
                 ltm_slots=256, ltm_surprisal_bits=4.5, ltm_cosine=0.8, ltm_ngrams=3, ltm_learned=4, ltm_dim=64,
                 ltm_hidden=512, ltm_sharpness=40.0, ltm_plausibility=0.45, ltm_rare_bits=14.0, ltm_same=0.5,
                 ltm_near=0.01, ltm_exact_fade=0.2, ltm_learned_fade=1.0, ltm_rare_fade=0.25, ltm_stm_loss=1.0,
                 ltm_share=0.1, ltm_random=0.0, **kwargs):
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.n_head = n_head
        self.n_inner = n_inner
        self.n_positions = n_positions
        self.stm_window = stm_window
        self.memory = memory
        self.memory_enabled = memory_enabled
        self.memory_settings = memory_settings or {}
        self.ltm_slots = ltm_slots
        self.ltm_surprisal_bits = ltm_surprisal_bits
        self.ltm_cosine = ltm_cosine
        self.ltm_ngrams = ltm_ngrams
        self.ltm_learned = ltm_learned
        self.ltm_dim = ltm_dim
        self.ltm_hidden = ltm_hidden
        self.ltm_sharpness = ltm_sharpness
        self.ltm_plausibility = ltm_plausibility
        self.ltm_rare_bits = ltm_rare_bits
        self.ltm_same = ltm_same
        self.ltm_near = ltm_near
        self.ltm_exact_fade = ltm_exact_fade
        self.ltm_learned_fade = ltm_learned_fade
        self.ltm_rare_fade = ltm_rare_fade
        self.ltm_stm_loss = ltm_stm_loss
        self.ltm_share = ltm_share
        self.ltm_random = ltm_random
        special = dict(bos_token_id=EOT, eos_token_id=EOT, pad_token_id=EOT, tie_word_embeddings=True)
        super().__init__(**special | kwargs)
        if min(ltm_ngrams, ltm_learned) < 1:
            raise ValueError("ltm_ngrams and ltm_learned must be at least 1")


# ------------------------------------------------------------ the backbone of all arms

def norm(x):
    """RMS norm without weights (Zhang & Sennrich 2019) over the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, table, first=0):
    """Rotary embedding (Su et al. 2021) of x (N, T, H, D/H) at positions first, first+1, ...;
    table: Backbone.rotary.

    (a, b) cos + (b, a) (-sin, sin): with a flip instead of a cat a compiler fuses it with the
    norm before it.
    """
    cos, sin = table[:, first:first + x.size(1), None]                  # (T, 1, 2, D/H/2) each
    halves = x.float().unflatten(-1, (2, -1))
    turned = halves * cos + halves.flip(-2) * sin
    return turned.flatten(-2).to(x.dtype)


def attend(q, k, v, mask=None):
    """Softmax attention, (N, T, H, D/H) each; causal where no mask (broadcastable to (N, H, T, T'))
    is given.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return heads.transpose(1, 2)


def gates_of(n_head):
    """Columns of a layer's product for the gates of its heads: aligned for tensor cores."""
    return -(-n_head // 16) * 16


def heads(y, n_head, attention):
    """The heads' outputs (N, T, D) of a layer's product y (N, T, 3 D + gates); attention(q, k, v), (N, T,
    H, D/H) each, says what each position sees.

    Queries and keys are normalised, and each head's output has a sigmoid gate (Qiu et al. 2025):
    a softmax must put its weight somewhere, and without a gate it learns to put it on the first
    token, which a sliding window loses.
    """
    gates = gates_of(n_head)
    y, gate = y[..., :-gates].unflatten(-1, (3, n_head, -1)), y[..., -gates:]
    q, k = norm(y[:, :, :2]).unbind(2)
    gate = 2 * gate[..., :n_head, None].float().sigmoid()               # 1 at the start
    return (attention(q, k, y[:, :, 2]) * gate.to(y.dtype)).flatten(2)


def row_attention(q, k, v, table, opens=None):
    """Attention within rows (N, C, H, D/H); with `opens` (L, R), sliding: a row also sees the end
    of the row before it.

    Positions are counted from the start of the earlier row, so no length of text wears them out:
    the cost of a sequence is linear in its length, its positions never exceed two rows.
    """
    if opens is None:
        return attend(rotate(q, table), rotate(k, table), v)
    C = q.size(1)
    k, v = (torch.cat((x.roll(1, 0), x), dim=1) for x in (k, v))        # (N, 2C, H, D/H)
    i = torch.arange(C, device=q.device)[:, None]
    j = torch.arange(2 * C, device=q.device)
    within = (i < j) & (j <= i + C)                                     # (C, 2C)
    seen = within & ((j >= C) | ~opens.flatten()[:, None, None])        # (N, C, 2C)
    return attend(rotate(q, table, C), rotate(k, table), v, seen[:, None])


# ------------------------------------------------------------ the same as one kernel each way
#
# Rows of 128 tokens are so short that starting kernels takes longer than what they compute. Where
# fuse() was called, as train.py and eval.py do on a GPU, whole rows go through these instead of
# their twins: `fused_heads` is `heads` with `row_attention` (norm, rotary positions, attention,
# gate), `fused_log_p` is what GPT.log_p makes of logits, which it reads once; `fused_sums`, without
# a gradient, LongTermMemory.find, which writes no weight down. On one H200 a baseline's step takes
# 2.05 ms with all that is fused, and took 2.38 ms before.


def operator(name):
    """Makes a function an operator that a compiler leaves whole, and that changes none of its arguments."""
    own = "revena_" + re.sub(r"\W", "_", __name__)       # a folder's copy of this file has operators of its own
    return torch.library.custom_op(f"{own}::{name}", mutates_args=())


if triton:
    LOG2E = tl.constexpr(1.4426950408889634)        # a GPU knows powers of 2: e^x is one, of x log2 e

    @triton.jit
    def _halves(start, i, d, stride):
        """Both halves of a head's vectors (C, HALF), RMS-normalised, and what they were multiplied by."""
        where = start + i[:, None] * stride + d[None, :]
        a, b = tl.load(where).to(tl.float32), tl.load(where + d.shape[0]).to(tl.float32)
        mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * d.shape[0])
        scale = tl.rsqrt(mean + 1.1920928955078125e-07)[:, None]        # the epsilon of F.rms_norm
        return a * scale, b * scale, scale

    @triton.jit
    def _turns(table, place, d, length):
        """Cosine and sine (C, HALF) of the rotary embedding at some places."""
        where = table + place[:, None] * 2 * d.shape[0] + d[None, :]
        return tl.load(where), tl.load(where + length * 2 * d.shape[0] + d.shape[0])

    @triton.jit
    def _turned(a, b, cos, sin, dtype: tl.constexpr):
        return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)

    @triton.jit
    def _placed(start, i, d, stride, table, place, length):
        """Both halves of a head's vectors as attention compares them: normalised, then turned."""
        a, b, _ = _halves(start, i, d, stride)
        cos, sin = _turns(table, place, d, length)
        return _turned(a, b, cos, sin, start.dtype.element_ty)

    @triton.jit
    def _vectors(start, i, d, stride):
        """A head's vectors whole, (BLOCK, 2 HALF)."""
        return tl.load(start + i[:, None] * stride + tl.arange(0, 2 * d.shape[0])[None, :])

    @triton.jit
    def _products(q0, q1, k0, k1, away, C: tl.constexpr):
        """Products (BLOCK, BLOCK) of queries with the keys `away` positions before them, by halves."""
        s = tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))
        return tl.where((away >= 0) & (away < C), s, float("-inf"))

    @triton.jit
    def _gate(y, at, stride, head, width):
        return 2 * tl.sigmoid(tl.load(y + at * stride + 3 * width + head).to(tl.float32))

    @triton.jit
    def _heads_forward(y, table, opens, out, lse, length, stride, N, H: tl.constexpr, C: tl.constexpr,
                       BLOCK: tl.constexpr, HALF: tl.constexpr, SCALE: tl.constexpr, SLIDING: tl.constexpr):
        """One block of a row's queries and one head: out (N, C, 2 HALF H), and lse (N C, H), log2
        of each softmax's denominator.
        """
        block, head = tl.program_id(0), tl.program_id(1)
        dtype: tl.constexpr = y.dtype.element_ty
        BITS: tl.constexpr = SCALE * LOG2E                  # products to logits, base 2
        R: tl.constexpr = C // BLOCK                        # blocks of a row
        width, i, d = 2 * HALF * H, tl.arange(0, BLOCK), tl.arange(0, HALF)
        q0, q1 = _placed(y + block * BLOCK * stride + head * 2 * HALF, i, d, stride, table, C + i, length)
        earliest = block % R                                # of the blocks before this one, as far as is seen
        if SLIDING:
            earliest = tl.where(tl.load(opens + block // R), earliest, R)
        most = tl.full((BLOCK,), -1e30, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK, 2 * HALF), tl.float32)
        for t in range(0, earliest + 1):
            start = y + (block + N * R - t) % (N * R) * BLOCK * stride + head * 2 * HALF
            k0, k1 = _placed(start + width, i, d, stride, table, C - t * BLOCK + i, length)
            s = _products(q0, q1, k0, k1, t * BLOCK + i[:, None] - i[None, :], C)
            higher = tl.maximum(most, tl.max(s, 1) * BITS)
            p, shrink = tl.exp2(s * BITS - higher[:, None]), tl.exp2(most - higher)
            total = total * shrink + tl.sum(p, 1)
            mixed = mixed * shrink[:, None] + tl.dot(p.to(dtype), _vectors(start + 2 * width, i, d, stride))
            most = higher
        at = block * BLOCK + i
        scale = _gate(y, at, stride, head, width) / total
        where = at[:, None] * width + head * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + where, (mixed * scale[:, None]).to(dtype))
        tl.store(lse + at * H + head, most + tl.log2(total))

    @triton.jit
    def _asking(y, out, grad, lse, at, head, stride, H: tl.constexpr, HALF: tl.constexpr):
        """Of some queries, what their gradient says to each key that they see: gradient of the heads,
        mean of what it says to all keys, gate, denominator.
        """
        width = 2 * HALF * H
        where = at[:, None] * width + head * 2 * HALF + tl.arange(0, 2 * HALF)[None, :]
        back = tl.load(grad + where).to(tl.float32)
        delta = tl.sum(back * tl.load(out + where).to(tl.float32), 1)
        gate = _gate(y, at, stride, head, width)
        return (back * gate[:, None]).to(y.dtype.element_ty), delta, gate, tl.load(lse + at * H + head)

    @triton.jit
    def _write_back(start, i, d, stride, a, b, scale, cos, sin, g0, g1):
        """Gradient of a head's vectors, given them as normalised halves, and that of the turned halves."""
        da, db = g0 * cos + g1 * sin, g1 * cos - g0 * sin
        mean = ((tl.sum(a * da, 1) + tl.sum(b * db, 1)) / (2 * d.shape[0]))[:, None]
        where = start + i[:, None] * stride + d[None, :]
        tl.store(where, (scale * (da - a * mean)).to(start.dtype.element_ty))
        tl.store(where + d.shape[0], (scale * (db - b * mean)).to(start.dtype.element_ty))

    @triton.jit
    def _heads_backward(y, table, opens, out, lse, grad, dy, length, stride, N, H: tl.constexpr,
                        C: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, GATES: tl.constexpr,
                        SCALE: tl.constexpr, SLIDING: tl.constexpr):
        """One block of a row and one head: what the gradient says of its queries (third axis of the grid:
        0), or of its keys and values (1). What two blocks have to do with each other is computed for
        both: no two programs write to one place, and the sum is always the same.
        """
        block, head = tl.program_id(0), tl.program_id(1)
        dtype: tl.constexpr = y.dtype.element_ty
        BITS: tl.constexpr = SCALE * LOG2E
        R: tl.constexpr = C // BLOCK
        width, i, d = 2 * HALF * H, tl.arange(0, BLOCK), tl.arange(0, HALF)
        offset = block * BLOCK * stride + head * 2 * HALF
        g0, g1 = tl.zeros((BLOCK, HALF), tl.float32), tl.zeros((BLOCK, HALF), tl.float32)
        if tl.program_id(2) == 0:
            here = block * BLOCK + i
            qa, qb, scale = _halves(y + offset, i, d, stride)
            q_cos, q_sin = _turns(table, C + i, d, length)
            q0, q1 = _turned(qa, qb, q_cos, q_sin, dtype)
            do, delta, gate, z = _asking(y, out, grad, lse, here, head, stride, H, HALF)
            earliest = block % R
            if SLIDING:
                earliest = tl.where(tl.load(opens + block // R), earliest, R)
            for t in range(0, earliest + 1):
                start = y + (block + N * R - t) % (N * R) * BLOCK * stride + head * 2 * HALF
                k0, k1 = _placed(start + width, i, d, stride, table, C - t * BLOCK + i, length)
                s = _products(q0, q1, k0, k1, t * BLOCK + i[:, None] - i[None, :], C)
                dp = tl.dot(do, tl.trans(_vectors(start + 2 * width, i, d, stride)))
                ds = (tl.exp2(s * BITS - z[:, None]) * (dp - delta[:, None])).to(dtype)
                g0 += tl.dot(ds, k0)
                g1 += tl.dot(ds, k1)
            _write_back(dy + offset, i, d, stride, qa, qb, scale, q_cos, q_sin, g0 * SCALE, g1 * SCALE)
            tl.store(dy + here * stride + 3 * width + head, (delta * (1 - gate / 2)).to(dtype))
            for unused in range(head + H, GATES, H):
                tl.store(dy + here * stride + 3 * width + unused, tl.zeros_like(delta).to(dtype))
        else:
            ka, kb, scale = _halves(y + offset + width, i, d, stride)
            k_cos, k_sin = _turns(table, i, d, length)
            k0, k1 = _turned(ka, kb, k_cos, k_sin, dtype)
            v = _vectors(y + offset + 2 * width, i, d, stride)
            dv = tl.zeros((BLOCK, 2 * HALF), tl.float32)
            latest = R - 1 - block % R
            if SLIDING:
                latest = tl.where(tl.load(opens + (block // R + 1) % N), latest, R)
            for t in range(0, latest + 1):
                later = (block + t) % (N * R) * BLOCK
                q0, q1 = _placed(y + later * stride + head * 2 * HALF, i, d, stride, table, t * BLOCK + i, length)
                do, delta, _, z = _asking(y, out, grad, lse, later + i, head, stride, H, HALF)
                s = _products(q0, q1, k0, k1, t * BLOCK + i[:, None] - i[None, :], C)
                p = tl.exp2(s * BITS - z[:, None])
                dv += tl.dot(tl.trans(p.to(dtype)), do)
                ds = tl.trans((p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(dtype))
                g0 += tl.dot(ds, q0)
                g1 += tl.dot(ds, q1)
            _write_back(dy + offset + width, i, d, stride, ka, kb, scale, k_cos, k_sin, g0 * SCALE, g1 * SCALE)
            tl.store(dy + offset + 2 * width + i[:, None] * stride + tl.arange(0, 2 * HALF)[None, :], dv.to(dtype))

    @triton.jit
    def _and_more(x, most, total):
        """Maxima in bits, and sums of the exponentials, of the logits so far and of some more."""
        higher = tl.maximum(most, tl.max(x, 1) * LOG2E)
        return higher, total * tl.exp2(most - higher)[:, None] + tl.exp2(x * LOG2E - higher[:, None])

    @triton.jit
    def _read_logits(logits, targets, log_p, log_z, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
        """One position: log p of its target, and log Z, in one pass over its V logits. Each 32 of a block
        keep a maximum of their own: no warp waits for another before the end. And what is read ends
        with the COLUMNS, not amid eight of them, which are one load.
        """
        position, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK // 32)
        column = part[:, None] * 32 + tl.arange(0, 32)[None, :]
        most, total = tl.full((BLOCK // 32,), -1e30, tl.float32), tl.zeros((BLOCK // 32, 32), tl.float32)
        WHOLE: tl.constexpr = V // BLOCK * BLOCK
        for first in range(0, WHOLE, BLOCK):
            x = tl.load(logits + position * COLUMNS + first + column).to(tl.float32)
            most, total = _and_more(x, most, total)
        if WHOLE < V:                               # the last block alone asks where it ends
            column += WHOLE
            x = tl.load(logits + position * COLUMNS + column, column < COLUMNS, other=0.0).to(tl.float32)
            most, total = _and_more(tl.where(column < V, x, -1e30), most, total)
        top = tl.max(most, 0)
        z = (top + tl.log2(tl.sum(tl.sum(total, 1) * tl.exp2(most - top), 0))) / LOG2E
        picked = tl.load(logits + position * COLUMNS + tl.load(targets + position)).to(tl.float32)
        tl.store(log_p + position, picked - z)
        tl.store(log_z + position, z)

    @triton.jit
    def _write_gradient(logits, targets, log_z, of_log_p, of_log_z, grad, N, V: tl.constexpr, COLUMNS: tl.constexpr,
                        BLOCK: tl.constexpr):
        """A block of one position's logits: their gradient, given those of log p and log Z. The last
        position first: of what _read_logits read, the end is still in the cache.
        """
        column, position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), N - 1 - tl.program_id(1)
        where, there = position.to(tl.int64) * COLUMNS + column, column < COLUMNS
        of_target = tl.load(of_log_p + position)
        x = tl.load(logits + where, there, other=0.0).to(tl.float32)
        p = tl.where(column < V, tl.exp2((x - tl.load(log_z + position)) * LOG2E), 0.0)
        change = tl.where(column == tl.load(targets + position), of_target, 0.0)
        change += p * (tl.load(of_log_z + position) - of_target)
        tl.store(grad + where, change.to(grad.dtype.element_ty), there)

    def _sizes(y, table, n_head, most=64):
        """(grid, what both kernels are told) of a layer's product y (N, C, 3 D + gates), in blocks of
        at most `most` positions.
        """
        N, C, columns = y.shape
        half, block = (columns - gates_of(n_head)) // (6 * n_head), min(C, most)
        told = dict(length=table.size(1), stride=columns, H=n_head, N=N, C=C, BLOCK=block, HALF=half,
                    SCALE=(2 * half) ** -0.5, num_warps=max(4, block // 16), num_stages=1)
        return (N * C // block, n_head), told

    @triton.jit
    def _sum_found(facts, query, key, trust, stands, number, products, log_z, right, total, I, q_row, q_head, q_at,
                   k_row, k_head, k_at, slots, least, sharpness, plausibility, same_place, near, exact_fade,
                   learned_fade, rare_fade, C: tl.constexpr, E: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
                   BLOCK: tl.constexpr, ITEMS: tl.constexpr):
        """A block of a row's positions, over all its candidates: what LongTermMemory.weigh says, summed."""
        row, c, d = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, A)
        at = row * C + c
        ask = facts + at * (2 * E + 3)
        before, target = tl.load(ask + 2 * E + 1), tl.load(ask + 2 * E + 2)
        of_all, of_right = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, I, ITEMS):
            i = first + tl.arange(0, ITEMS)
            age = before[:, None] - tl.load(number + row * I + i)[None, :]
            seen = (age >= 1) & (age <= slots)
            if tl.max(seen.to(tl.int32)) > 0:           # of a short text most are yet to come
                stand = tl.load(stands + row * I + i)
                hold = facts + stand * (2 * E + 3)
                k_place = key + stand // C * k_row + stand % C * k_at
                old = tl.log2(tl.maximum(age, 1).to(tl.float32))
                weight, words = tl.zeros((BLOCK, ITEMS), tl.float32), tl.zeros((BLOCK, ITEMS), tl.float32)
                same = seen
                for n in tl.static_range(E):
                    same = same & (tl.load(ask + n)[:, None] == tl.load(hold + n)[None, :])
                    found = same
                    if n == 0:
                        found = same & (tl.load(ask + 2 * E) != 0)[:, None] & (tl.load(hold + 2 * E) != 0)[None, :]
                    score = (tl.load(trust + at * (E + K) + n) * LOG2E)[:, None] - exact_fade * old
                    weight += tl.where(found, tl.exp2(tl.minimum(score, 10 * LOG2E)), 0.0)
                for a in tl.static_range(E):
                    asked = tl.load(ask + E + a)
                    asked = tl.where(asked < 0, -2, asked)[:, None]     # which equals nothing
                    for b in tl.static_range(E):
                        each = same_place if a == b else near
                        words += tl.where(asked == tl.load(hold + E + b)[None, :], each, 0.0)
                weight += tl.where(seen, words * tl.exp2(-rare_fade * old), 0.0)
                likely = tl.load(products + at[:, None] * I + i[None, :]).to(tl.float32) - tl.load(log_z + at)[:, None]
                likely *= plausibility * LOG2E
                for k in range(0, K):
                    q = tl.load(query + row * q_row + k * q_head + c[:, None] * q_at + d[None, :])
                    found_by = tl.load(k_place[:, None] + k * k_head + d[None, :])
                    cosine = tl.dot(q, tl.trans(found_by)).to(q.dtype).to(tl.float32)
                    score = ((tl.load(trust + at * (E + K) + E + k) - sharpness) * LOG2E)[:, None] + likely
                    score += sharpness * LOG2E * cosine - learned_fade * (1 - k / K) * old
                    weight += tl.where(seen & (cosine > least), tl.exp2(tl.minimum(score, 10 * LOG2E)), 0.0)
                of_all += tl.sum(weight, 1)
                of_right += tl.sum(tl.where(tl.load(hold + 2 * E + 2)[None, :] == target[:, None], weight, 0.0), 1)
        tl.store(right + at, of_right)
        tl.store(total + at, of_all)

    @operator("heads")
    def fused_heads(y: torch.Tensor, table: torch.Tensor, opens: Optional[torch.Tensor],
                    n_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`heads` of `row_attention`; the second: log2 of the softmax's denominators (N, C, H)."""
        grid, told = _sizes(y, table, n_head, 128 if opens is None else 64)     # a row alone: whole
        y, opens = y.contiguous(), table if opens is None else opens.contiguous()
        out = y.new_empty(*y.shape[:2], 2 * told["HALF"] * n_head)
        lse = y.new_empty(*y.shape[:2], n_head, dtype=torch.float32)
        # so few registers that four programs, two of whole rows, share a multiprocessor
        _heads_forward[grid](y, table, opens, out, lse, SLIDING=opens is not table, maxnreg=128, **told)
        return out, lse

    @operator("heads_backward")
    def _heads_gradient(y: torch.Tensor, table: torch.Tensor, opens: Optional[torch.Tensor], out: torch.Tensor,
                        lse: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        grid, told = _sizes(y, table, lse.size(2))
        y, opens = y.contiguous(), table if opens is None else opens.contiguous()
        dy = torch.empty_like(y)
        _heads_backward[grid + (2,)](y, table, opens, out, lse, grad.contiguous(), dy,
                              GATES=y.size(2) - 6 * told["HALF"] * told["H"], SLIDING=opens is not table, **told)
        return dy

    @fused_heads.register_fake
    def _(y, table, opens, n_head):
        return (y.new_empty(*y.shape[:2], (y.size(2) - gates_of(n_head)) // 3),
                y.new_empty(*y.shape[:2], n_head, dtype=torch.float32))

    @_heads_gradient.register_fake
    def _(y, table, opens, out, lse, grad):
        return torch.empty_like(y)

    def _keep_heads(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)

    def _heads_back(ctx, grad, _):
        y, table, opens, out, lse = ctx.saved_tensors
        return _heads_gradient(y, table, opens, out, lse, grad), None, None, None

    fused_heads.register_autograd(_heads_back, setup_context=_keep_heads)

    @operator("log_p")
    def fused_log_p(logits: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """log softmax of (T, columns) at targets (T,), and log Z, of the first `vocabulary` columns."""
        log_p, log_z = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        logits = logits.contiguous()
        _read_logits[(len(logits),)](logits, targets, log_p, log_z, V=vocabulary, COLUMNS=logits.size(1),
                                     BLOCK=1024, num_warps=4)
        return log_p, log_z

    @fused_log_p.register_fake
    def _(logits, targets, vocabulary):
        return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))

    @operator("log_p_backward")
    def _log_p_gradient(logits: torch.Tensor, targets: torch.Tensor, log_z: torch.Tensor, of_log_p: torch.Tensor,
                        of_log_z: torch.Tensor, vocabulary: int) -> torch.Tensor:
        rows, columns = logits.shape
        logits, of_log_p, of_log_z = (x.contiguous() for x in (logits, of_log_p, of_log_z))
        grad = torch.empty_like(logits)
        _write_gradient[(-(-columns // 1024), rows)](logits, targets, log_z, of_log_p, of_log_z, grad, rows,
                                                     V=vocabulary, COLUMNS=columns, BLOCK=1024, num_warps=4)
        return grad

    @_log_p_gradient.register_fake
    def _(logits, targets, log_z, of_log_p, of_log_z, vocabulary):
        return logits.new_empty(logits.shape)

    def _keep_log_p(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.vocabulary = inputs[2]

    def _log_p_back(ctx, of_log_p, of_log_z):
        return _log_p_gradient(*ctx.saved_tensors, of_log_p, of_log_z, ctx.vocabulary), None, None

    fused_log_p.register_autograd(_log_p_back, setup_context=_keep_log_p)

    @operator("sums")
    def fused_sums(facts: torch.Tensor, query: torch.Tensor, key: torch.Tensor, trust: torch.Tensor,
                   stands: torch.Tensor, number: torch.Tensor, products: torch.Tensor, log_z: torch.Tensor,
                   constants: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """What LongTermMemory.find makes of `facts_of`, Vectors, candidates (N, I) as `numbered` gives them,
        products (N, C, I) and log Z (N, C). No gradient.
        """
        N, C, K, A = query.shape
        query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        strides = (s for x in (query, key) for s in (x.stride(0), x.stride(2), x.stride(1)))
        facts, trust, stands, number, products, log_z = (
            x.contiguous() for x in (facts, trust, stands, number, products, log_z))
        right, total = (torch.empty_like(log_z) for _ in range(2))
        _sum_found[(N, C // 16)](facts, query, key, trust, stands, number, products, log_z, right, total,
                                 number.size(1), *strides, *constants, C=C, E=trust.size(-1) - K, K=K, A=A, BLOCK=16,
                                 ITEMS=16, num_warps=1,
                                 maxnreg=128)           # 261 us for 512 rows; without: 302
        return right, total

    @fused_sums.register_fake
    def _(facts, query, key, trust, stands, number, products, log_z, constants):
        return tuple(log_z.new_empty(log_z.shape) for _ in range(2))


def dtype_for(matrix):
    """The dtype in which a matrix takes its input: its own, or float32 where it has none that can be
    computed with (quantised weights are integers or bytes, or lie behind a method).
    """
    dtype = getattr(getattr(matrix, "weight", None), "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


class TokenMatrix(nn.Embedding):
    """The embedding and, tied to it, the output matrix: one module that is called for both, so that
    what acts when a module is called (FSDP, hooks) knows of both.
    """

    def forward(self, x):
        """tokens (..) -> (.., D); states (.., D) -> unnormalised log-probabilities (.., rows)."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class Block(nn.Module):
    """One pre-norm layer: attention, then a GELU network, each added to the residual stream
    (float32).
    """

    fused = False                   # see GPT.fuse

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        inner = config.n_inner or 4 * D
        self.n_head = config.n_head
        self.qkvg = nn.Linear(D, 3 * D + gates_of(config.n_head), bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def attend(self, normed, attention):
        """What attention adds to the stream whose norm is `normed` (N, T, D); attention(y, H), as `heads`
        above, makes the heads' outputs of the layer's product y.
        """
        y = self.qkvg(normed)
        return self.out(attention(y, self.n_head).to(dtype_for(self.out)))

    def feed(self, x):
        """What the network adds to x (N, T, D)."""
        normed = norm(x).to(dtype_for(self.up))
        # GELU (tanh, on a GPU) in the product's own kernel: evaluation 5% faster
        if self.fused and type(self.up) is nn.Linear and not torch.is_grad_enabled():
            no_bias = normed.new_zeros(self.up.out_features)
            inner = torch._addmm_activation(no_bias, normed.flatten(0, -2), self.up.weight.t(), use_gelu=True)
            return self.down(inner.view(*x.shape[:-1], -1))
        return self.down(F.gelu(self.up(normed), approximate="tanh"))

    def forward(self, x, normed, attention, mix=None):
        """x (N, T, D) and its norm -> the same after this layer; mix(normed, y) says what a memory makes
        of what attention adds. The norm is made here, beside the sum: a compiler that takes each layer
        for itself (below) fuses nothing across two.
        """
        taken = normed.to(dtype_for(self.qkvg))
        y = self.attend(taken, attention)
        x = x + (y if mix is None else mix(taken, y))
        x = x + self.feed(x)
        return x, norm(x).to(normed.dtype)


# who compiles a model compiles one layer, not each; before torch 2.8 there is no such thing, nor
# is it needed to run.
# Only what changes nothing but its result may be such a region (a layer that streams writes a
# cache), and with a gradient only where all layers are: with a memory among them torch 2.11 made
# wrong ones
def _plain(function):
    return function


region = getattr(torch.compiler, "nested_compile_region", _plain)


@region
def whole_block(block, x, normed, attention):
    return block(x, normed, attention)


class Backbone(nn.Module):
    """Token embedding, layers and the tied output matrix; what the arms have in common."""

    def __init__(self, config):
        super().__init__()
        self.embed = TokenMatrix(self.padded(config.vocab_size), config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        half = config.n_embd // config.n_head // 2
        length = 2 * config.stm_window if config.stm_window else config.n_positions
        place = torch.arange(length, device="cpu").double()
        speed = 10_000.0 ** (-torch.arange(half, device="cpu").double() / half)
        angle = torch.outer(place, speed)
        turn = torch.stack((-angle, angle), dim=1)                      # of a head's two halves
        table = torch.stack((turn.cos(), turn.sin())).float()           # (2, length, 2, half)
        self.register_buffer("rotary", table)

    @staticmethod
    def padded(vocabulary):
        """Rows of the embedding: 50304 for 50257, aligned for tensor cores."""
        return -(-vocabulary // 64) * 64

    def forward(self, embedded, attentions, mix=None, places=(), states=None, whole=False):
        """embedded (N, T, D) -> final normalised states (N, T, D).

        Args:
            attentions: one (y, H) -> heads' outputs a layer, as `heads` is.
            mix, places: a memory's mix(place, x, y) is asked for what becomes of y at each of its `places`.
            states: a list that collects what goes into each layer.
            whole: nothing is written but the result, so that a compiler may take each layer for the same.
        """
        embed, last = dtype_for(self.embed), len(self.blocks)
        takers = {embed, *(dtype_for(block.qkvg) for block in self.blocks)}
        dtype = embed if len(takers) == 1 else torch.float32            # some matrices are quantised, or are not
        run = whole_block if whole and not places else Block.__call__
        x = norm(embedded.float())
        normed = norm(x).to(dtype)
        if -1 in places:
            x = mix(-1, normed.to(embed), x)
            normed = norm(x).to(dtype)
        for layer, (block, attention) in enumerate(zip(self.blocks, attentions)):
            if states is not None:
                states.append(x)
            if layer in places:
                x, normed = block(x, normed, attention, functools.partial(mix, layer))
            else:
                x, normed = run(block, x, normed, attention)
        if last in places:
            normed = norm(mix(last, normed.to(embed), x))
        return normed.to(embed)


# ------------------------------------------------------------ the interface of a memory

class Final(NamedTuple):
    """The backbone's last word on each position of some rows: what a memory that acts at the output
    is handed.
    """

    h: torch.Tensor             # (N, C, D) final states
    tokens: torch.Tensor        # (N, C)
    targets: torch.Tensor       # (N, C), EOT where there is none
    log_p: torch.Tensor         # (N, C) log p_stm of each target
    log_z: torch.Tensor         # (N, C) log of the sum over the exponentials of all logits
    embed: object               # tokens -> (.., D), rows of the output matrix; a memory gives them no gradient
    opens: torch.Tensor         # (L, R) or None
    prepared: object = None     # what the memory's `prepare` gave, where it was asked before
    found: object = None        # .. and its `find`


class Scores(NamedTuple):
    """Per target, (N, C) each; natural logarithms; what stands where the target is EOT means
    nothing.
    """

    log_p: torch.Tensor         # of the model, its memory included
    log_p_stm: torch.Tensor     # of the backbone's output alone, which decides what an LTM stores
    objective: torch.Tensor     # what training maximises (of a model in train mode)
    stored: torch.Tensor        # bool: the target is stored (LTM)
    hit: torch.Tensor           # bool: the memory had a hand in the prediction: see the memory's `hit_means`
    watched: dict               # {name: scalar} of the memory's own statistics, as its `watched` names them


MOVED = 0.1                     # a memory inside the backbone had a hand in what it changed by this share


class Memory(nn.Module):
    """One interface for every memory. This one does nothing: it is the memory of a model whose
    memory is off.

    A memory may act inside the backbone, at the output, or both. What it knows of the backbone is
    what it is handed: the config's width, layers and row length, and the tensors below. A
    subclass names itself, `class Bank(Memory, kind="bank")`, and overrides what it needs:

        inside      `places` (-1: on the embedding, l: beside the attention of layer l, n_layer: on the final state),
                    `mix` for a few tokens and, where that can be had faster, `rows` for whole sequences
        output      `of_tokens`, `prepare`, `find`, `score`, `distribution`, `predict`, `tabulate`
        state       `empty`, `room`: {name: tensor (B, ..)}; what `mix` and `predict` are given is never changed, the
                    next one is returned
        to be seen  `contents`, `retrieved`, `watched`

    What later tokens wrote is never read, and nothing is carried across the start of a sequence.

    Attributes:
        fused: whether kernels of its own may be called: see GPT.fuse.
        places: where in the backbone `mix` is called.
        own: {name: value} the settings of this kind; config.memory_settings may say otherwise, and no other name.
        watched: names of the scalars that `watch` gives for history.jsonl.
        undecayed: names of parameters that weight decay leaves alone.
        rates: {name of a parameter: factor of the learning rate}.
        hit_means: what memory_hit_rate counts.
    """

    kinds = {}
    fused = False
    places = ()
    own = {}
    watched = ()
    undecayed = ()
    rates = {}
    hit_means = "predictions that the memory had a hand in: it changed what goes on by a tenth of its norm or more"

    def __init_subclass__(cls, kind=None, **more):
        super().__init_subclass__(**more)
        if kind:
            Memory.kinds[kind] = cls

    def __init__(self, config=None):
        super().__init__()
        self.config = config
        given = config.memory_settings if config else {}
        if unknown := given.keys() - self.own.keys():
            raise ValueError(f"memory_settings: {', '.join(sorted(unknown))} is no setting of this memory; "
                             f"there are: {', '.join(self.own)}")
        self.set = self.own | given

    # ---- state

    def empty(self, batch, device):
        """The state of `batch` sequences that have read nothing: {name: tensor (batch, ..)}."""
        return {}

    def room(self, state):
        """(B,) how many tokens of each sequence `mix` may be given at once; None: any number. A
        memory that works in rows takes no more than are left to a row's end.
        """
        return None

    # ---- inside the backbone

    def mix(self, place, x, y, state, real, notes):
        """What becomes of y (B, n, D) at a place, for n new tokens of each sequence: (y, next
        state).

        Args:
            x: (B, n, D) the normalised residual stream that goes into the layer (for -1 and n_layer: the stream).
            y: what attention adds to the stream there (for -1 and n_layer: the stream itself, float32).
            real: (B, n) bool, False on padding before the first token; None: all are.
            notes: a dict of this pass, for what a later place or the objective wants to know of this one; where a
                cache goes on, "arriving" are the tokens (B, n).
        """
        return y, state

    def rows(self, place, x, y, opens, notes):
        """`mix` of whole sequences from their start: x, y (N, C, D) -> y; row after row, if there
        is no shorter way.
        """
        if opens is None:
            return self.mix(place, x, y, self.empty(len(x), x.device), None, notes)[0]
        L, R = opens.shape
        x, y = x.unflatten(0, (L, R)), y.unflatten(0, (L, R))
        start = self.empty(L, x.device)
        state, parts = start, []
        for r in range(R):
            state = {name: where(opens[:, r], start[name], held) for name, held in state.items()}
            part, state = self.mix(place, x[:, r], y[:, r], state, None, notes)
            parts.append(part)
        return torch.stack(parts, 1).flatten(0, 1)

    # ---- at the output

    def tabulate(self, embed):
        """Compute once what the weights alone say, of a model that learns no more; who changes them
        calls it again. embed: as in Final.
        """

    def of_tokens(self, tokens, embed):
        """What `prepare` wants to know of the tokens (N, C) alone: to be computed beside the layers."""
        return None

    def prepare(self, h, tokens, opens, embed, of_tokens=None):
        """What `score` wants to know of the final states h (N, C, D) alone, as final.prepared: it can be
        computed while the backbone's output is; opens, embed: as in Final; of_tokens: as above, where
        it is known.
        """
        return None

    def find(self, final):
        """What `score` wants to know of what is retrieved, as final.found: then its gradient can be
        computed while that of the backbone's output is.
        """
        return None

    def score(self, final, notes):
        """Scores of the targets of whole sequences."""
        nothing = torch.zeros_like(final.targets, dtype=torch.bool)
        hit = torch.stack(notes["moved"]).amax(0) > MOVED if self.places else nothing
        objective = final.log_p - sum(notes.get("penalty", ()))
        return Scores(final.log_p, final.log_p, objective, nothing, hit, self.watch(notes))

    def distribution(self, logits, final):
        """log p of every token of the vocabulary, (N, C, V), given the backbone's logits;
        final.log_p may be None.
        """
        return logits.log_softmax(-1)

    def predict(self, logits_of, h, tokens, real, state, embed, keep=0):
        """`distribution` after the last `keep` (0: all) of n new tokens of each sequence:
        (log p (B, keep, V), next state, what was drawn on); logits_of: states -> (.., V).
        """
        return logits_of(kept(h, keep)).log_softmax(-1), state, {}

    # ---- to be seen

    def watch(self, notes):
        """{name: scalar} for each of `watched`: the mean of what `mix` put into notes under that
        name.
        """
        return {name: torch.stack(notes[name]).mean().detach() for name in self.watched}

    def contents(self, state, tokenizer=None, sequence=0):
        """What is held for one sequence, as a list of dicts, in words and numbers."""
        return []

    def retrieved(self, drawn, tokenizer=None, sequence=0):
        """What the last prediction drew on, heaviest first: a list of dicts."""
        return []


def where(flag, one, other):
    """torch.where by sequence: flag (B,), the others (B, ..)."""
    return torch.where(flag.view(-1, *[1] * (one.dim() - 1)), one, other)


def noted_change(y, changed, notes):
    """`changed`, what a memory made of y (N, C, D); by how much, (N, C), goes into notes["moved"]."""
    share = (changed - y).float().norm(dim=-1) / y.float().norm(dim=-1).clamp(min=1e-6)
    notes.setdefault("moved", []).append(share.detach())
    return changed


NOTHING = Memory()


# ------------------------------------------------------------ the long-term memory

class Affine(nn.Linear):
    """A matrix that may be bfloat16, and a bias that is added in float32."""

    def forward(self, x):
        product = F.linear(x, self.weight.to(x.dtype)).float()
        return product if self.bias is None else product + self.bias.float()


class Vectors(NamedTuple):
    """What the LTM learns to make of each position t (first two axes (N, C), or any)."""

    query: torch.Tensor         # (.., K, A) unit vectors: what t looks for
    key: torch.Tensor           # (.., K, A) what the token after t is filed under
    trust: torch.Tensor         # (.., E + K) log weight of what t finds


class Address(NamedTuple):
    """All that the LTM makes of each position t."""

    grams: torch.Tensor         # (.., E) the tokens x_t, x_{t-1}, ..: exact addresses
    known: torch.Tensor         # (..,) bool: x_t was stored
    rare: torch.Tensor          # (.., E) the same tokens where they are rare words, elsewhere NOT_RARE
    query: torch.Tensor         # .. as in Vectors
    key: torch.Tensor
    trust: torch.Tensor


class Reading(NamedTuple):
    """What the positions of some rows retrieved from I candidate items each."""

    exact: torch.Tensor         # (N, C, I) weights through the exact addresses; 0: not retrieved
    words: torch.Tensor         # (N, C, I) weights through rare words
    learned: torch.Tensor       # (N, C, I) weights through the learned addresses
    cosine: torch.Tensor        # (N, K, C, I) of the learned addresses

    @property
    def weights(self):
        """(N, C, I) of all addresses."""
        return self.exact + self.words + self.learned


RING = ("grams", "known", "rare", "key", "value", "bits", "position")      # what the LTM keeps of an item
NOT_RARE = -1
NEVER = 1 << 40                 # number of an item that there is not


class LongTermMemory(Memory, kind="ltm"):
    """At most 256 surprising tokens, first in first out, found again by content; acts at the
    output.

    One sequence x_0 .. x_t; the backbone gives h_t and p_stm, its softmax. Write: x_{t+1}
    arrives; if -log2 p_stm(x_{t+1}) > 4.5 it is stored, filed under the address of position t.
    Read: items whose key has a cosine above 0.8 with the address of t are retrieved, item i with
    a weight a_i. Combine: p(y) = (p_stm(y) + sum_i a_i [value_i = y]) / (1 + sum_i a_i), a
    pointer mixture (cf. Grave et al. 2017, Merity et al. 2017), which sums to one whatever the
    a_i are. Surprisal is p_stm's, so writing does not depend on reading, and a whole sequence is
    computed at once.

    Exact addresses: the one-hot vector of the last token, of the last two, of the last three. The
    cosine of two is 1 where all tokens agree and 0 elsewhere, so they are compared as tokens. The
    one-token address exists only where that token was itself stored: that "the" recurs says
    nothing. Rare words: a word of more than 14 bits among the last three tokens is an address of
    its own, wherever it stands among the three before the item; what such an address finds has a
    fixed weight, since plain text, which hardly ever asks for it, would unlearn it. Learned
    addresses: a network of the final state, and a matrix of the last three tokens; a key also
    knows the token it files, and the state after reading it. Trust comes from the same.

    Every weight falls with a power of the item's age, the number of items stored from it on; each
    learned address has its own (1, 3/4, 1/2, 1/4: cf. the slopes of Press et al. 2022). So the newest
    of equal matches counts most, and the sum grows more slowly than the number of matches, of which a
    long text has more than any training row. No learned threshold decides whether anything is looked
    up, so none can close for good in training: what should not be trusted weighs little.

    Tried, isolated rows, seed 0, bits by the baseline's on the choosing part (documents; trainings
    that differ in the last bits of their gradients alone are up to 0.002 apart):

        5,000 steps, learned powers of age, items that have a strength, too         0.9589
            .. fixed powers; the same one for all learned addresses                 0.9584, 0.9605; 0.9626
            .. fixed powers, no strength                                            0.9582
            .. two seeds: the same; a bias for trust alone; none (this class)       0.9581; 0.9583; 0.9584
            .. two seeds, 1,024 hidden units                                        0.9587
            .. two seeds: again; sharpness 25; plausibility 0.6; four exact ones    0.9583; 0.9592; 0.9586; 0.9594
            .. two seeds, loss of a row's last position three times the first's     0.9585
            .. two seeds, in training another row's items, too, as older ones       0.9592
            .. twice, four times the backbone's rate; no weight decay: more by      0.0003; 0.0006; 0.0005
        5,000 steps, without rare words: learned powers, that start at 0.25 and 1   0.9573
            .. none                                                                 0.9590
            .. a power of 0.5; of 1.5 where learned addresses start at 1            0.9573; 0.9594
            .. with the number of newer matches of the same address too             0.9572
            .. items have a strength through exact addresses too                    0.9573
            .. log p_stm at 0.3 in the objective                                    0.9586
            .. a loss of the learned addresses alone besides                        0.9579
            .. states detached: the backbone is the baseline's                      0.9594
            .. the last fifth of the steps chained; all, by the chained baseline    0.9563; 0.9505
            a look-up that is made or not, trained with a price (the LTM before)    0.9634
        every stored token a rare word, weight 0.05; those of 12 bits               0.9661; 0.9598
        10,000 steps, without rare words; with them, of 14 bits at 0.01             0.9579; 0.9587
            .. beyond an age of 64 twice the power of age, in evaluation: less by   0.0002

    (Without hidden units it was some 0.002 more: read off the reported part, by oversight; they stay.)
    So rare words cost 0.0008, for which, of 8 values, a fact's in another format is likeliest in 90 of
    100 cases instead of 12 (chance), and in 89 instead of 8 with a word put between key and value.

    The state: a ring of the items' fields (RING), `count` of items ever stored, and of the last
    position `h`, `log_z`, `tail` and `surprise` (the last E tokens, and their surprisal in bits),
    `stored` (the last token was), `started` (there was one), `place` (of the next).
    """

    hit_means = "predictions of which items gave at least a tenth (ltm_share)"
    of_each = None                  # (V, ..): `of_tokens` of the whole vocabulary, after `tabulate`

    def __init__(self, config):
        super().__init__(config)
        D, A, E, K = config.n_embd, config.ltm_dim, config.ltm_ngrams, config.ltm_learned
        self.sizes = (K * A, E + K)                                     # address, trust
        self.eot = config.pad_token_id
        self.foreign = getattr(config, "host", None) is not None        # then states come in any size
        self.width = -(-sum(self.sizes) // 16) * 16                     # aligned for tensor cores
        # what comes after t, x_{t+1} and h_{t+1}, has a say in where t files it alone
        parts = self.width + K * A                                      # as h_t, h_{t+1}
        self.from_state = Affine(D, parts + config.ltm_hidden, bias=False)      # .. and hidden units, in one product
        self.from_hidden = Affine(config.ltm_hidden, parts, bias=False)
        self.from_tokens = nn.Linear(D, K * A + E * self.width, bias=False)     # as x_{t+1}, x_t, x_{t-1}, ..

    def _apply(self, fn, recurse=True):
        self.of_each = None                                             # of weights as they were
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def tabulate(self, embed):
        self.of_each = None
        everything = torch.arange(self.config.vocab_size, device=self.from_tokens.weight.device)
        self.of_each = self.of_tokens(everything, embed)

    # ---- addresses

    def addresses(self, vectors, tokens, known, rare, shift):
        """Address of each position of some lines of text.

        Args:
            vectors: their Vectors. tokens: (N, T). known: (N, T) bool, the token was stored.
            rare: (N, T) the token where it is a rare word, elsewhere NOT_RARE.
            shift(x, lag, fill): x moved `lag` positions along its sequence.
        """
        lags = range(self.config.ltm_ngrams)
        grams = torch.stack([shift(tokens, lag, self.eot) for lag in lags], dim=-1)
        words = torch.stack([shift(rare, lag, NOT_RARE) for lag in lags], dim=-1)
        return Address(grams, known, words, *vectors)

    def vectors(self, h, of_tokens, shift):
        """Vectors of each position of some lines of text, queries and keys in h's dtype.

        Args:
            h: (N, T, D) final states. of_tokens: (N, T, ..), of their tokens. shift: as above.
        """
        config, used = self.config, sum(self.sizes)
        if self.foreign:
            h = norm(h)
        of_address = self.sizes[0]
        linear, hidden = self.from_state(h).split((self.width + of_address, config.ltm_hidden), dim=-1)
        own, after = (linear + self.from_hidden(F.gelu(hidden).to(h.dtype))).split((self.width, of_address), dim=-1)
        ahead, *parts = of_tokens.split((of_address,) + (self.width,) * config.ltm_ngrams, dim=-1)
        near = own + sum(shift(part, lag, 0.0) for lag, part in enumerate(parts))
        query, trust = near[..., :used].split(self.sizes, dim=-1)
        value = shift(ahead + after, -1, 0.0)           # of the token after t

        def unit(x):                                    # lies head by head, as it is compared
            heads = x.unflatten(-1, (config.ltm_learned, config.ltm_dim)).transpose(1, 2)
            return F.normalize(heads, dim=-1).to(h.dtype).contiguous().transpose(1, 2)

        trust = trust.contiguous()                      # as its gradient comes, which else is copied
        return Vectors(unit(query), unit(query + value), trust)

    def prepare(self, h, tokens, opens, embed, of_tokens=None):
        """Vectors of whole sequences."""
        parts = self.of_tokens(tokens, embed) if of_tokens is None else of_tokens
        return self.vectors(h, parts, functools.partial(lagged, opens=opens))

    def of_tokens(self, tokens, embed):
        """What tokens (N, T) add to the addresses of the position before them (to the address alone),
        their own, and those after them: (N, T, ..), side by side. EOT adds nothing.
        """
        if self.of_each is not None:
            return self.of_each[tokens]
        known = norm(embed(tokens)) * (tokens != self.eot)[..., None]
        return self.from_tokens(known.to(dtype_for(self.from_tokens)))

    # ---- write

    def route(self, log_p, targets):
        """Surprisal in bits of each target, 0 where there is none, and whether it is stored (both
        like `targets`).
        """
        none = targets == self.eot
        bits = (-log_p.detach() / math.log(2)).masked_fill(none, 0.0)
        stored = bits > self.config.ltm_surprisal_bits
        if self.config.ltm_random:
            stored = 97 * bits % 1 < self.config.ltm_random         # digits that mean nothing: no generator, no state
        return bits, ~none & stored

    def rare_words(self, tokens, bits):
        """The tokens where their surprisal, in bits, makes them rare words, elsewhere NOT_RARE."""
        return torch.where(bits > self.config.ltm_rare_bits, tokens, NOT_RARE)

    def candidates(self, address, targets, stored, opens=None):
        """The items that each row may retrieve: Address (N, I, ..) of what keys have, values (N,
        I); how many items each position comes after (N, C), and the number of each item (N, I): see `ages`.

        Item i (value: the target of position i) is visible to t iff it was stored, i < t in the
        same sequence, and fewer than `ltm_slots` items were stored after it before t: see
        `visible`.
        """
        stands, before, number = self.numbered(stored, opens)

        def line(x):
            return x if opens is None else x.flatten(0, 1)[stands]

        few = opens is not None and opens.size(1) <= 16     # what is quadratic in a lane's length is small
        keys = Taken.apply(address.key, stands, opens) if few else line(address.key)
        items = Address(line(address.grams), line(address.known), line(address.rare), None, keys, None)
        return items, line(targets), before, number

    def numbered(self, stored, opens):
        """Stored items are numbered; a row's candidates are the slots' worth of numbers before it and
        those stored in it, so the cost is linear in the length: where they stand among all positions (N, I);
        `before` (N, C) and `number` (N, I), as above.
        """
        M, (N, C) = self.config.ltm_slots, stored.shape
        if opens is None:                                   # every row is a sequence: its own tokens are candidates
            count = stored.cumsum(1)
            before = count - stored.long()                  # items stored before t
            stands = torch.arange(N * C, device=stored.device).view(N, C)
            return stands, before, torch.where(stored, count - 1, NEVER)
        count = stored.flatten().cumsum(0)
        before = count.view(N, C) - stored.long()
        row = torch.arange(N, device=stored.device)
        opening = torch.where(opens.flatten(), row, 0).cummax(0).values
        first = before[opening, 0]                          # number of the sequence's first item
        oldest = (before[:, 0] - M).maximum(first)
        span = torch.arange(M + C, device=stored.device)
        number = oldest[:, None] + span                     # (N, I)
        # where the item of each number stands; a number not given out stands at 0, and is too young
        # to be visible
        given = torch.where(stored.flatten(), count - 1, N * C)
        place = torch.arange(N * C, device=stored.device)
        stands = given.new_zeros(N * C + M + C).index_copy(0, given, place)[number]
        return stands, before, number

    @staticmethod
    def ages(before, number):
        """(N, C, I): how many items were stored from the item numbered `number` (N, I) on, itself
        included, where `before` (N, C) have been stored; below 1: it is yet to come, or never.
        """
        return before[..., None] - number[:, None]

    def visible(self, age):
        """Which items of an age (N, C, I) are in memory: bool; not what was pushed out or is yet to
        come.
        """
        return (age >= 1) & (age <= self.config.ltm_slots)

    # ---- read

    def weigh(self, address, items, log_p, age):
        """Weights of the retrieved: exp(trust - fade log age) through an exact address, ltm_same or
        ltm_near for each rare word, times age^-ltm_rare_fade, through a learned address exp(trust +
        sharpness (cosine - 1) + plausibility log p_stm(value) - fade log age); no exponent above 10.

        Args:
            address: of the queries, (N, C, ..). items: Address of the candidates, (N, I, ..), as far as they have it.
            log_p: (N, C, I) log p_stm of each candidate's value at each query. age: (N, C, I), as of `ages`.
        """
        config, E = self.config, self.config.ltm_ngrams
        visible, old = self.visible(age), age.clamp(min=1).float().log()
        exact = 0.0
        for n, found in enumerate(self.matches(address, items, visible)):
            score = address.trust[..., n, None] - config.ltm_exact_fade * old              # (N, C, I)
            exact = exact + torch.where(found, score.clamp(max=10).exp(), 0.0)
        words = torch.where(visible, self.through_words(address.rare, items.rare), 0.0)
        words = words * (-config.ltm_rare_fade * old).exp()

        def by_head(x):
            return x.transpose(1, 2).flatten(0, 1)          # (N K, .., A)

        def of_heads(x):
            return x.transpose(1, 2)                        # (N, K, ..)

        cosine = by_head(address.query) @ by_head(items.key).mT
        cosine = cosine.unflatten(0, (-1, config.ltm_learned)).float()                  # (N, K, C, I)
        retrieved = visible[:, None] & (cosine > config.ltm_cosine)
        score = of_heads(address.trust[..., E:])[..., None]
        score = score + config.ltm_sharpness * (cosine - 1) + config.ltm_plausibility * log_p[:, None]
        heads = torch.arange(config.ltm_learned, device=old.device)
        powers = config.ltm_learned_fade * (1 - heads / config.ltm_learned)
        score = score - powers[:, None, None] * old[:, None]
        learned = torch.where(retrieved, score.clamp(max=10).exp(), 0.0).sum(1)
        return Reading(exact, words, learned, cosine)

    def matches(self, address, items, visible):
        """[(N, C, I) bool] which visible items each exact address finds: that of the last token, of the
        last two, ..
        """
        same, found = visible, []
        for n in range(self.config.ltm_ngrams):
            same = same & (address.grams[..., n, None] == items.grams[:, None, :, n])
            found.append(same & address.known[..., None] & items.known[:, None] if n == 0 else same)
        return found

    def through_words(self, asked, filed):
        """(N, C, I) what the rare words of queries (N, C, E) and of items (N, I, E) that agree add up
        to, as if all items were new.
        """
        asked = torch.where(asked == NOT_RARE, NOT_RARE - 1, asked)     # which equals nothing
        weight = 0.0
        for a in range(asked.size(-1)):
            for b in range(filed.size(-1)):
                each = self.config.ltm_same if a == b else self.config.ltm_near
                weight = weight + torch.where(asked[..., a, None] == filed[:, None, :, b], each, 0.0)
        return weight

    def located(self, final):
        """(Address of each position, stored (N, C)) of whole sequences."""
        h, targets, opens = final.h, final.targets, final.opens
        bits, stored = self.route(final.log_p, targets)
        shift = functools.partial(lagged, opens=opens)
        rare = self.rare_words(final.tokens, shift(bits, 1, 0.0))
        vectors = final.prepared or self.prepare(h, final.tokens, opens, final.embed)
        address = self.addresses(vectors, final.tokens, shift(stored, 1, False), rare, shift)
        return address, stored

    def read(self, final, asked=None):
        """The parallel form, what every position of the rows retrieves: (Reading, values (N, I) of
        the candidates, stored (N, C)).

        asked: (rows, columns), (Q,) each: what these positions retrieve alone, as Q rows of one.
        """
        address, stored = self.located(final)
        items, values, before, number = self.candidates(address, final.targets, stored, final.opens)
        h, log_z, before = (of_asked(x, asked) for x in (final.h.detach(), final.log_z.detach(), before))
        address = Address(*(of_asked(x, asked) for x in address))
        items = Address(*(x if x is None else of_rows(x, asked) for x in items))
        values, number = of_rows(values, asked), of_rows(number, asked)
        item_log_p = (h @ final.embed(values).mT).float() - log_z[..., None]
        return self.weigh(address, items, item_log_p, self.ages(before, number)), values, stored

    def find(self, final):
        """Weights of the items that hold the target, and of all that are retrieved, (N, C) each; stored
        (N, C).
        """
        config, (N, C) = self.config, final.targets.shape
        # sizes and rows as the kernel takes them, no more than its offsets reach; what a subclass
        # changes, it does not know
        fits = config.ltm_dim in (16, 32, 64, 128) and config.ltm_slots % config.stm_window == 0
        fits = fits and C == config.stm_window and N * C * (config.ltm_slots + C) < 2 ** 31
        if self.fused and fits and type(self) is LongTermMemory and not torch.is_grad_enabled():
            address, stored = self.located(final)
            stands, before, number = self.numbered(stored, final.opens)
            products = final.h @ final.embed(final.targets.flatten()[stands]).mT
            given = facts_of(address, before, final.targets), address.query, address.key, address.trust
            number = number.clamp(max=2 ** 30)              # NEVER has more bits than a kernel wants to read
            found = fused_sums(*given, stands.int(), number.int(), products, final.log_z, self.constants())
            return *found, stored
        read, values, stored = self.read(final)
        weight = read.weights
        return torch.where(values[:, None] == final.targets[..., None], weight, 0.0).sum(-1), weight.sum(-1), stored

    def constants(self):
        """What the kernel is told of the config."""
        return [float(getattr(self.config, f"ltm_{name}")) for name in (
            "slots", "cosine", "sharpness", "plausibility", "same", "near", "exact_fade", "learned_fade", "rare_fade")]

    # ---- combine

    def score(self, final, notes):
        """Scores of the targets; the objective adds log p_stm: the backbone's own prediction, which
        decides what is stored, keeps learning also where the memory knows.
        """
        right, total, stored = final.found or self.find(final)
        log_p = (final.log_p.exp() + right).clamp(min=1e-38).log() - total.log1p()
        objective = log_p + self.config.ltm_stm_loss * final.log_p
        return Scores(log_p, final.log_p, objective, stored, self.is_hit(total), {})

    def is_hit(self, total):
        """Whether items of that total weight (..,) give at least ltm_share of the probability."""
        return total >= self.config.ltm_share * (1 + total)

    def distribution(self, logits, final):
        log_z = logits.logsumexp(-1)
        stm = logits - log_z[..., None]
        log_p = stm.gather(-1, final.targets[..., None])[..., 0]
        read, values, _ = self.read(final._replace(log_p=log_p, log_z=log_z))
        return mix(stm, read.weights, values)

    # ---- the streaming form

    def empty(self, batch, device):
        config = self.config
        M, E, K = config.ltm_slots, config.ltm_ngrams, config.ltm_learned

        def zeros(*shape, dtype=dtype_for(self.from_state)):
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        ring = dict(grams=zeros(M, E, dtype=torch.long) + self.eot, known=zeros(M, dtype=torch.bool),
                    rare=zeros(M, E, dtype=torch.long) + NOT_RARE,
                    key=zeros(M, K, config.ltm_dim),
                    value=zeros(M, dtype=torch.long), bits=zeros(M, dtype=torch.float32),
                    position=zeros(M, dtype=torch.long))
        last = dict(h=zeros(config.n_embd), log_z=zeros(dtype=torch.float32),
                    tail=zeros(E, dtype=torch.long) + self.eot, surprise=zeros(E, dtype=torch.float32),
                    stored=zeros(dtype=torch.bool), started=zeros(dtype=torch.bool), place=zeros(dtype=torch.long))
        return ring | last | dict(count=zeros(dtype=torch.long))

    def predict(self, logits_of, h, tokens, real, state, embed, keep=0):
        E, M, n = self.config.ltm_ngrams, self.config.ltm_slots, tokens.size(1)
        logits = logits_of(kept(h, keep))
        if logits.size(1) == n:
            log_z = logits.logsumexp(-1)
        else:                                               # of the others only this, a few at a time
            log_z = torch.cat([logits_of(some).logsumexp(-1) for some in h.split(16, 1)], 1)

        # write: the tokens that came, under the states that should have predicted them (one
        # position earlier)
        earlier = torch.cat((state["h"][:, None].to(h.dtype), h), dim=1)                # positions -1 .. n-1
        earlier_z = torch.cat((state["log_z"][:, None], log_z), dim=1)
        log_p = (earlier[:, :n].float() * embed(tokens).float()).sum(-1) - earlier_z[:, :n]
        predicted = torch.cat((state["started"][:, None], real[:, :-1]), dim=1) & real
        bits, stored = self.route(log_p, tokens.masked_fill(~predicted, self.eot))
        line = torch.cat((state["tail"], tokens), 1)                                    # positions -E .. n-1
        known = torch.cat((F.pad(state["stored"][:, None], (E - 1, 0)), stored), 1)
        surprise = torch.cat((state["surprise"], bits), 1)
        shift = functools.partial(moved, length=E + n)
        vectors = self.vectors(F.pad(earlier, (0, 0, E - 1, 0)), self.of_tokens(line, embed), shift)
        address = self.addresses(vectors, line, known, self.rare_words(line, surprise), shift)
        address = Address(*(x[:, E - 1:] for x in address))                             # positions -1 .. n-1
        arrived = state["count"][:, None] + stored.cumsum(1)                            # items each position can see
        newest = state["count"][:, None] - 1
        held = newest - (newest - torch.arange(M, device=h.device)) % M                 # number of each slot's item
        held = torch.where(held < 0, NEVER, held)
        number = torch.cat((held, torch.where(stored, arrived - 1, NEVER)), dim=1)      # (B, M + n)
        came = real.cumsum(1)                                                           # padding has no place
        position = state["place"][:, None] + came - 1
        new = dict(grams=address.grams[:, :n], known=address.known[:, :n], rare=address.rare[:, :n],
                   key=address.key[:, :n], value=tokens, bits=bits, position=position)
        items = {name: torch.cat((state[name], new[name].to(state[name].dtype)), 1) for name in RING}

        # read: the query of each position against the ring and what came within this block
        query = Address(*(x[:, 1:] for x in address))
        filed = Address(items["grams"], items["known"], items["rare"], None, items["key"].to(h.dtype), None)
        item_log_p = (h.detach() @ embed(items["value"]).mT).float() - log_z.detach()[..., None]
        read = self.weigh(query, filed, item_log_p, self.ages(arrived, number))
        weight = read.weights
        same = read.exact[:, -1] + read.words[:, -1] > 0
        cosine = torch.where(same, 1.0, read.cosine[:, :, -1].amax(1))
        drawn = dict(value=items["value"], position=items["position"], weight=weight[:, -1], cosine=cosine,
                     total=1 + weight[:, -1].sum(-1))

        # keep: the newest `ltm_slots` items, each in the slot of its number; what is older than
        # the ring falls out
        lasting = stored & (arrived > arrived[:, -1:] - M)
        slot = torch.where(lasting, (arrived - 1) % M, M)
        place = torch.arange(M + n, device=h.device).expand(len(h), -1)
        source = into_slots(place[:, :M], slot, place[:, M:])           # where each slot's item stands among `items`
        state = {name: at_places(x, source) for name, x in items.items()} | dict(
            count=arrived[:, -1], h=h[:, -1].to(state["h"].dtype), log_z=log_z[:, -1], tail=line[:, n:],
            surprise=surprise[:, n:], stored=stored[:, -1], started=real[:, -1] | state["started"],
            place=state["place"] + came[:, -1])
        log_z, weight = (kept(x, keep) for x in (log_z, weight))
        return mix(logits - log_z[..., None], weight, items["value"]), state, drawn

    # ---- to be seen

    def contents(self, state, tokenizer=None, sequence=0):
        """The items of one sequence, oldest first: a list of dicts with token, text, bits,
        position.
        """
        count, M = int(state["count"][sequence]), self.config.ltm_slots
        token, bits, position = (state[name][sequence].tolist() for name in ("value", "bits", "position"))
        slots = [number % M for number in range(max(0, count - M), count)]
        return [dict(token=token[slot], text=text_of(token[slot], tokenizer), bits=bits[slot],
                     position=position[slot]) for slot in slots]

    def retrieved(self, drawn, tokenizer=None, sequence=0):
        """What the last prediction drew on, heaviest first: dicts with token, text, position,
        cosine, share of p.
        """
        names = ("value", "position", "cosine", "weight")
        columns = [drawn[name][sequence].tolist() for name in names]
        total = float(drawn["total"][sequence])
        found = [dict(token=token, text=text_of(token, tokenizer), position=position, cosine=cosine,
                      share=weight / total)
                 for token, position, cosine, weight in zip(*columns) if weight > 0]
        return sorted(found, key=_share, reverse=True)


def of_asked(x, asked):
    """x (N, C, ..) at positions (rows, columns) as rows of one, (Q, 1, ..); None: all of it."""
    return x if asked is None else x[asked][:, None]


def of_rows(x, asked):
    """x (N, ..) of the rows of positions (rows, columns), (Q, ..); None: all of it."""
    return x if asked is None else x[asked[0]]


def facts_of(address, before, targets):
    """(N, C, 2 E + 3) int32: the whole numbers that a kernel reads of each position."""
    return torch.cat((address.grams, address.rare, torch.stack((address.known.long(), before, targets), -1)), -1).int()


def _share(item):
    return item["share"]


def text_of(token, tokenizer):
    """What a token says; None without a tokenizer."""
    return tokenizer.decode([token]) if tokenizer else None


def moved(x, lag, fill, length):
    """x (N, T, ..) moved `lag` positions to the right (-1: to the left) along a line of `length`;
    `fill` comes in.
    """
    ahead = max(-lag, 0)
    padding = (0, 0) * (x.dim() - 2) + (max(lag, 0), ahead)
    return F.pad(x, padding, value=fill)[:, ahead:ahead + length]


def lagged(x, lag, fill, opens):
    """x (N, C, ..) moved `lag` positions to the right (-1: to the left) along its sequence; `fill`
    before the start.

    Moved to the left, the end of a sequence sees the start of the next: no matter, it has no
    target to file.
    """
    C = x.size(1)
    line = x if opens is None else x.flatten(0, 1)[None]
    shifted = moved(line, lag, fill, line.size(1)).reshape(x.shape)
    if opens is None or lag < 1:
        return shifted
    start = opens.flatten()[:, None] & (torch.arange(C, device=x.device) < lag)
    return torch.where(start.view(*start.shape, *[1] * (x.dim() - 2)), fill, shifted)


class Taken(torch.autograd.Function):
    """x (N, C, ..) at some of the N C places (N, I) for each row. The gradient of a place taken more than once
    is summed by a matrix product: same bits each time, and sooner than by atomics. Places in another lane, where
    numbers stand that were not given out, get none.
    """

    @staticmethod
    def forward(ctx, x, places, opens):
        ctx.save_for_backward(places, opens)
        ctx.shape = x.shape
        return x.flatten(0, 1)[places]

    @staticmethod
    def backward(ctx, grad):
        places, opens = ctx.saved_tensors
        (lanes, rows), C = opens.shape, ctx.shape[1]
        place = torch.arange(lanes * rows * C, device=places.device).view(lanes, -1, 1)
        same = (place == places.view(lanes, 1, -1)).to(grad.dtype)
        return (same @ grad.reshape(lanes, same.size(2), -1)).view(ctx.shape), None, None


def at_places(x, places):
    """x (B, N, ..) at places (B, M) of its second axis: (B, M, ..)."""
    return torch.take_along_dim(x, places.view(*places.shape, *[1] * (x.dim() - 2)), 1)


def into_slots(ring, slot, new):
    """ring (B, M, ..) with new (B, n, ..) written to its slots (B, n), all different; slot M: left
    out.
    """
    B, n = slot.shape
    index = slot.view(B, n, *[1] * (ring.dim() - 2)).expand_as(new)
    room = F.pad(ring, (0, 0) * (ring.dim() - 2) + (0, 1))              # one more, for what is left out
    return room.scatter(1, index, new.to(ring.dtype))[:, :-1]


def mix(stm, weight, values):
    """log of (p_stm + the items' weights at their values) / (1 + all weights): (N, C, V), (N, C,
    I), (N, I).
    """
    weight = weight.to(stm.dtype)
    added = torch.zeros_like(stm).scatter_add_(2, values[:, None].expand(-1, stm.size(1), -1), weight)
    return (stm.exp() + added).clamp(min=1e-38).log() - weight.sum(-1, keepdim=True).log1p()


def follow_umask(path):
    """Give a file the mode that open() would have given it: safetensors writes 0600, for its owner's
    eyes only.
    """
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


# ------------------------------------------------------------ the two models

class GPT(PreTrainedModel, GenerationMixin):
    """GPT-70M, and the backbone of RevenaHybridTiny: log-probabilities as logits, so that softmax
    gives p.
    """

    config_class = RevenaConfig
    backbone_class = Backbone
    base_model_prefix = "revena"
    _is_stateful = True                         # no assisted decoding: a memory can't be unread
    _no_split_modules = ["Block"]               # what FSDP wraps one by one
    _supports_sdpa = True                       # for those who ask for it by name: it is what `attend` calls
    accepts_loss_kwargs = False                 # Trainer is to divide accumulated losses: forward means over its batch
    fused = False                               # whether `states` and `log_p` call the kernels made for them

    def __init__(self, config):
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.post_init()

    def _init_weights(self, module):
        """Embeddings: Normal(0, 0.02) (GPT-2). What is linear keeps nn.Linear's start: uniform in 1
        / sqrt(inputs).
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, *args, device_map=None, output_loading_info=False, **kwargs):
        """As ever, but what the files lack, or have of another shape, starts as in a new model; and
        the model goes onto one device.

        Raises: ValueError where device_map names several devices.
        """
        if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
            raise ValueError(f"{cls.__name__} works on one device, not on several: pass device_map={{'': 0}}")
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        if device_map is not None:
            kwargs["device_map"] = device_map
        model, about = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lacking = [name if isinstance(name, str) else name[0]
                   for name in (*about["missing_keys"], *about["mismatched_keys"])]
        if lacking:
            fresh = cls(copy.deepcopy(model.config)).state_dict()
            there = model.state_dict()
            for name in set(lacking) & there.keys():
                there[name].copy_(fresh[name])              # else it would be whatever the memory held
        return (model, about) if output_loading_info else model

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                            # forward makes its own: RevenaCache

    @property
    def active(self):
        """The memory at work: one that does nothing, where there is none or it is off."""
        return NOTHING

    def get_input_embeddings(self):
        return self.backbone.embed

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As ever, but others may read the weights as far as the umask lets them."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for path in glob.glob(os.path.join(glob.escape(os.fspath(save_directory)), "*.safetensors")):
            follow_umask(path)

    def set_input_embeddings(self, value):
        if not isinstance(value, TokenMatrix):
            raise ValueError(f"the embedding is the output matrix, too: set a TokenMatrix, "
                             f"not a {type(value).__name__}")
        self.backbone.embed = value

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Room for a vocabulary of another size, as after tokenizer.add_tokens(..): returns the
        embedding. Its rows stay aligned (Backbone.padded), whatever the number of tokens.

        Raises: ValueError for one without <|endoftext|>, which opens texts and pads them.
        """
        embed, tokens = self.backbone.embed, new_num_tokens or self.config.vocab_size
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embed
        if pad_to_multiple_of:
            tokens = -(-tokens // pad_to_multiple_of) * pad_to_multiple_of
        eot = self.config.pad_token_id
        if tokens <= eot:
            raise ValueError(f"a vocabulary of {tokens} tokens is without <|endoftext|> ({eot}), "
                             f"which this model needs")
        embed.weight.data = embed.weight.data[:self.config.vocab_size]      # rows of no token: not to be averaged
        embed = super().resize_token_embeddings(Backbone.padded(tokens), None, mean_resizing)
        self.config.vocab_size = self.vocab_size = tokens
        return embed

    # ---- whole sequences

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        return self.fuse() if self.fused else self          # what fits depends on the weights' type

    def fuse(self):
        """Let this model and all parts of it call the kernels made for them, where these fit; returns
        self. A GPU, and what compiles for it, are there. In float32 (cards before sm_80) the plain twins
        are faster.
        """
        window, half = self.config.stm_window or 0, self.config.n_embd // self.config.n_head // 2
        fits = window in (16, 32, 64, 128) and half in (16, 32, 64)
        fits = triton is not None and fits and self.backbone.embed.weight.dtype == torch.bfloat16
        for part in self.modules():                 # this one, and what of it has kernels of its own
            if hasattr(part, "fused"):
                part.fused = fits
        return self

    def logits(self, h):
        """Unnormalised log-probabilities of the backbone, float32 (.., V)."""
        return self.all_logits(h)[..., :self.config.vocab_size].float()

    def all_logits(self, h):
        """`logits` in h's dtype, with the columns that belong to no token (see Backbone.padded)."""
        embed = self.backbone.embed
        if hasattr(embed, "lora_embedding_A") or hasattr(embed, "token_adapter"):
            raise ValueError("the embedding is the output matrix, too, for which there is no such "
                             "adapter; give it to peft as modules_to_save=['embed'], or leave it out "
                             "of target_modules")
        return embed(h)

    def embed_detached(self, tokens):
        """Rows of the output matrix, (.., D), for a memory: it does not train them."""
        return self.backbone.embed(tokens).detach()

    def states(self, tokens, opens=None, embedded=None, collect=None):
        """Final states (N, C, D) of rows of tokens (N, C), and what the memory noted of this pass.

        `opens` as at the top of this file; `embedded`: the tokens' embeddings, where they are
        known; `collect`: a list that receives what goes into each layer.
        """
        table, memory, notes = self.backbone.rotary, self.active, {}
        # of more tokens at once the kernels' offsets would not fit 32 bits
        fits = tokens.numel() * 4 * self.config.n_embd < 2 ** 31
        fused = self.fused and fits and tokens.size(1) == self.config.stm_window

        def rows(q, k, v):
            return row_attention(q, k, v, table, opens)

        def attention(y, n_head):
            return fused_heads(y, table, opens, n_head)[0] if fused else heads(y, n_head, rows)

        def mix(place, x, y):
            return noted_change(y, memory.rows(place, x, y, opens, notes), notes)

        embedded = self.backbone.embed(tokens) if embedded is None else embedded
        attentions = [attention] * self.config.n_layer
        return self.backbone(embedded, attentions, mix, memory.places, collect, whole=True), notes

    def log_p(self, h, targets):
        """log p_stm(target) and log Z, (N, C) each, a slice of positions at a time, to bound the
        logits.
        """
        # 64 x V floats: what malloc keeps and reuses; a kernel wants no float32 copy of the logits
        pairs, size = [], 4096 if self.fused else 2048 if h.is_cuda else 64
        for states, wanted in zip(h.flatten(0, 1).split(size), targets.flatten().split(size)):
            if self.fused:
                pairs.append(fused_log_p(self.all_logits(states), wanted, self.config.vocab_size))
                continue
            if h.is_cuda:
                # what fuses well: all columns with those of no token hidden, where a slice would
                # be read unaligned;
                # and a masked sum, where a gather's gradient is a (positions, V) matrix of zeros
                # to fill
                logits = self.all_logits(states).float()
                token = torch.arange(logits.size(-1), device=h.device)
                logits = torch.where(token < self.config.vocab_size, logits, -math.inf)
                picked = torch.where(token == wanted[:, None], logits, 0.0).sum(-1)
            else:
                logits = self.logits(states)
                picked = logits.gather(-1, wanted[:, None])[:, 0]
            log_z = logits.logsumexp(-1)
            pairs.append((picked - log_z, log_z))
        return tuple(torch.cat(parts).view_as(targets) for parts in zip(*pairs))

    def score(self, tokens, targets, opens=None, embedded=None):
        """Scores of the targets (N, C), EOT where there is none, given the tokens up to each
        position.
        """
        h, notes = self.states(tokens, opens, embedded)
        return self.score_states(h, notes, tokens, targets, *self.log_p(h, targets), opens)

    def of_tokens(self, tokens):
        """What the memory wants to know of the tokens alone: see there."""
        return self.active.of_tokens(tokens, self.embed_detached)

    def prepare(self, h, tokens, opens=None, of_tokens=None):
        """What the memory wants to know of the final states alone: see there."""
        return self.active.prepare(h, tokens, opens, self.embed_detached, of_tokens)

    def find(self, h, tokens, targets, log_p, log_z, opens=None, prepared=None):
        """What the memory wants to know of what it retrieves: see there."""
        return self.active.find(Final(h, tokens, targets, log_p, log_z, self.embed_detached, opens, prepared))

    def score_states(self, h, notes, tokens, targets, log_p, log_z, opens=None, prepared=None, found=None):
        """`score`, given what `states`, `log_p` and, if they were asked, `prepare` and `find` give."""
        final = Final(h, tokens, targets, log_p, log_z, self.embed_detached, opens, prepared, found)
        return self.active.score(final, notes)

    # ---- Hugging Face's forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
                logits_to_keep=0):
        """Log-probabilities of the next token as `logits` (B, T, V): softmax(logits) =
        exp(logits) = p.

        Args:
            input_ids: (B, T). attention_mask: (B, T), with a cache also over what it has read, ones for text, zeros
                for padding on the left or, without a cache, on the right.
            position_ids: only as they follow from the mask and the cache; others are refused.
            past_key_values: a RevenaCache (see new_cache) to go on from; use_cache=True starts one. Then `input_ids`
                are only the new tokens, any number; the cost of a token does not depend on how many came before.
            labels: (B, T), -100 ignored; gives `loss`, the mean negative log-likelihood of labels[:, 1:] in nats. What
                train.py minimises, `objective` of `score`, has terms of a memory's own besides.
            output_hidden_states, output_attentions, return_dict, use_cache: None: what the config says of them.
            logits_to_keep: give the last so many positions only, 0: all; or those of a 1-D tensor.

        Raises:
            ValueError: a mask with holes, inputs that are embeddings, positions that restart, a sequence beyond
                n_positions, a cache of another number of sequences, shapes that do not fit, a model on two devices.
        """
        def asked(value, name):
            return getattr(self.config, name, None) if value is None else value

        attentions = asked(output_attentions, "output_attentions")
        if attentions or inputs_embeds is not None or input_ids is None:
            raise ValueError("this model takes input_ids and gives no attentions")
        check_placement(self)
        read = getattr(past_key_values, "length", 0)        # what is no RevenaCache is refused below
        real = check_inputs(input_ids, attention_mask, labels, logits_to_keep, read, self.config.vocab_size)
        hidden = [] if asked(output_hidden_states, "output_hidden_states") else None
        if past_key_values is None and not asked(use_cache, "use_cache"):
            check_positions(position_ids, real)
            logits = self._whole(input_ids, real, logits_to_keep, hidden)
        else:
            cache = self.new_cache(len(input_ids)) if past_key_values is None else past_key_values
            check_cache(cache, len(input_ids), real)
            check_positions(position_ids, real, cache)
            logits = self._streamed(input_ids, real, cache, logits_to_keep, hidden)
            past_key_values = cache
        loss = None
        if labels is not None:
            wanted = labels[:, -logits.size(1):][:, 1:]
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        hidden = None if hidden is None else tuple(hidden)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=hidden)
        return output.to_tuple() if asked(return_dict, "return_dict") is False else output

    def _whole(self, ids, real, keep, hidden):
        """forward without a cache: padding moved to the right, sequences cut into rows, all rows at
        once.
        """
        B, T = ids.shape
        window, longest = self.config.stm_window, self.config.n_positions
        if window is None and T > longest:
            raise ValueError(f"{T} tokens; a model without a window sees at most {longest}")
        some = real.any(1)
        # padding on the left; of nothing but padding the last is read, as the <|endoftext|> it is
        lead = real.long().argmax(1).masked_fill(~some, T - 1)
        if (some & (real.sum(1) + lead != T - real.flip(1).long().argmax(1))).any():
            raise ValueError("attention_mask has holes; mask padding only, before or after the text")
        place = torch.arange(T, device=ids.device)
        eot = self.config.pad_token_id
        tokens = ids.masked_fill(~real, eot).gather(1, (place + lead[:, None]) % T)
        # a memory that works in rows wants whole ones; without, one short row will do
        C = T if window is None or (T <= window and not self.active.places) else window
        rows = -(-T // C)
        opens = None
        if rows > 1:
            opens = (torch.arange(rows, device=ids.device) == 0).expand(B, rows)
        tokens = F.pad(tokens, (0, rows * C - T), value=eot)
        targets = F.pad(tokens[:, 1:], (0, 1), value=eot).reshape(B * rows, C)
        tokens = tokens.view(B * rows, C)
        h, _ = self.states(tokens, opens, collect=hidden)
        back = (place - lead[:, None]) % T

        def unrow(x):
            line = x.reshape(B, rows * C, -1)[:, :T]
            return line.gather(1, back[..., None].expand(-1, -1, x.size(-1)))

        if hidden is not None:
            hidden[:] = [unrow(x) for x in [*hidden, h]]
        final = Final(h, tokens, targets, None, None, self.embed_detached, opens)
        return kept(unrow(self.active.distribution(self.logits(h), final)), keep)

    @torch.compiler.disable(reason="what it changes in the cache is no result of a compiled function")
    def _streamed(self, ids, real, cache, keep, hidden):
        """forward with a cache: blocks of at most a window, each continuing what `cache` holds."""
        parts, states, window = [], [], self.config.stm_window
        every = keep if isinstance(keep, int) else 0
        # one token of a model with a window has the same shapes whatever came before, and so have
        # whole windows: a GPU replays them, the latter where there are many
        many = window and every < 2 and cache.length + ids.size(1) >= REPLAYED * window
        replayed = () if not window else (1, window) if many else (1,)
        inference = not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling())
        # a graph would not know which adapters are on, and autocast's copies of weights are gone with it
        inference &= not (hasattr(self, "peft_config") or torch.is_autocast_enabled("cuda"))
        for block, mask in cache.blocks(ids.masked_fill(~real, self.config.pad_token_id), real):
            collected = None if hidden is None else []
            last = every if every < block.size(1) else 0    # all of a block is said in one way
            if block.is_cuda and inference and hidden is None and block.size(1) in replayed:
                parts.append(cache.replay(block, mask, last))
            else:
                parts.append(self.stream(block, cache, mask, collected, last))
            if every:                                       # not all of a long text at once
                parts = [kept(torch.cat(parts, 1), keep)]
            states.append(collected)
        if hidden is not None:
            hidden[:] = [torch.cat(layer, 1) for layer in zip(*states)]
        return kept(torch.cat(parts, 1), keep)

    # ---- a few tokens at a time

    def advance(self, tokens, cache, real, collect=None):
        """States (B, n, D) of a block of new tokens (B, n), attention and memory going on from
        `cache`, which moves on.
        """
        n, window = tokens.size(1), self.config.stm_window
        past = cache.real.size(1)
        if window is None and past + n > self.config.n_positions:
            raise ValueError(f"{past + n} tokens; a model without a window sees at most {self.config.n_positions}")
        known = torch.cat((cache.real, real), dim=1)
        query = torch.arange(past, past + n, device=tokens.device)
        key = torch.arange(past + n, device=tokens.device)
        ahead = query[:, None] - key
        within = (ahead >= 0) & (ahead < (window or past + n))
        seen = within & known[:, None] | (ahead == 0)                   # (B, n, past + n)
        memory, notes = self.active, {"arriving": tokens}
        # what each layer would make anew: keys and queries are turned together, and hidden is what is added
        table = self.backbone.rotary[:, torch.cat((key, query))]
        hidden = torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -math.inf)[:, None]
        lasting = slice(0 if window is None else n, past + n)

        def attention(layer, q, k, v):
            joined = torch.cat((cache.keys[layer], k, q), dim=1)
            v = torch.cat((cache.values[layer], v), dim=1)
            cache.keys[layer], cache.values[layer] = joined[:, lasting], v[:, lasting]
            k, q = rotate(joined, table).split((past + n, n), dim=1)
            return attend(q, k, v, hidden.to(q.dtype))

        def mix(place, x, y):
            y, cache.state = memory.mix(place, x, y, cache.state, real, notes)
            return y

        attentions = [functools.partial(heads, attention=functools.partial(attention, layer))
                      for layer in range(self.config.n_layer)]
        h = self.backbone(self.backbone.embed(tokens), attentions, mix, memory.places, collect)
        cache.real = known if window is None else known[:, n:]
        cache.digest = digest(tokens, real, cache.digest)
        return h

    def stream(self, tokens, cache, real=None, collect=None, keep=0):
        """Go on from `cache` with tokens (B, n), n at most a window: log p (B, n, V) of what comes
        after each; after the last `keep`, where that is not 0.

        Constant memory and constant cost a token; equal to the parallel form. `real` (B, n) is
        False on padding.
        """
        if real is None:
            real = torch.ones_like(tokens, dtype=torch.bool)
        read, one = self._read, tokens.size(1) == 1 and collect is None
        if cache.compiled and one and not torch.is_grad_enabled():
            read = torch.compile(read, dynamic=False)
            tokens, real = laid_out(tokens), laid_out(real)
            cache.put({name: laid_out(x) for name, x in cache.tensors().items()})
        log_p = read(tokens, cache, real, collect, keep)
        cache.length += tokens.size(1)          # a number that changes, which would be compiled anew
        return log_p

    def _read(self, tokens, cache, real, collect, keep):
        h = self.advance(tokens, cache, real, collect)
        if collect is not None:
            collect.append(h)
        given = self.logits, h, tokens, real, cache.state, self.embed_detached, keep
        log_p, cache.state, cache.drawn = self.active.predict(*given)
        return log_p

    # ---- generation

    def new_cache(self, batch_size=1, compiled=False):
        """An empty RevenaCache; forward(..) and generate(..) go on from it, and fill it, as
        `past_key_values`. `compiled`: torch.compile is given what reads one token without gradients,
        hundreds of small kernels, for each of at most 8 kinds of call (torch's recompile_limit);
        ValueError if the cache grows, and would be compiled again with each token.
        """
        return RevenaCache(self, batch_size, compiled)

    def load_cache(self, path, compiled=False):
        """The RevenaCache that `cache.save(path)` wrote; ValueError if it is that of a model of
        another shape.
        """
        return type(self.new_cache()).load(path, self, compiled)

    def _prepare_generation_config(self, *args, **kwargs):
        """A prefill in chunks is none: forward reads in blocks of a window as it is, and a text cut
        before it is known what of it is new would be cut in the wrong place.
        """
        config, rest = super()._prepare_generation_config(*args, **kwargs)
        config.prefill_chunk_size = None
        return config, rest

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None,
                                      is_first_iteration=False, **kwargs):
        """What generate(..) feeds the model, where a cache goes on: the part of the text that it
        has not read.

        By itself, generate takes a text for the whole so far and drops as many tokens as were
        read. Here one that is too short for that is all new, and a longer one must begin with all
        that was read.
        """
        if is_first_iteration and next_sequence_length is not None and (read := past_key_values.get_seq_length()):
            known, (B, T) = past_key_values.digest, input_ids.shape
            mask, real = kwargs.get("attention_mask"), torch.ones_like(input_ids)
            if mask is not None and mask.shape == real.shape:
                real = mask.bool()
            if T >= read and torch.equal(digest(input_ids[:, :read], real[:, :read]), known):
                input_ids = input_ids[:, read:]
            elif T > read and B == len(known):
                raise ValueError(f"the text does not begin with the {read} tokens that the memory has read; if all of "
                                 f"it is new, pass attention_mask=torch.ones({B}, {read + T}), a mask over both")
            next_sequence_length = None
        given = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            is_first_iteration=is_first_iteration, **kwargs)
        given.pop("cache_position", None)       # which earlier transformers give: positions say the same
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        if read:                    # of what is new alone generate counts from 0, and its mask may begin there
            positions, mask = given.get("position_ids"), given.get("attention_mask")
            if positions is not None:
                given["position_ids"] = positions - positions[..., :1] + read if positions.size(-1) > 1 else None
            if mask is not None:
                given["attention_mask"] = mask[:, mask.size(1) - given["input_ids"].size(1):]
        return given


def laid_out(x):
    """x with the strides of a new tensor, also where a size is 1: compiled code asks for its own."""
    same = x.stride() == torch.empty(x.shape, device="meta").stride()
    return x if same else x.clone(memory_format=torch.contiguous_format)


def kept(logits, keep):
    """Of (B, T, V) the last `keep` positions, 0: all, or those that a 1-D tensor names."""
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def check_placement(model):
    """Raise ValueError where parts of a model lie where its methods would not find them: on another
    device, offloaded by accelerate, or sharded by FSDP as parts that are used without being called.
    """
    if getattr(model, "_is_fsdp_managed_module", False):
        check_shards(model)
    if not (hasattr(model, "_hf_hook") or len(set(getattr(model, "hf_device_map", {}).values())) > 1):
        return                                              # the usual case is to cost nothing
    if len({x.device for x in model.parameters()}) > 1 or model.device.type == "meta":
        raise ValueError("parts of this model are offloaded or on different devices, and it works on "
                         "one: load it with device_map={'': 0}, or without a device_map")


def check_shards(model):
    """Raise ValueError where FSDP would not gather what forward reads: a memory, a backbone and a list
    of parameters are used, not called.
    """
    def is_unit(module):
        names = {kind.__name__ for kind in type(module).__mro__}
        return bool(names & {"FSDPModule", "FullyShardedDataParallel"})

    units = [getattr(x, "module", x) for x in model.modules() if x is not model and is_unit(x)]
    if any(isinstance(x, (Backbone, Memory, nn.ParameterList)) for x in units):
        raise ValueError("FSDP can shard this model as a whole and by its Blocks (ModuleWrapPolicy({Block})), "
                         "not by its backbone, its memory or lists of parameters")
    embed = model.backbone.embed
    weight = None if is_unit(embed) else embed.weight
    if weight is not None and (weight.dim() != 2 or weight.untyped_storage().size() == 0):
        raise ValueError("this model's parameters are sharded: call the module that FSDP returned, or "
                         "go on within FSDP.summon_full_params(..)")


def is_worth_asking(x):
    """Whether values of x (B, T) are looked at: a GPU is not kept waiting at each token."""
    return x.size(1) > 1 or not x.is_cuda


def check_inputs(ids, mask, labels, keep, read, vocabulary):
    """Which of the tokens (B, T) are text, bool (B, T); ValueError where shapes do not fit each other,
    given how many tokens a cache has `read`, or a mask says more than yes and no.
    """
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids are token numbers of shape (batch, tokens), "
                         f"not {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() == 0 and not read:
        raise ValueError("no tokens: a text is at least one, tokenizer.bos_token_id where it is empty")
    ask = is_worth_asking(ids)
    if ask and ((ids < 0) | (ids >= vocabulary)).any():
        raise ValueError(f"a token is not among the {vocabulary} of this model; after tokenizer.add_tokens(..) "
                         f"call model.resize_token_embeddings(len(tokenizer))")
    if labels is not None and (labels.shape != ids.shape or not isinstance(keep, int)):
        raise ValueError(f"labels have the shape of input_ids, {tuple(ids.shape)}, not {tuple(labels.shape)}, "
                         f"and go with a number as logits_to_keep")
    if isinstance(keep, int) and keep < 0 or not isinstance(keep, int) and keep.dim() != 1:
        raise ValueError("logits_to_keep is a number of positions, or a 1-D tensor of them")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.dim() != 2 or len(mask) != len(ids) or mask.size(1) - ids.size(1) not in (0, read):
        raise ValueError(f"attention_mask has the shape of input_ids, {tuple(ids.shape)}, and {read} more "
                         f"columns, or none, for what a cache has read; not {tuple(mask.shape)}")
    if ask and ((mask != 0) & (mask != 1)).any():
        raise ValueError("attention_mask is 1 for text and 0 for padding: documents packed into one row "
                         "are not supported, give each a row")
    return mask[:, mask.size(1) - ids.size(1):].bool()


def check_cache(cache, batch, real):
    """Raise ValueError unless a cache can take these tokens of `batch` sequences, real (B, T) False
    on padding.
    """
    # by name: a folder's copy of this file has its own class
    if "RevenaCache" not in {kind.__name__ for kind in type(cache).__mro__}:
        raise ValueError(f"past_key_values must be a RevenaCache, not a {type(cache).__name__}: see model.new_cache()")
    if len(cache.real) != batch:
        raise ValueError(f"this cache holds {len(cache.real)} sequences, not {batch}: make it with "
                         f"model.new_cache({batch}), or repeat it with cache.batch_repeat_interleave(..)")
    if real.size(1) == 0:
        raise ValueError("no tokens: generate() takes the whole text so far, or what of it is new, and at "
                         "least one token that the memory has not read")
    if not is_worth_asking(real):
        return
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("with a cache, pad on the left: tokenizer.padding_side = 'left'")
    if (cache.real.any(1, keepdim=True) & ~real).any():
        raise ValueError("with a cache, pad only before the first token of a sequence, not between its turns")


def check_positions(positions, real, cache=None):
    """Raise ValueError where positions (B, T), (1, T) or (T,) restart or jump between two tokens of a
    text, or between a cache's last one and the first: rotary positions are relative, so where they
    begin does not matter, but several documents in one row would see one another.
    """
    if positions is None or not is_worth_asking(real):
        return
    if positions.dim() > 2 or positions.size(-1) != real.size(1):
        raise ValueError(f"position_ids have the shape of input_ids, {tuple(real.shape)}, "
                         f"not {tuple(positions.shape)}")
    steps = positions.diff(dim=-1)
    broken = ((steps != 1) & real[:, 1:] & real[:, :-1]).any()
    if cache is not None:                                   # a position may count padding, or not
        first, seen = positions[..., 0], cache.real.sum(1)
        broken = broken | ((seen > 0) & ((first < seen) | (first > cache.length))).any()
    if broken:
        raise ValueError("position_ids that restart or jump are not supported: one document a sequence, "
                         "without packing (or one row each, padded)")


class RevenaHybridTiny(GPT):
    """GPT with sliding-window attention (STM) and, where config.memory_enabled, the memory that
    config.memory names.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.memory not in Memory.kinds:
            raise ValueError(f"there is no memory {config.memory!r} here; there are: {', '.join(Memory.kinds)}")
        self.memory = Memory.kinds[config.memory](config)
        self.post_init()

    @property
    def active(self):
        return self.memory if self.config.memory_enabled else NOTHING


# ------------------------------------------------------------ what generation carries

def gathered(x):
    """A tensor that FSDP has sharded, whole: a memory's first state may be a parameter."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


REPLAYED = 8                    # windows that a text has where recording one pays
BASE = 6364136223846793005      # odd, as large as the words of 64 bits that a digest is counted in


def digest(tokens, real, before=0):
    """A number (B,) that says which tokens (B, n) were read, given that `before` of those before
    them: sum of (token + 1) BASE^(tokens after it), modulo 2^64, of those that are `real`: (B, n).
    """
    powers = torch.full((tokens.size(1),), BASE, device=tokens.device).cumprod(0)
    powers = F.pad(powers, (1, 0), value=1)                             # of 0, 1, .. n
    return before * powers[-1] + ((tokens + 1) * real * powers[:-1].flip(0)).sum(1)


def fingerprint(model):
    """What stays the same of a model's weights while none of them changes: text, short. Of weights
    that are sharded, which one process alone cannot see: "".
    """
    def total(x):                                   # of its bits, words of 64, each times an odd number
        x = x.detach().flatten().view(torch.uint8)
        words = (F.pad(x, (0, -len(x) % 8)) if len(x) % 8 else x).view(torch.long)
        return (words * torch.arange(1, 2 * len(words), 2, device=x.device)).sum()

    if any(hasattr(x, "full_tensor") for x in model.parameters()):
        return ""
    totals = torch.stack([total(x) for x in model.parameters()]).tolist()
    return sha256(repr(totals).encode()).hexdigest()[:16]


def graph_settings(model):
    """What of a model's config and of the place of its tensors a recorded graph depends on: who keeps
    it copies it.
    """
    weight = model.get_input_embeddings().weight
    if hasattr(weight, "to_local"):                         # of a model that is sharded
        weight = weight.to_local()
    table = getattr(getattr(model, "memory", None), "of_each", None)
    own = {name: value for name, value in vars(model.config).items()
           if name.startswith(("ltm_", "memory"))}
    places = {"weights": weight.data_ptr(), "table": None if table is None else table.data_ptr()}
    return own | places | {"dtype": weight.dtype}


@functools.cache
def stream_aside(device):
    """One stream for all that is tried before it is recorded: cuBLAS keeps room for each."""
    return torch.cuda.Stream(device)


def recorded(trial, run, device):
    """(CUDA graph of run(), which is recorded and not run; what it will give). trial() is done before,
    on a stream of its own: what is set up once is set up there.
    """
    stream = stream_aside(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        trial()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, run()


class Recorded(NamedTuple):
    """A CUDA graph that streams blocks of one shape."""

    graph: object
    fixed: dict                 # {name: tensor} that it works on: the cache's, tokens, mask
    log_p: torch.Tensor         # what it gives
    drawn: dict                 # .. and what that drew on
    settings: dict              # of the config, and where the weights were


class RevenaCache(Cache):
    """What generation carries from token to token: the STM's last 127 keys and values a layer, and
    the memory's state.

    `model.new_cache()` is an empty one. Pass it in as `past_key_values` and it fills; pass it in
    again and the next turn remembers; `save` it, `model.load_cache(path)`, and a later process
    does; `clear` it and all is forgotten. Its size does not depend on how much it has read. What it
    begins with is a constant: through a cache no gradient reaches a memory's own first weights.

    Attributes:
        keys, values: a list of (B, 127, H, D/H) a layer. real: (B, 127) which of them are text.
        state: {name: tensor (B, ..)} of the memory: see there. drawn: what the newest prediction drew on.
        digest: (B,) of all tokens read. length: how many, padding included.
        compiled: whether torch.compile makes few kernels of the many that a token takes.
    """

    is_compileable = False

    def __init__(self, model, batch_size=1, compiled=False):
        super().__init__(layers=[])
        if compiled and self.grows(model):
            raise ValueError("the cache of this model grows, and what reads a token can't be compiled "
                             "once for all of them: leave compiled out")
        self.model, self.compiled = model, compiled
        self.clear(batch_size)

    @staticmethod
    def grows(model):
        """Whether more is held with every token."""
        return model.config.stm_window is None

    def clear(self, batch_size=None):
        """Forget everything, as at the start of a sequence."""
        model, config = self.model, self.model.config
        check_placement(model)
        B = batch_size or len(self.real)
        past, heads = (config.stm_window or 1) - 1, config.n_head

        def zeros(*shape, dtype=model.dtype):
            return torch.zeros(B, *shape, dtype=dtype, device=model.device)

        size = past, heads, config.n_embd // heads
        self.keys = [zeros(*size) for _ in range(config.n_layer)]
        self.values = [zeros(*size) for _ in range(config.n_layer)]
        self.real = zeros(past, dtype=torch.bool)
        self.digest = zeros(dtype=torch.long)
        memory = getattr(model, "memory", NOTHING)
        self.state = {name: gathered(x).detach().clone() for name, x in memory.empty(B, model.device).items()}
        self.drawn, self.length, self.graphs = {}, 0, {}

    def blocks(self, ids, real):
        """Cut new tokens (B, T) into blocks that the model streams: (tokens, real) each, at most a
        window long, and none beyond the end of a row where the memory works in rows.
        """
        window = self.model.config.stm_window or ids.size(1)
        start, T = 0, ids.size(1)
        while start < T:
            stop = min(start + window, T)
            room = self.model.active.room(self.state) if stop - start > 1 else None
            if room is not None:
                counted = real[:, start:stop].long().cumsum(1)
                fits = (counted <= room[:, None]).all(0)
                stop = start + max(1, int(fits.sum()))
            yield ids[:, start:stop], real[:, start:stop]
            start = stop

    # ---- blocks of one shape on a GPU

    def replay(self, tokens, real, keep=0):
        """`stream` of a block of each sequence as a CUDA graph, recorded where there is none of
        this shape: log p, and the cache has moved on.

        The graph works on tensors of its own: what else happened to the cache since is copied
        into them first.
        """
        length = self.length
        # tensors made in inference mode can't be written to outside of it
        shape = tokens.size(1), keep, torch.is_inference_mode_enabled()
        one = self.graphs.get(shape)
        if one is None or one.settings != graph_settings(self.model):       # it has those it was made with
            one = self.graphs[shape] = self.record(tokens, real, keep)
        for name, x in {**self.tensors(), "tokens": tokens, "mask": real}.items():
            if x is not one.fixed[name]:
                one.fixed[name].copy_(x)
        one.graph.replay()
        self.put({name: one.fixed[name] for name in self.tensors()})
        self.length, self.drawn = length + tokens.size(1), one.drawn
        return one.log_p.clone()

    def record(self, tokens, real, keep):
        """The Recorded that `replay` replays; the cache is as it was."""
        current, length, drawn = self.tensors(), self.length, self.drawn
        fixed = {name: x.clone() for name, x in current.items()}
        fixed |= {"tokens": tokens.clone(), "mask": real.clone()}
        other = copy.deepcopy(self)
        self.put({name: fixed[name] for name in current})

        def run():
            log_p = self.model.stream(fixed["tokens"], self, fixed["mask"], keep=keep)
            for name, x in self.tensors().items():
                fixed[name].copy_(x)
            return log_p

        trial = functools.partial(self.model.stream, tokens, other, real, keep=keep)
        graph, log_p = recorded(trial, run, tokens.device)
        one = Recorded(graph, fixed, log_p, self.drawn, copy.deepcopy(graph_settings(self.model)))
        self.put(current)
        self.length, self.drawn = length, drawn
        return one

    # ---- to be seen

    def contents(self, tokenizer=None, sequence=0):
        """What the memory holds for one sequence: see `contents` of the memory."""
        return self.model.memory.contents(self.state, tokenizer, sequence)

    def retrieved(self, tokenizer=None, sequence=0):
        """What the last prediction drew on, heaviest first: see `retrieved` of the memory."""
        return self.model.memory.retrieved(self.drawn, tokenizer, sequence) if self.drawn else []

    def __repr__(self):
        return f"RevenaCache({self.length} tokens read by each of {len(self.real)} sequences)"

    # ---- as tensors

    def tensors(self):
        """Every tensor of the cache by name."""
        named = {"real": self.real, "digest": self.digest}
        named |= {f"state.{name}": x for name, x in self.state.items()}
        named |= {f"keys.{layer}": x for layer, x in enumerate(self.keys)}
        return named | {f"values.{layer}": x for layer, x in enumerate(self.values)}

    def put(self, named):
        """Take tensors by the names that `tensors` gives."""
        for name, x in named.items():
            head, _, rest = name.partition(".")
            if head == "state":
                self.state = {**self.state, rest: x}
            elif rest:
                getattr(self, head)[int(rest)] = x
            else:
                setattr(self, head, x)

    def save(self, path):
        """Write the cache to a safetensors file."""
        tensors = {name: x.contiguous() for name, x in self.tensors().items()}
        save_file(tensors, path, metadata={"length": str(self.length), "weights": fingerprint(self.model)})
        follow_umask(path)

    @staticmethod
    def shapes(tensors):
        """Of each of {name: tensor}, what two caches of one model agree in."""
        return {name: (x.shape[1:], x.dtype) for name, x in tensors.items()}

    @classmethod
    def load(cls, path, model, compiled=False):
        """Read a cache that `save` wrote, for a model of the same shape; ValueError if it is of
        another, a warning if the model has learned since.
        """
        named = load_file(path, device=str(model.device))
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        length = about.get("length", "")
        if "real" not in named or not length.isdecimal():
            raise ValueError(f"{path} is not a memory that cache.save(..) wrote")
        cache = cls(model, len(named["real"]), compiled)
        fits = not model.config.stm_window or cls.shapes(named) == cls.shapes(cache.tensors())
        if not fits or named.keys() != cache.tensors().keys():
            raise ValueError(f"{path} is not a memory of this model, or of an earlier models.py")
        saved = about.get("weights")                        # "": of a model that was sharded
        if saved and fingerprint(model) not in ("", saved):
            warnings.warn(f"{path} was saved by a model with other weights: what it holds may mean "
                          f"nothing to this one")
        cache.put(named)
        cache.length = int(length)
        return cache

    # ---- as any Cache

    def __len__(self):
        return len(self.keys)                               # layers; 0 would make it false

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """Let beam b go on from what beam beam_idx[b] has read."""
        def chosen(tensors):
            return {name: x.index_select(0, beam_idx.to(x.device)) for name, x in tensors.items()}

        if len(beam_idx) != len(self.real):
            self.graphs = {}                                # recorded for another number of sequences
        self.put(chosen(self.tensors()))
        self.drawn = chosen(self.drawn)

    def batch_select_indices(self, indices):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats):
        """Make `repeats` copies of each sequence, side by side: for beams, or several ways to go
        on.
        """
        self.reorder_cache(torch.arange(len(self.real)).repeat_interleave(repeats))

    def crop(self, *_):
        raise ValueError("what a memory has read cannot be unread; keep a copy.deepcopy of it from before")

    def __deepcopy__(self, memo):
        memo[id(self.model)] = self.model                   # a copy of the memory, not of the model
        made = (*self.tensors().values(), *self.drawn.values())
        memo |= {id(x): x.clone() for x in made if not x.is_leaf}       # with a gradient, which deepcopy refuses
        own = {name: x for name, x in self.__dict__.items() if name != "graphs"}
        twin = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(own, memo) | {"graphs": {}}
        return twin

    def reset(self):
        self.clear()
