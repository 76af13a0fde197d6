"""Train one arm: the backbone alone (--baseline), with its long-term memory (--with-ltm), or with
another memory.

reads   data/train.bin, data/meta.json, trained/init/ (of a further memory: trained/init_with_NAME/)
writes  trained/baseline/, trained/with_ltm/, ..   the newest weights as a Hugging Face folder, history.jsonl,
                                                    checkpoints/step-NNNNNN/ (the last two, with the optimizer)

    python train.py --baseline              STM only (the default)
    python train.py --with-ltm              STM and LTM
    python train.py --with-ltm --resume     go on where it was stopped: the same bits as without the stop
    python train.py --with-gru --chained    rows of a document one after the other, state carried from row to row
    python train.py --with-ltm --train-backbone     of a model that add_memory.py --to put it on: all learns
    python train.py --baseline --quick      the small model under quick/, on any CPU
    torchrun --nproc_per_node=2 train.py --baseline     the same batch, shared by two processes

All arms start from the same backbone and see the same rows in the same order. On CUDA the whole
step - rows gathered, forward, backward, clipping, AdamW, statistics - is one CUDA graph, which
the host only replays.

Two regimes. Isolated (the default): a step is 8 windows of 128 tokens, each a sequence of its
own. Chained: as many tokens as one lane of 8 rows, each where the one before it in its document ends
(every second row of the .bin, where they overlap by half), so that there is something beyond
attention's sight to remember. `--chained SHARE` chains only the last SHARE of the steps.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm.auto import tqdm

from stages import (ARMS, EOT, STUDY, StageError, Wandb, about, arm_flag, arm_folder, command, commit, compiled,
                    default_root, device_name, fsync, has_compiler, init_command, init_name, is_hosted, load_model,
                    load_split, load_tokenizer, lock, lower_precision, one_line, parser_of, pick_device, read_json,
                    read_manifest, recut, regime_flags, run_stage, save_model, seed_number, sha256, write_atomic,
                    write_json, write_manifest)


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of a training; edit them here."""

    steps: int = 10_000
    batch: int = 8                  # rows of 128 tokens a step
    lane: int = 8                   # rows of a lane, where they are chained
    lr: float = 5e-4                # a cosine from this ..
    min_lr: float = 5e-5            # .. to this
    frozen: float = 3.0             # both times this where a trained model stays as it is and only what is new learns
    warmup: int = 500               # steps of linear warm-up before
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1       # of matrices; vectors have none
    clip: float = 1.0               # gradient norm, of backbone and memory apart: neither can swamp the other
    log_every: int = 50             # steps; a logged value is their mean
    checkpoint_steps: int = 5_000
    keep: int = 2                   # checkpoints


FULL = Settings()
QUICK = Settings(steps=200, batch=2, lane=2, warmup=20, log_every=10, checkpoint_steps=100)

STATISTICS = ("loss", "routed_token_ratio", "avg_surprisal_routed", "ltm_hit_rate", "grad_norm", "grad_norm_ltm")


# ------------------------------------------------------------ which rows a step sees

class Plan(NamedTuple):
    """What each step of a training sees, the same for all arms."""

    rows: torch.Tensor              # (steps, batch) int64 row numbers
    opens: torch.Tensor             # (steps, lanes, rows of a lane) bool; means nothing where a step is isolated
    chained_from: int               # the first chained step


def isolated_order(count, need, seed):
    """`need` row numbers out of `count`: a new permutation each epoch."""
    epochs = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(-(-need // count))]
    return np.concatenate([np.empty(0, np.int64), *epochs])[:need]


def runs_of(starts, count, parity, lane):
    """The rows of each document that follow one another without overlap, at most `lane` of them a
    run.

    Example: documents of rows 0..19 and 20..24, parity 0, lane 8: [0 2 .. 14] [16 18] [20 22 24].

    Args:
        starts: the first row of each document. count: rows in all. parity: 0 or 1, which rows are taken.
    """
    found = []
    for first, end in zip(starts, [*starts[1:], count]):
        rows = np.arange(first + parity, end, 2)
        found += [rows[at:at + lane] for at in range(0, len(rows), lane)]
    return found


def chained_order(starts, count, need, lane, seed):
    """`need` row numbers in lanes, and which of them open a run: two int64 and bool arrays (need,).

    Runs are shuffled and laid one after the other; epochs take even and odd rows in turn. A lane
    opens with its first row, wherever that stands: a state never outlives a step.
    """
    rows, opens, epoch, have = [], [], 0, 0
    while have < need:
        runs = runs_of(starts, count, epoch % 2, lane)
        draw = np.random.default_rng((seed, epoch, lane))
        for number in draw.permutation(len(runs)):
            rows.append(runs[number])
            opens.append(np.arange(len(runs[number])) == 0)
            have += len(runs[number])
        epoch += 1
    rows, opens = np.concatenate(rows)[:need], np.concatenate(opens)[:need]
    opens[::lane] = True
    return rows, opens


def plan_rows(rows, steps, settings, seed, share=0.0, eot=EOT):
    """The Plan of a training on `rows` (N, 128): isolated rows first, the last `share` of the steps
    chained. `eot` opens a document.
    """
    batch = settings.batch
    chained_from = steps - round(share * steps)
    lane = settings.lane if chained_from < steps else 1
    if batch % lane:
        raise StageError(f"a batch of {batch} rows is not made of lanes of {lane}; set batch at the top of "
                         f"train.py to a multiple of lane, or lane to {batch}")
    starts = np.flatnonzero(rows[:, 0] == eot)
    order = isolated_order(len(rows), chained_from * batch, seed)
    opens = np.ones(steps * batch, bool)
    if chained_from < steps:
        need = (steps - chained_from) * batch
        chained, opens[chained_from * batch:] = chained_order(starts, len(rows), need, lane, seed)
        order = np.concatenate((order, chained))
    order = torch.from_numpy(order.reshape(steps, batch))
    return Plan(order, torch.from_numpy(opens).view(steps, batch // lane, lane), chained_from)


def replayed(plan, share, seed):
    """A Plan in which a share of what comes is drawn again from what came before (experience
    replay), at equal steps.

    What is drawn is a row where steps are isolated, a whole lane where they are chained.
    """
    rows, opens = plan.rows.clone(), plan.opens.clone()
    steps, _, lane = opens.shape
    draw = np.random.default_rng((seed, 7))
    for step in range(1, steps):
        chained = step >= plan.chained_from
        size = lane if chained else 1
        earliest = plan.chained_from if chained else 0
        for place in range(0, rows.size(1), size):
            if step > earliest and draw.random() < share:
                source = draw.integers(earliest, step)
                rows[step, place:place + size] = rows[source, place:place + size]
                opens[step, place // lane] = opens[source, place // lane]
    return Plan(rows, opens, plan.chained_from)


def with_planted(plan, first, lane, share, seed):
    """A Plan in which a share of the chained lanes are planted ones, in their order: a curriculum.

    first: (documents,) the row with which each planted document begins; `lane` rows of each,
    without overlap, fill one lane.
    """
    rows, opens = plan.rows.clone(), plan.opens.clone()
    places = [(step, place) for step in range(plan.chained_from, len(rows)) for place in range(opens.size(1))]
    draw = np.random.default_rng((seed, 11))
    chosen = np.sort(draw.choice(len(places), min(round(share * len(places)), len(places)), replace=False))
    for number, which in enumerate(chosen):
        step, place = places[which]
        document = first[number * len(first) // len(chosen)]
        rows[step, place * lane:(place + 1) * lane] = torch.from_numpy(document + 2 * np.arange(lane))
        opens[step, place] = torch.arange(lane) == 0
    return Plan(rows, opens, plan.chained_from)


def targets_of(tokens, opens=None, eot=EOT):
    """The next token of each of tokens (N, C), `eot` where there is none; in a lane a row's last one
    is that with which the next row of its run begins.
    """
    targets = F.pad(tokens[:, 1:], (0, 1), value=eot)
    if opens is None:
        return targets
    first = tokens[:, 0].view_as(opens)                                 # (L, R)
    goes_on = F.pad(~opens[:, 1:], (0, 1))
    following = F.pad(first[:, 1:], (0, 1), value=eot)
    last = torch.where(goes_on, following, eot).view(-1, 1)
    return torch.cat((targets[:, :-1], last), dim=1)


# ------------------------------------------------------------ the training step

def learning_rates(steps, settings):
    """Linear warm-up, then a cosine to min_lr: float32 (steps,)."""
    step = torch.arange(steps, dtype=torch.float64)
    progress = ((step - settings.warmup) / max(1, steps - settings.warmup)).clamp(0, 1)
    half = 0.5 * (1 + (math.pi * progress).cos())
    cosine = settings.min_lr + (settings.lr - settings.min_lr) * half
    return torch.where(step < settings.warmup, settings.lr * (step + 1) / settings.warmup, cosine).float()


def batch_of(rows, order, opens, at, eot):
    """(tokens, targets, opens, number of targets) of the step `at` (1,): some `rows` (N, C) in their
    `order` (steps, B); opens (steps, L, R), or None where they are isolated.
    """
    tokens = rows[order.index_select(0, at)[0]].long()
    opens = None if opens is None else opens.index_select(0, at)[0]
    targets = targets_of(tokens, opens, eot)
    return tokens, targets, opens, (targets != eot).sum().clamp(min=1)


def add_rows(whole, tokens, rows):
    """Add rows (T, D) to those of `whole` that the tokens (T,) name. Rows of equal tokens are summed by a
    matrix product and written with equal values: no atomics, same bits.
    """
    whole[tokens] = whole[tokens] + sums_of_rows(tokens, rows).to(whole.dtype)


def sums_of_rows(tokens, rows):
    """For each of some tokens (T,) the sum of the rows (T, D) that are of it."""
    return (tokens[:, None] == tokens).to(rows.dtype) @ rows


def tally(sums, norms, targets_in_batch, halted):
    """(a step's row of STATISTICS and what its memory watches, whether to halt), of the sums over all
    processes; NaN, Inf: nothing moves from here on, and the statistics tell the host.
    """
    loss, nats, stored, bits, hits, *watched = sums
    memory_norm = norms[1] if len(norms) > 1 else norms[0] * 0
    row = torch.stack((nats / targets_in_batch, stored / targets_in_batch, bits / stored.clamp(min=1),
                       hits / targets_in_batch, norms[0], memory_norm, *watched, loss))
    halted = halted | ~torch.isfinite(row).all()
    return row[:-1].masked_fill(halted, math.nan), halted


def by_dtype(tensors):
    """The places of the tensors of each dtype: a list of lists."""
    dtypes = dict.fromkeys(x.dtype for x in tensors)
    return [[i for i, x in enumerate(tensors) if x.dtype == dtype] for dtype in dtypes]


def norms_of(tensors):
    """2-norms of some tensors, float32 (len(tensors),); in one pass over all of a dtype: mixed,
    each takes its own.
    """
    found = {}
    for places in by_dtype(tensors):
        norms = torch._foreach_norm([tensors[i] for i in places], 2, torch.float32)
        found.update(zip(places, norms))
    return torch.stack([found[i] for i in range(len(tensors))])


def over_all_processes(tensors):
    """Sums over all processes, of tensors that each of them has: one all-reduce for each dtype."""
    found = list(tensors)
    for places in by_dtype(tensors):
        flat = torch.cat([tensors[i].flatten() for i in places])
        dist.all_reduce(flat)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places])):
            found[i] = part.view_as(tensors[i])
    return found


def of_each_process(x):
    """What each process has for x, of one shape in all: a list."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return found


def adamw(weight, master, gradient, first, second, decay, rate, step, norm, halted, settings):
    """One AdamW step (Loshchilov & Hutter 2019) on a float32 master; `weight`, or None, is its copy
    to compute with.

    `norm`: of all gradients that are clipped together; above settings.clip they are scaled down
    to it. `halted` (a bool tensor) keeps the weights. Compiled, all this is one pass over memory;
    elsewhere it runs as it stands.
    """
    b1, b2 = settings.beta1, settings.beta2
    gradient = gradient.float() * (settings.clip / norm).clamp(max=1)
    first.lerp_(gradient, 1 - b1)
    second.lerp_(gradient * gradient, 1 - b2)
    update = first / (second / (1 - b2 ** step)).sqrt_().add_(settings.eps)
    update = update.mul_(rate / (1 - b1 ** step)).add_(master * (rate * decay))
    master.sub_(torch.where(halted, 0.0, update))
    if weight is not None:
        weight.copy_(master)


LAID = 64                       # AdamW takes a parameter as rows of so many elements


def adamw_of_odd(*given):
    """`adamw` of what does not fill such rows. A function of its own: its kernel, which may assume nothing
    of sizes and so reads one element at a time, would be taken for everything.
    """
    adamw(*given)


class Group:
    """Parameters that are clipped together, and AdamW's state of them (float32, also where they
    compute in bf16).
    """

    def __init__(self, named, settings, memory=None):
        """named: {name: parameter}; memory: the module whose `undecayed` and `rates` say what is
        different for whom.
        """
        self.names = list(named)
        self.parameters = list(named.values())
        self.weights = [p.detach() for p in self.parameters]
        self.masters = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        self.first = [torch.zeros_like(p) for p in self.masters]
        self.second = [torch.zeros_like(p) for p in self.masters]
        short = [name.partition(".")[2] for name in self.names]
        undecayed = memory.undecayed if memory else ()
        rates = memory.rates if memory else {}
        self.rates = [rates.get(name, 1.0) for name in short]
        self.decay = [settings.weight_decay if p.dim() > 1 and name not in undecayed else 0.0
                      for p, name in zip(self.masters, short)]

    def state(self):
        """{"exp_avg.NAME": .., "exp_avg_sq.NAME": ..}, the tensors themselves."""
        first = {f"exp_avg.{name}": x for name, x in zip(self.names, self.first)}
        second = {f"exp_avg_sq.{name}": x for name, x in zip(self.names, self.second)}
        return first | second


class Training:
    """The state of a run on one device, and its step.

    Args:
        model: a RevenaHybridTiny on `device`, float32; `lower_precision` is applied here. What of it needs no gradient
            stays as it is.
        rows: (N, 128) uint16 array. plan: which of them each step sees.
    """

    def __init__(self, model, rows, plan, settings):
        self.settings, self.plan = settings, plan
        self.device = next(model.parameters()).device
        originals = {name: p.detach().clone() for name, p in model.named_parameters()}  # float32
        self.model = lower_precision(model).train()
        self.watched = tuple(model.active.watched)
        self.eot = model.config.pad_token_id
        self.still = {name: originals[name] for name, p in model.named_parameters() if not p.requires_grad}
        # the embedding's gradient is put together by hand, where it is the output matrix too and learns
        self.looks_up = not is_hosted(model) and model.backbone.embed.weight.requires_grad
        self.groups = [self.group("backbone.", originals)]
        if model.config.memory_enabled:
            self.groups.append(self.group("memory.", originals, model.memory))
        steps = len(plan.rows)
        self.rows = torch.from_numpy(rows.astype(np.int32)).to(self.device)
        self.order = plan.rows.to(self.device)
        self.opens = plan.opens.to(self.device)
        self.rates = learning_rates(steps, settings).to(self.device)
        self.statistics = torch.zeros(steps, len(STATISTICS) + len(self.watched), device=self.device)
        self.done = 0                                                   # on the host
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)  # the same, on the device
        self.halted = torch.zeros((), dtype=torch.bool, device=self.device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # what a compiler takes piece by piece
        self.of_tokens, self.states, self.prepare = self.model.of_tokens, self.model.states, self.model.prepare
        self.log_p, self.find = self.model.log_p, self.model.find
        self.batch_of, self.outcome, self.add_rows, self.tally = batch_of, self._outcome, add_rows, tally
        self.sums_of_rows = sums_of_rows
        self.update, self.update_odd = adamw, adamw_of_odd
        self.streams = ()                                               # what is done side by side is spread over them
        self.graphs = {}                                                # {chained: CUDA graph}

    def group(self, prefix, originals, memory=None):
        """The Group of all parameters that learn and whose name begins with `prefix`, its masters as
        they were in float32.
        """
        named = {name: p for name, p in self.model.named_parameters() if name.startswith(prefix) and p.requires_grad}
        group = Group(named, self.settings, memory)
        for name, master in zip(group.names, group.masters):
            master.copy_(originals[name])
        return group

    @property
    def chained(self):
        """Whether the next step is a chained one."""
        return self.done >= self.plan.chained_from

    @property
    def graph(self):
        """The CUDA graph of the next step; None: it is launched kernel by kernel."""
        return self.graphs.get(self.chained)

    def passed(self, tokens, opens, embedded):
        """(final states, notes) as model.states gives them, and what the memory makes of the tokens alone, beside
        the layers.
        """
        with self.side_by_side() as turns:
            with next(turns):
                of_tokens = self.of_tokens(tokens)
            return *self.states(tokens, opens, embedded), of_tokens

    def objective(self, h, notes, of_tokens, tokens, targets, opens, targets_in_batch):
        """-objective summed over this process's rows / targets in the whole batch; that and the statistics' sums.

        It is model.score after `passed`, piece by piece. What a memory prepares on the final states is done beside the
        logits. Its gradient, and that of what it finds, are computed beside the gradient of the logits:
        autograd stays on the stream of the forward, and what `find` gave is not given back before its
        own gradient, the next to want room there, has waited for `outcome`'s.
        """
        with self.side_by_side() as turns:
            log_p, log_z = self.log_p(h, targets)
            with next(turns):
                prepared = self.prepare(h, tokens, opens, of_tokens)
        with self.side_by_side() as turns, next(turns):
            found = self.find(h, tokens, targets, log_p, log_z, opens, prepared)
            if self.streams:                    # this one may still read them where the first has done with them
                for x in (h, log_p, log_z):
                    x.record_stream(torch.cuda.current_stream())
        return self.outcome(h, notes, tokens, targets, log_p, log_z, opens, prepared, found, targets_in_batch)

    def _outcome(self, h, notes, tokens, targets, log_p, log_z, opens, prepared, found, targets_in_batch):
        """The last piece of `objective`: scores of the targets, and what becomes of them."""
        scores = self.model.score_states(h, notes, tokens, targets, log_p, log_z, opens, prepared, found)
        real = targets != self.eot

        def total(x):
            return torch.where(real, x, 0.0).sum()

        bits = torch.where(scores.stored, -scores.log_p_stm / math.log(2), 0.0)
        loss = -total(scores.objective) / targets_in_batch
        share = len(tokens) / self.order.size(1)            # of the batch's rows
        watched = [scores.watched[name] * share for name in self.watched]
        sums = (loss, -total(scores.log_p), scores.stored.sum(), bits.sum(), (scores.hit & real).sum(), *watched)
        return loss, torch.stack([x.detach().float() for x in sums])

    def batch(self):
        """What `batch_of` makes of the next step's rows."""
        return self.batch_of(self.rows, self.order, self.opens if self.chained else None, self.at, self.eot)

    def share(self, tokens, targets, opens, rank):
        """A process's share of the batch: some of its rows, or lanes."""
        if opens is not None:
            tokens, targets = (x.unflatten(0, opens.shape) for x in (tokens, targets))
            opens = opens.tensor_split(self.world)[rank]
        tokens, targets = (x.tensor_split(self.world)[rank] for x in (tokens, targets))
        return *(x.reshape(-1, x.size(-1)) for x in (tokens, targets)), opens

    @property
    def parameters(self):
        """All that learn, group by group."""
        return [p for group in self.groups for p in group.parameters]

    def gradients(self, tokens, targets, opens, targets_in_batch):
        """(gradients of all parameters, sums) of this process's share of the batch."""
        tokens, targets, opens = self.share(tokens, targets, opens, self.rank)
        given, parameters = (tokens, targets, opens, targets_in_batch), self.parameters
        if not self.looks_up:
            loss, sums = self.objective(*self.passed(tokens, opens, None), *given)
            # of a host, not every parameter need have a hand in it
            return torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else (), sums
        embed = self.model.backbone.embed.weight
        embedded = F.embedding(tokens, embed.detach()).requires_grad_()
        loss, sums = self.objective(*self.passed(tokens, opens, embedded), *given)
        *gradients, looked_up = torch.autograd.grad(loss, [*parameters, embedded])

        # the embedding is also the output matrix, whose gradient is whole; the look-up adds to
        # its own rows alone
        whole = [p is embed for p in parameters].index(True)
        self.add_rows(gradients[whole], tokens.flatten(), looked_up.flatten(0, 1))
        return gradients, sums

    def gradients_of_all(self, tokens, targets, opens, targets_in_batch):
        """`gradients` summed over all processes. The output matrix's, nearly half of all and the first to
        be known, is summed beside the backward of the layers; what the look-up adds to it is exchanged as rows.
        """
        if not self.looks_up:
            gradients, sums = self.gradients(tokens, targets, opens, targets_in_batch)
            *gradients, sums = over_all_processes([*gradients, sums])
            return gradients, sums
        most = self.share(tokens, targets, opens, 0)[0].numel()         # the first has no fewer than another
        tokens, targets, opens = self.share(tokens, targets, opens, self.rank)
        embed, parameters = self.model.backbone.embed.weight, self.parameters
        embedded = F.embedding(tokens, embed.detach()).requires_grad_()
        h, notes, of_tokens = self.passed(tokens, opens, embedded)
        ends = [h, *notes.get("penalty", ())]                           # what the layers give the loss
        cut = [x.detach().requires_grad_() for x in ends]
        notes = notes | ({"penalty": cut[1:]} if len(cut) > 1 else {})
        loss, sums = self.objective(cut[0], notes, of_tokens, tokens, targets, opens, targets_in_batch)
        found = torch.autograd.grad(loss, [*cut, *parameters], allow_unused=True)
        of_ends, late = found[:len(cut)], found[len(cut):]
        whole = [p is embed for p in parameters].index(True)
        output = late[whole].contiguous()
        sent = dist.all_reduce(output, async_op=True)
        *early, looked_up = torch.autograd.grad(ends, [*parameters, embedded], of_ends, allow_unused=True)
        rows = self.sums_of_rows(tokens.flatten(), looked_up.flatten(0, 1)).to(output.dtype)

        both = [y if x is None else x if y is None else x + y for x, y in zip(early, late)]
        *rest, sums = over_all_processes([*both[:whole], *both[whole + 1:], sums])
        place = torch.arange(most, device=rows.device).clamp(max=len(rows) - 1)         # the last row again, if fewer
        theirs = [of_each_process(x[place]) for x in (tokens.flatten(), rows)]
        sent.wait()
        for token, row in zip(*theirs):
            output[token] = output[token] + row
        return [*rest[:whole], output, *rest[whole:]], sums

    def step(self):
        """One optimizer step, without a word to the host."""
        tokens, targets, opens, targets_in_batch = self.batch()
        compute = self.gradients if self.world == 1 else self.gradients_of_all
        gradients, sums = compute(tokens, targets, opens, targets_in_batch)
        sizes = [len(group.parameters) for group in self.groups]
        with self.side_by_side() as turns:
            every = [self.rates[:0]]                                    # a model that stays as it is has none
            for part in filter(None, (gradients[:1], gradients[1:])):   # the first is nearly half of all
                with next(turns):
                    every.append(norms_of(part))
        norms = [part.norm() for part in torch.cat(every).split(sizes)]
        row, halted = self.tally(sums, norms, targets_in_batch, self.halted)
        self.halted.copy_(halted)
        self.apply(gradients, norms)
        self.statistics.index_copy_(0, self.at, row[None])
        self.at += 1

    @contextlib.contextmanager
    def side_by_side(self):
        """Contexts to take in turns: on a GPU the last blocks of what is done in one leave room for the first
        of the next.
        """
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        yield itertools.cycle([torch.cuda.stream(stream) for stream in self.streams] or [contextlib.nullcontext()])
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)

    def apply(self, gradients, norms):
        """AdamW on every parameter, given the norms of each group's gradients."""
        rate = self.rates.index_select(0, self.at)[0]
        step = (self.at[0] + 1).float()
        rest = iter(gradients)
        # made before the streams part, and kept until they have joined again
        own = {factor: rate if factor == 1 else rate * factor for group in self.groups for factor in group.rates}
        with self.side_by_side() as turns:
            for group, norm in zip(self.groups, norms):
                share = [next(rest) for _ in group.parameters]
                copies = [None if w is p else w for w, p in zip(group.weights, group.masters)]
                every = zip(copies, group.masters, share, group.first, group.second, group.decay, group.rates)
                for *tensors, decay, factor in every:
                    odd = tensors[1].numel() % LAID
                    update = self.update_odd if odd else self.update
                    tensors = [x if odd or x is None else x.view(-1, LAID) for x in tensors]
                    with next(turns):
                        update(*tensors, decay, own[factor], step, norm, self.halted, self.settings)

    def run(self, steps):
        """Take `steps` steps, all isolated or all chained; returns at once where a CUDA graph is
        replayed.
        """
        graph = self.graph
        for _ in range(steps):
            if graph is None:
                self.step()
            else:
                graph.replay()
        self.done += steps

    def ahead(self):
        """How many steps there are to the next log line, checkpoint, change of regime or end."""
        stops = [every - self.done % every for every in (self.settings.log_every, self.settings.checkpoint_steps)]
        if not self.chained:
            stops.append(self.plan.chained_from - self.done)
        return min(*stops, len(self.plan.rows) - self.done)

    def accelerate(self):
        """Compile the step and capture it as a CUDA graph where that can be had; returns one line
        that says so.

        Takes up to three steps (the warm-up that capture asks for): they are steps like any
        other.
        """
        if self.device.type != "cuda":
            return f"plain PyTorch step on {self.device.type} (no CUDA)"
        torch.set_float32_matmul_precision("high")      # TF32: what a memory keeps in float32 is multiplied no slower
        how = "captured as one CUDA graph, not compiled (that takes Triton, a C compiler and Python's headers)"
        if has_compiler(self.device) and not is_hosted(self.model):     # a host's code is its own
            how = "compiled and captured as one CUDA graph"
            for piece in ("of_tokens", "states", "prepare", "log_p", "find", "outcome"):
                setattr(self, piece, compiled(getattr(self, piece), dynamic=False))
            # one kernel for tensors of all sizes: its shape is not to be the one that was quickest for a small one
            by_rule = {"triton.autotune_pointwise": False}
            self.update, self.update_odd = compiled(adamw, by_rule), compiled(adamw_of_odd, by_rule)
            self.batch_of, self.add_rows, self.tally = map(compiled, (batch_of, add_rows, tally))
            self.sums_of_rows = compiled(sums_of_rows)
            self.model.fuse()
            self.streams = [torch.cuda.Stream(priority=-1) for _ in range(2)]       # theirs goes first
            # gradients that come from them are added up on another, which waits for them: as meant
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        chained, end = self.chained, len(self.plan.rows)
        stop = end if chained else self.plan.chained_from
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(3, stop - self.done)):
                self.step()
                self.done += 1
        torch.cuda.synchronize()
        if self.done < stop:
            graph = self.graphs[chained] = torch.cuda.CUDAGraph()
            # of this thread: NCCL's watchdog asks after earlier work meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.step()                                             # recorded, not run
        return how

    def release(self):
        """Give back what was recorded: NCCL waits for that before it ends, whoever else still holds it."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()

    def state(self):
        """Everything a resumed run needs beside the weights: optimizer, statistics so far. On the
        CPU.
        """
        tensors = {name: x for group in self.groups for name, x in group.state().items()}
        tensors["statistics"] = self.statistics[:self.done]
        tensors["rng"] = torch.get_rng_state()
        return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}

    def weights(self):
        """All the model's float32 tensors by name: masters, a memory's weights also where it is
        off, buffers.
        """
        masters = {name: p for group in self.groups for name, p in zip(group.names, group.masters)}
        tensors = {}
        for name, x in self.model.state_dict().items():
            x = masters.get(name, self.still.get(name, x)).detach()
            tensors[name] = x.float().cpu() if x.is_floating_point() else x.cpu()
        return tensors

    def restore(self, weights, state):
        """Go on from what `weights()` and `state()` gave."""
        for group in self.groups:
            for name, weight, master in zip(group.names, group.weights, group.masters):
                master.copy_(weights[name])
                weight.copy_(master)
            for name, x in group.state().items():
                x.copy_(state[name])
        self.done = len(state["statistics"])
        self.statistics[:self.done] = state["statistics"].to(self.device)
        self.at.fill_(self.done)
        torch.set_rng_state(state["rng"])


# ------------------------------------------------------------ checkpoints

def save_tensors(tensors, path, **metadata):
    """Write a safetensors file that is on the disk when this returns, readable by whom the umask
    lets.
    """
    from models import follow_umask                      # which brings transformers: not for --help

    save_file(tensors, path, metadata=metadata or None)
    follow_umask(path)
    fsync(path)


class Run:
    """The folder of a run: what it was started with, its checkpoints, its newest weights.

    A checkpoint is written aside, its manifest (hashes) last, and renamed; older ones go only
    after that. The folder's own model.safetensors is replaced in one rename, and manifest.json
    names the new hash before that beside the old one, so that whoever reads the folder at any
    time finds a whole model that its manifest knows.
    """

    def __init__(self, folder, facts, keep, made_by):
        """facts: {name: value} of all that the outcome follows from; only a run of the same facts
        is gone on with. made_by: what takes the steps: {"commit", "torch", "device"}.
        """
        self.folder, self.keep = folder, keep
        self.facts = json.loads(json.dumps(facts))       # as they come back from a file: a tuple as a list
        self.made_by = made_by
        self.checkpoints = folder / "checkpoints"

    def lock(self):
        """Hold the folder until this process ends; raises StageError where another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = open(self.folder / ".lock", "w")
        lock(self.held, f"another training run is writing {self.folder}; wait for it or stop it")
        for path in self.folder.glob(".*.tmp"):          # left by a run that was killed
            path.unlink()

    def clear(self):
        """Remove an earlier run."""
        for path in self.folder.iterdir():
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def saved(self):
        """Checkpoint folders, newest first."""
        def age(path):
            return len(path.name), path.name

        return sorted(self.checkpoints.glob("step-*"), key=age, reverse=True)

    def last(self):
        """The newest checkpoint, in words."""
        return f"the last good checkpoint is {next(iter(self.saved()), 'none')}"

    def manifest(self):
        """What manifest.json holds: step, weights {hash: step}, settings; nothing where it is
        missing or damaged.
        """
        try:
            found = read_json(self.folder / "manifest.json", "train.py")
        except StageError:
            return {}
        whole = all(isinstance(found.get(name), dict) for name in ("weights", "settings"))
        return found if whole and isinstance(found.get("made_by", []), list) else {}

    def differing(self, theirs):
        """The facts that differ from `theirs`, as text with both values; hashes shortened."""
        def short(value):
            return value[:12] if isinstance(value, str) else value

        changed = [(name, theirs.get(name), value) for name, value in self.facts.items() if theirs.get(name) != value]
        return ", ".join(f"{name} was {short(was)}, is {short(now)}" for name, was, now in changed)

    def refuse_another(self):
        """Raise StageError where the folder holds a run already."""
        if not (self.saved() or (self.folder / "manifest.json").exists()):
            return
        theirs = self.manifest()
        how = "; go on with --resume, or start over with --fresh"
        if differing := self.differing(theirs.get("settings", {})):
            how = f", with other settings ({differing}); start over with --fresh"
        raise StageError(f"{self.folder} holds a run already, at step {theirs.get('step')}{how}")

    def newest(self):
        """(folder, weights, state) of the newest whole checkpoint, damaged ones named and passed
        over; None: no run.

        Raises StageError where the run was started with other settings, or where no checkpoint is whole.
        """
        for folder in self.saved():
            try:
                theirs = read_manifest(folder).get("settings", {})
                weights = load_file(folder / "model.safetensors")
                state = load_file(folder / "optimizer.safetensors")
                if not all(x.isfinite().all() for x in weights.values()):
                    raise StageError(f"{folder} holds weights that are NaN or infinite")
            except (StageError, OSError, SafetensorError) as error:
                say(f"{folder} is passed over: {str(error).partition(';')[0]}", sys.stderr)
                continue
            if differing := self.differing(theirs):
                raise StageError(f"{folder} is of a run with other settings ({differing}); set them back, or start "
                                 f"over with --fresh in place of --resume")
            return folder, weights, state
        if self.saved():
            raise StageError(f"no checkpoint in {self.checkpoints} is whole; start over with --fresh, not --resume")
        return None

    def is_over(self, steps):
        """Whether all steps were taken, though no checkpoint is left to tell: the weights are here,
        or were taken elsewhere. Raises StageError where there is another run, or a part of this one
        that cannot be gone on with: no training is thrown away unasked.
        """
        theirs, weights = self.manifest(), self.folder / "model.safetensors"
        if not (self.folder / "manifest.json").exists() or theirs.get("step") == 0:
            return False
        if not theirs:
            wrong = "but its manifest.json is damaged"
        elif differing := self.differing(theirs["settings"]):
            wrong = f"with other settings ({differing})"
        elif theirs.get("step") != steps:
            wrong = f"at step {theirs.get('step')}, and no checkpoint to go on from"
        elif weights.exists() and sha256(weights) not in theirs["weights"]:
            wrong = "but its model.safetensors is damaged"
        else:
            return True
        raise StageError(f"{self.folder} holds a run already, {wrong}; start over with --fresh, not --resume")

    def begin(self, model, tokenizer):
        """Lay out the folder, so that it loads from the first moment: config, code, tokenizer,
        initial weights.
        """
        save_model(model, tokenizer, self.folder)
        self.describe(0, {sha256(self.folder / "model.safetensors"): 0})

    def describe(self, step, hashes):
        """Write manifest.json: the step, which weights may be found here, the config as it was at
        the start, and all that took steps so far.
        """
        theirs = self.manifest()
        config = theirs.get("config") or sha256(self.folder / "config.json")
        made_by = [one for one in theirs.get("made_by", []) if one != self.made_by] + [self.made_by]
        write_json(self.folder / "manifest.json", {"step": step, "weights": hashes, "config": config,
                                                   "settings": self.facts, "made_by": made_by})

    def save(self, training):
        """Write a checkpoint of `training` and make its weights the folder's own."""
        final = self.checkpoints / f"step-{training.done:06d}"
        aside = self.checkpoints / ".saving.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_tensors(training.weights(), aside / "model.safetensors", format="pt")
            save_tensors(training.state(), aside / "optimizer.safetensors")
            write_manifest(aside, step=training.done, settings=self.facts)
            if final.exists():
                shutil.rmtree(final)                     # a damaged one that was passed over
            os.replace(aside, final)
            self.publish(final)
        except Exception as error:                       # a full disk is an OSError here, safetensors' own error there
            shutil.rmtree(aside, ignore_errors=True)
            raise StageError(f"the checkpoint of step {training.done} could not be written ({error}); {self.last()}; "
                             f"mend that (free some space?), then run the same command with --resume") from None
        for old in self.saved()[self.keep:]:
            shutil.rmtree(old, ignore_errors=True)

    def publish(self, checkpoint):
        """Make a checkpoint's weights the folder's own."""
        model, fresh = self.folder / "model.safetensors", self.folder / ".model.safetensors.tmp"
        theirs = read_json(checkpoint / "manifest.json", "train.py")
        known = self.manifest().get("weights", {})
        now = sha256(model) if model.exists() else None
        new = {theirs["files"]["model.safetensors"]: theirs["step"]}
        if now in new and known.get(now) == new[now]:    # equal weights of another step: nothing of them learns
            return
        old = {now: known[now]} if now in known else {}
        try:
            fresh.unlink(missing_ok=True)
            try:
                os.link(checkpoint / "model.safetensors", fresh)
            except OSError:                              # a file system without hard links
                shutil.copyfile(checkpoint / "model.safetensors", fresh)
            self.describe(theirs["step"], old | new)
            os.replace(fresh, model)
        finally:
            fresh.unlink(missing_ok=True)


# ------------------------------------------------------------ what a run says

def say(what, stream=None):
    """Print a line above the progress bar. That nobody listens any more (a closed pipe) is no
    reason to end.
    """
    stream = stream or sys.stdout
    try:
        tqdm.write(what, file=stream)
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:           # for what waits to be written, too
            os.dup2(nowhere.fileno(), stream.fileno())


class History:
    """history.jsonl: a line every `log_every` steps, the mean of its steps. Read back a whole
    interval late, so that the device never waits for the host.
    """

    def __init__(self, path, training, report):
        """report(entry) is called with each new line."""
        self.path, self.training, self.report = path, training, report
        self.every = training.settings.log_every
        self.rates = learning_rates(len(training.order), training.settings)     # the device's would have to be awaited
        self.warned = False
        self.pending = []                                # (end step, statistics on the host, when the device was there)
        self.restart()
        self.noted = training.done - training.done % self.every
        lines = self.remade()
        with self.at_most_a_warning():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))

    def remade(self):
        """The lines of all steps so far, from the statistics; how fast they were, from the file as
        it was.
        """
        timing, statistics, before = {}, self.training.statistics, ""
        with self.at_most_a_warning(), contextlib.suppress(FileNotFoundError):
            before = self.path.read_text(errors="replace")
        for line in before.splitlines():
            try:
                old = json.loads(line)
                timing[old["step"]] = {name: old[name] for name in ("tok/sec", "ETA")}
            except (ValueError, KeyError, TypeError):
                continue                                 # cut off by a crash: made again below
        ends = range(self.every, self.noted + 1, self.every)
        return [self.entry(end, statistics[end - self.every:end].cpu(), None) | timing.get(end, {}) for end in ends]

    @contextlib.contextmanager
    def at_most_a_warning(self):
        """A log that cannot be written is no reason to lose a training."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} is not kept ({one_line(error)}); going on", sys.stderr)
            self.warned = True

    def restart(self):
        """Time the next interval from here: what came before (compiling, a checkpoint) is not
        training.
        """
        self.mark, self.since = self.now(), self.training.done

    def now(self):
        """This point of the run: seconds on the CPU, an event that a GPU will pass."""
        if self.training.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def entry(self, end, rows, pace):
        """The line of the interval that ends with step `end`; rows: its statistics; pace: seconds a
        step, or None.
        """
        training = self.training
        means = dict(zip((*STATISTICS, *training.watched), rows.double().mean(0).tolist()))
        # routed surprisal is a mean over routed tokens, not over steps: weigh each step by the
        # share that it routed
        routed = rows[:, 1].double()
        surprisal = (rows[:, 2].double() * routed).sum() / routed.sum().clamp(min=1e-12)
        means["avg_surprisal_routed"] = float(surprisal)
        steps, batch = training.order.shape
        rate = batch * training.rows.size(1) / pace if pace else None
        left = (steps - end) * pace if pace else None
        return {"step": end, "LTM_enabled": training.model.config.memory_enabled, **means,
                "lr": float(self.rates[end - 1]), "tok/sec": rate, "ETA": left}

    def note(self):
        """Fetch the intervals that have been asked for by now, without waiting."""
        for end in range(self.noted + self.every, self.training.done + 1, self.every):
            rows = self.training.statistics[end - self.every:end]
            host = torch.empty(rows.shape, pin_memory=rows.is_cuda).copy_(rows, non_blocking=True)
            self.pending.append((end, host, self.now()))
            self.noted = end

    def settle(self, keep=0):
        """Write the lines of all pending intervals but the last `keep`.

        With none left pending, every step so far is known to be finite: a checkpoint may be
        written.
        """
        while len(self.pending) > keep:
            end, rows, mark = self.pending.pop(0)
            if isinstance(mark, float):
                seconds = mark - self.mark
            else:
                mark.synchronize()                       # then `rows` has arrived too
                seconds = self.mark.elapsed_time(mark) / 1000
            self.refuse_nan(end - len(rows), rows)
            # the first interval after a start lacks the steps from before it
            entry = self.entry(end, rows, seconds / (end - self.since) if end > self.since else None)
            self.mark, self.since = mark, end
            with self.at_most_a_warning(), open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.report(entry)
        if not keep:
            self.refuse_nan(0, self.training.statistics[:self.training.done].cpu())

    def refuse_nan(self, start, rows):
        """Raise StageError where a loss or gradient after step `start` is not finite: the device
        stopped there.
        """
        bad = (~torch.isfinite(rows).all(1)).nonzero()
        if len(bad):
            raise StageError(f"the loss or its gradient is not finite at step {start + int(bad[0]) + 1}, and no weight "
                             f"was updated from there on")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# RevenaHybridTiny: {arm}

{what} of {parameters:,} parameters, {learnt:,} of them trained here, and: {label}.
The weights of step {step:,} of {steps:,}.

| | |
|---|---|
| data | {source}: {documents:,} documents, {tokens:,} tokens |
| training loss (nats a token) | {loss} |
| seed, batch, learning rate | {seed}, {batch} rows of {width} tokens, {lr} |
| share of the steps with chained rows | {chained} |
| torch, device | {torch}, {device} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
text = tokenizer("The memory of", return_tensors="pt")
cache = model.new_cache()       # or model.load_cache("memory.safetensors"), which cache.save(..) wrote
print(tokenizer.decode(model.generate(**text, max_new_tokens=50, past_key_values=cache)[0]))
```

After more training, call `model.eval()` before it generates: on a GPU that is faster.

Limits: a small model trained on little text to answer one question (does a memory help?); it knows next to nothing,
repeats itself, and says whatever its data said.
"""


BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Console:
    """What the first process of a run says and writes: progress bar, history, wandb, checkpoints,
    the card.
    """

    def __init__(self, run, training, job):
        self.run, self.training, self.job = run, training, job
        self.entry, self.checkpointed = None, None
        self.wandb = Wandb(run.folder, job.seed, job.arm, run.facts, self.warn)
        self.history = History(run.folder / "history.jsonl", training, self.report)
        self.bar = tqdm(total=job.steps, initial=training.done, bar_format=BAR, disable=None,
                        smoothing=0.05)
        # in two lines: the names of what is shown are wider than a terminal of 80 columns
        self.below = tqdm(bar_format="{desc}", position=1, disable=None)
        settings, rows = training.settings, training.rows
        say(f"{job.arm}, seed {job.seed}: {job.steps:,} steps of {settings.batch} x {rows.size(1)} tokens, "
            f"{len(rows):,} rows, from step {training.done:,}"
            + (f", the last {job.chained:.0%} of the steps chained" if job.chained else ""))

    def warn(self, what):
        say(f"{what}; history.jsonl holds the same numbers", sys.stderr)

    def started(self, how, seconds):
        """The step has been made ready."""
        say(f"{how}, ready after {seconds:.0f} s")
        self.history.restart()

    def report(self, entry):
        """A line of the history has been written."""
        self.entry = entry
        self.wandb.log(entry)
        self.bar.set_postfix({"LTM_enabled": entry["LTM_enabled"], "loss": f"{entry['loss']:.3f}",
                              "tok/sec": f"{entry['tok/sec'] or 0:,.0f}"})
        self.below.set_description_str(f"routed_token_ratio={entry['routed_token_ratio']:.2f}, "
                                       f"avg_surprisal_routed={entry['avg_surprisal_routed']:.1f}, "
                                       f"ltm_hit_rate={entry['ltm_hit_rate']:.2f}")
        if self.bar.disable and entry["step"] % max(self.history.every, self.job.steps // 10) == 0:
            say(f"step {entry['step']:,}: loss {entry['loss']:.4f}, {entry['tok/sec'] or 0:,.0f} tok/sec, "
                f"ETA {entry['ETA'] or 0:.0f} s")

    def advanced(self):
        """Steps have been taken: log lines, and a checkpoint where one is due."""
        training, settings = self.training, self.training.settings
        self.bar.update(training.done - self.bar.n)
        if training.done % settings.log_every == 0:
            self.history.note()
            self.settle(keep=1 if training.graph else 0)
        # passed, not met: making the step ready takes steps too
        passed = training.done // settings.checkpoint_steps > (self.checkpointed or 0) // settings.checkpoint_steps
        if passed and training.done < self.job.steps:
            self.settle()
            self.save()
            self.history.restart()

    def settle(self, keep=0):
        try:
            self.history.settle(keep)
        except StageError as error:
            raise StageError(f"{error}; {self.run.last()}; lower lr in train.py and start over with --fresh") from None

    def save(self):
        if self.training.done != self.checkpointed:
            self.run.save(self.training)
            self.checkpointed = self.training.done

    def end(self):
        """All that is to be taken has been taken. The weights come first: nothing else is worth
        losing them.
        """
        self.history.note()
        self.settle()
        self.save()
        self.bar.close()
        self.below.close()
        training = self.training
        last = training.statistics[max(0, training.done - training.settings.log_every):training.done, 0]
        loss = float(last.mean())
        said = f"{loss:.4f}" if training.done else "no step was taken"
        try:
            write_atomic(self.run.folder / "README.md", self.job.card(training, self.run.folder, said))
        except Exception as error:
            say(f"warning: no model card was written ({one_line(error)})", sys.stderr)
        self.wandb.finish()
        if training.done < self.job.steps:
            say(f"stopped at step {training.done:,} and saved; go on with --resume", sys.stderr)
            return
        if training.device.type == "cuda":
            say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")
        say(f"loss {loss:.4f}; wrote {self.run.folder}/ in {time.time() - self.job.began:.0f} s; "
            f"next: {self.job.following}")


class Mute:
    """The Console of every other process: it says and writes nothing."""

    def started(self, how, seconds):
        pass

    def advanced(self):
        pass

    def end(self):
        pass


# ------------------------------------------------------------ a training from end to end

class Processes:
    """The processes that share a training: one, or those that torchrun started."""

    def __init__(self):
        self.device = pick_device()
        self.world = max(1, self.number("WORLD_SIZE", 1))
        if self.world > 1:
            self.join()
        self.first = self.world == 1 or dist.get_rank() == 0

    @staticmethod
    def number(name, default=None):
        """A whole number from the environment, as torchrun sets it."""
        text = os.environ.get(name, "")
        if not text and default is not None:
            return default
        if not text.isdecimal() or len(text) > 9:
            raise StageError(f"the environment says {name}={text!r} where a whole number is needed; start several "
                             f"processes with: torchrun --nproc_per_node=2 train.py, or unset WORLD_SIZE")
        return int(text)

    def join(self):
        """Join torchrun's process group. Until all have come there is nothing to save: a signal
        ends the wait.
        """
        local = self.number("LOCAL_RANK")
        self.number("MASTER_PORT")
        if self.number("RANK") >= self.world:
            raise StageError(f"the environment says RANK={os.environ['RANK']} of WORLD_SIZE={self.world}; start "
                             f"several processes with: torchrun --nproc_per_node={self.world} train.py, or unset "
                             f"WORLD_SIZE")
        if not os.environ.get("MASTER_ADDR"):
            raise StageError("the environment says WORLD_SIZE but not MASTER_ADDR; start several processes with: "
                             "torchrun --nproc_per_node=2 train.py, or unset WORLD_SIZE")
        if self.device == "cuda":
            if local >= torch.cuda.device_count():
                raise StageError(f"process {local} finds {torch.cuda.device_count()} GPUs here; start as many as there "
                                 f"are with torchrun --nproc_per_node")
            torch.cuda.set_device(local)
        with default_signals():
            try:
                if self.device == "cuda":
                    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
                else:
                    dist.init_process_group("gloo")
            except (RuntimeError, ValueError) as error:
                raise StageError(f"the {self.world} processes did not find one another ({one_line(error)}); start "
                                 f"them with: torchrun --nproc_per_node={self.world} train.py") from None

    def agree(self, flag):
        """Whether any process says so: all stop together, or the others would wait forever."""
        if self.world == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared)
        return shared.item() > 0

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def leave(self):
        if self.world > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def default_signals():
    """SIGTERM and SIGINT end the process at once, also while it waits outside of Python."""
    before = {}
    with contextlib.suppress(ValueError):                # outside the main thread Python allows no handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def caught_signals():
    """A list to which SIGTERM and SIGINT are added from now on, where they can be caught (in the
    main thread).
    """
    caught = []

    def catch(number, _):
        caught.append(number)

    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, catch)
    return caught


def host_beside(init):
    """The model that what other arms of a root start from stands on; None: none, or none that can be read."""
    for path in init.parent.glob("init*/manifest.json"):
        with contextlib.suppress(StageError):
            if to := read_json(path, "add_memory.py").get("to"):
                return to
    return None


class Job:
    """What is asked for: the arm, the seed, where it lies, what it reads, and what is said of it.

    Raises StageError where an input is missing, damaged or of another version.
    """

    def __init__(self, args, settings):
        self.began = time.time()
        self.root = default_root(args.root, args.quick)
        self.arm, self.seed = args.arm, args.seed
        self.chained, self.planted = args.chained, args.planted
        self.about = about(args.arm)
        self.steps = args.steps or self.about.steps_of(settings.steps)
        self.settings = dataclasses.replace(settings, **self.about.training)
        self.following = command("eval.py --report", self.root, args.quick)
        if self.arm == "baseline":
            regime = regime_flags(vars(args))
            self.following = command(f"train.py --with-ltm{regime}", self.root, args.quick, args.seed or None)
        if self.arm in STUDY:
            self.following = command("eval.py --study", self.root, args.quick)
        init = arm_folder(self.root, self.seed, init_name(self.arm))
        made_by = init_command(self.arm, self.root, args.quick, args.seed, host_beside(init))
        self.tokenizer = load_tokenizer(self.root, args.quick)
        self.rows, self.meta = load_split(self.root, "train", args.quick)
        self.planted_data = None
        if self.planted:
            self.plant(command("prepare_data.py --planted", self.root, args.quick))
        manifest = read_manifest(init, made_by)
        start, self.host = manifest["files"], manifest.get("to")
        self.model = load_model(init, made_by=made_by)
        self.model.config.memory_enabled = self.about.memory is not None
        self.train_backbone = args.train_backbone
        if self.host:
            self.hold_still()
            if not self.train_backbone:
                faster = dict(lr=settings.frozen * settings.lr, min_lr=settings.frozen * settings.min_lr)
                self.settings = dataclasses.replace(self.settings, **faster)
        elif self.train_backbone:
            raise StageError(f"{init} was trained by nobody yet, so that its backbone learns in any case; leave "
                             f"--train-backbone out, or start from a model: "
                             + init_command(self.arm, self.root, args.quick, to="MODEL"))
        if self.about.config:
            self.reshape()
        window, width = self.model.config.stm_window, self.rows.shape[1]
        if not self.host and window < width:
            raise StageError(f"{init} has a window of {window} tokens, the rows of {self.root}/data have {width}; set "
                             f"both alike at the top of add_memory.py and prepare_data.py, and run: {made_by}")
        self.facts = self.all_facts(start)

    def hold_still(self):
        """Let what was trained already stay as it is: but for LoRA's matrices, or where
        --train-backbone asks for it.
        """
        if self.model.config.pad_token_id != self.meta["eot"]:
            raise StageError(f"the documents in {self.root}/data are not opened by token "
                             f"{self.model.config.pad_token_id}, as {self.host}'s are; prepare them with its own: "
                             + command(f"prepare_data.py --tokenizer {shlex.quote(self.host)}", self.root,
                                       self.meta["quick"]))
        for name, weight in self.model.backbone.named_parameters():
            weight.requires_grad_(self.train_backbone or "lora_" in name)

    def reshape(self):
        """Give the model the config of an arm of the study, and rows of its window: the weights stay."""
        config, weights = copy.deepcopy(self.model.config), self.model.state_dict()
        config.update(self.about.config)
        self.model = type(self.model)(config).eval()
        # the table of rotations is as long as the window asks for
        self.model.load_state_dict(weights | {"backbone.rotary": self.model.backbone.rotary})
        if "stm_window" in self.about.config:
            self.rows = recut(self.rows, config.stm_window)
            batch = self.about.batch_of(self.settings.batch, self.meta["window"])
            self.settings = dataclasses.replace(self.settings, batch=batch)

    def plant(self, made_by):
        """Put the rows of data/planted.bin behind the others; raises StageError where they are of
        other data.
        """
        path, real = self.root / "data" / "planted.bin", len(self.rows)
        about = read_json(path.with_suffix(".json"), made_by)
        ours = self.meta["splits"]["train"]["sha256"]
        if about.get("train_sha256") != ours or not path.is_file() or sha256(path) != about.get("sha256"):
            raise StageError(f"{path} is missing, damaged or of other data than train.bin; make it with: {made_by}")
        planted = np.fromfile(path, self.rows.dtype).reshape(-1, self.rows.shape[1])
        self.rows = np.concatenate((self.rows, planted))
        opens = np.flatnonzero(planted[:, 0] == self.meta["eot"])
        fewest, lane = np.diff(opens, append=len(planted)).min(), self.settings.lane
        if 2 * lane - 1 > fewest:                           # every second row: they overlap by half
            raise StageError(f"a lane of {lane} rows is longer than a planted document; lower lane at the top of "
                             f"train.py to at most {(fewest + 1) // 2}")
        self.first_planted = real + opens
        self.real_rows, self.planted_data = real, about["sha256"]

    def all_facts(self, start):
        """{name: value} of all that the outcome follows from."""
        s, about = self.settings, self.about
        of_host = dict(to=self.host, lora=about.lora, train_backbone=self.train_backbone) if self.host else {}
        return dict(of_host, arm=self.arm, memory=about.memory, memory_settings=about.settings, backbone=about.backbone,
                    config=about.config,
                    replay=about.replay, seed=self.seed, steps=self.steps,
                    chained=self.chained, planted=self.planted, batch=s.batch,
                    lane=s.lane, lr=s.lr, min_lr=s.min_lr, warmup=s.warmup, betas=[s.beta1, s.beta2], eps=s.eps,
                    weight_decay=s.weight_decay, clip=s.clip, data=self.meta["splits"]["train"]["sha256"],
                    planted_data=self.planted_data,
                    init=start["model.safetensors"], init_config=start["config.json"])

    def plan(self, world):
        """The Plan of this training's rows; raises StageError where `world` processes cannot share
        its batches.
        """
        real = self.rows[:self.real_rows] if self.planted else self.rows
        plan = plan_rows(real, self.steps, self.settings, self.seed, self.chained, self.meta["eot"])
        if self.planted:
            plan = with_planted(plan, self.first_planted, self.settings.lane, self.planted, self.seed)
        lanes = plan.opens.size(1)
        if lanes < world:
            what, rows = ("chained lane", self.settings.lane) if plan.chained_from < self.steps else ("row", 1)
            raise StageError(f"a step of {lanes} {what}{'s' * (lanes > 1)} cannot be shared by {world} processes; "
                             f"start fewer, or raise batch at the top of train.py to {world * rows}")
        return replayed(plan, self.about.replay, self.seed) if self.about.replay else plan

    def card(self, training, folder, loss):
        """README.md of the checkpoint; loss: what it says of it."""
        parameters = sum(p.numel() for p in self.model.parameters())
        learnt = sum(p.numel() for group in training.groups for p in group.parameters)
        window, width = self.model.config.stm_window, self.rows.shape[1]
        what = f"A memory on {self.host}" if self.host else (
            f"A GPT with a sliding attention window of {window} tokens (STM)")
        data = self.meta["splits"]["train"]
        return CARD.format(arm=self.arm, label=self.about.label, step=training.done, steps=self.steps, loss=loss,
                           what=what, parameters=parameters, learnt=learnt, source=self.meta["source"],
                           seed=self.seed, lr=self.settings.lr,
                           batch=self.settings.batch, width=width, chained=self.chained, documents=data["documents"],
                           tokens=data["tokens"], torch=torch.__version__, folder=folder,
                           device=device_name(training.device.type))


def parse(argv=None):
    parser = parser_of(__doc__)
    arms = parser.add_mutually_exclusive_group()
    for arm, its in ARMS.items():
        default = " (the default)" if arm == "baseline" else ""
        arms.add_argument(arm_flag(arm), dest="arm", action="store_const", const=arm, help=its.label + default)
    arms.add_argument("--study", dest="arm", choices=list(STUDY), metavar="NAME",
                      help=f"one of the study's: {', '.join(STUDY)}")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    again.add_argument("--fresh", action="store_true", help="remove an earlier run of this arm and start over")
    parser.add_argument("--chained", type=float, nargs="?", const=1.0, default=0.0, metavar="SHARE",
                        help="chain the rows of the last SHARE of the steps (all, where no share is given)")
    parser.add_argument("--planted", type=float, nargs="?", const=0.25, default=0.0, metavar="SHARE",
                        help="of the chained lanes, a share that asks for facts planted in it (0.25; see "
                             "prepare_data.py)")
    parser.add_argument("--train-backbone", action="store_true",
                        help="of a model that add_memory.py --to started from: its own weights learn, too")
    parser.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps (default {FULL.steps:,})")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="S", help="of weights and data (default 0)")
    args = parser.parse_args(argv)
    args.arm = args.arm or "baseline"
    if args.steps is not None and not 1 <= args.steps <= 10_000_000:
        parser.error("--steps must be from 1 to 10,000,000")
    if not 0 <= args.chained <= 1:
        parser.error("--chained takes a share from 0 to 1")
    if not 0 <= args.planted <= 1 or args.planted and not args.chained:
        parser.error("--planted takes a share from 0 to 1, of lanes: it goes with --chained")
    return args


def main(argv=None):
    args = parse(argv)
    processes = Processes()
    code = train(args, QUICK if args.quick else FULL, processes)
    processes.leave()                                    # not where one failed: the others would never come
    return code


def open_run(job, args, processes):
    """(run, its newest checkpoint or None, whether nothing is left to do), the folder locked and
    laid out by the first process.
    """
    made_by = {"commit": commit(), "torch": torch.__version__, "device": device_name(processes.device)}
    run = Run(arm_folder(job.root, job.seed, job.arm), job.facts, job.settings.keep, made_by)
    if processes.first:
        run.lock()
        if args.fresh:
            run.clear()
        elif not args.resume:
            run.refuse_another()
    processes.wait()
    resumed = run.newest()
    over = resumed is None and run.is_over(job.steps)
    processes.wait()
    if processes.first and not resumed and not over:
        run.clear()
        run.begin(job.model, job.tokenizer)
    return run, resumed, over


def resume(run, training, checkpoint, first):
    """Let `training` go on from a checkpoint (folder, weights, state); raises StageError where it
    does not fit.
    """
    folder, weights, state = checkpoint
    try:
        training.restore(weights, state)
    except torch.OutOfMemoryError:                       # a RuntimeError too, but no reason to start over
        raise
    except (KeyError, RuntimeError, TypeError) as error:
        raise StageError(f"{folder} does not fit this train.py ({one_line(error)}); start over with --fresh, not "
                         f"--resume") from None
    if first:
        run.publish(folder)                              # a kill may have come between the checkpoint and this


def train(args, settings, processes):
    """Train the arm, or what is left of it; returns the exit code."""
    caught = caught_signals()
    job = Job(args, settings)
    plan = job.plan(processes.world)
    torch.manual_seed(job.seed)                          # nothing draws from it; what would, would draw the same
    run, checkpoint, over = open_run(job, args, processes)
    if over:
        return all_done(run, job, processes)
    training = Training(job.model.to(processes.device), job.rows, plan, job.settings)
    if checkpoint:
        resume(run, training, checkpoint, processes.first)
    if training.done == job.steps:
        return all_done(run, job, processes)
    if not any(group.parameters for group in training.groups):
        if processes.first:
            save_still(run, training, job)
        return 0
    console = Console(run, training, job) if processes.first else Mute()
    if checkpoint and processes.first:
        console.checkpointed = training.done
    try:
        take_steps(training, console, lambda: processes.agree(bool(caught)))
    finally:
        training.release()
    console.end()
    if training.done < job.steps:
        return 128 + (caught or [signal.SIGTERM])[0]     # another process of torchrun's may be the one that was told
    return 0


def all_done(run, job, processes):
    """Say that nothing is left to do; the exit code."""
    if processes.first:
        print(f"{run.folder}: all {job.steps:,} steps are done already; next: {job.following}")
    return 0


def save_still(run, training, job):
    """Write what a training ends with where nothing learns (a frozen model without a memory): any
    number of steps would leave the weights as they are, so that none is taken.
    """
    training.done = job.steps                            # to all who compare arms it is a whole run
    run.save(training)
    (run.folder / "history.jsonl").touch()
    write_atomic(run.folder / "README.md", job.card(training, run.folder, "nothing learns"))
    say(f"nothing learns in {job.host} without --train-backbone, so that no step is taken; "
        f"wrote {run.folder}/ in {time.time() - job.began:.0f} s; next: {job.following}")


def take_steps(training, console, stopping):
    """All the steps that are left, unless stopping() says otherwise."""
    steps, ready = len(training.plan.rows), None
    while training.done < steps and not stopping():
        if ready != training.chained:                    # each regime has a step of its own
            ready, began = training.chained, time.time()
            console.started(training.accelerate(), time.time() - began)
            continue
        # one step at a time where a step takes long enough to be interrupted in
        training.run(training.ahead() if training.graph else 1)
        console.advanced()


if __name__ == "__main__":
    run_stage(main)
