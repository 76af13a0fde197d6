"""Train one arm: the hybrid with its long-term memory off (--baseline) or on (--with-ltm).

reads   data/train.bin, data/meta.json, trained/init/
writes  trained/baseline/ or trained/with_ltm/   the newest weights as a Hugging Face folder, history.jsonl,
                                                  checkpoints/step-NNNNNN/ (the last two, with the optimizer)

    python train.py --baseline              STM only (the default)
    python train.py --with-ltm              STM and LTM
    python train.py --with-ltm --resume     go on where it was stopped: the same bits as without the stop
    python train.py --baseline --quick      the small model under quick/, on any CPU
    torchrun --nproc_per_node=2 train.py --baseline     the same batch, shared by two processes

Both arms start from the same weights and see the same rows in the same order. On CUDA the whole step - rows
gathered, forward, backward, clipping, AdamW, statistics - is one CUDA graph, which the host only replays.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from models import (EOT, StageError, Wandb, arm_folder, command, compiled, default_root, has_compiler, load_model,
                    load_split, load_tokenizer, lower_precision, manifest_of, pick_device, read_json, read_manifest,
                    run_stage, save_model, sha256, write_atomic, write_json)

STEPS = 10_000
BATCH = 8                       # rows of 128 tokens a step
LR, MIN_LR = 5e-4, 5e-5         # cosine from one to the other
WARMUP = 500                    # steps of linear warm-up before
BETAS, EPS = (0.9, 0.95), 1e-8
WEIGHT_DECAY = 0.1              # of matrices; vectors have none
CLIP = 1.0                      # gradient norm, of the backbone and of the LTM apart: neither can swamp the other
LOG_EVERY = 50                  # steps; a logged value is their mean
CHECKPOINT_STEPS = 5_000
KEEP = 2                        # checkpoints
QUICK = dict(STEPS=200, BATCH=2, WARMUP=20, LOG_EVERY=10, CHECKPOINT_STEPS=100)

STATISTICS = ("loss", "routed_token_ratio", "avg_surprisal_routed", "ltm_hit_rate", "grad_norm", "grad_norm_ltm")


# ------------------------------------------------------------------------------------ the training step

def learning_rates(steps):
    """Linear warm-up, then a cosine to MIN_LR: float32 (steps,)."""
    step = torch.arange(steps, dtype=torch.float64)
    progress = ((step - WARMUP) / max(1, steps - WARMUP)).clamp(0, 1)
    cosine = MIN_LR + (LR - MIN_LR) * 0.5 * (1 + (math.pi * progress).cos())
    return torch.where(step < WARMUP, LR * (step + 1) / WARMUP, cosine).float()


def row_order(rows, steps, batch, seed):
    """Which rows each step sees: (steps, batch) int64; a new permutation each epoch, the same for both arms."""
    need = steps * batch
    epochs = [np.random.default_rng((seed, epoch)).permutation(rows) for epoch in range(-(-need // rows))]
    return torch.from_numpy(np.concatenate(epochs)[:need].reshape(steps, batch))


def norms_of(tensors):
    """2-norms of some tensors, float32 (len(tensors),); in one pass over all of a dtype: mixed, each takes its own."""
    found = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        found.update(zip(places, torch._foreach_norm([tensors[i] for i in places], 2, torch.float32)))
    return torch.stack([found[i] for i in range(len(tensors))])


def adamw(weight, master, gradient, first, second, decay, rate, step, norm, halted):
    """One AdamW step (Loshchilov & Hutter 2019) on a float32 master; `weight`, or None, is its copy to compute with.

    `norm`: of all gradients that are clipped together; above CLIP they are scaled down to it. `halted` (a bool tensor)
    keeps the weights. Compiled, all this is one pass over memory; elsewhere it runs as it stands.
    """
    b1, b2 = BETAS
    gradient = gradient.float() * (CLIP / norm).clamp(max=1)
    first.lerp_(gradient, 1 - b1)
    second.lerp_(gradient * gradient, 1 - b2)
    update = first / (second / (1 - b2 ** step)).sqrt_().add_(EPS)
    update = update.mul_(rate / (1 - b1 ** step)).add_(master * (rate * decay))
    master.sub_(torch.where(halted, 0.0, update))
    if weight is not None:
        weight.copy_(master)


class Group:
    """Parameters that are clipped together, and AdamW's state of them (float32, also where they compute in bf16)."""

    def __init__(self, named):
        self.names, self.parameters = list(named), list(named.values())
        self.weights = [p.detach() for p in self.parameters]
        self.masters = [w if w.dtype == torch.float32 else w.float() for w in self.weights]
        self.first = [torch.zeros_like(p) for p in self.masters]
        self.second = [torch.zeros_like(p) for p in self.masters]
        self.decay = [WEIGHT_DECAY if p.dim() > 1 else 0.0 for p in self.masters]

    def state(self):
        """{"exp_avg.NAME": .., "exp_avg_sq.NAME": ..}, the tensors themselves."""
        pairs = (("exp_avg", self.first), ("exp_avg_sq", self.second))
        return {f"{kind}.{name}": x for kind, tensors in pairs for name, x in zip(self.names, tensors)}


class Training:
    """The state of a run on one device, and its step.

    Args:
        model: a RevenaHybridTiny on `device`, float32; `lower_precision` is applied here.
        rows: (N, 128) uint16 array. order: (steps, batch) row numbers.
    """

    def __init__(self, model, rows, order):
        self.device = next(model.parameters()).device
        named = {name: p.detach().clone() for name, p in model.named_parameters()}       # the float32 originals
        self.model = lower_precision(model).train()
        on = model.config.ltm_enabled
        groups = [Group({n: p for n, p in model.named_parameters() if n.startswith(prefix)})
                  for prefix in ("backbone.", "memory.")[:1 + on]]
        for group in groups:
            for name, master in zip(group.names, group.masters):
                master.copy_(named[name])
        self.groups = groups
        self.rows = torch.from_numpy(rows.astype(np.int32)).to(self.device)
        self.order = order.to(self.device)
        self.rates = learning_rates(len(order)).to(self.device)
        self.statistics = torch.zeros(len(order), len(STATISTICS), device=self.device)
        self.done = 0                                                                    # on the host
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)                   # the same, on the device
        self.halted = torch.zeros((), dtype=torch.bool, device=self.device)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.objective, self.update, self.graph = self._objective, adamw, None

    def _objective(self, tokens, embedded, targets_in_batch):
        """-objective summed over this process's rows / targets in the whole batch; that and the statistics' sums."""
        targets = F.pad(tokens[:, 1:], (0, 1), value=EOT)
        scores = self.model.score(tokens, targets, embedded=embedded)
        real = targets != EOT
        total = lambda x: torch.where(real, x, 0.0).sum()
        bits = torch.where(scores.stored, -scores.log_p_stm / math.log(2), 0.0)
        loss = -total(scores.objective) / targets_in_batch
        sums = torch.stack((loss, -total(scores.log_p), scores.stored.sum(), bits.sum(), (scores.hit & real).sum()))
        return loss, sums.detach()

    def lay(self, x):
        """A parameter's elements as rows of the model's width, where they fill them: AdamW does not mind, and is
        compiled for the first of them and for any number of rows, not for each size."""
        width = self.model.config.n_embd
        return x.view(-1, width) if x.numel() % width == 0 else x

    def step(self):
        """One optimizer step, without a word to the host."""
        batch = self.rows[self.order.index_select(0, self.at)[0]].long()
        targets_in_batch = (batch[:, 1:] != EOT).sum().clamp(min=1)
        tokens = batch.tensor_split(self.world)[self.rank]
        embed = self.model.backbone.embed.weight
        embedded = F.embedding(tokens, embed.detach()).requires_grad_()
        loss, sums = self.objective(tokens, embedded, targets_in_batch)
        parameters = [p for group in self.groups for p in group.parameters]
        *gradients, looked_up = torch.autograd.grad(loss, [*parameters, embedded])

        # the embedding is also the output matrix, whose gradient is whole; the look-up adds to its own rows alone.
        # Rows of equal tokens are summed by a matrix product and written with equal values: no atomics, same bits
        flat, looked_up = tokens.flatten(), looked_up.flatten(0, 1)
        same = (flat[:, None] == flat).to(looked_up.dtype)
        whole = gradients[[p is embed for p in parameters].index(True)]
        whole[flat] += (same @ looked_up).to(whole.dtype)
        if self.world > 1:
            for tensor in (*gradients, sums):
                dist.all_reduce(tensor)

        rate, step = self.rates.index_select(0, self.at)[0], (self.at[0] + 1).float()
        norms = [part.norm() for part in norms_of(gradients).split([len(group.parameters) for group in self.groups])]
        loss, nats, stored, bits, hits = sums                            # of all processes
        row = torch.stack((nats / targets_in_batch, stored / targets_in_batch, bits / stored.clamp(min=1),
                           hits / targets_in_batch, norms[0], norms[1] if len(norms) > 1 else norms[0] * 0, loss))
        # NaN, Inf: nothing moves from here on, and the statistics tell the host
        self.halted |= ~torch.isfinite(row).all()
        row = row[:-1].masked_fill_(self.halted, math.nan)
        rest = iter(gradients)
        for group, norm in zip(self.groups, norms):
            share = [next(rest) for _ in group.parameters]
            laid = ([self.lay(x) for x in tensors] for tensors in (group.masters, share, group.first, group.second))
            copies = [None if w is p else self.lay(w) for w, p in zip(group.weights, group.masters)]
            for *tensors, decay in zip(copies, *laid, group.decay):
                self.update(*tensors, decay, rate, step, norm, self.halted)
        self.statistics.index_copy_(0, self.at, row[None])
        self.at += 1

    def run(self, steps):
        """Take `steps` steps; returns at once where a CUDA graph is replayed."""
        for _ in range(steps):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
        self.done += steps

    def accelerate(self):
        """Compile the step and capture it as a CUDA graph where that can be had; returns one line that says so.

        Takes three steps (the warm-up that capture asks for): they are steps like any other.
        """
        if self.device.type != "cuda":
            return f"plain PyTorch step on {self.device.type} (no CUDA)"
        if self.world > 1:
            return "plain PyTorch step, shared by several processes"
        how = "compiled and captured as one CUDA graph"
        if has_compiler(self.device):
            self.objective = compiled(self._objective, dynamic=False)
            self.update = compiled(adamw)
        else:
            how = "captured as one CUDA graph, not compiled (that takes Triton, a C compiler and Python's headers)"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(3, len(self.order) - self.done)):
                self.run(1)
        torch.cuda.synchronize()
        if self.done < len(self.order):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.step()                                              # recorded, not run
            self.graph = graph
        return how

    def state(self):
        """Everything a resumed run needs beside the weights: optimizer, statistics so far. On the CPU."""
        tensors = {k: v for group in self.groups for k, v in group.state().items()}
        tensors["statistics"] = self.statistics[:self.done]
        tensors["rng"] = torch.get_rng_state()
        return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}

    def weights(self):
        """All the model's float32 tensors by name: masters, the LTM's weights also where it is off, buffers."""
        masters = {n: p for group in self.groups for n, p in zip(group.names, group.masters)}
        return {n: masters.get(n, x).detach().float().cpu() if x.is_floating_point() else x.cpu()
                for n, x in self.model.state_dict().items()}

    def restore(self, weights, state):
        """Go on from what `weights()` and `state()` gave."""
        for group in self.groups:
            for name, w, p in zip(group.names, group.weights, group.masters):
                p.copy_(weights[name])
                w.copy_(p)
            for name, x in group.state().items():
                x.copy_(state[name])
        self.done = len(state["statistics"])
        self.statistics[:self.done] = state["statistics"].to(self.device)
        self.at.fill_(self.done)
        torch.set_rng_state(state["rng"])


# ------------------------------------------------------------------------------------ checkpoints

def fsync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class Run:
    """The folder of a run: what it was started with, its checkpoints, its newest weights, its history.

    A checkpoint is written aside, its manifest (hashes) last, and renamed; older ones go only after that. The
    folder's own model.safetensors is replaced in one rename, and manifest.json names the new hash before that beside
    the old one, so that whoever reads the folder at any time finds a whole model that its manifest knows.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.checkpoints = folder / "checkpoints"

    def lock(self):
        """Hold the folder until this process ends; raises StageError where another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StageError(f"another training run is writing {self.folder}; wait for it or stop it") from None
        for path in self.folder.glob(".*.tmp"):          # left by a run that was killed
            path.unlink()

    def clear(self):
        """Remove an earlier run."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def saved(self):
        """Checkpoint folders, newest first."""
        return sorted(self.checkpoints.glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)

    def last(self):
        """The newest checkpoint, in words."""
        return f"the last good checkpoint is {next(iter(self.saved()), 'none')}"

    def manifest(self):
        """What manifest.json holds: step, weights {hash: step}, settings; nothing where it is missing or damaged."""
        try:
            found = read_json(self.folder / "manifest.json", "train.py")
        except StageError:
            return {}
        return found if all(isinstance(found.get(name), dict) for name in ("weights", "settings")) else {}

    def differing(self, theirs):
        """The settings that differ from `theirs`, as text with both values; hashes shortened."""
        short = lambda value: value[:12] if isinstance(value, str) else value
        return ", ".join(f"{name} was {short(theirs.get(name))}, is {short(value)}"
                         for name, value in self.settings.items() if theirs.get(name) != value)

    def refuse_another(self):
        """Raise StageError where the folder holds a run already."""
        if self.saved() or (self.folder / "manifest.json").exists():
            theirs = self.manifest()
            differing = self.differing(theirs.get("settings", {}))
            raise StageError(f"{self.folder} holds a run already, at step {theirs.get('step')}" +
                             (f", with other settings ({differing}); " if differing else "; go on with --resume, or ") +
                             "start over with --fresh")

    def newest(self):
        """(folder, weights, state) of the newest whole checkpoint, damaged ones named and passed over; None: no run.

        Raises StageError where the run was started with other settings, or where no checkpoint is whole.
        """
        for folder in self.saved():
            try:
                theirs = read_manifest(folder).get("settings", {})
                weights, state = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
                if not all(x.isfinite().all() for x in weights.values()):
                    raise StageError(f"{folder} holds weights that are NaN or infinite")
            except (StageError, OSError, SafetensorError) as error:
                tqdm.write(f"{folder} is passed over: {str(error).partition(';')[0]}", file=sys.stderr)
                continue
            if differing := self.differing(theirs):
                raise StageError(f"{folder} is of a run with other settings ({differing}); set them back, or start "
                                 f"over with --fresh in place of --resume")
            return folder, weights, state
        if self.saved():
            raise StageError(f"no checkpoint in {self.checkpoints} is whole; start over with --fresh, not --resume")
        return None

    def begin(self, model, tokenizer):
        """Lay out the folder, so that it loads from the first moment: config, code, tokenizer, initial weights."""
        save_model(model, tokenizer, self.folder)
        self.describe(0, {sha256(self.folder / "model.safetensors"): 0})

    def describe(self, step, hashes):
        config = self.manifest().get("config") or sha256(self.folder / "config.json")    # as it was at the start
        write_json(self.folder / "manifest.json", {"step": step, "weights": hashes, "config": config,
                                                   "settings": self.settings})

    def save(self, training):
        """Write a checkpoint of `training` and make its weights the folder's own."""
        final = self.checkpoints / f"step-{training.done:06d}"
        aside = self.checkpoints / ".saving.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(training.weights(), aside / "model.safetensors", metadata={"format": "pt"})
            save_file(training.state(), aside / "optimizer.safetensors")
            fsync(aside / "model.safetensors")
            fsync(aside / "optimizer.safetensors")
            manifest_of(aside, step=training.done, settings=self.settings)
            if final.exists():
                shutil.rmtree(final)                     # a damaged one that was passed over
            os.replace(aside, final)
            self.publish(final)
        except Exception as error:                       # a full disk is an OSError here, safetensors' own error there
            shutil.rmtree(aside, ignore_errors=True)
            raise StageError(f"the checkpoint of step {training.done} could not be written ({error}); {self.last()}; "
                             f"mend that (free some space?), then run the same command with --resume") from None
        for old in self.saved()[KEEP:]:
            shutil.rmtree(old)

    def publish(self, checkpoint):
        """Make a checkpoint's weights the folder's own."""
        model, fresh = self.folder / "model.safetensors", self.folder / ".model.safetensors.tmp"
        theirs = read_json(checkpoint / "manifest.json", "train.py")
        known, now = self.manifest().get("weights", {}), sha256(model) if model.exists() else None
        new = {theirs["files"]["model.safetensors"]: theirs["step"]}
        if now in new and now in known:
            return
        try:
            fresh.unlink(missing_ok=True)
            try:
                os.link(checkpoint / "model.safetensors", fresh)
            except OSError:                              # a file system without hard links
                shutil.copyfile(checkpoint / "model.safetensors", fresh)
            self.describe(theirs["step"], {**({now: known[now]} if now in known else {}), **new})
            os.replace(fresh, model)
        finally:
            fresh.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ what a run says

class History:
    """history.jsonl: a line every LOG_EVERY steps, the mean of its steps. Read back a whole interval late, so that the
    device never waits for the host."""

    def __init__(self, run, training, enabled, wandb):
        self.run, self.training, self.enabled, self.wandb = run, training, enabled, wandb
        self.rates = learning_rates(len(training.order))  # here on the host: reading the device's would wait for it
        self.pending = []                                # (end step, statistics on the host, when the device was there)
        self.restart()
        path, timing = run.folder / "history.jsonl", {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                old = json.loads(line)
                timing[old["step"]] = {name: old[name] for name in ("tok/sec", "ETA")}
            except (ValueError, KeyError, TypeError):
                continue                                 # cut off by a crash: made again below
        self.noted = training.done - training.done % LOG_EVERY
        lines = [{**self.entry(end, training.statistics[end - LOG_EVERY:end].cpu(), None), **timing.get(end, {})}
                 for end in range(LOG_EVERY, self.noted + 1, LOG_EVERY)]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file = open(path, "a")

    def restart(self):
        """Time the next interval from here: what came before (compiling, a checkpoint) is not training."""
        self.mark, self.since = self.now(), self.training.done

    def now(self):
        """This point of the run: seconds on the CPU, an event that a GPU will pass."""
        if self.training.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def entry(self, end, rows, pace):
        """The line of the interval that ends with step `end`; rows: its statistics; pace: seconds a step, or None."""
        means = dict(zip(STATISTICS, rows.double().mean(0).tolist()))
        # routed surprisal is a mean over routed tokens, not over steps: weigh each step by the share that it routed
        routed = rows[:, 1].double()
        means["avg_surprisal_routed"] = float((rows[:, 2].double() * routed).sum() / routed.sum().clamp(min=1e-12))
        steps, batch = self.training.order.shape
        rate, left = (batch * self.training.rows.size(1) / pace, (steps - end) * pace) if pace else (None, None)
        return {"step": end, "LTM_enabled": self.enabled, **means, "lr": float(self.rates[end - 1]),
                "tok/sec": rate, "ETA": left}

    def note(self):
        """Fetch the intervals that have been asked for by now, without waiting."""
        for end in range(self.noted + LOG_EVERY, self.training.done + 1, LOG_EVERY):
            rows = self.training.statistics[end - LOG_EVERY:end]
            host = torch.empty(rows.shape, pin_memory=rows.is_cuda).copy_(rows, non_blocking=True)
            self.pending.append((end, host, self.now()))
            self.noted = end

    def settle(self, keep=0):
        """Write the lines of all pending intervals but the last `keep`; returns the last entry, or None.

        With none left pending, every step so far is known to be finite: a checkpoint may be written.
        """
        entry = None
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
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
            self.wandb.log(entry)
        if not keep:
            self.refuse_nan(0, self.training.statistics[:self.training.done].cpu())
        return entry

    def refuse_nan(self, start, rows):
        """Raise StageError where a loss or gradient after step `start` is not finite: the device stopped there."""
        bad = (~torch.isfinite(rows).all(1)).nonzero()
        if len(bad):
            raise StageError(f"the loss or its gradient is not finite at step {start + int(bad[0]) + 1}, and no weight "
                             f"was updated from there on; {self.run.last()}; lower LR in train.py and start over with "
                             f"--fresh")


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# RevenaHybridTiny: {arm}

A GPT of {parameters:,} parameters with a sliding attention window of 128 tokens (STM) and a surprisal-routed memory of
256 items outside the network (LTM), {state}. The weights of step {step:,} of {steps:,}.

| | |
|---|---|
| data | {source}: {documents:,} documents, {tokens:,} tokens |
| training loss (nats a token) | {loss:.4f} |
| seed, batch, learning rate | {seed}, {batch} rows of 128 tokens, {lr} |
| torch, device | {torch}, {device} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
text = tokenizer("The memory of", return_tensors="pt")
memory = model.new_memory()     # or model.load_memory("memory.safetensors"), which memory.save(..) wrote
print(tokenizer.decode(model.generate(**text, max_new_tokens=50, past_key_values=memory)[0]))
```

After more training, call `model.eval()` before it predicts: how it weighs what it retrieves differs from training.

Limits: a small model trained on little text to answer one question (does a memory help?); it knows next to nothing,
repeats itself, and says whatever its data said.
"""


def distributed():
    """Join torchrun's process group where there is one; the device of this process."""
    device = pick_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return device


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def whole(text):
        if not 0 <= (number := int(text)) < 2 ** 32:
            raise ValueError
        return number

    whole.__name__ = "whole number"
    arm = parser.add_mutually_exclusive_group()
    arm.add_argument("--baseline", action="store_true", help="short-term memory only (the default)")
    arm.add_argument("--with-ltm", action="store_true", help="short- and long-term memory")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    again.add_argument("--fresh", action="store_true", help="remove an earlier run of this arm and start over")
    parser.add_argument("--steps", type=whole, metavar="N", help=f"optimizer steps (default {STEPS:,})")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="of weights and data order (default 0)")
    parser.add_argument("--root", metavar="DIR", help="folder of data/ and trained/ (default: this one)")
    parser.add_argument("--quick", action="store_true", help="the small setting, under quick/")
    args = parser.parse_args(argv)
    if args.steps is not None and not 1 <= args.steps <= 10_000_000:
        parser.error("--steps must be from 1 to 10,000,000")
    return args


def main(argv=None):
    args = parse(argv)
    if args.quick:
        globals().update(QUICK)
    code = train(args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def train(args):
    """Train the arm, or what is left of it; returns the exit code."""
    began = time.time()
    root, arm = default_root(args.root, args.quick), "with_ltm" if args.with_ltm else "baseline"
    following = (command("train.py --with-ltm", root, args.quick, args.seed or None) if arm == "baseline" else
                 command("eval.py", root, args.quick))
    steps, device = args.steps or STEPS, distributed()
    first = not dist.is_initialized() or dist.get_rank() == 0
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: stop.append(caught))

    tokenizer = load_tokenizer(root, args.quick)
    rows, meta = load_split(root, "train", args.quick)
    init = arm_folder(root, args.seed, "init")
    made_by = command("add_memory.py", root, args.quick, args.seed)
    start = read_manifest(init, made_by)["files"]
    model = load_model(init, made_by=made_by)
    model.config.ltm_enabled = args.with_ltm
    torch.manual_seed(args.seed)                         # nothing draws from it; what would, would draw the same
    settings = dict(arm=arm, seed=args.seed, steps=steps, batch=BATCH, lr=LR, min_lr=MIN_LR, warmup=WARMUP,
                    betas=list(BETAS), eps=EPS, weight_decay=WEIGHT_DECAY, clip=CLIP,
                    data=meta["splits"]["train"]["sha256"], init=start["model.safetensors"],
                    init_config=start["config.json"])

    run = Run(arm_folder(root, args.seed, arm), settings)
    if first:
        run.lock()
        if args.fresh:
            run.clear()
        elif not args.resume:
            run.refuse_another()
    if dist.is_initialized():
        dist.barrier()
    resumed = run.newest()
    if first and not resumed:
        run.clear()
        run.begin(model, tokenizer)
    training = Training(model.to(device), rows, row_order(len(rows), steps, BATCH, args.seed))
    if resumed:
        try:
            training.restore(*resumed[1:])
        except torch.OutOfMemoryError:                   # a RuntimeError too, but no reason to start over
            raise
        except (KeyError, RuntimeError, TypeError) as error:
            raise StageError(f"{resumed[0]} does not fit this train.py ({error}); start over with --fresh, not "
                             f"--resume") from None
        if first:
            run.publish(resumed[0])                      # a kill may have come between the checkpoint and this
    if training.done == steps:
        if first:
            print(f"{run.folder}: all {steps:,} steps are done already; next: {following}")
        return

    warn = lambda what: tqdm.write(f"{what}; history.jsonl holds the same numbers", file=sys.stderr)
    wandb = Wandb(run.folder, args.seed, arm, settings, __file__, warn) if first else None
    history = History(run, training, args.with_ltm, wandb) if first else None
    if first:
        print(f"{arm}, seed {args.seed}: {steps:,} steps of {BATCH} x {rows.shape[1]} tokens, "
              f"{len(rows):,} rows, from step {training.done:,}", flush=True)

    bar = tqdm(total=steps, initial=training.done, unit="step", disable=None if first else True, smoothing=0.05)
    said, warm = time.time(), training.done
    how = training.accelerate()
    if first:
        tqdm.write(f"{how}, ready after {time.time() - said:.0f} s")
        history.restart()
    last_entry, checkpointed = None, training.done if resumed else -1
    while training.done < steps:
        stopping = bool(stop)
        if training.world > 1:                           # all stop together, or the others would wait forever
            flag = torch.tensor(float(stopping), device=device)
            dist.all_reduce(flag)
            stopping = flag.item() > 0
        if stopping:
            break
        # up to the next log line or checkpoint; one step at a time where a step takes long enough to be interrupted in
        ahead = (every - training.done % every for every in (LOG_EVERY, CHECKPOINT_STEPS))
        count = min(*ahead, steps - training.done) if training.graph else 1
        training.run(count)
        if first:
            bar.update(training.done - warm)
            warm = training.done
            if training.done % LOG_EVERY == 0:
                history.note()
                last_entry = history.settle(keep=1 if training.graph else 0) or last_entry
                if last_entry:
                    bar.set_postfix(LTM_enabled=args.with_ltm, loss=f"{last_entry['loss']:.3f}",
                                    routed_token_ratio=f"{last_entry['routed_token_ratio']:.2f}",
                                    avg_surprisal_routed=f"{last_entry['avg_surprisal_routed']:.1f}",
                                    ltm_hit_rate=f"{last_entry['ltm_hit_rate']:.2f}",
                                    **{"tok/sec": f"{last_entry['tok/sec'] or 0:,.0f}"})
                    if bar.disable and last_entry["step"] % max(LOG_EVERY, steps // 10) == 0:
                        print(f"step {last_entry['step']:,}: loss {last_entry['loss']:.4f}, "
                              f"{last_entry['tok/sec'] or 0:,.0f} tok/sec, ETA {last_entry['ETA'] or 0:.0f} s",
                              flush=True)
            if training.done % CHECKPOINT_STEPS == 0 and training.done < steps:
                last_entry = history.settle() or last_entry
                run.save(training)
                checkpointed = training.done
                history.restart()
    bar.close()
    if not first:
        return
    history.note()
    history.settle()
    loss = float(training.statistics[max(0, training.done - LOG_EVERY):training.done, 0].mean())
    write_atomic(run.folder / "README.md", CARD.format(
        arm=arm, state="switched on" if args.with_ltm else "switched off", step=training.done, steps=steps, loss=loss,
        parameters=sum(p.numel() for p in model.parameters()), source=meta["source"], seed=args.seed, batch=BATCH,
        lr=LR, documents=meta["splits"]["train"]["documents"], tokens=meta["splits"]["train"]["tokens"],
        torch=torch.__version__, folder=run.folder,
        device=torch.cuda.get_device_name() if device == "cuda" else device))
    if training.done != checkpointed:
        run.save(training)
    wandb.finish()
    if training.done < steps:
        print(f"stopped at step {training.done:,} and saved; go on with --resume", file=sys.stderr)
        return 128 + (stop or [signal.SIGTERM])[0]       # another process of torchrun's may be the one that was told
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")
    print(f"loss {loss:.4f}; wrote {run.folder}/ in {time.time() - began:.0f} s; next: {following}")


if __name__ == "__main__":
    run_stage(main)
