"""The models: GPT-70M, and RevenaHybridTiny-70M, which is GPT-70M with a short-term and a long-term memory.

GPT-70M            pre-norm transformer, rotary positions, tied embeddings, full causal attention
STM                the same attention, but each position sees only itself and the 127 before it
LTM                at most 256 items outside the network: a token whose surprisal exceeded 4.5 bits, filed under the
                   state that failed to predict it (and the one that has read it), found again by cosine similarity
                   above 0.8, first in first out

Both forms of the memory compute one function: `score` and `forward` a whole sequence at once (training, evaluation),
`stream` a few tokens at a time with constant memory (generation). Below the models stands what the scripts share.

Axes: N rows, C positions in a row (128), B sequences, T tokens, D width, H heads, V vocabulary; of the memory E exact
and K learned addresses (H is E + K there), A dimensions of one, I candidate items, M slots.
A sequence longer than the window is laid out as consecutive rows; `opens` (N,) marks the rows that begin a sequence.
"""

import copy
import functools
import hashlib
import importlib
import json
import math
import netrc
import os
import queue
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, GPT2TokenizerFast, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

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
        ltm_enabled: False switches the LTM off; the weights stay.
        ltm_slots: items the memory holds, first in first out.
        ltm_surprisal_bits: a token is stored when -log2 p_stm(token) exceeds this.
        ltm_cosine: an item is retrieved when the cosine of its key with the query exceeds this.
        ltm_ngrams: exact addresses: one for the last token, one for the last two, ... (no parameters).
        ltm_learned: learned addresses. ltm_dim: dimensions of an address.
        ltm_sharpness, ltm_plausibility: of an item found through a learned address, how its weight falls with the
            cosine and with log p_stm of its value.
        ltm_price: nats that a look-up through the learned addresses must be expected to save.
        ltm_stm_loss: weight in training of log p_stm beside the log p of the mixture.
        ltm_exact_trust: nats, for each token that matched, that what an exact address finds is trusted beyond what
            training made of it: in eval mode only, so that losses of the two modes differ by it.
        ltm_crowding, ltm_shown: of a query that sees n items, what learned addresses find weighs (ltm_shown / n) to
            this power, where n is larger; in eval mode only, too. A training row ends with some 74.
    """

    model_type = "revena"

    def __init__(self, vocab_size=50257, n_layer=8, n_embd=640, n_head=10, n_positions=2048, stm_window=128,
                 ltm_enabled=True, ltm_slots=256, ltm_surprisal_bits=4.5, ltm_cosine=0.8, ltm_ngrams=3, ltm_learned=4,
                 ltm_dim=64, ltm_sharpness=40.0, ltm_plausibility=0.45, ltm_price=0.024,
                 ltm_stm_loss=0.3, ltm_exact_trust=0.5, ltm_crowding=0.6, ltm_shown=64, **kwargs):
        self.vocab_size, self.n_layer, self.n_embd, self.n_head = vocab_size, n_layer, n_embd, n_head
        self.n_positions, self.stm_window = n_positions, stm_window
        self.ltm_enabled, self.ltm_slots = ltm_enabled, ltm_slots
        self.ltm_surprisal_bits, self.ltm_cosine = ltm_surprisal_bits, ltm_cosine
        self.ltm_ngrams, self.ltm_learned, self.ltm_dim = ltm_ngrams, ltm_learned, ltm_dim
        self.ltm_sharpness, self.ltm_plausibility = ltm_sharpness, ltm_plausibility
        self.ltm_price, self.ltm_stm_loss = ltm_price, ltm_stm_loss
        self.ltm_exact_trust, self.ltm_crowding, self.ltm_shown = ltm_exact_trust, ltm_crowding, ltm_shown
        kwargs = {"bos_token_id": EOT, "eos_token_id": EOT, "pad_token_id": EOT, "tie_word_embeddings": True} | kwargs
        super().__init__(**kwargs)
        if min(ltm_ngrams, ltm_learned, ltm_shown) < 1:
            raise ValueError("ltm_ngrams, ltm_learned and ltm_shown must be at least 1")


# ------------------------------------------------------------------------------------ the backbone of both arms

def norm(x):
    """RMS norm without weights (Zhang & Sennrich 2019) over the last axis."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, table, first=0):
    """Rotary embedding (Su et al. 2021) of x (N, T, H, D/H) at positions first, first+1, ...; table: Backbone.rotary.

    (a, b) cos + (b, a) (-sin, sin): with a flip instead of a cat a compiler fuses it with the norm before it.
    """
    cos, sin = table[:, first:first + x.size(1), None]                                 # (T, 1, 2, D/H/2) each
    halves = x.float().unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)


def attend(q, k, v, mask=None):
    """Softmax attention, (N, T, H, D/H) each; causal where no mask (broadcastable to (N, H, T, T')) is given."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def row_attention(q, k, v, table, opens=None):
    """Attention within rows (N, C, H, D/H); with `opens` (N,), sliding: a row also sees the end of the row before it.

    Positions are counted from the start of the earlier row, so no length of text wears them out: the cost of a
    sequence is linear in its length, its positions never exceed two rows.
    """
    if opens is None:
        return attend(rotate(q, table), rotate(k, table), v)
    C = q.size(1)
    k, v = (torch.cat((x.roll(1, 0), x), dim=1) for x in (k, v))                       # (N, 2C, H, D/H)
    i, j = torch.arange(C, device=q.device)[:, None], torch.arange(2 * C, device=q.device)
    seen = (i < j) & (j <= i + C) & ((j >= C) | ~opens[:, None, None])                 # (N, C, 2C)
    return attend(rotate(q, table, C), rotate(k, table), v, seen[:, None])


# who compiles a model compiles one layer, not each; before torch 2.8 there is no such thing, nor is it needed to run
nested_compile_region = getattr(torch.compiler, "nested_compile_region", lambda function: function)


class Block(nn.Module):
    """One pre-norm layer: attention, then a GELU network, each added to the residual stream (float32).

    Queries and keys are normalised, and each head's output has a sigmoid gate (Qiu et al. 2025): a softmax must put
    its weight somewhere, and without a gate it learns to put it on the first token, which a sliding window loses.
    """

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.n_head = config.n_head
        self.qkvg = nn.Linear(D, 3 * D + -(-config.n_head // 16) * 16, bias=False)     # 16: aligned for tensor cores
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    @nested_compile_region
    def forward(self, x, attention):
        """x (N, T, D) -> (N, T, D); attention(q, k, v) says what each position sees."""
        D, dtype = x.size(-1), self.out.weight.dtype
        y = self.qkvg(norm(x).to(dtype))
        q, k, v = y[..., :3 * D].unflatten(-1, (3, self.n_head, -1)).unbind(2)         # (N, T, H, D/H) each
        gate = 2 * y[..., 3 * D:3 * D + self.n_head, None].float().sigmoid()           # 1 at the start
        heads = attention(norm(q), norm(k), v) * gate.to(dtype)
        x = x + self.out(heads.flatten(2))
        return x + self.down(F.gelu(self.up(norm(x).to(dtype)), approximate="tanh"))


class Backbone(nn.Module):
    """Token embedding, layers and the tied output matrix; everything that the two arms have in common."""

    def __init__(self, config):
        super().__init__()
        rows = -(-config.vocab_size // 64) * 64                                        # 50304: aligned for tensor cores
        self.embed = nn.Embedding(rows, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        half = config.n_embd // config.n_head // 2
        length = 2 * config.stm_window if config.stm_window else config.n_positions
        angle = torch.outer(torch.arange(length, device="cpu").double(),
                            10_000.0 ** (-torch.arange(half, device="cpu").double() / half))
        turn = torch.stack((-angle, angle), dim=1)                                     # of a head's two halves
        self.register_buffer("rotary", torch.stack((turn.cos(), turn.sin())).float())  # (2, length, 2, half)

    def forward(self, embedded, attentions, states=None):
        """embedded (N, T, D) -> final normalised states (N, T, D); attentions: one (q, k, v) -> heads' outputs a layer.

        `states` collects what goes into each layer.
        """
        x = norm(embedded.float())
        for block, attention in zip(self.blocks, attentions):
            if states is not None:
                states.append(x)
            x = block(x, attention)
        return norm(x).to(self.embed.weight.dtype)


# ------------------------------------------------------------------------------------ the long-term memory

class Address(NamedTuple):
    """What the LTM makes of each position t (first two axes (N, C), or any)."""

    grams: torch.Tensor         # (.., E) the tokens x_t, x_{t-1}, ..: exact addresses
    known: torch.Tensor         # (..,) bool: x_t was stored
    query: torch.Tensor         # (.., K, A) unit vectors: what t looks for
    key: torch.Tensor           # (.., K, A) what the token after t is filed under
    trust: torch.Tensor         # (.., H) log weight of what t finds, H = E + K
    strength: torch.Tensor      # (.., H) log weight of the item filed at t
    open: torch.Tensor          # (..,) log odds that looking up through the learned addresses pays


class Reading(NamedTuple):
    """What the positions of some rows retrieved from I candidate items each."""

    exact: torch.Tensor         # (N, C, I) weights through the exact addresses; 0: not retrieved
    learned: torch.Tensor       # (N, C, I) weights through the learned addresses, had every position looked up
    cosine: torch.Tensor        # (N, K, C, I) of the learned addresses

    def weights(self, odds):
        """(N, C, I), the learned ones only where the log odds (N, C) of looking up through them are above 0."""
        return self.exact + self.learned * (odds > 0)[..., None]


class LongTermMemory(nn.Module):
    """Addresses, trust and strength of the items; the items themselves are data, never parameters.

    Exact addresses: the one-hot vector of the last token, of the last two, of the last three. The cosine of two is 1
    where all tokens agree and 0 elsewhere, so they are compared as tokens. The one-token address exists only where
    that token was itself stored: that "the" recurs says nothing.
    Learned addresses: linear in the final state and the last three tokens; a key also knows the token it files, and
    the state after reading it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, A, E, K = config.n_embd, config.ltm_dim, config.ltm_ngrams, config.ltm_learned
        H = E + K
        self.sizes = (K * A, H, H, 1)                                                  # address, trust, strength, open
        aligned = lambda n: -(-n // 16) * 16
        self.width = aligned(sum(self.sizes))
        # each part has room for all four, also where an address takes only the first and the third (of x, h at t+1)
        self.from_state = nn.Linear(D, 2 * self.width)                                 # as h_t, h_{t+1}
        self.from_tokens = nn.Linear(D, (1 + E) * self.width, bias=False)              # as x_{t+1}, x_t, x_{t-1}, ..

    def project_states(self, h):
        """What states (N, T, D) add to their own address and to that of the position before: two (N, T, width)."""
        y = F.linear(h, self.from_state.weight.to(h.dtype)).float() + self.from_state.bias
        return y.split(self.width, dim=-1)

    def project_tokens(self, tokens, embed):
        """What tokens (N, T) add to the addresses of the position before them, their own, and those after them:
        1 + E tensors (N, T, width). EOT adds nothing."""
        known = norm(F.embedding(tokens, embed)) * (tokens != EOT)[..., None]
        return F.linear(known, self.from_tokens.weight.to(known.dtype)).split(self.width, dim=-1)

    def address(self, grams, known, near, coming, dtype):
        """Address of each position, vectors in `dtype`.

        Args:
            grams: (.., E) the tokens x_t, x_{t-1}, ...; EOT before the start. known: (..,) bool, x_t was stored.
            near: (.., width) what is projected of h_t and of `grams`, summed.
            coming: (.., width) what is of h_{t+1} and of x_{t+1}, the token that the item of t files.
        """
        K, A = self.config.ltm_learned, self.config.ltm_dim
        query, trust, strength, is_open = near[..., :sum(self.sizes)].split(self.sizes, dim=-1)
        value, _, value_strength, _ = coming[..., :sum(self.sizes)].split(self.sizes, dim=-1)
        unit = lambda x: F.normalize(x.unflatten(-1, (K, A)), dim=-1).to(dtype)
        return Address(grams, known, unit(query), unit(query + value), trust, strength + value_strength,
                       is_open[..., 0])

    def weigh(self, address, items, log_p, visible):
        """Weights of the retrieved: exp(trust + strength + n exact_trust) through the exact address of n tokens,
        through a learned one exp(trust + strength + sharpness (cosine - 1) + plausibility log p_stm(value)) times
        min(1, shown / seen)^crowding; no exponent above 10.

        exact_trust is a choice, and not there in training: likelihood alone often leaves a fact that stood once just
        below what is likely anywhere. Nor is crowding: the more items a query sees, the more of them an address finds,
        and the weights add up; a row of training never shows as many as a long text does.

        Args:
            address: of the queries, (N, C, ..). items: Address of the candidates, (N, I, ..), as far as they have it.
            log_p: (N, C, I) log p_stm of each candidate's value at each query. visible: (N, C, I) bool.
        """
        config, E = self.config, self.config.ltm_ngrams
        same, exact, more = visible, 0.0, 0.0 if self.training else config.ltm_exact_trust
        for n in range(E):                                                             # the last n + 1 tokens
            same = same & (address.grams[..., n, None] == items.grams[:, None, :, n])
            found = same & address.known[..., None] & items.known[:, None] if n == 0 else same
            score = address.trust[..., n, None] + items.strength[:, None, :, n] + (n + 1) * more          # (N, C, I)
            exact = exact + torch.where(found, score.clamp(max=10).exp(), 0.0)

        by_head = lambda x: x.transpose(1, 2).flatten(0, 1)                            # (N K, .., A)
        cosine = (by_head(address.query) @ by_head(items.key).mT).unflatten(0, (-1, config.ltm_learned)).float()
        retrieved = visible[:, None] & (cosine > config.ltm_cosine)
        of_learned = lambda x: x[..., E:].transpose(1, 2)                              # (N, K, ..)
        score = of_learned(address.trust)[..., None] + of_learned(items.strength)[..., None, :]           # (N, K, C, I)
        score = score + config.ltm_sharpness * (cosine - 1) + config.ltm_plausibility * log_p[:, None]
        learned = torch.where(retrieved, score.clamp(max=10).exp(), 0.0).sum(1)
        if not self.training:
            crowd = (visible.sum(-1, keepdim=True) / config.ltm_shown).clamp(min=1)
            learned = learned * crowd ** -config.ltm_crowding
        return Reading(exact, learned, cosine)


def lagged(x, lag, opens, fill):
    """x (N, C, ..) moved `lag` positions to the right (-1: to the left) along its sequence; `fill` before the start.

    Moved to the left, the end of a sequence sees the start of the next: no matter, it has no target to file.
    """
    C, ahead = x.size(1), max(-lag, 0)
    line = x if opens is None else x.flatten(0, 1)[None]
    moved = F.pad(line, (0, 0) * (x.dim() - 2) + (max(lag, 0), ahead), value=fill)
    moved = moved[:, ahead:ahead + line.size(1)].reshape(x.shape)
    if opens is None or lag < 1:
        return moved
    start = opens[:, None] & (torch.arange(C, device=x.device) < lag)
    return torch.where(start.view(*start.shape, *[1] * (x.dim() - 2)), fill, moved)


class Scores(NamedTuple):
    """Per target, (N, C) each; natural logarithms; what stands where the target is EOT means nothing."""

    log_p: torch.Tensor         # of the model: the mixture where the LTM is on
    log_p_stm: torch.Tensor     # of the backbone alone, which decides what is stored
    objective: torch.Tensor     # what training maximises (of a model in train mode): see score_states
    stored: torch.Tensor        # bool: the target is stored
    hit: torch.Tensor           # bool: the prediction retrieved at least one item


# ------------------------------------------------------------------------------------ the two models

class GPT(PreTrainedModel, GenerationMixin):
    """GPT-70M, and the backbone of RevenaHybridTiny: log-probabilities as logits, so that softmax gives p."""

    config_class = RevenaConfig
    base_model_prefix = "revena"
    _is_stateful = True                         # no assisted decoding: a memory can't be unread
    _supports_sdpa = True                       # for those who ask for it by name: it is what `attend` calls
    accepts_loss_kwargs = False                 # Trainer is to divide accumulated losses: forward means over its batch

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Backbone(config)
        self.post_init()

    def _init_weights(self, module):
        """Embeddings: Normal(0, 0.02) (GPT-2). What is linear keeps nn.Linear's start: uniform in 1 / sqrt(inputs)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                            # forward makes its own: Memory

    def get_input_embeddings(self):
        return self.backbone.embed

    def new_memory(self, batch_size=1):
        """An empty Memory; forward(..) and generate(..) go on from it, and fill it, as `past_key_values`."""
        return Memory(self, batch_size)

    def load_memory(self, path):
        """The Memory that `memory.save(path)` wrote; ValueError if it is that of a model of another shape."""
        return Memory.load(path, self)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, past_key_values=None,
                                      is_first_iteration=False, **kwargs):
        """What generate(..) feeds the model, where a Memory goes on: the part of the text that it has not read.

        By itself, generate takes a text for the whole so far and drops as many tokens as were read. Here one that is
        too short for that is all new, and a longer one must hold the last tokens read where it was read up to.
        """
        if is_first_iteration and next_sequence_length is not None and (read := past_key_values.get_seq_length()):
            known = past_key_values.tail[:, -read:]
            if torch.equal(input_ids[:, read - known.size(1):read], known):
                input_ids = input_ids[:, read:]
            elif input_ids.size(1) > read and len(input_ids) == len(known):
                raise ValueError(f"the text does not begin with the {read} tokens that the memory has read; if all of "
                                 f"it is new, pass attention_mask=torch.ones({len(known)}, "
                                 f"{read + input_ids.size(1)}), a mask over both")
            next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            is_first_iteration=is_first_iteration, **kwargs)

    def logits(self, h):
        """Unnormalised log-probabilities of the backbone, float32 (.., V)."""
        return F.linear(h, self.backbone.embed.weight)[..., :self.config.vocab_size].float()

    def states(self, tokens, opens=None, embedded=None, collect=None):
        """Final states (N, C, D) of rows of tokens (N, C)."""
        table = self.backbone.rotary
        embedded = self.backbone.embed(tokens) if embedded is None else embedded
        attention = lambda q, k, v: row_attention(q, k, v, table, opens)
        return self.backbone(embedded, [attention] * self.config.n_layer, collect)

    def log_p(self, h, targets):
        """log p_stm(target) and log Z, (N, C) each, a slice of positions at a time, to bound the logits."""
        pairs, size = [], 2048 if h.is_cuda else 64                    # 64 x V floats: what malloc keeps and reuses
        for states, wanted in zip(h.flatten(0, 1).split(size), targets.flatten().split(size)):
            if h.is_cuda:
                # what fuses well: all columns with those of no token hidden, where a slice would be read unaligned;
                # and a masked sum, where a gather's gradient is a (positions, V) matrix of zeros to fill
                logits = F.linear(states, self.backbone.embed.weight).float()
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
        """Scores of the targets (N, C), EOT where there is none, given the tokens up to each position."""
        log_p, _ = self.log_p(self.states(tokens, opens, embedded), targets)
        nothing = torch.zeros_like(targets, dtype=torch.bool)
        return Scores(log_p, log_p, log_p, nothing, nothing)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                output_hidden_states=None, logits_to_keep=0, return_dict=None, **unused):
        """Log-probabilities of the next token as `logits` (B, T, V): softmax(logits) = exp(logits) = p.

        Args:
            input_ids: (B, T). attention_mask: (B, T) ones for text, zeros for padding on the left or, without a
                cache, on the right.
            past_key_values: a Memory (see new_memory) to go on from; use_cache=True starts one. Then `input_ids` are
                only the new tokens, any number, and the cost of a token does not depend on how many came before.
            labels: (B, T), -100 ignored; gives `loss`, the mean negative log-likelihood of labels[:, 1:] in nats.
            logits_to_keep: give the last so many positions only; 0: all.

        Raises:
            ValueError: a mask with holes, inputs that are embeddings, a sequence beyond n_positions, a Memory of
                another number of sequences.
        """
        if unused.pop("output_attentions", None) or unused.pop("inputs_embeds", None) is not None:
            raise ValueError("this model takes input_ids and gives no attentions")
        B, T = input_ids.shape
        hidden = [] if output_hidden_states else None
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask[:, -T:].bool()
        if past_key_values is None and not use_cache:
            logits = self._whole(input_ids, real, logits_to_keep, hidden)
        else:
            memory = Memory(self, B) if past_key_values is None else past_key_values
            if type(memory).__name__ != "Memory":           # by name: a folder's copy of this file has its own class
                raise ValueError(f"past_key_values must be a Memory, not a {type(memory).__name__}")
            if len(memory.count) != B:
                raise ValueError(f"this memory holds {len(memory.count)} sequences, not {B}: make it with "
                                 f"model.new_memory({B}), or repeat it with memory.batch_repeat_interleave(..)")
            if T == 0:
                raise ValueError("no tokens: generate() takes the whole text so far, or what of it is new, and at "
                                 "least one token that the memory has not read")
            if (real[:, :-1] & ~real[:, 1:]).any():
                raise ValueError("with a cache, pad on the left: tokenizer.padding_side = 'left'")
            if (memory.real.any(1, keepdim=True) & ~real).any():
                raise ValueError("with a cache, pad only before the first token of a sequence, not between its turns")
            logits = self._streamed(input_ids, real, memory, logits_to_keep, hidden)
            past_key_values = memory
        loss = None
        if labels is not None:
            wanted = labels[:, -logits.size(1):][:, 1:]
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values,
                                      hidden_states=None if hidden is None else tuple(hidden))

    def _whole(self, ids, real, keep, hidden):
        """forward without a cache: padding moved to the right, sequences cut into rows, all rows at once."""
        B, T = ids.shape
        lead = real.long().argmax(1)                                                   # padding on the left
        if (real.sum(1) + lead != T - real.flip(1).long().argmax(1)).any():
            raise ValueError("attention_mask has holes; mask padding only, before or after the text")
        place = (torch.arange(T, device=ids.device) + lead[:, None]) % T
        tokens = ids.masked_fill(~real, EOT).gather(1, place)
        W = self.config.stm_window or T
        if T > W or self.config.stm_window is None:
            rows = -(-T // W)
            if self.config.stm_window is None and T > self.config.n_positions:
                raise ValueError(f"{T} tokens; a model without a window sees at most {self.config.n_positions}")
            opens = torch.arange(B * rows, device=ids.device) % rows == 0 if rows > 1 else None
        else:
            rows, W, opens = 1, T, None
        tokens = F.pad(tokens, (0, rows * W - T), value=EOT)
        targets = F.pad(tokens[:, 1:], (0, 1), value=EOT)
        tokens, targets = tokens.view(B * rows, W), targets.reshape(B * rows, W)
        h = self.states(tokens, opens, collect=hidden)
        back = (torch.arange(T, device=ids.device) - lead[:, None]) % T
        unrow = lambda x: x.reshape(B, rows * W, -1)[:, :T].gather(1, back[..., None].expand(-1, -1, x.size(-1)))
        if hidden is not None:
            hidden[:] = [unrow(x) for x in [*hidden, h]]
        return unrow(self.distribution(h, tokens, targets, opens))[:, -keep:]

    def distribution(self, h, tokens, targets, opens):
        """log p of every token of the vocabulary, (N, C, V)."""
        return self.logits(h).log_softmax(-1)

    def _streamed(self, ids, real, memory, keep, hidden):
        """forward with a cache: blocks of at most a window, each continuing what `memory` holds."""
        step = self.config.stm_window or ids.size(1)
        parts, states = [], []
        for block, mask in zip(ids.masked_fill(~real, EOT).split(step, 1), real.split(step, 1)):
            collected = None if hidden is None else []
            # one token of a model with a window has the same shapes whatever came before: a GPU replays it
            same = (block.is_cuda and block.size(1) == 1 and self.config.stm_window
                    and not (torch.is_grad_enabled() or self.training))
            parts.append(memory.replay(block, mask) if same and hidden is None else
                         self.stream(block, memory, mask, collected))
            if keep:
                parts = [torch.cat(parts, 1)[:, -keep:]]
            states.append(collected)
        if hidden is not None:
            hidden[:] = [torch.cat(layer, 1) for layer in zip(*states)]
        return torch.cat(parts, 1)

    def advance(self, tokens, memory, real, collect=None):
        """States (B, n, D) of a block of new tokens (B, n), attention going on from `memory`, which takes them in."""
        n, window = tokens.size(1), self.config.stm_window
        past = memory.real.size(1)
        if window is None and past + n > self.config.n_positions:
            raise ValueError(f"{past + n} tokens; a model without a window sees at most {self.config.n_positions}")
        known = torch.cat((memory.real, real), dim=1)
        query, key = torch.arange(past, past + n, device=tokens.device), torch.arange(past + n, device=tokens.device)
        ahead = query[:, None] - key
        seen = (ahead >= 0) & (ahead < (window or past + n)) & known[:, None] | (ahead == 0)     # (B, n, past + n)

        def attention(layer, q, k, v):
            keys, values = memory.keys[layer], memory.values[layer]
            k, v = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
            memory.keys[layer], memory.values[layer] = (k, v) if window is None else (k[:, n:], v[:, n:])
            table = self.backbone.rotary
            return attend(rotate(q, table, past), rotate(k, table), v, seen[:, None])

        attentions = [functools.partial(attention, layer) for layer in range(self.config.n_layer)]
        h = self.backbone(self.backbone.embed(tokens), attentions, collect)
        memory.real = known if window is None else known[:, n:]
        memory.length += n
        memory.place = memory.place + n
        return h

    def stream(self, tokens, memory, real=None, collect=None):
        """Go on from `memory` with tokens (B, n), n at most a window: log p (B, n, V) of what comes after each.

        Constant memory and constant cost a token; equal to the parallel form. `real` (B, n) is False on padding.
        """
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        h = self.advance(tokens, memory, real, collect)
        if collect is not None:
            collect.append(h)
        memory.tail = torch.cat((memory.tail, tokens), dim=1)[:, tokens.size(1):]
        return self.logits(h).log_softmax(-1)


class RevenaHybridTiny(GPT):
    """GPT with sliding-window attention (STM) and, where config.ltm_enabled, a long-term memory (LTM).

    p(y) = (p_stm(y) + sum_i a_i [value_i = y]) / (1 + sum_i a_i), i over the retrieved items (pointer mixture;
    cf. Grave et al. 2017, Merity et al. 2017), a_i as in LongTermMemory.weigh. It sums to one whatever the a_i.
    """

    def __init__(self, config):
        super().__init__(config)
        self.memory = LongTermMemory(config)
        self.post_init()

    def route(self, log_p, targets):
        """Surprisal in bits of each target, 0 where there is none, and whether it is stored (both like `targets`)."""
        none = targets == EOT
        bits = (-log_p.detach() / math.log(2)).masked_fill(none, 0.0)
        return bits, ~none & (bits > self.config.ltm_surprisal_bits)

    def candidates(self, address, targets, stored, opens=None):
        """The items that each row may retrieve: Address (N, I, ..) of what keys have, values (N, I), visible (N, C, I).

        Item i (value: the target of position i) is visible to t iff it was stored, i < t in the same sequence, and
        fewer than `ltm_slots` items were stored after it before t. Stored items are numbered; a row's candidates are
        the slots' worth of numbers before it and those stored in it, so the cost is linear in the length.
        """
        M, (N, C) = self.config.ltm_slots, targets.shape
        if opens is None:                                   # every row is a sequence: its own tokens are candidates
            count = stored.cumsum(1)
            before = count - stored.long()                  # items stored before t
            return address, targets, self.in_reach(before, torch.where(stored, count - 1, -1))
        count = stored.flatten().cumsum(0)
        before = count.view(N, C) - stored.long()
        row = torch.arange(N, device=stored.device)
        first = before[torch.where(opens, row, 0).cummax(0).values, 0]         # number of the sequence's first item
        oldest, span = (before[:, 0] - M).maximum(first), torch.arange(M + C, device=stored.device)
        number = oldest[:, None] + span                                        # (N, I)
        # where the item of each number stands; a number not given out stands at 0, which in_reach hides
        given = torch.where(stored.flatten(), count - 1, N * C)
        stands = given.new_zeros(N * C + M + C).index_copy(0, given, torch.arange(N * C, device=stored.device))[number]
        line = lambda x: x.flatten(0, 1)[stands]
        items = Address(line(address.grams), line(address.known), None, line(address.key), None, line(address.strength),
                        None)
        return items, line(targets), self.in_reach(before, number)

    def in_reach(self, before, number):
        """Which items, numbered `number` (N, I), -1: none, are in memory where `before` (N, C) have been stored: bool
        (N, C, I), false for what was pushed out or is yet to come."""
        low = (before - self.config.ltm_slots).clamp(min=0)
        return (number[:, None] < before[..., None]) & (number[:, None] >= low[..., None])

    def read(self, h, tokens, targets, log_p, log_z, opens=None):
        """The parallel form: what every position of the rows retrieves.

        Returns: Reading, values (N, I) of the candidates, stored (N, C), log odds of looking up (N, C).
        """
        embed, E = self.backbone.embed.weight.detach(), self.config.ltm_ngrams
        _, stored = self.route(log_p, targets)
        grams = torch.stack([lagged(tokens, lag, opens, EOT) for lag in range(E)], dim=-1)
        own, after = self.memory.project_states(h)
        ahead, *parts = self.memory.project_tokens(tokens, embed)
        near = own + sum(lagged(part, lag, opens, 0.0) for lag, part in enumerate(parts))
        coming = lagged(ahead + after, -1, opens, 0.0)
        address = self.memory.address(grams, lagged(stored, 1, opens, False), near, coming, h.dtype)
        items, values, visible = self.candidates(address, targets, stored, opens)
        item_log_p = (h.detach() @ embed[values].mT).float() - log_z.detach()[..., None]
        return self.memory.weigh(address, items, item_log_p, visible), values, stored, address.open

    def score(self, tokens, targets, opens=None, embedded=None):
        if not self.config.ltm_enabled:
            return super().score(tokens, targets, opens, embedded)
        h = self.states(tokens, opens, embedded)
        return self.score_states(h, tokens, targets, *self.log_p(h, targets), opens)

    def score_states(self, h, tokens, targets, log_p, log_z, opens=None):
        """`score`, given the final states and what `log_p` gives for them."""
        read, values, stored, odds = self.read(h, tokens, targets, log_p, log_z, opens)
        same = values[:, None] == targets[..., None]

        def mixture(weight):
            numerator, total = log_p.exp() + torch.where(same, weight, 0.0).sum(-1), weight.sum(-1)
            return numerator.clamp(min=1e-38).log() - total.log1p(), total > 0

        (without, hit), (within, hit_within) = mixture(read.exact), mixture(read.exact + read.learned)
        # a look-up through the learned addresses is made when it is expected to save its price: training weighs
        # both outcomes by the odds, so that these learn from each position what the other outcome would have cost.
        # The backbone's own prediction, which decides what is stored, keeps learning also where the memory knows
        pays = odds.sigmoid()
        objective = pays * (within - self.config.ltm_price) + (1 - pays) * without + self.config.ltm_stm_loss * log_p
        opened = odds > 0
        return Scores(torch.where(opened, within, without), log_p, objective, stored,
                      torch.where(opened, hit_within, hit))

    def distribution(self, h, tokens, targets, opens):
        if not self.config.ltm_enabled:
            return super().distribution(h, tokens, targets, opens)
        logits = self.logits(h)
        log_z = logits.logsumexp(-1)
        stm = logits - log_z[..., None]
        log_p = stm.gather(-1, targets[..., None])[..., 0]
        read, values, _, odds = self.read(h, tokens, targets, log_p, log_z, opens)
        return mix(stm, read.weights(odds), values)

    def stream(self, tokens, memory, real=None, collect=None):
        if not self.config.ltm_enabled:
            return super().stream(tokens, memory, real, collect)
        config, embed = self.config, self.backbone.embed.weight
        E, M, (B, n) = config.ltm_ngrams, config.ltm_slots, tokens.shape
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        h = self.advance(tokens, memory, real, collect)
        if collect is not None:
            collect.append(h)
        logits = self.logits(h)
        log_z = logits.logsumexp(-1)

        # write: the tokens that came, under the states that should have predicted them (one position earlier)
        earlier = torch.cat((memory.state[:, None].to(h.dtype), h), dim=1)             # positions -1 .. n-1
        earlier_z = torch.cat((memory.log_z[:, None], log_z), dim=1)
        log_p = (earlier[:, :n].float() * F.embedding(tokens, embed).float()).sum(-1) - earlier_z[:, :n]
        predicted = torch.cat((memory.started[:, None], real[:, :-1]), dim=1) & real
        bits, stored = self.route(log_p, tokens.masked_fill(~predicted, EOT))
        tail, known = torch.cat((memory.tail, tokens), 1), torch.cat((memory.known[:, None], stored), 1)
        at = [slice(E - 1 - lag, E + n - lag) for lag in range(E)]                     # of the tail: x_t, x_{t-1}, ..
        grams = torch.stack([tail[:, place] for place in at], -1)
        own, after = self.memory.project_states(earlier)
        ahead, *parts = self.memory.project_tokens(tail, embed)
        near = own + sum(part[:, place] for part, place in zip(parts, at))
        coming = F.pad(ahead[:, E:] + after[:, 1:], (0, 0, 0, 1))                      # the last one is not known yet
        address = self.memory.address(grams, known, near, coming, h.dtype)
        arrived = memory.count[:, None] + stored.cumsum(1)                             # items each position can see
        slot = torch.arange(M, device=h.device)
        held = memory.count[:, None] - 1 - (memory.count[:, None] - 1 - slot) % M      # number of the item in each slot
        number = torch.cat((held, torch.where(stored, arrived - 1, -1)), dim=1)        # (B, M + n)
        new = dict(grams=grams[:, :n], known=known[:, :n], key=address.key[:, :n], strength=address.strength[:, :n],
                   value=tokens, bits=bits, position=memory.place[:, None] + torch.arange(-n, 0, device=h.device))
        items = {name: torch.cat((memory.items[name], new[name].to(memory.items[name].dtype)), 1) for name in new}

        # read: the query of each position against the ring and what came within this block
        query = Address(*(x[:, 1:] for x in address))
        filed = Address(items["grams"], items["known"], None, items["key"].to(h.dtype), None, items["strength"], None)
        item_log_p = (h @ embed[items["value"]].mT).float() - log_z[..., None]
        read = self.memory.weigh(query, filed, item_log_p, self.in_reach(arrived, number))
        weight = read.weights(query.open)
        cosine = torch.where(read.exact[:, -1] > 0, 1.0, read.cosine[:, :, -1].amax(1))
        memory.last = dict(value=items["value"], position=items["position"], weight=weight[:, -1], cosine=cosine,
                           total=1 + weight[:, -1].sum(-1))

        # keep: the newest `ltm_slots` items, each in the slot of its number; what is older than the ring falls out
        slots = torch.where(stored & (arrived > arrived[:, -1:] - M), (arrived - 1) % M, M)
        for name, kept in memory.items.items():
            index = slots.view(B, n, *[1] * (kept.dim() - 2)).expand_as(new[name])
            room = F.pad(kept, (0, 0) * (kept.dim() - 2) + (0, 1))                     # one more, for what is not kept
            memory.items[name] = room.scatter(1, index, new[name].to(kept.dtype))[:, :M]
        memory.count = arrived[:, -1]
        memory.state, memory.log_z, memory.started = h[:, -1], log_z[:, -1], real[:, -1] | memory.started
        memory.tail, memory.known = tail[:, n:], known[:, n]
        return mix(logits - log_z[..., None], weight, items["value"])


def mix(stm, weight, values):
    """log of (p_stm + the items' weights at their values) / (1 + all weights): (N, C, V), (N, C, I), (N, I)."""
    added = torch.zeros_like(stm).scatter_add_(2, values[:, None].expand(-1, stm.size(1), -1), weight)
    return (stm.exp() + added).clamp(min=1e-38).log() - weight.sum(-1, keepdim=True).log1p()


class Memory(Cache):
    """What generation carries from token to token: the STM's last 127 keys and values a layer, and the LTM's items.

    `model.new_memory()` is an empty one. Pass it in as `past_key_values` and it fills; pass it in again and the next
    turn remembers; `save` it, `model.load_memory(path)`, and a later process does; `clear` it and all is forgotten.
    Its size does not depend on how much it has read.

    Attributes:
        items: the ring, oldest overwritten first: grams (B, M, E), known (B, M) and key (B, M, K, A), as in
            Address, strength (B, M, H), value (B, M) the token,
            bits (B, M) its surprisal, position (B, M) where it stood. count: (B,) items ever stored.
        last: what the newest prediction retrieved: value, position, cosine, weight (B, I), total (B,).
    """

    is_compileable = False

    def __init__(self, model, batch_size=1):
        super().__init__(layers=[])
        self.model = model
        self.clear(batch_size)

    def clear(self, batch_size=None):
        """Forget everything, as at the start of a sequence."""
        model, config = self.model, self.model.config
        B = batch_size or len(self.count)
        D, heads, H = config.n_embd, config.n_head, config.ltm_ngrams + config.ltm_learned
        M, E, past = config.ltm_slots, config.ltm_ngrams, (config.stm_window or 1) - 1
        zeros = lambda *shape, dtype=model.dtype: torch.zeros(B, *shape, dtype=dtype, device=model.device)
        self.keys = [zeros(past, heads, D // heads) for _ in range(config.n_layer)]
        self.values = [zeros(past, heads, D // heads) for _ in range(config.n_layer)]
        self.real = zeros(past, dtype=torch.bool)
        self.items = dict(grams=zeros(M, E, dtype=torch.long) + EOT, known=zeros(M, dtype=torch.bool),
                          key=zeros(M, config.ltm_learned, config.ltm_dim), strength=zeros(M, H, dtype=torch.float32),
                          value=zeros(M, dtype=torch.long), bits=zeros(M, dtype=torch.float32),
                          position=zeros(M, dtype=torch.long))
        self.count, self.started = zeros(dtype=torch.long), zeros(dtype=torch.bool)
        self.state, self.log_z = zeros(D), zeros(dtype=torch.float32)
        self.tail, self.known = zeros(E, dtype=torch.long) + EOT, zeros(dtype=torch.bool)
        self.place = zeros(dtype=torch.long)            # `length` again, where the device can count on it
        self.length, self.last, self.graph = 0, None, None

    def replay(self, tokens, real):
        """`stream` of one token a sequence (B, 1) as a CUDA graph: log p (B, 1, V), and the memory has moved on.

        The graph works on tensors of its own: what else happened to the memory since is copied into them first.
        """
        length = self.length
        settings = [value for name, value in vars(self.model.config).items() if name.startswith("ltm_")]
        if self.graph is None or settings != self.settings:                 # a graph has those that it was made with
            self.settings = settings
            self.fixed = {name: x.clone() for name, x in self._tensors().items()} | {"tokens": tokens.clone(),
                                                                                     "mask": real.clone()}
            stream, trial = torch.cuda.Stream(), copy.deepcopy(self)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                                 # what is set up once is set up here
                self.model.stream(tokens, trial, real)
            torch.cuda.current_stream().wait_stream(stream)
            current = self._tensors()
            self._put({name: self.fixed[name] for name in current})
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                              # recorded, not run
                self.log_p = self.model.stream(self.fixed["tokens"], self, self.fixed["mask"])
                for name, x in self._tensors().items():
                    self.fixed[name].copy_(x)
            self.found = self.last
            self._put(current)
        for name, x in {**self._tensors(), "tokens": tokens, "mask": real}.items():
            if x is not self.fixed[name]:
                self.fixed[name].copy_(x)
        self.graph.replay()
        self._put({name: self.fixed[name] for name in self._tensors()})
        self.length, self.last = length + 1, self.found
        return self.log_p.clone()

    def contents(self, tokenizer=None, sequence=0):
        """The items of one sequence, oldest first: a list of dicts with token, text, bits, position."""
        count, M = int(self.count[sequence]), self.model.config.ltm_slots
        slots = [number % M for number in range(max(0, count - M), count)]
        token, bits, position = (self.items[name][sequence].tolist() for name in ("value", "bits", "position"))
        return [dict(token=token[s], text=tokenizer.decode([token[s]]) if tokenizer else None, bits=bits[s],
                     position=position[s]) for s in slots]

    def retrieved(self, tokenizer=None, sequence=0):
        """What the last prediction drew on, heaviest first: dicts with token, text, position, cosine, share of p."""
        if self.last is None:
            return []
        names = ("value", "position", "cosine", "weight")
        value, position, cosine, weight = (self.last[name][sequence].tolist() for name in names)
        total = float(self.last["total"][sequence])
        found = [dict(token=v, text=tokenizer.decode([v]) if tokenizer else None, position=p, cosine=c, share=w / total)
                 for v, p, c, w in zip(value, position, cosine, weight) if w > 0]
        return sorted(found, key=lambda item: -item["share"])

    def _tensors(self):
        """Every tensor of the state by name, and how to put it back."""
        names = ("real", "place", "count", "started", "state", "log_z", "tail", "known")
        named = {name: getattr(self, name) for name in names}
        named |= {f"items.{name}": x for name, x in self.items.items()}
        return named | {f"{kind}.{i}": x for kind in ("keys", "values") for i, x in enumerate(getattr(self, kind))}

    def _put(self, named):
        for name, x in named.items():
            head, _, rest = name.partition(".")
            if not rest:
                setattr(self, head, x)
            else:
                getattr(self, head)[int(rest) if rest.isdigit() else rest] = x

    def save(self, path):
        """Write the memory to a safetensors file."""
        metadata = {"length": str(self.length)}
        save_file({name: x.contiguous() for name, x in self._tensors().items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path, model):
        """Read a memory that `save` wrote, for a model of the same shape; ValueError if it is of another."""
        named = load_file(path, device=str(model.device))
        memory = cls(model, len(named.get("count", [0])))
        expected = {name: (x.shape[1:], x.dtype) for name, x in memory._tensors().items()}
        if model.config.stm_window and {name: (x.shape[1:], x.dtype) for name, x in named.items()} != expected:
            raise ValueError(f"{path} is not a memory of this model")
        memory._put(named)
        with safe_open(path, "pt") as file:
            memory.length = int(file.metadata()["length"])
        return memory

    def __len__(self):
        return len(self.keys)                           # layers, as in any Cache; 0 would make it false

    def __repr__(self):
        held = self.count.clamp(max=self.model.config.ltm_slots).tolist()
        return f"Memory({self.length} tokens read, items held per sequence: {held})"

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """Let beam b go on from what beam beam_idx[b] has read."""
        chosen = lambda tensors: {name: x.index_select(0, beam_idx.to(x.device)) for name, x in tensors.items()}
        if len(beam_idx) != len(self.count):
            self.graph = None                           # it was recorded for another number of sequences
        self._put(chosen(self._tensors()))
        self.last = self.last and chosen(self.last)

    def batch_select_indices(self, indices):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats):
        """Make `repeats` copies of each sequence, side by side: for beams, or several ways to go on."""
        self.reorder_cache(torch.arange(len(self.count)).repeat_interleave(repeats))

    def crop(self, *_):
        raise ValueError("what a memory has read cannot be unread; keep a copy.deepcopy of it from before")

    def __deepcopy__(self, memo):
        memo[id(self.model)] = self.model               # a copy of the memory, not of the model
        twin = type(self).__new__(type(self))
        own = {name: x for name, x in self.__dict__.items() if name not in ("graph", "fixed", "found", "log_p")}
        twin.__dict__ = copy.deepcopy(own, memo) | {"graph": None}
        return twin

    def reset(self):
        self.clear()


# ---------------------------------------------------------------- what the scripts share: files, failures, data, wandb

TOKENIZER_SHA256 = {            # GPT-2's tokenizer (Radford et al. 2019), wherever it came from
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class StageError(Exception):
    """A failure the user can act on: one line that says what is wrong and which command to run next."""


def run_stage(main):
    """Run a script's `main()` and leave the process; every failure a user can cause is one line on stderr.

    Exit codes: 0 done, 1 a StageError, a failing disk or no memory, 2 bad flags (argparse), 130 Ctrl-C, 143 SIGTERM.
    """
    name = Path(sys.argv[0]).name

    def on_sigterm(*_):
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, on_sigterm)
    sys.stdout.reconfigure(errors="backslashreplace")       # as stderr: a file's name need not be UTF-8
    try:
        sys.exit(main() or 0)
    except StageError as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = (f"the GPU is out of memory; close what else uses it or lower the batch size at the top of {name}, "
                  f"then run it again")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{place}; mend that, then run {name} again"
    sys.exit(f"{name}: {' '.join(reason.splitlines())}")    # a name may even have line ends in it


def sha256(path):
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path, data):
    """Write `data` (bytes or str) so that `path` is either what it was or all of `data`, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file atomically; raises StageError on NaN and Infinity, which JSON has no words for."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        raise StageError(f"a number that belongs into {path} is NaN or infinite; the file was left as it was") from None
    write_atomic(path, text + "\n")


def read_json(path, made_by):
    """Read a JSON object; raises StageError naming `made_by`, the command that makes it, where that fails."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StageError(f"{path} is missing; make it with: {made_by}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise StageError(f"{path} is damaged; make it again with: {made_by}")
    return value


def load_tokenizer(root, quick=False):
    """GPT-2's tokenizer from `root`/data/tokenizer; raises StageError where a file is missing or another one."""
    folder, again = Path(root) / "data" / "tokenizer", command("download_models.py", root, quick)
    for name, expected in TOKENIZER_SHA256.items():
        if not (folder / name).is_file():
            raise StageError(f"{folder / name} is missing; get it with: {again}")
        if sha256(folder / name) != expected:
            raise StageError(f"{folder / name} is not GPT-2's; get it with: {again}")
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                  pad_token="<|endoftext|>", padding_side="left")      # GPT-2 has none; for batches
    # by other keyword names the same call gives an empty vocabulary without a word
    assert len(tokenizer) == EOT + 1 and tokenizer.encode("Hello world") == [15496, 995], "the tokenizer came out empty"
    return tokenizer


def seal(value):
    """SHA-256 of a JSON object but for its own "sha256": kept there, it tells when a byte of the file has changed."""
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def characters_per_token(tokenizer):
    """Characters each token adds to a text: its bytes that are not UTF-8 continuation bytes. (vocab,) int64 array.

    Summed over a document's tokens this is len(text), also where one character is spread over two tokens.
    """
    letter_of_byte = bytes_to_unicode()
    continuation = {letter_of_byte[byte] for byte in range(0x80, 0xC0)}
    counts = np.zeros(len(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        counts[index] = sum(letter not in continuation for letter in token)
    counts[EOT] = 0
    return counts


def load_split(root, split, quick=False):
    """The windows of one split, verified against meta.json: ((rows, 128) uint16 memmap, meta dict).

    Raises StageError where a file is missing, cut short, changed, or holds a token beyond the vocabulary.
    """
    again = command("prepare_data.py", root, quick)
    meta = read_json(Path(root) / "data" / "meta.json", again)
    path = Path(root) / "data" / f"{split}.bin"
    if meta.get("sha256") != seal(meta):
        raise StageError(f"{root}/data/meta.json was changed after it was made; make it again with: {again}")
    try:
        parts, window = {name: meta["splits"][name] for name in ("train", "val")}, meta["window"]
        expected_bytes, expected_hash = parts[split]["bytes"], parts[split]["sha256"]
        counts = [part[name] for part in parts.values() for name in ("documents", "tokens", "bytes")]
        usable = (meta["format"] == 1 and {"source", "quick"} <= meta.keys() and "sha256" in parts["train"]
                  and all(type(count) is int and count > 0 for count in (window, *counts)))
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise StageError(f"{root}/data/meta.json is of another version of prepare_data.py; make it again with: {again}")
    if meta.get("tokenizer_sha256") != TOKENIZER_SHA256:
        raise StageError(f"{root}/data/meta.json names another tokenizer; make it again with: {again}")
    if not path.is_file():
        raise StageError(f"{path} is missing; make it with: {again}")
    if path.stat().st_size != expected_bytes or expected_bytes == 0 or expected_bytes % (2 * window):
        raise StageError(f"{path} has {path.stat().st_size} bytes, meta.json says {expected_bytes}; "
                         f"make it again with: {again}")
    if sha256(path) != expected_hash:
        raise StageError(f"{path} is not the file meta.json describes (its hash differs); make it again with: {again}")
    rows = np.memmap(path, np.uint16, mode="r").reshape(-1, window)
    if rows.max() > EOT:
        raise StageError(f"{path} holds token {rows.max()}, the vocabulary ends at {EOT}; make it again with: {again}")
    return rows, meta


def manifest_of(folder, **facts):
    """Write `folder`/manifest.json: the hash of every file in it, and `facts`. Comes last: no manifest, no folder."""
    files = {path.name: sha256(path) for path in sorted(Path(folder).iterdir()) if path.name != "manifest.json"}
    manifest = {"files": files, **facts}
    write_json(Path(folder) / "manifest.json", {**manifest, "sha256": seal(manifest)})


def read_manifest(folder, made_by="the stage that writes this folder"):
    """The manifest of a folder whose files all match it; raises StageError naming the first that does not."""
    folder = Path(folder)
    manifest = read_json(folder / "manifest.json", made_by)
    files = manifest.get("files")
    # a name is a file of this folder, never a path out of it
    if manifest.get("sha256") != seal(manifest) or not isinstance(files, dict) or any("/" in name for name in files):
        raise StageError(f"{folder / 'manifest.json'} is damaged; make it again with: {made_by}")
    for name, expected in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise StageError(f"{folder / name} is missing, damaged or changed: manifest.json has another hash; "
                             f"make it again with: {made_by}")
    return manifest


def save_model(model, tokenizer, folder):
    """Write a Hugging Face folder: config, weights (safetensors, float32), tokenizer, and this file as its code."""
    logging.disable_progress_bar()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    RevenaConfig.register_for_auto_class()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder, device="cpu", made_by="python add_memory.py", weights=None):
    """The RevenaHybridTiny of `folder`; raises StageError where its config or weights are missing or damaged.

    `weights`: another safetensors file than the folder's own. Nothing but JSON and safetensors is read: no code of
    the folder's runs.
    """
    folder = Path(folder)
    settings = read_json(folder / "config.json", made_by)
    path = weights or folder / "model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing; make it with: {made_by}") from None
    except Exception as error:                      # safetensors raises its own type, and OSError for some damage
        raise StageError(f"{path} is not a whole safetensors file ({error}); "
                         f"make it again with: {made_by}") from None
    try:
        model = RevenaHybridTiny(RevenaConfig.from_dict(settings))
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{folder}: config.json and model.safetensors do not fit ({reason}); "
                         f"make it again with: {made_by}") from None
    return model.to(device).eval()


def parameters_by_group(model):
    """Trainable parameters: {group: count}."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    groups = {"token embedding (tied)": count(model.backbone.embed), "layers": count(model.backbone.blocks)}
    return groups | ({"long-term memory": count(model.memory)} if hasattr(model, "memory") else {})


def pick_device():
    """The best device here: CUDA, then Apple's MPS, then the CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def lower_precision(model):
    """Let the matrices compute in bfloat16 where the GPU does, those of an LTM that is off excepted. The stream, norms,
    softmax and the LTM's weighing stay float32; its addresses are bfloat16 as the states are."""
    if next(model.parameters()).is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and (name.startswith("backbone.") or model.config.ltm_enabled):
                weight.data = weight.data.bfloat16()
    return model


def compiled(function, **options):
    """torch.compile, but for its habit of choosing how to sum by a stopwatch: two runs are to sum alike.

    Before torch 2.10 it has no other way.
    """
    from torch._inductor import config              # here: it takes seconds, and not everybody compiles
    by_rule = {"deterministic": True} if hasattr(config, "deterministic") else None
    return torch.compile(function, options=by_rule, **options)


@functools.cache
def has_compiler(device):
    """Whether torch.compile is of use on this device: a CUDA GPU, and all that makes its kernels, tried on a small one.

    That takes Triton, a C compiler and Python's headers: which of them is missing shows nowhere before.
    """
    if torch.device(device).type != "cuda":
        return False
    try:
        compiled(lambda x: 2 * x)(torch.ones(64, device=device))
    except Exception:
        return False
    return True


def default_root(root, quick):
    """The folder that data/, trained/ and the results lie in: --root, or the project's own, or its quick/."""
    return Path(root) if root else Path(os.path.relpath(Path(__file__).parent)) / ("quick" if quick else "")


def command(script, root, quick, seed=None):
    """The command line that runs a script ("train.py --baseline") on the same root, size and, where given, seed."""
    program, chosen = "" if script.startswith("./") else "python ", "" if seed is None else f" --seed {seed}"
    return f"{program}{script} --root {shlex.quote(str(root))}{chosen}" + " --quick" * quick


def arm_folder(root, seed, arm):
    """Where seed `seed` keeps "init", "baseline" or "with_ltm"."""
    return Path(root) / "trained" / (f"seed{seed}" if seed else "") / arm


WANDB_PROJECT = "revena"
WANDB_SECONDS = 15              # that its start and its end may take


def wandb_mode():
    """None (the environment decides) where there are credentials; else "offline": wandb would ask for them."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        entry = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        entry = None
    named = any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")))
    return None if entry or named or os.environ.get("WANDB_MODE") == "disabled" else "offline"


class Wandb:
    """Weights & Biases in a thread of its own: missing, raising or hanging, it costs a warning and nothing else.

    Online where the user has logged in (`wandb login`, WANDB_API_KEY) and WANDB_MODE does not say otherwise. A seed is
    a group and each arm a job type of its own, so that charts overlay the arms, also where they are drawn by group.

    Args:
        folder: where it writes. seed, job ("baseline", "with_ltm", "eval"): what the run is called and grouped by.
        config: {name: value}, to which the hashes of models.py and `script`, the version of the code, are added.
        warn: is called, in the thread, with the line that says what went wrong.
    """

    def __init__(self, folder, seed, job, config, script, warn):
        self.warn, self.tasks, self.failed = warn, queue.Queue(), False
        config = {**config, "code": {Path(file).name: sha256(file) for file in (__file__, script)}}
        self.thread = threading.Thread(target=self._work, args=(str(folder), f"seed{seed}", job, config), daemon=True)
        self.thread.start()

    def _work(self, folder, group, job, config):
        if os.environ.get("WANDB_MODE") == "disabled":
            return                                  # without waiting for the import
        try:
            # by name: transformers would ask whoever loads a checkpoint for each package that this file imports
            wandb = importlib.import_module("wandb")
            quiet = wandb.Settings(console="off", silent=True, init_timeout=WANDB_SECONDS, finish_timeout=WANDB_SECONDS)
            run = wandb.init(project=WANDB_PROJECT, group=group, job_type=job, name=f"{job}-{group}", dir=folder,
                             config=config, mode=wandb_mode(), settings=quiet)
            while (task := self.tasks.get()) is not None:
                task(wandb, run)
            run.finish()
        except Exception as error:
            self.failed = True
            self.warn(f"wandb is left out ({(str(error).splitlines() or [type(error).__name__])[0]})")

    def log(self, entry):
        """Log the numbers of a dict with a "step"."""
        if not self.failed:
            self.tasks.put(lambda wandb, run: run.log(entry, step=entry["step"]))

    def log_pictures(self, paths):
        """Log picture files, to be looked at and, as one artefact, to be fetched."""
        def task(wandb, run):
            run.log({path.stem: wandb.Image(str(path)) for path in paths})
            artifact = wandb.Artifact(f"pictures-{run.group}", type="pictures")
            for path in paths:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
        self.tasks.put(task)

    def finish(self):
        self.tasks.put(None)
        self.thread.join(WANDB_SECONDS)
        if self.thread.is_alive():
            self.warn(f"wandb did not end within {WANDB_SECONDS} s and is left behind")
