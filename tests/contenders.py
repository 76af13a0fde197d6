"""What tests/bench.py times: each function here makes one contender, a Case, out of a Setup.

Training: train.py's own step in three ways, a loop like nanoGPT's, Hugging Face's Trainer; the two measured limits of
the floor, a matrix product and a copy. Evaluation: scoring packed documents. Generation: one token after another.
"""

import copy
import gc
import importlib.util
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

import train                                                                                            # noqa: E402
from add_memory import make_models                                                                      # noqa: E402
from models import (EOT, GPT, SIZES, Memory, RevenaConfig, StageError, compiled, has_compiler,           # noqa: E402
                    load_split, lower_precision, pick_device)

CAP = 8e9                       # bytes that training may take while it starts: those of a small consumer GPU
CALLS = 10_000                  # of a contender in one window, at most
STEPS = 8 * CALLS               # steps laid out: more than all windows take
C = 128                         # tokens in a row
LOG_INTERVAL = 10               # steps; so often nanoGPT reads its loss
# documents: length in rows, and how many of them, beside one document of as many rows
FULL = dict(size="70M", batch=train.BATCH, seconds=1.5, warm=5, documents=(16, 32), generated=64,
            lengths=(128, 512, 2048, 4096), product=8192, copied=1 << 30)
SMALL = dict(size="quick", batch=train.QUICK["BATCH"], seconds=0.3, warm=1, documents=(2, 4), generated=16,
             lengths=(128,), product=1024, copied=1 << 26)


class Case(NamedTuple):
    """A contender: seconds(n) is the time of n calls, each worth `units` (steps, tokens, operations, bytes)."""

    seconds: Callable
    units: int = 1
    most: int = CALLS


class Skip(Exception):
    """What can't be measured here, and why."""


class Setup:
    """What the contenders share: device, sizes, rows of tokens, initial weights; train.py's step once it is made."""

    def __init__(self, root):
        self.device = pick_device()
        self.cuda = self.device == "cuda"
        self.set = SimpleNamespace(**FULL if self.cuda else SMALL)
        self.hybrid = make_models(self.set.size, 0)[1]
        self.trainings, self.started = {}, {}
        try:
            self.rows, self.data = load_split(root, "train")[0], f"{root}/data/train.bin"
        except StageError:
            self.rows, self.data = np.random.default_rng(0).integers(0, EOT, (4096, C), np.uint16), "random tokens"
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
        """A copy of the initial weights, float32."""
        model = copy.deepcopy(self.hybrid)
        model.config.ltm_enabled = arm == "with_ltm"
        return model.to(self.device)

    def training(self, arm):
        return train.Training(self.model(arm), self.rows, train.row_order(len(self.rows), STEPS, self.set.batch, 0))


def repeated(call):
    def run(calls):
        for _ in range(calls):
            call()
    return run


# ------------------------------------------------------------------------------------ training

def accelerated(setup, arm):
    """train.py's own way, started while the process is capped at 8 GB; `setup.started` says what that took."""
    if arm in setup.trainings:
        return setup.trainings[arm]
    if setup.cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
        torch.cuda.reset_peak_memory_stats()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    try:
        training, began = setup.training(arm), time.perf_counter()
        facts = {"step": training.accelerate()}
        setup.sync()
        facts["seconds"] = time.perf_counter() - began
        training.run(setup.set.warm)
        assert not bool(training.halted), "the loss or its gradient is not finite"
        if setup.cuda:
            facts |= {"peak_gib": (torch.cuda.max_memory_allocated() - held) / 2 ** 30, "capped_at": min(CAP, total),
                      "reserved_gib": (torch.cuda.max_memory_reserved() - reserved) / 2 ** 30}
    finally:
        if setup.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    setup.trainings[arm], setup.started[arm] = training, facts
    return training


def own_step(setup, arm):
    return setup.case(accelerated(setup, arm).run)


def without_graph(setup, compile):
    """The baseline's step launched kernel by kernel: compiled, or as eager PyTorch."""
    if not setup.cuda:
        raise Skip(f"on {setup.device} the step is the plain one anyway")
    if not compile:
        return setup.case(setup.training("baseline").run)
    training = accelerated(setup, "baseline")

    def run(steps):
        graph, training.graph = training.graph, None
        try:
            training.run(steps)
        finally:
            training.graph = graph                      # the baseline's own, which takes its turn as well
    return setup.case(run)


def conventional(setup, folder):
    """The same model trained as nanoGPT's train.py does it: batches, precision, optimizer, logging."""
    device, path = setup.device, Path(folder) / "train.bin"
    np.asarray(setup.rows).tofile(path)
    model = setup.model("baseline").train()
    parameters = list(model.backbone.parameters())                                       # matrices: all decay
    optimizer = torch.optim.AdamW(parameters, lr=train.LR, betas=train.BETAS, weight_decay=train.WEIGHT_DECAY,
                                  fused=setup.cuda)
    rates = train.learning_rates(STEPS).tolist()

    def loss_of(tokens, targets):
        return F.cross_entropy(model.logits(model.states(tokens)).flatten(0, 1), targets.flatten())

    def get_batch():
        data = np.memmap(path, np.uint16, mode="r")
        starts = torch.randint(len(data) - C, (setup.set.batch,))
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
        torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)
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
    warm, times = setup.set.warm, {}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if state.global_step in (warm, state.max_steps):
                setup.sync()
                times[state.global_step] = time.perf_counter()

    def seconds(steps):
        gc.collect()
        times.clear()
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=warm + steps, per_device_train_batch_size=setup.set.batch, bf16=setup.cuda,
            use_cpu=setup.device == "cpu", learning_rate=train.LR, weight_decay=train.WEIGHT_DECAY,
            adam_beta2=train.BETAS[1], max_grad_norm=train.CLIP, logging_strategy="no", save_strategy="no",
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


# ------------------------------------------------------------------------------------ evaluation and generation

def pack_scorer():
    """score(model, tokens, targets, opens), compiled for each shape where that can be had, as eval.py does it."""
    score = lambda model, *rows: model.score(*rows)
    return compiled(score, dynamic=False) if has_compiler(pick_device()) else score


def scoring(setup, score, arm, rows, per_document):
    """Documents of `per_document` rows, packed row after row."""
    model, tokens = lower_precision(setup.model(arm)).eval(), torch.from_numpy(setup.tokens[:rows]).to(setup.device)
    targets = F.pad(tokens.flatten()[1:], (0, 1), value=EOT).view_as(tokens)
    opens = torch.arange(rows, device=setup.device) % per_document == 0
    return setup.case(repeated(lambda: score(model, tokens, targets, opens)), tokens.numel())


def generators(setup):
    """The hybrid, and GPT with a KV cache that grows."""
    longest = max(setup.set.lengths) + setup.set.generated + 1
    gpt = GPT(RevenaConfig(**SIZES[setup.set.size], stm_window=None, n_positions=longest)).to(setup.device)
    return {"with_ltm": lower_precision(setup.model("with_ltm")).eval(), "gpt": lower_precision(gpt).eval()}


def generating(setup, model, length):
    """One sequence, token by token, always after the same context of `length` tokens, which is not timed."""
    text = torch.from_numpy(setup.tokens).to(setup.device).view(1, -1)[:, :length]
    memory = Memory(model)
    first = model(text, past_key_values=memory, logits_to_keep=1).logits.argmax(-1)
    context = {name: x.clone() for name, x in memory._tensors().items()}

    def seconds(_):
        memory._put({name: x.clone() for name, x in context.items()})       # a recorded CUDA graph stays
        memory.length, at = length, SimpleNamespace(token=first)

        def step():
            at.token = model(at.token, past_key_values=memory).logits.argmax(-1)
        step()                                                              # records it, the first time
        return setup.case(repeated(step)).seconds(setup.set.generated)
    return Case(seconds, setup.set.generated, most=1)
