"""What tests/bench.py times: each function here makes one contender, a Case, out of a Setup.

Training: train.py's own step, of each arm and in both regimes; the baseline's without its graph, and without a compiler;
a loop like nanoGPT's; Hugging Face's Trainer; the two measured limits of the floor, a matrix product and a copy; the
baseline's step shared by several processes, each with a GPU of its own (torchrun starts this file).
Evaluation: scoring packed documents. Generation: one token after another.
"""

import contextlib
import copy
import dataclasses
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import transformers
from torch.nn import functional as F

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import add_memory                                                                   # noqa: E402
import eval as evaluation                                                           # noqa: E402
import train                                                                        # noqa: E402
from models import EOT, GPT, SIZES, Memory, RevenaCache, RevenaConfig               # noqa: E402
from stages import (ARMS, SPECIFIED, StageError, load_split, lower_precision,   # noqa: E402
                    model_class, pick_device)

REFERENCE, SPECIFIED_MEMORY = SPECIFIED                 # what is compared with what, where only one memory can be

CAP = 8e9                       # bytes that a training may take while it starts: those of a small consumer GPU
CALLS = 10_000                  # of a contender in one window, at most
STEPS = 8 * CALLS               # steps laid out: more than all windows take
C = 128                         # tokens in a row
DOCUMENT = 16                   # rows of one, where tokens are random
LOG_INTERVAL = 10               # steps; so often nanoGPT reads its loss
SHARED_STEPS, SHARED_ROUNDS = 400, 3    # of each training that processes share
# documents: length in rows, and how many of them, beside one document of as many rows
FULL = dict(size="70M", seconds=1.5, warm=5, documents=(16, 32), generated=64, lengths=(128, 512, 2048, 4096),
            product=8192, copied=1 << 30)
SMALL = dict(size="quick", seconds=0.3, warm=1, documents=(2, 4), generated=16, lengths=(128,), product=1024,
             copied=1 << 26)


class Case(NamedTuple):
    """A contender: seconds(n) is the time of n calls, each worth `units` (steps, tokens, operations, bytes)."""

    seconds: Callable
    units: int = 1
    most: int = CALLS


class Skip(Exception):
    """What can't be measured here, and why."""


def has_memory(arm):
    """Whether the memory of an arm is there: a class that has registered itself."""
    memory = ARMS[arm].memory
    try:
        model_class(memory)
    except (ImportError, AttributeError):
        return False
    return memory is None or memory in Memory.kinds


def in_regime(arm, chained):
    """What an arm's training is called: "with_ltm", or "with_ltm, chained"."""
    return f"{arm}, chained" if chained else arm


class Setup:
    """What the contenders share: device, sizes, rows of tokens, initial weights; train.py's step once it is made."""

    def __init__(self, root):
        self.root, self.device = root, pick_device()
        self.cuda = self.device == "cuda"
        self.set = SimpleNamespace(**FULL if self.cuda else SMALL)
        self.settings = train.FULL if self.cuda else train.QUICK
        self.starts, self.trainings, self.started = {}, {}, {}
        try:
            self.rows, self.data = load_split(root, "train")[0], f"{root}/data/train.bin"
        except StageError:
            self.rows, self.data = np.random.default_rng(0).integers(0, EOT, (4096, C), np.uint16), "random tokens"
            self.rows[::DOCUMENT, 0] = EOT
        self.tokens = np.resize(np.asarray(self.rows[:8192]), (8192, C)).astype(np.int64)

    def sync(self):
        getattr(torch, self.device).synchronize()

    def case(self, run, units=1, most=CALLS):
        """The Case of run(n)."""
        def seconds(calls):
            self.sync()
            began = time.perf_counter()
            run(calls)
            self.sync()
            return time.perf_counter() - began
        return Case(seconds, units, most)

    def model(self, arm):
        """A copy of an arm's initial weights, float32."""
        if arm not in self.starts:
            shape = add_memory.Settings(size=self.set.size)
            self.starts[arm] = add_memory.make_models(shape, 0, arm)[1]
        model = copy.deepcopy(self.starts[arm])
        model.config.memory_enabled = ARMS[arm].memory is not None
        return model.to(self.device)

    def training(self, arm, chained):
        plan = train.plan_rows(self.rows, STEPS, self.settings, 0, float(chained))
        return train.Training(self.model(arm), self.rows, plan, self.settings)


def repeated(call):
    def run(calls):
        for _ in range(calls):
            call()
    return run


# ------------------------------------------------------------------------------------ training

def accelerated(setup, arm, chained=False):
    """train.py's own way, started while it may take 8 GB and no more; `setup.started` says what that took."""
    name = in_regime(arm, chained)
    if name in setup.trainings:
        return setup.trainings[name]
    if setup.cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (reserved + CAP) / total))
    try:
        training, began = setup.training(arm, chained), time.perf_counter()
        facts = {"step": training.accelerate()}
        setup.sync()
        facts["seconds"] = time.perf_counter() - began
        training.run(setup.set.warm)
        if bool(training.halted):
            raise ValueError("the loss or its gradient is not finite")
        if setup.cuda:
            facts |= {"peak_gib": (torch.cuda.max_memory_allocated() - held) / 2 ** 30, "capped_at": min(CAP, total),
                      "reserved_gib": (torch.cuda.max_memory_reserved() - reserved) / 2 ** 30}
    finally:
        if setup.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    setup.trainings[name], setup.started[name] = training, facts
    return training


def own_step(setup, arm, chained=False):
    return setup.case(accelerated(setup, arm, chained).run)


def without_graph(setup, arm, compile):
    """An arm's step launched kernel by kernel: compiled, or as eager PyTorch."""
    if not setup.cuda:
        raise Skip(f"on {setup.device} the step is the plain one anyway")
    if not compile:
        return setup.case(setup.training(arm, False).run)
    training = accelerated(setup, arm)

    def run(steps):
        graphs, training.graphs = training.graphs, {}
        try:
            training.run(steps)
        finally:
            training.graphs = graphs                    # the arm's own, which takes its turn as well
    return setup.case(run)


def conventional(setup, arm, folder):
    """The same model trained as nanoGPT's train.py does it: batches, precision, optimizer, logging."""
    device, path, settings = setup.device, Path(folder) / "train.bin", setup.settings
    np.asarray(setup.rows).tofile(path)
    model = setup.model(arm).train()
    parameters = list(model.backbone.parameters())                                       # matrices: all decay
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2),
                                  weight_decay=settings.weight_decay, fused=setup.cuda)
    rates = train.learning_rates(STEPS, settings).tolist()

    def loss_of(tokens, targets):
        h, _ = model.states(tokens)
        return F.cross_entropy(model.logits(h).flatten(0, 1), targets.flatten())

    def get_batch():
        data = np.memmap(path, np.uint16, mode="r")
        starts = torch.randint(len(data) - C, (settings.batch,))
        pair = [torch.stack([torch.from_numpy(data[i + shift:i + shift + C].astype(np.int64)) for i in starts])
                for shift in (0, 1)]
        return [x.pin_memory().to(device, non_blocking=True) if setup.cuda else x.to(device) for x in pair]

    loss_of = torch.compile(loss_of) if setup.cuda else loss_of
    at = SimpleNamespace(step=0, batch=get_batch())

    def step():
        for group in optimizer.param_groups:
            group["lr"] = rates[at.step]
        with torch.autocast(device, torch.bfloat16, enabled=setup.cuda):
            loss = loss_of(*at.batch)
        at.batch = get_batch()                                                           # while the GPU is busy
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if at.step % LOG_INTERVAL == 0:
            loss.item()
        at.step += 1
    return setup.case(repeated(step))


def hugging_face(setup, folder):
    """Trainer as it comes, with GPT-2 of the same layers, width, heads, batch and precision; no dropout, no logging."""
    if not importlib.util.find_spec("accelerate"):
        raise Skip("Trainer wants accelerate, which is not installed (pip install accelerate)")
    transformers.logging.set_verbosity_error()
    template = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **SIZES[setup.set.size], n_positions=C, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False))
    data = [{"input_ids": row, "labels": row} for row in setup.tokens]
    warm, times, settings = setup.set.warm, {}, setup.settings

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if state.global_step in (warm, state.max_steps):
                setup.sync()
                times[state.global_step] = time.perf_counter()

    def seconds(steps):
        gc.collect()
        times.clear()
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=warm + steps, per_device_train_batch_size=settings.batch, bf16=setup.cuda,
            use_cpu=setup.device == "cpu", learning_rate=settings.lr, weight_decay=settings.weight_decay,
            adam_beta2=settings.beta2, max_grad_norm=settings.clip, logging_strategy="no", save_strategy="no",
            eval_strategy="no", report_to="none", disable_tqdm=True)
        # a copy each time: Trainer wraps a model's forward, and would wrap it again
        trainer = transformers.Trainer(copy.deepcopy(template), arguments, train_dataset=data, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return times[warm + steps] - times[warm]
    return Case(seconds)


def matrix_product(setup):
    n, dtype = setup.set.product, torch.bfloat16 if setup.cuda else torch.float32
    a, b = (torch.randn(n, n, device=setup.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return setup.case(repeated(lambda: torch.mm(a, b, out=out)), 2 * n ** 3, most=200)


def device_copy(setup):
    source = torch.randint(256, (setup.set.copied,), device=setup.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return setup.case(repeated(lambda: target.copy_(source)), 2 * len(source), most=200)


def shared(root, rows, processes):
    """Steps per second, a number a round, of a baseline's training of so many rows a step, shared by processes."""
    told = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    run = subprocess.Popen([*told, str(root), str(rows)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    try:
        out, _ = run.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)          # the workers, too, where it took too long
    said = json.loads((out.splitlines() or ['"it said nothing"'])[-1])
    if run.returncode:
        raise RuntimeError(said)
    return said


def share(root, rows):
    """What one of those processes does; the first prints the numbers."""
    processes = train.Processes()
    setup = Setup(root)
    setup.settings = dataclasses.replace(setup.settings, batch=rows)
    training = setup.training(REFERENCE, chained=False)
    case, steps = setup.case(training.run), SHARED_STEPS if setup.cuda else 2
    try:
        training.accelerate()
        case.seconds(setup.set.warm)
        rates = []
        for _ in range(SHARED_ROUNDS):
            processes.wait()
            rates.append(steps / case.seconds(steps))
        if bool(training.halted):
            raise ValueError("the loss or its gradient is not finite")
    finally:
        training.release()
    if processes.first:
        print(json.dumps(rates), flush=True)
    processes.leave()


# ------------------------------------------------------------------------------------ evaluation and generation

def scoring(setup, arm, lanes, rows):
    """One document a lane of `rows` rows, scored as eval.py does it."""
    model = evaluation.made_fast(setup.model(arm).eval())
    tokens = torch.from_numpy(setup.tokens[:lanes * rows]).to(setup.device)
    targets = F.pad(tokens.flatten()[1:], (0, 1), value=EOT).view_as(tokens)
    opens = (torch.arange(rows, device=setup.device) == 0).expand(lanes, rows)
    pack = evaluation.Pack(tokens, targets, opens, [], True)
    case = setup.case(repeated(lambda: evaluation.score(pack, model)), tokens.numel())

    def seconds(calls):
        evaluation.score(pack, model)                   # records anew what others have pushed out
        return case.seconds(calls)
    return case._replace(seconds=seconds)


def generator(setup, arm=None):
    """An arm's model, or GPT with a KV cache that grows."""
    if arm:
        return lower_precision(setup.model(arm)).eval()
    longest = max(setup.set.lengths) + setup.set.generated + 1
    gpt = GPT(RevenaConfig(**SIZES[setup.set.size], stm_window=None, n_positions=longest))
    return lower_precision(gpt.to(setup.device)).eval()


def generating(setup, model, length, compiled=False):
    """One sequence, token by token, always after the same context of `length` tokens, which is not timed."""
    text = torch.from_numpy(setup.tokens).to(setup.device).view(1, -1)[:, :length]
    cache = RevenaCache(model, compiled=compiled)
    first = model(text, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    context = {name: x.clone() for name, x in cache.tensors().items()}

    def seconds(_):
        cache.put({name: x.clone() for name, x in context.items()})         # a recorded CUDA graph stays
        cache.length, at = length, SimpleNamespace(token=first)

        def step():
            at.token = model(at.token, past_key_values=cache).logits.argmax(-1)
        step()                                                              # records it, the first time
        return setup.case(repeated(step)).seconds(setup.set.generated)
    return Case(seconds, setup.set.generated, most=1)


if __name__ == "__main__":
    try:
        share(Path(sys.argv[1]), int(sys.argv[2]))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        raise
