"""plot_eval.py: what it draws, what it refuses, and what it does without. On synthetic results,
three seeds."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import plot_eval                                            # noqa: E402
import stages                                               # noqa: E402
from stages import ARMS, SPECIFIED, StageError, sha256      # noqa: E402

DISTANCES = [32, 64, 96, 160, 192, 256, 320, 384, 512, 1024]
FAR = slice(3, 8)
SEVERAL = list(ARMS)[:6]
DESIGNS = [arm for arm in ARMS if not ARMS[arm].control]
SHARES = {          # of right answers, by distance
    "baseline": [0.55, 0.48, 0.41, 0.13, 0.12, 0.13, 0.125, 0.12, 0.13, 0.12],
    "with_ltm": [0.99, 0.99, 0.985, 0.98, 0.98, 0.97, 0.95, 0.92, 0.31, 0.13],
    "with_store": [0.97, 0.96, 0.95, 0.90, 0.90, 0.88, 0.86, 0.85, 0.80, 0.61],
    "with_bank": [0.56, 0.48, 0.40, 0.13, 0.13, 0.12, 0.13, 0.12, 0.12, 0.13],
    "with_mag": [0.71, 0.65, 0.58, 0.33, 0.31, 0.25, 0.21, 0.18, 0.14, 0.12],
    "with_gru": [0.50, 0.44, 0.36, 0.11, 0.10, 0.10, 0.10, 0.09, 0.11, 0.12],
}
BPC = {"baseline": 1.628, "with_ltm": 1.566, "with_store": 1.552, "with_bank": 1.627,
       "with_mag": 1.601,
       "with_gru": 1.641}
VERDICT = {"with_bank": "inconclusive", "with_gru": "hurts"}
SPEED = {"baseline": 1.0, "with_ltm": 0.95, "with_store": 0.61, "with_bank": 0.97, "with_mag": 0.33,
         "with_gru": 0.88}
SIZE = {"baseline": (0, 0), "with_ltm": (1_045_024, 281_134), "with_store": (2_104_000, 41_000_000),
        "with_bank": (1_048_576, 0), "with_mag": (3_150_336, 6_300_000),
        "with_gru": (1_576_448, 6_144)}
TARGETS = {"new in the document": 0.40, "last seen inside the window": 0.42,
           "last seen beyond the window, in memory": 0.13, "last seen beyond both": 0.05}


def wilson(share, trials=3000, z=1.96):
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials ** 2)) / (1 + z * z / trials)
    return [middle - half, middle + half]


def bpc(arms, factor=1.0):
    """detail.bpc: of every arm, and of all but the baseline the difference to it."""
    part = {}
    for arm in arms:
        gap = (BPC[arm] - BPC["baseline"]) * factor
        middle = BPC["baseline"] + gap
        part[arm] = {"per_seed": [middle - 0.001, middle, middle + 0.001],
                     "ci95": [middle - 0.021, middle + 0.022]}
        if arm != "baseline":
            part[arm] |= {"difference": {"mean": gap, "ci95": [gap - 0.003, gap + 0.003]},
                          "p": 1e-4, "p_holm": 1e-4,
                          "ratio": middle / BPC["baseline"],
                          "ratio_ci95": [(middle + way) / BPC["baseline"] for way in (-0.003, 0.003)], "verdict": VERDICT.get(arm, "helps")}
    return part


def controls():
    rows = [("wiped between fact and question", 0.979, 0.126, "Memory taken away"),
            ("reads off", 1.0, 0.125, "Memory taken away"),
            ("values shuffled", 1.012, 0.13, "Memory taken away"),
            ("random tokens stored", 0.971, 0.52, "What is stored"),
            ("every token stored", 0.973, 0.44, "What is stored")]
    rows += [(f"cosine above {x}", 0.962 + (x - 0.8) ** 2 / 5, 0.96 - abs(x - 0.8),
              "Threshold of retrieval")
             for x in (0.5, 0.7, 0.8, 0.9, 0.95)]
    rows += [(f"{n} slots", 0.995 - 0.0045 * math.log2(n / 16 + 1), min(0.97, 0.1 + n / 280),
              "Slots")
             for n in (16, 64, 256, 1024)]
    rows += [("neural cache on the baseline", 0.975, 0.61, "Other models"),
             ("GPT-70M, full attention", 1.009, None, "Other models")]
    return [{"name": name, "bpc": 1.628 * ratio, "bpc_ratio": ratio, "hit_rate": 0.4,
             "recall": recall,
             "top1": None, "group": group} for name, ratio, recall, group in rows]


def memory():
    """140 tokens, every seventh a name, and four predictions that drew on earlier ones."""
    words = [" the", " captain", " of", " a", " ship", ".", " Farrington", "\n\n", "ish", " said"]
    bits = [None] + [7 * at % 19 + 0.31 for at in range(1, 140)]
    tokens = [{"text": words[6] if at % 7 == 3 else words[at * at % 10], "bits": cost,
               "bits_mixture": cost and cost / 3, "stored": bool(cost and cost > 4.5)} for at,
               cost in enumerate(bits)]
    drew = lambda *places: [{"at": at, "share": 0.61 / 2 ** rank, "cosine": 0.97} for rank,
                            at in enumerate(places)]
    reads = [(66, (3,)), (101, (66, 59, 10, 24, 31)), (122, (66, 17)), (137, (38,))]
    return {"document": 17, "window": 128, "threshold": 4.5, "tokens": tokens,
            "reads": [{"at": at, "from": drew(*places)} for at, places in reads]}


def curve(arm):
    """detail.recall.arms of one arm."""
    shares, part = SHARES[arm], {}
    for name, factor in (("forced_choice", 1), ("top1", 0.7), ("stored", 0.9), ("retrieved", 0.8)):
        part[name] = [factor * share for share in shares]
        part[f"{name}_ci95"] = [wilson(factor * share) for share in shares]
    return part | {"value_nats": [0.3 - 4 * math.log(share) for share in shares],
                   "by_format": {name: shares for name in ("pair", "colon", "sentence")}}


def long_range(arms):
    """detail.recall.long_range."""
    part = {}
    for arm in arms:
        mean = float(np.mean(SHARES[arm][FAR]))
        part[arm] = {"mean": mean, "ci95": wilson(mean), "per_seed": [mean], "top1": 0.7 * mean,
                     "top1_ci95": wilson(0.7 * mean), "value_nats": 2.0}
        if arm != "baseline":
            gap = mean - float(np.mean(SHARES["baseline"][FAR]))
            clear = "helps" if gap > 0.05 else "hurts" if gap < -0.02 else "inconclusive"
            part[arm] |= {"difference": {"mean": gap, "ci95": [gap - 0.02, gap + 0.02]},
                          "p_holm": 0.01,
                          "verdict": clear}
    return {"distances": DISTANCES[FAR], "arms": part}


def speed(arms):
    """detail.tokens_per_sec."""
    part = {}
    for arm in arms:
        runs = [SPEED[arm] * rate for rate in (412_000, 415_300, 409_900, 413_800, 411_000)]
        part[arm] = {"median": float(np.median(runs)), "runs": runs}
        if ARMS[arm].memory:
            part[arm] |= {"off_runs": [412_000] * 5, "ratio": SPEED[arm], "verdict": "hurts",
                          "ratio_ci95": [SPEED[arm] - 0.01, SPEED[arm] + 0.01]}
    return part


def about(arm, seeds):
    """detail.arms of one arm; of its checkpoints there is more where they are made."""
    parameters, state = SIZE[arm]
    return {"label": ARMS[arm].label, "parameters": 71_612_345 + parameters,
            "memory_parameters": parameters,
            "state_bytes": state, "hit_means": "predictions that retrieved", "settings": {},
            "checkpoints": [{"seed": seed} for seed in range(seeds)]}


def targets(arms):
    """detail.targets."""
    kinds = {}
    for number, (kind, share) in enumerate(TARGETS.items()):
        gains = {arm: 4 * (BPC[arm] - BPC["baseline"]) * (number - 0.4) for arm in arms}
        kinds[kind] = {"share_of_tokens": share,
                       "arms": {arm: 8.0 + gain for arm, gain in gains.items()},
                       "share_of_gain": {arm: 0.25 for arm in arms if arm != "baseline"}}
    return kinds


def synthetic(arms=SPECIFIED, seeds=3):
    """results.json as eval.py writes it."""
    whole, far, rates = bpc(arms), long_range(arms), speed(arms)
    hits = {arm: 0.0 if arm == "baseline" else 0.41 for arm in arms}
    return {
        **{arm: {"bpc": whole[arm]["per_seed"][1], "long_range_recall": far["arms"][arm]["mean"],
                 "tokens_per_sec": rates[arm]["median"],
                 "memory_hit_rate": hits[arm]} for arm in arms},
        "detail": {
            "arms": {arm: about(arm, seeds) for arm in arms},
            "data": {"source": "Skylion007/openwebtext", "quick": False, "val_documents": 1000,
                     "val_tokens": 812_345,
                     "val_characters": 3_712_345, "val_sha256": "0" * 64},
            "run": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "commit": "1234567",
                    "trained_by": {"device": "", "torch": "", "commit": ""}, "seeds": list(range(seeds)), "steps": 10_000,
                    "settings": {"batch": 8, "chained": 0.0}},
            "bpc": whole, "bpc_windows": bpc(arms, 0.6),
            "recall": {"chance": 0.125, "window": 128, "receptive_field": 1017,
                       "distances": DISTANCES,
                       "trials_per_distance": 3000, "seeds": seeds,
                       "arms": {arm: curve(arm) for arm in arms},
                       "long_range": far},
            "tokens_per_sec": rates,
            "training": {arm: {"tokens_per_sec": 369_000 * SPEED[arm] ** 2,
                               "loss": 4.0} for arm in arms},
            "memory_hit_rate": {arm: {"mean": hits[arm], "per_seed": [hits[arm]],
                                      "routed_token_ratio": 0.58}
                                for arm in arms},
            "targets": targets(arms), "controls": controls(), "memory": memory()}}


@pytest.fixture
def root(tmp_path):
    """A root with results.json and the six checkpoints and histories that it is of."""
    return build(tmp_path / "run", synthetic())


@pytest.fixture
def coarse(monkeypatch):
    """For pictures that nobody looks at."""
    monkeypatch.setattr(plot_eval, "DPI", 10)


@pytest.fixture(scope="module")
def plotted(tmp_path_factory):
    """A root whose pictures are drawn, to be copied."""
    root = build(tmp_path_factory.mktemp("plotted") / "run", synthetic())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_eval, "DPI", 10)
        plot(root)
    return root


@pytest.fixture
def finished(plotted, tmp_path):
    """A root as `root`, and its pictures."""
    return shutil.copytree(plotted, tmp_path / "run")


def bare(arms=SPECIFIED):
    """Results without what has a picture of its own, of one seed."""
    results = synthetic(arms, seeds=1)
    del results["detail"]["memory"], results["detail"]["controls"]
    return results


def build(root, results):
    rng = np.random.default_rng(0)
    for its in results["detail"]["arms"].values():
        its["checkpoints"] = []
    for seed in results["detail"]["run"]["seeds"]:
        for arm, its in results["detail"]["arms"].items():
            folder = stages.arm_folder(root, seed, arm)
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(f"weights of {seed} {arm}".encode())
            (folder / "config.json").write_text(json.dumps({"made by": arm}))
            its["checkpoints"].append(
                {"seed": seed, "folder": str(folder.relative_to(root)),
                 "sha256": sha256(folder / "model.safetensors"),
                 "step": 10_000, "config_sha256": sha256(folder / "config.json")})
            with open(folder / "history.jsonl", "w") as history:
                for step in range(10, 10_001, 10):
                    rate = 0.42 - 0.4 * math.exp(-step / 900) + 0.01 * seed + rng.normal(0, 0.03)
                    history.write(json.dumps({"step": step, "loss": 5.0,
                                              "ltm_hit_rate": max(0, rate) if arm != "baseline" else 0.0}) + "\n")
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
    """Plotting fails with one line that holds `words` and names eval.py; no picture is written
    or changed."""
    before = {path: path.read_bytes() for path in root.glob("*.png")}
    with pytest.raises(StageError) as caught:
        plot(root)
    line = str(caught.value)
    assert "\n" not in line and f"python eval.py --report --root {root}" in line
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in root.glob("*.png")} == before
    assert not list(root.glob(".*tmp"))


# ------------------------------------------------------------------ what it draws

def brightness(color):
    return np.array([int(color[at:at + 2], 16) / 255 for at in (1, 3, 5)]) @ [0.299, 0.587, 0.114]


def drawn(picture, color):
    """The share of a picture's pixels in a colour."""
    wanted = np.array([int(color[at:at + 2], 16) / 255 for at in (1, 3, 5)], picture.dtype)
    return (np.abs(picture - wanted).max(2) < 0.02).mean()


@pytest.mark.parametrize("arms", [SPECIFIED, SEVERAL], ids=["two arms", "six arms"])
def test_the_pictures_hold_every_arm(tmp_path, arms, capsys):
    root = build(tmp_path / "run", synthetic(arms))
    plot(root)
    lines = capsys.readouterr().out.splitlines()
    said = "With memory: BPC 1.566 vs 1.628 (-3.8%" if len(arms) == 2 else "Best, store: BPC 1.552 vs 1.628 (-4.7%"
    assert len(lines) == 2 and lines[0].startswith(f"{said}, helps), recall 160")
    assert all(str(root / name) in lines[1] for name in ("results.png", "results_controls.png",
                                                         "results_memory.png"))
    picture = imread(root / "results.png")[:, :, :3]
    assert picture.shape[1] == 1800 and 0.6 < (picture.min(2) > 0.95).mean() < 0.95     # mostly paper, not all of it
    for arm in DESIGNS:
        assert (drawn(picture, plot_eval.look_of(arm).color) > 0.001) == (arm in arms), arm
    assert pixels(root / "results_controls.png").std() > 0.1


def test_arms_differ_in_grey_and_in_pattern():
    """In grey by their brightness, on paper and in curves besides by hatch, marker and dash."""
    for looks in plot_eval.LOOKS[:len(DESIGNS)], plot_eval.CONTROL_LOOKS:
        assert np.diff(sorted(brightness(look.color) for look in looks)).min() > 0.08
    looks = [plot_eval.look_of(arm) for arm in ARMS]
    for part in ("color", "hatch", "marker", "line"):
        assert len({getattr(look, part) for look in looks}) == len(ARMS), part


def test_controls_stand_in_the_table_and_not_in_the_title(monkeypatch):
    """One of them has no memory that could be off, and is larger by its backbone."""
    control = next(arm for arm in ARMS if ARMS[arm].control and ARMS[arm].memory is None)
    for of_arms, value in ((SHARES, SHARES["baseline"]), (BPC, 1.6), (SPEED, 0.9), (SIZE, (0, 0))):
        monkeypatch.setitem(of_arms, control, value)
    results = synthetic(["baseline", "with_ltm", control])
    results["detail"]["arms"][control]["parameters"] += 1_230_000
    figure = plot_eval.draw_many(results, [])
    words = words_of(figure)
    assert "-1.7% helps" in words and "0.90 eval." in words and "+1.23M param." in words
    assert figure.texts[0].get_text() == "LTM helps compression and long-range recall"


def test_arms_come_in_the_order_of_stages_whichever_are_there(tmp_path):
    results = synthetic(["with_gru", "baseline", "with_store"])
    del results["detail"]["memory"], results["detail"]["controls"]      # of with_ltm
    assert plot_eval.arms_of(results) == ["baseline", "with_store", "with_gru"]
    plot(build(tmp_path / "three", results))
    picture = imread(tmp_path / "three/results.png")[:, :, :3]
    seen = [arm for arm in DESIGNS if drawn(picture, plot_eval.look_of(arm).color) > 0.001]
    assert seen == plot_eval.arms_of(results)


def words_of(figure):
    """All that is written in a figure."""
    axes = [text.get_text() for one in figure.axes for text in one.texts]
    return [text.get_text() for text in figure.texts] + axes


def test_the_picture_of_several_arms_says_what_each_is_worth_and_costs():
    results = synthetic(SEVERAL)
    results["detail"]["training"]["with_mag"]["tokens_per_sec"] = None
    words = words_of(plot_eval.draw_many(results, []))
    for fact in ("store", "keys and values", "1.552", "-4.7% helps", "-4.9 to -4.5", "0.88 helps",
                 "0.61 eval.",
                 "0.37 train.", "+2.1M param.", "41 MB state",             # of with_store
                 "-0.1% unclear", "0.13 unclear", "+0.8% hurts", "0.33 eval.", "\u2013"):
        assert fact in words, fact


def test_the_same_results_give_the_same_bytes(root, tmp_path):
    plot(root)
    hashes = {path.name: sha256(path) for path in root.glob("results*.*")}
    # with other settings of matplotlib's and in another process, too
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\n")
    environment = {name: value for name,
                   value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, PROJECT / "plot_eval.py", "--root", root],
                          stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, cwd=tmp_path, env=environment,
                          timeout=120)
    assert hashes == {path.name: sha256(path) for path in root.glob("results*.*")} and len(hashes) == 5
    # there with the real wandb, without an account: no question, no network, no word
    pytest.importorskip("wandb")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2 and done.stderr == "", done.stdout + done.stderr
    assert len(list(root.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert len(list(root.glob("wandb/offline-run-*/files/media/images/results*.png"))) == 3
    assert len(list(root.glob("wandb/offline-run-*/files/media/html/results*.html"))) == 1
    assert not (tmp_path / "wandb").exists()


def texts(results, gone=()):
    figure = plot_eval.new_figure(7, results, list(gone), *plot_eval.headline(results), "")
    return [text.get_text() for text in figure.texts]


def test_the_words_say_the_verdict_and_where_the_numbers_come_from():
    results = synthetic()
    words = texts(results, ["trained/baseline"])
    assert words[0] == "Memory helps compression and long-range recall"
    footer = " ".join(words[-1].split())
    for fact in ("Skylion007/openwebtext", "1,000 validation documents", "NVIDIA H100",
                 "seeds: 0, 1, 2",
                 "10,000 training steps", "Checkpoints gone, not compared: trained/baseline"):
        assert fact in footer
    assert not any("QUICK" in word for word in words)
    results["detail"]["data"]["quick"] = True
    assert any("QUICK RUN" in word for word in texts(results))


@pytest.mark.parametrize("bpc_verdict, recall_verdict, title", [
    ("helps", "hurts", "Memory helps compression and hurts long-range recall"),
    ("inconclusive", "helps",
     "Memory has no clear effect on compression and helps long-range recall"),
    ("inconclusive", "inconclusive",
     "Memory has no clear effect on compression and long-range recall"),
    ("hurts", "hurts", "Memory hurts compression and long-range recall"),
])
def test_the_title_follows_the_verdicts(bpc_verdict, recall_verdict, title):
    results = synthetic()
    results["detail"]["bpc"]["with_ltm"]["verdict"] = bpc_verdict
    results["detail"]["recall"]["long_range"]["arms"]["with_ltm"]["verdict"] = recall_verdict
    assert plot_eval.headline(results)[0] == title


@pytest.mark.parametrize("bpc_verdicts, recall_verdicts, title", [
    ("helps helps inconclusive", "helps helps inconclusive",
     "LTM and store help compression and long-range recall"),
    ("helps helps hurts", "inconclusive helps inconclusive",
     "LTM and store help compression; store helps long-range recall; bank hurts compression"),
    ("inconclusive inconclusive hurts", "helps inconclusive inconclusive",
     "No memory helps compression; LTM helps long-range recall; bank hurts compression"),
    ("inconclusive inconclusive inconclusive", "inconclusive inconclusive inconclusive",
     "No memory helps compression and long-range recall"),
])
def test_the_title_of_several_arms_follows_the_verdicts(bpc_verdicts, recall_verdicts, title):
    arms = ["baseline", "with_ltm", "with_store", "with_bank"]
    results = synthetic(arms)
    for part, verdicts in ((results["detail"]["bpc"], bpc_verdicts),
                           (results["detail"]["recall"]["long_range"]["arms"], recall_verdicts)):
        for arm, verdict in zip(arms[1:], verdicts.split()):
            part[arm]["verdict"] = verdict
    assert plot_eval.headline(results)[0] == title


def test_hit_rates_of_a_history_with_a_step_taken_twice_and_a_torn_end(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 2, "ltm_hit_rate": 0.5}\n{"step": 1, "ltm_hit_rate": 0.1}\n'
                    '{"step": 2, "ltm_hit_rate": 0.2}\n{"step": 3, "ltm_hit_rate": NaN}\n{"step": 4}\n[]\n'
                    '{"step": 1e999, "ltm_hit_rate": 0}\n{"ste')
    assert plot_eval.hit_rates(path).tolist() == [[1, 2], [0.1, 0.2]]
    assert capsys.readouterr().out.endswith("read from them: 5\n")
    assert plot_eval.hit_rates(tmp_path / "none").shape == (2, 0)


# ------------------------------------------------------------------ the text in results_memory.png

def written(cells):
    """The lines that the cells of flow() make, as text."""
    lines = {}
    for line, column, letter in (cell for token in cells for cell in token):
        lines.setdefault(line, {})[column] = letter
    return ["".join(lines[line].get(column, " ") for column in range(max(lines[line]) + 1)) for line in sorted(lines)]


def test_text_flows_in_lines_and_no_word_is_cut(monkeypatch):
    monkeypatch.setattr(plot_eval, "COLUMNS", 16)
    texts = ["It", " was", " Far", "ring", "ton", ".", "\n\n", "He", " said", " a", " thing", ".",
             "\n", "Why", "?"]
    cells = plot_eval.flow(texts)
    assert written(cells) == ["It was", "Farrington.\u00b6\u00b6", "He said a", "thing.\u00b6Why?"]
    assert [plot_eval.spans(token) for token in cells[1:5]] == [[(0, 3, 6)], [(1, 0, 3)],
                                                                [(1, 3, 7)], [(1, 7, 10)]]
    # longer than a line; two words in one token
    assert [plot_eval.spans(token) for token in plot_eval.flow(["a", "-" * 20, " b c"])] == [
        [(0, 0, 1)], [(0, 1, 16), (1, 0, 5)], [(1, 6, 9)]]


def test_characters_that_cannot_be_drawn_are_boxes():
    odd = ["\0", "\u202e", "\ud800", "\U0001f600", "\u65e5", "\x1b"]
    cells = plot_eval.flow([*odd, "\u00e9", "\ufffd", "\u0645", "\t", "|"])
    assert written(cells) == ["\u25a1" * len(odd) + "\u00e9\ufffd\u0645 |"]


def test_the_memory_picture_says_what_a_prediction_drew_on(root):
    results = read(root)
    figure = plot_eval.draw_memory(results, [])
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "6.3 memory off" in words and "2.1 memory on" in words         # bits of token 66
    # the heaviest three at most, and of the others those that matter
    assert "63 tokens back: share 0.61, cosine 0.97" in words
    assert [word.count("tokens back") for word in words if "tokens back" in word] == [1, 3, 2, 1]
    # a disc in the table, one at the prediction, one at each token that it drew on; of A, two in the key
    assert [words.count(letter) for letter in "ABCD"] == [2 + 1 + 2, 2 + 3, 2 + 2, 2 + 1]
    assert any("128 tokens back; the memory, along the arrows, up to 105." in text.get_text() for text in figure.texts)
    results["detail"]["memory"]["reads"][1:] = [
        {"at": 101, "from": [{"at": 66, "share": 0.9, "cosine": 0.9},
                             {"at": 1, "share": 0.04, "cosine": 0.9}]}]
    assert any("up to 63." in text.get_text() for text in plot_eval.draw_memory(results, []).texts)


@pytest.mark.parametrize("change", [
    lambda memory: memory.update(reads=[]),
    lambda memory: memory.update(reads=[], tokens=memory["tokens"][:1]),
    lambda memory: memory["reads"][0].update({"from": []}),
    lambda memory: [memory["tokens"][read["at"] - 1].update(text="") or read.update(
        {"from": [{"at": read["at"] - 1, "share": 0.5,
                   "cosine": 1.0}]}) for read in memory["reads"]],
    lambda memory: [token.update(text="x" * 300) for token in memory["tokens"][:9]],
    lambda memory: [token.update(text=text) for token, text in zip(memory["tokens"], (
        "\U0001f600", " \u65e5\u672c", " \u0645\u0631", "\u05e9", "", "\r\n", "\ud83d", "e\u0301",
        "$\\frac{"))],
    lambda memory: [token.update(bits=1000.0) for token in memory["tokens"]],
], ids=["no reads", "one token", "nothing drawn on", "no text", "long tokens", "odd characters",
        "very many bits"])
def test_any_text_has_a_memory_picture(change, recwarn, tmp_path):
    results = synthetic()
    change(results["detail"]["memory"])
    with matplotlib.rc_context(plot_eval.STYLE):
        plot_eval.draw_memory(results, []).savefig(tmp_path / "memory.png", dpi=50)
    assert pixels(tmp_path / "memory.png").std() > 0.02 and not recwarn.list


def test_a_read_outside_of_the_text_is_refused(root):
    results = read(root)
    for wrong in ({"at": -1, "from": []}, {"at": 0, "from": []}, {"at": 9.5, "from": []}, {"at": 9},
                  {}, None,
                  {"at": 9, "from": [{"at": 9}]}, {"at": 9, "from": [{"at": -1}]},
                  {"at": 9, "from": [{"at": 3}]},
                  {"at": 140, "from": []}):
        results["detail"]["memory"]["reads"][1] = wrong
        with pytest.raises((LookupError, TypeError, ValueError)):
            plot_eval.draw_memory(results, [])
    write(root, results)
    refused(root, "results.json", "detail.memory.reads: one is outside of the text")


# ------------------------------------------------------------------ what it does without

@pytest.mark.parametrize("key, flag", [("controls", " --controls"), ("memory", "")])
def test_without_controls_or_memory_no_such_picture_and_a_word_on_an_old_one(tmp_path, coarse, capsys, key, flag):
    root, results = tmp_path / "run", synthetic(seeds=1)
    other, = {"controls", "memory"} - {key}
    path = root / f"results_{key}.png"
    results["detail"][key] = None
    plot(build(root, results))
    assert not path.exists() and len(list(root.glob("*.png"))) == 2
    del results["detail"][other]                        # which is there already
    (root / f"results_{other}.png").unlink()
    results["detail"][key] = []
    write(root, results)
    plot(root)
    assert [path.name for path in root.glob("*.png")] == ["results.png"]
    path.write_bytes(b"old")
    del results["detail"][key]
    write(root, results)
    plot(root)
    assert (f"warning: {path} is of an earlier evaluation; for a new one: python eval.py --report --root {root}{flag}\n"
            in capsys.readouterr().out)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("mask", [pytest.param(0o022, marks=pytest.mark.slow), 0o077], ids=oct)
def test_modes_of_pictures_follow_the_umask(root, coarse, mask):
    before = os.umask(mask)
    try:
        plot(root)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in root.glob("*.png")}
    assert len(modes) == 3 and set(modes.values()) == {0o666 & ~mask}, modes


@pytest.mark.parametrize("broken",
                         ["MPLBACKEND", "matplotlibrc here", "MATPLOTLIBRC", "MPLCONFIGDIR"])
def test_no_setting_of_matplotlib_ends_the_stage(tmp_path, broken):
    """A backend that is not installed, a matplotlibrc that cannot be read, no folder for its
    cache."""
    root, here = build(tmp_path / "run", bare()), tmp_path / "here"
    here.mkdir()
    values = {"MPLBACKEND": "Qt4Agg", "MATPLOTLIBRC": str(tmp_path / "rc"),
              "MPLCONFIGDIR": "/dev/null/cache"}
    (tmp_path / "rc").write_bytes(b"\xff\xfe")
    environment = {**os.environ, "HOME": str(tmp_path)}
    if broken in values:
        environment[broken] = values[broken]
    else:
        (here / "matplotlibrc").write_bytes(b"backend: no\n\xff\xfe")
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import plot_eval; plot_eval.DPI = 10; plot_eval.main()"
    done = subprocess.run([sys.executable, "-c", code, "--root", root], cwd=here, env=environment,
                          timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (root / "results.png").read_bytes().startswith(b"\x89PNG") and (root / "results.html").is_file()


def test_help_needs_neither_torch_nor_matplotlib():
    code = ("import sys, contextlib, plot_eval\n"
            "with contextlib.suppress(SystemExit): plot_eval.main(['--help'])\n"
            "sys.exit(bool({'torch', 'matplotlib', 'transformers'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------ the tables of README.md

README = """# Title
<!-- table: results -->
<!-- end of table -->
words | between
<!-- table: arms -->
an old table
<!-- end of table -->
<!-- table: speed -->
<!-- end of table -->
the end"""


@pytest.fixture
def published(tmp_path):
    """A folder with README.md and the three files of results that its tables are made from."""
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results.json").write_text(json.dumps(synthetic()))
    several = synthetic(SEVERAL, seeds=1)
    several["detail"]["run"]["settings"]["chained"] = 1.0
    (tmp_path / "results_arms.json").write_text(json.dumps(several))
    rows = [{"what": what, "median": 2.0, "low": 1.5, "high": 2.5} for what in plot_eval.RATIOS]
    bench = {"run": {"device": "NVIDIA H100", "torch": "2.13.0", "commit": "89abcde", "size": "70M", "batch": 8},
             "compared": rows}
    (tmp_path / "results_bench.json").write_text(json.dumps(bench))
    return tmp_path


def table(root, name):
    """The lines of a table in README.md."""
    return (root / "README.md").read_text().split(f"<!-- table: {name} -->\n")[1].split("<!-- end")[0].splitlines()


def test_the_tables_of_the_readme_are_written_from_the_results(published):
    plot(published, "--readme")
    results, arms, speed = (table(published, name) for name in ("results", "arms", "speed"))
    assert results[0].startswith("| 10,000 steps of 8 x 128 tokens, seeds 0, 1 and 2 | no memory | LTM")
    assert results[2] == ("| **bits per character**, whole documents | 1.6280 | 1.5660 "
                          "| -0.062 (-0.065 to -0.059), x 0.962 |")
    assert [line.split(" | ")[0] for line in results[3:9]] == [
        "| bits per character, 128-token windows",
        "| **long-range recall**, 160 to 384 tokens back (chance 0.125)",
        "| the same, likeliest of all 50,257 tokens (top-1)",
        "| share of predictions that retrieved",
        "| training, tokens/s", "| evaluation, tokens/s"]
    assert "openwebtext" in results[-1] and "H100" in results[-1] and "commit 1234567" in results[-1]
    assert [line.split(" | ")[0][2:] for line in arms[2:8]] == [ARMS[arm].label for arm in SEVERAL]
    assert arms[4] == ("| store: keys and values | +2.1M | 1.5520 | 0.953 (0.951 to 0.955) | helps | 0.878 "
                       "| x 0.37 | 41 MB |")
    assert ", seed 0, chained." in arms[-1]
    assert speed[2:-2] == [f"| {ratio} | x 2.00 | 1.50 to 2.50 |" for ratio in plot_eval.RATIOS]
    assert len(speed) == 10
    # all else is as it was, nothing is drawn, and once more changes nothing
    text = (published / "README.md").read_text()
    outside = re.compile("( -->\n).*?(<!-- end)", re.DOTALL)
    assert outside.sub(r"\1\2", text) == outside.sub(r"\1\2", README)
    plot(published, "--readme")
    assert (published / "README.md").read_text() == text and not list(published.glob("*.png"))


def test_what_differs_between_arms_is_said(published):
    """Seeds that an arm lacks, and who trained where another measured."""
    results = synthetic(SEVERAL)
    results["detail"]["arms"]["with_gru"]["checkpoints"] = [{"seed": 0}]
    results["detail"]["run"]["trained_by"] = {"device": "NVIDIA L4", "torch": "2.12.0", "commit": "7654321"}
    (published / "results_arms.json").write_text(json.dumps(results))
    plot(published, "--readme")
    lines = table(published, "arms")
    assert [line for line in lines if "(seed" in line] == [line for line in lines if line.startswith("| GRU")]
    assert "commit 1234567; trained on NVIDIA L4, torch 2.12.0, commit 7654321." in lines[-1]


def test_a_table_without_results_or_of_an_earlier_version_is_left_as_it_is(published, capsys):
    (published / "results_arms.json").unlink()
    (published / "results.json").write_text('{"baseline": {"bpc": 1}, "detail": {"bpc": {}}}')
    (published / "results_bench.json").unlink()
    plot(published, "--readme")
    assert (published / "README.md").read_text() == README
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [why in note for note,
            why in zip(notes, ("earlier version", "missing", "missing"))] == [True] * 3


def test_the_table_of_models_that_were_trained_already(published):
    """Both files in one table, what learns and how fast; one of them alone is no table."""
    for name, to in (("frozen", "trained/baseline"), ("gpt2", "somewhere/gpt2")):
        results = synthetic(SEVERAL, seeds=1)
        results["detail"]["run"]["settings"]["to"] = to
        for number, about in enumerate(results["detail"]["arms"].values()):
            about["trained_parameters"] = 1000 * number
        (published / f"results_{name}.json").write_text(json.dumps(results))
    with open(published / "README.md", "a") as file:
        file.write("\n<!-- table: frozen -->\n<!-- end of table -->\n")
    plot(published, "--readme")
    lines = table(published, "frozen")
    assert len(lines) == 2 + 2 * len(SEVERAL) + 2
    assert lines[2].startswith("| **baseline**, no memory | 0 | 1.6") and "| **gpt2**, no memory" in lines[2 + len(SEVERAL)]
    assert lines[3].startswith("| LTM | 1k | 1.5") and ", x 0.9" in lines[3]
    (published / "results_gpt2.json").unlink()
    plot(published, "--readme")
    assert table(published, "frozen") == lines


def test_odd_words_do_not_break_a_table(published):
    results = synthetic()
    results["detail"]["data"]["source"] = "a | b\n<!-- end of table -->\\1"
    (published / "results.json").write_text(json.dumps(results))
    for _ in range(2):
        plot(published, "--readme")
    assert (published / "README.md").read_text().count("<!-- end of table -->") == 3
    assert "a \\| b &lt;!-- end of table --&gt;" in table(published,
                                                          "results")[-1].replace("-->", "--&gt;")


@pytest.mark.parametrize("file, old, new", [
    ("results.json", '"ratio"', '"other"'), ("results_arms.json", '"state_bytes"', '"other"'),
    ("results_bench.json", plot_eval.RATIOS[1], "other"), ("results_bench.json", "}", ""),
    ("results.json", '"bpc": 1.566,', '"bpc": NaN,'),
    ("README.md", "<!-- table: arms -->", ""),
    ("README.md", "<!-- table: arms -->", "<!-- table: speed -->"),
    ("README.md", "the end", "<!-- table: arms -->\n<!-- end of table -->"),
    ("README.md", "an old table\n<!-- end of table -->", "an old table")])
def test_a_readme_or_results_that_are_damaged_leave_the_readme_as_it_is(published, file, old, new):
    text = (published / file).read_text()
    (published / file).write_text(text.replace(old, new))
    assert text != (published / file).read_text()
    before = (published / "README.md").read_bytes()
    with pytest.raises(StageError, match=file):
        plot(published, "--readme")
    assert (published / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", plot_eval.TABLES)
def test_the_readme_says_what_the_published_results_say(name):
    made, left = plot_eval.tables(PROJECT)
    if name in left:
        pytest.skip(left[name])
    assert "".join(line + "\n" for line in table(PROJECT, name)) == made[name], "run: python plot_eval.py --readme"


# ------------------------------------------------------------------ wandb

def test_wandb_gets_the_pictures(root, coarse, monkeypatch, capsys):
    """In the project and the group of the trainings, as images and as one artefact."""
    told = []
    run = SimpleNamespace(group="seed0", finish=lambda: told.append("finished"), log=told.append,
                          log_artifact=lambda artifact: told.append(artifact.files))

    class Artifact:
        def __init__(self, name, type):
            self.files = [name]

        def add_file(self, path):
            self.files.append(path)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        Settings=dict, Image=str, Artifact=Artifact, Html=lambda text, inject: (text, inject),
        init=lambda **named: (told.append(named), run)[1]))
    monkeypatch.delenv("WANDB_MODE")
    plot(root)
    named, images, artifact, finished = told
    assert (named["project"], named["group"], named["job_type"]) == (stages.WANDB_PROJECT, "seed0",
                                                                     "eval")
    assert named["config"]["data"]["val_sha256"] == "0" * 64 and named["config"]["seeds"] == [0, 1,
                                                                                              2]
    assert named["config"]["code"]["plot_eval.py"] == sha256(PROJECT / "plot_eval.py")
    paths = [str(root / f"results{what}.png") for what in ("", "_controls", "_memory")]
    page = images.pop("results_page")
    assert images == dict(zip(("results", "results_controls", "results_memory"), paths))
    assert page == ((root / "results.html").read_text(), False)
    assert artifact == ["pictures-seed0", *paths, str(root / "results.html")] and finished == "finished"
    assert "warning" not in capsys.readouterr().out


def test_without_wandb_the_pictures_and_a_warning(root, coarse, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE")
    plot(root)
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"warning: wandb is left out (import of wandb halted; None in sys.modules); {root} has the pictures"]
    assert len(list(root.glob("*.png"))) == 3


# ------------------------------------------------------------------ what else it does without


def test_without_histories_receptive_field_groups_and_with_one_seed(tmp_path):
    results = synthetic(seeds=1)
    del results["detail"]["recall"]["receptive_field"], results["detail"]["recall"]["arms"]["baseline"]["top1"]
    results["detail"]["controls"] = [{"name": "a name that goes on " * 9, "bpc_ratio": None},
                                     {"name": "b"}]
    for arm in SPECIFIED:
        results["detail"]["tokens_per_sec"][arm]["runs"] = [1234.5]
    root = build(tmp_path / "one", results)
    for path in root.glob("trained/*/history.jsonl"):
        path.unlink()
    plot(root)
    assert pixels(root / "results.png").std() > 0.1


def test_gone_checkpoints_are_named_in_one_line(root, coarse, capsys):
    for path in root.glob("trained/**/baseline/model.safetensors"):
        path.unlink()
    plot(root)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "trained/baseline, trained/seed1/baseline, trained/seed2/baseline" in warnings[0]
    assert "Checkpoints gone, not compared: trained/baseline" in (root / "results.html").read_text()
    for path in root.glob("trained/**/model.safetensors"):
        path.unlink()
    plot(root)
    assert "Checkpoints gone" not in (root / "results.html").read_text(), "published results came without any"
    assert "trained/with_ltm" in capsys.readouterr().out


def test_odd_names_are_only_names(root, coarse, recwarn):
    results = read(root)
    results["detail"]["data"]["source"] = "cost$s of $\\frac{ \u65e5\u672c\n\ttext " + "x" * 500
    results["detail"]["controls"][0]["name"] = "$\\bad{"
    write(root, results)
    plot(root)
    assert not recwarn.list


# ------------------------------------------------------ what it refuses (rows 19, 20 and 23 of test_fuzz.py)

def test_row_19_checkpoint_changed_after_the_evaluation(finished):
    (finished / "trained/seed2/with_ltm/model.safetensors").write_bytes(b"weights of another run")
    refused(finished, "results.json is of another checkpoint",
            "trained/seed2/with_ltm/model.safetensors", "rerun")


def test_a_config_changed_after_the_evaluation(finished):
    (finished / "trained/with_ltm/config.json").write_text("{}")
    refused(finished, "results.json is of another model than", "trained/with_ltm/config.json", "rerun")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_row_20_a_number_that_is_none(finished, value):
    text = (finished / "results.json").read_text()
    (finished / "results.json").write_text(text.replace('"bpc": 1.566', f'"bpc": {value}', 1))
    refused(finished, "not JSON compliant")


@pytest.mark.parametrize("flags", [["--steps", "3"], ["--root"], ["--quick=1"], ["extra"],
                                   ["--readme", "--quick"]])
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


TWO_UNREAD = {      # by the pictures of two arms; several arms or the tables of README.md may need them
    "val_tokens", "val_sha256", "commit", "settings", "batch", "chained", "hit_means",
    "memory_parameters",
    "state_bytes", "p", "p_holm", "median", "off_runs", "ratio_ci95", "per_seed", "receptive_field",
    "top1",
    "top1_ci95", "stored", "stored_ci95", "retrieved", "retrieved_ci95", "value_nats", "by_format",
    "pair", "colon",
    "sentence", "mean", "seeds", "routed_token_ratio", "controls"}
TWO_UNREAD_PARTS = {"targets", "training", "memory_hit_rate", "memory"}
DRAWN_OF_TWO = {"detail.bpc.baseline.per_seed", "detail.bpc_windows.with_ltm.per_seed",
                "detail.run.seeds",
                "with_ltm.memory_hit_rate", "detail.arms.baseline.parameters", "detail.run.commit",
                "detail.bpc.with_ltm.ratio_ci95", "detail.bpc_windows.with_ltm.ratio_ci95"}
NOT_OF_TWO = {*(f"detail.{part}.with_ltm.difference{name}" for part in ("bpc", "bpc_windows") for name in ("", ".ci95")),
              "detail.arms.with_ltm.parameters", "detail.bpc_windows.with_ltm.verdict",
              "baseline.memory_hit_rate",
              "detail.tokens_per_sec.with_ltm.verdict",
              "detail.recall.long_range.arms.with_ltm.difference",
              "detail.recall.long_range.arms.with_ltm.difference.ci95"}


def needed_of_two():
    """Every field that is drawn in the pictures of two arms."""
    for place in places(synthetic()):
        name, last = ".".join(place), place[-1]
        unread = last in TWO_UNREAD or TWO_UNREAD_PARTS & set(place[:-1] + (last,
                                                                            )) or name in NOT_OF_TWO
        if name in DRAWN_OF_TWO or not unread:
            yield name


NEEDED_OF_SEVERAL = [
    "detail.arms.with_store", *(f"detail.arms.with_store.{name}" for name in (
        "label", "memory_parameters", "state_bytes", "checkpoints")),
    *(f"detail.bpc.with_store.{name}" for name in ("ratio", "ratio_ci95", "verdict")),
    *(f"detail.recall.arms.with_store.{name}" for name in ("forced_choice", "forced_choice_ci95",
                                                           "value_nats")),
    *(f"detail.recall.long_range.arms.with_store.{name}" for name in ("ci95", "verdict")),
    "detail.run.commit", "detail.tokens_per_sec.with_store.ratio", "detail.training.with_store", "detail.targets",
    "detail.targets.last seen beyond both.arms.with_store", "with_store", "with_store.bpc",
    "with_store.long_range_recall"]


# each value and each number of arms; the other pairs with -m slow
LACKS = [pytest.param(value, arms, needed, id=f"{value!r}-{name}",
                      marks=[] if name == usual else pytest.mark.slow)
         for value, usual in (("gone", "two arms"), (None, "two arms"), ("word", "three arms"), ([], "three arms"))
         for name, arms, needed in (("two arms", SPECIFIED, list(needed_of_two())),
                                    ("three arms", SEVERAL[:3], NEEDED_OF_SEVERAL))]


@pytest.mark.parametrize("value, arms, needed", LACKS)
def test_results_that_lack_a_field_or_hold_another_thing(tmp_path, coarse, value, arms, needed):
    """Every field that is drawn, one at a time; a word or an empty list may pass for what is
    only printed or listed."""
    assert len(needed) > 20
    root = build(tmp_path / "root", bare(arms))         # memory and controls have their own tests
    for path in root.glob("trained/*/history.jsonl"):
        path.unlink()
    whole, passed = json.dumps(read(root)), set()
    for place in needed:
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
            passed.add(place)
            for path in root.glob("*.png"):
                path.unlink()
    printed = {f"detail.{name}" for name in ("data.source", "run.device", "run.torch", "run.commit", "data.quick",
                                             *(f"run.trained_by.{name}" for name in ("device", "torch", "commit")))}
    if value == "word":
        printed |= {"detail.run.seeds"} | {f"detail.arms.{arm}.label" for arm in arms}
    if value == []:
        printed |= {"detail.run.seeds"} | {f"detail.arms.{arm}.checkpoints" for arm in arms}
    # an arm that is gone from detail.arms is another picture, of one arm fewer
    gone = {f"detail.arms.{arm}" for arm in arms[2:]} if value == "gone" else set()
    assert passed <= (gone if value == "gone" else printed), passed


@pytest.mark.parametrize("folder", ["/etc", "../other", "trained/../../other", ".."])
def test_no_folder_is_followed_out_of_the_root(root, folder):
    results = read(root)
    other = root.parent / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"not ours")
    results["detail"]["arms"]["baseline"]["checkpoints"][0] = {
        "seed": 0, "folder": folder, "sha256": hashlib.sha256(b"not ours").hexdigest(), "step": 1}
    write(root, results)
    refused(root, "names a folder outside")


def test_on_the_terminal_a_failure_is_one_line_and_code_1(tmp_path):
    done = subprocess.run([sys.executable, PROJECT / "plot_eval.py", "--root", tmp_path / "a b"],
                          capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (f"plot_eval.py: {tmp_path}/a b/results.json is missing; make it with: "
                           f"python eval.py --report --root '{tmp_path}/a b'\n")


# ------------------------------------------------------------------ the study


def of_study(root, reaches=25_000.0):
    """A root with results_study.json: a curve, one row of each group, one model that was not trained."""
    detail = synthetic()["detail"]
    rows = []
    for number, steps in enumerate((5_000, 10_000, 20_000)):
        for name, memory in (("baseline", ""), ("with_ltm", "ltm")):
            share = {"mean": 0.9 if memory else 0.13, "ci95": [0.1, 0.95]}
            rows.append({"name": f"{name}_x{steps / 10_000:g}", "group": "steps", "label": name, "memory": memory,
                         "steps": steps, "bpc": 1.7 - 0.05 * number - 0.05 * bool(memory), "ratio": 0.97,
                         "recall": share, "recall_inside": share})
    rows += [dict(rows[0], name=group, group=group, label=f"a {group} $x$") for group in ("baseline", "routing")]
    results = {"rows": rows, "training_free": [{"group": "other models", "name": "six scalars", "bpc_ratio": 0.97,
                                                "recall": 0.95, "trials": 1_440}],
               "curve": {"steps": [5_000, 10_000, 20_000], "baseline": [1.7, 1.65, 1.6], "ratio": [0.97] * 3,
                         "with_ltm": [1.65, 1.6, 1.55], "baseline_reaches": reaches},
               "detail": {name: detail[name] for name in ("data", "run")}
               | {"arms": {"baseline": {"parameters": 71_598_080}}, "chance": 0.125, "distances": [160, 384]}}
    root.mkdir(exist_ok=True)
    (root / "results_study.json").write_text(json.dumps(results))
    return results


def test_the_study_is_drawn_from_its_file_alone(tmp_path, capsys):
    of_study(tmp_path)
    plot_eval.main(["--root", str(tmp_path), "--study"])
    assert imread(tmp_path / "results_study.png")[:, :, :3].std() > 0.1
    assert [path.name for path in tmp_path.glob("*.png")] == ["results_study.png"]
    before = (tmp_path / "results_study.png").read_bytes()
    plot_eval.main(["--root", str(tmp_path), "--study"])
    assert (tmp_path / "results_study.png").read_bytes() == before


def test_the_study_says_what_the_baseline_takes(tmp_path):
    words = {reaches: [text.get_text() for text in plot_eval.draw_study(of_study(tmp_path, reaches)).texts]
             for reaches in (25_000.0, None)}
    assert any("take some 25,000 steps (interpolated)" in word for word in words[25_000.0])
    assert any("in none of these trainings" in word for word in words[None])


def test_a_study_that_is_missing_or_damaged_is_named_with_its_command(tmp_path):
    with pytest.raises(StageError, match="results_study.json is missing; make it with: python eval.py --study --report"):
        plot_eval.main(["--root", str(tmp_path), "--study"])
    results = of_study(tmp_path)
    del results["curve"]["ratio"]
    (tmp_path / "results_study.json").write_text(json.dumps(results))
    with pytest.raises(StageError, match="lacks a field or has a wrong one .*ratio"):
        plot_eval.main(["--root", str(tmp_path), "--study"])
    assert not (tmp_path / "results_study.png").exists()


def test_documents_that_settings_were_chosen_on_are_not_for_the_readme(published, capsys):
    results = json.loads((published / "results.json").read_text())
    results["detail"]["data"]["part"] = "choosing"
    (published / "results.json").write_text(json.dumps(results))
    before = table(published, "results")
    plot_eval.main(["--root", str(published), "--readme"])
    assert table(published, "results") == before and "on which settings were chosen" in capsys.readouterr().out
