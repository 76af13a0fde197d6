"""A checkpoint as its users meet it: a folder that transformers loads, generates from, and whose memory goes on."""

import copy
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import DynamicCache, TextStreamer

from memories import RevenaHybrid
from models import EOT, GPT, RevenaConfig, RevenaHybridTiny
from stages import load_model, load_tokenizer, save_model
from test_models import enliven

WINDOW, SLOTS = 16, 20
CLOSE = dict(atol=1e-4, rtol=0)
STORY = "The cat sat on the mat. The dog sat on the cat. The cat ran, the dog ran, and the mat stayed where it was."
GREEDY = dict(max_new_tokens=40, min_new_tokens=40)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir.parent.parent)


@pytest.fixture(scope="module")
def model():
    """A small model of the real vocabulary with a busy memory, which does not get to say everything by itself."""
    torch.manual_seed(6)
    config = RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_slots=SLOTS, ltm_sharpness=5.0,
                          ltm_plausibility=0.3, ltm_rare_bits=8.0, ltm_near=0.2)
    model = enliven(RevenaHybridTiny(config).eval(), spread=0.4)
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """The checkpoint alone, copied into a folder that holds nothing else."""
    made, alone = (tmp_path_factory.mktemp(name) for name in ("made", "alone"))
    save_model(model, tokenizer, made)
    return shutil.copytree(made, alone / "with_ltm")


@pytest.fixture(scope="module")
def ids(tokenizer):
    """(1, T) tokens, more than a window."""
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    assert ids.size(1) > WINDOW
    return ids


# ------------------------------------------------------------------------------------ the folder alone

LOADED = """
import copy, json, sys
sys.modules.update(dict.fromkeys(["datasets", "matplotlib", "pandas", "pyarrow", "wandb"]))     # as if not there
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from torch.utils.flop_counter import FlopCounterMode

folder = sys.argv[1]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

drawn = []                                  # how many items each prediction drew on

def go_on(ids, count, cache):
    def note(ids, scores):
        drawn.append(len(cache.retrieved()))
        return scores
    return model.generate(ids, past_key_values=cache, min_new_tokens=count, max_new_tokens=count, do_sample=True,
                          logits_processor=[note])

def last_turn(ids, cache):
    torch.manual_seed(7)
    return go_on(ids, 40, cache)[0, -40:].tolist()
"""

FIRST = LOADED + """
def measured(cache, ids):
    tensors = [*cache.tensors().values(), *cache.drawn.values()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids[:, -1:], past_key_values=copy.deepcopy(cache))
    return dict(shapes=[list(x.shape) for x in tensors], bytes=sum(x.untyped_storage().nbytes() for x in tensors),
                work=counter.get_total_flops())

ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
torch.manual_seed(0)
cache, after = model.new_cache(), {}
for count in json.loads(sys.argv[2]):
    ids = go_on(ids, count, cache)
    after[ids.size(1)] = measured(cache, ids)
cache.save("cache.safetensors")
torch.save(ids[:, -1:].clone(), "unread.pt")    # generate does not read the last token it gives
held, text = cache.contents(tokenizer), last_turn(ids, cache)
cache.clear()
forgot = cache.contents()
write = pipeline("text-generation", model=folder, trust_remote_code=True)
said = write("The cat sat on", max_new_tokens=9, do_sample=False, past_key_values=cache)[0]["generated_text"]
print(json.dumps(dict(module=type(model).__module__, text=text, held=held, after=after, drawn=drawn, forgot=forgot,
                      project="models" in sys.modules, without=last_turn(ids[:, -1:], model.new_cache()),
                      pipeline=[said, cache.get_seq_length()])))
"""

SECOND = LOADED + """
cache = model.load_cache("cache.safetensors")
print(json.dumps(dict(held=cache.contents(tokenizer), text=last_turn(torch.load("unread.pt"), cache))))
"""


def run_alone(where, *command):
    """Run python in the folder `where`, far from this project; the lines it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(where / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", *map(str, command)], cwd=where, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("counts", [[100, 100, 200], pytest.param([300, 300, 1400], marks=pytest.mark.slow)], ids=str)
def test_from_a_copy_alone_it_generates_and_remembers_across_processes(folder, model, tokenizer, tmp_path, counts):
    """2,000 tokens (or, to begin with, 400: many windows, too) in constant memory and work, by torch and transformers
    alone; saved, loaded elsewhere, it goes on.

    The later process has the memory's file and the one token that was not read yet; it does not need the text.
    """
    turns = []
    for name, script in (("first", FIRST), ("second", SECOND)):
        (tmp_path / f"{name}.py").write_text(script)
        turns.append(json.loads(run_alone(tmp_path, f"{name}.py", folder, counts)[-1]))
    first, second = turns
    assert first["module"].startswith("transformers_modules") and not first["project"]
    early, *later = first["after"].values()
    assert max(map(int, first["after"])) > sum(counts) and early["work"] > 0 and all(x == early for x in later)
    assert len(first["held"]) == SLOTS and first["forgot"] == []
    assert sum(map(bool, first["drawn"])) > sum(counts) / 10, "a memory that is hardly ever drawn on shows nothing"
    assert second["held"] == first["held"] and second["text"] == first["text"]
    assert first["without"] != first["text"], "a cleared memory must not go on as if it remembered"
    ids = tokenizer("The cat sat on", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=9, do_sample=False)[0]
    assert first["pipeline"] == [tokenizer.decode(said), len(said) - 1]


def test_the_folder_holds_what_the_hub_expects(folder, model):
    """Safetensors, a config that says where the code is, a generation config and the tokenizer; nothing pickled."""
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "models.py", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "models.RevenaHybridTiny" and config["dtype"] == "float32"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert [generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [EOT] * 3
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys(), "tied weights are stored once"


def test_loading_gives_back_the_very_bits(folder, model, ids, tmp_path):
    """from_pretrained, saved and loaded once more: equal weights, buffers and logits; nothing is left uninitialised."""
    once = RevenaHybridTiny.from_pretrained(folder)
    once.save_pretrained(tmp_path)
    for loaded in (once, RevenaHybridTiny.from_pretrained(tmp_path, attn_implementation="sdpa")):
        assert not loaded.training
        state, wanted = loaded.state_dict(), model.state_dict()
        assert all(torch.equal(state[n], wanted[n]) and state[n].dtype == wanted[n].dtype for n in wanted)
        assert loaded.get_input_embeddings().weight is loaded.backbone.embed.weight
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    fresh = RevenaHybridTiny(RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW))
    name = "backbone.rotary"                                # what no seed decides, not read from any file
    assert torch.equal(once.get_buffer(name), fresh.get_buffer(name))


def test_bfloat16_loads_and_generates(folder, model, ids):
    """dtype=torch.bfloat16 gives a model of that type that generates, normalised, and not far from float32."""
    half = RevenaHybridTiny.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.backbone.rotary, model.backbone.rotary), "angles must not be rounded to 8 bits"
    out = half.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert out.sequences.shape == (1, ids.size(1) + 40) and len(out.past_key_values.contents()) == SLOTS
    with torch.no_grad():
        logits = half(ids).logits
        assert (logits.exp().sum(-1) - 1).abs().max() < 1e-5
        half.config.memory_enabled = model.config.memory_enabled = False
        try:
            near = (half(ids).logits.exp() - model(ids).logits.exp()).abs().sum(-1).max()
        finally:
            model.config.memory_enabled = True
    assert near < 0.2, "total variation, doubled, of what the backbone says"


# ------------------------------------------------------------------------------------ generation

STRATEGIES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.9),
    "top-k": dict(do_sample=True, top_k=20),
    "top-p": dict(do_sample=True, top_p=0.8),
    "repetition penalty": dict(repetition_penalty=1.3),
    "beams": dict(num_beams=3),
    "sampling, several back": dict(do_sample=True, num_return_sequences=2),
    "sampled beams, several back": dict(num_beams=3, do_sample=True, num_return_sequences=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_gives_the_parallel_forms_text(model, ids, strategy):
    """Through the streaming memory it writes what it writes when the whole text is computed anew at each token."""
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(model.generate(ids, use_cache=use_cache, max_new_tokens=16, min_new_tokens=16, **strategy))
    assert torch.equal(*texts) and texts[0].size(1) == ids.size(1) + 16


@pytest.mark.parametrize("strategy", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_a_padded_batch_writes_what_each_writes_alone(model, tokenizer, strategy):
    """Prompts of unequal lengths, padded on the left by the tokenizer as it comes, and each prompt by itself."""
    prompts = [STORY, "Why?", "A cat, a dog and a mat: who sat where, and when was it that they"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all() and batch.attention_mask[:, -1].all()
    together = model.generate(**batch, **GREEDY, **strategy)[:, -40:]
    for row, prompt in enumerate(prompts):
        one = model.generate(tokenizer(prompt, return_tensors="pt").input_ids, **GREEDY, **strategy)[0, -40:]
        assert torch.equal(together[row], one), prompt


def test_a_text_that_ends_leaves_the_others_alone(model, tokenizer):
    """In a batch, the first text to reach the end is padded from there on; the others go on as they would have."""
    batch = tokenizer([STORY, "Why?", "A cat, a dog and a mat"], return_tensors="pt", padding=True)
    undisturbed = model.generate(**batch, **GREEDY)[:, -40:]
    end = next(token for token in undisturbed[1, 3:].tolist() if token not in undisturbed[0])
    at = undisturbed[1].tolist().index(end) + 1
    ended = model.generate(**batch, max_new_tokens=40, eos_token_id=end)[:, -40:]
    assert torch.equal(ended[0], undisturbed[0])
    assert torch.equal(ended[1, :at], undisturbed[1, :at]) and at < 40 and (ended[1, at:] == EOT).all()


@torch.no_grad()
def test_generate_hands_out_states_and_logits(model, ids):
    """output_hidden_states, output_logits and output_scores give, token by token, what the parallel form says."""
    out = model.generate(ids, **GREEDY, output_hidden_states=True, output_logits=True, output_scores=True,
                         return_dict_in_generate=True)
    whole = model(out.sequences[:, :-1], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.logits[:, ids.size(1) - 1:], **CLOSE)
    for layer, wanted in enumerate(whole.hidden_states):
        torch.testing.assert_close(torch.cat([step[layer] for step in out.hidden_states], 1), wanted, **CLOSE)
    said = out.sequences[:, ids.size(1):, None]
    torch.testing.assert_close(model.compute_transition_scores(out.sequences, out.scores),
                               whole.logits[:, ids.size(1) - 1:].gather(-1, said)[..., 0], **CLOSE)


def test_streaming_to_the_terminal(model, tokenizer, ids, capsys):
    """TextStreamer prints, piece by piece, the text that generate returns."""
    out = model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, ids.size(1):]).strip()


def test_assisted_decoding_is_refused(model, ids):
    """Guesses can't be taken back out of a memory: asking for that is an error that says so, like other wrong input."""
    for guesses in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=model)):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(ids, **GREEDY, **guesses)
    with pytest.raises(ValueError, match="unread"):
        model.new_cache().crop(-1)
    with pytest.raises(ValueError, match="must be a RevenaCache, not a DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match="input_ids"):
        model(ids, inputs_embeds=torch.zeros(1, 1, 64))


# ------------------------------------------------------------------------------------ the memory between turns

@pytest.fixture(params=["LTM", "LTM off", "GPT"])
def any_model(request, model, monkeypatch):
    """Every kind of model that a cache goes with."""
    if request.param == "GPT":
        torch.manual_seed(0)
        gpt = GPT(RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=None, memory_enabled=False)).eval()
        for p in gpt.backbone.blocks.parameters():
            p.data.mul_(6)                                  # or it only says its last token again
        return gpt
    monkeypatch.setattr(model.config, "memory_enabled", request.param == "LTM")
    return model


def test_a_second_turn_remembers_the_first(any_model, tokenizer):
    """The memory handed back in, with the whole text or with what is new alone: the same as one long context."""
    turns = [tokenizer([text, other], return_tensors="pt", padding=True, padding_side="left")
             for text, other in ((STORY, "Why?"), (" And what did the dog do?", " Because the cat was not there"))]
    first = any_model.generate(**turns[0], **GREEDY, past_key_values=(cache := any_model.new_cache(2)))
    said = turns[1].input_ids
    whole = dict(input_ids=torch.cat((first, said), 1),
                 attention_mask=F.pad(turns[0].attention_mask, (0, 40 + said.size(1)), value=1))
    wanted = any_model.generate(**whole, **GREEDY)[:, -40:]
    unread = whole["input_ids"][:, cache.get_seq_length():]            # generate never feeds its own last token
    assert unread.size(1) == 1 + said.size(1)
    for new in (whole, dict(input_ids=unread), dict(input_ids=unread, attention_mask=whole["attention_mask"])):
        again = any_model.generate(**new, **GREEDY, past_key_values=copy.deepcopy(cache))
        assert torch.equal(again[:, -40:], wanted)
    forgetful = any_model.generate(unread, **GREEDY)
    assert not torch.equal(forgetful[:, -40:], wanted), "the first turn must matter, or this shows nothing"


@pytest.mark.parametrize("pad", [0, EOT])
def test_a_second_turn_is_known_whatever_the_padding_is(any_model, ids, pad):
    """The whole text with its mask goes on from a padded batch; with one token changed it is refused."""
    batch, mask = ids[:, :20].expand(2, -1).clone(), torch.ones(2, 20, dtype=torch.long)
    batch[0, :5], mask[0, :5] = pad, 0
    cache = any_model.new_cache(2)
    said = any_model.generate(batch, attention_mask=mask, past_key_values=cache, pad_token_id=pad, **GREEDY)
    whole = dict(input_ids=torch.cat((said, ids[:, 20:24].expand(2, -1)), 1),
                 attention_mask=F.pad(mask, (0, said.size(1) - 20 + 4), value=1))
    wanted = any_model.generate(**whole, pad_token_id=pad, **GREEDY)
    edited = whole["input_ids"].clone()
    edited[1, 2] += 1
    with pytest.raises(ValueError, match="does not begin with"):
        any_model.generate(edited, attention_mask=whole["attention_mask"], past_key_values=cache, **GREEDY)
    assert torch.equal(any_model.generate(**whole, past_key_values=cache, pad_token_id=pad, **GREEDY), wanted)


def test_new_text_longer_than_the_old_is_not_cut(any_model, ids):
    """A text that could be the whole so far, but is not, is refused, never cut; so is one that brings nothing new."""
    old, new = ids[:, :8], ids[:, 10:30]
    with torch.no_grad():
        cache = any_model(old, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"does not begin with the 8 .*torch.ones\(1, 28\)"):
        any_model.generate(new, past_key_values=cache, **GREEDY)
    edited = torch.cat((old, new), 1)
    edited[0, 2] += 1                                   # long before the last token read
    with pytest.raises(ValueError, match="does not begin with the 8"):
        any_model.generate(edited, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="no tokens"):
        any_model.generate(old, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="1 sequences, not 3"):
        any_model.generate(new, past_key_values=cache, num_beams=3, **GREEDY)
    assert cache.get_seq_length() == 8
    got = any_model.generate(new, past_key_values=cache, attention_mask=torch.ones(1, 28), **GREEDY)
    assert torch.equal(got[:, -40:], any_model.generate(torch.cat((old, new), 1), **GREEDY)[:, -40:])


def test_a_copy_goes_its_own_way(model, ids):
    """deepcopy forks a memory without copying the model; beams take copies of it, and write as from the whole text."""
    cache = model.new_cache()
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    fork, beams = copy.deepcopy(cache), copy.deepcopy(cache)
    assert fork.model is model
    before = {name: x.clone() for name, x in cache.tensors().items()}
    with torch.no_grad():
        model(ids, past_key_values=fork)
    assert all(torch.equal(x, before[name]) for name, x in cache.tensors().items()) and len(cache.contents())
    beams.batch_repeat_interleave(3)
    assert torch.equal(model.generate(ids, past_key_values=beams, num_beams=3, **GREEDY),
                       model.generate(ids, num_beams=3, **GREEDY))


def test_contents_and_retrieved_can_be_read(model, tokenizer, ids):
    """What is stored, with what surprisal and when; what the last prediction drew on, with what cosine and share."""
    out = model.generate(ids, do_sample=True, **GREEDY, return_dict_in_generate=True)
    cache, text = out.past_key_values, out.sequences[0].tolist()
    held = cache.contents(tokenizer)
    assert 0 < len(held) <= SLOTS and [i["position"] for i in held] == sorted({i["position"] for i in held})
    for item in held:
        assert item["token"] == text[item["position"]] and item["text"] == tokenizer.decode([item["token"]])
        assert item["bits"] > model.config.ltm_surprisal_bits
    stored = {(item["token"], item["position"]) for item in held}
    drawn = 0
    with torch.no_grad():
        for token in text[-12:]:
            log_p = model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0]
            found = cache.retrieved(tokenizer)
            stored |= {(item["token"], item["position"]) for item in cache.contents()}
            assert sum(item["share"] for item in found) <= 1 + 1e-6
            for item in found:
                assert item["cosine"] > model.config.ltm_cosine
                assert 0 < item["share"] <= float(log_p[item["token"]].exp()) + 1e-6
                assert (item["token"], item["position"]) in stored
                assert item["text"] == tokenizer.decode([item["token"]])
            drawn += len(found)
    assert drawn, "a memory from which nothing is ever drawn shows nothing here"


def test_a_memory_of_another_model_is_refused(model, ids, tmp_path):
    """`load_cache` says so where a file holds the memory of a model of another shape, or no memory at all."""
    cache = model.new_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    back = model.load_cache(tmp_path / "cache.safetensors")
    assert back.contents() == cache.contents() and back.get_seq_length() == ids.size(1)
    other = RevenaHybridTiny(RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_slots=SLOTS + 1))
    with pytest.raises(ValueError, match="not a memory of this model"):
        other.load_cache(tmp_path / "cache.safetensors")
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load_cache(tmp_path / "cache.safetensors")                 # the same weights, if not the same model
    with torch.no_grad():
        twin.backbone.embed.weight[7, 7] += 1e-6
    with pytest.warns(UserWarning, match="saved by a model with other weights"):
        twin.load_cache(tmp_path / "cache.safetensors")
    with torch.no_grad():
        twin.backbone.embed.weight.copy_(model.backbone.embed.weight)
        twin.backbone.embed.weight[[7, 8]] = model.backbone.embed.weight[[8, 7]]
    with pytest.warns(UserWarning, match="saved by a model with other weights"):
        twin.load_cache(tmp_path / "cache.safetensors")
    tensors = load_file(tmp_path / "cache.safetensors")
    save_file({"tail": tensors.pop("digest"), **tensors}, tmp_path / "old.safetensors", metadata={"length": "8"})
    with pytest.raises(ValueError, match="or of an earlier models.py"):
        model.load_cache(tmp_path / "old.safetensors")
    save_file({"count": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="not a memory that cache.save"):
        model.load_cache(tmp_path / "none.safetensors")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_modes_of_a_saved_model_and_memory_follow_the_umask(model, tmp_path, mask):
    """Also where a user saves them: whole, in several files, or the memory alone."""
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "[one]")
        model.save_pretrained(tmp_path / "several", max_shard_size="100KB")
        model.new_cache().save(tmp_path / "cache.safetensors")
    finally:
        os.umask(before)
    written = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".safetensors" for path in written) > 3 and set(written.values()) == {0o666 & ~mask}


def test_gpt_without_a_window_keeps_its_cache_too(ids, tmp_path):
    """GPT's cache, which grows, saves, loads and goes on as well."""
    torch.manual_seed(0)
    gpt = GPT(RevenaConfig(n_layer=1, n_embd=64, n_head=2, stm_window=None, memory_enabled=False, n_positions=256)).eval()
    first = gpt.generate(ids, **GREEDY, return_dict_in_generate=True)
    first.past_key_values.save(tmp_path / "cache.safetensors")
    whole = F.pad(first.sequences, (0, 3), value=11)
    back = gpt.load_cache(tmp_path / "cache.safetensors")
    assert torch.equal(gpt.generate(whole, past_key_values=back, **GREEDY), gpt.generate(whole, **GREEDY))


# ------------------------------------------------------------------------------------ as other tools use it

@torch.no_grad()
def same_as(model, ids, logits):
    torch.testing.assert_close(model(ids).logits, logits, **CLOSE)


PACKED = torch.cat((torch.arange(9), torch.arange(9)))[None]            # two documents in one row
NOT_HONOURED = {
    "documents packed by positions": (dict(position_ids=PACKED), "position_ids that restart"),
    "one row of positions for all": (dict(position_ids=PACKED[0]), "position_ids that restart"),
    "positions that jump": (dict(position_ids=2 * torch.arange(18)[None]), "position_ids that restart or jump"),
    "positions of another length": (dict(position_ids=torch.arange(9)[None]), "position_ids have the shape"),
    "documents packed by the mask": (dict(attention_mask=1 + (PACKED > 4).long()), "packed into one row"),
    "a mask over pairs": (dict(attention_mask=torch.ones(1, 1, 18, 18).tril()), "attention_mask has the shape"),
    "a longer mask": (dict(attention_mask=torch.ones(1, 20)), "attention_mask has the shape"),
    "a shorter mask": (dict(attention_mask=torch.ones(1, 16)), "attention_mask has the shape"),
    "a mask with a hole": (dict(attention_mask=(torch.arange(18) != 5)[None].long()), "holes|pad only|pad on the left"),
    "shifted labels": (dict(labels=torch.zeros(1, 17, dtype=torch.long)), "labels have the shape"),
    "positions to keep below zero": (dict(logits_to_keep=-3), "logits_to_keep is a number"),
    "embeddings": (dict(inputs_embeds=torch.zeros(1, 18, 64)), "takes input_ids"),
    "attentions": (dict(output_attentions=True), "gives no attentions"),
    "another model's cache": (dict(past_key_values=DynamicCache()), "must be a RevenaCache"),
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("given, says", NOT_HONOURED.values(), ids=NOT_HONOURED)
def test_what_is_not_honoured_is_refused(model, ids, given, says, use_cache):
    """By both paths, in one line, and nothing of transformers' contract is taken and left aside."""
    with pytest.raises(ValueError, match=says) as refusal:
        model(ids[:, :18], use_cache=use_cache, **given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrong, says", [
    (torch.zeros(5, dtype=torch.long), "token numbers of shape"), (torch.zeros(1, 5), "token numbers of shape"),
    (torch.zeros(1, 0, dtype=torch.long), "no tokens"), (torch.tensor([[1, 50257]]), "resize_token_embeddings"),
    (torch.tensor([[1, -100]]), "a token is not among")], ids=["a line", "floats", "none", "not added", "ignored labels"])
def test_input_that_is_no_batch_of_tokens_is_refused(model, wrong, says):
    with pytest.raises(ValueError, match=says):
        model(wrong)


def test_unknown_arguments_raise(model, ids):
    """Of forward and of generate, and what Trainer may turn on but this model has not."""
    for unknown in (dict(token_type_ids=ids), dict(encoder_hidden_states=ids), dict(attention_maks=ids)):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            model(ids, **unknown)
        with pytest.raises(ValueError, match=next(iter(unknown))):
            model.generate(ids, **unknown, **GREEDY)
    with pytest.raises(ValueError, match="position_ids that restart"):
        model.generate(ids[:, :18], position_ids=PACKED, **GREEDY)
    with pytest.raises(ValueError, match="checkpointing"):
        model.gradient_checkpointing_enable()


@torch.no_grad()
def test_a_second_turn_whose_positions_begin_anew_is_refused(model, ids):
    """That would be another document, which is to see nothing of the first; positions that go on are taken."""
    cache = model(ids[:, :10], use_cache=True).past_key_values
    for first in (0, 3, 30):
        with pytest.raises(ValueError, match="restart or jump"):
            model(ids[:, 10:14], past_key_values=cache, position_ids=first + torch.arange(4)[None])
        with pytest.raises(ValueError, match="restart or jump"):
            model(ids[:, 10:11], past_key_values=cache, position_ids=torch.tensor([[first]]))
    assert cache.get_seq_length() == 10
    how = dict(position_ids=10 + torch.arange(4)[None], attention_mask=torch.ones(1, 14))
    got = model(ids[:, 10:14], past_key_values=cache, **how).logits
    torch.testing.assert_close(got, model(ids[:, :14]).logits[:, 10:], **CLOSE)
    same_as(lambda x: model(x, position_ids=7 + torch.arange(ids.size(1))[None]), ids, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_what_is_asked_by_name_or_by_the_config_is_given(model, ids, use_cache, monkeypatch):
    """Single positions of the logits; hidden states, a tuple and a cache where only the config asks for them."""
    whole = model(ids).logits
    for keep in (torch.tensor([3]), torch.tensor([5, 0, 5]), 2, ids.size(1)):
        got = model(ids, logits_to_keep=keep, use_cache=use_cache).logits
        torch.testing.assert_close(got, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep], **CLOSE)
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    monkeypatch.setattr(model.config, "use_cache", use_cache, raising=False)
    said = model(ids)
    assert len(said.hidden_states) == model.config.n_layer + 1 and (said.past_key_values is not None) == use_cache
    monkeypatch.setattr(model.config, "return_dict", False, raising=False)
    assert isinstance(model(ids), tuple)


CHUNKED = {"new alone": False, "the whole text": True}


@pytest.mark.parametrize("whole", CHUNKED.values(), ids=CHUNKED)
@pytest.mark.parametrize("size", [1, WINDOW, 500])
def test_a_prefill_in_chunks_is_a_prefill(any_model, ids, whole, size):
    """After 20 tokens read: the same text and as many tokens read, whether what is new comes alone or behind the old."""
    old, new = ids[:, :20], ids[:, 3:20]
    cache = any_model.new_cache()
    with torch.no_grad():
        any_model(old, past_key_values=cache)
    given, found = torch.cat((old, new), 1) if whole else new, []
    for chunks in ({}, dict(prefill_chunk_size=size)):
        trial = copy.deepcopy(cache)
        text = any_model.generate(given, past_key_values=trial, max_new_tokens=5, min_new_tokens=5, **chunks)
        assert trial.get_seq_length() == 20 + new.size(1) + 4
        found.append(text[:, -5:])
    assert torch.equal(*found)


def test_a_prefill_in_chunks_of_a_padded_batch(model, tokenizer):
    batch = tokenizer([STORY, "Why?"], return_tensors="pt", padding=True)
    assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=7), model.generate(**batch, **GREEDY))
    how = copy.deepcopy(model.generation_config)
    how.prefill_chunk_size, how.max_new_tokens = 7, 5
    assert torch.equal(model.generate(**batch, generation_config=how), model.generate(**batch, max_new_tokens=5))


def test_a_prefill_in_chunks_refuses_what_one_at_once_does(any_model, ids):
    """The guards hang on both paths: a text that does not begin with what was read, and one that brings nothing new."""
    with torch.no_grad():
        cache = any_model(ids[:, :8], use_cache=True).past_key_values
    for wrong, says in ((ids[:, 10:30], "does not begin with the 8"), (ids[:, :8], "no tokens")):
        for chunks in ({}, dict(prefill_chunk_size=4)):
            with pytest.raises(ValueError, match=says):
                any_model.generate(wrong, past_key_values=cache, **GREEDY, **chunks)
    assert cache.get_seq_length() == 8


# ------------------------------------------------------------------------------------ compiled

@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(use_cache=False), dict(num_beams=2), dict(do_sample=True)], ids=str)
def test_compiled_every_strategy_gives_its_text(model, ids, how):
    how = dict(max_new_tokens=3, min_new_tokens=3) | how
    torch.manual_seed(3)
    wanted = model.generate(ids, **how)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    twin.compile(backend="eager")
    torch.manual_seed(3)
    assert torch.equal(twin.generate(ids, **how), wanted)


@torch.no_grad()
def test_compiled_it_goes_on_from_turn_to_turn(model, ids):
    """By torch.compile(model) as by model.compile(): the cache that is passed in again is the one that was filled."""
    torch._dynamo.reset()
    compiled, cache = torch.compile(model, backend="eager"), model.new_cache()
    parts = [compiled(part, past_key_values=cache).logits for part in ids.split(9, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **CLOSE)
    assert cache.get_seq_length() == ids.size(1) and cache.contents() and cache.retrieved() is not None
    fork = copy.deepcopy(cache)
    torch.testing.assert_close(compiled(ids[:, :1], past_key_values=fork).logits,
                               model(ids[:, :1], past_key_values=cache).logits, **CLOSE)


def test_a_cache_that_grows_is_not_compiled():
    gpt = GPT(RevenaConfig(n_layer=1, n_embd=64, n_head=2, stm_window=None, memory_enabled=False, n_positions=256))
    with pytest.raises(ValueError, match="the cache of this model grows"):
        gpt.new_cache(compiled=True)


# ------------------------------------------------------------------------------------ shapes

def resized(model, tokenizer, *texts):
    """A copy of both with more tokens."""
    model, tokenizer = copy.deepcopy(model), copy.deepcopy(tokenizer)
    assert tokenizer.add_tokens(list(texts)) == len(texts)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 47, 48, 200])
def test_a_folder_with_added_tokens_round_trips(model, tokenizer, tmp_path, count):
    """Below, at and above the next multiple of 64 rows: saved and loaded it says the same, new tokens included."""
    larger, words = resized(model, tokenizer, *(f"<|word {i}|>" for i in range(count)))
    assert larger.config.vocab_size == len(words) == 50257 + count and larger.backbone.embed.weight.size(0) % 64 == 0
    ids = words(f"The cat <|word 0|> sat <|word {count - 1}|> on", return_tensors="pt").input_ids
    assert ids.max() == 50256 + count
    save_model(larger, words, tmp_path)
    back = RevenaHybridTiny.from_pretrained(tmp_path)
    logits = back(ids).logits
    assert logits.size(-1) == 50257 + count and torch.equal(logits, larger(ids).logits)
    assert torch.equal(back.generate(ids, max_new_tokens=5), larger.generate(ids, max_new_tokens=5))
    ours = load_model(tmp_path)
    assert torch.equal(ours(ids).logits, logits) and len(load_from(tmp_path)) == 50257 + count


def load_from(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_room_for_more_tokens_changes_no_other(model, ids):
    """What the old tokens say of each other stays; a new row is like the mean of them; asked for nothing, nothing is done."""
    larger, before = copy.deepcopy(model), model(ids).logits
    assert larger.resize_token_embeddings() is larger.get_input_embeddings() and larger.config.vocab_size == 50257
    embed = larger.resize_token_embeddings(50300)
    mean = model.backbone.embed.weight[:50257].mean(0)
    assert embed is larger.get_output_embeddings() or larger.get_output_embeddings() is None
    assert (embed.weight[50257:50300].mean(0) - mean).norm() < mean.norm() + 0.05
    larger.config.memory_enabled = False
    model = copy.deepcopy(model)
    model.config.memory_enabled = False
    known = larger.logits(larger.states(ids)[0])[..., :50257]
    assert torch.equal(known, model.logits(model.states(ids)[0])) and before.shape == known.shape
    assert larger.resize_token_embeddings(50257).weight.shape == (50304, 64)
    assert torch.equal(larger(ids).logits, model(ids).logits)
    assert larger.resize_token_embeddings(50257, pad_to_multiple_of=100).weight.size(0) == 50304
    assert larger.config.vocab_size == 50300


def test_a_vocabulary_or_embedding_that_cannot_be_is_refused(model):
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"1000 tokens is without <\|endoftext\|>"):
        twin.resize_token_embeddings(1000)
    with pytest.raises(ValueError, match="the output matrix, too"):
        twin.set_input_embeddings(torch.nn.Embedding(50304, 64))
    assert twin.config.vocab_size == 50257 and twin.backbone.embed.weight.size(0) == 50304


@torch.no_grad()
def test_a_memory_goes_on_after_tokens_were_added(model, tokenizer, ids, tmp_path):
    """Its file does not depend on how many tokens there are."""
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    larger, words = resized(model, tokenizer, "<|new|>")
    back = larger.load_cache(tmp_path / "cache.safetensors")
    assert back.contents() == cache.contents()
    larger(words("<|new|> cat", return_tensors="pt").input_ids, past_key_values=back)
    assert back.get_seq_length() == ids.size(1) + 2


LACKING = {"another window": dict(stm_window=32), "other addresses": dict(ltm_dim=32), "another memory": dict(memory="gru")}


@pytest.mark.parametrize("changed", LACKING.values(), ids=LACKING)
def test_what_a_folder_lacks_starts_as_in_a_new_model(folder, changed):
    """Loaded as a model of other shapes, what does not fit is as the constructor makes it, never what memory held."""
    kind = RevenaHybrid if "memory" in changed else RevenaHybridTiny
    torch.manual_seed(0)
    loaded = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **changed)
    torch.manual_seed(0)
    fresh, stored = kind(copy.deepcopy(loaded.config)).state_dict(), load_file(folder / "model.safetensors")
    for name, x in loaded.state_dict().items():
        same = name in stored and stored[name].shape == x.shape
        assert x.isfinite().all() and (torch.equal(x, stored[name]) if same else x.std() < 2 * fresh[name].std() + 1e-6)
    assert torch.equal(loaded.backbone.rotary, fresh["backbone.rotary"])
    _, about = kind.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True, **changed)
    assert about["missing_keys"] or about["mismatched_keys"]


def test_adapters_of_the_embedding(model, ids, tmp_path):
    """One that knows only half of a tied matrix is refused; the matrix itself, trained whole, is saved and comes back."""
    from peft import LoraConfig, PeftModel, get_peft_model

    for target in (dict(target_modules=["embed"]), dict(target_modules=["up"], trainable_token_indices=[5])):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **target))
        with pytest.raises(ValueError, match="modules_to_save"):
            adapted(ids)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(50300)
    adapted = get_peft_model(larger, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["embed"],
                                                init_lora_weights=False))
    adapted(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in adapted.parameters():
            p += 0.01 * (0 if p.grad is None else p.grad.sign())
    adapted.save_pretrained(tmp_path)
    plain = copy.deepcopy(model)
    plain.resize_token_embeddings(50300)
    back = PeftModel.from_pretrained(plain, tmp_path)
    same_as(back, ids, adapted(ids).logits.detach())


# ------------------------------------------------------------------------------------ devices

def test_one_device_whatever_the_map_is_called(folder, model, ids):
    for where in ("auto", "balanced", "cpu", {"": "cpu"}, {"backbone": "cpu", "memory": "cpu"}):
        loaded = RevenaHybridTiny.from_pretrained(folder, device_map=where)
        assert len({p.device for p in loaded.parameters()}) == 1
        same_as(loaded.cpu(), ids, model(ids).logits.detach())


@pytest.mark.parametrize("parts", [
    {"backbone": "cpu", "memory": "disk"}, {"backbone": 0, "memory": 1}, {"backbone": "cpu", "memory": "meta"}], ids=str)
def test_a_map_of_several_devices_is_refused(folder, parts):
    with pytest.raises(ValueError, match="one device"):
        RevenaHybridTiny.from_pretrained(folder, device_map=parts)


@pytest.mark.parametrize("how", ["to the CPU", "to the disk", "the memory alone"])
def test_an_offloaded_model_is_refused(model, ids, tmp_path, how):
    """accelerate sends weights to a module when it is called, and a memory is used without a call."""
    from accelerate import cpu_offload, disk_offload, dispatch_model

    twin = copy.deepcopy(model)
    if how == "to the CPU":
        cpu_offload(twin, "cpu")
    elif how == "to the disk":
        disk_offload(twin, tmp_path, "cpu")
    else:
        dispatch_model(twin, {"backbone": "cpu", "memory": "disk"}, main_device="cpu", offload_dir=tmp_path)
    for use in (twin, twin.generate):
        with pytest.raises(ValueError, match="works on one") as refusal:
            use(ids)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="works on one"):
        twin.new_cache()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: a map over both")
def test_two_gpus(folder, model, ids):
    """"auto" is the current one; both, or one part moved by hand, are an error, never other numbers."""
    loaded = RevenaHybridTiny.from_pretrained(folder, device_map="auto")
    assert {p.device.index for p in loaded.parameters()} == {torch.cuda.current_device()}
    torch.testing.assert_close(loaded(ids.cuda()).logits.cpu(), model(ids).logits, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="one device"):
        RevenaHybridTiny.from_pretrained(folder, device_map={"backbone": 0, "memory": 1})
    from accelerate import dispatch_model
    with pytest.raises(ValueError, match="works on one"):
        dispatch_model(loaded, {"backbone": 0, "memory": 1})(ids.cuda())


SHARDED = """
import os, sys
sys.path[:0] = sys.argv[3:]
import torch, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from models import Backbone, Block
from test_memories import make, text

torch.set_num_threads(1)
rank = int(os.fork() == 0)                              # here, so that the libraries are imported once
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
ids, cpu, how = text(2, 40), torch.device("cpu"), dict(max_new_tokens=3, min_new_tokens=3)

def refused(use):
    try:
        use(ids)
    except ValueError as error:
        assert "FSDP" in str(error) and chr(10) not in str(error), error
    else:
        raise AssertionError("not refused")

for kind in sys.argv[2:3]:
    alone = make(kind)
    wanted = alone(ids, labels=ids)
    wanted.loss.backward()
    with torch.no_grad():
        said = alone.generate(ids, **how)
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    for policy in (None, ModuleWrapPolicy({Block})):
        model = make(kind)
        sharded = FSDP(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=policy is not None)
        refused(model.generate)
        got = sharded(ids, labels=ids)
        torch.testing.assert_close(got.logits, wanted.logits)
        got.loss.backward()
        with FSDP.summon_full_params(sharded, with_grads=policy is not None, writeback=False), torch.no_grad():
            assert torch.equal(model.generate(ids, **how), said)
            for name, p in model.named_parameters() if policy else ():
                torch.testing.assert_close(p.grad, gradients[name.replace("_fsdp_wrapped_module.", "")])
    model = make(kind)
    for block in model.backbone.blocks:
        fully_shard(block)
    fully_shard(model)
    cache = model.new_cache(2)
    with torch.no_grad():
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), said)
    if rank == 0:                                       # one process alone, which must not wait for the other
        cache.save(sys.argv[1] + ".memory")
        assert alone.load_cache(sys.argv[1] + ".memory").contents() == cache.contents()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), gradients[name])
    refused(FSDP(make(kind), auto_wrap_policy=ModuleWrapPolicy({Backbone}), device_id=cpu))
    model = make(kind)
    fully_shard(model.memory)
    refused(fully_shard(model))
assert rank == 1 or os.wait()[1] == 0, "the other process failed"
print("right")
"""


@pytest.mark.parametrize("kind", ["ltm", pytest.param("mag", marks=pytest.mark.slow)])
def test_fsdp_of_two_processes(tmp_path, kind):
    """As a whole and Block by Block, by FSDP and by fully_shard: logits, gradients and text of a model alone; else refused."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, *map(str, (tmp_path / "sharded.py", tmp_path / "meeting", kind,
                                                      tests.parent, tests))],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.split() == ["right"] * 2, done.stderr[-3000:]


# ------------------------------------------------------------------------------------ empty texts

def test_an_empty_text_beside_another(any_model, tokenizer):
    """["", "text"] with and without a cache: the other's text is its own, and "" goes on as from <|endoftext|>."""
    batch = tokenizer(["", "A cat, a dog and a mat"], return_tensors="pt", padding=True)
    alone = [any_model.generate(x, **GREEDY)[0, -40:] for x in (torch.tensor([[EOT]]), batch.input_ids[1:])]
    for use_cache in (True, False):
        texts = any_model.generate(**batch, **GREEDY, use_cache=use_cache)[:, -40:]
        assert torch.equal(texts[1], alone[1]) and texts[0, 0] == alone[0][0]
    with torch.no_grad():
        one, other = (any_model(**batch, use_cache=use_cache).logits for use_cache in (True, False))
    assert one.isfinite().all() and other.isfinite().all()
    torch.testing.assert_close(one[0, -1], other[0, -1], **CLOSE)
    torch.testing.assert_close(one[1], other[1], **CLOSE)


# ------------------------------------------------------------------------------------ the usual harness

@torch.no_grad()
def test_loglikelihoods_as_the_harness_asks_for_them(model, tokenizer, ids):
    """lm-evaluation-harness pads on the right, gives no mask, and takes log_softmax over the logits."""
    pairs = [(" The dog", " sat on the cat"), (STORY, " The dog ran"), ("", " mat")]
    rows = [tokenizer.encode(context) or [EOT] for context, _ in pairs]
    wholes = [row + tokenizer.encode(more) for row, (_, more) in zip(rows, pairs)]
    longest = max(map(len, wholes))
    batch = torch.tensor([whole[:-1] + [EOT] * (longest - len(whole)) for whole in wholes])
    logits = model(batch).logits
    log_p = F.log_softmax(logits, dim=-1)
    torch.testing.assert_close(log_p, logits, atol=5e-5, rtol=0)
    for row, (context, whole) in enumerate(zip(rows, wholes)):
        whole = torch.tensor([whole])
        labels = whole.clone()
        labels[0, :len(context)] = -100
        asked = slice(len(context) - 1, whole.size(1) - 1)
        got = log_p[row, asked].gather(1, whole[0, len(context):, None]).sum()
        alone = -model(whole, labels=labels).loss * (whole.size(1) - len(context))
        assert float(got) == pytest.approx(float(alone), abs=1e-3)


@torch.no_grad()
def test_rolling_perplexity_as_the_harness_asks_for_it(model, ids):
    """A document that fits into max_length is scored with one memory across all of it, like a stream of its tokens."""
    document = ids[0].repeat(3)
    tokens = F.pad(document, (1, 0), value=EOT)[None]                   # the harness puts <|endoftext|> first
    whole = model(tokens[:, :-1]).logits[0].gather(1, document[:, None]).sum()
    stream, cache = 0.0, model.new_cache()
    for t in range(len(document)):
        stream += model(tokens[:, t:t + 1], past_key_values=cache).logits[0, 0, document[t]]
    assert float(stream) == pytest.approx(float(whole), abs=1e-2)


def installed(*names):
    return pytest.mark.skipif(not all(map(importlib.util.find_spec, names)),
                              reason=f"not installed: {', '.join(names)}; pip install 'lm-eval[hf]==0.4.13'")


TASKS = {       # the three ways in which the harness asks
    "rolling": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
                    metric_list=[dict(metric="bits_per_byte")]),
    "choice": dict(output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice=["mat", "a dog ran"],
                   doc_to_target=0, metric_list=[dict(metric="acc")]),
    "writing": dict(output_type="generate_until", doc_to_text="{{text}}", doc_to_target="mat",
                    generation_kwargs=dict(until=["\n\n"], max_gen_toks=20, do_sample=False),
                    metric_list=[dict(metric="exact_match")]),
}


@installed("lm_eval", "accelerate")
@torch.no_grad()
def test_the_harness_itself(folder, model, tokenizer, tmp_path, monkeypatch):
    """lm_eval --model hf on three small tasks, without a network: what it gives is what the model itself says."""
    texts = [STORY, f"Why? {STORY} {STORY * 3}"]
    (tmp_path / "texts.json").write_text("\n".join(json.dumps(dict(text=text)) for text in texts))
    for name, task in TASKS.items():
        source = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "texts.json"))))
        (tmp_path / f"{name}.yaml").write_text(json.dumps(dict(task=name, test_split="test", **source, **task)))
    run_alone(tmp_path, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True",
              "--tasks", ",".join(TASKS), "--include_path", tmp_path, "--output_path", tmp_path / "out",
              "--log_samples", "--device", "cpu", "--batch_size", 2)
    answers = {}
    for name in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        answers[name] = [sample["filtered_resps"] for sample in samples]

    def own_score(ids):                                     # as eval.py reads a document: rows, one memory over all
        tokens, targets = (F.pad(x, (0, -len(ids) % WINDOW), value=EOT).view(-1, WINDOW)
                           for x in (F.pad(ids[:-1], (1, 0), value=EOT), ids))
        scores = model.score(tokens, targets, (torch.arange(len(tokens)) == 0)[None])
        return float(scores.log_p[targets != EOT].sum())

    bits = 0
    for text, (rolling,), choices, (written,) in zip(texts, *answers.values(), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert float(rolling) == pytest.approx(own_score(ids[0]), abs=1e-2)
        bits -= float(rolling) / math.log(2)
        for choice, (got, _) in zip(TASKS["choice"]["doc_to_choice"], choices, strict=True):
            more = tokenizer(f" {choice}", return_tensors="pt").input_ids
            log_p = model(torch.cat((ids, more), 1)).logits[:, ids.size(1) - 1:-1].gather(-1, more[..., None]).sum()
            assert float(got) == pytest.approx(float(log_p), abs=1e-2)
        own = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1):]
        assert written == tokenizer.decode(own, skip_special_tokens=True)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(bits / sum(len(text.encode()) for text in texts), abs=1e-4)
    monkeypatch.setattr(model.config, "memory_enabled", False)
    off = [own_score(tokenizer(text, return_tensors="pt").input_ids[0]) for text in texts]
    assert all(abs(float(rolling) - other) > 10 for (rolling,), other in zip(answers["rolling"], off))


@installed("accelerate")
def test_trainers_accumulated_steps_are_steps_of_the_whole_batch(folder, ids, tmp_path):
    """transformers.Trainer: two batches of one, accumulated, move the weights as one batch of two does."""
    from transformers import Trainer, TrainingArguments     # seconds, and not everyone who comes here needs it
    texts = [dict(input_ids=x, labels=x) for x in (ids[0, :20], ids[0, 5:25])]
    after = []
    for size in (1, 2):
        model = RevenaHybridTiny.from_pretrained(folder)
        how = dict(per_device_train_batch_size=size, gradient_accumulation_steps=2 // size, max_steps=1, optim="sgd",
                   learning_rate=0.1, max_grad_norm=0, use_cpu=True, report_to=[], save_strategy="no")
        Trainer(model, TrainingArguments(str(tmp_path), disable_tqdm=True, **how), train_dataset=texts).train()
        after.append(model.backbone.blocks[0].up.weight.detach())
    torch.testing.assert_close(*after)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_replays_single_tokens(model):
    """On a GPU single tokens are a replayed CUDA graph: the same as `stream`, also after all that can come between."""
    gpu = copy.deepcopy(model).cuda()
    ids = torch.randint(0, EOT, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        replayed, plain = gpu.new_cache(2), gpu.new_cache(2)

        def check(tokens):
            got = gpu(tokens, past_key_values=replayed).logits
            wanted = torch.cat([gpu.stream(block, plain) for block in tokens.split(WINDOW, 1)], 1)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            assert replayed.length == plain.length
            held = [[(i["token"], i["position"]) for i in m.contents()] for m in (replayed, plain)]
            assert held[0] == held[1]
            for row in range(len(tokens)):
                found = [{i["position"]: i["share"] for i in m.retrieved(sequence=row)} for m in (replayed, plain)]
                assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)

        check(ids[:, :20])
        for t in range(20, 60):
            check(ids[:, t:t + 1])
        assert set(replayed.graphs) == {(1, 0, False)}
        check(ids[:, 60:70])
        check(ids[:, 70:71])
        for cache in (replayed, plain):
            cache.reorder_cache(torch.tensor([1, 0]))
        check(ids[:, 71:72])
        twin = copy.deepcopy(replayed)
        check(ids[:, 72:73])
        assert twin.length == 72 and not twin.graphs, "a copy stays where it was"
        gpu.config.ltm_sharpness, recorded = 9.0, replayed.graphs[1, 0, False]
        check(ids[:, 73:74])
        assert replayed.graphs[1, 0, False] is not recorded, "a graph has the settings that it was made with"
        for cache in (replayed, plain):
            cache.batch_repeat_interleave(2)
        check(ids[:, 74:75].repeat_interleave(2, 0))
        for cache in (replayed, plain):
            cache.clear(2)
        check(ids[:, :1])
        check(ids[:, 1:1 + 9 * WINDOW + 5])             # many whole windows, and what is left over
        assert set(replayed.graphs) == {(1, 0, False), (WINDOW, 0, False)}
        check(ids[:, 250:251])
        last = gpu(ids, past_key_values=replayed, logits_to_keep=1).logits
        torch.testing.assert_close(last, gpu(ids, past_key_values=plain).logits[:, -1:], rtol=1e-4, atol=1e-4)
