"""A checkpoint as its users meet it: a folder that transformers loads, generates from, and whose memory goes on."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DynamicCache, TextStreamer

import models
from models import EOT, GPT, Memory, RevenaConfig, RevenaHybridTiny, load_tokenizer, save_model
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
    torch.manual_seed(0)
    config = RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_slots=SLOTS)
    model = enliven(RevenaHybridTiny(config).eval(), spread=0.4)
    trust = slice(model.memory.sizes[0], sum(model.memory.sizes[:2]))
    with torch.no_grad():
        model.memory.from_state.bias[trust] -= 3
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
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, turn = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
Memory = sys.modules[type(model).__module__].Memory
sample = dict(do_sample=True, return_dict_in_generate=True)

def go_on(ids, count, memory):
    out = model.generate(ids, past_key_values=memory, min_new_tokens=count, max_new_tokens=count, **sample)
    return out.sequences, out.past_key_values

def last_turn(ids, memory):
    torch.manual_seed(7)
    return go_on(ids, 40, memory)[0][0, -40:].tolist()
"""

FIRST = LOADED + """
ids = tokenizer("The cat sat on the mat.", return_tensors="pt").input_ids
torch.manual_seed(0)
memory, bytes_held = None, {}
for count in (300, 300, 1400):
    ids, memory = go_on(ids, count, memory)
    tensors = memory._tensors().values()
    bytes_held[ids.size(1)] = sum(x.untyped_storage().nbytes() for x in tensors)
memory.save("memory.safetensors")
torch.save(ids, "ids.pt")
held, text = memory.contents(tokenizer), last_turn(ids, memory)
memory.clear()
forgot = memory.contents()
print(json.dumps(dict(module=type(model).__module__, text=text, held=held, bytes=bytes_held, forgot=forgot,
                      project="models" in sys.modules, without=last_turn(ids[:, -1:], memory))))
"""

SECOND = LOADED + """
memory = Memory.load("memory.safetensors", model)
print(json.dumps(dict(held=memory.contents(tokenizer), text=last_turn(torch.load("ids.pt"), memory))))
"""


def alone(script, folder, turn, where):
    """Run a script in the folder `where`, far from this project; what it printed."""
    where.mkdir(exist_ok=True)
    path = where / f"{turn}.py"
    path.write_text(script)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(where / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", str(path), str(folder), turn], cwd=where, env=environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_from_a_copy_alone_it_generates_and_remembers_across_processes(folder, tmp_path):
    """2,000 tokens in constant memory, by torch and transformers alone; saved, loaded elsewhere, the text goes on."""
    first = alone(FIRST, folder, "first", tmp_path / "empty")
    assert first["module"].startswith("transformers_modules") and not first["project"]
    sizes = first["bytes"]
    assert len(sizes) == 3 and len(set(sizes.values())) == 1, f"bytes held after so many tokens: {sizes}"
    assert len(first["held"]) == SLOTS and first["forgot"] == []
    second = alone(SECOND, folder, "second", tmp_path / "empty")
    assert second["held"] == first["held"] and second["text"] == first["text"]
    assert first["without"] != first["text"], "a cleared memory must not go on as if it remembered"


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
    for loaded in (once, RevenaHybridTiny.from_pretrained(tmp_path)):
        assert not loaded.training
        state, wanted = loaded.state_dict(), model.state_dict()
        assert all(torch.equal(state[n], wanted[n]) and state[n].dtype == wanted[n].dtype for n in wanted)
        assert loaded.get_input_embeddings().weight is loaded.backbone.embed.weight
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    fresh = RevenaHybridTiny(RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW))
    for name in ("backbone.rotary", "memory.codes"):        # what no seed decides, not read from any file
        assert torch.equal(once.get_buffer(name), fresh.get_buffer(name))


def test_bfloat16_loads_and_generates(folder, model, ids):
    """dtype=torch.bfloat16 gives a model of that type that generates, normalised, and not far from float32."""
    half = RevenaHybridTiny.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.memory.codes.dtype == torch.int8
    assert torch.equal(half.backbone.rotary, model.backbone.rotary), "angles must not be rounded to 8 bits"
    out = half.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert out.sequences.shape == (1, ids.size(1) + 40) and len(out.past_key_values.contents()) == SLOTS
    with torch.no_grad():
        logits = half(ids).logits
        assert (logits.exp().sum(-1) - 1).abs().max() < 1e-5
        half.config.ltm_enabled = model.config.ltm_enabled = False
        try:
            near = (half(ids).logits.exp() - model(ids).logits.exp()).abs().sum(-1).max()
        finally:
            model.config.ltm_enabled = True
    assert near < 0.2, "total variation, doubled, of what the backbone says"


# ------------------------------------------------------------------------------------ generation

STRATEGIES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.9),
    "top-k": dict(do_sample=True, top_k=20),
    "top-p": dict(do_sample=True, top_p=0.8),
    "repetition penalty": dict(repetition_penalty=1.3),
    "beams": dict(num_beams=3),
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
        Memory(model).crop(-1)
    with pytest.raises(ValueError, match="must be a Memory, not a DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), **GREEDY)
    with pytest.raises(ValueError, match="input_ids"):
        model(ids, inputs_embeds=torch.zeros(1, 1, 64))


# ------------------------------------------------------------------------------------ the memory between turns

def test_a_second_turn_remembers_the_first(model, tokenizer, ids):
    """The memory handed back in, with the whole text or with what is new: the same as one long context."""
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    said = tokenizer(" And what did the dog do then?", return_tensors="pt").input_ids
    whole = torch.cat((first.sequences, said), 1)
    wanted = model.generate(whole, **GREEDY)
    unread = whole[:, first.past_key_values.get_seq_length():]          # generate never feeds its own last token
    kept = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(whole, past_key_values=first.past_key_values, **GREEDY), wanted)
    again = model.generate(unread, past_key_values=kept, attention_mask=torch.ones_like(whole), **GREEDY)
    assert torch.equal(again[:, -40:], wanted[:, -40:])
    forgetful = model.generate(unread, **GREEDY)
    assert not torch.equal(forgetful[:, -40:], wanted[:, -40:]), "the first turn must matter, or this shows nothing"


def test_a_copy_goes_its_own_way(model, ids):
    """deepcopy forks a memory without copying the model; beams take copies of it, and write as from the whole text."""
    memory = Memory(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=memory)
    fork, beams = copy.deepcopy(memory), copy.deepcopy(memory)
    assert fork.model is model
    before = {name: x.clone() for name, x in memory._tensors().items()}
    with torch.no_grad():
        model(ids, past_key_values=fork)
    assert all(torch.equal(x, before[name]) for name, x in memory._tensors().items()) and len(memory.contents())
    beams.batch_repeat_interleave(3)
    assert torch.equal(model.generate(ids, past_key_values=beams, num_beams=3, **GREEDY),
                       model.generate(ids, num_beams=3, **GREEDY))


def test_contents_and_retrieved_can_be_read(model, tokenizer, ids):
    """What is stored, with what surprisal and when; what the last prediction drew on, with what cosine and share."""
    out = model.generate(ids, do_sample=True, **GREEDY, return_dict_in_generate=True)
    memory, text = out.past_key_values, out.sequences[0].tolist()
    held = memory.contents(tokenizer)
    assert 0 < len(held) <= SLOTS and [i["position"] for i in held] == sorted({i["position"] for i in held})
    for item in held:
        assert item["token"] == text[item["position"]] and item["text"] == tokenizer.decode([item["token"]])
        assert item["bits"] > model.config.ltm_surprisal_bits
    stored = {(item["token"], item["position"]) for item in held}
    drawn = 0
    with torch.no_grad():
        for token in text[-12:]:
            log_p = model(torch.tensor([[token]]), past_key_values=memory).logits[0, 0]
            found = memory.retrieved(tokenizer)
            stored |= {(item["token"], item["position"]) for item in memory.contents()}
            assert sum(item["share"] for item in found) <= 1 + 1e-6
            for item in found:
                assert item["cosine"] > model.config.ltm_cosine
                assert 0 < item["share"] <= float(log_p[item["token"]].exp()) + 1e-6
                assert (item["token"], item["position"]) in stored
                assert item["text"] == tokenizer.decode([item["token"]])
            drawn += len(found)
    assert drawn, "a memory from which nothing is ever drawn shows nothing here"


def test_a_memory_of_another_model_is_refused(model, ids, tmp_path):
    """`load` says so where a file holds the memory of a model of another shape, or no memory at all."""
    memory = Memory(model)
    with torch.no_grad():
        model(ids, past_key_values=memory)
    memory.save(tmp_path / "memory.safetensors")
    back = Memory.load(tmp_path / "memory.safetensors", model)
    assert back.contents() == memory.contents() and back.get_seq_length() == ids.size(1)
    other = RevenaHybridTiny(RevenaConfig(n_layer=2, n_embd=64, n_head=2, stm_window=WINDOW, ltm_slots=SLOTS + 1))
    with pytest.raises(ValueError, match="not a memory of this model"):
        Memory.load(tmp_path / "memory.safetensors", other)
    models.save_file({"count": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="not a memory of this model"):
        Memory.load(tmp_path / "none.safetensors", model)


def test_gpt_without_a_window_keeps_its_cache_too(ids, tmp_path):
    """GPT's cache, which grows, saves, loads and goes on as well."""
    torch.manual_seed(0)
    gpt = GPT(RevenaConfig(n_layer=1, n_embd=64, n_head=2, stm_window=None, ltm_enabled=False, n_positions=256)).eval()
    first = gpt.generate(ids, **GREEDY, return_dict_in_generate=True)
    first.past_key_values.save(tmp_path / "memory.safetensors")
    whole = F.pad(first.sequences, (0, 3), value=11)
    back = Memory.load(tmp_path / "memory.safetensors", gpt)
    assert torch.equal(gpt.generate(whole, past_key_values=back, **GREEDY), gpt.generate(whole, **GREEDY))


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
    stream, memory = 0.0, Memory(model)
    for t in range(len(document)):
        stream += model(tokens[:, t:t + 1], past_key_values=memory).logits[0, 0, document[t]]
    assert float(stream) == pytest.approx(float(whole), abs=1e-2)
