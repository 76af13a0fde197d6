"""All seven stages, end to end: run_all.sh on a tiny corpus, in a copy of the project with smaller constants.

The constants are edited where a user would edit them, at the top of each script. The rest is the real thing: seven
processes, the window of 128 tokens, the memory of 256 items.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import load_model, load_split, sha256

PROJECT = Path(__file__).resolve().parent.parent

EDITS = {           # script: {settings as their line starts: their new value}
    "models.py": {'    "quick": dict(': "n_layer=1, n_embd=16, n_head=2),"},
    "train.py": {"QUICK = Settings(": "steps=4, batch=2, lane=2, warmup=2, log_every=2, checkpoint_steps=2)"},
    "eval.py": {"QUICK = Settings(": "pack=4, lane=4, trials=1, distances=(32, 140), long_range=(140,), lead=16, "
                                     "distractors=(0, 9), distracted=140, dialogues=2, turn=40, together=2, repeats=1, "
                                     "indirect=(64,), indirect_trials=1, timed=1, bootstrap=100)"},
    "plot_eval.py": {"DPI = ": "40"},
}
STAGES = ["download_models.py", "prepare_data.py", "add_memory.py", "train.py --baseline", "train.py --with-ltm",
          "eval.py --report", "plot_eval.py"]


def edit(path, start, value):
    """Give what begins with that line, and goes on in lines further in, another value."""
    text, count = re.subn(rf"(?m)^{re.escape(start)}.*(\n {{9,}}.*)*", lambda _: start + value, path.read_text())
    assert count == 1, f"{path.name} has {count} lines that start with {start}"
    path.write_text(text)


@pytest.fixture
def project(tmp_path, tokenizer_dir):
    """A copy of the scripts with smaller constants, a corpus, and the tokenizer where --quick looks for it."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in (*PROJECT.glob("*.py"), PROJECT / "run_all.sh", PROJECT / "requirements.txt"):
        shutil.copy(path, folder)
    shutil.copytree(tokenizer_dir, folder / "quick" / "data" / "tokenizer")
    for name, constants in EDITS.items():
        for start, value in constants.items():
            edit(folder / name, start, value)
    words = ["the", "of", "and", "to", "in", "surprise", "memory", "window", "angle", "caf\u00e9"]
    texts = [" ".join(random.Random(seed).choices(words, k=170)) for seed in range(20)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def run_all(project):
    """./run_all.sh --quick --text tiny.jsonl, by this Python, without a network: {stage: what became of it}."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                   "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "WANDB_MODE": "disabled", "MPLBACKEND": "Agg",
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["./run_all.sh", "--quick", "--text", "tiny.jsonl"], cwd=project, env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    ends = re.findall(r"(?m)^\[(\d)/7\] .*: (done in|skipped)", done.stdout)
    assert [number for number, _ in ends] == list("1234567"), done.stdout
    return {stage: end for stage, (_, end) in zip(STAGES, ends)}


def files(folder):
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file() and ".run_all" not in path.parts}


def test_seven_stages(project):
    outside = {path.name for path in project.iterdir()}
    assert run_all(project) == dict.fromkeys(STAGES, "done in")
    assert {path.name for path in project.iterdir()} - {"__pycache__"} == outside      # all of it is under quick/
    root = project / "quick"

    rows, meta = load_split(root, "val")
    assert meta["quick"] and "tiny.jsonl" in meta["source"] and rows.shape[1] == 128
    documents = {split: meta["splits"][split]["documents"] for split in ("train", "val")}
    assert sum(documents.values()) == 20 and documents["val"] == 2
    for arm in ("baseline", "with_ltm"):
        folder = root / "trained" / arm
        model = load_model(folder)
        assert model.config.memory_enabled == (arm == "with_ltm") and model.config.n_embd == 16
        assert model.config.stm_window == 128 and model.config.ltm_slots == 256
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["step"] == 4 and manifest["weights"][sha256(folder / "model.safetensors")] == 4
        assert manifest["settings"]["init"] == sha256(root / "trained" / "init" / "model.safetensors")
        history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in history] == [2, 4]

    results = json.loads((root / "results.json").read_text())
    assert list(results) == ["baseline", "with_ltm", "detail"]
    for arm in ("baseline", "with_ltm"):
        assert list(results[arm]) == ["bpc", "long_range_recall", "memory_hit_rate", "tokens_per_sec"]
        assert 1 < results[arm]["bpc"] < 10 and 0 <= results[arm]["long_range_recall"] <= 1
        assert results[arm]["tokens_per_sec"] > 0
        checkpoint, = results["detail"]["arms"][arm]["checkpoints"]
        assert checkpoint["sha256"] == sha256(root / checkpoint["folder"] / "model.safetensors")
    assert results["baseline"]["memory_hit_rate"] == 0 < results["with_ltm"]["memory_hit_rate"] <= 1
    assert results["detail"]["data"]["quick"] and results["detail"]["recall"]["distances"] == [32, 140]
    assert (root / "results.png").read_bytes().startswith(b"\x89PNG")

    # once more: nothing has changed, nothing is done; then what is changed is done again, and what hangs on it
    made = files(root)
    assert run_all(project) == dict.fromkeys(STAGES, "skipped")
    assert files(root) == made
    edit(project / "plot_eval.py", "DPI = ", "30")
    assert run_all(project) == {**dict.fromkeys(STAGES, "skipped"), "plot_eval.py": "done in"}
    changed = {path for path, digest in files(root).items() if made[path] != digest}
    assert changed == {root / "results.png", root / "results_memory.png"}
