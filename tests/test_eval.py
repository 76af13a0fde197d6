"""eval.py: every number it reports, computed a second way; and what it refuses to report on.

A stand-in of the real thing is evaluated: one layer of width 16, rows of 32 tokens, a memory of 24 items, distances of
20 and 40 tokens. Its arms are saved by train.py's own code, at random weights: what is asked is whether the numbers
are the model's, not whether they are good.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import models
import prepare_data
import stages
import train
from models import Memory, RevenaCache, RevenaConfig, RevenaHybridTiny
from stages import EOT, StageError, load_split, load_tokenizer, sha256
from test_train import prepared

WIDTH = 32
SMALL = evaluation.Settings(pack=6, lane=3, trials=1, forms=("pair", "sentence"), distances=(20, 40), long_range=(40,),
                            lead=8, distractors=(0, 9), distracted=40, dialogues=2, turn=60, together=3, repeats=2,
                            needles=(160, 100_000 * WIDTH), hops=(1, 2), hop_tokens=192, streamed=2, indirect=(40,),
                            indirect_trials=1, timed=1, shown=50, bootstrap=200, control_trials=1, fitted=1)
ARMS = ("baseline", "with_ltm")
MADE_BY = {"commit": "1234567", "torch": "2.13.0", "device": "a GPU"}
TOY = "with_toy"


class Toy(Memory, kind="toy"):
    """A running mean of what went before, added at the first layer: enough of a memory inside the backbone."""

    places = (0,)
    hit_means = "predictions that the toy moved"

    def __init__(self, config):
        super().__init__(config)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def empty(self, batch, device):
        return {"sum": torch.zeros(batch, self.config.n_embd, device=device),
                "count": torch.zeros(batch, device=device)}

    def mix(self, place, x, y, state, real, notes):
        total = state["sum"][:, None] + x.float().cumsum(1)
        count = state["count"][:, None] + torch.arange(1, x.size(1) + 1, device=x.device)
        state = {**state, "sum": total[:, -1], "count": count[:, -1]}
        return y + self.out((total / count[..., None]).to(y.dtype)), state


def tiny(seed=0, bits=15.6, **settings):
    """A hybrid at random weights, surprised by about half of all tokens: log2 of its vocabulary is 15.617."""
    torch.manual_seed(seed)
    config = dict(n_layer=1, n_embd=16, n_head=2, stm_window=WIDTH, ltm_slots=24, ltm_surprisal_bits=bits)
    return RevenaHybridTiny(RevenaConfig(**config | settings)).eval()


def text_of(length, draw):
    """A document of that many tokens, from few words, so that they come again."""
    return np.concatenate(([EOT], draw.integers(100, 130, length - 1))).astype(np.int64)


def rows_of(texts):
    """Texts cut into rows as prepare_data.py cuts them."""
    parts = [prepare_data.windows_of(text, WIDTH, WIDTH // 2) for text in texts]
    return np.concatenate(parts).astype(np.uint16)


@pytest.fixture
def toy(monkeypatch):
    """The table of arms has a further one, whose memory is Toy."""
    arms = {**stages.ARMS, TOY: stages.Arm("toy", "a toy")}
    for module in (stages, evaluation):
        monkeypatch.setattr(module, "ARMS", arms)
    monkeypatch.setattr(stages, "model_class", lambda memory: RevenaHybridTiny)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(evaluation, "FULL", SMALL)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir.parent.parent)


# ------------------------------------------------------------------ documents, packs, scores


def test_documents_are_what_was_cut():
    draw = np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (*range(2, 3 * WIDTH + 2), 200)]
    found = stages.documents(rows_of(texts))
    assert [text.tolist() for text in found] == [text.tolist() for text in texts]


@pytest.mark.parametrize("lane", [3, 6])
def test_packs_lay_out_every_sequence_once(lane):
    """In lanes that none crosses; one longer than a lane has a pack to itself."""
    draw, settings = np.random.default_rng(0), dataclasses.replace(SMALL, lane=lane)
    sequences = [text_of(length, draw) for length in (1, 2, 31, 32, 33, 64, 65, 96, 128, 129, 300, 5, 90)]
    met = []
    for pack in evaluation.packs(sequences, WIDTH, "cpu", settings):
        rows = len(pack.tokens)
        lanes, length_of_lane = pack.opens.shape
        assert pack.tokens.shape == pack.targets.shape == (rows, WIDTH) and rows == lanes * length_of_lane
        assert (lanes, length_of_lane) == (6 // lane, lane) if pack.usual else len(pack.places) == lanes == 1
        tokens, targets = pack.tokens.flatten().numpy(), pack.targets.flatten().numpy()
        expected, opens = np.full_like(targets, EOT), np.ones(rows, bool)
        covered = np.zeros_like(tokens)
        for number, first, length in pack.places:
            text, last = sequences[number], first + length - 1
            assert length == len(text) and first % WIDTH == 0
            assert first // WIDTH // length_of_lane == last // WIDTH // length_of_lane
            assert tokens[first:first + length].tolist() == text.tolist()
            expected[first:first + length - 1] = text[1:]
            opens[first // WIDTH + 1:-(-(first + length) // WIDTH)] = False
            covered[first:first + length] += 1
            met.append(number)
        assert covered.max() == 1 and (tokens[covered == 0] == EOT).all()
        assert targets.tolist() == expected.tolist() and pack.opens.flatten().tolist() == opens.tolist()
    assert sorted(met) == list(range(len(sequences)))


def test_lanes_are_filled():
    """No two lanes could have been one."""
    draw = np.random.default_rng(0)
    sequences = [text_of(int(length), draw) for length in draw.integers(2, 16 * WIDTH, 200)]
    lanes = evaluation.lanes_of(sequences, WIDTH, 16)
    assert sorted(itertools.chain(*lanes)) == list(range(200))
    taken = sorted(sum(-(-len(sequences[i]) // WIDTH) for i in lane) for lane in lanes)
    assert taken[-1] <= 16 < taken[0] + taken[1]


MEMORIES = {"none": dict(memory_enabled=False), "ltm": {}, "toy": dict(memory="toy")}


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_documents_in_packs_score_as_each_alone(memory):
    model, draw, noted = tiny(**MEMORIES[memory]), np.random.default_rng(1), []
    texts = [text_of(length, draw) for length in (2, 31, 32, 33, 64, 65, 130, 150)]
    tally = evaluation.score_text(model, texts, WIDTH, SMALL, noted.append)
    assert sum(noted) == len(texts)
    backbone = evaluation.memory_off(model) if memory == "ltm" else model
    hits = stored = 0
    for number, text in enumerate(texts):
        ids, targets = torch.from_numpy(text)[None], torch.from_numpy(text)[None, 1:, None]
        for field, alone in ((tally.log_p, model), (tally.log_p_stm, backbone)):
            expected = alone(ids).logits[:, :-1].gather(2, targets)[0, :, 0]
            assert field[number].shape == (len(text) - 1,) and field[number].dtype == np.float32
            assert np.allclose(field[number], expected, atol=1e-4)
        surprising = evaluation.bits(tally.log_p_stm[number]) > 15.6
        assert (surprising == tally.stored[number]).all() or memory != "ltm"
        hits, stored = hits + tally.hit[number].sum(), stored + tally.stored[number].sum()
    share = sum(len(text) - 1 for text in texts)
    assert {"none": hits == 0, "ltm": 0 < hits < share, "toy": hits > 0}[memory]
    assert 0.2 * share < stored < 0.8 * share if memory == "ltm" else stored == 0


@torch.no_grad()
def test_a_memory_that_is_off_does_nothing():
    """And the model that it is taken from keeps its own."""
    model, texts = tiny(memory="toy"), texts_of(90, 20)
    off = evaluation.memory_off(model)
    expected = tiny(memory="toy", memory_enabled=False)
    assert (bits_of(off, texts)[0] == bits_of(expected, texts)[0]).all()
    assert model.config.memory_enabled and not np.allclose(bits_of(model, texts)[0], bits_of(off, texts)[0])
    assert off.backbone is model.backbone


@torch.no_grad()
def test_windows_count_each_token_once():
    model, draw = tiny(), np.random.default_rng(2)
    texts = [text_of(length, draw) for length in (2, 31, 32, 33, 48, 49, 100)]
    rows = rows_of(texts)
    log_p, counted = evaluation.score_windows(model, rows, SMALL), evaluation.counted_targets(rows)
    assert log_p.shape == counted.shape == rows[:, 1:].shape
    document, met = -1, []
    for row, tokens in enumerate(rows.astype(np.int64)):
        document, first = (document + 1, 0) if tokens[0] == EOT else (document, first + WIDTH // 2)
        met += [(document, first + column + 1) for column in np.flatnonzero(counted[row])]
        alone = model(torch.from_numpy(tokens)[None]).logits[0, :-1]
        expected = alone.gather(1, torch.from_numpy(tokens[1:])[:, None])[:, 0]
        assert np.allclose(log_p[row][counted[row]], expected[counted[row]], atol=1e-4)
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
    keys, values, facts = set(), set(), evaluation.FULL.facts
    # " code" is a word of its own right: here, where it stands, it is the format's
    words = set(words.tolist()) - set(tokenizer.encode(" The code of is"))
    for form, (before, _, stop) in evaluation.FORMATS.items():
        for distance in evaluation.FULL.distances:
            for extra in (0, 4):
                for question in evaluation.questions(texts, tokenizer, form, distance, 2, evaluation.FULL, extra):
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

    def ask(form, distance, count):
        made = evaluation.questions(texts, tokenizer, form, distance, count, evaluation.FULL)
        return [(question.tokens.tolist(), question.choices.tolist()) for question in made]

    assert ask("pair", 96, 3) == ask("pair", 96, 3) == ask("pair", 96, 5)[:3]
    assert ask("pair", 96, 3) != ask("pair", 64, 3)


def test_all_distractors_stand_before_the_question(tokenizer):
    """Facts and nothing else where there are many; then short documents will do."""
    settings = evaluation.FULL
    texts = [np.concatenate(([EOT], np.random.default_rng(0).integers(10, 26, 400)))]
    words = set(evaluation.single_words(tokenizer).tolist()) - set(tokenizer.encode(" The code of is"))
    for form in evaluation.FORMATS:
        for extra in settings.distractors:
            distance = evaluation.distracted_distance(tokenizer, form, extra, settings)
            assert distance == settings.distracted or extra > 8
            for tokens, _, place, begin in evaluation.questions(texts, tokenizer, form, distance, 3, settings, extra):
                assert len(tokens) - place == distance
                between = sum(token in words for token in tokens[place + 1:begin].tolist()) / 2
                assert extra <= between < extra + settings.facts


def test_what_is_reported_shares_nothing_with_what_was_chosen_on(tokenizer):
    """No document, no word, no format of a fact."""
    draw = np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (2, 33, 90, 64, 31, 100, 20, 50, 70)]
    rows = rows_of(texts)
    parts = {part: [text.tolist() for text in stages.documents(evaluation.documents_of(rows, part))]
             for part in evaluation.PARTS}
    whole = [text.tolist() for text in texts]
    assert parts["all"] == whole and parts["choosing"] == whole[::4]
    assert parts["reported"] == [text for number, text in enumerate(whole) if number % 4]
    one, other = (evaluation.FULL.of_part(part) for part in ("choosing", "reported"))
    assert one.forms == evaluation.FULL.forms and not set(one.forms) & set(other.forms)
    assert set(one.forms) | set(other.forms) == set(evaluation.FORMATS)
    asked = {settings.part: [set(words.tolist()) for words in evaluation.keys_and_values(tokenizer, settings)]
             for settings in (one, other, evaluation.FULL)}
    assert not set.union(*asked["choosing"]) & set.union(*asked["reported"])
    assert min(map(len, asked["reported"])) > 1_500
    assert [a | b for a, b in zip(asked["choosing"], asked["reported"])] == asked["all"]


def test_indirect_questions_are_what_they_say(tokenizer):
    """In each the value stands once, its distance from the question is right, and what the kind promises holds."""
    texts = [np.concatenate(([EOT], np.random.default_rng(i).integers(10, 26, 700))) for i in range(3)]
    settings = dataclasses.replace(evaluation.FULL, indirect=(64, 256), indirect_trials=3).of_part("reported")
    keys, values = (set(words.tolist()) for words in evaluation.keys_and_values(tokenizer, settings))
    asked = evaluation.all_indirect(texts, tokenizer, settings)
    assert len(asked) == 2 * (9 + 4 * 3) and {len(cell) for cell in asked.values()} == {3}
    for (kind, planted, form, distance), cell in asked.items():
        form = evaluation.form_of(tokenizer, form)
        for tokens, choices, place, begin in cell:
            value, text, question = choices[0], tokens[:begin].tolist(), tokens[begin:].tolist()
            assert tokens[0] == EOT and tokens[place] == value and len(tokens) - place == distance
            assert len(set(choices.tolist())) == settings.facts and set(choices.tolist()) <= values & set(text)
            assert text.count(value) == 1
            key, *more = [token for token in question if token in keys]
            ends = [at for at, token in enumerate(text) if token == key]
            after = [next(token for token in text[at + 1:] if token in values) for at in ends]
            if kind == "format":
                assert question == form.fact(key, value)[:form.asked] and after == [value]
            elif kind == "filler":
                assert question == form.fact(key, value)[:form.asked] and tokens[place - 1] in keys - {key}
            elif kind == "long key":
                others = text[:place] + text[place + 1:]
                assert len(more) == 1 and tokens[begin + len(form.opening):][:2].tolist() == [key, *more]
                assert key in [x for x in text[:place - 5] + text[place:]] or more[0] in others
                pairs = [pair for pair in itertools.pairwise(text) if pair == (key, *more)]
                assert len(pairs) == 1 and text.count(key) >= 2 and text.count(more[0]) >= 2
            elif kind == "changed":
                assert after == [choices[-1], value]
            elif kind == "two hops":
                at, = ends
                second = next(token for token in text[at + 1:] if token in keys)
                second_at = max(i for i, token in enumerate(text) if token == second)
                assert next(token for token in text[second_at + 1:] if token in values) == value
                assert question == evaluation.chain_question(key, tokenizer, settings)


def test_indirect_questions_that_there_is_no_text_for_are_left_out(tokenizer, capsys):
    settings = dataclasses.replace(SMALL, indirect=(40, 500))
    asked = evaluation.all_indirect([text_of(200, np.random.default_rng(0))], tokenizer, settings)
    assert {cell[-1] for cell in asked} == {40} and "over 500 tokens is left out" in capsys.readouterr().out


def asked_of(texts, tokenizer, count=4):
    """Some questions in two formats at two distances."""
    return (evaluation.questions(texts, tokenizer, "pair", 40, count, SMALL)
            + evaluation.questions(texts, tokenizer, "sentence", 20, count, SMALL))


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_answers_are_those_of_the_whole_distribution(tokenizer, memory):
    """Read off model.forward, and off the cache that the streaming form is left with."""
    model = tiny(bits=15.65, ltm_slots=64, **MEMORIES[memory])
    backbone = evaluation.memory_off(model)
    asked = asked_of([text_of(100, np.random.default_rng(3))], tokenizer)
    answers, = evaluation.answer([model], asked, WIDTH, SMALL)
    right, top, stored, retrieved = answers.outcomes
    for number, (tokens, choices, place, _) in enumerate(asked):
        ids, cache = torch.from_numpy(tokens)[None], RevenaCache(model)
        p = model(ids).logits[0, -1]
        assert right[number] == (p[choices].argmax() == 0)
        assert top[number] == (p.argmax() == choices[0])
        assert answers.value_nats[number] == pytest.approx(-float(p[choices[0]]), abs=1e-3)
        model(ids, past_key_values=cache, logits_to_keep=1)
        if memory == "ltm":
            assert retrieved[number] == (choices[0] in [item["token"] for item in cache.retrieved()])
            assert stored[number] == (backbone(ids).logits[0, place - 1, choices[0]] / -math.log(2) > 15.65)
        else:
            assert not retrieved[number] and not stored[number]
    assert memory != "ltm" or (0 < right.sum() < len(asked) and 0 < stored.sum() < len(asked))


@torch.no_grad()
def test_a_tie_gives_the_right_value_no_advantage(tokenizer):
    """A model that finds all words equally likely is right once in eight, not always: bfloat16 makes ties common."""
    model = tiny(memory_enabled=False)
    model.backbone.embed.weight.zero_()
    asked = evaluation.questions([text_of(100, np.random.default_rng(3))], tokenizer, "pair", 20, 8, SMALL)
    right = evaluation.answer([model], asked, WIDTH, SMALL)[0].outcomes[0]
    assert right.tolist() == [bool(question.choices[0] == min(question.choices)) for question in asked]


def test_dialogues_are_what_they_say(tokenizer):
    """Facts in the first turn, none in the second, the question for one of them at the end of the third."""
    texts = [np.concatenate(([EOT], np.random.default_rng(i).integers(10, 26, 400))) for i in range(3)]
    words = set(evaluation.single_words(tokenizer).tolist()) - set(tokenizer.encode(" The code of is"))
    settings = dataclasses.replace(evaluation.FULL, dialogues=9)
    made = evaluation.make_dialogues(texts, tokenizer, settings)
    assert made.turns.shape == (9, 3, 100) and made.choices.shape == (9, 8)
    asked_first = 0
    for number, ((first, second, third), choices) in enumerate(zip(made.turns, made.choices)):
        form = evaluation.form_of(tokenizer, settings.forms[number % 3])
        planted = [token for token in first if token in words]
        facts = dict(zip(planted[::2], planted[1::2]))
        assert first[0] == EOT and EOT not in second and set(choices.tolist()) == set(facts.values())
        assert not words & set(second.tolist())
        key, = (token for token in third if token in words)
        assert facts[key] == choices[0] and third[-form.asked:].tolist() == form.fact(key, 0)[:form.asked]
        asked_first += planted[0] == key
    assert asked_first < 9
    assert evaluation.make_dialogues([texts[0][:300]], tokenizer, settings) is None


@pytest.mark.parametrize("hops", [0, 1, 2, 4])
def test_needles_and_chains_are_what_they_say(tokenizer, hops):
    """All facts at the beginning, no word of one after it but in the question, whose answer follows from them."""
    line = np.random.default_rng(0).integers(10, 26, 1_200)
    made = evaluation.make_streamed(line, tokenizer, 512, hops, 128, evaluation.FULL)
    asked = evaluation.FULL.streamed
    assert made.turns.shape == (asked, 4, 128) and made.choices.shape == (asked, 8)
    words = set(evaluation.single_words(tokenizer).tolist()) - set(tokenizer.encode(" The code of is From one comes to"))
    for number, (turns, choices) in enumerate(zip(made.turns, made.choices)):
        tokens = turns.reshape(-1).tolist()
        form = evaluation.form_of(tokenizer, evaluation.FULL.forms[number % 3])
        count = 8 * max(1, hops)
        told = tokens[:1 + evaluation.FULL.lead + count * form.size]
        planted = [token for token in told if token in words]
        facts = dict(zip(planted[::2], planted[1::2]))
        assert len(facts) == count and tokens[0] == EOT and EOT not in tokens[1:]
        word, = (token for token in tokens[len(told):] if token in words)
        for _ in range(max(1, hops)):
            word = facts[word]
        assert word == choices[0] and word not in facts and set(choices.tolist()) <= set(facts.values())
    assert evaluation.make_streamed(line, tokenizer, 2_048, hops, 128, evaluation.FULL) is None


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_turns_go_on_from_the_cache_or_begin_anew(tokenizer, memory):
    """Persistent: as the three turns in one text; ephemeral: as the third alone."""
    model, settings = tiny(bits=15.3, ltm_slots=64, **MEMORIES[memory]), dataclasses.replace(SMALL, dialogues=4)
    dialogues = evaluation.make_dialogues([text_of(300, np.random.default_rng(3))], tokenizer, settings)
    for persistent in (True, False):
        right, nats = evaluation.take_turns(model, dialogues, persistent, settings)
        for number, (turns, choices) in enumerate(zip(dialogues.turns, dialogues.choices)):
            text = turns.reshape(-1) if persistent else turns[2]
            p = model(torch.from_numpy(text)[None]).logits[0, -1]
            assert nats[number] == pytest.approx(-float(p[choices[0]]), abs=1e-3)
            assert right[number] == (p[choices].argmax() == 0)


def test_a_distance_without_text_is_left_out(tokenizer, capsys):
    """With a note that says how much is missing; what is left is asked as ever."""
    texts = [text_of(90, np.random.default_rng(0))]
    settings = dataclasses.replace(SMALL, distances=(20, 40, 100), distractors=(0, 1))
    distances, distractors = evaluation.room_for(texts, tokenizer, settings)
    assert distances == [20, 40] and list(distractors) == [0, 1]
    assert "100 tokens is left out" in capsys.readouterr().out
    for lacking, kept in ((1, [20]), (0, [20, 40])):
        needed = evaluation.text_needed(tokenizer, "pair", 40, 0, SMALL)
        found, _ = evaluation.room_for([np.arange(needed + 1 - lacking)], tokenizer, SMALL)
        assert found == kept and (f"{lacking} tokens too short" in capsys.readouterr().out) == bool(lacking)


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


def test_the_interval_of_the_speed():
    settings = dataclasses.replace(SMALL, bootstrap=500)
    for factor, verdict in ((0.8, "hurts"), (1.2, "helps"), (1.0, "inconclusive")):
        runs = np.array([100.0, 90, 110, 95, 105])
        speed = evaluation.summarise_speed(factor * runs + [1, -1, 1, -1, 0], runs, settings)
        low, high = speed["ratio_ci95"]
        assert low <= speed["ratio"] <= high and speed["ratio"] == pytest.approx(factor, abs=0.011)
        assert speed["verdict"] == verdict and speed["off_runs"] == runs.tolist()
    assert evaluation.summarise_speed(runs, [], settings) == {"median": 100.0, "runs": runs.tolist()}


def bootstrap(seeds=1, count=60, **gains):
    """paired_bootstrap of documents whose bits differ by the gain (seeds, documents) of each arm; an arm may have
    seeds of its own: (numbers of them, gain)."""
    draw = np.random.default_rng(7)
    characters = draw.integers(50, 500, count).astype(float)
    bits = np.tile(characters * draw.uniform(1, 3, count), (seeds, 1))
    every = tuple(range(seeds))
    own = {"baseline": (every, 0.0)} | {arm: gain if isinstance(gain, tuple) else (every, gain)
                                        for arm, gain in gains.items()}
    settings = dataclasses.replace(SMALL, bootstrap=500)
    found = evaluation.paired_bootstrap({arm: bits[list(numbers)] - gain for arm, (numbers, gain) in own.items()},
                                        {arm: numbers for arm, (numbers, _) in own.items()}, characters, settings)
    return found, bits, characters


def test_bootstrap_verdicts():
    noise = np.random.default_rng(0).normal(size=(1, 60))
    for gain, verdict in ((2 + noise, "helps"), (-2 + noise, "hurts"), (noise - noise.mean(), "inconclusive")):
        result, bits, characters = bootstrap(with_ltm=gain)
        arm = result["with_ltm"]
        assert arm["verdict"] == verdict
        low, high = arm["difference"]["ci95"]
        assert low < arm["difference"]["mean"] < high
        assert (low <= 0 <= high) == (arm["p"] > 0.05) and arm["p"] == arm["p_holm"] > 0
        assert arm["difference"]["mean"] == pytest.approx(-gain.sum() / characters.sum())
        assert result["baseline"]["per_seed"] == pytest.approx([bits.sum() / characters.sum()])
        assert arm["ratio"] == pytest.approx((bits - gain).sum() / bits.sum())
        # paired: documents differ far more from each other than the arms do
        spread = result["baseline"]["ci95"]
        assert spread[0] < result["baseline"]["per_seed"][0] < spread[1] and high - low < 0.3 * (spread[1] - spread[0])
        assert result == bootstrap(with_ltm=gain)[0]


def test_seeds_that_disagree_are_inconclusive():
    agree, disagree = np.array([[3.0], [2.0], [3.0]]), np.array([[3.0], [-2.0], [3.0]])
    assert bootstrap(3, with_ltm=agree)[0]["with_ltm"]["verdict"] == "helps"
    assert bootstrap(3, with_ltm=disagree)[0]["with_ltm"]["verdict"] == "inconclusive"
    assert len(bootstrap(3, with_ltm=agree)[0]["with_ltm"]["per_seed"]) == 3


def test_an_arm_is_the_same_beside_others():
    """By the same draws, whatever else is compared; only p_holm knows of the others."""
    noise = np.random.default_rng(0).normal(size=(2, 2, 60))
    alone = bootstrap(2, with_ltm=noise[0])[0]["with_ltm"]
    beside = bootstrap(2, with_ltm=noise[0], with_gru=5 + noise[1], with_mag=((1,), noise[1, :1]))[0]
    for name in ("per_seed", "ci95", "difference", "ratio", "p"):
        assert alone[name] == beside["with_ltm"][name]
    assert beside["with_ltm"]["p_holm"] >= alone["p"] and beside["with_gru"]["verdict"] == "helps"


def test_an_arm_of_one_seed_is_compared_on_that_seed():
    seeds = np.array([[1.0], [4.0]])
    found, bits, characters = bootstrap(2, with_ltm=np.zeros((2, 1)), with_gru=((1,), seeds[1:]))
    assert found["with_gru"]["per_seed"] == pytest.approx([(bits[1] - 4).sum() / characters.sum()])
    assert found["with_gru"]["difference"]["mean"] == pytest.approx(-4 * 60 / characters.sum())
    assert found["with_gru"]["ci95"] == pytest.approx(found["with_gru"]["ci95"]) and len(found) == 3


def test_the_bootstraps_p_is_that_of_its_interval():
    """Below 0.05 exactly where the middle 95% exclude zero; and of ties, as of a memory that does nothing, 1."""
    samples = np.sort(np.random.default_rng(0).normal(size=10_000))
    for shift in np.quantile(samples, (0.001, 0.02, 0.0249, 0.0251, 0.03, 0.5, 0.97, 0.9749, 0.9751, 0.999)):
        low, high = evaluation.interval(samples - shift)
        assert (evaluation.two_sided(samples - shift) < 0.05) == (low > 0 or high < 0)
    assert evaluation.two_sided(np.zeros(100)) == 1 and evaluation.two_sided(np.ones(99)) == 0.02


def test_holm():
    """Holm 1979, by hand: sorted, 4 x 0.01, 3 x 0.012, 2 x 0.03, 0.5, and never less than the one before."""
    p = {"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.012}
    assert evaluation.holm(p) == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.04})
    assert list(evaluation.holm(p)) == list(p) and evaluation.holm({"a": 0.03}) == {"a": 0.03}
    assert evaluation.holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0} and evaluation.holm({}) == {}


def test_one_of_several_arms_needs_a_clearer_difference():
    """What is just clear for one arm is not for one of several: Holm."""
    noise = np.random.default_rng(0).normal(size=(1, 60))
    just = noise - noise.mean() + 0.31 * noise.std() * 0.95
    alone = bootstrap(with_ltm=just)[0]["with_ltm"]
    others = {arm: np.random.default_rng(i).normal(size=(1, 60)) for i, arm in enumerate(list(stages.ARMS)[2:])}
    beside = bootstrap(with_ltm=just, **{arm: x - x.mean() for arm, x in others.items()})[0]["with_ltm"]
    assert alone["verdict"] == "helps" and 0.01 < alone["p"] < 0.05 and alone["p"] == beside["p"]
    assert beside["verdict"] == "inconclusive" and beside["p_holm"] == pytest.approx((len(others) + 1) * beside["p"])


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


def evidence_of(texts, costs, per_token, stored=None):
    """Evidence of arms that cost so many bits a target: {arm: (T,)}; `stored`: by the LTM."""
    exam = evaluation.Exam(SMALL, None, texts, None, per_token, {}, [], {}, None, {}, {})
    measured = {}
    for arm, bits in costs.items():
        log_p = (-math.log(2) * np.asarray(bits)).astype(np.float32)
        facts = {"window": WIDTH, "slots": 24, "threshold": 4.5}
        kept = np.zeros(len(log_p), bool) if stored is None else stored
        measured[arm, 0] = evaluation.Measured(facts, {"log_p": log_p, "stored": kept})
    return evaluation.Evidence(measured, dict.fromkeys(costs, (0,)), exam)


def targets_of_gain(evidence):
    return evaluation.targets_of_gain(evidence, evaluation.kinds_of_all(evidence))


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
    text = np.array([EOT, 7, *range(10, 9 + WIDTH), 7])
    saved = np.eye(WIDTH + 1)[-1]
    evidence = evidence_of([text], {"baseline": 1 + saved, "with_ltm": 1 + 0 * saved}, np.ones(EOT))
    targets = targets_of_gain(evidence)["last seen inside the window"]
    assert targets["share_of_tokens"] == 1 / (WIDTH + 1) and targets["share_of_gain"] == {"with_ltm": 1.0}
    assert targets["arms"] == pytest.approx({"baseline": 2.0, "with_ltm": 1.0})


def test_without_an_ltm_surprise_says_what_is_in_reach():
    """A token that the baseline found surprising and that comes again beyond the window."""
    text = np.array([EOT, 7, *range(10, 10 + WIDTH), 7])
    for bits, kind in ((5.0, "last seen beyond the window, in memory"), (4.0, "last seen beyond both")):
        costs = np.ones(len(text) - 1)
        costs[0] = bits
        targets = targets_of_gain(evidence_of([text], {"baseline": costs, "with_gru": costs}, np.ones(EOT)))
        assert targets[kind]["share_of_tokens"] == 1 / (len(text) - 1)


def test_a_memory_that_changes_nothing_is_a_result_too():
    """No gain to share out, and a part of the documents without a character: zeros, not NaN."""
    draw, per_token = np.random.default_rng(0), np.ones(EOT)
    texts = [text_of(100, draw)]
    texts[0][65:] = 7
    per_token[7] = 0
    evidence = evidence_of(texts, dict.fromkeys(ARMS, np.ones(99)), per_token)
    position = evaluation.position_of_bits(evidence)
    assert position["edges"] == [0, 64]
    assert position["arms"] == {arm: pytest.approx([1.0]) for arm in ARMS}
    targets = targets_of_gain(evidence)
    assert {part["share_of_gain"]["with_ltm"] for part in targets.values()} == {0.0}


def test_calibration_by_hand(tokenizer):
    """Four targets: new, new, seen, seen; the memory makes one dearer by 0.5 and one by 0.05 bits, and saves 3 bits."""
    text = np.array([EOT, 7, 8, 7, 8])
    costs = {"baseline": [8.0, 8.0, 8.0, 8.0], "with_ltm": [8.5, 8.0, 5.0, 8.05]}
    evidence = evidence_of([text, text], {arm: part * 2 for arm, part in costs.items()},
                           np.append(np.ones(EOT), 0))
    of_stm = np.array([8.0, 9.0, 8.0, 8.0] * 2)
    for key, one in evidence.measured.items():
        known = of_stm if key[0] == "with_ltm" else np.array(costs["baseline"] * 2)
        one.tensors["log_p_stm"] = (-math.log(2) * known).astype(np.float32)
        one.tensors.update(outcomes=np.zeros((4, 2), bool), value_nats=np.full(2, 1.0 + len(key[0])))
    question = evaluation.Question(text, text[1:], 2, 3)
    exam = evidence.exam._replace(asked={("pair", 40, 0): [question], ("pair", 99, 0): [question]},
                                  distances=[40, 99], settings=dataclasses.replace(SMALL, forms=("pair",)))
    evidence = evidence._replace(exam=exam)
    kinds = evaluation.kinds_of_all(evidence)
    part = evaluation.summarise_calibration(evidence, evaluation.Recall(evidence), kinds)["arms"]["with_ltm"]
    assert part["worse"] == 0.5 and part["much_worse"] == 0.25
    assert part["lost"] == pytest.approx(0.55 / 4, abs=1e-5) and part["saved"] == pytest.approx(3 / 4)
    new, seen, *nothing = part["by_kind"].values()
    assert new["mean"] == pytest.approx(0.25) and new["ci95"] == pytest.approx([0.25, 0.25])
    assert seen["mean"] == pytest.approx((-3 + 0.05) / 2) and nothing == [None, None]
    assert part["oracle"]["bpc"] == pytest.approx((8 + 8 + 5 + 8) / 4)
    assert part["oracle"]["ratio"] == pytest.approx(29 / 32)
    gap = (len("with_ltm") - len("baseline")) / math.log(2)
    assert part["evicted"] == {"distances": [99], "bits_above": [pytest.approx(gap)], "forced_choice": [0.0]}


# ------------------------------------------------------------------ controls


def texts_of(*lengths):
    draw = np.random.default_rng(4)
    return [text_of(length, draw) for length in lengths]


def bits_of(model, texts):
    """Bits of all targets of the texts, and the Tally they are from."""
    tally = evaluation.score_text(model, texts, WIDTH, SMALL)
    return evaluation.bits(np.concatenate(tally.log_p)), tally


def test_an_altered_model_is_another_one_of_the_same_weights():
    model, texts = tiny(), texts_of(90, 20)
    twin = evaluation.altered(model, ltm_slots=5)
    weights = dict(twin.named_parameters())
    assert weights and all(x.data_ptr() == weights[name].data_ptr() for name, x in model.named_parameters())
    assert model.config.ltm_slots == 24 and twin.memory.config.ltm_slots == twin.config.ltm_slots == 5
    assert (bits_of(evaluation.altered(model), texts)[0] == bits_of(model, texts)[0]).all()
    assert evaluation.altered(twin).float().backbone.embed.weight.dtype == torch.float32


def test_each_control_is_what_its_name_says():
    """A second way to each: other settings or other weights of a model that is made afresh."""
    much = dict(ltm_plausibility=0.0, ltm_sharpness=5.0)            # for what the learned addresses find to matter
    phrases = np.random.default_rng(0).integers(0, 5_000, (2, 12))
    model, texts = tiny(**much), [np.concatenate(([EOT], np.tile(phrase, 9))) for phrase in phrases] + texts_of(20)

    def afresh(trust=0.0, **settings):
        """The model with these settings, and with log weights that are so much higher."""
        twin = tiny(**(much | settings))
        found = twin.memory.vectors
        twin.memory.vectors = lambda *given: (one := found(*given))._replace(trust=one.trust + trust)
        return twin
    exact, no_words = torch.tensor([-100.0] * 3 + [0.0] * 4), dict(ltm_same=0.0, ltm_near=0.0)
    with torch.no_grad():
        expected = {
            "as trained": afresh(), "reads off": afresh(memory_enabled=False), "every token": afresh(bits=-9.0),
            "none": afresh(ltm_cosine=-2), "0.5": afresh(ltm_cosine=0.5), "0.95": afresh(ltm_cosine=0.95),
            "0.8 (as trained)": afresh(), "15.6 (as trained)": afresh(), "24 (as trained)": afresh(),
            "2": afresh(bits=2), "8": afresh(bits=8), "16": afresh(ltm_slots=16), "1024": afresh(ltm_slots=1024),
            "exact ones only": afresh(ltm_cosine=2, **no_words),
            "learned ones only": afresh(exact, **no_words), "no rare words": afresh(**no_words),
            "rare words in their place only": afresh(ltm_near=0.0)}
        for twin in (model, *expected.values()):    # cosines of all sizes
            twin.memory.from_state.weight[twin.memory.width:] *= 0.2                 # what reads the token filed
    found = {name: bits_of(twin, texts)[0] for _, name, twin in evaluation.memory_controls(model, 0.5)}
    for name, twin in expected.items():
        assert np.allclose(found[name], bits_of(twin, texts)[0], atol=1e-4), name
    assert len({round(float(found[name].sum()), 3) for name in (
        "as trained", "reads off", "values shuffled", "random tokens, same rate", "every token", "none", "0.9",
        "exact ones only", "learned ones only", "no rare words", "rare words in their place only", "16")}) == 12
    assert list(found) == list(dict.fromkeys(name for _, name, _ in evaluation.memory_controls(model, 0.5)))


def test_random_tokens_at_the_rate_asked_for():
    model, texts = tiny(), texts_of(300, 300)

    def random(rate):
        memory = evaluation.functools.partial(evaluation.RandomTokens, rate=rate)
        return bits_of(evaluation.altered(model, memory), texts)

    nothing, some, same, everything = (np.concatenate(random(rate)[1].stored) for rate in (0, 0.4, 0.4, 1))
    assert not nothing.any() and everything.all() and abs(some.mean() - 0.4) < 0.1 and (some == same).all()
    assert (random(1)[0] == bits_of(evaluation.altered(model, ltm_surprisal_bits=-1), texts)[0]).all()


def test_shuffled_values_stay_in_their_sequence():
    memory = evaluation.altered(tiny(ltm_slots=200), evaluation.ShuffledValues).memory
    draw = torch.Generator().manual_seed(0)
    targets = torch.arange(6 * WIDTH).view(6, WIDTH)
    stored, opens = torch.rand(6, WIDTH, generator=draw) < 0.5, torch.tensor([[1, 0, 1], [1, 0, 1]]).bool()
    address = models.Address(*[targets] * len(models.Address._fields))
    items, values, *numbers = memory.candidates(address, targets, stored, opens)
    age = memory.ages(*numbers)
    visible = memory.visible(age)
    assert torch.equal(values, memory.candidates(address, targets, stored, opens)[1])
    for last, (first, past) in {1: (0, 2), 2: (2, 3), 4: (3, 5), 5: (5, 6)}.items():
        seen = visible[last, -1]
        kept = targets[first:past][stored[first:past]][:int(seen.sum())]
        assert items.key[last][seen].tolist() == kept.tolist()                  # where they are filed
        mixed, own = values[last][seen].tolist(), targets[first:past][stored[first:past]].tolist()
        assert set(mixed) <= set(own) and len(set(mixed)) == len(mixed) >= len(own) - 1 and mixed != kept.tolist()


@torch.no_grad()
def test_a_wiped_memory_knows_nothing_of_before_the_question(tokenizer):
    """As a cache whose items are dropped where the question begins."""
    model, texts = tiny(bits=15.3, ltm_slots=64), texts_of(100)
    asked = asked_of(texts, tokenizer)
    before, wiped = (evaluation.answer([model], asked, WIDTH, SMALL, wiped=wiped)[0].outcomes
                     for wiped in (False, True))
    assert before[2:].any(1).all() and not wiped[2:].any()
    for number, (tokens, choices, _, begin) in enumerate(asked):
        cache, ids = RevenaCache(model), torch.from_numpy(tokens)[None]
        model(ids[:, :begin], past_key_values=cache)
        cache.state["count"].zero_()
        p = model(ids[:, begin:], past_key_values=cache).logits[0, -1]
        assert wiped[0, number] == (p[choices].argmax() == 0) and wiped[1, number] == (p.argmax() == choices[0])


def test_variants_answer_as_each_alone(tokenizer):
    model = tiny(bits=15.3, ltm_slots=64)
    asked = evaluation.questions(texts_of(100), tokenizer, "pair", 40, 5, SMALL)
    variants = [model, evaluation.altered(model, ltm_slots=4), evaluation.altered(model, ltm_surprisal_bits=99)]
    together = [answers.outcomes for answers in evaluation.answer(variants, asked, WIDTH, SMALL)]
    for variant, outcomes in zip(variants, together):
        assert (evaluation.answer([variant], asked, WIDTH, SMALL)[0].outcomes == outcomes).all()
    assert not (together[0] == together[1]).all() and not together[2][2:].any()


@torch.no_grad()
@pytest.mark.parametrize("slots", [7, 24, 100])
def test_the_neural_cache_is_that_of_its_paper(slots):
    """Grave et al. 2017, equations 2 to 4, token by token in float64."""
    baseline, (text,), theta, share = tiny(memory_enabled=False), texts_of(90), 0.4, 0.3
    cache = evaluation.neural_cache(baseline, slots, theta, share)
    rows, opens = torch.from_numpy(np.pad(text, (0, 6), constant_values=EOT)).view(3, WIDTH), torch.eye(3)[:1].bool()
    h = baseline.states(rows, opens)[0].flatten(0, 1).double()
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


def test_the_neural_cache_is_fitted():
    """No neighbouring theta or share is better; texts that repeat themselves make much of it."""
    baseline = tiny(memory_enabled=False)
    texts = [np.concatenate(([EOT], np.tile(np.random.default_rng(i).integers(0, 5_000, 20), 4))) for i in range(2)]
    fitted = evaluation.fit_cache(baseline, texts, 50, WIDTH, SMALL)
    theta, share = fitted.memory.theta, fitted.memory.share
    best = bits_of(fitted, texts)[0].sum()
    assert 0.1 < share < 0.9 and best < 0.8 * bits_of(baseline, texts)[0].sum()
    for changed in ((theta * 2 ** 0.5, share), (theta / 2 ** 0.5, share), (theta, share + 0.01), (theta, share - 0.01)):
        assert bits_of(evaluation.neural_cache(baseline, 50, *changed), texts)[0].sum() > best
    noise = evaluation.fit_cache(baseline, [np.arange(EOT, EOT - 60, -1)], 50, WIDTH, SMALL)   # nothing comes again
    assert noise.memory.share < 1e-6


def test_the_mixture_without_training_is_made_of_its_parts():
    """Without exact addresses and gate it is the neural cache; without a cache it counts what followed the same tokens,
    as much more as the entropy says; it sums to one."""
    baseline, (text,) = tiny(memory_enabled=False, bits=0.0), texts_of(90)
    nothing = (-math.inf,) * 3
    cache = evaluation.neural_cache(baseline, 24, 0.4, 0.3)
    mixed = evaluation.training_free(baseline, 24, evaluation.Scalars(nothing, math.log(0.3 / 0.7), 0.4, 0.0))
    assert np.allclose(bits_of(mixed, [text])[0], bits_of(cache, [text])[0], atol=1e-4)
    trust, slope = (-1.0, 0.5, 1.0), 0.05
    exact = evaluation.training_free(baseline, 24, evaluation.Scalars(trust, -math.inf, 0.0, slope))
    stm = torch.from_numpy(-math.log(2) * bits_of(baseline, [text])[0]).exp().numpy()
    rows = torch.from_numpy(np.pad(text, (0, 6), constant_values=EOT)).view(3, WIDTH)
    with torch.no_grad():
        log_p = baseline.logits(baseline.states(rows, torch.eye(3)[:1].bool())[0]).log_softmax(-1).flatten(0, 1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for t, cost in enumerate(bits_of(exact, [text])[0]):
        gained = total = 0.0
        for n in range(3):
            same = [i for i in range(max(0, t - 24), t) if i >= n and (text[i - n:i + 1] == text[t - n:t + 1]).all()]
            weight = math.exp(trust[n] + slope * entropy[t])
            gained += weight * sum(text[i + 1] == text[t + 1] for i in same)
            total += weight * len(same)
        assert cost == pytest.approx(-math.log2((stm[t] + gained) / (1 + total)), abs=2e-3), t
    for model in (mixed, exact):
        assert torch.allclose(model(torch.from_numpy(text)[None]).logits.exp().sum(-1), torch.ones(len(text)), atol=1e-4)


def test_the_mixture_is_fitted():
    """No neighbouring scalar is better, and it is at least as good as each of its parts."""
    baseline = tiny(memory_enabled=False)
    texts = [np.concatenate(([EOT], np.tile(np.random.default_rng(i).integers(0, 5_000, 20), 4))) for i in range(2)]
    fitted = evaluation.fit_mixture(baseline, texts, 50, WIDTH, SMALL)
    trust, *rest = fitted.memory.scalars
    best = bits_of(fitted, texts)[0].sum()
    for other in (evaluation.fit_cache(baseline, texts, 50, WIDTH, SMALL),
                  evaluation.fit_grams(baseline, texts, WIDTH, SMALL)[0]):
        assert best < bits_of(other, texts)[0].sum()
    flat = np.array([*trust, *rest])
    for place, step in itertools.product((0, 1, 2, 3, 5), (-0.3, 0.3)):
        moved = flat.copy()
        moved[place] += step if place < 5 else step / 10
        changed = evaluation.Scalars(tuple(moved[:3]), *moved[3:])
        assert bits_of(evaluation.training_free(baseline, 50, changed), texts)[0].sum() > best - 0.5


@torch.no_grad()
def test_exact_addresses_are_fitted_without_a_learned_part():
    """On texts that repeat themselves they pay, on others they weigh least; the learned weights play no part."""
    baseline = tiny(memory_enabled=False)
    before = {name: x.clone() for name, x in baseline.state_dict().items()}
    texts = [np.concatenate(([EOT], np.tile(np.random.default_rng(i).integers(0, 5_000, 20), 4))) for i in range(2)]
    fitted, trust = evaluation.fit_grams(baseline, texts, WIDTH, SMALL)
    best = bits_of(fitted, texts)[0].sum()
    assert best < 0.6 * bits_of(baseline, texts)[0].sum()
    assert all(torch.equal(x, before[name]) for name, x in baseline.state_dict().items())
    # after 7 comes another token each time
    never = [np.array([EOT, *[token for other in range(100, 130) for token in (7, other)]])]
    assert evaluation.fit_grams(baseline, never, WIDTH, SMALL)[1][0] == -7 < max(trust)
    torch.nn.init.normal_(baseline.memory.from_state.weight)
    torch.nn.init.normal_(baseline.memory.from_tokens.weight)
    assert bits_of(evaluation.fit_grams(baseline, texts, WIDTH, SMALL)[0], texts)[0].sum() == pytest.approx(best)


@torch.no_grad()
def test_full_attention_has_the_baselines_weights():
    baseline, texts = tiny(memory_enabled=False), texts_of(100, WIDTH)
    gpt = evaluation.altered(baseline, model_class=models.GPT, stm_window=None, n_positions=100)
    found = evaluation.score_text(gpt, texts, 100, dataclasses.replace(SMALL, pack=2, lane=1)).log_p
    for text, log_p in zip(texts, found):
        ids = torch.from_numpy(text)[None]
        expected = gpt(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        assert np.allclose(log_p, expected, atol=1e-4)
    long, short = evaluation.score_text(baseline, texts, WIDTH, SMALL).log_p
    assert np.allclose(short, found[1], atol=1e-4) and not np.allclose(long, found[0], atol=1e-4)


def test_what_is_measured_has_kernels_and_a_table_and_what_is_shown_has_not(monkeypatch):
    """.. which are of its bfloat16 weights; and the table says what is computed without it."""
    monkeypatch.setattr(evaluation, "has_compiler", lambda device: True)
    monkeypatch.setattr(models, "triton", object())
    model, off = (tiny(stm_window=16, n_embd=64, memory_enabled=enabled).bfloat16() for enabled in (True, False))
    before = model(torch.arange(1, 60)[None]).logits
    for one in (model, off):
        assert evaluation.made_fast(one).fused and all(block.fused for block in one.backbone.blocks)
    assert model.memory.of_each is not None and off.memory.of_each is None and model.memory.fused
    shown = evaluation.in_float32(model)
    assert shown.dtype == torch.float32 and model.dtype == torch.bfloat16 and shown.memory.of_each is None
    assert not any(getattr(part, "fused", False) for part in shown.modules())
    assert evaluation.altered(model, ltm_slots=4).memory.fused
    for part in model.modules():                            # what remains is the table
        if hasattr(part, "fused"):
            part.fused = False
    assert torch.equal(model(torch.arange(1, 60)[None]).logits, before)


def test_a_graph_is_compiled_once_for_all_models_of_a_kind(monkeypatch):
    """20 seconds each on a GPU; here with a backend that only counts: states, log_p and score_states once for baseline
    and LTM of all seeds, and states once more for the toy, whose own they are."""
    from torch._dynamo.testing import CompileCounter
    counters, compile = [], torch.compile

    def counting(function, options, dynamic):
        assert options["deterministic"], "how a kernel sums must not depend on how fast it was once"
        counters.append(CompileCounter())
        return compile(function, backend=counters[-1], dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(evaluation, "has_compiler", lambda device: True)
    evaluation.compiled_method.cache_clear()
    for count, memories in (([1, 1, 1], ("none", "ltm")), ([2, 1, 1], MEMORIES)):
        for seed in range(2):
            for memory in memories:
                tally = evaluation.score_text(tiny(seed, **MEMORIES[memory]), texts_of(90, 30, 20), WIDTH, SMALL)
                assert np.isfinite(np.concatenate(tally.log_p)).all()
        assert [counter.frame_count for counter in counters] == count
    evaluation.compiled_method.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a graph of a CUDA device")
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_gpu_replays_what_it_scores(memory):
    """Of the second pack on; and of another model, other shapes or other settings not what was recorded before."""
    draw = np.random.default_rng(1)
    texts = [text_of(length, draw) for length in (90, 60, 30, 90, 70, 90)]
    settings = dict(n_embd=64, ltm_slots=WIDTH, **MEMORIES[memory])
    first, second = (evaluation.made_fast(tiny(seed, **settings).cuda()) for seed in range(2))
    evaluation.replay_of.cache_clear()

    def same(model, pack_rows):
        ready = list(evaluation.packs(texts, WIDTH, model.device, dataclasses.replace(SMALL, pack=pack_rows)))
        assert len(ready) > 1 and all(pack.usual for pack in ready)
        with torch.no_grad():
            ours = [evaluation.score(pack, model)[0] for pack in 2 * ready]
            plain = [evaluation.scores_by_parts(pack, model)[0] for pack in 2 * ready]
        for one, other in zip(ours, plain):
            for x, y in zip(one[:5], other[:5]):
                assert torch.equal(x, y)
        return ours[0].log_p

    before = same(first, 6)
    assert not torch.equal(same(second, 6), before)
    before = same(second, 9)
    assert evaluation.replay_of.cache_info().misses == 3
    if memory == "ltm":
        second.config.ltm_surprisal_bits = 2.0
        assert not torch.equal(same(second, 9), before) and evaluation.replay_of.cache_info().misses == 3
    evaluation.replay_of.cache_clear()


# ------------------------------------------------------------------ one memory at work


def test_pieces_join_to_the_text(tokenizer):
    text = "caf\u00e9 \u4f60\u597d\n\n\u201cmemory\u201d \U0001f600 \u00a0end"
    tokens = tokenizer.encode(text)
    words = evaluation.pieces(tokenizer, tokens)
    assert "".join(words) == text and len(words) == len(tokens) and "" in words


def test_documents_explored_are_those_of_most_tokens():
    draw = np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (10, 90, 60, 52, 40, 70, 51)]
    settings = dataclasses.replace(SMALL, explored=3, seen=50)
    assert evaluation.explored_documents(texts, settings) == [1, 2, 3]      # of equals the first
    assert evaluation.explored_documents(texts, dataclasses.replace(settings, seen=80)) == [1, 2, 5]
    assert evaluation.explored_documents(texts[:2], settings) == [0, 1]


def test_what_is_explored_of_an_ltm_is_what_it_does(tokenizer):
    """Against the streaming form: the items that a prediction drew on, in their order, and all costs."""
    model, text = tiny(seed=3, bits=15.2), text_of(110, np.random.default_rng(1))
    shown = evaluation.explored_text(model, text, tokenizer, SMALL)
    ids, cache = torch.from_numpy(text[None]), model.new_cache()
    items, shares = shown["items"].split(";"), shown["share"].split()
    drew = 0
    for at in range(len(text) - 1):
        with torch.no_grad():
            log_p = model(ids[:, at:at + 1], past_key_values=cache).logits[0, -1, text[at + 1]].item()
        found = cache.retrieved()
        assert float(shown["bits"].split()[at]) == pytest.approx(-log_p / math.log(2), abs=1e-3)
        assert float(shares[at]) == pytest.approx(sum(item["share"] for item in found), abs=1e-3)
        by_place = {item["position"] - 1: item for item in found}
        for said in items[at].split():
            place, share, cosine = said.split(",")
            assert float(share) == pytest.approx(by_place[int(place)]["share"], abs=1e-3)
            near = 1.0 if cosine in ("exact", "word") else float(cosine)
            assert near == pytest.approx(by_place[int(place)]["cosine"], abs=1e-3)
            drew += 1
    assert drew > 20 and "exact" in shown["items"] and "word" in shown["items"]
    off, _ = bits_of(evaluation.memory_off(model), [text])
    assert list(map(float, shown["bits_off"].split())) == pytest.approx(off.tolist(), abs=1e-3)
    stored = [place for place, flag in enumerate(shown["stored"][:-1]) if flag == "1"]
    assert stored[-24:] == [item["position"] - 1 for item in cache.contents()]


def test_numbers_are_brief_and_ranges_join():
    assert evaluation.numbers_of([0.0, 12.3456, 3.0, 0.5, -0.0001]) == "0 12.346 3 0.5 0"
    assert evaluation.ranges_of([0, 1, 2, 5, 7, 8]) == "0-2 5-5 7-8" and evaluation.ranges_of([]) == ""


@torch.no_grad()
def test_what_is_observed_is_what_a_memory_does(tokenizer):
    """Token by token in the streaming form; the first document of those with something to see in them."""
    settings = dataclasses.replace(SMALL, shown=90)
    model, draw = tiny(ltm_slots=60), np.random.default_rng(5)
    again = draw.permutation(np.arange(1000, 1040))                 # no word twice within a window, then all again
    texts = [draw.integers(0, 5_000, 95), draw.integers(0, 5_000, 20), np.tile(again, 3), np.tile(again[::-1], 3)]
    texts = [np.concatenate(([EOT], text)) for text in texts]
    tally = evaluation.score_text(model, texts, WIDTH, SMALL)
    seen = evaluation.observe(model, texts, tally, tokenizer, settings)
    assert json.loads(json.dumps(seen)) == seen
    assert (seen["document"], seen["window"], seen["threshold"], len(seen["tokens"])) == (2, WIDTH, 15.6, 90)
    text, cache = texts[2], RevenaCache(model)
    assert "".join(token["text"] for token in seen["tokens"]) == tokenizer.decode(text[1:91])
    reads = {read["at"]: read["from"] for read in seen["reads"]}
    assert list(reads) == sorted(reads) and len(reads) == len({text[at + 1] for at in reads}) == settings.reads
    for at, token in enumerate(seen["tokens"]):
        p = model(torch.tensor([[text[at]]]), past_key_values=cache).logits[0, -1]
        assert token["bits_mixture"] == pytest.approx(-float(p[text[at + 1]]) / math.log(2), abs=1e-3)
        assert token["bits"] == pytest.approx(evaluation.bits(tally.log_p_stm[2])[at], abs=1e-3)
        assert token["stored"] == bool(tally.stored[2][at])
        if at in reads:
            found = [item for item in cache.retrieved() if item["token"] == text[at + 1]][:settings.sources]
            assert [source["at"] + 1 for source in reads[at]] == [item["position"] for item in found]
            for name in ("share", "cosine"):
                assert [source[name] for source in reads[at]] == pytest.approx([item[name] for item in found], abs=1e-4)
            assert at + 1 - found[0]["position"] > WIDTH and token["bits_mixture"] < token["bits"]
            assert all(seen["tokens"][source["at"]]["stored"] for source in reads[at])
    # nothing to see: still a picture, without reads
    tally = evaluation.score_text(model, texts[1:2], WIDTH, SMALL)
    assert evaluation.observe(model, texts[1:2], tally, tokenizer, settings)["reads"] == []


# ------------------------------------------------------------------ trained arms


SETTINGS = dict(steps=8, batch=2, chained=0.0)
MARK = 2.0 ** -20


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer_dir):
    """A root with data (rows of 32 tokens, two validation documents) and both arms of two seeds, at step 8 of 8."""
    words = ["the", "of", "and", "caf\u00e9", "in", "surprise", "memory", "\u4f60\u597d", "angle", "eleven"]
    root = prepared(tmp_path_factory.mktemp("source"), tokenizer_dir, words, 180, 20, WIDTH)
    for seed in (0, 1):
        for arm in ARMS:
            train_arm(root, arm, seed)
    return root


def train_arm(root, arm, seed=0, **settings):
    """An arm as train.py leaves it."""
    run, model = run_of(root, arm, seed, **settings), tiny(seed)
    if arm == TOY:
        model = tiny(seed, memory="toy")
    model.config.memory_enabled = arm != "baseline"
    run.begin(model, load_tokenizer(root))
    for step in (4, 8):
        save(run, model, step)


def run_of(root, arm, seed=0, **settings):
    """train.py's own keeper of an arm's folder."""
    data = load_split(root, "train")[1]["splits"]["train"]["sha256"]
    settings = dict(arm=arm, seed=seed, data=data, init=f"init of seed {seed}", **{**SETTINGS, **settings})
    folder = stages.arm_folder(root, seed, arm)
    folder.mkdir(parents=True, exist_ok=True)
    return train.Run(folder, settings, 2, MADE_BY)


def marked(model, weights=None):
    """What tells a checkpoint from another, of a model or its tensors by name: a row that fills a matrix up."""
    weights = model.state_dict() if weights is None else weights
    own = weights.get("memory.from_state.weight")
    return weights["backbone.blocks.0.out.weight"][0] if own is None else own[model.memory.width - 1]


def save(run, model, step, value=None):
    """Save a checkpoint; a parameter tells which (or is `value`), by too little to change a thing."""
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    marked(model, weights).fill_(step * MARK if value is None else value)
    run.save(SimpleNamespace(done=step, weights=lambda: weights, state=lambda: {"statistics": torch.zeros(step, 6)}))


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root", ignore=shutil.ignore_patterns("tokenizer*.json"))


@pytest.fixture
def one_seed(source, tmp_path):
    return shutil.copytree(source, tmp_path / "root", ignore=shutil.ignore_patterns("tokenizer*.json", "seed1"))


@pytest.fixture(scope="module")
def evaluated(source, once):
    """(root, results, what was printed) of one evaluation of both seeds; for all that only read."""
    def make(folder):
        root, said = shutil.copytree(source, folder / "root"), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(evaluation, "FULL", SMALL)
            evaluation.main(["--root", str(root), "--controls"])
        (folder / "said").write_text(said.getvalue())
    folder = once("evaluated", make)
    return folder / "root", json.loads((folder / "root/results.json").read_text()), (folder / "said").read_text()


@torch.no_grad()
def test_bits_per_character_are_those_of_the_texts(evaluated, tokenizer):
    """Each val document by itself, as text: -log2 p of its tokens by model.forward, over len(text)."""
    root, results, _ = evaluated
    texts = [json.loads(line)["text"] for line in (root / "corpus.jsonl").read_text().splitlines()]
    rows, _ = load_split(root, "val")
    held_out = [tokenizer.decode(document[1:]) for document in stages.documents(rows)]
    assert len(held_out) == 2 and set(held_out) < set(texts)
    detail = results["detail"]
    assert detail["data"]["val_documents"] == 2 and detail["data"]["val_characters"] == sum(map(len, held_out))
    for arm in ARMS:
        per_seed = []
        for seed in (0, 1):
            model, bits = stages.load_model(stages.arm_folder(root, seed, arm)), 0.0
            assert model.config.memory_enabled == (arm == "with_ltm")
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
    assert detail["run"]["trained_by"] == MADE_BY and detail["run"]["device"] == "cpu"
    assert detail["run"]["settings"] == {**SETTINGS, "data": detail["run"]["settings"]["data"]}
    assert detail["data"]["part"] == "all" and len(detail["run"]["settings_sha256"]) == 64
    for arm in ARMS:
        about = detail["arms"][arm]
        model = stages.load_model(root / "trained" / arm)
        assert about["label"] == stages.ARMS[arm].label
        assert about["parameters"] - about["memory_parameters"] == sum(p.numel() for p in model.backbone.parameters())
        for seed, entry in enumerate(about["checkpoints"]):
            assert entry["seed"] == seed and entry["step"] == 8 and entry["measured_on"] == "cpu"
            assert entry["sha256"] == sha256(root / entry["folder"] / "model.safetensors")
            assert entry["trained_by"] == [MADE_BY]
            assert entry["config_sha256"] == sha256(root / entry["folder"] / "config.json")
        assert f"{results[arm]['bpc']:.4f}" in said and arm in said
    ltm = model.memory
    assert about["memory_parameters"] == sum(p.numel() for p in ltm.parameters())
    assert about["state_bytes"] == sum(x.nbytes for x in ltm.empty(1, "cpu").values())
    assert about["hit_means"] == ltm.hit_means and about["settings"]["ltm_slots"] == 24
    assert detail["arms"]["baseline"].items() >= {"memory_parameters": 0, "state_bytes": 0, "hit_means": ""}.items()
    assert "python plot_eval.py" in said and "2 documents" in said


def test_recall_in_the_results(evaluated):
    _, results, _ = evaluated
    recall = results["detail"]["recall"]
    assert recall["chance"] == 0.125 and recall["window"] == WIDTH and recall["distances"] == [20, 40]
    assert recall["trials_per_distance"] == 2 and len(recall["arms"]["with_ltm"]["mcnemar_p"]) == 2
    for arm in ARMS:
        part, far = recall["arms"][arm], recall["long_range"]["arms"][arm]
        for name in ("forced_choice", "top1", "stored", "retrieved"):
            assert [low <= share <= high for share, (low, high) in zip(part[name], part[f"{name}_ci95"])] == [True] * 2
        for name, whole in (("by_format", "forced_choice"), ("top1_by_format", "top1")):
            assert np.mean([part[name][form] for form in SMALL.forms], 0) == pytest.approx(part[whole])
        # the one distance beyond the window is the second of the curve
        assert results[arm]["long_range_recall"] == far["mean"] == part["forced_choice"][1]
        assert far["ci95"] == part["forced_choice_ci95"][1] and far["top1"] == part["top1"][1]
        assert far["value_nats"] == part["value_nats"][1] > 0
        assert len(far["per_seed"]) == 2 and np.mean(far["per_seed"]) == pytest.approx(far["mean"])
    far = recall["long_range"]["arms"]["with_ltm"]
    assert far["mcnemar_p"] == far["p_holm"] == recall["arms"]["with_ltm"]["mcnemar_p"][1]
    low, high = far["difference"]["ci95"]
    assert low <= far["difference"]["mean"] <= high and far["verdict"] in VERDICTS
    assert [row["facts"] for row in recall["distractors"]] == [0, 9]
    for row in recall["distractors"]:
        assert row["distance"] == ({"pair": 40, "sentence": 56} if row["facts"] == 0 else {"pair": 51, "sentence": 119})
        for arm in ARMS:
            low, high = row["arms"][arm]["ci95"]
            assert low <= row["arms"][arm]["forced_choice"] <= high
            assert {"top1", "stored", "retrieved", "retrieved_of_answered"} < row["arms"][arm].keys()


VERDICTS = ("helps", "hurts", "inconclusive")


def test_indirect_recall_in_the_results(evaluated):
    """Every arm, kind and distance; the diagonal of the matrix is verbatim recall, what is off it the kind "format"."""
    _, results, said = evaluated
    indirect = results["detail"]["indirect"]
    assert indirect["distances"] == indirect["long_range"] == [40] and indirect["chance"] == 0.125
    for arm in ARMS:
        part = indirect["arms"][arm]
        assert list(part) == ["verbatim", *evaluation.INDIRECT, "matrix"]
        for kind in ("verbatim", *evaluation.INDIRECT):
            low, high = part[kind]["forced_choice_ci95"][0]
            assert low <= part[kind]["forced_choice"][0] <= high and part[kind]["value_nats"][0] > 0
            assert part[kind]["long_range"]["top1"] == part[kind]["top1"][0] and kind in said
        matrix = np.array([list(row.values()) for row in part["matrix"].values()])
        assert np.diag(matrix).mean() == pytest.approx(part["verbatim"]["forced_choice"][0])
        assert matrix[~np.eye(2, dtype=bool)].mean() == pytest.approx(part["format"]["forced_choice"][0])
    assert list(results["detail"]["calibration"]["arms"]) == ["with_ltm"] and "an oracle for a gate" in said
    assert results["detail"]["recall"]["what"].startswith("verbatim")


def test_the_rest_of_the_results(evaluated):
    _, results, _ = evaluated
    detail = results["detail"]
    assert detail["memory"]["window"] == WIDTH and len(detail["memory"]["tokens"]) == 50
    targets = detail["targets"]
    assert sum(part["share_of_tokens"] for part in targets.values()) == pytest.approx(1)
    assert sum(part["share_of_gain"]["with_ltm"] for part in targets.values()) == pytest.approx(1)
    for arm in ARMS:
        total = sum(part["share_of_tokens"] * part["arms"][arm] for part in targets.values())
        total *= detail["data"]["val_tokens"]
        assert total == pytest.approx(results[arm]["bpc"] * detail["data"]["val_characters"])
        assert len(detail["position"]["arms"][arm]) == len(detail["position"]["edges"]) - 1
        assert len(detail["tokens_per_sec"][arm]["runs"]) == 2 * 2 and results[arm]["tokens_per_sec"] > 0   # two seeds
        assert detail["turns"][arm]["trials"] == SMALL.dialogues
        assert {"forced_choice", "value_nats"} < detail["turns"][arm]["ephemeral"].keys()
        for kind, numbers in (("needle", [160]), ("hops", [1, 2])):
            streamed = detail["streamed"][kind]
            assert streamed["at"] == numbers and streamed["trials"] == SMALL.streamed
            for (low, high), share in zip(streamed["arms"][arm]["ci95"], streamed["arms"][arm]["forced_choice"]):
                assert 0 <= low <= share <= high <= 1
        assert detail["training"][arm] == {"tokens_per_sec": None, "loss": None}      # no history.jsonl was written
    speed = detail["tokens_per_sec"]["with_ltm"]
    assert len(speed["off_runs"]) == 2 * 2 and speed["verdict"] in VERDICTS
    assert detail["tokens_per_sec"]["baseline"].keys() == {"median", "runs"}


def test_what_a_training_said(tmp_path):
    lines = [{"loss": 5.0, "tok/sec": 10.0}, {"loss": 4.0, "tok/sec": None}, {"loss": 3.0, "tok/sec": 30.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "history.jsonl").write_text(text + '{"loss": NaN, "tok/sec": 9}\n{"loss": 2')
    assert evaluation.summarise_training([tmp_path]) == {"tokens_per_sec": 20.0, "loss": 3.0}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "history.jsonl").write_text(json.dumps({"loss": 5.0, "tok/sec": 40.0}) + "\n")
    seeds = [tmp_path, tmp_path / "other", tmp_path / "gone"]
    assert evaluation.summarise_training(seeds) == {"tokens_per_sec": 30.0, "loss": 4.0}
    assert evaluation.summarise_training(seeds[2:]) == {"tokens_per_sec": None, "loss": None}


def test_rows_of_controls(evaluated):
    _, results, said = evaluated
    detail, rows = results["detail"], results["detail"]["controls"]
    assert all(list(row)[:3] == ["group", "name", "bpc_ratio"] and 0 <= row["recall"] <= 1 for row in rows)
    by_name = {row["name"]: row for row in rows}
    ratio = np.divide(*(detail["bpc"][arm]["per_seed"][0] for arm in ("with_ltm", "baseline")))
    groups = dict.fromkeys(row["group"] for row in rows)
    assert [row["group"] for row in rows] == sorted((row["group"] for row in rows), key=list(groups).index)
    trained = by_name["as trained"]
    assert trained["bpc_ratio"] == pytest.approx(ratio, abs=1e-6)
    assert trained["hit_rate"] == pytest.approx(detail["memory_hit_rate"]["with_ltm"]["per_seed"][0])
    assert trained["trials"] == 2 and trained["recall"] in (0, 0.5, 1)
    for name in ("0.8 (as trained)", "15.6 (as trained)", "24 (as trained)"):
        assert {**by_name[name], "group": "reads", "name": "as trained"} == trained
    wiped, gpt = by_name["memory wiped between fact and question"], by_name["GPT, full attention (trained at 32)"]
    assert wiped["bpc_ratio"] is None and rows[2] is wiped and gpt["stored"] == 0
    caches = [row for row in rows if row["name"].startswith("neural cache")]
    assert [row["stored"] for row in caches] == [1, 1] and all(0 <= row["share"] < 1 for row in caches)
    free = [row for row in rows if row["name"].startswith("six scalars")]
    assert len(free) == 2 and all(len(row["scalars"]["trust"]) == 3 for row in free)
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


def test_a_text_of_ones_own_is_explored(one_seed, evaluate, tmp_path, monkeypatch, tokenizer):
    """By all arms, from a file or from standard input; nothing is measured."""
    path = tmp_path / "mine.txt"
    path.write_text("A caf\u00e9 of my own,\nof my own.", encoding="utf-8")
    code, out, _ = evaluate(one_seed, "--explore", path)
    shown = json.loads((one_seed / "trained/explored.json").read_text())
    assert code == 0 and f"python plot_eval.py --root {one_seed}" in out
    assert shown["name"] == "mine.txt" and shown["text"] == path.read_text(encoding="utf-8")
    lengths = list(map(int, shown["lengths"].split()))
    assert sum(lengths) == len(shown["text"]) and list(shown["arms"]) == list(ARMS)
    for arm, its in shown["arms"].items():
        assert its["weights"] == sha256(one_seed / "trained" / arm / "model.safetensors")
        assert len(its["text"]["bits"].split()) == len(lengths)
    text = np.array([EOT, *tokenizer.encode(shown["text"])])
    expected, _ = bits_of(load(one_seed)[0].float(), [text])
    assert list(map(float, shown["arms"]["with_ltm"]["text"]["bits"].split())) == pytest.approx(
        expected.tolist(), abs=1e-3)
    monkeypatch.setattr("sys.stdin", io.StringIO(shown["text"]))
    assert evaluate(one_seed, "--explore", "-")[0] == 0
    again = json.loads((one_seed / "trained/explored.json").read_text())
    assert again["name"] == "standard input" and again["arms"] == shown["arms"]
    assert not list(one_seed.rglob("evaluation.safetensors"))


def test_a_text_that_cannot_be_explored_is_one_line(one_seed, evaluate, tmp_path):
    path = tmp_path / "mine.txt"
    assert refused(evaluate(one_seed, "--explore", path), "mine.txt", "run ")
    path.write_bytes(b"caf\xe9 \xff")
    assert refused(evaluate(one_seed, "--explore", path), "mine.txt is not UTF-8")
    path.write_text(" \n ")
    assert refused(evaluate(one_seed, "--explore", path), "there is no text in", "mine.txt")
    assert evaluate(one_seed, "--explore", path, "--controls")[0] == 2
    path.write_text("words of mine")
    shutil.rmtree(one_seed / "trained/with_ltm")
    assert refused(evaluate(one_seed, "--explore", path), "python train.py --with-ltm")
    assert not (one_seed / "trained/explored.json").exists()


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
    return evaluation.load_arm(0, arm, evaluation.Place(root, False, "cpu"))


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damaged_weights_give_way_to_the_newest_whole_checkpoint(one_seed, capsys, how):
    """Row 12."""
    root = one_seed
    folder = root / "trained" / "with_ltm"
    weights = folder / "model.safetensors"
    weights.unlink() if how == "gone" else damage(weights, how)
    for step in (8, 4):
        model, found = load(root)
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        assert (found.source, found.step, found.weights, found.config) == (
            checkpoint, step, sha256(checkpoint / "model.safetensors"), sha256(folder / "config.json"))
        assert (marked(model) == step * MARK).all() and found.settings["steps"] == 8
        said = capsys.readouterr().out
        assert str(weights) in said and str(checkpoint) in said and ("at step 4 of 8" in said) == (step == 4)
        assert ("is missing; using" in said) == (how == "gone")
        damage(checkpoint / "model.safetensors")
    with pytest.raises(StageError, match="no whole checkpoint is left; .* python train.py --with-ltm .* --fresh"):
        load(root)


def test_checkpoints_are_tried_newest_first_beyond_a_million_steps(one_seed):
    folder = one_seed / "trained" / "with_ltm"
    (folder / "checkpoints" / "step-000004").rename(folder / "checkpoints" / "step-1000004")
    damage(folder / "model.safetensors")
    assert load(one_seed)[1].step == 1_000_004


@pytest.mark.parametrize("manifest", ["", "{", "[1]", "{}", '{"weights": 3, "settings": {}}', '{"weights": {}}',
                                      '{"weights": {}, "settings": {"lr": 1e999}}'])
def test_a_damaged_manifest_is_one_line(one_seed, evaluate, manifest):
    (one_seed / "trained" / "baseline" / "manifest.json").write_text(manifest)
    assert refused(evaluate(one_seed), "baseline/manifest.json is damaged", "python train.py --baseline")


@pytest.mark.parametrize("change", [dict(ltm_cosine=0.7), dict(memory_enabled=False), dict(note="harmless"), None])
def test_a_config_that_was_changed_is_refused(one_seed, evaluate, change):
    """Settings of the memory belong to what was trained as the weights do."""
    path = one_seed / "trained" / "with_ltm" / "config.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert refused(evaluate(one_seed), str(path), "not the file its manifest names", "--with-ltm", "--fresh")


@pytest.mark.parametrize("made_by", [None, "a word", ["a word"]])
def test_who_trained_need_not_be_on_record_but_has_to_be_readable(one_seed, evaluate, made_by):
    """Manifests of before have no such entry."""
    path = one_seed / "trained" / "with_ltm" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"made_by": made_by}
    if made_by is None:
        del manifest["made_by"]
    path.write_text(json.dumps(manifest))
    if made_by:
        assert refused(evaluate(one_seed), "manifest.json is damaged", "--with-ltm", "--fresh")
    else:
        evaluation.main(["--root", str(one_seed)])
        about = json.loads((one_seed / "results.json").read_text())["detail"]["arms"]["with_ltm"]
        assert about["checkpoints"][0]["trained_by"] == []


def test_the_config_is_known_as_it_was_at_the_start(one_seed):
    """Not as a later save finds it."""
    path = one_seed / "trained" / "with_ltm" / "config.json"
    path.write_text(path.read_text().replace("0.8", "0.7"))
    save(run_of(one_seed, "with_ltm"), tiny(), 12)
    with pytest.raises(StageError, match="config.json is not the file its manifest names; put that back"):
        load(one_seed)
    path.unlink()
    with pytest.raises(StageError, match="config.json is missing; put that back"):
        load(one_seed)


@pytest.mark.parametrize("settings, says", [
    (dict(batch=4), ("with_ltm was trained differently", "(batch)", "train.py --baseline --steps 8 --root",
                     "--fresh && python train.py --with-ltm --steps 8 --root")),
    (dict(chained=1.0), ("with_ltm was trained differently", "(chained)", "train.py --with-ltm --steps 8 --root",
                         "--fresh")),
    (dict(init="another"), ("with_ltm was trained differently", "(initial weights)", "train.py --baseline", "--fresh")),
    (dict(data="another"), ("with_ltm was trained on other data", "--with-ltm", "--fresh"))])
def test_arms_that_differ_in_more_than_the_memory_are_refused(one_seed, evaluate, settings, says):
    path = one_seed / "trained" / "with_ltm" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] |= settings
    path.write_text(json.dumps(manifest))
    assert refused(evaluate(one_seed), *[word for word in says if word])


def test_seeds_trained_differently_are_refused(root, evaluate):
    for arm in ARMS:
        path = root / "trained" / "seed1" / arm / "manifest.json"
        path.write_text(path.read_text().replace('"batch": 2', '"batch": 4'))
    assert refused(evaluate(root), "seed1/baseline was trained differently from trained/baseline")


def test_seeds_of_other_models_are_refused(root, evaluate):
    """Of other slots or thresholds, say: add_memory.py was edited in between."""
    for arm in ARMS:
        path = root / "trained" / "seed1" / arm / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["settings"]["init_config"] = "another"
        path.write_text(json.dumps(manifest))
    assert refused(evaluate(root), "seed1/baseline was trained differently from trained/baseline (the model's config)",
                   "add_memory.py --root", "--seed 1", "train.py --baseline")


def test_arms_that_are_not_equally_far_are_refused(one_seed, evaluate):
    for path in one_seed.glob("trained/with_ltm/**/step-000008/model.safetensors"):
        damage(path)
    damage(one_seed / "trained" / "with_ltm" / "model.safetensors")
    code, out, err = evaluate(one_seed)
    assert refused((code, out, err), "step-000004 is at step 4, not at 8", "train.py --with-ltm", "--resume")
    assert "model.safetensors is not the file its manifest names" in out


def test_a_seed_without_a_pair_is_left_out(root):
    assert evaluation.trained_arms(root) == dict.fromkeys(ARMS, (0, 1))
    shutil.rmtree(root / "trained" / "seed1" / "baseline")
    (root / "trained" / "seeds").mkdir()
    assert evaluation.trained_arms(root) == dict.fromkeys(ARMS, (0,))
    shutil.rmtree(root / "trained")
    assert evaluation.trained_arms(root) == dict.fromkeys(ARMS, (0,))


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
        tally.log_p[0][0] = float("nan")
        return tally

    monkeypatch.setattr(evaluation, "score_text", spoilt)
    assert refused(evaluate(one_seed), "a metric", "NaN", "train.py --baseline", "--fresh")
    assert not list(one_seed.glob("trained/**/evaluation.safetensors"))


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
        model, found = load(one_seed)
        assert found.source == found.folder and (marked(model) == found.step * MARK).all()
        seen.append(found.step)

    def watched(function):
        def call(*arguments, **named):
            look()
            result = function(*arguments, **named)
            look()
            return result
        return call
    for owner, name in ((train.os, "replace"), (train.os, "link"), (train, "save_tensors"), (train.shutil, "rmtree"),
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
    model, found = load(one_seed)
    assert (marked(model) == found.step * MARK).all() and found.source == found.folder
    assert found.weights in json.loads((run.folder / "manifest.json").read_text())["weights"]
    assert "damaged" not in capsys.readouterr().out


# ------------------------------------------------------------------ which documents


def opened(root, **flags):
    """What open_documents makes of some flags."""
    args = SimpleNamespace(**dict(quick=False, report=False, on=None) | flags)
    return evaluation.open_documents(args, root)


def with_val(root, texts):
    """A root whose val.bin holds these texts."""
    data = rows_of(texts).tobytes()
    (root / "data" / "val.bin").write_bytes(data)
    path = root / "data" / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"]["val"] |= {"bytes": len(data), "sha256": sha256(root / "data" / "val.bin"), "documents": len(texts)}
    path.write_text(json.dumps(meta | {"sha256": stages.seal(meta)}))
    return root


def test_each_part_has_files_of_its_own(one_seed):
    draw = np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (50, 60, 70, 80, 90)]
    rows, _, settings, place = opened(with_val(one_seed, texts))
    assert [len(text) for text in stages.documents(rows)] == [50, 90] and settings.part == "choosing"
    assert place.file == "evaluation_choosing.safetensors" and place.flags == ""
    rows, _, settings, place = opened(one_seed, report=True)
    assert [len(text) for text in stages.documents(rows)] == [60, 70, 80] and settings.part == "reported"
    assert place.file == "evaluation.safetensors" and place.flags == " --report"
    for report in (False, True):                                    # too few for parts: all of them, and it is said
        rows, _, settings, place = opened(with_val(one_seed, texts[:3]), report=report)
        assert len(stages.documents(rows)) == 3 and settings.part == "all" and place.file == "evaluation.safetensors"


def test_own_documents_are_evaluated_beside_the_others(measured, small, capsys):
    """results_on_NAME.json; results.json and what was measured on val.bin stay as they are; the settings are the same."""
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    words = ["the", "of", "lamp", "river", "memory", "angle", "eleven"]
    texts = [" ".join(np.random.default_rng(seed).choice(words, 170)) for seed in range(3)]
    (measured / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "FULL", dataclasses.replace(prepare_data.FULL, window=WIDTH, stride=WIDTH // 2))
        prepare_data.main(["--root", str(measured), "--text", str(measured / "mine.jsonl"), "--into", "mine"])
    evaluation.main(["--root", str(measured), "--on", "mine"])
    results = json.loads((measured / "results_on_mine.json").read_text())
    assert list(results) == [*ARMS, "detail"] and results["detail"]["data"]["val_documents"] == 3
    said = capsys.readouterr().out
    assert "mine.jsonl" in results["detail"]["data"]["source"] and "data/mine.bin" in said
    assert f"next: read {measured / 'results_on_mine.json'}" in said.splitlines()[-1]
    assert results["baseline"]["bpc"] != json.loads((measured / "results.json").read_text())["baseline"]["bpc"]
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != ".lock")
    assert (measured / "trained/with_ltm/evaluation_on_mine.safetensors").is_file()


# ------------------------------------------------------------------ the study


@torch.no_grad()
def test_a_wider_window_is_scored_in_rows_of_its_own(tokenizer):
    """Documents and rows alone, as by model.forward; about as many tokens in a pack."""
    model, draw = tiny(stm_window=2 * WIDTH, memory_enabled=False), np.random.default_rng(0)
    texts = [text_of(length, draw) for length in (20, 70, 150)]
    exam = evidence_of(texts, {}, None).exam._replace(rows=rows_of(texts))
    width, settings = evaluation.rows_for(model, exam)
    assert width == 2 * WIDTH and (settings.pack, settings.lane) == (3, 1)
    assert evaluation.rows_for(tiny(), exam) == (WIDTH, SMALL)
    found = evaluation.score_text(model, texts, width, settings).log_p
    alone = evaluation.score_windows(model, exam.rows, settings, width)
    for sequences, scored in ((texts, found), (exam.rows[:4].astype(np.int64), alone)):
        for text, log_p in zip(sequences, scored):
            ids = torch.from_numpy(text)[None]
            expected = model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            assert np.allclose(log_p[text[1:] != EOT], expected[ids[0, 1:] != EOT], atol=1e-4)


def rows_over(base, memory, steps=(100, 200, 400)):
    """Rows of a study: bits of both arms at some steps."""
    both = [("baseline", "", base), ("with_ltm", "ltm", memory)]
    return [{"name": f"{arm}_x{number / 200:g}", "group": "steps", "memory": kind, "steps": number, "bpc": bits}
            for arm, kind, values in both for number, bits in zip(steps, values)]


def test_the_steps_at_which_the_baseline_has_the_ltms_bits():
    """Between two trainings, on a straight line over log steps; none where it is never so low."""
    curve = evaluation.curve_of(rows_over((2.0, 1.8, 1.6), (1.9, 1.7, 1.5)))
    assert curve["steps"] == [100, 200, 400] and curve["ratio"] == pytest.approx([0.95, 1.7 / 1.8, 1.5 / 1.6])
    assert curve["baseline_reaches"] == pytest.approx(200 * 2 ** 0.5)
    assert evaluation.curve_of(rows_over((2.0, 1.8, 1.6), (1.9, 1.5, 1.4)))["baseline_reaches"] is None
    assert evaluation.curve_of([])["steps"] == []


def test_the_study_is_a_row_a_training(one_seed, small, capsys, monkeypatch):
    """What is there of it, in the table's order, beside what is had without training; of another data or unfinished
    it is refused."""
    monkeypatch.setattr(evaluation.Controls, "training_free", lambda self: [])      # what it finds, --controls shows
    arms = {"baseline_x1": {}, "with_ltm_x1": {}, "window_512": dict(stm_window=2 * WIDTH)}
    for name, config in arms.items():
        more = dict(batch=1) if config else {}
        run, model = run_of(one_seed, name, lr=5e-4, **more), tiny(3, memory_enabled=name == "with_ltm_x1", **config)
        run.begin(model, load_tokenizer(one_seed))
        save(run, model, 8)
    evaluation.main(["--root", str(one_seed), "--study"])
    results, said = json.loads((one_seed / "results_study.json").read_text()), capsys.readouterr().out
    assert [row["name"] for row in results["rows"]] == list(arms) and "plot_eval.py --study" in said
    base, memory, window = results["rows"]
    assert (base["ratio"], base["window"], window["window"], memory["memory"]) == (1, WIDTH, 2 * WIDTH, "ltm")
    assert memory["ratio"] == pytest.approx(memory["bpc"] / base["bpc"]) != 1 and memory["verdict"] in VERDICTS
    assert base["recall_inside"]["mean"] in (0, 0.5, 1) and results["curve"]["baseline_reaches"] is None
    assert results["training_free"] == []
    assert not (one_seed / "results.json").exists() and results["detail"]["data"]["part"] == "all"
    path = one_seed / "trained/window_512/manifest.json"
    for change, words in ((("\"steps\": 8", "\"steps\": 9"), "is at step 8 of 9; go on with: .*--study window_512 .*--resume"),
                          (("\"data\": \"", "\"data\": \"other"), "was trained on other data"),
                          (("\"lr\": 0.0005", "\"lr\": 0.001"), "otherwise than baseline_x1 .lr.; .* --study window_512")):
        before = path.read_text()
        path.write_text(before.replace(*change))
        with pytest.raises(StageError, match=words):
            evaluation.main(["--root", str(one_seed), "--study"])
        path.write_text(before)


def test_without_its_baseline_there_is_no_study(one_seed, evaluate):
    assert refused(evaluate(one_seed, "--study"), "baseline_x1", "python train.py --study baseline_x1 --root")


# ------------------------------------------------------------------ an arm at a time


@pytest.fixture
def measured(evaluated, tmp_path):
    """A root whose arms of one seed are measured."""
    root, _, _ = evaluated
    return shutil.copytree(root, tmp_path / "root", ignore=shutil.ignore_patterns("tokenizer*.json", "seed1"))


@pytest.fixture
def again(small, capsys):
    """again(root): evaluate once more; (results, what was measured and why)."""
    def run(root, *flags):
        capsys.readouterr()
        evaluation.main(["--root", str(root), *flags])
        lines = capsys.readouterr().out.splitlines()
        results = json.loads((root / "results.json").read_text())
        return results, [line.removeprefix("measuring ") for line in lines if line.startswith("measuring ")]
    return run


@pytest.fixture
def as_before(measured, monkeypatch):
    """Measuring an arm again gives what it gave, at once: where the question is which arms are, and why."""
    known = [evaluation.read_measured(measured / "trained" / arm / "evaluation.safetensors") for arm in ARMS]

    def measure(model, exam, note=None):
        before = known[model.config.memory_enabled]
        return before.tensors, {name: before.facts[name] for name in ("observation", "exploration")}
    monkeypatch.setattr(evaluation, "measure", measure)


def without_commit(results):
    results["detail"]["run"].pop("commit")
    return results


def test_nothing_is_measured_twice(measured, again):
    """And the numbers are those of the files: nobody loads a model."""
    for path in measured.glob("trained/*/model.safetensors"):
        damage(path)
    first, reasons = again(measured, "--controls")
    assert reasons == [] and without_commit(first) == without_commit(again(measured, "--controls")[0])


def test_weights_may_be_elsewhere(measured, again):
    """The two files that are to be brought along are enough, and give the same results."""
    before, _ = again(measured)
    for arm in ARMS:
        folder = measured / "trained" / arm
        for path in list(folder.iterdir()):
            if path.name not in ("manifest.json", "evaluation.safetensors"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    after, reasons = again(measured)
    assert reasons == [] and without_commit(after) == without_commit(before)


def test_what_can_not_be_measured_again_is_refused(measured, evaluate, monkeypatch):
    shutil.rmtree(measured / "trained" / "with_ltm" / "checkpoints")
    (measured / "trained" / "with_ltm" / "model.safetensors").unlink()
    monkeypatch.setattr(evaluation, "FULL", dataclasses.replace(SMALL, lead=9))
    path = measured / "trained" / "baseline" / "evaluation.safetensors"
    shutil.rmtree(measured / "trained" / "baseline" / "checkpoints")
    (measured / "trained" / "baseline" / "model.safetensors").unlink()
    assert refused(evaluate(measured), str(path), "settings at the top of eval.py have changed", "no weights here",
                   "python eval.py --root")


def test_controls_need_the_weights(measured, evaluate):
    (measured / "trained" / "with_ltm" / "controls.json").unlink()
    shutil.rmtree(measured / "trained" / "with_ltm" / "checkpoints")
    (measured / "trained" / "with_ltm" / "model.safetensors").unlink()
    assert refused(evaluate(measured, "--controls"), "--controls needs them")


def retrain(root):
    save(run_of(root, "with_ltm"), tiny(5), 8)


def edit(change):
    """A change of with_ltm's evaluation.safetensors: of what it says of itself, sealed anew."""
    def make(root):
        path = root / "trained" / "with_ltm" / "evaluation.safetensors"
        known = evaluation.read_measured(path)
        facts = {name: value for name, value in known.facts.items() if name not in ("sha256", "tensors")}
        evaluation.write_measured(path, known._replace(facts=change(facts)))
    return make


def flip(root):
    damage(root / "trained" / "with_ltm" / "evaluation.safetensors")


def remove(root):
    (root / "trained" / "with_ltm" / "evaluation.safetensors").unlink()


@pytest.mark.parametrize("change, reason", [(remove, "not measured yet"), (retrain, "the weights have changed")])
def test_what_is_stale_is_measured_again(measured, again, change, reason):
    """That arm only, and it is said why."""
    only_with_ltm(measured, again, change, reason)


@pytest.mark.parametrize("change, reason", [
    (flip, "evaluation.safetensors is damaged"),
    (edit(lambda facts: facts | {"config": "another"}), "config.json has changed"),
    (edit(lambda facts: facts | {"training": {}}), "training with other settings"),
    (edit(lambda facts: facts | {"code": facts["code"] | {"models.py": "another"}}), "models.py changed since"),
    (edit(lambda facts: facts | {"data": facts["data"] | {"val": "another"}}), "validation data have changed"),
    (edit(lambda facts: facts | {"evaluation": facts["evaluation"] | {"lead": 9}}), "settings at the top of eval.py"),
    (edit(lambda facts: facts | {"arm": "baseline"}), "of another arm")])
def test_whatever_is_stale_of_it_an_arm_is_measured_again(measured, again, as_before, change, reason):
    only_with_ltm(measured, again, change, reason)


def only_with_ltm(measured, again, change, reason):
    """After a change that arm alone is measured, and it is said why; its numbers are others if its weights are."""
    before = json.loads((measured / "results.json").read_text())["detail"]
    change(measured)
    after, reasons = again(measured)
    assert len(reasons) == 1 and reasons[0].startswith("trained/with_ltm: ") and reason in reasons[0]
    of_first_seed = {arm: part["per_seed"][0] for arm, part in before["bpc"].items()}
    assert after["baseline"]["bpc"] == of_first_seed["baseline"]
    assert (after["with_ltm"]["bpc"] == of_first_seed["with_ltm"]) == (change is not retrain)


def test_other_settings_measure_all_again_but_for_those_of_the_tables(measured, again, as_before, monkeypatch):
    monkeypatch.setattr(evaluation, "FULL", dataclasses.replace(SMALL, bootstrap=100))
    assert again(measured)[1] == []
    monkeypatch.setattr(evaluation, "FULL", dataclasses.replace(SMALL, lead=9))
    assert [reason.partition(":")[0] for reason in again(measured)[1]] == ["trained/baseline", "trained/with_ltm"]


def test_a_further_memory_is_an_arm_like_any_other(measured, again, toy):
    """One more sibling in the results; the others are what they were but for Holm."""
    before, _ = again(measured)
    train_arm(measured, TOY)
    after, reasons = again(measured)
    assert reasons == [f"trained/{TOY}: not measured yet"]
    assert list(after) == [*ARMS, TOY, "detail"] and after[TOY].keys() == after["baseline"].keys()
    assert after["with_ltm"] == before["with_ltm"]
    detail = after["detail"]
    for part in (detail["arms"], detail["bpc"], detail["recall"]["arms"], detail["recall"]["long_range"]["arms"],
                 detail["turns"], detail["tokens_per_sec"], detail["memory_hit_rate"], detail["position"]["arms"]):
        assert list(part) == [*ARMS, TOY]
    for arm in (*ARMS[1:], TOY):
        assert detail["bpc"][arm]["p_holm"] >= detail["bpc"][arm]["p"]
        assert detail["bpc"][arm]["verdict"] in VERDICTS
    about, memory = detail["arms"][TOY], tiny(memory="toy").memory
    assert about["label"] == "a toy" and about["hit_means"] == Toy.hit_means and about["settings"] == {}
    assert about["memory_parameters"] == 256 and about["state_bytes"] == 17 * 4
    assert sum(p.numel() for p in memory.parameters()) == 256
    assert "memories.py" in evaluation.read_measured(measured / "trained" / TOY / "evaluation.safetensors").facts["code"]
    assert 0 <= after[TOY]["memory_hit_rate"] <= 1 and set(detail["recall"]["arms"][TOY]["stored"]) == {0.0}


def test_a_further_arm_of_another_regime_is_refused(measured, evaluate, toy):
    train_arm(measured, TOY, chained=0.2)
    assert refused(evaluate(measured), f"trained/{TOY} was trained differently", "(chained)",
                   "train.py --with-toy --steps 8 --root")


def test_without_the_ltm_there_are_no_controls_and_no_picture_of_it(measured, again, evaluate, toy):
    train_arm(measured, TOY)
    shutil.rmtree(measured / "trained" / "with_ltm")
    results, _ = again(measured)
    assert list(results) == ["baseline", TOY, "detail"] and "memory" not in results["detail"]
    assert refused(evaluate(measured, "--controls"), "with_ltm, which is not here", "train.py --with-ltm")


def test_documents_too_short_for_long_range_recall_are_refused(one_seed, evaluate, monkeypatch):
    monkeypatch.setattr(evaluation, "FULL", dataclasses.replace(SMALL, distances=(20, 5_000), long_range=(5_000,)))
    code, out, err = evaluate(one_seed)
    assert refused((code, out, err), "prepare more text", "python prepare_data.py --root")
    assert "5,000 tokens is left out" in out
