"""plot_eval.py: what it draws, what it refuses, and what it does without. On synthetic results, three seeds."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import plot_eval                                            # noqa: E402
from models import StageError, sha256                       # noqa: E402

DISTANCES = [32, 64, 96, 160, 192, 256, 320, 384, 512, 1024]
RECALL = {"baseline": [0.55, 0.48, 0.41, 0.13, 0.12, 0.13, 0.125, 0.12, 0.13, 0.12],
          "with_ltm": [0.99, 0.99, 0.985, 0.98, 0.98, 0.97, 0.95, 0.92, 0.31, 0.13]}


def wilson(share, trials=3000, z=1.96):
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials ** 2)) / (1 + z * z / trials)
    return [middle - half, middle + half]


def bpc(base, memory, verdict="helps"):
    per_seed = {"baseline": [base - 0.001, base, base + 0.001], "with_ltm": [memory - 0.001, memory, memory + 0.001]}
    return {**{arm: {"per_seed": values, "ci95": [values[1] - 0.021, values[1] + 0.022]}
               for arm, values in per_seed.items()},
            "difference": {"mean": memory - base, "ci95": [memory - base - 0.003, memory - base + 0.003]},
            "ratio": memory / base, "verdict": verdict}


def controls():
    rows = [("wiped between fact and question", 0.979, 0.126, "Memory taken away"),
            ("reads off", 1.0, 0.125, "Memory taken away"), ("values shuffled", 1.012, 0.13, "Memory taken away"),
            ("random tokens stored", 0.971, 0.52, "What is stored"),
            ("every token stored", 0.973, 0.44, "What is stored")]
    rows += [(f"cosine above {x}", 0.962 + (x - 0.8) ** 2 / 5, 0.96 - abs(x - 0.8), "Threshold of retrieval")
             for x in (0.5, 0.7, 0.8, 0.9, 0.95)]
    rows += [(f"{n} slots", 0.995 - 0.0045 * math.log2(n / 16 + 1), min(0.97, 0.1 + n / 280), "Slots")
             for n in (16, 64, 256, 1024)]
    rows += [("neural cache on the baseline", 0.975, 0.61, "Other models"),
             ("GPT-70M, full attention", 1.009, None, "Other models")]
    return [{"name": name, "bpc": 1.628 * ratio, "bpc_ratio": ratio, "hit_rate": 0.4, "recall": recall,
             "top1": None, "group": group} for name, ratio, recall, group in rows]


def synthetic(seeds=3):
    curves = {arm: {"forced_choice": shares, "forced_choice_ci95": [wilson(share) for share in shares],
                    "top1": [share * 0.7 for share in shares], "top1_ci95": [wilson(share * 0.7) for share in shares],
                    "by_format": {name: shares for name in ("pair", "colon", "sentence")}}
              for arm, shares in RECALL.items()}
    far = {arm: float(np.mean(shares[3:8])) for arm, shares in RECALL.items()}
    speed = {"baseline": [412_000, 415_300, 409_900, 413_800, 411_000],
             "with_ltm": [377_000, 379_500, 374_100, 380_900, 376_200]}
    whole = bpc(1.628, 1.566)
    return {
        **{arm: {"bpc": whole[arm]["per_seed"][1], "long_range_recall": far[arm],
                 "tokens_per_sec": float(np.median(speed[arm])),
                 "memory_hit_rate": 0.41 if arm == "with_ltm" else 0.0} for arm in RECALL},
        "detail": {
            "data": {"source": "Skylion007/openwebtext", "quick": False, "val_documents": 1000, "val_tokens": 812_345,
                     "val_characters": 3_712_345, "val_sha256": "0" * 64},
            "run": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "seeds": list(range(seeds)), "steps": 10_000,
                    "parameters": 71_612_345, "checkpoints": {arm: [] for arm in RECALL}},
            "bpc": whole, "bpc_windows": bpc(1.6657, 1.615),
            "recall": {"chance": 0.125, "window": 128, "receptive_field": 1017, "distances": DISTANCES,
                       "trials_per_distance": 3000, **curves, "mcnemar_p": [1e-9] * 10,
                       "long_range": {"distances": DISTANCES[3:8], "verdict": "helps",
                                      **{arm: {"mean": far[arm], "ci95": wilson(far[arm])} for arm in RECALL}}},
            "tokens_per_sec": {"ratio": 377_000 / 412_000, **{
                arm: {"median": float(np.median(speed[arm])), "runs": speed[arm]} for arm in RECALL}},
            "memory_hit_rate": {"baseline": 0.0, "with_ltm": 0.41, "routed_token_ratio": 0.58},
            "controls": controls()}}


@pytest.fixture
def root(tmp_path):
    """A root with results.json and the six checkpoints and histories that it is of."""
    return build(tmp_path / "run", synthetic())


def build(root, results):
    rng = np.random.default_rng(0)
    for seed in results["detail"]["run"]["seeds"]:
        for arm in RECALL:
            folder = (f"trained/seed{seed}/" if seed else "trained/") + arm
            (root / folder).mkdir(parents=True)
            (root / folder / "model.safetensors").write_bytes(f"weights of {folder}".encode())
            results["detail"]["run"]["checkpoints"][arm].append(
                {"seed": seed, "folder": folder, "sha256": sha256(root / folder / "model.safetensors"), "step": 10_000})
            with open(root / folder / "history.jsonl", "w") as history:
                for step in range(10, 10_001, 10):
                    rate = 0.42 - 0.4 * math.exp(-step / 900) + 0.01 * seed + rng.normal(0, 0.03)
                    history.write(json.dumps({"step": step, "loss": 5.0, "LTM_enabled": arm == "with_ltm",
                                              "ltm_hit_rate": max(0, rate) if arm == "with_ltm" else 0.0}) + "\n")
    write(root, results)
    return root


def read(root):
    return json.loads((root / "results.json").read_text())


def write(root, results):
    root.mkdir(exist_ok=True, parents=True)
    (root / "results.json").write_text(json.dumps(results))


def plot(root, *flags):
    plot_eval.main(["--root", str(root), *flags])


def pixels(path):
    """(height, width) array of a picture's brightness, 0 to 1."""
    return imread(path)[:, :, :3].mean(2)


def refused(root, *words):
    """Plotting fails with one line that holds `words` and names eval.py; no picture is written or changed."""
    before = {path: path.read_bytes() for path in root.glob("*.png")}
    with pytest.raises(StageError) as caught:
        plot(root)
    line = str(caught.value)
    assert "\n" not in line and f"python eval.py --root {root}" in line
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in root.glob("*.png")} == before
    assert not list(root.glob(".*tmp"))


# ------------------------------------------------------------------ what it draws

def test_pictures_hold_both_arms_in_colours_that_differ_in_grey(root, capsys):
    plot(root)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("With memory: BPC 1.566 vs 1.628 (-3.8%, helps), recall 160")
    assert str(root / "results.png") in lines[1] and str(root / "results_controls.png") in lines[1]
    picture = imread(root / "results.png")[:, :, :3]
    assert picture.shape[1] == 1800 and 0.6 < (picture.min(2) > 0.95).mean() < 0.95     # mostly paper, not all of it
    greys = []
    for look in plot_eval.ARMS.values():
        colour = np.array([int(look["color"][at:at + 2], 16) / 255 for at in (1, 3, 5)])
        assert (np.abs(picture - colour).max(2) < 0.02).mean() > 0.01, look
        greys.append(colour @ [0.299, 0.587, 0.114])
    assert abs(greys[0] - greys[1]) > 0.25
    assert pixels(root / "results_controls.png").std() > 0.1


def test_the_same_results_give_the_same_bytes(root):
    plot(root)
    hashes = {path.name: sha256(path) for path in root.glob("*.png")}
    # with other settings of matplotlib's and in another process, too
    (root / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\n")
    subprocess.run([sys.executable, PROJECT / "plot_eval.py", "--root", root], check=True, capture_output=True,
                   cwd=root, env={**os.environ, "MATPLOTLIBRC": str(root / "matplotlibrc")})
    assert hashes == {path.name: sha256(path) for path in root.glob("*.png")} and len(hashes) == 2


def texts(results, gone=()):
    return [text.get_text() for text in plot_eval.new_figure(7, results, list(gone)).texts]


def test_the_words_say_the_verdict_and_where_the_numbers_come_from():
    results = synthetic()
    words = texts(results, ["trained/baseline"])
    assert words[0] == "Memory helps compression and long-range recall"
    footer = " ".join(words[-1].split())
    for fact in ("Skylion007/openwebtext", "1,000 validation documents", "NVIDIA H100", "seeds: 0, 1, 2",
                 "10,000 training steps", "Checkpoints gone, not compared: trained/baseline"):
        assert fact in footer
    assert not any("QUICK" in word for word in words)
    results["detail"]["data"]["quick"] = True
    assert any("QUICK RUN" in word for word in texts(results))


@pytest.mark.parametrize("bpc_verdict, recall_verdict, title", [
    ("helps", "hurts", "Memory helps compression and hurts long-range recall"),
    ("inconclusive", "helps", "Memory has no clear effect on compression and helps long-range recall"),
    ("inconclusive", "inconclusive", "Memory has no clear effect on compression and long-range recall"),
    ("hurts", "hurts", "Memory hurts compression and long-range recall"),
])
def test_the_title_follows_the_verdicts(bpc_verdict, recall_verdict, title):
    results = synthetic()
    results["detail"]["bpc"]["verdict"] = bpc_verdict
    results["detail"]["recall"]["long_range"]["verdict"] = recall_verdict
    assert plot_eval.headline(results)[0] == title


def test_hit_rates_of_a_history_with_a_step_taken_twice_and_a_torn_end(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 2, "ltm_hit_rate": 0.5}\n{"step": 1, "ltm_hit_rate": 0.1}\n'
                    '{"step": 2, "ltm_hit_rate": 0.2}\n{"step": 3, "ltm_hit_rate": NaN}\n{"step": 4}\n[]\n'
                    '{"step": 1e999, "ltm_hit_rate": 0}\n{"ste')
    assert plot_eval.hit_rates(path).tolist() == [[1, 2], [0.1, 0.2]]
    assert capsys.readouterr().out.endswith("read from them: 5\n")
    assert plot_eval.hit_rates(tmp_path / "none").shape == (2, 0)


# ------------------------------------------------------------------ what it does without

def test_without_controls_only_one_picture_and_a_word_on_an_old_one(root, capsys):
    results = read(root)
    for controls in (None, []):
        results["detail"]["controls"] = controls
        write(root, results)
        plot(root)
        assert not (root / "results_controls.png").exists()
    (root / "results_controls.png").write_bytes(b"old")
    del results["detail"]["controls"]
    write(root, results)
    plot(root)
    assert "results_controls.png is of an earlier evaluation" in capsys.readouterr().out
    assert (root / "results_controls.png").read_bytes() == b"old"


def test_without_histories_receptive_field_groups_and_with_one_seed(tmp_path):
    results = synthetic(seeds=1)
    del results["detail"]["recall"]["receptive_field"], results["detail"]["recall"]["mcnemar_p"]
    del results["detail"]["recall"]["baseline"]["top1"]
    results["detail"]["controls"] = [{"name": "a name that goes on " * 9, "bpc_ratio": None}, {"name": "b"}]
    for arm in RECALL:
        results["detail"]["tokens_per_sec"][arm]["runs"] = [1234.5]
    root = build(tmp_path / "one", results)
    for path in root.glob("trained/*/history.jsonl"):
        path.unlink()
    plot(root)
    assert pixels(root / "results.png").std() > 0.1


def test_gone_checkpoints_are_named_in_one_line(root, capsys):
    for path in root.glob("trained/**/baseline/model.safetensors"):
        path.unlink()
    plot(root)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "trained/baseline, trained/seed1/baseline, trained/seed2/baseline" in warnings[0]


def test_odd_names_are_only_names(root, recwarn):
    results = read(root)
    results["detail"]["data"]["source"] = "cost$s of $\\frac{ \u65e5\u672c\n\ttext " + "x" * 500
    results["detail"]["controls"][0]["name"] = "$\\bad{"
    write(root, results)
    plot(root)
    assert not recwarn.list


# ------------------------------------------------------------------ what it refuses (faults.md rows 19, 20 and 23)

def test_row_19_checkpoint_changed_after_the_evaluation(root):
    plot(root)
    (root / "trained/seed2/with_ltm/model.safetensors").write_bytes(b"weights of another run")
    refused(root, "results.json is of another checkpoint", "trained/seed2/with_ltm/model.safetensors", "rerun")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_row_20_a_number_that_is_none(root, value):
    plot(root)
    text = (root / "results.json").read_text()
    (root / "results.json").write_text(text.replace('"bpc": 1.566', f'"bpc": {value}', 1))
    refused(root, "not JSON compliant")


@pytest.mark.parametrize("flags", [["--steps", "3"], ["--root"], ["--quick=1"], ["extra"]])
def test_row_23_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        plot_eval.main(flags)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def test_results_missing_or_damaged(root):
    text = (root / "results.json").read_text()
    for damaged in (text[:500], "", "[]", "\0" * 100, "[" * 100_000):
        (root / "results.json").write_text(damaged)
        refused(root, "damaged")
    (root / "results.json").write_bytes(b"\xff\xfe{}")
    refused(root, "damaged")
    (root / "results.json").unlink()
    refused(root, "missing")


def places(value, place=()):
    """Every place in nested dicts."""
    for key, inner in value.items():
        yield (*place, key)
        if isinstance(inner, dict):
            yield from places(inner, (*place, key))


OPTIONAL = {"detail.data.val_tokens", "detail.data.val_sha256", "detail.recall.receptive_field", "detail.controls",
            "detail.recall.mcnemar_p", "detail.memory_hit_rate", "baseline.memory_hit_rate"}
OPTIONAL_ENDS = ("top1", "top1_ci95", "by_format", "mean", "median", "pair", "colon", "sentence", "routed_token_ratio",
                 "bpc_windows.verdict")
NEEDED = [".".join(place) for place in places(synthetic()) if not ".".join(place).endswith(OPTIONAL_ENDS)
          and not any(".".join(place).startswith(optional) for optional in OPTIONAL)]


@pytest.mark.parametrize("value", ["gone", None, "word", []], ids=repr)
def test_results_that_lack_a_field_or_hold_another_thing(tmp_path, monkeypatch, value):
    """Every field that is drawn, one at a time; a word or an empty list may pass for what is only printed or listed."""
    assert len(NEEDED) > 50
    monkeypatch.setattr(plot_eval, "DPI", 10)           # these pictures are not looked at
    root = build(tmp_path / "root", synthetic(seeds=1))
    for path in root.glob("trained/*/history.jsonl"):
        path.unlink()
    whole, passed = (root / "results.json").read_text(), set()
    for place in NEEDED:
        results = inner = json.loads(whole)
        *above, last = place.split(".")
        for key in above:
            inner = inner[key]
        inner[last] = value
        if value == "gone":
            del inner[last]
        write(root, results)
        try:
            refused(root, "results.json")
        except pytest.fail.Exception:
            passed.add(last)
            for path in root.glob("*.png"):
                path.unlink()
    printed = {"source", "device", "torch", "quick"}
    may_pass = set() if value == "gone" else printed | {"seeds"} if value == "word" else printed
    assert passed <= (printed | {"seeds", *RECALL} if value == [] else may_pass), passed


@pytest.mark.parametrize("folder", ["/etc", "../other", "trained/../../other", ".."])
def test_no_folder_is_followed_out_of_the_root(root, folder):
    results = read(root)
    other = root.parent / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"not ours")
    results["detail"]["run"]["checkpoints"]["baseline"][0] = {
        "seed": 0, "folder": folder, "sha256": hashlib.sha256(b"not ours").hexdigest(), "step": 1}
    write(root, results)
    refused(root, "names a folder outside")


def test_on_the_terminal_a_failure_is_one_line_and_code_1(tmp_path):
    done = subprocess.run([sys.executable, PROJECT / "plot_eval.py", "--root", tmp_path / "a b"], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (f"plot_eval.py: {tmp_path}/a b/results.json is missing; make it with: "
                           f"python eval.py --root '{tmp_path}/a b'\n")
