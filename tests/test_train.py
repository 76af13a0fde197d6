"""train.py: what it computes, and what becomes of a run when something goes wrong.

A stand-in of the real thing trains here: one layer of width 8 on rows of 16 tokens, twelve steps, five to an epoch.
Faults come from outside. A run that has to be killed, or told to stop, is a process of its own: a fork of one that has
imported everything already (multiprocessing's forkserver).
"""

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import add_memory
import models
import prepare_data
import train
from models import EOT, StageError, load_model, load_split, sha256

PROJECT = Path(train.__file__).parent
CONSTANTS = dict(STEPS=12, BATCH=2, WARMUP=3, LOG_EVERY=2, CHECKPOINT_STEPS=4)
ARMS = {"baseline": "--baseline", "with_ltm": "--with-ltm"}


class NoWandb:
    """Stands in for Wandb where a test is about something else."""

    def __init__(self, *_):
        pass

    def log(self, entry):
        pass

    def finish(self):
        pass


# ------------------------------------------------------------------ the stand-in, and runs of it


def prepared(root, tokenizer_dir, words, length, count, window):
    """`root` with data in it: `count` documents of `length` words, drawn from `words`, in rows of `window` tokens."""
    shutil.copytree(tokenizer_dir, root / "data" / "tokenizer")
    texts = [" ".join(random.Random(seed).choices(words, k=length)) for seed in range(count)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "WINDOW", window)
        patch.setattr(prepare_data, "STRIDE", window // 2)
        prepare_data.prepare(root, [root / "corpus.jsonl"], False)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A root with data (ten rows of 16 tokens) and trained/init: what the tests copy and train in."""
    words = ["the", "of", "and", "to", "in", "surprise", "memory", "window", "angle", "eleven"]
    root = prepared(tmp_path_factory.mktemp("source"), tokenizer_dir, words, 12, 11, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SIZES, "tiny", dict(n_layer=1, n_embd=8, n_head=1))
        _, hybrid = add_memory.make_models("tiny", 0)
    (root / "trained" / "init").mkdir(parents=True)
    models.save_model(hybrid, models.load_tokenizer(root), root / "trained" / "init")
    models.manifest_of(root / "trained" / "init", seed=0)
    assert load_split(root, "train")[0].shape == (10, 16)
    return root


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root")


@pytest.fixture
def here(stage, monkeypatch):
    """here(root, *flags): train.py in this process; (exit code, stdout, stderr)."""
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "Wandb", NoWandb)
    monkeypatch.setattr(os, "fsync", lambda _: None)            # for power cuts alone, and slow

    def run(root, *flags):
        gc.collect()                            # an earlier run's lock may still be held by the traceback that ended it
        return stage(train.main, "--root", root, *flags)
    return run


def _child(log, root, flags, fault, arguments):
    """What a forked process does: train.py, with its output in `log`, after `fault` has been put in."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    vars(train).update(CONSTANTS, Wandb=NoWandb)
    os.fsync = lambda _: None
    if fault:
        fault(*arguments)
    sys.argv = ["train.py", *flags]
    models.run_stage(lambda: train.main(["--root", str(root), *flags]))


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
    def start(root, *flags, fault=None, arguments=()):
        log = tmp_path / "log"
        process = forks.Process(target=_child, args=(log, root, flags, fault, arguments))
        process.start()
        return process, log
    return start


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


def bits(x):
    """The hash of a tensor."""
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def fingerprint(folder):
    """What a run left, to the bit: weights, optimizer state, and the log without its clock."""
    newest = max((folder / "checkpoints").glob("step-*"))
    log = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    tensors = {**load_file(newest / "model.safetensors"), **load_file(newest / "optimizer.safetensors")}
    assert sha256(folder / "model.safetensors") == sha256(newest / "model.safetensors")
    return {
        "checkpoint": newest.name,
        "tensors": {name: bits(x) for name, x in tensors.items()},
        "log": [{k: v for k, v in entry.items() if k not in ("tok/sec", "ETA")} for entry in log],
    }


def files(folder):
    """{path: hash} of every file below a folder but the lock."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """undisturbed[arm]: a finished run's root, fingerprint and every batch that it saw."""
    runs, objective = {}, train.Training._objective
    for arm, flag in ARMS.items():
        root, seen = shutil.copytree(source, tmp_path_factory.mktemp("undisturbed") / "root"), []
        with pytest.MonkeyPatch.context() as patch:
            for name, value in CONSTANTS.items():
                patch.setattr(train, name, value)
            patch.setattr(train, "Wandb", NoWandb)
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(train.Training, "_objective", lambda self, tokens, *rest: (
                seen.append(tokens.tolist()), objective(self, tokens, *rest))[1])
            assert train.main(["--root", str(root), flag]) is None
        runs[arm] = root, fingerprint(root / "trained" / arm), seen
    return runs


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the finished baseline run, to be damaged."""
    return shutil.copytree(undisturbed["baseline"][0], tmp_path / "finished")


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


# ------------------------------------------------------------------ what it computes


def test_a_run_leaves_what_it_promises(undisturbed):
    root, result, _ = undisturbed["with_ltm"]
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
    assert load_model(folder).config.ltm_enabled
    assert not any(path.name.endswith(".tmp") for path in folder.rglob("*"))


def test_both_arms_start_alike_and_see_the_same_rows(undisturbed):
    (root, plain, batches), (other, _, batches_with) = undisturbed["baseline"], undisturbed["with_ltm"]
    assert batches == batches_with and len(batches) == 12
    settings = [json.loads((folder / "manifest.json").read_text())["settings"]
                for folder in (root / "trained" / "baseline", other / "trained" / "with_ltm")]
    assert settings[0] == {**settings[1], "arm": "baseline"}
    init = load_file(root / "trained" / "init" / "model.safetensors")
    assert settings[0]["init"] == sha256(root / "trained" / "init" / "model.safetensors")
    for name, x in init.items():        # the baseline never touches the memory that it does not use
        same = bits(x) == plain["tensors"][name]
        assert same == (name.startswith("memory.") or name == "backbone.rotary"), name
    assert not load_model(root / "trained" / "baseline").config.ltm_enabled


def test_each_epoch_sees_every_row_once():
    order = train.row_order(10, 12, 2, 0)
    assert order.shape == (12, 2)
    for epoch in (order[:5], order[5:10]):
        assert sorted(epoch.flatten().tolist()) == list(range(10))
    assert order[:5].tolist() != order[5:10].tolist()
    assert torch.equal(train.row_order(10, 8, 2, 0), order[:8])         # more steps change no earlier ones
    assert not torch.equal(train.row_order(10, 12, 2, 1), order)
    assert sorted(train.row_order(3, 4, 2, 0).flatten()[:6].tolist()) == [0, 0, 1, 1, 2, 2]   # a batch over an edge


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = train.learning_rates(10_000)
    assert rates[0] == pytest.approx(train.LR / 500) and rates[499] == pytest.approx(train.LR)
    assert rates.argmax() in (499, 500) and (rates[501:] <= rates[500:-1]).all()
    assert rates[5_250] == pytest.approx((train.LR + train.MIN_LR) / 2)     # half-way along
    assert rates[-1] == pytest.approx(train.MIN_LR, rel=1e-4) and (rates >= 1e-6).all()


def test_where_the_weights_start():
    """transformers passes over custom modules without parameters of their own: what is said to be set must be seen."""
    _, model = add_memory.make_models("quick", 0)
    for name, x in model.named_parameters():
        if name == "backbone.embed.weight":
            assert abs(x.std().item() / 0.02 - 1) < 0.01 and abs(x.mean().item()) < 1e-3
        else:
            bound = (x.size(1) if x.dim() > 1 else model.config.n_embd) ** -0.5
            assert 0.9 * bound < x.abs().max().item() <= bound, name
            assert abs(x.std().item() / (bound / 3 ** 0.5) - 1) < 0.1, name


def test_adamw_is_adamw():
    draw = torch.Generator().manual_seed(0)
    ours = [torch.randn(size, generator=draw) for size in ((5, 7), (6,))]
    theirs = [x.double().requires_grad_() for x in ours]
    decay = [train.WEIGHT_DECAY, 0.0]
    optimizer = torch.optim.AdamW([dict(params=[x], weight_decay=d) for x, d in zip(theirs, decay)], betas=train.BETAS,
                                  eps=train.EPS)
    first, second = ([torch.zeros_like(x) for x in ours] for _ in range(2))
    go, halt = torch.tensor(False), torch.tensor(True)
    for step, rate in enumerate((1e-3, 5e-3, 2e-3, 1e-2, 1e-4) * 8, 1):
        # some gradients vanish, as those of tokens that did not occur do
        gradients = [torch.randn(x.shape, generator=draw) * (torch.rand(x.shape, generator=draw) < 0.5) for x in ours]
        # a norm above CLIP scales them down, one below it does not scale them up
        norm = torch.tensor(train.CLIP * (2.0, 0.5, 0.0)[step % 3])
        for x, g in zip(theirs, gradients):
            x.grad = g.double() * (0.5, 1.0, 1.0)[step % 3]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rate, step = torch.tensor(rate), torch.tensor(float(step))
        copies = [x.bfloat16() for x in ours]
        for copy, x, g, m, v, d in zip(copies, ours, gradients, first, second, decay):
            train.adamw(copy, x, g, m, v, d, rate, step, norm, go)
            assert torch.equal(copy, x.bfloat16())
            before = x.clone()
            train.adamw(None, x, g * torch.nan, m.clone(), v.clone(), d, rate, step, norm, halt)
            assert torch.equal(x, before)
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.double(), y.detach(), rtol=2e-6, atol=2e-6)


def test_norms_are_those_of_each_tensor_whatever_their_dtypes():
    draw = torch.Generator().manual_seed(0)
    mixed = [(torch.randn(n, 3, generator=draw) * n).to((torch.float32, torch.bfloat16)[n % 2]) for n in range(1, 7)]
    norms = train.norms_of(mixed)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.stack([x.float().norm() for x in mixed]))


def training_of(source, monkeypatch, ltm=True, steps=12):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(train, name, value)
    rows, _ = load_split(source, "train")
    model = load_model(source / "trained" / "init")
    model.config.ltm_enabled = ltm
    return train.Training(model, rows, train.row_order(len(rows), steps, 2, 0))


@pytest.mark.parametrize("before", [0, 3, 4])
def test_the_log_times_the_steps_that_it_saw(source, monkeypatch, tmp_path, before):
    """A second a step by a clock of ours, from the first line on, also where an interval began before the start."""
    training = training_of(source, monkeypatch)
    monkeypatch.setattr(train, "LOG_EVERY", 4)
    monkeypatch.setattr(train.time, "perf_counter", lambda: 100.0 + training.done)
    training.run(before)
    history = train.History(types.SimpleNamespace(folder=tmp_path), training, True, NoWandb())
    while training.done < 12:
        training.run(1)
        history.note()
        history.settle()
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines[before // 4:]:
        assert line["tok/sec"] == pytest.approx(2 * 16) and line["ETA"] == pytest.approx(12 - line["step"])


@pytest.mark.parametrize("ltm", [False, True])
def test_a_step_is_a_step_of_plain_autograd(source, monkeypatch, ltm):
    """One look-up of the embedding left to autograd, clip_grad_norm_ and torch's AdamW give the same weights."""
    monkeypatch.setattr(train, "CLIP", 0.15)                            # so that both groups are clipped
    ours = training_of(source, monkeypatch, ltm)
    plain = load_model(source / "trained" / "init").train()
    plain.config.ltm_enabled = ltm
    groups = [[p for n, p in plain.named_parameters() if n.startswith(start)] for start in ("backbone.", "memory.")]
    optimizer = torch.optim.AdamW([dict(params=[p], weight_decay=0.1 if p.dim() > 1 else 0.0)
                                   for group in groups[:1 + ltm] for p in group], betas=train.BETAS, eps=train.EPS)
    for step in range(3):
        tokens = ours.rows[ours.order[step]].long()
        targets = F.pad(tokens[:, 1:], (0, 1), value=EOT)
        scores, real = plain.score(tokens, targets), targets != EOT
        loss = -scores.objective[real].mean()
        optimizer.zero_grad()
        loss.backward()
        norms = [float(torch.nn.utils.clip_grad_norm_(group, train.CLIP)) for group in groups[:1 + ltm]]
        for group in optimizer.param_groups:
            group["lr"] = float(ours.rates[step])
        optimizer.step()
        ours.run(1)
        row = dict(zip(train.STATISTICS, ours.statistics[step].tolist()))
        assert row["loss"] == pytest.approx(-scores.log_p[real].mean().item(), rel=1e-5)
        assert row["routed_token_ratio"] == pytest.approx(float(scores.stored[real].float().mean()))
        assert row["ltm_hit_rate"] == pytest.approx(float(scores.hit[real].float().mean()))
        assert [row["grad_norm"], row["grad_norm_ltm"]][:1 + ltm] == pytest.approx(norms, rel=1e-4)
        assert min(norms) > train.CLIP
    for (name, p), (_, q) in zip(ours.model.named_parameters(), plain.named_parameters()):
        assert torch.allclose(p, q, atol=2e-6), name


@pytest.mark.parametrize("field, spoil", [
    ("objective", lambda x: x * torch.inf),                             # the gradients are not finite either
    ("objective", lambda x: x + torch.inf), ("objective", lambda x: x - torch.inf),     # they are finite
    ("objective", lambda x: x + torch.nan), ("log_p", lambda x: x + torch.inf)])
def test_no_weight_moves_after_a_nan(source, monkeypatch, field, spoil):
    """Row 14, the device's side: also the steps that are already under way when the host learns of it."""
    training = training_of(source, monkeypatch)
    training.run(3)
    before, score = {name: x.clone() for name, x in training.weights().items()}, training.model.score

    def spoilt(*arguments, **named):
        scores = score(*arguments, **named)
        return scores._replace(**{field: spoil(getattr(scores, field))})
    with monkeypatch.context() as patch:
        patch.setattr(training.model, "score", spoilt)
        training.run(1)
    training.run(2)
    assert all(torch.equal(x, before[name]) for name, x in training.weights().items())
    assert torch.isfinite(training.statistics[:3]).all() and training.statistics[3:6].isnan().all()


def test_the_log_is_whole_wherever_steps_are_taken(root, here, undisturbed, monkeypatch):
    """CUDA capture takes three steps before the loop, past the end of an interval of two."""
    monkeypatch.setattr(train.Training, "accelerate", lambda self: self.run(3) or "three steps first")
    assert here(root, "--baseline")[0] == 0
    assert fingerprint(root / "trained" / "baseline") == undisturbed["baseline"][1]


# ------------------------------------------------------------------ stop and go on


@pytest.mark.parametrize("arm", ARMS)
def test_stopped_anywhere_a_run_goes_on_to_the_same_bits(root, away, undisturbed, arm):
    """Row 10: before the first step, in mid-epoch, at the epoch's edge, and after the last step."""
    folder = root / "trained" / arm
    for step in (0, 3, 5, 11) if arm == "baseline" else (3, 5):
        fault = {"fault": stopping_at, "arguments": (step,)} if step else {"fault": stopping_before_the_first_step}
        code, said = away(root, ARMS[arm], "--resume", **fault)
        assert code == 143 and f"stopped at step {step} and saved; go on with --resume" in said, said
        assert json.loads((folder / "manifest.json").read_text())["step"] == step
        load_model(folder)
    code, said = away(root, ARMS[arm], "--resume")
    assert code == 0 and "from step" in said, said
    assert fingerprint(folder) == undisturbed[arm][1]
    before = files(folder)
    code, said = away(root, ARMS[arm], "--resume")
    assert code == 0 and "all 12 steps are done already" in said and files(folder) == before


def stopping_before_the_first_step():
    train.Training.accelerate = lambda self: os.kill(os.getpid(), signal.SIGTERM) or "stopped at once"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(root, start, here, undisturbed, number, code):
    """Row 9."""
    process, log = start(root, "--baseline", fault=slowly)
    history = root / "trained" / "baseline" / "history.jsonl"
    while process.is_alive() and not (history.exists() and history.read_text()):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code and "saved; go on with --resume" in log.read_text(), log.read_text()
    assert "Traceback" not in log.read_text()
    assert here(root, "--baseline", "--resume")[0] == 0
    assert fingerprint(root / "trained" / "baseline") == undisturbed["baseline"][1]


def slowly(seconds=0.1):
    run = train.Training.run
    train.Training.run = lambda self, steps: (run(self, steps), time.sleep(seconds))


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
        restore = lambda: (shutil.rmtree(run.folder), shutil.copytree(aside, run.folder, copy_function=os.link))
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
    training, events, replace, fsync = training_of(source, monkeypatch), [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(str(new)), replace(old, new)))
    run = train.Run(tmp_path / "run", {})
    run.begin(training.model, models.load_tokenizer(source))
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
    assert fingerprint(root / "trained" / "with_ltm") == undisturbed["with_ltm"][1]


@pytest.mark.slow
def test_thirty_kills_and_thirty_resumes(root, start, away, tmp_path):
    """The soak: SIGKILL at random moments, and the end is that of an undisturbed run."""
    arguments, draw, resumed = ("--with-ltm", "--steps", "400"), random.Random(0), []
    other, folder = shutil.copytree(root, tmp_path / "other"), root / "trained" / "with_ltm"
    assert away(other, *arguments)[0] == 0

    def steps():
        """How far the log has come: a line every two steps."""
        log = folder / "history.jsonl"
        return 2 * log.read_text().count("\n") if log.exists() else 0
    for _ in range(30):
        process, log = start(root, *arguments, "--resume", fault=slowly, arguments=(0.03,))
        enough = steps() + draw.randrange(6)
        while process.is_alive() and steps() < enough:
            time.sleep(0.01)
        process.join(draw.uniform(0, 0.3))
        assert process.is_alive(), log.read_text()
        process.kill()
        process.join()
        resumed.append(int(json.loads((folder / "manifest.json").read_text())["step"]))
    code, said = away(root, *arguments, "--resume")
    print(f"30 kills, after which the newest checkpoint was {resumed}; {said.splitlines()[-1]}")
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
        models.write_json(root / "data" / "meta.json", {**meta, "sha256": models.seal(meta)})
    assert refused(here(root, "--baseline"), str(path), "python prepare_data.py --root")
    assert not (root / "trained" / "baseline").exists()


@pytest.mark.parametrize("what", ["data", "initial weights", "memory settings", "steps", "LR"])
def test_a_run_goes_on_only_as_it_began(finished, here, monkeypatch, what):
    """Rows 7 and 15: what differs is named with both values, with --resume and without, and nothing is touched."""
    back_to(finished, 8)
    before, flags = files(finished / "trained" / "baseline"), ["--baseline"]
    if what == "data":
        path = finished / "corpus.jsonl"
        path.write_text(path.read_text().replace("memory", "forgetting"))
        monkeypatch.setattr(prepare_data, "WINDOW", 16)
        monkeypatch.setattr(prepare_data, "STRIDE", 8)
        prepare_data.prepare(finished, [path], False)
        says = "data was "
    elif what == "steps":
        flags += ["--steps", "20"]
        says = "steps was 12, is 20"
    elif what == "LR":
        monkeypatch.setattr(train, "LR", 1e-3)
        says = "lr was 0.0005, is 0.001"
    else:
        init = finished / "trained" / "init"
        model = load_model(init)
        says = "init was "
        if what == "memory settings":
            model.config.ltm_cosine = 0.7
            says = "init_config was "
        else:
            model.memory.from_state.bias.data += 1
        models.save_model(model, models.load_tokenizer(finished), init)
        models.manifest_of(init)
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
    assert fingerprint(folder) == undisturbed["baseline"][1]
    assert files(finished / "elsewhere")                                # a link goes, what it points to stays


def test_initial_weights_that_changed_are_refused(root, here):
    init = root / "trained" / "init"
    flip(init / "config.json", 300)
    assert refused(here(root, "--baseline"), "config.json", "python add_memory.py --root", "--seed 0")
    shutil.rmtree(init)
    assert refused(here(root, "--baseline"), "manifest.json is missing", "python add_memory.py --root")
    assert not (root / "trained" / "baseline").exists()


def test_two_runs_into_one_folder(root, start, here):
    """Row 16."""
    process, log = start(root, "--baseline", fault=slowly)
    while process.is_alive() and not (root / "trained" / "baseline" / "history.jsonl").exists():
        time.sleep(0.02)
    for flags in ([], ["--resume"], ["--fresh"]):
        assert refused(here(root, "--baseline", *flags), "another training run is writing")
    process.join(60)
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("flags", [
    ["--steps", "-1"], ["--steps", "0"], ["--steps", "99999999999"], ["--steps", "1e3"], ["--steps"], ["--seed", "x"],
    ["--seed", "-3"], ["--seed", "9" * 30], ["--baseline", "--with-ltm"], ["--resume", "--fresh"], ["--lr", "1"],
    ["extra"]])
def test_bad_flags(here, tmp_path, flags):
    """Row 23."""
    code, _, said = here(tmp_path, *flags)
    assert code == 2 and "usage:" in said and "error:" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_help(here):
    code, out, _ = here(".", "--help")
    assert code == 0 and all(word in out for word in ("reads", "writes", "--resume", "torchrun"))


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
        assert [path.name for path in (root / "trained").iterdir()] == ["init"]
    models.read_manifest(root / "trained" / "init")
    for flags in (["--seed", "-1"], ["--seed", "9" * 30], ["--seed", "x"], ["--steps", "3"]):
        assert stage(add_memory.main, "--root", root, *flags)[0] == 2


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
    assert fingerprint(folder) == undisturbed["baseline"][1]


def test_every_byte_of_a_manifest_counts(finished):
    """Row 12: none may be read as another number, another hash, another setting."""
    newest = finished / "trained" / "baseline" / "checkpoints" / "step-000012"
    whole = (newest / "manifest.json").read_bytes()
    run = train.Run(finished / "trained" / "baseline", json.loads(whole)["settings"])
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
    assert fingerprint(folder) == undisturbed["baseline"][1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights"] == {sha256(folder / "model.safetensors"): 12}


def test_a_torn_log_is_made_whole(finished, here, undisturbed):
    back_to(finished, 8)
    log = finished / "trained" / "baseline" / "history.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"\xff\x00[]\n" + lines[2].replace(b'"loss": ', b'"loss": 9') + lines[3][:20])
    assert here(finished, "--baseline", "--resume")[0] == 0
    assert fingerprint(finished / "trained" / "baseline") == undisturbed["baseline"][1]


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
    models.manifest_of(folder, **{k: v for k, v in manifest.items() if k not in ("files", "sha256")})
    result = here(finished, "--baseline", "--resume")
    if place == "init":
        assert refused(result, "config.json is damaged", "python add_memory.py")
    elif place.endswith("12"):
        assert result[0] == 0 and "step-000012 is passed over" in result[2]
        assert fingerprint(finished / "trained" / "baseline") == undisturbed["baseline"][1]
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
        models.write_json(folder / "manifest.json", {**changed, "sha256": models.seal(changed)})
        with pytest.raises(StageError, match="damaged"):
            models.read_manifest(folder)


def test_any_damage_gets_one_line(finished):
    """Fuzzed: bytes of initial weights and checkpoints cut off, changed, made up. Nothing runs, nothing is lost."""
    draw, trained = random.Random(1), finished / "trained"
    places = [path for path in sorted(trained.rglob("*")) if path.suffix in (".json", ".safetensors")
              and path.parent.name != "baseline"]
    run = train.Run(trained / "baseline", json.loads((trained / "baseline" / "manifest.json").read_text())["settings"])
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
            models.read_manifest(trained / "init")
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
        models.read_manifest(folder / "checkpoints" / "step-000004")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["weights"][sha256(folder / "model.safetensors")] == 4
        moved = shutil.copytree(root, root.with_name("moved"))
        assert here(moved, "--baseline", "--resume")[0] == 0
        assert fingerprint(moved / "trained" / "baseline") == undisturbed["baseline"][1]
    finally:
        if how == "a small disk":
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_a_number_stops_the_run(root, here, monkeypatch, undisturbed, value):
    """Row 14."""
    objective = train.Training._objective

    def spoilt(self, *arguments):
        loss, sums = objective(self, *arguments)
        return (loss * value, sums * value) if self.done == 6 else (loss, sums)
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_objective", spoilt)
        code, _, err = here(root, "--baseline")
    folder = root / "trained" / "baseline"
    assert code == 1 and "not finite at step 7" in err and str(folder / "checkpoints" / "step-000004") in err
    assert "Traceback" not in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    assert json.loads((folder / "manifest.json").read_text())["weights"][sha256(folder / "model.safetensors")] == 4
    assert len((folder / "history.jsonl").read_text().splitlines()) == 3
    assert here(root, "--baseline", "--resume")[0] == 0                 # it was a passing fault: nothing was spoilt
    assert fingerprint(folder) == undisturbed["baseline"][1]


def test_out_of_memory_says_what_to_lower(finished, here, monkeypatch):
    """Row 18."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    before = files(back_to(finished, 8) / "trained" / "baseline" / "checkpoints")
    monkeypatch.setattr(train.Training, "_objective", full)
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
    train.Wandb, models.WANDB_SECONDS = wandb, 1
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
    assert fingerprint(root / "trained" / "baseline") == undisturbed["baseline"][1]


def test_wandb_is_told_what_tells_the_runs_apart(root, here, monkeypatch):
    """One project and group for both arms; a job type each, or they would be one line where runs are grouped."""
    told = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        Settings=dict, init=lambda **named: (told.append(named), run)[1]))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(train, "Wandb", models.Wandb)
    for flag in ARMS.values():
        assert here(root, flag)[0] == 0
    assert {(named["project"], named["group"]) for named in told} == {(models.WANDB_PROJECT, "seed0")}
    assert [named["job_type"] for named in told] == list(ARMS)
    meta = json.loads((root / "data" / "meta.json").read_text())
    for arm, named in zip(ARMS, told):
        config = named["config"]
        assert config["data"] == meta["splits"]["train"]["sha256"]
        assert config.pop("code") == {name: sha256(PROJECT / name) for name in ("models.py", "train.py")}
        # not among what a resumed run must have in common with the first: other code may go on
        assert config == json.loads((root / "trained" / arm / "manifest.json").read_text())["settings"]


DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(PROJECT)!r})
import torch, train
torch.set_num_threads(1)
vars(train).update({CONSTANTS!r})
"""


def test_wandb_offline_writes_into_the_runs_folder(root, tmp_path, undisturbed):
    """The real one, without an account: no question, no network, no word, no wait at the end."""
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run([sys.executable, "-c", DRIVER + "train.run_stage(train.main)", "--baseline", "--root", root],
                          env={**environment, "HOME": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0 and "wandb: " not in done.stdout + done.stderr, done.stdout + done.stderr
    folder = root / "trained" / "baseline"
    assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert not (tmp_path / "wandb").exists()
    assert fingerprint(folder) == undisturbed["baseline"][1]


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
    assert models.wandb_mode() == mode


# ------------------------------------------------------------------ several processes, and the GPU


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
    train.run_stage(train.main)
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
    one, two = undisturbed["with_ltm"][1]["log"], fingerprint(root / "trained" / "with_ltm")["log"]
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for ours, theirs in zip(two, one):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("ltm", [False, True])
def test_the_captured_step_is_the_step(source, monkeypatch, ltm):
    """Replayed as one CUDA graph or called one by one, and twice over, the steps leave the same bits."""
    def run(captured):
        training = training_of(source, monkeypatch, ltm)
        training = train.Training(training.model.float().cuda(), training.rows.numpy(), training.order)
        training.accelerate()
        if not captured:
            training.graph = None
        training.run(9)
        return {**training.weights(), **training.state()}
    first, again, uncaptured = run(True), run(True), run(False)
    assert len(first["statistics"]) == 12 and torch.isfinite(first["statistics"]).all()
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
        assert torch.equal(x, uncaptured[name]), name
