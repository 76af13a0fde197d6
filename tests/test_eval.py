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
from test_train import prepared

WIDTH = 32
CONSTANTS = dict(PACK=3, TRIALS=1, DISTANCES=(20, 40), LONG_RANGE=(40,), LEAD=8, BOOTSTRAP=200, REPEATS=2, TIMED=1,
                 DISTRACTORS=(0, 9), DISTRACTED=40, SHOWN=50, CONTROL_TRIALS=1, FITTED=2,
                 FORMATS={form: evaluation.FORMATS[form] for form in ("pair", "sentence")})
ARMS = evaluation.ARMS


def tiny(seed=0, bits=15.6, **settings):
    """A hybrid at random weights, surprised by about half of all tokens: log2 of its vocabulary is 15.617."""
    torch.manual_seed(seed)
    config = dict(n_layer=1, n_embd=16, n_head=2, stm_window=WIDTH, ltm_slots=24, ltm_surprisal_bits=bits, ltm_shown=4)
    return RevenaHybridTiny(RevenaConfig(**config | settings)).eval()


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
    tally = evaluation.score_text(model, texts, WIDTH, "cpu", noted.append)
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
    bits, counted = evaluation.score_windows(model, rows, "cpu")
    assert bits.shape == counted.shape == rows[:, 1:].shape
    document, met = -1, []
    for row, tokens in enumerate(rows):
        document, first = (document + 1, 0) if tokens[0] == EOT else (document, first + WIDTH // 2)
        met += [(document, first + column + 1) for column in np.flatnonzero(counted[row])]
        alone = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :-1]
        expected = -alone.gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0] / math.log(2)
        assert np.allclose(bits[row][counted[row]], expected[counted[row]], atol=2e-4)
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
                    tokens, choices, place, begin = question
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
                    assert tokenizer.decode(tokens[begin:]) == before.format(key=tokenizer.decode([asked])[1:])
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


def test_all_distractors_stand_before_the_question(tokenizer):
    """Facts and nothing else where there are many; then short documents will do."""
    texts = [np.concatenate(([EOT], np.random.default_rng(0).integers(10, 26, 400)))]
    words = set(evaluation.single_words(tokenizer).tolist()) - set(tokenizer.encode(" The code of is"))
    for form in evaluation.FORMATS:
        for extra in evaluation.DISTRACTORS:
            distance = evaluation.distracted_distance(tokenizer, form, extra)
            assert distance == evaluation.DISTRACTED or extra > 8
            for tokens, _, place, begin in evaluation.questions(texts, tokenizer, form, distance, 3, extra):
                assert len(tokens) - place == distance
                between = sum(token in words for token in tokens[place + 1:begin].tolist()) / 2
                assert extra <= between < extra + evaluation.FACTS


@torch.no_grad()
@pytest.mark.parametrize("ltm", [False, True])
def test_answers_are_those_of_the_whole_distribution(small, tokenizer, ltm):
    """Read off model.forward, and off the memory that the streaming form is left with."""
    model = tiny(bits=15.65, ltm_enabled=ltm, ltm_slots=64)
    backbone = copy.deepcopy(model)
    backbone.config.ltm_enabled = False
    texts = [text_of(100, np.random.default_rng(3))]
    asked = evaluation.questions(texts, tokenizer, "pair", 40, 4) + \
        evaluation.questions(texts, tokenizer, "sentence", 20, 4)
    (right, top, stored, retrieved), = evaluation.answer([model], asked, WIDTH, "cpu")
    for number, (tokens, choices, place, _) in enumerate(asked):
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
    right = evaluation.answer([model], asked, WIDTH, "cpu")[0][0]
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


def test_paired_difference():
    """Where few pairs differ and where all do; by hand from the table with half a pair more in each cell."""
    for only, other, both, neither in ((0, 0, 3, 4), (1, 5, 30, 14), (0, 40, 0, 0), (12, 3, 2, 9)):
        first = np.array([True] * only + [False] * other + [True] * both + [False] * neither)
        second = np.array([False] * only + [True] * other + [True] * both + [False] * neither)
        first, second = (np.stack([x] * 3) for x in (first, second))            # three seeds that agree count as one
        result, n = evaluation.paired_difference(first, second), only + other + both + neither
        one, two = (only + 0.5) / (n + 2), (other + 0.5) / (n + 2)
        half = 1.959964 * math.sqrt((one * (1 - one) + two * (1 - two) + 2 * one * two) / (n + 2))
        low, high = result["ci95"]
        assert result["mean"] == pytest.approx((other - only) / n) and low < result["mean"] <= high
        assert [low, high] == pytest.approx([max(-1, two - one - half), min(1, two - one + half)])
        assert evaluation.paired_difference(second, first)["ci95"] == pytest.approx([-high, -low])


def test_the_interval_of_the_speed(monkeypatch):
    monkeypatch.setattr(evaluation, "BOOTSTRAP", 500)
    for factor, verdict in ((0.8, "hurts"), (1.2, "helps"), (1.0, "inconclusive")):
        runs = np.array([100.0, 90, 110, 95, 105])
        speed = evaluation.summarise_speed({arm: {"median": float(np.median(values)), "runs": values.tolist()}
                                            for arm, values in zip(ARMS, (runs, factor * runs + [1, -1, 1, -1, 0]))})
        low, high = speed["ratio_ci95"]
        assert low <= speed["ratio"] <= high and speed["ratio"] == pytest.approx(factor, abs=0.011)
        assert speed["verdict"] == verdict


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


# ------------------------------------------------------------------ controls


def texts_of(*lengths):
    draw = np.random.default_rng(4)
    return [text_of(length, draw) for length in lengths]


def bits_of(model, texts):
    """Bits of all targets of the texts, and the Tally they are from."""
    tally = evaluation.score_text(model, texts, WIDTH, "cpu")
    return np.concatenate(tally.bits), tally


def test_an_altered_model_is_another_one_of_the_same_weights():
    model, texts = tiny(), texts_of(90, 20)
    twin = evaluation.altered(model, ltm_slots=5)
    weights = dict(twin.named_parameters())
    assert weights and all(x.data_ptr() == weights[name].data_ptr() for name, x in model.named_parameters())
    assert model.config.ltm_slots == 24 and twin.memory.config.ltm_slots == twin.config.ltm_slots == 5
    assert (bits_of(evaluation.altered(model), texts)[0] == bits_of(model, texts)[0]).all()
    assert evaluation.altered(twin).float().backbone.embed.weight.dtype == torch.float32


def test_each_control_is_what_its_name_says(small):
    """A second way to each: other settings or other weights of a model that is made afresh."""
    much = dict(ltm_plausibility=0.0, ltm_sharpness=5.0)            # for what the learned addresses find to matter
    phrases = np.random.default_rng(0).integers(0, 5_000, (2, 12))
    model, texts = tiny(**much), [np.concatenate(([EOT], np.tile(phrase, 9))) for phrase in phrases] + texts_of(20)

    def afresh(moved=None, **settings):
        """The model with these settings; moved: (number of a part of the memory's bias, by how much)."""
        twin = tiny(**(much | settings))
        if moved:
            part, by = moved
            twin.memory.from_state.bias[:sum(twin.memory.sizes)].split(twin.memory.sizes)[part].add_(by)
        return twin
    exact = torch.tensor([-100.0] * 3 + [0.0] * 4)
    with torch.no_grad():
        expected = {
            "as trained": afresh(), "reads off": afresh(ltm_enabled=False), "every token": afresh(bits=-9.0),
            "none": afresh(ltm_cosine=-2), "0.5": afresh(ltm_cosine=0.5), "0.95": afresh(ltm_cosine=0.95),
            "0.8 (as trained)": afresh(), "15.6 (as trained)": afresh(), "24 (as trained)": afresh(),
            "2": afresh(bits=2), "8": afresh(bits=8), "16": afresh(ltm_slots=16), "1024": afresh(ltm_slots=1024),
            "made at every position": afresh((3, 100)), "exact addresses only": afresh(ltm_cosine=2),
            "learned addresses only": afresh((1, exact)),
            "exact matches trusted as in training": afresh((1, torch.tensor([-0.5, -1.0, -1.5, 0, 0, 0, 0]))),
            "learned matches weighed as in training": afresh(ltm_shown=1_000)}
        for twin in (model, *expected.values()):    # cosines of all sizes, odds for a look-up and against it
            twin.memory.from_state.bias[:twin.memory.sizes[0]] *= 0.03
            twin.memory.from_state.weight[twin.memory.width:] *= 0.2                 # what reads the token filed
            twin.memory.from_state.weight[sum(twin.memory.sizes[:3])].normal_(generator=torch.manual_seed(1))
    found = {name: bits_of(twin, texts)[0] for _, name, twin in evaluation.memory_controls(model, 0.5)}
    for name, twin in expected.items():
        assert np.allclose(found[name], bits_of(twin, texts)[0], atol=1e-4), name
    assert len({round(float(found[name].sum()), 3) for name in (
        "as trained", "reads off", "values shuffled", "random tokens, same rate", "every token", "none", "0.9",
        "made at every position", "exact addresses only", "learned addresses only",
        "learned matches weighed as in training", "16")}) == 12
    assert list(found) == list(dict.fromkeys(name for _, name, _ in evaluation.memory_controls(model, 0.5)))


def test_random_tokens_at_the_rate_asked_for(small):
    model, texts = tiny(), texts_of(300, 300)
    random = lambda rate: bits_of(evaluation.altered(model, evaluation.RandomTokens, rate=rate), texts)
    (nothing, some, same, all_), bits = ([np.concatenate(random(rate)[1].stored) for rate in (0, 0.4, 0.4, 1)],
                                         random(1)[0])
    assert not nothing.any() and all_.all() and abs(some.mean() - 0.4) < 0.1 and (some == same).all()
    assert (bits == bits_of(evaluation.altered(model, ltm_surprisal_bits=-1), texts)[0]).all()


def test_shuffled_values_stay_in_their_sequence():
    model = evaluation.altered(tiny(ltm_slots=200), evaluation.ShuffledValues)
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(6 * WIDTH).view(6, WIDTH)
    stored, opens = torch.rand(6, WIDTH, generator=draw) < 0.5, torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    address = models.Address(*[targets] * 7)
    items, values, visible = model.candidates(address, targets, stored, opens)
    assert torch.equal(values, model.candidates(address, targets, stored, opens)[1])
    for last, (first, past) in {1: (0, 2), 4: (2, 5), 5: (5, 6)}.items():
        seen = visible[last, -1]
        kept = targets[first:past][stored[first:past]][:int(seen.sum())]
        assert items.key[last][seen].tolist() == kept.tolist()                  # where they are filed
        mixed, own = values[last][seen].tolist(), targets[first:past][stored[first:past]].tolist()
        assert set(mixed) <= set(own) and len(set(mixed)) == len(mixed) >= len(own) - 1 and mixed != kept.tolist()


@torch.no_grad()
def test_a_wiped_memory_knows_nothing_of_before_the_question(small, tokenizer):
    """As a Memory whose items are dropped where the question begins."""
    model, texts = tiny(bits=15.3, ltm_slots=64), texts_of(100)
    asked = evaluation.questions(texts, tokenizer, "pair", 40, 4) + \
        evaluation.questions(texts, tokenizer, "sentence", 40, 4)
    (before,), (wiped,) = (evaluation.answer([model], asked, WIDTH, "cpu", wiped=wiped) for wiped in (False, True))
    assert before[2:].any(1).all() and not wiped[2:].any()
    for number, (tokens, choices, _, begin) in enumerate(asked):
        memory, ids = Memory(model), torch.from_numpy(tokens)[None]
        model(ids[:, :begin], past_key_values=memory)
        memory.count.zero_()
        p = model(ids[:, begin:], past_key_values=memory).logits[0, -1]
        assert wiped[0, number] == (p[choices].argmax() == 0) and wiped[1, number] == (p.argmax() == choices[0])


def test_variants_answer_as_each_alone(small, tokenizer):
    model = tiny(bits=15.3, ltm_slots=64)
    asked = evaluation.questions(texts_of(100), tokenizer, "pair", 40, 5)
    variants = [model, evaluation.altered(model, ltm_slots=4), evaluation.altered(model, ltm_surprisal_bits=99)]
    together = evaluation.answer(variants, asked, WIDTH, "cpu")
    for variant, outcomes in zip(variants, together):
        assert (evaluation.answer([variant], asked, WIDTH, "cpu")[0] == outcomes).all()
    assert not (together[0] == together[1]).all() and not together[2][2:].any()


@torch.no_grad()
@pytest.mark.parametrize("slots", [7, 24, 100])
def test_the_neural_cache_is_that_of_its_paper(small, slots):
    """Grave et al. 2017, equations 2 to 4, token by token in float64."""
    baseline, (text,), theta, share = tiny(ltm_enabled=False), texts_of(90), 0.4, 0.3
    cache = evaluation.altered(baseline, evaluation.NeuralCache, ltm_enabled=True, ltm_slots=slots, theta=theta,
                               share=share)
    rows, opens = torch.from_numpy(np.pad(text, (0, 6), constant_values=EOT)).view(3, WIDTH), torch.eye(3)[0].bool()
    h = baseline.states(rows, opens).flatten(0, 1).double()
    p_stm = baseline.logits(h.float()).double().softmax(-1)
    bits, _ = bits_of(cache, [text])
    for t in range(len(text) - 1):
        p = (1 - share) * p_stm[t] if t else p_stm[t]
        kept = range(max(0, t - slots), t)                  # the state that came before each token seen, and the token
        weights = [math.exp(theta * float(h[t] @ h[i])) for i in kept]
        for i, weight in zip(kept, weights):
            p[text[i + 1]] += share * weight / sum(weights)
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert bits[t] == pytest.approx(-math.log2(p[text[t + 1]]), abs=2e-4)
    assert torch.allclose(cache(torch.from_numpy(text)[None]).logits.exp().sum(-1), torch.ones(len(text)), atol=1e-4)


def test_the_neural_cache_is_fitted(small):
    """No neighbouring theta or share is better; texts that repeat themselves make much of it."""
    baseline = tiny(ltm_enabled=False)
    texts = [np.concatenate(([EOT], np.tile(np.random.default_rng(i).integers(0, 5_000, 20), 4))) for i in range(2)]
    fitted = evaluation.fit_cache(baseline, texts, 50, WIDTH)
    theta, share = fitted.config.theta, fitted.config.share
    best = bits_of(fitted, texts)[0].sum()
    assert 0.1 < share < 0.9 and best < 0.8 * bits_of(baseline, texts)[0].sum()
    for changed in (dict(theta=theta * 2 ** 0.5), dict(theta=theta / 2 ** 0.5), dict(share=share + 0.01),
                    dict(share=share - 0.01)):
        assert bits_of(evaluation.altered(fitted, evaluation.NeuralCache, **changed), texts)[0].sum() > best
    noise = evaluation.fit_cache(baseline, [np.arange(EOT, EOT - 60, -1)], 50, WIDTH)      # nothing comes again
    assert noise.config.share < 1e-6


@torch.no_grad()
def test_exact_addresses_are_fitted_without_a_learned_part(small):
    """On texts that repeat themselves they pay, on others they weigh least; the learned weights play no part."""
    baseline = tiny(ltm_enabled=False)
    before = {name: x.clone() for name, x in baseline.state_dict().items()}
    texts = [np.concatenate(([EOT], np.tile(np.random.default_rng(i).integers(0, 5_000, 20), 4))) for i in range(2)]
    fitted, trust = evaluation.fit_grams(baseline, texts, WIDTH)
    best = bits_of(fitted, texts)[0].sum()
    assert best < 0.6 * bits_of(baseline, texts)[0].sum()
    assert all(torch.equal(x, before[name]) for name, x in baseline.state_dict().items())
    # after 7 comes another token each time
    never = [np.array([EOT, *[token for other in range(100, 130) for token in (7, other)]])]
    assert evaluation.fit_grams(baseline, never, WIDTH)[1][0] == -7 < max(trust)
    torch.nn.init.normal_(baseline.memory.from_state.weight)
    torch.nn.init.normal_(baseline.memory.from_tokens.weight)
    assert bits_of(evaluation.fit_grams(baseline, texts, WIDTH)[0], texts)[0].sum() == pytest.approx(best)


@torch.no_grad()
def test_full_attention_has_the_baselines_weights(small):
    baseline, texts = tiny(ltm_enabled=False), texts_of(100, WIDTH)
    gpt = evaluation.altered(baseline, models.GPT, stm_window=None, n_positions=100)
    found = evaluation.score_text(gpt, texts, 100, "cpu").bits
    for text, bits in zip(texts, found):
        ids = torch.from_numpy(text)[None]
        expected = -gpt(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0] / math.log(2)
        assert np.allclose(bits, expected, atol=1e-4)
    long, short = evaluation.score_text(baseline, texts, WIDTH, "cpu").bits
    assert np.allclose(short, found[1], atol=1e-4) and not np.allclose(long, found[0], atol=1e-4)


def test_a_graph_is_compiled_once_for_all_models(small, monkeypatch):
    """20 seconds each on a GPU; here with a backend that only counts."""
    from torch._dynamo.testing import CompileCounter
    counters, compile = [], torch.compile

    def counting(function, options, dynamic):
        assert options["deterministic"], "how a kernel sums must not depend on how fast it was once"
        counters.append(CompileCounter())
        return compile(function, backend=counters[-1], dynamic=dynamic)
    monkeypatch.setattr(torch, "compile", counting)
    method_of = evaluation.functools.cache(evaluation.compiled_method.__wrapped__)
    monkeypatch.setattr(evaluation, "fast", lambda method, model, *given: method_of(method)(model, *given))
    for seed in range(3):
        for ltm in (False, True):
            model = tiny(seed, ltm_enabled=ltm)
            compare = evaluation.score_text(model, texts_of(90, 30, 20), WIDTH, "cpu")
            assert np.isfinite(np.concatenate(compare.bits)).all()
    assert [counter.frame_count for counter in counters] == [1, 1, 1]


# ------------------------------------------------------------------ one memory at work


def test_pieces_join_to_the_text(tokenizer):
    text = "caf\u00e9 \u4f60\u597d\n\n\u201cmemory\u201d \U0001f600 \u00a0end"
    tokens = tokenizer.encode(text)
    words = evaluation.pieces(tokenizer, tokens)
    assert "".join(words) == text and len(words) == len(tokens) and "" in words


@torch.no_grad()
def test_what_is_observed_is_what_a_memory_does(small, tokenizer, monkeypatch):
    """Token by token in the streaming form; the first document of those with something to see in them."""
    monkeypatch.setattr(evaluation, "SHOWN", 90)
    model, draw = tiny(ltm_slots=60), np.random.default_rng(5)
    again = draw.permutation(np.arange(1000, 1040))                 # no word twice within a window, then all again
    texts = [draw.integers(0, 5_000, 95), draw.integers(0, 5_000, 20), np.tile(again, 3), np.tile(again[::-1], 3)]
    texts = [np.concatenate(([EOT], text)) for text in texts]
    tally = evaluation.score_text(model, texts, WIDTH, "cpu")
    seen = evaluation.observe(model, texts, tally, tokenizer)
    assert json.loads(json.dumps(seen)) == seen
    assert (seen["document"], seen["window"], seen["threshold"], len(seen["tokens"])) == (2, WIDTH, 15.6, 90)
    text, memory = texts[2], Memory(model)
    assert "".join(token["text"] for token in seen["tokens"]) == tokenizer.decode(text[1:91])
    reads = {read["at"]: read["from"] for read in seen["reads"]}
    assert list(reads) == sorted(reads) and len(reads) == len({text[at + 1] for at in reads}) == evaluation.READS
    for at, token in enumerate(seen["tokens"]):
        p = model(torch.tensor([[text[at]]]), past_key_values=memory).logits[0, -1]
        assert token["bits_mixture"] == pytest.approx(-float(p[text[at + 1]]) / math.log(2), abs=1e-3)
        assert token["bits"] == pytest.approx(tally.stm[2][at], abs=1e-3)
        assert token["stored"] == bool(tally.stored[2][at])
        if at in reads:
            found = [item for item in memory.retrieved() if item["token"] == text[at + 1]][:evaluation.SOURCES]
            assert [source["at"] + 1 for source in reads[at]] == [item["position"] for item in found]
            for name in ("share", "cosine"):
                assert [source[name] for source in reads[at]] == pytest.approx([item[name] for item in found], abs=1e-4)
            assert at + 1 - found[0]["position"] > WIDTH and token["bits_mixture"] < token["bits"]
            assert all(seen["tokens"][source["at"]]["stored"] for source in reads[at])
    # nothing to see: still a picture, without reads
    assert evaluation.observe(model, texts[1:2], evaluation.score_text(model, texts[1:2], WIDTH, "cpu"),
                              tokenizer)["reads"] == []


# ------------------------------------------------------------------ trained arms


SETTINGS = dict(steps=8, batch=2)
MARK = 2.0 ** -20


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A root with data (rows of 32 tokens, two validation documents) and both arms of two seeds, at step 8 of 8."""
    words = ["the", "of", "and", "caf\u00e9", "in", "surprise", "memory", "\u4f60\u597d", "angle", "eleven"]
    root = prepared(tmp_path_factory.mktemp("source"), tokenizer_dir, words, 50, 20, WIDTH)
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
    """Save a checkpoint; its bias tells which (or is `value`), and is too small to change a thing."""
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    weights["memory.from_state.bias"].fill_(step * MARK if value is None else value)
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
        evaluation.main(["--root", str(source), "--controls"])
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
        assert len(far["per_seed"]) == 2 and np.mean(far["per_seed"]) == pytest.approx(far["mean"])
    assert recall["long_range"]["mcnemar_p"] == recall["mcnemar_p"][1]
    assert [row["facts"] for row in recall["distractors"]] == [0, 9]
    for row in recall["distractors"]:
        assert row["distance"] == ({"pair": 40, "sentence": 56} if row["facts"] == 0 else {"pair": 51, "sentence": 119})
        for arm in ARMS:
            low, high = row[arm]["ci95"]
            assert low <= row[arm]["forced_choice"] <= high
            assert {"top1", "stored", "retrieved", "retrieved_of_answered"} < row[arm].keys()
    for part in (recall["long_range"], detail["tokens_per_sec"]):
        assert part["verdict"] in ("helps", "hurts", "inconclusive")
    low, high = recall["long_range"]["difference"]["ci95"]
    assert low <= recall["long_range"]["difference"]["mean"] <= high
    assert detail["memory"]["window"] == WIDTH and len(detail["memory"]["tokens"]) == 50
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


def test_rows_of_controls(evaluated):
    _, results, said = evaluated
    detail, rows = results["detail"], results["detail"]["controls"]
    assert all(list(row)[:3] == ["group", "name", "bpc_ratio"] and 0 <= row["recall"] <= 1 for row in rows)
    by_name = {row["name"]: row for row in rows}
    ratio = np.divide(*(detail["bpc"][arm]["per_seed"][0] for arm in ("with_ltm", "baseline")))
    trained = by_name["as trained"]
    assert trained["bpc_ratio"] == pytest.approx(ratio, abs=1e-6)
    assert trained["hit_rate"] == pytest.approx(detail["memory_hit_rate"]["per_seed"][0])
    assert trained["trials"] == 2 and trained["recall"] in (0, 0.5, 1)
    for name in ("0.8 (as trained)", "15.6 (as trained)", "24 (as trained)"):
        assert {**by_name[name], "group": "reads", "name": "as trained"} == trained
    wiped, gpt = by_name["memory wiped between fact and question"], by_name["GPT, full attention (trained at 32)"]
    assert wiped["bpc_ratio"] is None and rows[2] is wiped and gpt["stored"] == 0
    caches = [row for row in rows if row["name"].startswith("neural cache")]
    assert [row["stored"] for row in caches] == [1, 1] and all(0 <= row["share"] < 1 for row in caches)
    assert f"{trained['bpc_ratio']:.3f}" in said and all(row["name"] in said for row in rows)
    assert all(len(row["name"]) <= 42 for row in rows)              # what the picture has room for


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


@pytest.mark.parametrize("flags", [["--control=1"], ["--steps", "3"], ["val.bin"], ["--root"], ["--quick=1"]])
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
                         "sha256": sha256(checkpoint / "model.safetensors"),
                         "config_sha256": sha256(folder / "config.json")}
        assert (model.memory.from_state.bias == step * MARK).all() and settings["steps"] == 8
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


@pytest.mark.parametrize("change", [dict(ltm_cosine=0.7), dict(ltm_enabled=False), dict(note="harmless"), None])
def test_a_config_that_was_changed_is_refused(one_seed, evaluate, change):
    """Settings of the memory belong to what was trained as the weights do."""
    path = one_seed / "trained" / "with_ltm" / "config.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert refused(evaluate(one_seed), str(path), "not the file its manifest names", "--with-ltm", "--fresh")


def test_the_config_is_known_as_it_was_at_the_start(one_seed):
    """Not as a later save finds it."""
    path = one_seed / "trained" / "with_ltm" / "config.json"
    path.write_text(path.read_text().replace("0.8", "0.7"))
    save(run_of(one_seed, "with_ltm"), tiny(), 12)
    with pytest.raises(StageError, match="config.json is missing or not the file"):
        load(one_seed)


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
    monkeypatch.setattr(RevenaHybridTiny, "states", full)
    assert refused(evaluate(one_seed), "out of memory", "lower the batch size")


def test_an_evaluation_beside_a_training_sees_whole_models(one_seed, capsys, monkeypatch):
    """At every step that train.py takes to save, load_arm finds the old weights or the new ones, never a mixture."""
    run, seen = run_of(one_seed, "with_ltm"), []

    def look():
        model, entry, _ = load(one_seed)
        assert entry["folder"] == "trained/with_ltm" and (model.memory.from_state.bias == entry["step"] * MARK).all()
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
    assert (model.memory.from_state.bias == entry["step"] * MARK).all() and entry["folder"] == "trained/with_ltm"
    assert entry["sha256"] in json.loads((run.folder / "manifest.json").read_text())["weights"]
    assert "damaged" not in capsys.readouterr().out
