"""results.html in a real browser: the numbers that it shows are the model's, by mouse, touch and keyboard.

What is explored is a stand-in of the real thing, as in test_eval.py: one layer, rows of 32 tokens, a memory of 24 items,
at random weights. The browser is Debian's chromium; without one these tests are skipped, and for no other reason.
"""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

import eval as evaluation
import plot_eval
import stages
from memories import RevenaHybrid
from models import RevenaConfig
from stages import EOT, load_tokenizer
from test_eval import SMALL, WIDTH, text_of, tiny
from test_plot import build, synthetic

ARMS = ("baseline", "with_ltm", "with_store")
MOST = 3_000_000                # bytes of a page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")

# the contrast of every text that is seen with the ground it stands on, where that is below WCAG's
# AA; what is bold and large may have less
CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92
    : ((x + 0.055) / 1.055) ** 2.4).reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const color = channels(getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || !element.getClientRects().length || element.closest(":disabled, script, style")) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const [low, high] = [luminance(channels(style.color)), luminance(ground(element))].sort((a, b) => a - b);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < (large ? 3 : 4.5)) found.push([node.data.trim().slice(0, 30), ratio]);
  }
  return found;
}"""


def models_of():
    """{arm: a model at random weights}."""
    torch.manual_seed(1)
    store = RevenaHybrid(RevenaConfig(n_layer=1, n_embd=16, n_head=2, stm_window=WIDTH, memory="store",
                                      memory_settings={"slots": 48})).eval()
    return {"baseline": tiny(memory_enabled=False), "with_ltm": tiny(seed=3, bits=15.2), "with_store": store}


def explored(models, texts, tokenizer):
    """detail.explorer of these models."""
    shown = [{"name": f"document {i}", **evaluation.words_explored(tokenizer, text[1:].tolist())}
             for i, text in enumerate(texts)]
    arms = {arm: evaluation.about_explored(model) | {
        "texts": [evaluation.explored_text(model, text, tokenizer, SMALL) for text in texts]}
        for arm, model in models.items()}
    return {"texts": shown, "arms": arms}


class Explored:
    """A root with its page, and what was explored for it."""

    def __init__(self, folder, tokenizer):
        draw = np.random.default_rng(0)
        self.models, self.texts = models_of(), [text_of(length, draw) for length in (120, 90)]
        results = synthetic(ARMS, seeds=1)
        results["detail"]["controls"].append({"name": "4.5 (as trained)", "group": "surprisal threshold, bits",
                                              "bpc_ratio": 0.96, "recall": 0.95, "top1": None, "stored": 0.5})
        results["detail"]["explorer"] = explored(self.models, self.texts, tokenizer)
        self.root = build(folder, results)
        plot_eval.main(["--root", str(self.root)])
        self.page = self.root / "results.html"

    @functools.cache
    @torch.no_grad()
    def costs(self, arm, number=0, off=False):
        """What the model itself says that each target of a text cost."""
        ids, model = torch.from_numpy(self.texts[number][None]), self.models[arm]
        model = evaluation.memory_off(model) if off else model
        log_p = model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        return -log_p.numpy() / math.log(2)

    @torch.no_grad()
    def cache(self, arm, at, number=0):
        """The memory that predicts target `at`, as streaming fills it."""
        cache = self.models[arm].new_cache()
        ids = torch.from_numpy(self.texts[number][None, :at + 1])
        self.models[arm](ids, past_key_values=cache, logits_to_keep=1)
        return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_eval, "DPI", 10)
        return Explored(tmp_path_factory.mktemp("page") / "run", load_tokenizer(tokenizer_dir.parent.parent))


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Told:
    """A page that is open in a browser, with all it complained of and asked a network for."""

    def __init__(self, browser, path, **how):
        self.wrong = []
        self.page = browser.new_context(**how).new_page()
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self.asked)
        self.page.goto(path.as_uri())

    def asked(self, request):
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(request.url)

    def number(self, name):
        """A number in the facts of the token looked at."""
        return float(self.page.locator(f"#facts [data-is={name}]").first.text_content().rstrip("%"))

    def items(self):
        """[(place, tokens back, cosine or "exact", share)] of what was drawn on."""
        return self.page.eval_on_selector_all("#facts tr[data-item]", """rows => rows.map(row => [+row.dataset.item,
            ...["back", "cosine", "share"].map(name => row.querySelector(`[data-is=${name}]`).textContent)])""")

    def looked_at(self):
        return int(self.page.get_attribute("#words", "aria-activedescendant")[1:])

    def height(self, place):
        """How far down in the text a token stands, in pixels."""
        return self.page.evaluate(f"t{place}.getBoundingClientRect().top - words.getBoundingClientRect().top")

    def text(self, number):
        self.page.select_option("#text", str(number))

    def arm(self, name):
        self.page.check(f"input[name=arm][value={name}]")


@pytest.fixture
def opened(chromium, made):
    """opened(width): the page in a window of that width; at the end nothing was wrong."""
    told = []

    def open_(width=1280, path=None, **how):
        told.append(Told(chromium, path or made.page, viewport={"width": width, "height": 900}, **how))
        return told[-1]

    yield open_
    for one in told:
        one.page.context.close()
        assert one.wrong == []


# ------------------------------------------------------------------ the numbers are the model's


def compare(told, made, arm, at, number):
    """All that the page says of a token is what the model says."""
    assert told.looked_at() == at
    assert told.number("on") == pytest.approx(made.costs(arm, number)[at], abs=1e-3)
    if arm == "baseline":
        return
    assert told.number("off") == pytest.approx(made.costs(arm, number, off=True)[at], abs=1e-3)
    assert told.number("baseline") == pytest.approx(made.costs("baseline", number)[at], abs=1e-3)
    if arm != "with_ltm":
        return
    cache = made.cache(arm, at, number)
    drawn = {item["position"] - 1: item for item in cache.retrieved()}
    shown = told.items()
    for place, back, cosine, share in shown:
        assert int(back) == at - place
        assert float(share.rstrip("%")) / 100 == pytest.approx(drawn[place]["share"], abs=1e-3)
        near = 1.0 if cosine in ("exact", "word") else float(cosine)
        assert near == pytest.approx(drawn[place]["cosine"], abs=1e-3)
    matter = [item for item in drawn.values() if item["share"] >= 0.0006]
    assert len(shown) == min(SMALL.drawn, len(matter)) or len(shown) > len(matter)
    held = cache.contents()
    assert told.number("held") == len(held)
    assert told.number("gone") == int(cache.state["count"]) - len(held)


@in_browser
def test_ten_random_tokens_by_mouse_are_the_models(opened, made):
    told, draw = opened(), np.random.default_rng(7)
    for number, text in enumerate(made.texts):
        told.text(number)
        for at in draw.choice(len(text) - 1, 5, replace=False).tolist():
            told.page.hover(f"#t{at}")
            for arm in ARMS:
                told.arm(arm)
                compare(told, made, arm, at, number)
            told.arm("with_ltm")
    assert sum(len(made.cache("with_ltm", at).retrieved()) > 0 for at in range(20, 119, 10)) > 2


@in_browser
def test_a_token_by_keyboard_shows_the_same(opened, made):
    told = opened()
    keys = told.page.keyboard
    told.page.focus("#words")
    keys.press("Home")
    for _ in range(60):
        keys.press("ArrowRight")
    compare(told, made, "with_ltm", 60, 0)
    keys.press("ArrowLeft")
    compare(told, made, "with_ltm", 59, 0)
    here = told.height(59)
    keys.press("ArrowDown")
    assert told.looked_at() > 59 and told.height(told.looked_at()) > here + 20
    keys.press("ArrowUp")
    assert abs(told.height(told.looked_at()) - here) < 6
    keys.press("End")
    compare(told, made, "with_ltm", len(made.texts[0]) - 2, 0)
    told.page.hover("#t3")                                  # a place that was chosen is held ..
    assert told.looked_at() == len(made.texts[0]) - 2
    keys.press("Escape")                                    # .. until it is let go
    assert told.page.get_attribute("#words", "aria-activedescendant") is None
    told.page.hover("#t5")
    assert told.looked_at() == 5


@in_browser
def test_a_tap_is_enough(opened, made):
    told = opened(360, has_touch=True, is_mobile=True)
    told.page.tap("#t40")
    compare(told, made, "with_ltm", 40, 0)


@in_browser
def test_what_gained_and_lost_more_than_a_bit_is_marked_and_reached(opened, made):
    told = opened()
    gain = made.costs("with_ltm", off=True) - made.costs("with_ltm")
    for mark, found in ("gained", gain > 1), ("lost", gain < -1):
        told.page.check(f"input[name=mark][value={mark}]")
        places = told.page.eval_on_selector_all("#words .hit", "spans => spans.map(span => +span.dataset.at)")
        assert places == np.flatnonzero(found).tolist()
        assert int(told.page.text_content(f"#{mark}")) == len(places)
        told.page.focus("#words")
        told.page.keyboard.press("Home")
        for place in [place for place in places if place > 0][:3]:
            told.page.keyboard.press("n")
            assert told.looked_at() == place


@in_browser
def test_lines_lead_to_what_was_drawn_on(opened, made):
    """One for each item, and what is held at that moment, or was evicted, is marked in the text."""
    told = opened()
    at = next(at for at in range(110, 60, -1) if len(made.cache("with_ltm", at).retrieved()) > 1)
    told.page.hover(f"#t{at}")
    sources = told.page.eval_on_selector_all("#words .source", "spans => spans.map(span => +span.dataset.at)")
    assert sorted(sources) == sorted(place for place, *_ in told.items()) and len(sources) > 1
    assert told.page.locator("#lines path").count() == len(sources)
    held = told.page.eval_on_selector_all("#words .held", "spans => spans.map(span => +span.dataset.at)")
    contents = made.cache("with_ltm", at).contents()
    assert held == [item["position"] - 1 for item in contents] and len(held) == 24
    assert told.page.locator("#words .gone").count() == told.number("gone") > 0


@in_browser
def test_a_further_memory_shows_what_its_contents_offer(opened, made, tokenizer_dir):
    told = opened()
    told.arm("with_store")
    told.page.hover("#t70")
    tokenizer = load_tokenizer(tokenizer_dir.parent.parent)
    cache = made.cache("with_store", SMALL.moment - 2)      # it was asked when it had read 63 tokens
    items = cache.contents(tokenizer)
    rows = told.page.locator("#facts .list tbody tr")
    assert rows.count() == len(items) > 20
    cells = rows.first.locator("td").all_text_contents()    # newest first
    newest = max(items, key=lambda item: (item["place"], item["position"]))
    assert cells[:3] == [str(newest["place"]), newest["text"], str(newest["position"])]
    told.arm("baseline")
    assert "No memory" in told.page.text_content("#facts")


# ------------------------------------------------------------------ a page for everyone


@in_browser
@pytest.mark.parametrize("width", [1280, 360])
def test_every_text_is_told_from_its_ground(opened, width):
    told = opened(width)
    for arm in ARMS:
        told.arm(arm)
        for mark in ("none", "gained", "lost"):
            told.page.check(f"input[name=mark][value={mark}]")
            assert told.page.evaluate(CONTRASTS) == []
    assert told.page.evaluate("document.documentElement.scrollWidth") <= width
    assert told.page.locator("img").count() == told.page.evaluate(
        "[...document.images].filter(image => image.naturalWidth > 0).length") >= 5


@in_browser
def test_the_slider_says_what_was_measured(opened):
    told = opened()
    assert told.page.text_content("#said").startswith("4.5 (as trained) bits: \u00d70.960")


@in_browser
def test_without_anything_to_explore_the_page_says_so(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(plot_eval, "DPI", 10)
    root = build(tmp_path / "run", synthetic(seeds=1))
    plot_eval.main(["--root", str(root)])
    told = opened(path=root / "results.html")
    assert f"python eval.py --report --root {root}" in told.page.text_content("main")
    assert told.page.locator("#words").count() == 0


def test_the_palette_is_legible_and_falls_in_grey():
    pairs = plot_eval.palette()
    assert all(plot_eval.contrast(*pair) >= 4.5 for pair in pairs)
    grounds = [plot_eval.luminance(ground) for ground, _ in pairs]
    assert (np.diff(grounds) < 0).all()
    for ink in (plot_eval.INK, plot_eval.QUIET, plot_eval.BLUE):
        assert plot_eval.contrast(ink, "#ffffff") >= 4.5


def full_size(draw, count=8, length=512):
    """detail.explorer as large as it gets: six arms, two places of each, each token drawing on six items."""
    def line(most, digits=3):
        return evaluation.numbers_of(draw.random(length) * most, digits)

    items = ";".join(" ".join(f"{place},{draw.random():.4f},{draw.random():.3f}" for place in
                              draw.integers(0, max(1, at), 6)) for at in range(length))
    def stated(row, rows):
        moment = {"after": 62, "held": " ".join(f"{n}-{min(n + 9, rows - 1)}" for n in range(0, rows, 20)), "of": 1_000}
        return plain | {"columns": "a b c d e f", "rows": "\n".join([row] * rows), "moments": [moment] * 10}

    plain = {"bits": line(20), "bits_off": line(20)}
    parts = {"baseline": {"bits": line(20)},
             "with_ltm": plain | {"share": line(1, 4), "stored": "1" * length, "items": items},
             "with_store": stated("8\t position\t123\t0.456\t12", 2 * length),
             "with_bank": stated("1023\t15\t0.345\t12.3\t the, of, in, and, a", 10 * SMALL.slots),
             "with_mag": stated("8\t position\t0.123\t0.456\t0.789\t0.00123\t0.123", 2 * length),
             "with_gru": stated("8\t12.3\t the, of, in, and, a\t1.23, 12.3, 123\t0.123", 30)}
    about = {"slots": 256, "threshold": 4.5, "window": 128}
    return {"texts": [{"name": f"document {n}", "text": "words " * length, "lengths": " ".join(["6"] * length)}
                      for n in range(count)],
            "arms": {arm: about | {"texts": [part] * count} for arm, part in parts.items()}}


def test_the_largest_page_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_eval, "DPI", 10)
    results = synthetic(list(stages.ARMS)[:6], seeds=1)
    results["detail"]["explorer"] = full_size(np.random.default_rng(0))
    root = build(tmp_path / "run", results)
    plot_eval.main(["--root", str(root)])
    assert (root / "results.html").stat().st_size <= MOST


def test_every_number_of_the_answer_is_in_the_page(made):
    """And the page asks no network for anything."""
    text, results = made.page.read_text(), json.loads((made.root / "results.json").read_text())
    for arm in ARMS:
        assert f"{results[arm]['bpc']:.4f}" in text and f"{results[arm]['long_range_recall']:.3f}" in text
    assert "NVIDIA H100" in text and "1234567" in text and "openwebtext" in text
    assert not [word for word in ("http://", "https://") if word in text.replace("http://www.w3.org/2000/svg", "")]


# ------------------------------------------------------------------ a text of one's own


def own(made, tokenizer, **weights):
    """trained/explored.json of a text of one's own."""
    text = np.array([EOT, *tokenizer.encode("A text of my own, of my own.")])
    arms = {arm: evaluation.about_explored(model) | {
        "weights": weights.get(arm, stages.sha256(made.root / "trained" / arm / "model.safetensors")),
        "text": evaluation.explored_text(model, text, tokenizer, SMALL)} for arm, model in made.models.items()}
    return {"name": "mine.txt", **evaluation.words_explored(tokenizer, text[1:].tolist()), "arms": arms}


def test_a_text_of_ones_own_comes_first(made, tokenizer_dir, capsys):
    tokenizer = load_tokenizer(tokenizer_dir.parent.parent)
    results = json.loads((made.root / "results.json").read_text())
    path = made.root / "trained" / "explored.json"
    try:
        stages.write_json(path, own(made, tokenizer))
        mine = plot_eval.own_text(made.root, results, "python eval.py --explore FILE")
        shown = plot_eval.explorer_of(results, mine)
        assert [text["name"] for text in shown["texts"]] == ["your text: mine.txt", "document 0", "document 1"]
        assert all(len(arm["texts"]) == 3 and None not in arm["texts"] for arm in shown["arms"].values())
        stages.write_json(path, own(made, tokenizer, with_ltm="0" * 64))
        mine = plot_eval.own_text(made.root, results, "python eval.py --explore FILE")
        assert "other weights of with_ltm" in capsys.readouterr().out
        assert plot_eval.explorer_of(results, mine)["arms"]["with_ltm"]["texts"][0] is None
        stages.write_json(path, own(made, tokenizer) | {"lengths": "1 2"})
        with pytest.raises(stages.StageError, match="--explore FILE, or remove it"):
            plot_eval.own_text(made.root, results, "python eval.py --explore FILE")
    finally:
        path.unlink()
