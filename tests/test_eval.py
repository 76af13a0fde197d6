"""eval.py: every number it reports, computed a second way; and what it refuses to report on.

A stand-in of the real thing is evaluated: one layer of width 16, rows of 32 tokens, a memory of 24 items, distances of
20 and 40 tokens. Its arms are saved by train.py's own code, at random weights: what is asked is whether the numbers
are the model's, not whether they are good.
"""

import contextlib
import copy
import io
import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import models
import prepare_data
import train
from models import EOT, Memory, RevenaConfig, RevenaHybridTiny, StageError, load_split, load_tokenizer, sha256

WIDTH = 32
CONSTANTS = dict(PACK=3, TRIALS=1, DISTANCES=(20, 40), LONG_RANGE=(40,), LEAD=8, BOOTSTRAP=200, REPEATS=2, TIMED=1,
                 FORMATS={form: evaluation.FORMATS[form] for form in ("pair", "sentence")})
ARMS = evaluation.ARMS


def tiny(seed=0, bits=15.6, **settings):
    """A hybrid at random weights, surprised by about half of all tokens: log2 of its vocabulary is 15.617."""
    torch.manual_seed(seed)
    config = dict(n_layer=1, n_embd=16, n_head=2, stm_window=WIDTH, ltm_slots=24, ltm_surprisal_bits=bits) | settings
    return RevenaHybridTiny(RevenaConfig(**config)).eval()


def text_of(length, draw):
    """A document of that many tokens, from few words, so that they come again."""
    return np.concatenate(([EOT], draw.integers(100, 130, length - 1))).astype(np.int64)


@pytest.fixture
def small(monkeypatch):
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(evaluation, name, value)


@pytest.fixture
def window(monkeypatch):
    """prepare_data cuts rows of WIDTH tokens."""
    monkeypatch.setattr(prepare_data, "WINDOW", WIDTH)
    monkeypatch.setattr(prepare_data, "STRIDE", WIDTH // 2)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir.parent.parent)


# ------------------------------------------------------------------ documents, packs, scores


def test_documents_are_what_was_cut(window):
    draw = np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (*range(2, 3 * WIDTH + 2), 200)]
    found = evaluation.documents(np.concatenate([prepare_data.windows_of(text) for text in texts]))
    assert [text.tolist() for text in found] == [text.tolist() for text in texts]


def test_packs_lay_out_every_sequence_once(small):
    draw = np.random.default_rng(0)
    sequences = [text_of(length, draw) for length in (1, 2, 31, 32, 33, 64, 65, 128, 129, 300, 5, 90)]
    met = []
    for pack in evaluation.packs(sequences, WIDTH, "cpu"):
        rows = len(pack.tokens)
        assert pack.tokens.shape == pack.targets.shape == (rows, WIDTH) and pack.opens.shape == (rows,)
        assert rows == evaluation.PACK or len(pack.places) == 1
        tokens, targets = pack.tokens.flatten().numpy(), pack.targets.flatten().numpy()
        expected, opens = np.full_like(targets, EOT), np.ones(rows, bool)
        covered = np.zeros_like(tokens)
        for number, first, length in pack.places:
            text = sequences[number]
            assert length == len(text) and first % WIDTH == 0
            assert tokens[first:first + length].tolist() == text.tolist()
            expected[first:first + length - 1] = text[1:]
            opens[first // WIDTH + 1:-(-(first + length) // WIDTH)] = False
            covered[first:first + length] += 1
            met.append(number)
        assert covered.max() == 1 and (tokens[covered == 0] == EOT).all()
        assert targets.tolist() == expected.tolist() and pack.opens.tolist() == opens.tolist()
    assert sorted(met) == list(range(len(sequences)))


@torch.no_grad()
@pytest.mark.parametrize("ltm", [False, True])
def test_documents_in_packs_score_as_each_alone(small, ltm):
    model, draw, noted = tiny(ltm_enabled=ltm), np.random.default_rng(1), []
    texts = [text_of(length, draw) for length in (2, 31, 32, 33, 64, 65, 130, 150)]
    tally = evaluation.score_text(model.score, texts, WIDTH, "cpu", noted.append)
    assert sum(noted) == len(texts)
    backbone = copy.deepcopy(model)
    backbone.config.ltm_enabled = False
    hits = stored = 0
    for number, text in enumerate(texts):
        ids, targets = torch.from_numpy(text)[None], torch.from_numpy(text)[None, 1:, None]
        for field, alone in ((tally.bits, model), (tally.stm, backbone)):
            expected = -alone(ids).logits[:, :-1].gather(2, targets)[0, :, 0].double() / math.log(2)
            assert field[number].shape == (len(text) - 1,)
            assert np.allclose(field[number], expected, atol=2e-4)
        assert ((tally.stm[number] > 15.6) == (tally.stored[number] > 0)).all() or not ltm
        hits, stored = hits + tally.hit[number].sum(), stored + tally.stored[number].sum()
    share = sum(len(text) - 1 for text in texts)
    assert (0 < hits < share and 0.2 * share < stored < 0.8 * share) if ltm else hits == stored == 0


@torch.no_grad()
def test_windows_count_each_token_once(small, window):
    model, draw = tiny(), np.random.default_rng(2)
    texts = [text_of(length, draw) for length in (2, 31, 32, 33, 48, 49, 100)]
    rows = np.concatenate([prepare_data.windows_of(text) for text in texts])
    bits, counted = evaluation.score_windows(model.score, rows, "cpu")
    assert bits.shape == counted.shape == rows.shape
    document, met = -1, []
    for row, tokens in enumerate(rows):
        document, first = (document + 1, 0) if tokens[0] == EOT else (document, first + WIDTH // 2)
        met += [(document, first + column + 1) for column in np.flatnonzero(counted[row])]
        alone = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :-1]
        expected = -alone.gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0] / math.log(2)
        assert np.allclose(bits[row, :-1][counted[row, :-1]], expected[counted[row, :-1]], atol=2e-4)
    assert sorted(met) == [(number, place) for number, text in enumerate(texts) for place in range(1, len(text))]


# ------------------------------------------------------------------ recall


def test_questions_are_what_they_say(tokenizer):
    """In all formats at all distances, with real text in which no key and no value occurs."""
    words = evaluation.single_words(tokenizer)
    assert len(words) > 5_000
    for word in words[::500]:
        text = tokenizer.decode([word])
        assert text[0] == " " and text[1:].isalpha() and text.islower() and tokenizer.encode(text) == [word]
    texts = [np.concatenate(([EOT], np.random.default_rng(i).integers(10, 26, 1_200))) for i in range(3)]
    keys, values, facts = set(), set(), evaluation.FACTS
    # " code" is a word of its own right: here, where it stands, it is the format's
    words = set(words.tolist()) - set(tokenizer.encode(" The code of is"))
    for form, (before, _, stop) in evaluation.FORMATS.items():
        for distance in evaluation.DISTANCES:
            for extra in (0, 4):
                for question in evaluation.questions(texts, tokenizer, form, distance, 2, extra):
                    tokens, choices, place = question
                    assert tokens[0] == EOT and tokens.dtype == np.int64
                    assert tokens[place] == choices[0] and len(tokens) - place == distance
                    assert len(set(choices.tolist())) == facts == len(choices)
                    said, written = tokenizer.decode(tokens[1:]), []
                    planted = [i for i, token in enumerate(tokens) if token in words]
                    for key, value in zip(planted[:-1:2], planted[1::2]):
                        written.append(tokens[value])
                        assert before.format(key=tokenizer.decode(tokens[[key]])[1:]) + \
                            tokenizer.decode(tokens[[value]]) + stop in said
                        keys.add(int(tokens[key]))
                        values.add(int(tokens[value]))
                    assert set(choices.tolist()) <= set(written) and len(written) == len(set(written))
                    assert facts <= len(written) <= facts + extra and (extra or len(written) == facts)
                    asked = tokens[planted[-1]]
                    assert said.endswith(before.format(key=tokenizer.decode([asked])[1:]))
                    assert asked == tokens[planted[planted.index(place) - 1]]       # the key before the value
    assert not keys & values


def test_questions_are_the_same_for_every_model(tokenizer):
    texts = [text_of(300, np.random.default_rng(0))]

    def ask(*how):
        return [(q.tokens.tolist(), q.choices.tolist()) for q in evaluation.questions(texts, tokenizer, *how)]
    assert ask("pair", 96, 3) == ask("pair", 96, 3) == ask("pair", 96, 5)[:3]
    assert ask("pair", 96, 3) != ask("pair", 64, 3)
    with pytest.raises(StageError, match="take 512 out of DISTANCES"):
        evaluation.questions(texts, tokenizer, "pair", 512, 1)


@torch.no_grad()
@pytest.mark.parametrize("ltm", [False, True])
def test_answers_are_those_of_the_whole_distribution(small, tokenizer, ltm):
    """Read off model.forward, and off the memory that the streaming form is left with."""
    model = tiny(bits=15.65, ltm_enabled=ltm, ltm_slots=64)
    backbone = copy.deepcopy(model)
    backbone.config.ltm_enabled = False
    texts = [text_of(100, np.random.default_rng(3))]
    asked = evaluation.questions(texts, tokenizer, "pair", 40, 3) + \
        evaluation.questions(texts, tokenizer, "sentence", 20, 2)
    right, top, stored, retrieved = evaluation.answer(model, asked, WIDTH, "cpu")
    for number, (tokens, choices, place) in enumerate(asked):
        ids, memory = torch.from_numpy(tokens)[None], Memory(model)
        p = model(ids).logits[0, -1]
        assert right[number] == (p[choices].argmax() == 0)
        assert top[number] == (p.argmax() == choices[0])
        model(ids, past_key_values=memory, logits_to_keep=1)
        if ltm:
            assert retrieved[number] == (choices[0] in [item["token"] for item in memory.retrieved()])
            assert stored[number] == (backbone(ids).logits[0, place - 1, choices[0]] / -math.log(2) > 15.65)
        else:
            assert not retrieved[number] and not stored[number]
    assert not ltm or (0 < right.sum() < len(asked) and 0 < stored.sum() < len(asked))


@torch.no_grad()
def test_a_tie_gives_the_right_value_no_advantage(small, tokenizer):
    """A model that finds all words equally likely is right once in eight, not always: bfloat16 makes ties common."""
    model = tiny(ltm_enabled=False)
    model.backbone.embed.weight.zero_()
    texts = [text_of(100, np.random.default_rng(3))]
    asked = evaluation.questions(texts, tokenizer, "pair", 20, 8)
    right = evaluation.answer(model, asked, WIDTH, "cpu")[0]
    assert right.tolist() == [bool(question.choices[0] == min(question.choices)) for question in asked]


# ------------------------------------------------------------------ statistics


@pytest.mark.parametrize("successes, trials, low, high", [      # Newcombe 1998, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0)])
def test_wilson(successes, trials, low, high):
    assert evaluation.wilson(successes, trials) == pytest.approx([low, high], abs=5e-5)


def test_wilson_holds_the_share():
    for trials in range(1, 500, 7):
        for successes in (0, 1, trials):
            low, high = evaluation.wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1


def test_mcnemar_is_the_binomial():
    for only, other in ((0, 0), (0, 1), (1, 5), (5, 5), (12, 3), (0, 20), (40, 61)):
        first = np.array([True] * only + [False] * other + [True, False] * 10)
        second = np.array([False] * only + [True] * other + [True, False] * 10)
        n = only + other
        expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only, other) + 1)) / 2 ** n)
        assert evaluation.mcnemar(first, second) == pytest.approx(expected)
        assert evaluation.mcnemar(second, first) == pytest.approx(expected)
    assert 0 <= evaluation.mcnemar(np.zeros(9_000, bool), np.ones(9_000, bool)) < 1e-300     # no overflow


def bootstrap(gain, seeds=1, count=60):
    """paired_bootstrap of documents whose bits differ by `gain` (seeds, documents)."""
    draw = np.random.default_rng(7)
    characters = draw.integers(50, 500, count).astype(float)
    bits = np.tile(characters * draw.uniform(1, 3, count), (seeds, 1))
    return evaluation.paired_bootstrap({"baseline": bits, "with_ltm": bits - gain}, characters), bits, characters


def test_bootstrap_verdicts(monkeypatch):
    monkeypatch.setattr(evaluation, "BOOTSTRAP", 500)
    noise = np.random.default_rng(0).normal(size=(1, 60))
    for gain, verdict in ((2 + noise, "helps"), (-2 + noise, "hurts"), (noise - noise.mean(), "inconclusive")):
        result, bits, characters = bootstrap(gain)
        assert result["verdict"] == verdict
        low, high = result["difference"]["ci95"]
        assert low < result["difference"]["mean"] < high
        assert result["difference"]["mean"] == pytest.approx(-gain.sum() / characters.sum())
        assert result["baseline"]["per_seed"] == pytest.approx([bits.sum() / characters.sum()])
        assert result["ratio"] == pytest.approx((bits - gain).sum() / bits.sum())
        # paired: documents differ far more from each other than the arms do
        spread = result["baseline"]["ci95"]
        assert spread[0] < result["baseline"]["per_seed"][0] < spread[1] and high - low < 0.3 * (spread[1] - spread[0])
        assert result == bootstrap(gain)[0]


def test_seeds_that_disagree_are_inconclusive(monkeypatch):
    monkeypatch.setattr(evaluation, "BOOTSTRAP", 500)
    agree, disagree = np.array([[3.0], [2.0], [3.0]]), np.array([[3.0], [-2.0], [3.0]])
    assert bootstrap(agree, 3)[0]["verdict"] == "helps"
    assert bootstrap(disagree, 3)[0]["verdict"] == "inconclusive"
    assert len(bootstrap(agree, 3)[0]["with_ltm"]["per_seed"]) == 3


def test_kinds_of_target_against_a_search():
    draw = np.random.default_rng(0)
    for _ in range(30):
        tokens = np.concatenate(([EOT], draw.integers(0, 12, 80)))
        stored, window, slots = draw.random(80) < 0.6, int(draw.integers(1, 9)), int(draw.integers(1, 7))
        for target, kind in enumerate(evaluation.kinds_of_target(tokens, stored, window, slots), 1):
            token, before = tokens[target], tokens[:target].tolist()
            held = [tokens[place] for place in range(1, target) if stored[place - 1]][-slots:]
            expected = (0 if token not in before else 1 if token in before[-window:] else 2 if token in held else 3)
            assert kind == expected


@torch.no_grad()
def test_the_window_of_kinds_is_what_attention_sees():
    """A token `window` places before the target moves its prediction; one further back does not."""
    model, text = tiny(ltm_enabled=False), text_of(2 * WIDTH + 5, np.random.default_rng(0))
    p = model(torch.from_numpy(text)[None]).logits[0, -2]           # of the last token, at len - 1
    for distance, sees in ((WIDTH, True), (WIDTH + 1, False)):
        changed = text.copy()
        changed[-1 - distance] = 500
        assert sees != torch.allclose(model(torch.from_numpy(changed)[None]).logits[0, -2], p, atol=1e-6)
    # and so is it counted: 7 comes again at the window's edge, and there the memory saves a bit
    text, stored = np.array([EOT, 7, *range(10, 9 + WIDTH), 7]), np.zeros(WIDTH + 1)
    saved = np.eye(WIDTH + 1)[-1]
    tallies = {(arm, 0): evaluation.Tally([1 + bits], [], [], [stored]) for arm, bits in zip(ARMS, (saved, 0 * saved))}
    _, targets = evaluation.summarise_gain(tallies, [text], np.ones(EOT), [0], model.config)
    assert targets["last seen inside the window"] == {"share_of_tokens": 1 / (WIDTH + 1), "share_of_gain": 1.0,
                                                      "baseline": 2.0, "with_ltm": 1.0}


def test_a_memory_that_changes_nothing_is_a_result_too():
    """No gain to share out, and a part of the documents without a character: zeros, not NaN."""
    draw, per_token = np.random.default_rng(0), np.ones(EOT)
    texts = [text_of(100, draw)]
    texts[0][65:] = 7
    per_token[7] = 0
    tallies = {(arm, 0): evaluation.Tally([np.ones(99)], [], [], [np.zeros(99)]) for arm in ARMS}
    position, targets = evaluation.summarise_gain(tallies, texts, per_token, [0], tiny().config)
    assert position == {"edges": [0, 64], "baseline": [1.0], "with_ltm": [1.0]}
    assert {part["share_of_gain"] for part in targets.values()} == {0.0}


# ------------------------------------------------------------------ trained arms


SETTINGS = dict(steps=8, batch=2)
MARK = 2.0 ** -20


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A root with data (rows of 32 tokens, two validation documents) and both arms of two seeds, at step 8 of 8."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(tokenizer_dir, root / "data" / "tokenizer")
    words = ["the", "of", "and", "caf\u00e9", "in", "surprise", "memory", "\u4f60\u597d", "angle", "eleven"]
    texts = [" ".join(random.Random(seed).choices(words, k=50)) for seed in range(20)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "WINDOW", WIDTH)
        patch.setattr(prepare_data, "STRIDE", WIDTH // 2)
        prepare_data.prepare(root, [root / "corpus.jsonl"], False)
    for seed in (0, 1):
        for arm in ARMS:
            run = run_of(root, arm, seed)
            model = tiny(seed)
            model.config.ltm_enabled = arm == "with_ltm"
            run.begin(model, load_tokenizer(root))
            for step in (4, 8):
                save(run, model, step)
    return root


def run_of(root, arm, seed=0, **settings):
    """train.py's own keeper of an arm's folder."""
    data = load_split(root, "train")[1]["splits"]["train"]["sha256"]
    settings = dict(arm=arm, seed=seed, data=data, init=f"init of seed {seed}", **{**SETTINGS, **settings})
    folder = models.arm_folder(root, seed, arm)
    folder.mkdir(parents=True, exist_ok=True)
    return train.Run(folder, settings)


def save(run, model, step, value=None):
    """Save a checkpoint; its `plausibility` tells which (or is `value`), and is too small to change a thing."""
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    weights["memory.plausibility"].fill_(step * MARK if value is None else value)
    run.save(SimpleNamespace(done=step, weights=lambda: weights, state=lambda: {"statistics": torch.zeros(step, 6)}))


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root", ignore=shutil.ignore_patterns("tokenizer*.json"))


@pytest.fixture
def one_seed(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root", ignore=shutil.ignore_patterns("tokenizer*.json", "seed1"))


@pytest.fixture(scope="module")
def evaluated(source):
    """(root, results, what was printed) of one evaluation of both seeds."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for name, value in CONSTANTS.items():
            patch.setattr(evaluation, name, value)
        evaluation.main(["--root", str(source)])
    return source, json.loads((source / "results.json").read_text()), said.getvalue()


@torch.no_grad()
def test_bits_per_character_are_those_of_the_texts(evaluated, tokenizer):
    """Each val document by itself, as text: -log2 p of its tokens by model.forward, over len(text)."""
    root, results, _ = evaluated
    texts = [json.loads(line)["text"] for line in (root / "corpus.jsonl").read_text().splitlines()]
    rows, _ = load_split(root, "val")
    held_out = [tokenizer.decode(document[1:]) for document in evaluation.documents(rows)]
    assert len(held_out) == 2 and set(held_out) < set(texts)
    detail = results["detail"]
    assert detail["data"]["val_documents"] == 2 and detail["data"]["val_characters"] == sum(map(len, held_out))
    for arm in ARMS:
        per_seed = []
        for seed in (0, 1):
            model, bits = models.load_model(models.arm_folder(root, seed, arm)), 0.0
            assert model.config.ltm_enabled == (arm == "with_ltm")
            for text in held_out:
                ids = torch.tensor([[EOT, *tokenizer.encode(text)]])
                bits -= model(ids).logits[:, :-1].gather(2, ids[:, 1:, None]).double().sum().item() / math.log(2)
            per_seed.append(bits / sum(map(len, held_out)))
        assert detail["bpc"][arm]["per_seed"] == pytest.approx(per_seed, abs=1e-5)
        assert results[arm]["bpc"] == pytest.approx(sum(per_seed) / 2, abs=1e-5)


def test_results_hold_what_they_promise(evaluated):
    root, results, said = evaluated
    assert list(results) == [*ARMS, "detail"]
    for arm in ARMS:
        assert list(results[arm]) == ["bpc", "long_range_recall", "memory_hit_rate", "tokens_per_sec"]
    assert results["baseline"]["memory_hit_rate"] == 0 < results["with_ltm"]["memory_hit_rate"] < 1
    detail = results["detail"]
    assert detail["run"]["seeds"] == [0, 1] and detail["run"]["steps"] == 8
    for arm in ARMS:
        for seed, entry in enumerate(detail["run"]["checkpoints"][arm]):
            assert entry["seed"] == seed and entry["step"] == 8
            assert entry["sha256"] == sha256(root / entry["folder"] / "model.safetensors")
    recall = detail["recall"]
    assert recall["chance"] == 0.125 and recall["window"] == WIDTH and recall["distances"] == [20, 40]
    assert recall["trials_per_distance"] == 2 and len(recall["mcnemar_p"]) == 2
    for arm in ARMS:
        part, far = recall[arm], recall["long_range"][arm]
        for name in ("forced_choice", "top1", "stored", "retrieved"):
            assert [low <= share <= high for share, (low, high) in zip(part[name], part[f"{name}_ci95"])] == [True] * 2
        for name, whole in (("by_format", "forced_choice"), ("top1_by_format", "top1")):
            assert np.mean([part[name][form] for form in CONSTANTS["FORMATS"]], 0) == pytest.approx(part[whole])
        # the one distance beyond the window is the second of the curve
        assert results[arm]["long_range_recall"] == far["mean"] == part["forced_choice"][1]
        assert far["ci95"] == part["forced_choice_ci95"][1] and far["top1"] == part["top1"][1]
    assert recall["long_range"]["mcnemar_p"] == recall["mcnemar_p"][1]
    targets = detail["targets_bits_per_token"]
    assert sum(part["share_of_tokens"] for part in targets.values()) == pytest.approx(1)
    assert sum(part["share_of_gain"] for part in targets.values()) == pytest.approx(1)
    for arm in ARMS:
        total = sum(part["share_of_tokens"] * part[arm] for part in targets.values()) * detail["data"]["val_tokens"]
        assert total == pytest.approx(results[arm]["bpc"] * detail["data"]["val_characters"])
        assert len(detail["position"][arm]) == len(detail["position"]["edges"]) - 1
        assert len(detail["tokens_per_sec"][arm]["runs"]) == 2 and results[arm]["tokens_per_sec"] > 0
        assert f"{results[arm]['bpc']:.4f}" in said
    assert "python plot_eval.py" in said and "2 documents" in said


def refused(result, *says):
    """One line that says all of `says`, and a non-zero exit."""
    code, _, err = result
    assert code == 1 and err.count("\n") <= 1 and "Traceback" not in err, err
    assert all(word in err for word in says), err
    return True


@pytest.fixture
def evaluate(stage, small):
    """evaluate(root, *flags): eval.py in this process; (exit code, stdout, stderr). results.json stays as it was."""
    def run(root, *flags):
        (root / "results.json").write_text("of an earlier evaluation")
        result = stage(evaluation.main, "--root", root, *flags)
        assert (root / "results.json").read_text() == "of an earlier evaluation"
        assert not list(root.glob(".*.tmp"))
        return result
    return run


@pytest.mark.parametrize("flags", [["--controls"], ["--steps", "3"], ["val.bin"], ["--root"], ["--quick=1"]])
def test_bad_flags(stage, flags):
    code, _, err = stage(evaluation.main, *flags)
    assert code == 2 and "usage:" in err and "Traceback" not in err


@pytest.mark.parametrize("missing, command", [
    ("data/tokenizer/vocab.json", "python download_models.py --root"),
    ("data/val.bin", "python prepare_data.py --root"),
    ("data/meta.json", "python prepare_data.py --root"), ("trained", "python train.py --baseline --root"),
    ("trained/with_ltm", "python train.py --with-ltm --root"),
    ("trained/baseline/config.json", "python train.py --baseline --root")])
def test_what_is_missing_is_named_with_its_command(one_seed, evaluate, missing, command):
    path = one_seed / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert refused(evaluate(one_seed), missing, command)


def test_changed_data_is_refused(one_seed, evaluate):
    """Rows 4 and 5."""
    whole = (one_seed / "data" / "val.bin").read_bytes()
    for damaged in (whole[:-2 * WIDTH], bytes([whole[0], whole[1], whole[2] ^ 1]) + whole[3:]):
        (one_seed / "data" / "val.bin").write_bytes(damaged)
        assert refused(evaluate(one_seed), "val.bin", "python prepare_data.py")


def damage(path, how="flip"):
    """Damage a file, but not the checkpoint that its name is a second name of."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-100] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))


def load(root, arm="with_ltm"):
    return evaluation.load_arm(root, 0, arm, "cpu", False)


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damaged_weights_give_way_to_the_newest_whole_checkpoint(one_seed, capsys, how):
    """Row 12."""
    root = one_seed
    folder = root / "trained" / "with_ltm"
    weights = folder / "model.safetensors"
    weights.unlink() if how == "gone" else damage(weights, how)
    for step in (8, 4):
        model, entry, settings = load(root)
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        assert entry == {"seed": 0, "folder": str(checkpoint.relative_to(root)), "step": step,
                         "sha256": sha256(checkpoint / "model.safetensors")}
        assert (model.memory.plausibility == step * MARK).all() and settings["steps"] == 8
        said = capsys.readouterr().out
        assert str(weights) in said and str(checkpoint) in said and ("at step 4 of 8" in said) == (step == 4)
        damage(checkpoint / "model.safetensors")
    with pytest.raises(StageError, match="no whole checkpoint is left; .* python train.py --with-ltm .* --fresh"):
        load(root)


def test_checkpoints_are_tried_newest_first_beyond_a_million_steps(one_seed):
    folder = one_seed / "trained" / "with_ltm"
    (folder / "checkpoints" / "step-000004").rename(folder / "checkpoints" / "step-1000004")
    damage(folder / "model.safetensors")
    assert load(one_seed)[1]["step"] == 1_000_004


@pytest.mark.parametrize("manifest", ["", "{", "[1]", "{}", '{"weights": 3, "settings": {}}', '{"weights": {}}'])
def test_a_damaged_manifest_is_one_line(one_seed, evaluate, manifest):
    (one_seed / "trained" / "baseline" / "manifest.json").write_text(manifest)
    assert refused(evaluate(one_seed), "baseline/manifest.json is damaged", "python train.py --baseline")


@pytest.mark.parametrize("settings, says", [
    (dict(batch=4), ("with_ltm was trained differently", "./run_all.sh --fresh")),
    (dict(init="another"), ("with_ltm was trained differently", "./run_all.sh --fresh")),
    (dict(data="another"), ("with_ltm was trained on other data", "--with-ltm", "--fresh"))])
def test_arms_that_differ_in_more_than_the_memory_are_refused(one_seed, evaluate, settings, says):
    path = one_seed / "trained" / "with_ltm" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] |= settings
    path.write_text(json.dumps(manifest))
    assert refused(evaluate(one_seed), *says)


def test_seeds_trained_differently_are_refused(root, evaluate):
    for arm in ARMS:
        path = root / "trained" / "seed1" / arm / "manifest.json"
        path.write_text(path.read_text().replace('"batch": 2', '"batch": 4'))
    assert refused(evaluate(root), "seed1/baseline was trained differently from trained/baseline")


def test_arms_that_are_not_equally_far_are_refused(one_seed, evaluate):
    for path in one_seed.glob("trained/with_ltm/**/step-000008/model.safetensors"):
        damage(path)
    damage(one_seed / "trained" / "with_ltm" / "model.safetensors")
    code, out, err = evaluate(one_seed)
    assert refused((code, out, err), "step-000004 is at step 4, not at 8", "train.py --with-ltm", "--resume")
    assert "model.safetensors is damaged" in out


def test_a_seed_with_one_arm_is_left_out(root):
    assert evaluation.seeds_of(root) == [0, 1]
    shutil.rmtree(root / "trained" / "seed1" / "baseline")
    (root / "trained" / "seeds").mkdir()
    assert evaluation.seeds_of(root) == [0]
    shutil.rmtree(root / "trained")
    assert evaluation.seeds_of(root) == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(one_seed, evaluate, value):
    """Row 20, seen before anything is scored."""
    save(run_of(one_seed, "with_ltm"), tiny(), 8, value)
    assert refused(evaluate(one_seed), "with_ltm/model.safetensors", "NaN", "--with-ltm", "--fresh")


def test_a_metric_that_is_not_a_number_is_never_written(one_seed, evaluate, monkeypatch):
    """Row 20, where the weights are numbers and what comes of them is not."""
    score = evaluation.score_text

    def spoilt(*arguments):
        tally = score(*arguments)
        tally.bits[0][0] = float("nan")
        return tally
    monkeypatch.setattr(evaluation, "score_text", spoilt)
    monkeypatch.setattr(evaluation, "DISTANCES", (40,))
    assert refused(evaluate(one_seed), "a metric is NaN", "./run_all.sh --fresh")


def test_out_of_memory_is_one_line(one_seed, evaluate, monkeypatch):
    """Row 18."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(RevenaHybridTiny, "score", full)
    assert refused(evaluate(one_seed), "out of memory", "lower the batch size")


def test_an_evaluation_beside_a_training_sees_whole_models(one_seed, capsys, monkeypatch):
    """At every step that train.py takes to save, load_arm finds the old weights or the new ones, never a mixture."""
    run, seen = run_of(one_seed, "with_ltm"), []

    def look():
        model, entry, _ = load(one_seed)
        assert entry["folder"] == "trained/with_ltm" and (model.memory.plausibility == entry["step"] * MARK).all()
        seen.append(entry["step"])

    def watched(function):
        def call(*arguments, **named):
            look()
            result = function(*arguments, **named)
            look()
            return result
        return call
    for owner, name in ((train.os, "replace"), (train.os, "link"), (train, "save_file"), (train.shutil, "rmtree"),
                        (train, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, watched(getattr(owner, name)))
            save(run, tiny(), 12 if not seen else seen[-1] + 4)
    assert seen == sorted(seen) and len(set(seen)) > 2
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("after", ["sha256", "read_json", "load_model"])
def test_a_checkpoint_saved_while_it_loads(one_seed, capsys, monkeypatch, after):
    """The hash in results.json is that of the weights that were scored."""
    run, function, calls = run_of(one_seed, "with_ltm"), getattr(evaluation, after), []

    def call(*arguments, **named):
        result = function(*arguments, **named)
        calls.append(None)
        if len(calls) == 1:
            save(run, tiny(), 12)
        return result
    monkeypatch.setattr(evaluation, after, call)
    model, entry, _ = load(one_seed)
    assert (model.memory.plausibility == entry["step"] * MARK).all() and entry["folder"] == "trained/with_ltm"
    assert entry["sha256"] in json.loads((run.folder / "manifest.json").read_text())["weights"]
    assert "damaged" not in capsys.readouterr().out
