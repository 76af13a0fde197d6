"""train.py: what it computes, and what becomes of a run when something goes wrong.

A stand-in of the real thing trains here: one layer of width 8 on rows of 16 tokens, twelve steps, five to an epoch.
Faults come from outside. A run that has to be killed, or told to stop, is a process of its own: a fork of one that has
imported everything already (multiprocessing's forkserver). Nothing waits by the clock: a run says that it has come to a
step, and waits there until it is told to go on.
"""

import dataclasses
import errno
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import add_memory
import models
import prepare_data
import stages
import train
from stages import EOT, StageError, arm_flag, load_model, load_split, sha256

PROJECT = Path(train.__file__).parent
SMALL = dict(steps=12, batch=2, lane=2, warmup=3, log_every=2, checkpoint_steps=4)
SETTINGS = dataclasses.replace(train.FULL, **SMALL)
TINY = dict(n_layer=1, n_embd=8, n_head=1)
REGIMES = {"isolated": (), "half chained": ("--chained", "0.5"), "chained": ("--chained",)}


class NoWandb:
    """Stands in for Wandb where a test is about something else."""

    def __init__(self, *_):
        pass

    def log(self, entry):
        pass

    def finish(self):
        pass


def register_toy():
    """A memory in a few lines: a fading sum of what was read, added beside the attention of the first layer."""
    class Toy(models.Memory, kind="toy"):
        places = (0,)
        own = {"decay": 0.5, "layers": (0,)}
        watched = ("norm",)
        undecayed = ("out",)
        rates = {"into": 3.0}

        def __init__(self, config):
            super().__init__(config)
            self.into = nn.Parameter(torch.randn(config.n_embd, config.n_embd))
            self.out = nn.Parameter(torch.randn(config.n_embd, config.n_embd))

        def empty(self, batch, device):
            return {"held": torch.zeros(batch, self.config.n_embd, device=device)}

        def mix(self, place, x, y, state, real, notes):
            held, read = state["held"], []
            for token in (x @ self.into).unbind(1):
                read.append(held)
                held = self.set["decay"] * held + token
            notes.setdefault("norm", []).append(held.norm(dim=-1).mean())
            return y + torch.stack(read, 1) @ self.out, {"held": held}
    return Toy


# ------------------------------------------------------------------ the stand-in, and runs of it


def prepared(root, tokenizer_dir, words, length, count, window):
    """`root` with data in it: `count` documents of `length` words (one number, or one for each), drawn from `words`,
    in rows of `window` tokens."""
    shutil.copytree(tokenizer_dir, root / "data" / "tokenizer")
    lengths = [length] * count if isinstance(length, int) else length
    texts = [" ".join(random.Random(seed).choices(words, k=k)) for seed, k in enumerate(lengths)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_again(root, window)
    return root


def prepare_again(root, window=16):
    """What prepare_data.py makes of the corpus as it is now."""
    settings = dataclasses.replace(prepare_data.FULL, window=window, stride=window // 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "FULL", settings)
        prepare_data.prepare(root, [root / "corpus.jsonl"], False)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A root with data (ten rows of 16 tokens, of four documents) and trained/init: what the tests copy, train in."""
    words = ["the", "of", "and", "to", "in", "surprise", "memory", "window", "angle"]
    root = prepared(tmp_path_factory.mktemp("source"), tokenizer_dir, words, [29, 29, 28, 12, 29], 5, 16)
    begin(root)
    rows, _ = load_split(root, "train")
    assert rows.shape == (10, 16) and sorted(map(len, stages.documents(rows))) == [13, 29, 30, 30]
    return root


def begin(root, arm="with_ltm"):
    """The starting weights of an arm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SIZES, "tiny", TINY)
        _, hybrid = add_memory.make_models(add_memory.Settings(size="tiny"), 0, arm)
    folder = root / "trained" / stages.init_name(arm)
    folder.mkdir(parents=True)
    stages.save_model(hybrid, stages.load_tokenizer(root), folder)
    stages.write_manifest(folder, seed=0)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root")


@pytest.fixture
def toy(monkeypatch):
    """The class of a toy memory, registered, and an arm of it: with_toy."""
    monkeypatch.setattr(models.Memory, "kinds", dict(models.Memory.kinds))
    monkeypatch.setitem(stages.ARMS, "with_toy", stages.Arm("toy", "a toy", settings={"layers": (0,)}))
    for module in (stages, add_memory):
        monkeypatch.setattr(module, "model_class", lambda memory: models.RevenaHybridTiny)
    return register_toy()


@pytest.fixture
def small(monkeypatch):
    """train.py with small settings, without wandb, and without fsync: for power cuts alone, and slow."""
    monkeypatch.setattr(train, "FULL", SETTINGS)
    monkeypatch.setattr(train, "Wandb", NoWandb)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def here(stage, small):
    """here(root, *flags): train.py in this process; (exit code, stdout, stderr)."""
    def run(root, *flags):
        gc.collect()                            # an earlier run's lock may still be held by the traceback that ended it
        return stage(train.main, "--root", root, *flags)
    return run


def _child(log, root, flags, fault, arguments):
    """What a forked process does: train.py, with its output in `log`, after `fault` has been put in."""
    gc.freeze()                                 # it need not look through what was imported before the fork
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    vars(train).update(FULL=SETTINGS, Wandb=NoWandb)
    os.fsync = lambda _: None
    if fault:
        fault(*arguments)
    sys.argv = ["train.py", *flags]
    stages.run_stage(lambda: train.main(["--root", str(root), *flags]))


@pytest.fixture(scope="module")
def forks():
    """multiprocessing's context whose processes begin with train.py imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_train"])
        yield context


@pytest.fixture
def start(forks, tmp_path):
    """start(root, *flags, fault=.., arguments=..): train.py in a process of its own, and where its output goes."""
    begun = []

    def start(root, *flags, fault=None, arguments=()):
        log = tmp_path / "log"
        process = forks.Process(target=_child, args=(log, root, flags, fault, arguments))
        process.start()
        begun.append(process)
        return process, log
    yield start
    for process in begun:
        process.kill()


@pytest.fixture
def away(start):
    """away(root, *flags, fault=.., arguments=..): the same, waited for; (exit code, negative for a signal, output)."""
    def run(root, *flags, **how):
        process, log = start(root, *flags, **how)
        process.join(120)
        return process.exitcode, log.read_text()
    return run


def stopping_at(step, number=signal.SIGTERM):
    """Fault: the process is told to stop when it has taken `step` steps."""
    run = train.Training.run

    def stopped(self, steps):
        run(self, steps)
        if self.done == step:
            os.kill(os.getpid(), number)
    train.Training.run = stopped


def stopping_before_the_first_step():
    train.Training.accelerate = lambda self: os.kill(os.getpid(), signal.SIGTERM) or "stopped at once"


def waiting_at(step, reached, go_on):
    """Fault: the process says that it has taken `step` steps, and waits until it is told to go on."""
    run = train.Training.run

    def waiting(self, steps):
        run(self, steps)
        if self.done == step:
            reached.set()
            go_on.wait(120)
    train.Training.run = waiting


def bits(x):
    """The hash of a tensor."""
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def fingerprint(folder):
    """What a run left, to the bit: weights, optimizer state, and the log without its clock."""
    newest = max((folder / "checkpoints").glob("step-*"))
    log = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert sha256(folder / "model.safetensors") == sha256(newest / "model.safetensors")
    return {
        "checkpoint": newest.name,
        "tensors": tensors(newest),
        "log": [{k: v for k, v in entry.items() if k not in ("tok/sec", "ETA")} for entry in log],
    }


def tensors(checkpoint):
    """The hashes of a checkpoint's tensors."""
    parts = {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / "optimizer.safetensors")}
    return {name: bits(x) for name, x in parts.items()}


def files(folder):
    """{path: hash} of every file below a folder but the lock."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """undisturbed(arm, *flags): a finished run's root, its fingerprint, and every (tokens, targets, opens) it saw."""
    runs, objective = {}, train.Training.objective

    def run(arm, *flags):
        if (arm, flags) in runs:
            return runs[arm, flags]
        root, seen = shutil.copytree(source, tmp_path_factory.mktemp("undisturbed") / "root"), []

        def watched(self, h, notes, of_tokens, tokens, targets, opens, count):
            seen.append((tokens.tolist(), targets.tolist(), None if opens is None else opens.tolist()))
            return objective(self, h, notes, of_tokens, tokens, targets, opens, count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "FULL", SETTINGS)
            patch.setattr(train, "Wandb", NoWandb)
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(train.Training, "objective", watched)
            assert train.main(["--root", str(root), arm_flag(arm), *flags]) == 0
        runs[arm, flags] = root, fingerprint(root / "trained" / arm), seen
        return runs[arm, flags]
    return run


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the finished baseline run, to be damaged."""
    return shutil.copytree(undisturbed("baseline")[0], tmp_path / "finished")


def back_to(root, step, arm="baseline"):
    """Take a finished run back to an earlier checkpoint of it."""
    for checkpoint in (root / "trained" / arm / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return root


def refused(result, *says):
    """One line that says all of `says`, and a non-zero exit."""
    code, text = result[0], result[-1]
    lines = [line for line in text.splitlines() if "passed over" not in line]
    assert code == 1 and len(lines) == 1, text
    assert all(word in lines[0] for word in says), text
    return True


# ------------------------------------------------------------------ which rows it sees


def test_each_epoch_sees_every_row_once():
    order = train.isolated_order(10, 24, 0)
    for epoch in (order[:10], order[10:20]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert np.array_equal(train.isolated_order(10, 16, 0), order[:16])          # more steps change no earlier ones
    assert not np.array_equal(train.isolated_order(10, 24, 1), order)
    assert sorted(train.isolated_order(3, 8, 0)[:6].tolist()) == [0, 0, 1, 1, 2, 2]     # a batch over an edge


def test_the_worked_example_of_lanes():
    """Documents of rows 0..19 and 20..24: the runs of even rows, shuffled, laid one after the other, cut into lanes."""
    def listed(runs):
        return [run.tolist() for run in runs]
    starts = [0, 20]
    assert listed(train.runs_of(starts, 25, 0, 8)) == [[0, 2, 4, 6, 8, 10, 12, 14], [16, 18], [20, 22, 24]]
    assert listed(train.runs_of(starts, 25, 1, 8)) == [[1, 3, 5, 7, 9, 11, 13, 15], [17, 19], [21, 23]]
    rows = np.ones((25, 16), np.uint16)
    rows[starts, 0] = EOT
    settings = dataclasses.replace(train.FULL, batch=8, lane=8)
    plans = (train.plan_rows(rows, 3, settings, seed, share=1.0) for seed in range(100))
    plan = next(plan for plan in plans if plan.rows[0, 0] == 16 and plan.rows[0, 2] == 20)      # shuffled like this
    assert plan.chained_from == 0 and plan.opens.shape == (3, 1, 8)
    assert plan.rows[:2].tolist()[0] == [16, 18, 20, 22, 24, 0, 2, 4]
    assert plan.opens[0, 0].nonzero().flatten().tolist() == [0, 2, 5]
    assert plan.rows[1, :5].tolist() == [6, 8, 10, 12, 14]
    assert plan.opens[1, 0, :5].tolist() == [True, False, False, False, False]  # a state never outlives a step
    assert plan.rows[1, 5] % 2 == 1 and plan.opens[1, 0, 5]                     # the next epoch takes the odd rows


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("batch, lane", [(4, 4), (4, 2), (6, 3)])
def test_a_plan_keeps_documents_together(batch, lane, share):
    """Of whatever documents: isolated epochs, then lanes in which a row that does not open follows the one before."""
    draw = random.Random(batch * lane)
    lengths = [draw.randint(1, 9) for _ in range(12)]
    document = np.repeat(range(12), lengths)
    rows = np.ones((len(document), 16), np.uint16)
    rows[np.flatnonzero(np.diff(document, prepend=-1)), 0] = EOT
    settings, steps = dataclasses.replace(train.FULL, batch=batch, lane=lane), 40
    plan = train.plan_rows(rows, steps, settings, 3, share)
    assert plan.chained_from == steps - round(share * steps) and plan.rows.shape == (steps, batch)
    alone = plan.rows[:plan.chained_from].flatten()
    assert torch.equal(alone, torch.from_numpy(train.isolated_order(len(rows), len(alone), 3)))
    lanes, opens = plan.rows[plan.chained_from:].reshape(-1, lane), plan.opens[plan.chained_from:].reshape(-1, lane)
    assert opens[:, 0].all()
    for row, before, opened in zip(lanes[:, 1:].flatten(), lanes[:, :-1].flatten(), opens[:, 1:].flatten()):
        assert opened or (row == before + 2 and document[row] == document[before])
    if share == 1:
        flat, even = lanes.flatten().tolist(), sum(-(-n // 2) for n in lengths)
        odd = len(rows) - even
        assert sorted(flat[:even] + flat[even:even + odd]) == list(range(len(rows)))
        ends = [run[-1] for run in train.runs_of(np.flatnonzero(rows[:, 0] == EOT), len(rows), 0, lane)]
        assert set(flat[:even]) >= set(ends)
    again = train.plan_rows(rows, steps, settings, 3, share)
    assert all(torch.equal(a, b) for a, b in zip(plan[:2], again[:2]))
    assert not torch.equal(train.plan_rows(rows, steps, settings, 4, share).rows, plan.rows)


def test_a_target_is_the_next_token_of_its_document():
    """Said of documents, not of rows: in a lane the last target of a row is where the next row of its run begins."""
    draw = np.random.default_rng(0)
    documents = [np.concatenate(([EOT], draw.integers(0, EOT, n))) for n in (200, 37, 90, 11, 64)]
    windows = [prepare_data.windows_of(ids, 16, 8) for ids in documents]
    rows = np.concatenate(windows)
    place = [(number, 8 * at) for number, part in enumerate(windows) for at in range(len(part))]
    settings = dataclasses.replace(train.FULL, batch=8, lane=4)
    plan = train.plan_rows(rows, 20, settings, 0, share=0.5)
    carried = 0
    for step in range(20):
        chained = step >= plan.chained_from
        tokens = torch.from_numpy(rows[plan.rows[step]].astype(np.int64))
        opens = plan.opens[step] if chained else None
        targets = train.targets_of(tokens, opens)
        for at, (number, first) in enumerate(place[row] for row in plan.rows[step].tolist()):
            follows = chained and at % 4 < 3 and not opens[at // 4, at % 4 + 1]
            reach = 16 if follows else 15
            ids = documents[number][first + 1:first + 1 + reach]
            wanted = np.full(16, EOT)
            wanted[:len(ids)] = ids
            assert targets[at].tolist() == wanted.tolist()
            carried += follows and wanted[15] != EOT
    assert carried > 10


def test_replay_draws_from_what_was_seen():
    """A share of what comes is drawn again, only from rows seen before; equal steps, equal forms; the same each time."""
    rows = np.ones((5_000, 16), np.uint16)
    rows[::7, 0] = EOT
    settings = dataclasses.replace(train.FULL, batch=8, lane=4)
    plan = train.plan_rows(rows, 200, settings, 0, share=0.5)
    found, again = (train.replayed(plan, 0.2, 0) for _ in range(2))
    assert found.chained_from == plan.chained_from and found.rows.shape == plan.rows.shape
    assert torch.equal(found.rows, again.rows) and torch.equal(found.opens, again.opens)
    changed = found.rows != plan.rows
    for part in (changed[:100].flatten(), changed[100:].flatten()):
        assert 0.15 < part.float().mean() < 0.25
    assert not changed[0].any() and not changed[100].any()             # nothing of their kind was seen before
    for step, at in changed[:100].nonzero().tolist():
        assert found.rows[step, at] in found.rows[:step]
    lanes, opens = found.rows.unflatten(1, (2, 4)), found.opens
    earlier = {}
    for step in range(100, 200):
        for number in range(2):
            lane = lanes[step, number].tolist(), opens[step, number].tolist()
            if changed[step].view(2, 4)[number].any():
                assert any(lane == known for known in earlier.values())
        earlier |= {(step, number): (lanes[step, number].tolist(), opens[step, number].tolist()) for number in range(2)}
    assert not torch.equal(train.replayed(plan, 0.2, 1).rows, found.rows)


def test_planted_lanes_take_their_share_in_their_order():
    """A share of the lanes, none of the isolated steps; a lane is one planted document; the easiest come first."""
    rows = np.ones((600, 16), np.uint16)
    rows[::12, 0] = EOT
    settings = dataclasses.replace(train.FULL, batch=8, lane=4)
    plan = train.plan_rows(rows, 100, settings, 0, share=0.5)
    first = 600 + 7 * np.arange(20)
    found = train.with_planted(plan, first, 4, 0.25, 0)
    lanes, opens = found.rows.view(100, 2, 4), found.opens
    planted = lanes[..., 0] >= 600
    assert not planted[:50].any() and planted.sum() == 25
    taken = lanes[planted]
    assert torch.equal(taken, taken[:, :1] + 2 * torch.arange(4)) and set(taken[:, 0].tolist()) <= set(first.tolist())
    assert (taken[1:, 0] >= taken[:-1, 0]).all() and taken[0, 0] == 600 and taken[-1, 0] == first[-1]
    assert (opens[planted] == (torch.arange(4) == 0)).all()
    assert torch.equal(lanes[~planted], plan.rows.view(100, 2, 4)[~planted])
    assert torch.equal(opens[~planted], plan.opens[~planted])


def test_planted_rows_are_those_of_this_data(root, here, monkeypatch):
    """They train, go on to the same bits only with the same rows, and are refused beside other data."""
    flags = "--baseline", "--chained", "--planted", "0.5"
    assert refused(here(root, *flags), "planted.json is missing", "prepare_data.py --planted")
    path = root / "data" / "planted.bin"
    draw = np.random.default_rng(0)

    def plant(train_sha256=None):
        rows = draw.integers(0, EOT, (12, 16)).astype(np.uint16)
        rows[::3, 0] = EOT
        rows.tofile(path)
        meta = json.loads((root / "data" / "meta.json").read_text())
        ours = train_sha256 or meta["splits"]["train"]["sha256"]
        stages.write_json(path.with_suffix(".json"), {"sha256": sha256(path), "train_sha256": ours})
    plant("0" * 64)
    assert refused(here(root, *flags), "of other data than train.bin", "prepare_data.py --planted")
    plant()
    assert here(root, *flags)[0] == 0
    assert "all 12 steps are done" in here(root, *flags, "--resume")[1]
    plant()
    assert refused(here(root, *flags, "--resume"), "planted_data was ", "--fresh")
    with monkeypatch.context() as patch:
        patch.setattr(train, "FULL", dataclasses.replace(SETTINGS, lane=4, batch=4))
        assert refused(here(root, *flags, "--fresh"), "longer than a planted document", "to at most 2")
    path.write_bytes(path.read_bytes()[:-32])
    assert refused(here(root, *flags, "--fresh"), "missing, damaged or of other data")


# ------------------------------------------------------------------ what it computes


def test_a_run_leaves_what_it_promises(undisturbed):
    root, result, _ = undisturbed("with_ltm")
    folder = root / "trained" / "with_ltm"
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000008", "step-000012"]
    assert [entry["step"] for entry in result["log"]] == [2, 4, 6, 8, 10, 12]
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    assert set(last) == {"step", "LTM_enabled", "loss", "routed_token_ratio", "avg_surprisal_routed", "ltm_hit_rate",
                         "grad_norm", "grad_norm_ltm", "lr", "tok/sec", "ETA"}
    assert last["LTM_enabled"] and last["tok/sec"] > 0 and last["ltm_hit_rate"] > 0 and last["grad_norm_ltm"] > 0
    assert 0 < last["loss"] < 11 and len({entry["loss"] for entry in result["log"]}) == 6
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 12 and manifest["weights"][sha256(folder / "model.safetensors")] == 12
    assert {"README.md", "config.json", "models.py", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert load_model(folder).config.memory_enabled
    assert not any(path.name.endswith(".tmp") for path in folder.rglob("*"))


@pytest.mark.parametrize("flags", REGIMES.values(), ids=REGIMES)
def test_both_arms_start_alike_and_see_the_same_rows(undisturbed, flags):
    root, plain, batches = undisturbed("baseline", *flags)
    other, _, batches_with = undisturbed("with_ltm", *flags)
    assert batches == batches_with and len(batches) == 12
    chained = [opens is not None for _, _, opens in batches]
    assert chained == [step >= {(): 12, ("--chained",): 0}.get(flags, 6) for step in range(12)]
    settings = [json.loads((folder / "manifest.json").read_text())["settings"]
                for folder in (root / "trained" / "baseline", other / "trained" / "with_ltm")]
    assert settings[0] == {**settings[1], "arm": "baseline", "memory": None, "config": {}}
    init = load_file(root / "trained" / "init" / "model.safetensors")
    assert settings[0]["init"] == sha256(root / "trained" / "init" / "model.safetensors")
    for name, x in init.items():        # the baseline never touches the memory that it does not use
        same = bits(x) == plain["tensors"][name]
        assert same == (name.startswith("memory.") or name == "backbone.rotary"), name
    assert not load_model(root / "trained" / "baseline").config.memory_enabled


def test_every_arm_has_its_flag():
    for arm in stages.ARMS:
        assert train.parse([arm_flag(arm)]).arm == arm
        assert arm in stages.SPECIFIED or add_memory.parse([arm_flag(arm)]).arm == arm
    assert train.parse([]).arm == "baseline" and add_memory.parse([]).arm == "with_ltm"
    assert [train.parse(list(flags)).chained for flags in REGIMES.values()] == [0.0, 0.5, 1.0]


def test_the_study_names_what_else_would_have_bought_it():
    """Each arm of it differs from the usual one in what its name says, and has a flag, and weights to start from."""
    study = stages.STUDY
    assert not set(study) & set(stages.ARMS) and len(study) == 27
    for name, arm in study.items():
        assert train.parse(arm_flag(name).split()).arm == name and arm.group and arm.label
        assert (stages.init_name(name) == "init") == (not arm.backbone)
        assert not arm.backbone or add_memory.parse(arm_flag(name).split()).arm == name
    curve = {(arm.memory, arm.share) for arm in study.values() if arm.group == "steps"}
    assert curve == {(memory, share) for memory in (None, "ltm") for share in (0.25, 0.5, 1, 2, 4, 8)}
    routing = [arm.config for arm in study.values() if arm.group == "routing"]
    assert sorted(config["ltm_slots"] for config in routing) == [256, 256, 1024, 1024, 1024]
    rates = [(arm.memory, arm.training["lr"]) for arm in study.values() if arm.training]
    assert sorted(rate for memory, rate in rates if memory) == sorted(rate for memory, rate in rates if not memory)


@pytest.mark.parametrize("name", ["more_steps", "window_512", "store_random_256", "with_ltm_lr_0.001", "with_ltm_x0.25"])
def test_an_arm_of_the_study_is_trained_as_its_entry_says(root, here, monkeypatch, name):
    about = stages.STUDY[name]
    if about.config.get("stm_window"):
        about = about._replace(config=dict(stm_window=32))          # twice the window of this root's rows
        monkeypatch.setitem(stages.STUDY, name, about)
    code, out, err = here(root, "--study", name)
    assert code == 0, err
    folder = root / "trained" / name
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    model = load_model(folder)
    assert settings["steps"] == round(12 * about.share) and "python eval.py --study" in out
    assert settings["lr"] == about.training.get("lr", SETTINGS.lr) and settings["config"] == about.config
    assert model.config.memory_enabled == (about.memory is not None)
    assert {key: getattr(model.config, key) for key in about.config} == about.config
    wider = about.config.get("stm_window", 16) // 16
    assert settings["batch"] * wider == SETTINGS.batch
    assert f"of {settings['batch']} x {16 * wider} tokens" in out


def test_rows_are_recut_as_they_are_cut(source):
    rows, _ = load_split(source, "train")
    wider = stages.recut(rows, 32)
    assert wider.shape[1] == 32 and wider.dtype == np.uint16
    assert [text.tolist() for text in stages.documents(wider)] == [text.tolist() for text in stages.documents(rows)]
    assert (stages.recut(rows, 16) == rows).all()


def test_tokens_stored_at_random_are_so_whatever_their_surprisal():
    config = models.RevenaConfig(**{**TINY, "ltm_random": 0.4})
    memory, draw = models.LongTermMemory(config), torch.Generator().manual_seed(0)
    log_p = -16 * torch.rand(4_000, generator=draw)
    targets = torch.where(torch.rand(4_000, generator=draw) < 0.1, EOT, 7)
    bits, stored = memory.route(log_p, targets)
    real = targets != EOT
    assert not stored[~real].any() and abs(stored[real].float().mean() - 0.4) < 0.03
    for part in (bits > 10, bits < 10):
        assert abs(stored[real & part].float().mean() - 0.4) < 0.05
    assert torch.equal(memory.route(log_p, targets)[1], stored)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    rates, s = train.learning_rates(10_000, train.FULL), train.FULL
    assert rates[0] == pytest.approx(s.lr / 500) and rates[499] == pytest.approx(s.lr)
    assert rates.argmax() in (499, 500) and (rates[501:] <= rates[500:-1]).all()
    assert rates[5_250] == pytest.approx((s.lr + s.min_lr) / 2)             # half-way along
    assert rates[-1] == pytest.approx(s.min_lr, rel=1e-4) and (rates >= 1e-6).all()


def test_where_the_weights_start():
    """transformers passes over custom modules without parameters of their own: what is said to be set must be seen."""
    _, model = add_memory.make_models(add_memory.QUICK, 0)
    for name, x in model.named_parameters():
        if name == "backbone.embed.weight":
            assert abs(x.std().item() / 0.02 - 1) < 0.01 and abs(x.mean().item()) < 1e-3
        else:
            bound = x.size(1) ** -0.5
            assert 0.9 * bound < x.abs().max().item() <= bound, name
            assert abs(x.std().item() / (bound / 3 ** 0.5) - 1) < 0.1, name


def test_adamw_is_adamw():
    draw, s = torch.Generator().manual_seed(0), train.FULL
    ours = [torch.randn(size, generator=draw) for size in ((5, 7), (6,))]
    theirs = [x.double().requires_grad_() for x in ours]
    decay = [s.weight_decay, 0.0]
    optimizer = torch.optim.AdamW([dict(params=[x], weight_decay=d) for x, d in zip(theirs, decay)],
                                  betas=(s.beta1, s.beta2), eps=s.eps)
    first, second = ([torch.zeros_like(x) for x in ours] for _ in range(2))
    go, halt = torch.tensor(False), torch.tensor(True)
    for step, rate in enumerate((1e-3, 5e-3, 2e-3, 1e-2, 1e-4) * 8, 1):
        # some gradients vanish, as those of tokens that did not occur do
        gradients = [torch.randn(x.shape, generator=draw) * (torch.rand(x.shape, generator=draw) < 0.5) for x in ours]
        # a norm above clip scales them down, one below it does not scale them up
        norm = torch.tensor(s.clip * (2.0, 0.5, 0.0)[step % 3])
        for x, g in zip(theirs, gradients):
            x.grad = g.double() * (0.5, 1.0, 1.0)[step % 3]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rate, step = torch.tensor(rate), torch.tensor(float(step))
        copies = [x.bfloat16() for x in ours]
        for copy, x, g, m, v, d in zip(copies, ours, gradients, first, second, decay):
            train.adamw(copy, x, g, m, v, d, rate, step, norm, go, s)
            assert torch.equal(copy, x.bfloat16())
            before = x.clone()
            train.adamw(None, x, g * torch.nan, m.clone(), v.clone(), d, rate, step, norm, halt, s)
            assert torch.equal(x, before)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.double(), y.detach(), rtol=2e-6, atol=2e-6)


def test_norms_are_those_of_each_tensor_whatever_their_dtypes():
    draw = torch.Generator().manual_seed(0)
    mixed = [(torch.randn(n, 3, generator=draw) * n).to((torch.float32, torch.bfloat16)[n % 2]) for n in range(1, 7)]
    norms = train.norms_of(mixed)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.stack([x.float().norm() for x in mixed]))


def training_of(root, arm="with_ltm", share=0.0, **changed):
    """A Training of an arm on the rows of a root."""
    settings = dataclasses.replace(SETTINGS, **changed)
    rows, _ = load_split(root, "train")
    model = load_model(root / "trained" / stages.init_name(arm))
    model.config.memory_enabled = arm != "baseline"
    return train.Training(model, rows, train.plan_rows(rows, settings.steps, settings, 0, share), settings)


def test_what_learns_at_a_rate_of_its_own(root):
    """A factor of a memory's own, of the updates alone: after one step weights have moved that much further."""
    begin(root, "with_store")
    moved = {}
    for factor in (1.0, 3.0):
        training = training_of(root, "with_store", weight_decay=0.0)
        memory = training.groups[1]
        before = [w.clone() for w in memory.masters]
        memory.rates = [factor] * len(memory.rates)
        training.run(1)
        moved[factor] = [w - old for w, old in zip(memory.masters, before)]
    assert max(x.abs().max() for x in moved[1.0]) > 0
    for one, three in zip(moved[1.0], moved[3.0]):
        torch.testing.assert_close(3 * one, three, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("before", [0, 3, 4])
def test_the_log_times_the_steps_that_it_saw(source, monkeypatch, tmp_path, before):
    """A second a step by a clock of ours, from the first line on, also where an interval began before the start."""
    training = training_of(source, log_every=4)
    monkeypatch.setattr(train.time, "perf_counter", lambda: 100.0 + training.done)
    training.run(before)
    history = train.History(tmp_path / "history.jsonl", training, lambda entry: None)
    while training.done < 12:
        training.run(1)
        history.note()
        history.settle()
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines[before // 4:]:
        assert line["tok/sec"] == pytest.approx(2 * 16) and line["ETA"] == pytest.approx(12 - line["step"])


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["isolated", "chained"])
@pytest.mark.parametrize("arm", ["baseline", "with_ltm", "with_toy"])
def test_a_step_is_a_step_of_plain_autograd(root, toy, arm, share):
    """One look-up of the embedding left to autograd, clip_grad_norm_ and torch's AdamW give the same weights: each run
    of rows scored alone, a memory's `undecayed` and `rates` as it says."""
    if arm == "with_toy":
        begin(root, arm)
    ours = training_of(root, arm, share, clip=0.01, batch=4)            # so that both groups are clipped
    plain = load_model(root / "trained" / stages.init_name(arm)).train()
    plain.config.memory_enabled = arm != "baseline"
    named = {name: p for name, p in plain.named_parameters()
             if name.startswith("backbone.") or plain.config.memory_enabled}
    groups = [[p for name, p in named.items() if name.startswith(start)] for start in ("backbone.", "memory.")]
    groups = [group for group in groups if group]
    rates = {f"memory.{name}": rate for name, rate in plain.active.rates.items()}
    undecayed = {f"memory.{name}" for name in plain.active.undecayed}
    decays = [0.1 if p.dim() > 1 and name not in undecayed else 0.0 for name, p in named.items()]
    optimizer = torch.optim.AdamW([dict(params=[p], weight_decay=d) for p, d in zip(named.values(), decays)],
                                  betas=(0.9, 0.95), eps=1e-8)
    longest = 0
    for step in range(3):
        tokens, targets, opens, _ = ours.batch()
        cuts = [True] * len(tokens) if opens is None else opens.flatten().tolist()
        places = [at for at, opened in enumerate(cuts) if opened] + [len(cuts)]
        longest, parts = max(longest, *np.diff(places)), []
        for first, end in zip(places, places[1:]):
            alone = torch.arange(end - first)[None] == 0
            parts.append(plain.score(tokens[first:end], targets[first:end], alone if end - first > 1 else None))
        log_p, objective, stored, hit = (torch.cat([getattr(part, field) for part in parts])
                                         for field in ("log_p", "objective", "stored", "hit"))
        real = targets != EOT
        optimizer.zero_grad()
        (-objective[real].mean()).backward()
        norms = [float(torch.nn.utils.clip_grad_norm_(group, 0.01)) for group in groups]
        for (name, _), group in zip(named.items(), optimizer.param_groups):
            group["lr"] = float(ours.rates[step]) * rates.get(name, 1.0)
        optimizer.step()
        ours.run(1)
        row = dict(zip((*train.STATISTICS, *ours.watched), ours.statistics[step].tolist()))
        assert row["loss"] == pytest.approx(-log_p[real].mean().item(), rel=1e-5)
        assert row["routed_token_ratio"] == pytest.approx(float(stored[real].float().mean()))
        assert row["ltm_hit_rate"] == pytest.approx(float(hit[real].float().mean()))
        assert [row["grad_norm"], row["grad_norm_ltm"]][:len(norms)] == pytest.approx(norms, rel=1e-4)
        assert min(norms) > 0.01
        assert ("norm" in row) == (arm == "with_toy") and row.get("norm", 1) > 0
    assert longest == 1 + (share > 0)                                   # there are runs of two rows
    for (name, p), (_, q) in zip(ours.model.named_parameters(), plain.named_parameters()):
        assert torch.allclose(p, q, atol=3e-6), name


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["isolated", "chained"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_processes_add_up(source, share, world):
    """Gradients and statistics of each process's rows, or lanes, are in sum those of the whole batch."""
    training = training_of(source, share=share, batch=6)
    tokens, targets, opens, _ = training.batch()
    count = (targets != EOT).sum()
    whole, sums = training.gradients(tokens, targets, opens, count)
    training.world, parts = world, []
    for training.rank in range(world):
        parts.append(training.gradients(tokens, targets, opens, count))
    for x, *y in zip(whole, *(gradients for gradients, _ in parts)):
        torch.testing.assert_close(sum(y), x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(part for _, part in parts), sums, rtol=1e-4, atol=1e-6)


OF_ALL = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
import torch, torch.distributed as dist
import train
from test_train import training_of

torch.set_num_threads(1)
source, share, world = Path(sys.argv[2]), float(sys.argv[3]), 3
rank = next((i for i in range(1, world) if os.fork() == 0), 0)      # here, so that the libraries are imported once
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=world)
for arm in ("baseline", "with_ltm", "with_bank", "with_mag"):
    training = training_of(source, arm, share, batch=8)             # 3, 3 and 2 rows; chained, 2, 1 and 1 lanes
    batch = training.batch()
    gradients, sums = training.gradients(*batch)                    # of this process's share
    *wanted, sums = train.over_all_processes([*gradients, sums])
    got, of_all = training.gradients_of_all(*batch)
    torch.testing.assert_close(of_all, sums, rtol=1e-4, atol=1e-6)
    for name, x, y in zip((name for group in training.groups for name in group.names), got, wanted):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda text: f"{arm} {name}: {text}")
        assert all(torch.equal(x, other) for other in train.of_each_process(x)), "one weight, but for all"
dist.barrier()                                                      # who ends first takes what others still wait for
assert rank or all(os.wait()[1] == 0 for _ in range(1, world)), "another process failed"
sys.stdout.write("right\\n")       # in one piece, as print does not
"""


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["isolated", "chained"])
def test_processes_sum_as_they_compute(root, tmp_path, share):
    """Each of three processes with unequal shares has the sums of what all three compute alone, to the bit those of the
    others: also with a loss that layers add, and with parameters before and behind the final states."""
    for arm in ("with_bank", "with_mag"):
        begin(root, arm)
    (tmp_path / "of_all.py").write_text(OF_ALL)
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, *map(str, (tmp_path / "of_all.py", tmp_path / "meeting", root, share,
                                                      tests.parent, tests))],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.split() == ["right"] * 3, done.stderr[-3000:]


def test_a_batch_that_lanes_do_not_fill(root, here, monkeypatch):
    """The advice of those who are out of memory is a smaller batch: isolated any will do, chained one line says which."""
    monkeypatch.setattr(train, "FULL", dataclasses.replace(SETTINGS, batch=3, steps=2))
    assert refused(here(root, "--baseline", "--chained"), "a batch of 3 rows", "lanes of 2")
    assert here(root, "--baseline")[0] == 0
    rows, meta = load_split(root, "train")
    job = types.SimpleNamespace(rows=rows, meta=meta, steps=4, settings=SETTINGS, seed=0, chained=0.5, planted=0.0,
                                about=stages.ARMS["baseline"])
    with pytest.raises(StageError, match="1 chained lane cannot be shared by 2 processes"):
        train.Job.plan(job, world=2)
    job.chained, job.settings = 0.0, dataclasses.replace(SETTINGS, batch=2)
    with pytest.raises(StageError, match="2 rows cannot be shared by 3 processes; .* to 3$"):
        train.Job.plan(job, world=3)


@pytest.mark.parametrize("flags", REGIMES.values(), ids=REGIMES)
def test_a_toy_memory_trains(root, toy, here, monkeypatch, flags):
    """Class and a line in the table of arms are all it takes: 20 steps in each regime, stopped at the 10th, to the
    same bits; its own numbers are in the log."""
    begin(root, "with_toy")
    other, caught, run = shutil.copytree(root, root.with_name("other")), [], train.Training.run

    def stopped(self, steps):
        run(self, steps)
        if self.done == 10:
            caught.append(signal.SIGTERM)
    flags = ("--with-toy", "--steps", "20", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "caught_signals", lambda: caught)
        patch.setattr(train.Training, "run", stopped)
        assert here(other, *flags)[0] == 143
    for place in (other, root):
        assert here(place, *flags, "--resume")[0] == 0
    results = [fingerprint(place / "trained" / "with_toy") for place in (root, other)]
    assert results[0] == results[1] and results[0]["checkpoint"] == "step-000020"
    assert all(entry["norm"] > 0 for entry in results[0]["log"])
    manifest = json.loads((root / "trained" / "with_toy" / "manifest.json").read_text())
    assert manifest["settings"]["memory"] == "toy" and manifest["settings"]["memory_settings"] == {"layers": [0]}


@pytest.mark.parametrize("field, spoil", [
    ("objective", lambda x: x * torch.inf),                             # the gradients are not finite either
    ("objective", lambda x: x + torch.inf), ("objective", lambda x: x - torch.inf),     # they are finite
    ("objective", lambda x: x + torch.nan), ("log_p", lambda x: x + torch.inf)])
def test_no_weight_moves_after_a_nan(source, monkeypatch, field, spoil):
    """Row 14, the device's side: also the steps that are already under way when the host learns of it."""
    training = training_of(source)
    training.run(3)
    before, score = {name: x.clone() for name, x in training.weights().items()}, training.model.score_states

    def spoilt(*arguments, **named):
        scores = score(*arguments, **named)
        return scores._replace(**{field: spoil(getattr(scores, field))})
    with monkeypatch.context() as patch:
        patch.setattr(training.model, "score_states", spoilt)
        training.run(1)
    training.run(2)
    assert all(torch.equal(x, before[name]) for name, x in training.weights().items())
    assert torch.isfinite(training.statistics[:3]).all() and training.statistics[3:6].isnan().all()


@pytest.mark.parametrize("flags", [(), ("--chained", "0.5")])
def test_the_log_is_whole_wherever_steps_are_taken(root, here, undisturbed, monkeypatch, flags):
    """CUDA capture takes three steps before the loop, past the end of an interval of two; and, where the regime
    changes, past that of a checkpoint, which is then made at the next line of the log."""
    monkeypatch.setattr(train.Training, "accelerate", lambda self: self.run(3) or "three steps first")
    monkeypatch.setattr(train, "FULL", dataclasses.replace(SETTINGS, checkpoint_steps=8))
    assert here(root, "--baseline", *flags)[0] == 0
    folder = root / "trained" / "baseline"
    assert fingerprint(folder) == undisturbed("baseline", *flags)[1]
    made = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert made == ["step-000010" if flags else "step-000008", "step-000012"]


# ------------------------------------------------------------------ stop and go on


STOPS = {("baseline", ()): (0, 3, 5, 11), ("with_ltm", ()): (3, 5), ("with_ltm", ("--chained", "0.5")): (3, 6, 9),
         ("baseline", ("--chained",)): (0, 5)}


@pytest.mark.parametrize("arm, flags", STOPS, ids=lambda x: x if isinstance(x, str) else " ".join(x) or "isolated")
def test_stopped_anywhere_a_run_goes_on_to_the_same_bits(root, away, undisturbed, arm, flags):
    """Row 10: before the first step, in mid-epoch, at the epoch's edge, at the last isolated step, in mid-lane, and
    after the last step."""
    folder, flags = root / "trained" / arm, (arm_flag(arm), *flags)
    for step in STOPS[arm, flags[1:]]:
        fault = {"fault": stopping_at, "arguments": (step,)} if step else {"fault": stopping_before_the_first_step}
        code, said = away(root, *flags, "--resume", **fault)
        assert code == 143 and f"stopped at step {step} and saved; go on with --resume" in said, said
        assert json.loads((folder / "manifest.json").read_text())["step"] == step
        load_model(folder)
    code, said = away(root, *flags, "--resume")
    assert code == 0 and "from step" in said, said
    assert fingerprint(folder) == undisturbed(arm, *flags[1:])[1]
    before = files(folder)
    code, said = away(root, *flags, "--resume")
    assert code == 0 and "all 12 steps are done already" in said and files(folder) == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(root, start, forks, here, undisturbed, number, code):
    """Row 9."""
    reached, go_on = forks.Event(), forks.Event()
    process, log = start(root, "--baseline", fault=waiting_at, arguments=(3, reached, go_on))
    assert reached.wait(120)
    os.kill(process.pid, number)
    go_on.set()
    process.join(120)
    assert process.exitcode == code and "stopped at step 3 and saved; go on with --resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert here(root, "--baseline", "--resume")[0] == 0
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


def dying_while_saving(step, report):
    """Fault: the save at `step` is killed at its first touch of a file, then, from the same state, at its second, ...

    After each: the newest whole checkpoint is the one before or the one being saved, to the bit; the run's folder
    holds a model that its manifest knows; and the save made once more leaves what an undisturbed one leaves.
    """
    save, save_file = train.Run.save, train.save_file

    def torn(tensors, path, **metadata):
        save_file(tensors, path, **metadata)
        os.truncate(path, path.stat().st_size // 2)
        sys.audit("torn", path)
        save_file(tensors, path, **metadata)
    train.save_file = torn

    def forked(action):
        if child := os.fork():
            return os.waitpid(child, 0)[1]
        try:
            action()
        finally:
            os._exit(0)

    def die_at(touch, run, training):
        left = [touch]

        def on_event(event, arguments):
            left[0] -= event in ("open", "torn", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
            if left == [0]:
                left[0] -= 1                                            # the kill is an event too
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(on_event)
        save(run, training)

    def whole(run):
        folder, weights, state = run.newest()
        known = json.loads((run.folder / "manifest.json").read_text())["weights"]
        assert known[sha256(run.folder / "model.safetensors")] in (8, 12)
        with torch.random.fork_rng():                                   # a new model draws its first weights
            load_model(run.folder)
        return folder.name, [bits(x) for x in (*weights.values(), *state.values())]

    def saving(run, training):
        if training.done != step:
            return save(run, training)
        aside = run.folder.with_name("aside")

        def restore():
            shutil.rmtree(run.folder)
            shutil.copytree(aside, run.folder, copy_function=os.link)
        shutil.copytree(run.folder, aside, copy_function=os.link)
        earlier = whole(run)
        forked(lambda: save(run, training))
        later, complete = whole(run), files(run.folder)
        restore()
        touch, found = 1, []
        while os.WIFSIGNALED(forked(lambda: die_at(touch, run, training))):
            state = whole(run)
            assert state in (earlier, later)
            found.append(state[0])
            forked(lambda: save(run, training))
            again = {name: digest for name, digest in files(run.folder).items() if not name.endswith(".tmp")}
            assert whole(run) == later and again == complete, touch
            restore()
            touch += 1
        report.write_text(json.dumps(found))
        os._exit(0)
    train.Run.save = saving


def test_a_kill_at_any_point_of_saving_leaves_a_whole_checkpoint(root, away, tmp_path):
    """Row 8."""
    code, said = away(root, "--baseline", fault=dying_while_saving, arguments=(12, tmp_path / "report"))
    assert code == 0, said
    found = json.loads((tmp_path / "report").read_text())
    assert len(found) > 20 and found == sorted(found) and set(found) == {"step-000008", "step-000012"}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(source, monkeypatch, tmp_path):
    """Row 8: weights and optimizer, then the manifest, then the name."""
    training, events, replace, fsync = training_of(source), [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(str(new)), replace(old, new)))
    run = train.Run(tmp_path / "run", {}, 2, {})
    run.begin(training.model, stages.load_tokenizer(source))
    training.run(1)
    events.clear()
    run.save(training)
    names = [Path(event.removesuffix(f".{os.getpid()}.tmp")).name.lstrip(".") for event in events]
    assert names == ["model.safetensors", "optimizer.safetensors", "manifest.json", "manifest.json", "step-000001",
                     "manifest.json", "manifest.json", "model.safetensors"]


def killed_in_a_save(step, name):
    """Fault: SIGKILL when the save at `step` comes to rename a file of this name."""
    save, replace = train.Run.save, os.replace

    def saving(run, training):
        os.replace = renaming if training.done == step else replace
        save(run, training)

    def renaming(old, new):
        if Path(new).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
    train.Run.save = saving


@pytest.mark.parametrize("step, name", [
    (4, "step-000004"), (8, "step-000008"), (8, "model.safetensors"), (12, "step-000012"), (12, "model.safetensors")])
def test_after_a_kill_in_a_save_the_run_ends_alike(root, away, here, undisturbed, step, name):
    """Row 8, through to the end, also where the checkpoint is there and the folder's own weights are not yet."""
    code, said = away(root, "--with-ltm", fault=killed_in_a_save, arguments=(step, name))
    assert code == -signal.SIGKILL, said
    code, out, err = here(root, "--with-ltm", "--resume")
    assert code == 0, err
    assert fingerprint(root / "trained" / "with_ltm") == undisturbed("with_ltm")[1]


def dying_after(touches):
    """Fault: SIGKILL at the so-manieth touch of a file or step of the training."""
    left, run = [touches], train.Training.run

    def stepping(self, steps):
        run(self, steps)
        sys.audit("step")

    def on_event(event, arguments):
        left[0] -= event in ("step", "open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
        if left[0] == 0:
            left[0] -= 1                                                # the kill is an event too
            os.kill(os.getpid(), signal.SIGKILL)
    train.Training.run = stepping
    sys.addaudithook(on_event)


@pytest.mark.slow
def test_thirty_kills_and_thirty_resumes(root, away, tmp_path):
    """The soak: SIGKILL anywhere, 30 times, and the end is that of an undisturbed run."""
    flags, draw, resumed = ("--with-ltm", "--steps", "200", "--chained", "0.4"), random.Random(0), []
    other, folder = shutil.copytree(root, tmp_path / "other"), root / "trained" / "with_ltm"
    assert away(other, *flags)[0] == 0
    for _ in range(30):
        code, said = away(root, *flags, "--resume", fault=dying_after, arguments=(draw.randrange(20, 160),))
        assert code == -signal.SIGKILL, said
        manifest = folder / "manifest.json"
        resumed.append(json.loads(manifest.read_text())["step"] if manifest.exists() else 0)
    code, said = away(root, *flags, "--resume")
    print(f"30 kills, after which the newest weights were of {resumed}; {said.splitlines()[-1]}")
    assert code == 0 and len(set(resumed)) > 10
    assert fingerprint(folder) == fingerprint(other / "trained" / "with_ltm")


# ------------------------------------------------------------------ bad data, bad starts


@pytest.mark.parametrize("damage", ["cut", "cut even", "flipped", "uint32", "beyond the vocabulary"])
def test_damaged_data_is_refused_before_training(root, here, damage):
    """Rows 4, 5 and 6: what training sees is what prepare_data.py made."""
    path = root / "data" / "train.bin"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        os.truncate(path, len(data) - 1)
    elif damage == "cut even":
        os.truncate(path, len(data) - 32)
    elif damage == "uint32":
        np.frombuffer(data, np.uint16).astype(np.uint32).tofile(path)
    elif damage == "flipped":
        data[100] ^= 1
        path.write_bytes(data)
    else:                                                               # hashes and all made to fit
        data[100:102] = (60_000).to_bytes(2, "little")
        path.write_bytes(data)
        meta = json.loads((root / "data" / "meta.json").read_text())
        meta["splits"]["train"]["sha256"] = sha256(path)
        stages.write_json(root / "data" / "meta.json", {**meta, "sha256": stages.seal(meta)})
    assert refused(here(root, "--baseline"), str(path), "python prepare_data.py --root")
    assert not (root / "trained" / "baseline").exists()


@pytest.mark.parametrize("what", ["data", "initial weights", "memory settings", "steps", "lr", "regime"])
def test_a_run_goes_on_only_as_it_began(finished, here, monkeypatch, what):
    """Rows 7 and 15: what differs is named with both values, with --resume and without, and nothing is touched."""
    back_to(finished, 8)
    before, flags = files(finished / "trained" / "baseline"), ["--baseline"]
    if what == "data":
        path = finished / "corpus.jsonl"
        path.write_text(path.read_text().replace("memory", "forgetting"))
        prepare_again(finished)
        says = "data was "
    elif what == "steps":
        flags += ["--steps", "20"]
        says = "steps was 12, is 20"
    elif what == "regime":
        flags += ["--chained", "0.25"]
        says = "chained was 0.0, is 0.25"
    elif what == "lr":
        monkeypatch.setattr(train, "FULL", dataclasses.replace(SETTINGS, lr=1e-3))
        says = "lr was 0.0005, is 0.001"
    else:
        init = finished / "trained" / "init"
        model = load_model(init)
        says = "init was "
        if what == "memory settings":
            model.config.ltm_cosine = 0.7
            says = "init_config was "
        else:
            model.memory.from_state.weight.data += 1
        stages.save_model(model, stages.load_tokenizer(finished), init)
        stages.write_manifest(init)
    assert refused(here(finished, *flags, "--resume"), says, "--fresh")
    assert refused(here(finished, *flags), says, "holds a run already, at step 12", "--fresh")
    assert files(finished / "trained" / "baseline") == before


def test_a_run_that_is_there_is_never_started_over_unasked(finished, here, undisturbed):
    """Row 15."""
    folder = finished / "trained" / "baseline"
    before = files(folder)
    assert refused(here(finished, "--baseline"), "holds a run already, at step 12", "--resume", "--fresh")
    code, out, _ = here(finished, "--baseline", "--resume")
    assert code == 0 and "all 12 steps are done already" in out and files(folder) == before
    (folder / "checkpoints").rename(finished / "elsewhere")             # on a larger disk, say
    (folder / "checkpoints").symlink_to(finished / "elsewhere")
    assert here(finished, "--baseline", "--fresh")[0] == 0
    assert fingerprint(folder) == undisturbed("baseline")[1]
    assert files(finished / "elsewhere")                                # a link goes, what it points to stays


@pytest.mark.parametrize("gone", [["checkpoints"], ["checkpoints", "model.safetensors"]])
def test_a_run_without_checkpoints_is_over_where_it_ended(finished, here, gone):
    """They are large, and people remove them; or only what was measured came here."""
    folder = finished / "trained" / "baseline"
    for name in gone:
        shutil.rmtree(folder / name) if name == "checkpoints" else (folder / name).unlink()
    (folder / "evaluation.safetensors").write_bytes(b"measured")
    before = files(folder)
    code, out, _ = here(finished, "--baseline", "--resume")
    assert code == 0 and "all 12 steps are done already" in out and files(folder) == before
    assert refused(here(finished, "--baseline", "--resume", "--chained"), "other settings", "chained was 0.0, is 1.0",
                   "--fresh")
    assert files(folder) == before


@pytest.mark.parametrize("what, says", [("step", "at step 8, and no checkpoint to go on from"),
                                        ("weights", "model.safetensors is damaged"),
                                        ("manifest", "manifest.json is damaged")])
def test_a_run_that_cannot_be_gone_on_with_stays(finished, here, what, says):
    folder = finished / "trained" / "baseline"
    shutil.rmtree(folder / "checkpoints")
    path = folder / "manifest.json"
    if what == "weights":
        flip(folder / "model.safetensors", 3_000)
    else:
        path.write_text(path.read_text().replace('"step": 12', '"step": 8') if what == "step" else "{")
    before = files(folder)
    assert refused(here(finished, "--baseline", "--resume"), says, "--fresh")
    assert files(folder) == before
    assert here(finished, "--baseline", "--fresh")[0] == 0


def test_all_that_took_steps_is_on_record(finished, here, monkeypatch):
    """Each once: this code goes on where other code began."""
    monkeypatch.setattr(train, "commit", lambda: "another")
    folder = back_to(finished, 8) / "trained" / "baseline"
    first, = json.loads((folder / "manifest.json").read_text())["made_by"]
    assert here(finished, "--baseline", "--resume")[0] == 0
    assert json.loads((folder / "manifest.json").read_text())["made_by"] == [first, first | {"commit": "another"}]
    assert first.keys() == {"commit", "torch", "device"}


def test_a_window_narrower_than_a_row_is_refused(root, here):
    """Attention would not see all of what it is asked to predict from."""
    init = root / "trained" / "init"
    config = load_model(init).config
    config.stm_window = 8
    model = models.RevenaHybridTiny(config)
    stages.save_model(model, stages.load_tokenizer(root), init)
    stages.write_manifest(init)
    assert refused(here(root, "--baseline"), "has a window of 8 tokens, the rows", "add_memory.py")
    assert not (root / "trained" / "baseline").exists()


def test_initial_weights_that_changed_are_refused(root, here):
    init = root / "trained" / "init"
    (root / "trained" / "init_with_gru").mkdir()
    (root / "trained" / "init_with_gru" / "manifest.json").write_text("{")       # of another arm: no matter
    flip(init / "config.json", 300)
    assert refused(here(root, "--baseline"), "config.json", "python add_memory.py --root", "--seed 0")
    shutil.rmtree(init)
    assert refused(here(root, "--baseline"), "manifest.json is missing", "python add_memory.py --root")
    assert not (root / "trained" / "baseline").exists()


def test_two_runs_into_one_folder(root, start, forks, here):
    """Row 16."""
    reached, go_on = forks.Event(), forks.Event()
    process, log = start(root, "--baseline", fault=waiting_at, arguments=(2, reached, go_on))
    assert reached.wait(120)
    for flags in ([], ["--resume"], ["--fresh"]):
        assert refused(here(root, "--baseline", *flags), "another training run is writing")
    go_on.set()
    process.join(120)
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("flags", [
    ["--steps", "-1"], ["--steps", "0"], ["--steps", "99999999999"], ["--steps", "1e3"], ["--steps"], ["--seed", "x"],
    ["--seed", "-3"], ["--seed", "9" * 30], ["--baseline", "--with-ltm"], ["--resume", "--fresh"], ["--lr", "1"],
    ["--chained", "1.5"], ["--chained", "-0.1"], ["--chained", "nan"], ["--chained", "half"], ["--with-nothing"],
    ["extra"]])
def test_bad_flags(here, tmp_path, flags):
    """Row 23."""
    code, _, said = here(tmp_path, *flags)
    assert code == 2 and "usage:" in said and "error:" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help(here):
    code, out, _ = here(".", "--help")
    assert code == 0 and all(word in out for word in ("reads", "writes", "--resume", "--chained", "torchrun"))


def test_the_command_line(root):
    """As a user calls it: what goes wrong is one line, without a traceback."""
    shutil.rmtree(root / "trained" / "init")
    done = subprocess.run([sys.executable, PROJECT / "train.py", "--with-ltm", "--root", root], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("train.py: ") and f"python add_memory.py --root {root}" in done.stderr


def test_add_memory_clears_what_a_killed_one_left(make_root, stage, monkeypatch):
    monkeypatch.setitem(models.SIZES, "70M", dict(n_layer=1, n_embd=16, n_head=2))
    monkeypatch.setattr(add_memory, "TOTAL", (0, 1e9))
    monkeypatch.setattr(add_memory, "milliseconds", lambda _: (1, 1))
    monkeypatch.setattr(add_memory, "prove", lambda *_: None)
    root = make_root()
    (root / "trained" / ".init.tmp").mkdir(parents=True)
    (root / "trained" / ".init.tmp" / "torn").write_text("half")
    for _ in range(2):
        code, out, _ = stage(add_memory.main, "--root", root)
        assert code == 0 and "next: python train.py --baseline" in out
        assert {path.name for path in (root / "trained").iterdir()} == {"init", ".init.lock"}
    stages.read_manifest(root / "trained" / "init")
    for flags in (["--seed", "-1"], ["--seed", "9" * 30], ["--seed", "x"], ["--steps", "3"]):
        assert stage(add_memory.main, "--root", root, *flags)[0] == 2


def test_every_start_has_the_same_backbone(make_root, stage, toy, monkeypatch):
    """Byte for byte, whatever the memory beside it; and a memory draws from a generator of its own."""
    monkeypatch.setitem(models.SIZES, "quick", TINY)
    monkeypatch.setattr(add_memory, "milliseconds", lambda _: (1, 1))
    root = make_root()
    for flags in ([], ["--with-toy"]):
        code, out, err = stage(add_memory.main, "--root", root, "--quick", *flags)
        assert code == 0 and "proved" in out, err
    both = [load_file(root / "trained" / name / "model.safetensors") for name in ("init", "init_with_toy")]
    shared = [name for name in both[0] if name.startswith("backbone.")]
    assert all(bits(both[0][name]) == bits(both[1][name]) for name in shared) and len(shared) > 4
    assert {"memory.into", "memory.out"} <= both[1].keys()


# ------------------------------------------------------------------ damage


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, here, undisturbed, name, damage):
    """Row 12."""
    folder = finished / "trained" / "baseline"
    newest = folder / "checkpoints" / "step-000012"
    damage(newest / name)
    code, out, err = here(finished, "--baseline", "--resume")
    assert code == 0 and "from step 8" in out, err
    assert f"{newest} is passed over: {newest / name} is" in err
    assert fingerprint(folder) == undisturbed("baseline")[1]


def test_every_byte_of_a_manifest_counts(finished):
    """Row 12: none may be read as another number, another hash, another setting."""
    newest = finished / "trained" / "baseline" / "checkpoints" / "step-000012"
    whole = (newest / "manifest.json").read_bytes()
    run = train.Run(finished / "trained" / "baseline", json.loads(whole)["settings"], 2, {})
    draw = random.Random(0)
    for at in draw.sample([at for at in range(len(whole)) if not whole[at:at + 1].isspace()], 100):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        (newest / "manifest.json").write_bytes(damaged)
        assert run.newest()[0].name == "step-000008", (at, damaged)


def test_no_whole_checkpoint(finished, here):
    """Row 12."""
    for checkpoint in (finished / "trained" / "baseline" / "checkpoints").iterdir():
        halve(checkpoint / "optimizer.safetensors")
    before = files(finished)
    assert refused(here(finished, "--baseline", "--resume"), "no checkpoint in", "--fresh")
    assert files(finished) == before


def test_the_folders_own_weights_are_mended(finished, here, undisturbed):
    """A run that ended, whose own files no longer match: --resume puts its last checkpoint's weights back."""
    folder = finished / "trained" / "baseline"
    folder.joinpath("model.safetensors").unlink()
    shutil.copy(folder / "checkpoints" / "step-000008" / "model.safetensors", folder)
    (folder / "manifest.json").write_text("{")
    code, out, _ = here(finished, "--baseline", "--resume")
    assert code == 0 and "all 12 steps are done already" in out
    assert fingerprint(folder) == undisturbed("baseline")[1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights"] == {sha256(folder / "model.safetensors"): 12}


def test_a_torn_log_is_made_whole(finished, here, undisturbed):
    back_to(finished, 8)
    log = finished / "trained" / "baseline" / "history.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"\xff\x00[]\n" + lines[2].replace(b'"loss": ', b'"loss": 9') + lines[3][:20])
    assert here(finished, "--baseline", "--resume")[0] == 0
    assert fingerprint(finished / "trained" / "baseline") == undisturbed("baseline")[1]


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("place", ["checkpoints/step-000012", "checkpoints/step-000008", "init"])
def test_a_pickle_is_refused_and_not_run(finished, here, tmp_path, undisturbed, place):
    """Row 13: pickles and code in the place of weights, manifests made to fit them."""
    folder = finished / "trained" / ("init" if place == "init" else f"baseline/{place}")
    attack = pickle.dumps(Payload(tmp_path / "run"))
    for name in ("model.safetensors", "optimizer.safetensors", "pytorch_model.bin", "config.json"):
        if (folder / name).exists() or name.endswith(".bin"):
            (folder / name).unlink(missing_ok=True)                     # the checkpoint's own are links
            (folder / name).write_bytes(attack)
    (folder / "models.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    manifest = json.loads((folder / "manifest.json").read_text())
    stages.write_manifest(folder, **{k: v for k, v in manifest.items() if k not in ("files", "sha256")})
    result = here(finished, "--baseline", "--resume")
    if place == "init":
        assert refused(result, "config.json is damaged", "python add_memory.py")
    elif place.endswith("12"):
        assert result[0] == 0 and "step-000012 is passed over" in result[2]
        assert fingerprint(finished / "trained" / "baseline") == undisturbed("baseline")[1]
    else:
        assert result[0] == 0 and "all 12 steps are done" in result[1]
    assert not (tmp_path / "run").exists()
    pickle.loads(attack)
    assert (tmp_path / "run").exists()                                  # it would have


def test_names_in_a_manifest_lead_nowhere(finished, tmp_path):
    folder = finished / "trained" / "baseline" / "checkpoints" / "step-000012"
    secret = tmp_path / "secret"
    secret.write_text("not of this folder")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in (str(secret), os.path.relpath(secret, folder), "..", ".", "", "sub/../model.safetensors"):
        changed = {**manifest, "files": {**manifest["files"], name: sha256(secret)}}
        stages.write_json(folder / "manifest.json", {**changed, "sha256": stages.seal(changed)})
        with pytest.raises(StageError, match="damaged"):
            stages.read_manifest(folder)


def test_any_damage_gets_one_line(finished):
    """Fuzzed: bytes of initial weights and checkpoints cut off, changed, made up. Nothing runs, nothing is lost."""
    draw, trained = random.Random(1), finished / "trained"
    places = [path for path in sorted(trained.rglob("*")) if path.suffix in (".json", ".safetensors")
              and path.parent.name != "baseline"]
    run = train.Run(trained / "baseline", json.loads((trained / "baseline" / "manifest.json").read_text())["settings"], 2, {})
    for _ in range(60):
        path = draw.choice(places)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        match draw.choice(("cut", "flip", "noise", "empty", "nested")):
            case "cut":
                damaged = damaged[:draw.randrange(len(damaged))]
            case "flip":
                damaged[draw.randrange(min(len(damaged), 2_000))] ^= 1 << draw.randrange(8)
            case "noise":
                damaged = draw.randbytes(500)
            case "empty":
                damaged = b""
            case "nested":
                damaged = b"[" * 100_000
        path.unlink()
        path.write_bytes(damaged)
        try:
            stages.read_manifest(trained / "init")
            load_model(trained / "init")
            assert run.newest()[0].name.startswith("step-")
        except StageError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)
        path.write_bytes(whole)


# ------------------------------------------------------------------ the machine fails


def filling_up(step):
    """Fault: no file may grow beyond a megabyte when the run comes to save `step`."""
    save = train.Run.save

    def saving(run, training):
        if training.done == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        save(run, training)
    train.Run.save = saving


@pytest.mark.parametrize("how", ["a small disk", "a limit on file sizes"])
def test_a_full_disk_keeps_the_checkpoint_before(root, away, here, undisturbed, how):
    """Row 11."""
    folder = root / "trained" / "baseline"
    folder.mkdir()
    if how == "a small disk":
        mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a disk of 12 MB can be mounted by root alone")
    try:
        fault = {"fault": filling_up, "arguments": (8,)} if how != "a small disk" else {}
        code, said = away(root, "--baseline", **fault)
        line = next(line for line in said.splitlines() if "could not be written" in line)
        assert code == 1 and "Traceback" not in said, said
        assert "step 8 could not be written" in line and "step-000004" in line and "--resume" in line
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
        stages.read_manifest(folder / "checkpoints" / "step-000004")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["weights"][sha256(folder / "model.safetensors")] == 4
        moved = shutil.copytree(root, root.with_name("moved"))
        assert here(moved, "--baseline", "--resume")[0] == 0
        assert fingerprint(moved / "trained" / "baseline") == undisturbed("baseline")[1]
    finally:
        if how == "a small disk":
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_a_number_stops_the_run(root, here, monkeypatch, undisturbed, value):
    """Row 14."""
    objective = train.Training.objective

    def spoilt(self, *arguments):
        loss, sums = objective(self, *arguments)
        return (loss * value, sums * value) if self.done == 6 else (loss, sums)
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "objective", spoilt)
        code, _, err = here(root, "--baseline")
    folder = root / "trained" / "baseline"
    assert code == 1 and "not finite at step 7" in err and str(folder / "checkpoints" / "step-000004") in err
    assert "Traceback" not in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    assert json.loads((folder / "manifest.json").read_text())["weights"][sha256(folder / "model.safetensors")] == 4
    assert len((folder / "history.jsonl").read_text().splitlines()) == 3
    assert here(root, "--baseline", "--resume")[0] == 0                 # it was a passing fault: nothing was spoilt
    assert fingerprint(folder) == undisturbed("baseline")[1]


def test_out_of_memory_says_what_to_lower(finished, here, monkeypatch):
    """Row 18."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    before = files(back_to(finished, 8) / "trained" / "baseline" / "checkpoints")
    monkeypatch.setattr(train.Training, "objective", full)
    code, _, err = here(finished, "--baseline", "--resume")
    assert code == 1 and "out of memory" in err and "lower the batch size" in err and "Traceback" not in err
    assert files(finished / "trained" / "baseline" / "checkpoints") == before


# ------------------------------------------------------------------ wandb

FAKES = {
    "missing": None,
    "raising": "def init(**_): raise RuntimeError('no such host\\nand more')\nSettings = dict",
    "hanging on import": "import time\ntime.sleep(600)",
    "hanging in init": "import time\ndef init(**_): time.sleep(600)\nSettings = dict",
    "raising in log": """
        class Run:
            def log(self, *_, **__): raise ConnectionError('gone')
        def init(**_): return Run()
        Settings = dict""",
    "hanging in finish": """
        import time
        class Run:
            def log(self, *_, **__): pass
            def finish(self): time.sleep(600)
        def init(**_): return Run()
        Settings = dict""",
}


def with_wandb(wandb, folder):
    """Fault: a module by the name of wandb that misbehaves."""
    folder.mkdir()
    del os.environ["WANDB_MODE"]
    train.Wandb, stages.WANDB_SECONDS = wandb, 1
    if FAKES[folder.name] is None:
        sys.modules["wandb"] = None
    else:
        (folder / "wandb.py").write_text(textwrap.dedent(FAKES[folder.name]))
        sys.path.insert(0, str(folder))


@pytest.mark.parametrize("fake", FAKES)
def test_wandb_costs_a_warning_at_most(root, away, tmp_path, undisturbed, fake):
    """Row 17."""
    code, said = away(root, "--baseline", fault=with_wandb, arguments=(train.Wandb, tmp_path / fake))
    assert code == 0 and said.count("history.jsonl holds the same numbers") == 1, said
    assert "Traceback" not in said
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


def test_wandb_is_told_what_tells_the_runs_apart(root, here, monkeypatch):
    """One project and group for both arms; a job type each, or they would be one line where runs are grouped."""
    told = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        Settings=dict, init=lambda **named: (told.append(named), run)[1]))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(train, "Wandb", stages.Wandb)
    arms = stages.SPECIFIED
    for arm in arms:
        assert here(root, arm_flag(arm))[0] == 0
    assert {(named["project"], named["group"]) for named in told} == {(stages.WANDB_PROJECT, "seed0")}
    assert [named["job_type"] for named in told] == list(arms)
    meta = json.loads((root / "data" / "meta.json").read_text())
    for arm, named in zip(arms, told):
        config = named["config"]
        assert config["data"] == meta["splits"]["train"]["sha256"]
        assert config.pop("code") == {path.name: sha256(path) for path in PROJECT.glob("*.py")}
        # not among what a resumed run must have in common with the first: other code may go on
        assert config == json.loads((root / "trained" / arm / "manifest.json").read_text())["settings"]


DRIVER = f"""
import dataclasses, os, signal, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, stages, train
torch.set_num_threads(1)
train.FULL = dataclasses.replace(train.FULL, **{SMALL!r})
"""


def with_the_real_wandb(wandb, home):
    """Fault, if it is one: wandb itself, of a user without an account."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ["HOME"], train.Wandb = str(home), wandb
    os.chdir(home)


def test_wandb_offline_writes_into_the_runs_folder(root, away, tmp_path, undisturbed):
    """The real one, without an account: no question, no network, no word, no wait at the end."""
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    code, said = away(root, "--baseline", fault=with_the_real_wandb, arguments=(train.Wandb, home))
    assert code == 0 and "wandb: " not in said, said
    folder = root / "trained" / "baseline"
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert not (home / "wandb").exists()
    assert fingerprint(folder) == undisturbed("baseline")[1]


@pytest.mark.parametrize("environment, netrc, mode", [
    ({}, "", "offline"),
    ({"WANDB_MODE": "online"}, "", "offline"),                          # it would ask for a key
    ({"WANDB_MODE": "disabled"}, "", None),
    ({"WANDB_API_KEY": "x" * 40}, "", None),
    ({"WANDB_API_KEY": ""}, "", "offline"),
    ({}, "machine api.wandb.ai login user password x", None),
    ({}, "machine github.com login user password x", "offline"),
    ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine wandb.example.org login user password x", None),
    ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password x", "offline"),
    ({}, "machine", "offline"),
])
def test_wandb_is_online_only_with_credentials(tmp_path, monkeypatch, environment, netrc, mode):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
    assert stages.wandb_mode() == mode


# ------------------------------------------------------------------ nothing optional ends a run


def without_readers():
    """Fault: whoever read stdout and stderr has left."""
    for number in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(writer)
        os.close(reader)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)


def without_streams():
    """Fault: stdout and stderr were closed from the start."""
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None


@pytest.mark.parametrize("fault", [without_readers, without_streams])
def test_nobody_need_listen(root, away, undisturbed, fault):
    code, _ = away(root, "--baseline", fault=fault)
    assert code == 0
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


@pytest.mark.parametrize("what", ["history.jsonl", "README.md"])
def test_a_log_or_card_that_cannot_be_written_costs_a_warning(root, here, monkeypatch, undisturbed, what):
    """Here a folder stands in its place."""
    folder, begin_ = root / "trained" / "baseline", train.Run.begin

    def in_the_way(run, *arguments):
        begin_(run, *arguments)
        (run.folder / what / "inner").mkdir(parents=True)
    monkeypatch.setattr(train.Run, "begin", in_the_way)
    code, _, err = here(root, "--baseline")
    assert code == 0 and err.count("warning: ") == 1 and "Traceback" not in err, err
    assert (folder / what / "inner").is_dir()
    assert tensors(folder / "checkpoints" / "step-000012") == undisturbed("baseline")[1]["tensors"]
    assert here(root, "--baseline", "--resume")[0] == 0


@pytest.mark.parametrize("name", ["caf\udce9.jsonl", "two\nlines", "{braces} | and $(more)", "\ud83d"])
def test_whatever_the_source_is_called(root, here, name):
    """The card names it, after the weights are safe."""
    path = root / "data" / "meta.json"
    meta = json.loads(path.read_text()) | {"source": name}
    path.write_text(json.dumps(meta | {"sha256": stages.seal(meta)}))
    code, _, err = here(root, "--baseline")
    assert code == 0 and err == ""
    assert (root / "trained" / "baseline" / "README.md").is_file()


@pytest.mark.parametrize("main", [train.main, add_memory.main, prepare_data.main])
def test_a_root_whose_name_is_not_utf8_is_refused(root, stage, main):
    """The tokenizer's library opens no such names."""
    odd = root.rename(root.with_name("caf\udce9"))
    before = files(odd)
    assert refused(stage(main, "--root", odd), "not UTF-8", "--root")
    assert files(odd) == before


def test_the_card_comes_after_the_weights(root, here, monkeypatch, undisturbed):
    """Whatever it raises."""
    def raising(*_):
        folder = root / "trained" / "baseline"
        assert sha256(folder / "model.safetensors") == sha256(folder / "checkpoints/step-000012/model.safetensors")
        raise UnicodeError("no such\nletter")
    monkeypatch.setattr(train.Job, "card", raising)
    code, _, err = here(root, "--baseline")
    assert code == 0 and err == "warning: no model card was written (no such letter)\n"
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


def test_an_old_checkpoint_that_stays_does_no_harm(finished, here, undisturbed):
    """A file where a folder is expected cannot be removed as one."""
    checkpoints = back_to(finished, 8) / "trained" / "baseline" / "checkpoints"
    (checkpoints / "step-000001").write_text("in the way")
    assert here(finished, "--baseline", "--resume")[0] == 0
    assert fingerprint(finished / "trained" / "baseline") == undisturbed("baseline")[1]


def test_code_that_cannot_be_read_is_wandbs_trouble(root, here, tmp_path, monkeypatch, undisturbed):
    (tmp_path / "code" / "folder.py").mkdir(parents=True)
    monkeypatch.setattr(stages, "PROJECT", tmp_path / "code")
    monkeypatch.setattr(train, "Wandb", stages.Wandb)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    code, _, err = here(root, "--baseline")
    assert code == 0 and err.count("wandb is left out") == 1
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


# ------------------------------------------------------------------ the surroundings


ALONE = {"WORLD_SIZE": "2"}
ALL = {**ALONE, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment, says", [
    (ALONE, "LOCAL_RANK="), ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"), ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE="), ({**ALL, "LOCAL_RANK": ""}, "LOCAL_RANK=''"),
    ({**ALL, "LOCAL_RANK": "0.5"}, "LOCAL_RANK='0.5'"), ({**ALL, "RANK": "first"}, "RANK='first'"),
    ({**ALL, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"), ({**ALL, "MASTER_ADDR": ""}, "MASTER_ADDR"),
    ({**ALL, "MASTER_PORT": "xyz"}, "MASTER_PORT='xyz'"), ({**ALL, "MASTER_PORT": "99999999"}, "find one another")])
def test_what_torchrun_did_not_say_is_one_line(root, here, monkeypatch, environment, says):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refused(here(root, "--baseline"), says, "torchrun --nproc_per_node=2 train.py")
    assert not (root / "trained" / "baseline").exists()


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "0"},
                                         {**ALL, "WORLD_SIZE": "1"}])
def test_one_process_needs_nobody(root, here, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert here(root, "--baseline", "--steps", "1")[0] == 0


def waiting_for_others(environment, waiting):
    """Fault: a process of two that torchrun is said to have started; it says when it begins to wait for the other."""
    os.environ.update(environment)
    join = train.dist.init_process_group

    def joining(*arguments, **named):
        waiting.set()
        join(*arguments, **named)
    train.dist.init_process_group = joining


@pytest.mark.parametrize("rank, number", [("0", signal.SIGTERM), ("1", signal.SIGTERM), ("0", signal.SIGINT)])
def test_who_waits_for_another_process_hears_signals(root, start, forks, rank, number):
    """With an address but no peer, as the first (which others look for) or the second (which looks for the first)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waiting = forks.Event()
    environment = {**ALL, "RANK": rank, "MASTER_PORT": str(port)}
    process, log = start(root, "--baseline", fault=waiting_for_others, arguments=(environment, waiting))
    assert waiting.wait(120)
    os.kill(process.pid, number)
    process.join(60)                                                    # it would wait for half an hour
    assert process.exitcode == -number, log.read_text()
    assert not (root / "trained" / "baseline").exists()


@pytest.mark.parametrize("chained", [(), ("--chained",)])
def test_outside_the_main_thread(root, small, monkeypatch, undisturbed, chained):
    """A notebook's or a server's: Python allows no signal handlers there."""
    codes = []

    def work():
        with pytest.raises(SystemExit) as exit_:
            stages.run_stage(lambda: train.main(["--root", str(root), "--baseline", *chained]))
        codes.append(exit_.value.code)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert codes == [0]
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline", *chained)[1]


def test_a_notebooks_output_will_do(root, here, monkeypatch, undisturbed):
    """It is no file: it has neither a descriptor nor an encoding to reconfigure."""
    class Cell:
        def __init__(self):
            self.said = ""

        def write(self, what):
            self.said += what

        def flush(self):
            pass
    out, err = Cell(), Cell()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert here(root, "--baseline")[0] == 0
    assert "12 steps of 2 x 16 tokens" in out.said and "Traceback" not in err.said
    assert fingerprint(root / "trained" / "baseline") == undisturbed("baseline")[1]


def test_a_terminal_of_80_columns_shows_all(root, here, monkeypatch):
    """Under the bar, too: the names alone are wider."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    shown = functools.partial(train.tqdm, file=terminal, ncols=79, ascii=True)
    monkeypatch.setattr(train, "tqdm", shown)
    monkeypatch.setattr(train, "say", lambda *_: None)
    assert here(root, "--with-ltm")[0] == 0
    bar, below = terminal.getvalue().replace("\x1b[A", "\r").rstrip("\r\n").split("\n")[-2:]
    bar, below = bar.rpartition("\r")[2], below.rpartition("\r")[2]
    for name in ("12/12", "<00:00", "LTM_enabled=1", "loss=", "tok/sec="):
        assert name in bar
    for name in ("routed_token_ratio=", "avg_surprisal_routed=", "ltm_hit_rate="):
        assert name in below
    assert all(len(part) <= 79 for part in re.split("[\r\n]", terminal.getvalue()))
    full = shown.func.format_meter(10_000, 10_000, 3_599, ncols=79, bar_format=train.BAR,
                                   postfix="LTM_enabled=1, loss=10.825, tok/sec=369,077")
    assert full.endswith("tok/sec=369,077]") and len(full) <= 79


@pytest.mark.parametrize("mask", [
    0o027, 0o002, pytest.param(0o022, marks=pytest.mark.slow), pytest.param(0o077, marks=pytest.mark.slow)])
def test_modes_follow_the_umask(source, root, here, mask):
    """Of every file in the folder and in its checkpoints, whatever library wrote it, also after going on."""
    before = os.umask(mask)
    try:
        assert here(root, "--with-ltm")[0] == 0
        shutil.rmtree(root / "trained" / "with_ltm" / "checkpoints" / "step-000012")
        assert here(root, "--with-ltm", "--resume")[0] == 0
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (root / "trained" / "with_ltm").rglob("*") if path.is_file()}
    assert len(modes) > 15 and set(modes.values()) == {0o666 & ~mask}, modes


@pytest.mark.parametrize("number, held", [
    (errno.ENOSYS, False), (errno.ENOLCK, False), (errno.EOPNOTSUPP, False), (errno.EWOULDBLOCK, True),
    (errno.EACCES, True)])
def test_only_a_held_lock_refuses(root, here, monkeypatch, number, held):
    """A file system without locks gives none: better to go on than never to start."""
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(stages.fcntl, "flock", flock)
    result = here(root, "--baseline", "--steps", "1")
    assert refused(result, "another training run is writing") if held else result[0] == 0


@pytest.mark.parametrize("how", ["its own", "changed", "GIT_DIR", "inside another", "no repository"])
def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch, how):
    """Not that of a repository which it happens to lie in, or which the environment names."""
    def git(folder, *words):
        subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)
        return folder
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    project, other = tmp_path / "project", tmp_path
    project.mkdir()
    (project / "code.py").write_text("pass")
    monkeypatch.setattr(stages, "PROJECT", project)
    if how in ("inside another", "GIT_DIR"):
        other = tmp_path if how == "inside another" else tmp_path / "other"
        other.mkdir(exist_ok=True)
        git(other, "init")
        git(other, "commit", "--allow-empty", "-m", "another")
    if how in ("its own", "changed", "GIT_DIR"):
        git(project, "init")
        git(project, "add", "code.py")
        git(project, "commit", "-m", "first")
    if how == "changed":
        (project / "code.py").write_text("import os")
    if how == "GIT_DIR":
        monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    found = stages.commit()
    if how in ("inside another", "no repository"):
        assert found == "unknown"
        return
    monkeypatch.delenv("GIT_DIR", raising=False)
    own = subprocess.run(["git", "-C", project, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    assert found == own.strip() + "-dirty" * (how == "changed")


# ------------------------------------------------------------------ several processes, and the GPU


@pytest.mark.slow
def test_torchrun_shares_the_batch(root, away, here, undisturbed):
    """One process up to step 3, two up to step 8, where one of them is told to stop, and one again: the same losses."""
    assert away(root, "--with-ltm", fault=stopping_at, arguments=(3,))[0] == 143
    stop = """
    run = train.Training.run
    def stopping(self, steps):
        run(self, steps)
        if self.done == 8 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    train.Training.run = stopping
    stages.run_stage(train.main)
    """
    driver = root / "driver.py"
    driver.write_text(DRIVER + textwrap.dedent(stop))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", driver,
                           "--with-ltm", "--resume", "--root", root], capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                               "WANDB_MODE": "disabled"})
    assert done.returncode == 1 and "stopped at step 8 and saved" in done.stderr, done.stderr
    assert done.stdout.count("from step 3") == 1
    assert here(root, "--with-ltm", "--resume")[0] == 0
    one, two = undisturbed("with_ltm")[1]["log"], fingerprint(root / "trained" / "with_ltm")["log"]
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for ours, theirs in zip(two, one):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("arm", (*stages.SPECIFIED, "with_store"))              # which has rates of its own
@pytest.mark.filterwarnings("error:The AccumulateGrad node")                    # it would open every user's log
def test_the_captured_step_is_the_step(root, arm, share):
    """Replayed as CUDA graphs, one a regime, or called one by one, and twice over, the steps leave the same bits."""
    if arm not in stages.SPECIFIED:
        begin(root, arm)

    def run(captured):
        torch.manual_seed(0)
        training = training_of(root, arm, share)
        training = train.Training(training.model.float().cuda(), training.rows.numpy(), training.plan, SETTINGS)
        ready = None
        while training.done < 12:
            if ready != training.chained:
                ready = training.chained
                with torch.random.fork_rng(devices=[]):                 # a compiler draws, the first time; no step does
                    training.accelerate()
                if not captured:
                    training.graphs.clear()
            training.run(training.ahead() if training.done < 12 else 0)
        return {**training.weights(), **training.state()}
    first, again, uncaptured = run(True), run(True), run(False)
    assert len(first["statistics"]) == 12 and torch.isfinite(first["statistics"]).all()
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
        assert torch.equal(x, uncaptured[name]), name
