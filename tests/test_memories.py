"""The promises of every memory, as one set of tests over all kinds, and what each kind promises beside.

The contract runs over the settings of CASES and over a memory of a few lines that is defined here: whoever writes a
further one adds it there and is done. Waking a memory means drawing every parameter anew, so that nothing is right only
because an output matrix is zero. The vocabulary is small, so that whole distributions are cheap.
"""

import copy
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import eval as evaluation
import memories
import stages
from memories import RevenaHybrid, decay, scan
from models import GPT, SIZES, Memory, RevenaConfig, heads, norm, row_attention

WINDOW = 16                     # tokens of a row
ROWS = 6
VOCAB = 97                      # the last of them opens texts and pads them
EOT = VOCAB - 1
TEXT = WINDOW * ROWS + 5
CLOSE = 1e-4


class Mean(Memory, kind="mean of a test"):
    """What stood here so far, on average: a memory of a few lines."""

    places = (1,)
    watched = ("moved_by",)

    def __init__(self, config):
        super().__init__(config)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        nn.init.zeros_(self.out.weight)

    def empty(self, batch, device):
        width = self.config.n_embd
        return {"sum": torch.zeros(batch, width, device=device), "count": torch.zeros(batch, 1, device=device)}

    def mix(self, place, x, y, state, real, notes):
        real = torch.ones(x.shape[:2], device=x.device) if real is None else real.float()
        total = state["sum"][:, None] + (x.float() * real[..., None]).cumsum(1)
        count = state["count"] + real.cumsum(1)
        added = self.out((total / count[..., None].clamp(min=1)).to(x.dtype))
        notes.setdefault("moved_by", []).append(added.float().norm().detach())
        return y + added, {"sum": total[:, -1], "count": count[:, -1:]}


ROOM = 128                      # slots of a store that holds the whole text
CASES = {
    "ltm": ("ltm", dict()),
    "mean": ("mean of a test", dict()),
    "store": ("store", dict(slots=ROOM, top=24)),
    # not in the first layer: there a token that comes again is as important as before, to the last bit or but one,
    # and which of the two a full store drops is a matter of rounding
    "store, few slots": ("store", dict(slots=24, top=8, placement=[1])),
    "store, fewer slots than a row": ("store", dict(slots=8)),
    "store, merging": ("store", dict(slots=32, merge_above=0.3)),
    "store, nothing below a cosine": ("store", dict(slots=ROOM, cosine_above=0.1)),
    "store, reset": ("store", dict(slots=ROOM, carry=False)),
    "store, its usual 10,000 slots": ("store", dict(top=24)),
    "bank": ("bank", dict(slots=64, chapters=8)),
    "bank, low rank": ("bank", dict(slots=64, chapters=8, rank=8)),
    "bank, one for each layer, narrow": ("bank", dict(slots=64, chapters=8, shared=False, width=32)),
    "bank, no chapters, after attention": ("bank", dict(slots=64, chapters=1, after=True, placement="last")),
    "bank, rolling": ("bank", dict(slots=64, chapters=8, routing="rolling")),
    "bank, hybrid": ("bank", dict(slots=64, chapters=8, routing="hybrid", placement=[1])),
    "bank, rolling, reset": ("bank", dict(slots=64, chapters=8, routing="rolling", carry=False)),
    "mag": ("mag", dict(chunk=4)),
    "mag, long chunks": ("mag", dict()),
    "mag, nothing persistent": ("mag", dict(chunk=4, persistent=0, placement="all")),
    "mag, refined": ("mag", dict(chunk=4, placement="all")),
    "mag, reset": ("mag", dict(chunk=4, carry=False)),
    "gru": ("gru", dict()),
    "gru, cell": ("gru", dict(cell=True)),
    "gru, reset": ("gru", dict(carry=False)),
    "gru, cell, reset": ("gru", dict(cell=True, carry=False)),
}
BARE = [name for name, (_, settings) in CASES.items() if not settings or name in ("store", "bank", "mag")]
LARGE = ["store, its usual 10,000 slots"]                   # a hundred times the work, and no other way


def but_slow(names, slow):
    """Parameters, of which some are left to -m slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


every_case = pytest.mark.parametrize("name", but_slow(CASES, LARGE))
every_kind = pytest.mark.parametrize("name", BARE)
# what no setting changes the way of: each kind, and with -m slow its other settings, too
most_cases = pytest.mark.parametrize("name", but_slow(CASES, CASES.keys() - set(BARE)))

# compiling takes seconds: that of one kind, and with -m slow of each
one_compiled = pytest.mark.parametrize("name", but_slow(BARE, set(BARE) - {"ltm"}))


def make(name, awake=True, seed=1, vocabulary=VOCAB, **more):
    """A small model with a memory, in eval mode."""
    kind, settings = CASES[name]
    torch.manual_seed(seed)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), vocabulary - 1)
    config = RevenaConfig(**SIZES["quick"], vocab_size=vocabulary, stm_window=WINDOW, memory=kind,
                          memory_settings=settings | more, ltm_slots=24, **ends)
    model = RevenaHybrid(config).eval()
    return wake(model) if awake else model


def wake(model):
    """Draw every parameter of the memory anew."""
    with torch.no_grad():
        for parameter in model.memory.parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def text(batch=2, length=TEXT, seed=0):
    """Random tokens of a small vocabulary, so that some come again."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, 40, (batch, length), generator=draw)


def streamed(model, ids, sizes, cache=None, mask=None):
    """Log-probabilities of ids read in blocks of these sizes, the last one over and over; and the cache."""
    cache = model.new_cache(len(ids)) if cache is None else cache
    parts, start, sizes = [], 0, list(sizes)
    while start < ids.size(1):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        part = slice(start, start + size)
        kept = None if mask is None else mask[:, :start + size]
        parts.append(model(ids[:, part], past_key_values=cache, attention_mask=kept).logits)
        start += size
    return torch.cat(parts, 1), cache


def differ(one, other):
    return float((one - other).abs().max())


def rows_of(seed=0, lanes=2):
    """Rows of tokens (N, WINDOW), and targets."""
    ids = text(1, lanes * ROWS * WINDOW + 1, seed)[0]
    return ids[:-1].view(-1, WINDOW), ids[1:].view(-1, WINDOW)


OPENS = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1]]).bool()       # two lanes


@pytest.fixture(autouse=True)
def no_gradients():
    """Gradients only where a test asks for them."""
    with torch.no_grad():
        yield


with_gradients = torch.enable_grad()


# ------------------------------------------------------------ the contract

@every_case
def test_off_it_is_the_backbone_bit_for_bit(name):
    model, ids = make(name), text()
    model.config.memory_enabled = False
    plain = GPT(model.config).eval()
    plain.backbone.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", but_slow([name for name in CASES if name != "ltm"], LARGE))
def test_it_starts_as_the_baseline(name):
    """MAG: as one whose attention counts 1 - sigmoid(-3) at the memory's places."""
    model, ids = make(name, awake=False), text()
    begun = model(ids).logits
    model.config.memory_enabled = False
    if name.startswith("mag"):
        gate = torch.tensor(model.memory.set["gate"]).sigmoid()
        for place in model.memory.places:
            model.backbone.blocks[place].out.weight.mul_(1 - gate)
    assert differ(begun, model(ids).logits) < 1e-5


@most_cases
def test_awake_it_has_a_say(name):
    model, ids = make(name), text()
    on = model(ids).logits
    model.config.memory_enabled = False
    # a cell that forgets at a row's end never has anything to say
    assert (differ(on, model(ids).logits) > 1e-2) == (name != "gru, cell, reset")


@every_case
def test_whole_is_row_by_row_is_token_by_token(name):
    model, ids = make(name), text()
    whole = model(ids).logits
    for sizes in ([1], [WINDOW], [5, 1, 3, WINDOW, 2, 2 * WINDOW + 3, 1, 40], [TEXT]):
        assert differ(streamed(model, ids, sizes)[0], whole) < CLOSE, sizes


@every_case
def test_nothing_of_the_future_is_seen(name):
    """Also not inside a chunk: every place of a row is tried once, in a row of the middle."""
    model, ids = make(name), text(1)
    whole = model(ids).logits
    for at in range(2 * WINDOW, 3 * WINDOW):
        changed = ids.clone()
        changed[0, at] += 1
        assert torch.equal(model(changed).logits[0, :at], whole[0, :at]), at


@every_case
def test_nothing_crosses_the_start_of_a_sequence_or_a_lane(name):
    model = make(name)
    tokens, _ = rows_of()
    together, _ = model.states(tokens, OPENS)
    begins = [*OPENS.flatten().nonzero()[:, 0].tolist(), len(tokens)]
    for first, last in zip(begins, begins[1:]):
        one = torch.zeros(1, last - first, dtype=torch.bool)
        one[0, 0] = True
        alone, _ = model.states(tokens[first:last], one)
        assert differ(together[first:last], alone) < CLOSE
    each, _ = model.states(tokens)
    lone, _ = model.states(tokens[3:4])
    assert differ(each[3:4], lone) < CLOSE


@most_cases
def test_sequences_of_a_batch_share_nothing(name):
    model, ids = make(name), text(3)
    together = model(ids).logits
    for b in range(3):
        assert differ(model(ids[b:b + 1]).logits, together[b:b + 1]) < CLOSE


@most_cases
@pytest.mark.parametrize("sizes", [None, [TEXT], [1], [7, 30]], ids=str)
def test_padded_on_the_left_each_reads_as_if_alone(name, sizes):
    model, ids = make(name), text(3)
    lengths = [TEXT, TEXT - 5, TEXT - 41]
    alone = [model(ids[b:b + 1, :length]).logits for b, length in enumerate(lengths)]
    padded, mask = torch.full_like(ids, EOT), torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        padded[b, TEXT - length:], mask[b, TEXT - length:] = ids[b, :length], 1
    found = model(padded, attention_mask=mask).logits if sizes is None else streamed(model, padded, sizes, mask=mask)[0]
    for b, length in enumerate(lengths):
        assert differ(found[b:b + 1, TEXT - length:], alone[b]) < CLOSE


def shapes(state):
    return {name: (x.shape, x.dtype) for name, x in state.items()}


@every_case
def test_the_state_is_bounded_and_what_it_was_given_is_unchanged(name):
    model, ids = make(name), text(2, 3 * WINDOW)
    cache = model.new_cache(2)
    size = shapes(cache.state)
    for t in range(ids.size(1)):
        before = {key: x.clone() for key, x in cache.state.items()}
        given = cache.state
        model(ids[:, t:t + 1], past_key_values=cache)
        assert shapes(cache.state) == size
        assert all(torch.equal(x, before[key]) for key, x in given.items())


@most_cases
def test_a_single_token_asks_the_host_for_nothing(name):
    """On the meta device there are no numbers: whoever asks for one, or for a shape that depends on one, fails."""
    model = make(name).to("meta")
    memory, D = model.memory, model.config.n_embd
    state, notes = memory.empty(2, "meta"), {"arriving": torch.zeros(2, 1, dtype=torch.long, device="meta")}
    size = shapes(state)
    for place in memory.places:
        x = torch.zeros(2, 1, D, device="meta")
        y, state = memory.mix(place, x, x, state, torch.ones(2, 1, dtype=torch.bool, device="meta"), notes)
    assert shapes(state) == size


@every_case
def test_saved_and_loaded_it_goes_on(name, tmp_path):
    model, ids = make(name), text()
    whole = model(ids).logits
    _, cache = streamed(model, ids[:, :37], [37])
    cache.save(tmp_path / "memory")
    loaded = model.load_cache(tmp_path / "memory")
    rest, _ = streamed(model, ids[:, 37:], [9, 1], loaded)
    assert differ(rest, whole[:, 37:]) < CLOSE


@most_cases
def test_the_next_turn_remembers_and_a_cleared_cache_does_not(name):
    """Persistent: the cache is passed in again; ephemeral: it is cleared, or another one is taken."""
    model, ids = make(name), text()
    _, cache = streamed(model, ids[:, :70], [70])
    persistent = copy.deepcopy(cache)
    cache.clear()
    ephemeral, _ = streamed(model, ids[:, 70:], [TEXT], cache)
    assert differ(ephemeral, model(ids[:, 70:]).logits) < CLOSE
    assert differ(streamed(model, ids[:, 70:], [TEXT], persistent)[0], ephemeral) > CLOSE
    assert all(torch.equal(x, cache.state[key]) for key, x in model.new_cache(2).state.items()) is False


@most_cases
def test_beams_take_their_memories_along(name):
    model, ids = make(name), text()
    _, cache = streamed(model, ids[:, :45], [45])
    cache.batch_repeat_interleave(2)
    order = torch.tensor([3, 0, 1])
    cache.reorder_cache(order)
    source = torch.tensor([0, 0, 1, 1])[order]
    rest, _ = streamed(model, ids[source, 45:], [9], cache)
    assert differ(rest, model(ids).logits[source, 45:]) < CLOSE


def no_gradient(name, chained):
    """Parameters that may do without: a GRU cell reads what earlier rows left, and a row alone has none."""
    return name.startswith("gru, cell") and (not chained or name.endswith("reset"))


@with_gradients
@every_case
@pytest.mark.parametrize("chained", [False, True])
def test_from_the_second_step_on_every_parameter_has_a_gradient(name, chained):
    model = make(name, awake=False).train()
    tokens, targets = rows_of()
    names = [key for key, _ in model.named_parameters()]

    def gradients():
        scores = model.score(tokens, targets, OPENS if chained else None)
        return dict(zip(names, torch.autograd.grad(-scores.objective.mean(), model.parameters())))

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    first = gradients()
    for key, parameter in model.named_parameters():
        parameter.grad = first[key]
    optimizer.step()
    second = gradients()
    assert all(x.isfinite().all() for x in second.values())
    dead = [key for key, x in second.items() if key.startswith("memory.") and not x.any()]
    assert no_gradient(name, chained) or not dead


@with_gradients
@most_cases
def test_in_bfloat16_it_computes_the_same_up_to_rounding(name, monkeypatch):
    """As on a GPU: every matrix is bfloat16, every vector float32."""
    model = make(name, awake=False).train()
    tokens, targets = rows_of()
    exact = model.score(tokens, targets, OPENS).log_p.detach()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.bfloat16()
    scores = model.score(tokens, targets, OPENS)
    assert differ(scores.log_p, exact) < 0.25
    gradients = torch.autograd.grad(-scores.objective.mean(), model.parameters())
    assert all(x.isfinite().all() for x in gradients)
    with torch.no_grad():
        state = streamed(wake(model.eval()), tokens[:2], [5, 1])[1].state
    assert all(x.isfinite().all() or "facts" in key for key, x in state.items() if x.is_floating_point())


@with_gradients
@most_cases
def test_through_a_cache_the_gradients_are_those_of_the_whole(name):
    """But that of a sequence's first state, which a cache holds as a constant."""
    model, ids = make(name), text(length=2 * WINDOW + 5)
    model.config.ltm_sharpness = 1.0                        # so that the weights of items are no small matter
    names, parameters = zip(*model.named_parameters())

    def gradients(logits):
        loss = F.nll_loss(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))

    whole, through = gradients(model(ids).logits), gradients(streamed(model, ids, [7])[0])
    lacking = [key for key in names if through[key] is None and whole[key] is not None]
    assert all(key.startswith("memory.first") for key in lacking)
    for key in names:
        if through[key] is not None:
            assert differ(through[key], whole[key]) <= 1e-4 * max(1e-3, float(whole[key].abs().max())), key


@with_gradients
@one_compiled
@pytest.mark.parametrize("chained", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiler_takes_it_whole(name, chained):
    """No graph breaks, with gradients: what training on a GPU needs."""
    model = make(name).train()
    tokens, targets = rows_of()
    opens = OPENS if chained else None

    def objective(tokens, targets, opens):
        scores = model.score(tokens, targets, opens)
        return -scores.objective.mean(), scores.watched

    torch._dynamo.reset()
    expected, _ = objective(tokens, targets, opens)
    found, _ = torch.compile(objective, fullgraph=True, backend="aot_eager", dynamic=False)(tokens, targets, opens)
    assert abs(float(found) - float(expected)) < CLOSE
    torch.autograd.grad(found, [model.memory.out.weight if name == "mean" else next(model.memory.parameters())])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a wrong gradient of a compiled step")
@every_case
@with_gradients
def test_compiled_gradients_are_the_gradients(name):
    model = make(name).cuda().train()
    tokens, targets = (x.cuda() for x in rows_of())
    opens, parameters = OPENS.cuda(), [p for p in model.parameters() if p.requires_grad]

    def objective(tokens, targets, opens):
        return -model.score(tokens, targets, opens).objective.mean()

    torch._dynamo.reset()
    both = []
    for function in (objective, torch.compile(objective, fullgraph=True, dynamic=False)):
        loss = function(tokens, targets, opens)
        both.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for plain, made in zip(*both):
        assert (plain is None) == (made is None)
        assert plain is None or (plain - made).norm() <= 1e-3 * plain.norm() + 1e-7


class Eighths(nn.Module):
    """A quantised matrix, as users' libraries put it in the place of nn.Linear: whole numbers and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


@every_kind
def test_quantised_matrices_are_called(name):
    """With every matrix replaced it says, in both forms, what a model of the same rounded weights says."""
    model, ids = make(name), text(length=3 * WINDOW + 5)
    rounded, before = copy.deepcopy(model), model(ids).logits
    for part, linear in [*model.named_modules()]:
        if isinstance(linear, nn.Linear):
            parent, _, last = part.rpartition(".")
            quantised = Eighths(linear)
            setattr(model.get_submodule(parent), last, quantised)
            rounded.get_submodule(part).weight.copy_(quantised.weight * quantised.scale)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    wanted = rounded(ids).logits
    assert differ(model(ids).logits, wanted) < CLOSE < differ(before, wanted)
    assert differ(streamed(model, ids, [7, 30])[0], wanted) < CLOSE


@with_gradients
@every_kind
def test_lora_on_all_linear_trains_every_adapter(name):
    """Each adapter has a gradient in training, and a say before it is merged: the same as afterwards."""
    from peft import LoraConfig, get_peft_model             # seconds, which the other tests need not wait for

    model, ids = make(name), text(length=3 * WINDOW + 5)
    before = model(ids).logits.detach()
    how = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, how)
    matrices = [part for part, module in adapted.named_modules() if hasattr(module, "base_layer")]
    adapters = {part: p for part, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(matrices) and sum(".memory." in part for part in adapters) >= 2
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    assert not [part for part, p in adapters.items() if p.grad is None or not p.grad.any()]
    adapted.eval()
    with torch.no_grad():
        apart = [adapted(ids).logits, streamed(adapted, ids, [7, 30], model.new_cache(len(ids)))[0]]
        merged = adapted.merge_and_unload()(ids).logits
    assert differ(before, merged) > 0.1
    assert all(differ(logits, merged) < CLOSE for logits in apart)


@one_compiled
def test_compiled_it_writes_the_same_text(name):
    """model.compile() leaves what a cache carries alone: generate gives the text that it gave."""
    model, ids = make(name), text(length=WINDOW + 3)
    how = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    wanted = model.generate(ids, **how)
    torch._dynamo.reset()
    model.compile(backend="eager")
    cache = model.new_cache(len(ids))
    assert torch.equal(model.generate(ids, past_key_values=cache, **how), wanted)
    assert cache.get_seq_length() == wanted.size(1) - 1


@every_kind
def test_in_double_precision_both_forms_are_one(name):
    model, ids = make(name).double(), text(length=2 * WINDOW + 5)
    assert differ(model(ids).logits, streamed(model, ids, [7, 30])[0]) < CLOSE
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).size(1) == ids.size(1) + 3


@most_cases
def test_statistics_are_scalars_that_it_names(name):
    model = make(name).train()
    tokens, targets = rows_of()
    for opens in (None, OPENS):
        watched = model.score(tokens, targets, opens).watched
        assert set(watched) == set(model.memory.watched)
        assert all(x.dim() == 0 and x.isfinite() for x in watched.values())
        assert all(f"`{key}`" in type(model.memory).__doc__ for key in watched if not isinstance(model.memory, Mean))


@most_cases
def test_names_of_parameters_are_there(name):
    memory = make(name).memory
    names = {key for key, _ in memory.named_parameters()}
    assert {*memory.undecayed, *memory.rates} <= names


GENERATE = {
    "greedy": dict(),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.95),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "beams": dict(num_beams=3, length_penalty=0.5),
    "several": dict(do_sample=True, num_return_sequences=2),
}


@every_kind
@pytest.mark.parametrize("how", GENERATE)
def test_every_way_to_generate(name, how):
    model, ids = make(name), text(2, 21)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(ids, max_new_tokens=15, min_new_tokens=15, use_cache=use_cache, **GENERATE[how]))
    assert torch.equal(*texts)


@pytest.mark.slow
@every_kind
def test_2000_tokens_in_constant_memory(name):
    model, cache = make(name), None
    cache = model.new_cache(1)
    size = shapes(cache.tensors())
    out = model.generate(text(1, 8), past_key_values=cache, max_new_tokens=2000, min_new_tokens=2000, do_sample=True)
    assert out.size(1) == 2008 and shapes(cache.tensors()) == size
    assert all(x.isfinite().all() or "facts" in key for key, x in cache.state.items() if x.is_floating_point())


@pytest.mark.parametrize("kind", ["store", "bank", "mag", "gru"])
def test_1_to_3_million_parameters_at_full_size(kind):
    with torch.device("meta"):
        memory = Memory.kinds[kind](RevenaConfig(**SIZES["70M"], memory=kind))
    assert 1e6 < sum(p.numel() for p in memory.parameters()) < 3e6


@pytest.mark.parametrize("arm", [arm for arm, about in stages.ARMS.items() if about.memory])
def test_every_arm_can_be_made(arm):
    about = stages.ARMS[arm]
    with torch.device("meta"):
        Memory.kinds[about.memory](RevenaConfig(**SIZES["quick"], memory=about.memory, memory_settings=about.settings))


# ------------------------------------------------------------ what decays

def by_hand(log_a, b, first, opens=None):
    h, found = first, []
    for t in range(b.size(1)):
        if opens is not None and t % (b.size(1) // opens.size(1)) == 0:
            h = torch.where(opens[:, t // (b.size(1) // opens.size(1)), None], 0.0, h)
        h = log_a[:, t].exp() * h + b[:, t]
        found.append(h)
    return torch.stack(found, 1)


@pytest.mark.parametrize("length", [1, 7, 16, 96])
def test_the_closed_form_is_the_recurrence(length, monkeypatch):
    draw = torch.Generator().manual_seed(length)
    log_a, b = -torch.rand(2, length, 5, generator=draw) * 3, torch.randn(2, length, 5, generator=draw)
    first = torch.randn(2, 5, generator=draw)
    expected = by_hand(log_a, b, first)
    h, last = scan(log_a, b, first)
    assert differ(h, expected) < 1e-5 and differ(last, expected[:, -1]) < 1e-5
    if length == 96:
        opens = OPENS.roll(1, 1)                        # also one that goes on from before
        assert differ(scan(log_a, b, first, opens)[0], by_hand(log_a, b, first, opens)) < 1e-5
        monkeypatch.setattr(memories, "SPAN", 40)
        assert differ(scan(log_a, b, first)[0], expected) < 1e-5
        assert differ(scan(log_a, b, first, opens)[0], by_hand(log_a, b, first, opens)) < 1e-5


def test_what_was_forgotten_at_once_does_not_blur_what_fades_slowly():
    """Sums of a thousand strong gates, subtracted from each other, leave float32 no digits for the weak ones."""
    draw = torch.Generator().manual_seed(0)
    log_a = torch.cat((torch.full((1, 1024, 4), -80.0), torch.full((1, 1024, 4), -1e-4)), 1)
    b = torch.randn(log_a.shape, generator=draw)
    exact = by_hand(log_a.double(), b.double(), torch.zeros(1, 4, dtype=torch.float64))
    assert differ(scan(log_a, b)[0], exact) < 1e-4 * float(exact.abs().max())


@with_gradients
def test_what_fades_at_once_has_a_gradient_that_is_a_number():
    log_a = torch.full((1, 64, 3), -90.0, requires_grad=True)
    scan(log_a, torch.ones(1, 64, 3))[0].sum().backward()
    assert log_a.grad.isfinite().all()
    decay(log_a[..., 0]).sum().backward()
    assert log_a.grad.isfinite().all()


TWIN = """
import torch
from memories import Fading

def both(S, R, C, units, opens):
    torch.manual_seed(0)
    fading, gates = Fading(units), torch.randn(S, R * C, 2 * units).requires_grad_()
    with torch.no_grad():
        fading.fade.copy_(torch.linspace(-2, 8, units))
    weight, found = torch.randn(S, R * C, units), []
    for fading.fused in (False, True):
        h, last, *_ = fading(gates, None, opens)
        found.append((h, last, *torch.autograd.grad((h * weight).sum() + last.sum(), [gates, fading.fade])))
    for plain, fused in zip(*found):
        assert plain.abs().max() > 0.1
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)

both(3, 1, 16, 8, None)
both(2, 3, 8, 5, torch.tensor([[1, 0, 0], [1, 0, 1]]).bool())
both(2, 3, 16, 4, torch.tensor([[1, 1, 0]]).bool().expand(2, 3))
print("alike")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_scans_kernels_are_its_twins():
    """Gone through by Triton's interpreter on this machine: values and gradients."""
    done = subprocess.run([sys.executable, "-c", TWIN], cwd=stages.PROJECT, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.stdout == "alike\n", done.stderr[-2000:]


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares what a CUDA device does")


@on_a_gpu
@with_gradients
@pytest.mark.parametrize("length, rows", [(1, 1), (100, 1), (384, 3), (2048, 16)])
def test_on_a_gpu_the_scans_kernels_are_its_twins(length, rows):
    draw = torch.Generator().manual_seed(length)
    shape = 3, length, 10
    given = [-torch.rand(shape, generator=draw), torch.randn(shape, generator=draw)]
    given = [x.cuda().requires_grad_() for x in given]
    weight = torch.randn(shape, generator=draw).cuda()
    opens = torch.arange(3 * rows, device="cuda").view(3, rows) % 5 == 0
    found = []
    for h in (scan(*given, None, opens)[0], memories.fused_scan(*given, opens)):
        found.append((h, *torch.autograd.grad((h * weight).sum(), given)))
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@on_a_gpu
@every_kind
def test_a_gpu_replays_windows(name):
    """Of every kind, from amid a row on: what is replayed is what is streamed, and leaves the same state."""
    model = make(name).cuda()
    ids = text(2, 12 * WINDOW).cuda()
    replayed, plain = model.new_cache(2), model.new_cache(2)
    for tokens in ids.split((5, 10 * WINDOW, 2 * WINDOW - 5), 1):
        got = model(tokens, past_key_values=replayed, logits_to_keep=1).logits
        blocks = plain.blocks(tokens, torch.ones_like(tokens, dtype=torch.bool))
        for block, real in blocks:
            wanted = model.stream(block, plain, real)[:, -1:]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert (WINDOW, 1, False) in replayed.graphs
    for held, state in plain.state.items():
        torch.testing.assert_close(replayed.state[held], state, rtol=1e-3, atol=1e-3)


@on_a_gpu
@torch.no_grad()
@every_kind
def test_a_gpu_replays_what_is_compiled(name):
    """Single tokens, compiled and recorded: the same as `stream`, which is neither; a second cache's, too."""
    torch._dynamo.reset()
    model, ids = make(name).cuda(), text(2, 2 * WINDOW).cuda()
    for _ in range(2):
        compiled, plain = model.new_cache(2, compiled=True), model.new_cache(2)
        for tokens in ids.split((5, *[1] * (2 * WINDOW - 5)), 1):
            got = model(tokens, past_key_values=compiled).logits
            torch.testing.assert_close(got, model.stream(tokens, plain), rtol=1e-3, atol=1e-3)
        assert (1, 0, False) in compiled.graphs
        for held, state in plain.state.items():
            torch.testing.assert_close(compiled.state[held], state, rtol=1e-3, atol=1e-3)


@on_a_gpu
@torch.no_grad()
@every_kind
def test_a_gpu_replays_what_it_scores(name):
    """Each pack, recorded with the first, as eval.py's parts one by one."""
    torch._dynamo.reset()
    model, draw = evaluation.made_fast(make(name).cuda()), torch.Generator().manual_seed(0)
    texts = [torch.randint(VOCAB - 1, (length,), generator=draw).numpy() for length in (45, 30, 48, 20, 16, 40)]
    settings = evaluation.Settings(pack=6, lane=3, eot=VOCAB - 1)
    ready = list(evaluation.packs(texts, WINDOW, model.device, settings))
    ours = [evaluation.score(pack, model)[0] for pack in ready]
    for pack, scores in zip(ready, ours):
        assert pack.usual
        for x, y in zip(scores[:5], evaluation.scores_by_parts(pack, model)[0]):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
    assert len(ready) > 1 and evaluation.replay_of.cache_info().currsize
    evaluation.replay_of.cache_clear()


@torch.no_grad()
@every_kind
def test_a_compiled_cache_says_the_same(name, monkeypatch):
    """What reads a token is compiled whole and once, for the caches that follow, too; probabilities and state are those
    of the one that is not."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    model, ids = make(name), text(2, 2 * WINDOW)
    for sizes, again in ((5, 1), False), ((5, 1), True), ((WINDOW + 1, 1), True):
        wanted, plain = streamed(model, ids, sizes)
        with torch._dynamo.config.patch(error_on_recompile=again):
            got, cache = streamed(model, ids, sizes, model.new_cache(2, compiled=True))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert cache.length == plain.length and cache.tensors().keys() == plain.tensors().keys()
        for held, x in plain.tensors().items():
            torch.testing.assert_close(cache.tensors()[held], x, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


# ------------------------------------------------------------ the store

def items_of(keys, importance, heads=1):
    """Items of one sequence from unit keys (I, d) and importances; values are one-hot, so that one sees who is where."""
    I = len(keys)
    facts = torch.stack((torch.tensor(importance).log(), torch.ones(I), torch.arange(I) + 1.0, torch.arange(I)), -1)
    return memories.Items(F.normalize(torch.tensor(keys), dim=-1)[None], torch.eye(I)[None], facts[None])


def test_like_items_are_merged_into_the_oldest_as_means_weighted_by_counts():
    model = make("store", heads=1)
    items = items_of([[1.0, 0.0], [0.0, 1.0], [0.99, 0.1], [1.0, 0.05]], [0.5, 0.5, 0.25, 0.25])
    merged, count = model.memory.merge(items, 2, 0.9)
    assert count.tolist() == [2]
    assert merged.facts[0, :, 1].tolist() == [3, 1, 0, 0]
    assert torch.allclose(merged.facts[0, :, 0].exp(), torch.tensor([1.0, 0.5, 0.0, 0.0]))
    assert torch.allclose(merged.values[0, 0], torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3)
    assert torch.allclose(merged.keys[0, 0].norm(), torch.tensor(1.0)) and torch.equal(merged.keys[0, 1], items.keys[0, 1])


def test_a_chain_of_likes_ends_in_one():
    turns = [[math.cos(0.3 * i), math.sin(0.3 * i)] for i in range(4)]
    merged, count = make("store", heads=1).memory.merge(items_of(turns, [0.5] * 4), 0, math.cos(0.35))
    assert count.tolist() == [3] and merged.facts[0, :, 1].tolist() == [4, 0, 0, 0]


def test_empty_slots_go_first_then_the_least_important_of_the_older_half():
    memory = make("store").memory
    importance = torch.tensor([0.3, 0.9, 0.1, 0.2, 0.0, 0.05, 0.01, 0.02]).log()
    assert memory.kept(importance[None], 7).tolist() == [[0, 1, 2, 3, 5, 6, 7]]
    assert memory.kept(importance[None], 5).tolist() == [[0, 1, 5, 6, 7]]
    assert memory.kept(importance[None], 2).tolist() == [[6, 7]]


def test_a_store_never_holds_more_than_its_slots_and_counts_what_it_lost():
    model, ids = make("store, few slots"), text(1)
    cache = model.new_cache(1)
    for t in range(TEXT):
        model(ids[:, t:t + 1], past_key_values=cache)
        for about in model.memory.statistics(cache.state):
            assert about["items"] <= 24 + WINDOW
            assert about["read"] == t + 1 and about["items"] + about["dropped"] == t
    assert about["dropped"] == TEXT - 1 - 24 - TEXT % WINDOW and about["merged"] == 0


def test_what_a_store_holds_is_told_token_by_token():
    model, ids = make("store"), text(1, 40)
    _, cache = streamed(model, ids, [7, 1, 40])
    told = cache.contents()
    for place in model.memory.places:
        there = [item for item in told if item["place"] == place]
        assert [item["token"] for item in there] == ids[0, 1:].tolist()
        assert [item["position"] for item in there] == list(range(1, 40))
        assert all(0 < item["importance"] < 1 and item["count"] == 1 for item in there)


def test_only_the_best_are_found():
    model = make("store", top=3)
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(50, 200, generator=draw)
    least = memories.threshold(score, score.amax(-1, keepdim=True), 3)
    assert (score >= least).sum(-1).tolist() == [3] * 50
    assert model.memory.set["top"] == 3


@pytest.mark.parametrize("least, some", [(-1.0, True), (0.99, False)])
def test_nothing_below_the_threshold_is_found(least, some):
    """Random keys of 32 numbers are never so alike."""
    tokens, targets = rows_of()
    found = make("store", cosine_above=least, dim=32).score(tokens, targets, OPENS).watched["found"]
    assert (found > 0.1) == some


@pytest.mark.parametrize("read", [0, 3])
def test_where_nothing_is_held_nothing_is_merged(read):
    """Items of a row that is not full yet are not in the slots."""
    model = make("store")
    cache = model.new_cache(1)
    if read:
        model.store_experience(cache, text(1, read))
    assert model.consolidate(cache, -1.0) == 0
    assert model(text(1, 30), past_key_values=cache).logits.isfinite().all()


def test_a_user_stores_asks_and_consolidates(tokenizer_dir):
    from transformers import GPT2TokenizerFast
    tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer_dir)
    model = make("store", vocabulary=len(tokenizer))
    cache = model.new_cache(1)
    fact = "The code of the blue door is four one nine. The code of the blue door is four one nine."
    read = model.store_experience(cache, fact, tokenizer)
    assert read == len(tokenizer(fact)["input_ids"]) == cache.length
    before = {name: x.clone() for name, x in cache.tensors().items()}
    found = model.query_memory(cache, " the blue door", 4, tokenizer)
    assert len(found) == 4 and sorted((item["score"] for item in found), reverse=True) == [x["score"] for x in found]
    assert all(item["text"] in fact for item in found)
    assert all(torch.equal(x, before[name]) for name, x in cache.tensors().items())
    held = len(cache.contents())
    assert model.consolidate(cache, 1.0) == 0 and len(cache.contents()) == held
    merged = model.consolidate(cache, 0.5)
    assert merged > 0 and len(cache.contents()) == held - merged
    assert model(text(1, 30), past_key_values=cache).logits.isfinite().all()


def test_asked_for_what_it_cannot_do_it_says_so():
    model = make("gru")
    with pytest.raises(ValueError, match="holds no items"):
        model.query_memory(model.new_cache(1), [1, 2])
    with pytest.raises(ValueError, match="holds no items"):
        model.consolidate(model.new_cache(1), 0.9)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        model.store_experience(model.new_cache(1), "text")
    with pytest.raises(ValueError, match="is empty"):
        model.store_experience(model.new_cache(1), [])
    with pytest.raises(ValueError, match="none of token, rolling, hybrid"):
        make("bank", routing="sequence")
    with pytest.raises(ValueError, match="equal chapters"):
        make("bank", chapters=7)
    with pytest.raises(ValueError, match="is no setting of this memory"):
        make("gru", slots=3)
    for placement in ("middle", [], [5], [-2]):
        with pytest.raises(ValueError, match="names no place of 2 layers"):
            make("gru", placement=placement)
    with pytest.raises(ValueError, match="no multiple of 8"):
        make("gru", units=20)
    with pytest.raises(ValueError, match="is not told"):
        above = make("store", placement="upper")
        above.query_memory(above.new_cache(1), [1, 2])


# ------------------------------------------------------------ the bank

def test_a_bank_carries_nothing_beyond_the_window():
    """What it holds may be forgotten at any time: nothing that is predicted depends on it."""
    model, ids = make("bank"), text()
    _, cache = streamed(model, ids[:, :50], [50])
    cache.state = model.memory.empty(2, "cpu")
    assert differ(streamed(model, ids[:, 50:], [1], cache)[0], model(ids).logits[:, 50:]) < CLOSE


@with_gradients
def test_the_routers_losses_are_part_of_the_objective_and_the_best_chapters_are_read():
    model = make("bank").train()
    tokens, targets = rows_of()
    notes = model.states(tokens)[1]
    assert len(notes["penalty"]) == len(model.memory.places)
    scores = model.score(tokens, targets)
    assert torch.allclose(scores.log_p - scores.objective, sum(notes["penalty"]).expand_as(scores.log_p), atol=1e-4)
    logits = torch.randn(1, 5, 8)
    log_p, read = model.memory.route(logits, None, {})
    assert read.sum(-1).tolist() == [[4] * 5]
    assert torch.equal(log_p[read], logits.log_softmax(-1)[read]) and log_p[~read].eq(-math.inf).all()


def test_what_a_bank_holds_is_told_slot_by_slot():
    model, ids = make("bank"), text(1)
    _, cache = streamed(model, ids, [TEXT])
    told = cache.contents()
    assert len(told) == 64 and {item["chapter"] for item in told} == set(range(8))
    assert all(len(item["raises"]) == 5 for item in told)
    shares = [item["chosen"] for item in told[::8]]
    assert abs(sum(shares) - model.memory.set["best"]) < 1e-4 and max(shares) <= 1


def test_a_low_rank_or_narrow_bank_is_smaller():
    def size(**settings):
        return sum(p.numel() for p in make("bank", **settings).memory.parameters())

    assert size(rank=8) < size() and size(width=16) < size() < size(shared=False)


def test_what_a_memory_is_handed_at_each_place():
    """Layer by layer, written out: the norm of what goes in there, and what it may change."""
    backbone, tokens, given, expected = make("mean").backbone, rows_of()[0], [], []

    def attention(y, n_head):
        return heads(y, n_head, functools.partial(row_attention, table=backbone.rotary))

    def mix(place, x, y):
        given.append((x, y))
        return y + place + 2

    found = backbone(backbone.embed(tokens), [attention] * 2, mix, (-1, 1, 2))
    x = norm(backbone.embed(tokens))
    expected.append((norm(x), x))
    x = x + 1
    for layer, block in enumerate(backbone.blocks):
        y = block.out(attention(block.qkvg(norm(x)), block.n_head))
        if layer == 1:
            expected.append((norm(x), y))
            y = y + 3
        x = x + y
        x = x + block.down(F.gelu(block.up(norm(x)), approximate="tanh"))
    expected.append((norm(x), x))
    for pair, by_hand in zip(given, expected, strict=True):
        torch.testing.assert_close(pair, by_hand)
    torch.testing.assert_close(found, norm(x + 4))


@pytest.mark.parametrize("embed, layers", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_each_matrix_is_handed_what_it_takes(embed, layers):
    """Of two types, the norm is rounded for those alone that compute with fewer bits, and so it is for a memory there."""
    backbone, given = make("mean").backbone, {}
    backbone.embed.to(embed)
    backbone.blocks.to(layers)

    def mix(place, x, y):
        given[place] = x
        return y
    attentions = [lambda y, n_head: heads(y, n_head, functools.partial(row_attention, table=backbone.rotary))] * 2
    found = backbone(backbone.embed(rows_of()[0]), attentions, mix, (-1, 1, 2))
    assert {place: x.dtype for place, x in given.items()} == {-1: embed, 1: layers, 2: embed} and found.dtype == embed
    rounded = {place: torch.equal(x, x.bfloat16().to(x.dtype)) for place, x in given.items()}
    assert rounded == {place: x.dtype == torch.bfloat16 for place, x in given.items()}


@pytest.mark.parametrize("placement, places", [("all", (0, 1, 2, 3)), ("first", (0,)), ("last", (3,)),
                                               ("every 3", (0, 3)), ("upper", (2, 3, 4)), ([2, 1], (1, 2))])
def test_where_a_memory_acts(placement, places):
    assert memories.places_of(placement, 4) == places


# ------------------------------------------------------------ fast weights

@with_gradients
def test_the_gradient_written_by_hand_is_the_gradient():
    draw = torch.Generator().manual_seed(0)
    n, c, d, h = 3, 4, 5, 6
    k, v = torch.randn(2, n, c, d, generator=draw).unbind()
    theta = torch.rand(n, c, generator=draw)
    weights = (0.3 * torch.randn(2, d, h, generator=draw)).requires_grad_()
    slopes = memories.slopes_of(k, v, theta, weights)
    found, surprise = torch.stack(memories.updates(slopes, n, torch.float32), 1), slopes.surprise
    for i in range(n):
        f = F.silu(k[i] @ weights[0])
        error = f @ weights[1].T - v[i]
        loss = (theta[i] * error.square().sum(-1) / 2).mean()
        step = -torch.autograd.grad(loss, weights)[0]
        of_f = torch.func.vmap(torch.func.grad(F.silu))
        slope = torch.stack([of_f(row) for row in k[i] @ weights[0]])
        curvature = (f.square() + (slope * weights[1].norm(dim=0)).square()).sum(-1).mean()
        assert differ(found[i], step / (n * curvature)) < 1e-5
        assert differ(surprise[i], error.square().sum(-1)) < 1e-5


def test_a_row_of_steps_at_the_same_weights_does_not_overshoot():
    """Whatever keys have in common: the error over the row falls with the largest theta."""
    draw = torch.Generator().manual_seed(0)
    n, c, d, h = 8, 16, 16, 32
    for common in (0.0, 1.0, 10.0):
        k, v = torch.randn(2, n, c, d, generator=draw).unbind()
        k = F.normalize(k + common * torch.randn(d, generator=draw), dim=-1)
        v = F.normalize(v, dim=-1)
        weights = torch.randn(2, d, h, generator=draw) * torch.tensor([d ** -0.5, 0.02]).view(2, 1, 1)
        before = None
        for _ in range(20):
            slopes = memories.slopes_of(k, v, torch.full((n, c), 1.9), weights)
            surprise, step = slopes.surprise.mean(), torch.stack(memories.updates(slopes, n, torch.float32)).sum(1)
            assert before is None or surprise < before + 1e-6
            before, weights = surprise, weights + step
        assert before < 1


def test_the_weights_go_on_as_the_equations_say():
    draw = torch.Generator().manual_seed(0)
    S, H, n, P = 1, 2, 5, 3
    eta, keep = torch.rand(2, S, H, n, generator=draw).unbind()
    u = torch.randn(S, H, n, P, generator=draw)
    W, M = torch.randn(2, S, H, P, generator=draw).unbind()
    course = memories.course_of(eta.log(), keep.log())
    after = course.forward() @ torch.cat((u, torch.stack((W, M), 2)), 2)
    for i in range(n):
        M = eta[..., i, None] * M + u[:, :, i]
        W = keep[..., i, None] * W + M
    assert differ(after, torch.stack((W, M), 2)) < 1e-5


def test_what_is_carried_is_the_sum_of_the_updates():
    """Summed as they are made, or chunk after chunk as the equations say."""
    draw = torch.Generator().manual_seed(0)
    S, H, n, c, d, h = 1, 2, 3, 4, 5, 6
    k, v = F.normalize(torch.randn(2, S, H, n, c, d, generator=draw), dim=-1).unbind()
    theta = torch.rand(S, H, n, c, generator=draw)
    eta, keep = torch.rand(2, S, H, n, generator=draw).unbind()
    held = torch.randn(S, H, 2, 2, d, h, generator=draw)
    weights, momentum = held.unbind(2)
    slopes = memories.slopes_of(k, v, theta, weights)
    after = memories.carried(slopes, memories.course_of(eta.log(), keep.log()).forward(), held)
    u = torch.stack(memories.updates(slopes, n, torch.float32), 3)                      # (S, H, n, 2, d, h)
    for i in range(n):
        momentum = eta[..., i, None, None, None] * momentum + u[:, :, i]
        weights = keep[..., i, None, None, None] * weights + momentum
    assert differ(after, torch.stack((weights, momentum), 2)) < 1e-5


def test_what_mag_holds_is_told():
    model, ids = make("mag"), text(1, WINDOW + 6)
    _, cache = streamed(model, ids, [1])
    told = cache.contents()
    for place in model.memory.places:
        about, *tokens = [item for item in told if item["place"] == place]
        assert about["distance"] > 0 and about["momentum"] > 0
        assert [item["token"] for item in tokens] == ids[0, WINDOW:].tolist()
        assert all(item["surprise"] > 0 and 0 < item["theta"] < 2 for item in tokens)
        assert all(0 < item["eta"] < 1 and 0 < item["alpha"] < 1 for item in tokens)
    assert all(0 < item["gate"] < 1 for item in tokens)


def test_the_rates_of_a_chunk_that_is_not_full_are_those_of_what_it_has():
    """What stood in its places in the row before has no say."""
    ids = text(1, WINDOW + 3)
    (_, one), (_, other) = (streamed(make("mag", chunk=8), x, [WINDOW, 1]) for x in (ids, ids.flip(1)))
    p = make("mag").memory.places[0]
    one.state[f"row.{p}"][:, 3:] = other.state[f"row.{p}"][:, 3:]
    other = one.contents()
    one.state[f"row.{p}"][:, 3:] = 0.0
    for before, after in zip(one.contents(), other):
        assert before == pytest.approx(after)


def test_a_new_text_finds_the_first_weights():
    model, ids = make("mag"), text(1)
    _, cache = streamed(model, ids, [TEXT])
    cache.clear()
    assert all(item["distance"] == 0 for item in cache.contents())


# ------------------------------------------------------------ a state that fades

def test_the_cell_is_torchs_own():
    """But for z: torch's keeps the old state, ours takes the new one, so its sign is turned."""
    memory = make("gru, cell").memory
    cell, again, units = nn.GRUCell(8, memory.units), memory.again[0], memory.units
    x, h = torch.randn(2, 8), torch.randn(2, units)
    again.weight.copy_(cell.weight_hh)
    again.bias.copy_(cell.bias_hh)
    gates = F.linear(x, cell.weight_ih, cell.bias_ih)
    for part in (again.weight, again.bias, gates.T):
        part[units:2 * units] *= -1
    assert differ(memory.cell(0, gates, h)[0], 0.97 * cell(x, h)) < 1e-6


def test_half_lives_are_spread_from_a_few_tokens_to_a_thousand():
    memory = make("gru", awake=False).memory
    for into, fading in zip(memory.into, memory.fading):
        lives = fading.half_lives(into.bias)
        assert 2 < lives.min() < 4 and 500 < lives.max() < 1024
    assert memory.fading[0].fade.sigmoid().mean() > 0.999


def test_what_a_gru_holds_is_told(tokenizer_dir):
    from transformers import GPT2TokenizerFast
    tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer_dir)
    model, ids = make("gru"), text(1)
    _, cache = streamed(model, ids, [TEXT])
    told = cache.contents(tokenizer)
    assert [item["place"] for item in told] == [-1, 1, 2]
    for item in told:
        assert item["norm"] > 0 and item["half_lives"] == sorted(item["half_lives"]) and 0 < item["gate"] < 1
        assert all(isinstance(word, str) for word in item["raises"]) and len(item["raises"]) == 5


@every_kind
def test_reset_at_every_row_is_as_if_each_row_were_alone(name):
    if name in ("ltm", "mean"):
        pytest.skip("it knows no rows")
    tokens, _ = rows_of()
    model = make(name, carry=False)
    opens = torch.zeros(2, ROWS, dtype=torch.bool)
    opens[:, 0] = True
    for place in model.memory.places:
        x, y = torch.randn(2, 2 * ROWS, WINDOW, model.config.n_embd).unbind()
        notes = [{"read": torch.zeros_like(x)} for _ in range(2)]
        assert torch.equal(model.memory.rows(place, x, y, opens, notes[0]), model.memory.rows(place, x, y, None, notes[1]))


# ------------------------------------------------------------ do they work at all

KEYS, PAIRS, LANE = 32, 8, 4            # tokens 0 to 31 are keys, 32 to 63 values, 64 to 95 noise
LONG = 32                               # tokens of a row


class Toy(nn.Module):
    """Two layers whose attention sees one row, and a memory."""

    def __init__(self, memory, width=64):
        super().__init__()
        self.memory, layers = memory, range(2)
        self.embed = nn.Embedding(3 * KEYS, width)
        self.position = nn.Parameter(0.02 * torch.randn(LONG, width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in layers)
        self.join = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in layers)
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in layers)
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in layers)
        self.out = nn.Linear(width, 3 * KEYS)

    def forward(self, tokens, opens):
        notes = {}

        def mix(place, x, y):
            return self.memory.rows(place, x, y, opens, notes) if place in self.memory.places else y

        x = (self.embed(tokens) + self.position).flatten(0, 1)
        x = mix(-1, norm(x), x)
        for layer in range(2):
            inner = norm(x)
            q, k, v = self.qkv[layer](inner).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + mix(layer, inner, self.join[layer](heads))
            x = x + self.down[layer](F.gelu(self.up[layer](norm(x))))
        x = mix(2, norm(x), x)
        return self.out(norm(x)).view(*tokens.shape, -1), sum(notes.get("penalty", [0.0]))


def pairs(lanes, draw):
    """Lanes (L, 4, 32) of noise: eight pairs of key and value in the first row, and in the last, in another order."""
    tokens = torch.randint(2 * KEYS, 3 * KEYS, (lanes, LANE, LONG), generator=draw)

    def shuffled(count):
        return torch.rand(lanes, count, generator=draw).argsort(1)[:, :PAIRS]

    keys, values, order = shuffled(KEYS), shuffled(KEYS) + KEYS, shuffled(PAIRS)
    tokens[:, 0, :2 * PAIRS] = torch.stack((keys, values), -1).flatten(1)
    tokens[:, -1, -2 * PAIRS:] = torch.stack((keys.gather(1, order), values.gather(1, order)), -1).flatten(1)
    return tokens


def train_toy(kind, steps, rate=2e-3, **settings):
    """How often the right value is the likeliest one in unseen lanes, after so many steps of chained training."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    config = RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=LONG, memory=kind, memory_settings=settings)
    toy = Toy(Memory.kinds[kind](config))
    optimizer = torch.optim.AdamW(toy.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
    asked = slice(-2 * PAIRS, None, 2)

    def answers(lanes):
        tokens = pairs(lanes, draw)
        opens = torch.zeros(lanes, LANE, dtype=torch.bool)
        opens[:, 0] = True
        logits, penalty = toy(tokens, opens)
        return logits[:, -1, asked], tokens[:, -1, -2 * PAIRS + 1::2], penalty

    for step in range(steps):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * cosine
        logits, values, penalty = answers(16)
        loss = F.cross_entropy(logits.flatten(0, 1), values.flatten()) + penalty
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        logits, values, _ = answers(128)
    return float((logits.argmax(-1) == values).float().mean())


@pytest.mark.slow
@with_gradients
@pytest.mark.parametrize("kind, steps, settings", [
    ("store", 500, dict(heads=4, dim=16, units=32)), ("mag", 700, dict(dim=16, chunk=8))])
def test_pairs_are_carried_from_row_to_row(kind, steps, settings):
    assert train_toy(kind, steps, **settings) >= 0.9


@pytest.mark.slow
@with_gradients
def test_a_fading_state_carries_some_of_them():
    """Chance is 1 / 32: five times that."""
    assert train_toy("gru", 700, units=64) >= 5 / KEYS


@pytest.mark.slow
@with_gradients
def test_a_bank_cannot():
    """It holds nothing of the text: what it gets right is what one gets right who guesses a value."""
    assert train_toy("bank", 300, slots=64, chapters=8, best=2) < 2.5 / KEYS


# ------------------------------------------------------------ what the relatives promise

def built(where, tests):
    """Where it is, and tests of this file or, as MODULE.NAME, of another."""
    return {"where": where, "tests": tests.split()}


def not_built(reason):
    return {"reason": reason}


FEATURES = {
    "LMCODE": {
        "10,000 slots a layer": built("memories.Store", "test_a_store_never_holds_more_than_its_slots_and_counts_what_it_lost"),
        "importance-weighted top-k": built("memories.threshold", "test_only_the_best_are_found"),
        "gate": built("memories.Store.answer", "test_statistics_are_scalars_that_it_names"),
        "consolidation on demand": built("memories.RevenaHybrid.consolidate", "test_a_user_stores_asks_and_consolidates"),
        "consolidation every so many steps": built("memories.Store.settle", "test_like_items_are_merged_into_the_oldest_as_means_weighted_by_counts"),
        "retrieval threshold": built("memories.Store.look", "test_nothing_below_the_threshold_is_found"),
        "replay": built("train.replayed", "test_train.test_replay_draws_from_what_was_seen"),
        "20% better sample efficiency by replay": built("train.replayed", "test_train.test_replay_draws_from_what_was_seen"),
        "store_experience, query_memory": built("memories.RevenaHybrid.query_memory", "test_a_user_stores_asks_and_consolidates"),
        "memory statistics, capacity and efficiency report": built("memories.Store.statistics", "test_a_store_never_holds_more_than_its_slots_and_counts_what_it_lost"),
        "memory-flow picture": built("plot_eval.draw_memory", "test_plot.test_the_memory_picture_says_what_a_prediction_drew_on"),
    },
    "Memory-Augmented Transformer": {
        "bank standard": built("memories.Bank", "test_whole_is_row_by_row_is_token_by_token"),
        "bank factorised": built("memories.Bank.slots_of", "test_a_low_rank_or_narrow_bank_is_smaller"),
        "bank of reduced dimension": built("memories.Bank.slots_of", "test_a_low_rank_or_narrow_bank_is_smaller"),
        "bank in chapters": built("memories.Bank.route", "test_the_routers_losses_are_part_of_the_objective_and_the_best_chapters_are_read"),
        "block variants A and B": built("memories.Bank.read", "test_whole_is_row_by_row_is_token_by_token"),
        "placement": built("memories.places_of", "test_where_a_memory_acts"),
        "shared or per layer": built("memories.Bank.slots_of", "test_a_low_rank_or_narrow_bank_is_smaller"),
        "router losses": built("memories.Bank.route", "test_the_routers_losses_are_part_of_the_objective_and_the_best_chapters_are_read"),
        "routing by token, rolling, hybrid": built("memories.Bank.fading", "test_nothing_of_the_future_is_seen"),
        "routing by sequence": not_built("the mean of a sequence looks ahead: a token would see those after it"),
        "quantised bank": not_built("655,000 numbers of 72 million: there is nothing to save"),
        "adapter on a pretrained model": built("memories.RevenaHosted", "test_hosted.test_off_it_is_the_model_bit_for_bit"),
        "LoRA": built("memories.Host.add_lora", "test_hosted.test_lora_starts_as_the_model_and_alone_learns"),
        "none, memory, LoRA, both": built("memories.RevenaHosted", "test_hosted.test_all_four_are_compared"),
        "DDP": built("train.Training.gradients", "test_train.test_the_shares_of_processes_add_up"),
    },
    "MemoryMAG": {
        "neural memory": built("memories.slopes_of", "test_the_gradient_written_by_hand_is_the_gradient"),
        "momentum, forgetting": built("memories.course_of", "test_the_weights_go_on_as_the_equations_say"),
        "persistent tokens": built("memories.Mag.recall", "test_from_the_second_step_on_every_parameter_has_a_gradient"),
        "query refinement": built("memories.Mag.project", "test_from_the_second_step_on_every_parameter_has_a_gradient"),
        "gate statistics": built("memories.Mag.answer", "test_statistics_are_scalars_that_it_names"),
        "diagnostics": built("memories.Mag.contents", "test_what_mag_holds_is_told"),
        "hash-hop, dependencies of 2 to 4 hops": built("eval.make_streamed", "test_eval.test_needles_and_chains_are_what_they_say"),
        "needle at 2,000 to 16,000 tokens": built("eval.make_streamed", "test_eval.test_needles_and_chains_are_what_they_say"),
        "code retrieval": not_built("a model of 10 million tokens of prose writes no code that could be looked up"),
        "patching a pretrained model": built("memories.RevenaHosted", "test_hosted.test_off_it_is_the_model_bit_for_bit"),
    },
    "GPT-2 + GRU": {
        "decay": built("memories.Fading", "test_half_lives_are_spread_from_a_few_tokens_to_a_thousand"),
        "a true GRU cell with decay": built("memories.Gru.cell", "test_the_cell_is_torchs_own"),
        "three hooks": built("memories.Gru.default_places", "test_what_a_gru_holds_is_told"),
        "persistent and ephemeral turns": built("models.RevenaCache.clear", "test_the_next_turn_remembers_and_a_cleared_cache_does_not"),
        "every decoding trick": built("models.RevenaHybridTiny", "test_every_way_to_generate"),
        "any GPT-2 checkpoint": built("memories.RevenaHosted", "test_hosted.test_off_it_is_the_model_bit_for_bit"),
        "activations over time shown": built("memories.Gru.contents", "test_what_a_gru_holds_is_told"),
    },
}


@pytest.mark.parametrize("relative", FEATURES)
def test_the_table_of_features_is_true(relative):
    """What is said to be built is there, and so are its tests; the rest has a reason."""
    for feature, about in FEATURES[relative].items():
        if "reason" in about:
            assert len(about["reason"]) > 20, feature
            continue
        module, _, path = about["where"].partition(".")
        source = (Path(memories.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        name = path.rpartition(".")[2]
        assert f"def {name}(" in source or f"class {name}(" in source, feature
        assert about["tests"], feature
        for test in about["tests"]:
            file, _, test = test.rpartition(".")
            assert f"\ndef {test}(" in Path(__file__).with_stem(file or "test_memories").read_text(encoding="utf-8"), test


def test_at_most_a_quarter_is_not_built():
    features = [about for table in FEATURES.values() for about in table.values()]
    assert sum("reason" in about for about in features) <= len(features) / 4
