"""A memory on a model that is trained already: the promises of every memory on four families of such models, their
tokenizers, and the pipeline from --tokenizer to a folder that loads by itself.

The models are tiny and random, their weights drawn large, so that what a position sees has a say in what it predicts.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

import add_memory
import download_models
import eval as evaluation
import prepare_data
import stages
import train
from memories import HostedConfig, RevenaHosted

ROW, SLOTS, TEXT = 16, 20, 90
CLOSE = dict(atol=1e-4, rtol=0)
VOCABULARY = 700
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "gpt2": (transformers.GPT2Config, dict(n_embd=32, n_layer=2, n_head=2, n_positions=48)),
    "llama": (transformers.LlamaConfig, SIZES | dict(num_key_value_heads=2, tie_word_embeddings=False)),
    "qwen3": (transformers.Qwen3Config, SIZES | dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZES),
}
KINDS = {                       # memory, its settings, window of the host's attention
    "ltm": ("ltm", {}, None),
    "ltm, window": ("ltm", {}, 6),
    "store": ("store", dict(top=24), None),
    "bank": ("bank", dict(slots=64, chapters=8), None),
    "mag, window": ("mag", dict(chunk=4), 6),
    "gru, window": ("gru", dict(placement="upper"), 6),
    "gru, at the embedding": ("gru", {}, None),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("kind", KINDS)
SENTENCES = ["The lamp on the table was seven days old.\n", "A door to the north, and naïve résumés — 東京!\n",
             "  Two spaces, a tab\tand the number 1234.", "Nobody knows where the lamp went from the door."]


def host(family, vocabulary=VOCABULARY, **more):
    """A causal language model of that family, its matrices large."""
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = kind(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, **sizes | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4)
    return model


def hosted(family, kind="ltm", lora=None):
    """(the host, a memory on it with all its parameters awake)."""
    memory, settings, window = KINDS[kind]
    theirs = host(family)
    config = HostedConfig.of(theirs.config, eot=0, memory=memory, stm_window=ROW, ltm_slots=SLOTS, lora=lora,
                             attention_window=window, memory_settings=settings)
    model = RevenaHosted(config).eval()
    model.backbone.take(theirs)
    torch.manual_seed(1)
    for weight in model.memory.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    return theirs, model


def text(length=TEXT, batch=2, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def streamed(model, ids, sizes, cache=None, mask=None):
    """Logits of ids read in blocks of these sizes."""
    cache, parts, start = cache or model.new_cache(len(ids)), [], 0
    for size in sizes:
        known = None if mask is None else mask[:, :start + size]
        parts.append(model(ids[:, start:start + size], attention_mask=known, past_key_values=cache).logits)
        start += size
    return torch.cat(parts, 1)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------ the promises

@every_family
def test_off_it_is_the_model_bit_for_bit(family):
    theirs, model = hosted(family)
    model.config.memory_enabled = False
    ids = text(ROW)
    assert torch.equal(model(ids).logits, theirs(ids).logits.log_softmax(-1))
    model.config.memory_enabled = True
    assert not torch.equal(model(ids).logits, theirs(ids).logits.log_softmax(-1))


@every_family
@every_kind
def test_at_once_is_token_by_token_and_nothing_of_the_future_is_seen(family, kind):
    _, model = hosted(family, kind)
    ids = text()
    whole = model(ids).logits
    torch.testing.assert_close(streamed(model, ids, (1, 5, 16, 7, 1, 30, 30)), whole, **CLOSE)
    assert (whole.exp().sum(-1) - 1).abs().max() < 1e-4
    changed = ids.clone()
    changed[:, 45] = (changed[:, 45] + 1 - 3) % (VOCABULARY - 3) + 3
    assert torch.equal(model(changed).logits[:, :45], whole[:, :45])
    model.config.memory_enabled = False
    assert (model(ids).logits - whole).abs().max() > 1e-2, "a memory without a say shows nothing"


@every_family
def test_sequences_of_a_lane_share_nothing(family):
    """Two texts in one lane are scored as each alone is."""
    for kind in ("ltm", "store"):
        _, model = hosted(family, kind)
        ids = text(6 * ROW, batch=1)[0].view(6, ROW)
        opens = torch.tensor([[True, False, False, True, False, False]])
        together = model.score(ids, ids.roll(-1, 1), opens).log_p
        for part in (slice(0, 3), slice(3, 6)):
            alone = model.score(ids[part], ids[part].roll(-1, 1), torch.tensor([[True, False, False]])).log_p
            torch.testing.assert_close(together[part], alone, **CLOSE)


@every_family
def test_a_window_is_all_that_attention_sees(family):
    """Of two layers with a window of 6, a token reaches 10 back and no further; without one, to the start."""
    for kind, reached in (("ltm", True), ("ltm, window", False)):
        _, model = hosted(family, kind)
        model.config.memory_enabled = False
        ids = text(40, batch=1)
        other = ids.clone()
        other[0, 0] = other[0, 0] % 300 + 301 if other[0, 0] < 301 else 5
        same = torch.equal(model(ids).logits[:, 11:], model(other).logits[:, 11:])
        assert same != reached


@every_family
def test_generate_reads_the_models_own_cache(family, tmp_path):
    """Greedy and beams, with the cache and without; padded; saved and gone on with."""
    theirs, model = hosted(family, "ltm, window" if family == "llama" else "ltm")
    ids = text(20, batch=1)
    for how in (dict(), dict(num_beams=2)):
        texts = [model.generate(ids, max_new_tokens=12, min_new_tokens=12, use_cache=use, do_sample=False, **how)
                 for use in (True, False)]
        assert torch.equal(*texts)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = (torch.arange(24) >= 4).long()[None]
    plain = streamed(model, ids, (1, 9, 10))
    torch.testing.assert_close(streamed(model, padded, (6, 8, 10), mask=mask)[:, 4:], plain, **CLOSE)
    cache = model.new_cache()
    model(ids[:, :15], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    later = model.load_cache(tmp_path / "cache.safetensors")
    assert torch.equal(model(ids[:, 15:], past_key_values=later).logits, model(ids[:, 15:], past_key_values=cache).logits)
    with pytest.raises(ValueError, match="must be a RevenaCache"):
        model(ids, past_key_values=DynamicCache())


def test_lora_starts_as_the_model_and_alone_learns():
    theirs, model = hosted("gpt2", lora=4)
    model.config.memory_enabled = False
    ids = text(ROW)
    assert torch.equal(model(ids).logits, theirs(ids).logits.log_softmax(-1))
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 16


def test_a_family_that_is_built_otherwise_is_refused_or_takes_the_ltm():
    config = transformers.GPTBigCodeConfig(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    model = RevenaHosted(HostedConfig.of(theirs.config, 0, memory="ltm", stm_window=ROW)).eval()
    model.backbone.take(theirs)
    model.config.memory_enabled = False
    ids = text(ROW) % 99
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits.log_softmax(-1), **CLOSE)
    mamba = AutoModelForCausalLM.from_config(transformers.MambaConfig(vocab_size=99, hidden_size=32,
                                                                      num_hidden_layers=2))
    with pytest.raises(Exception):
        add_memory.on_host(mamba, add_memory.QUICK, add_memory.parse(["--with-store", "--to", "mamba"]), 0)


# ------------------------------------------------------------------------------------ tokenizers

def byte_level():
    """GPT-2's kind: bytes written as letters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made.add_tokens(WORDS["Ġ"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def sentencepiece():
    """Llama's kind: a space is a letter and stands before every text, too; what is not known is bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    alphabet = sorted(set("".join(SENTENCES[:1] + SENTENCES[2:])) - {" "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *alphabet]
    merges = []
    for word in ["the", "lamp", "door", *(word[1:] for word in WORDS["▁"])]:
        built = "▁"
        for letter in word:
            merges.append((built, letter))
            built += letter
            pieces += [letter, built]
    pieces, merges = list(dict.fromkeys(pieces)), list(dict.fromkeys(merges))
    made.model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, byte_fallback=True,
                            unk_token="<unk>", fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LETTERS = "abcdefghijklmnopqrst"
WORDS = {space: [f"{space}qu{first}{second}" for first in LETTERS for second in "xyz"] for space in "Ġ▁"}
TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_characters_are_those_of_the_text(kind):
    tokenizer = stages.settled(TOKENIZERS[kind](), "a test", "again")
    per_token = stages.characters_per_token(tokenizer)
    assert tokenizer.pad_token_id == (0 if kind == "byte level" else 1)
    for sentence in SENTENCES:
        ids = [tokenizer.pad_token_id, *tokenizer.encode(sentence, add_special_tokens=False)]
        assert per_token[ids].sum() == len(sentence), sentence
    assert len(stages.spaced_words(tokenizer)) >= 60


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_goes_on_has_no_space_of_its_own(kind):
    """" lamp" and "." as they stand within a text, not as at its start."""
    tokenizer = stages.settled(TOKENIZERS[kind](), "a test", "again")
    for text in (" lamp", ".", " quax"):
        ids = stages.encoded(tokenizer, text)
        assert stages.characters_per_token(tokenizer)[ids].sum() == len(text)
    whole = tokenizer.encode("The lamp.", add_special_tokens=False)
    parts = [*tokenizer.encode("The", add_special_tokens=False), *stages.encoded(tokenizer, " lamp"),
             *stages.encoded(tokenizer, ".")]
    assert tokenizer.decode(whole) == tokenizer.decode(parts)


# ------------------------------------------------------------------------------------ the pipeline

LOADED = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([list(range(3, 43))])
    cache = model.new_cache()
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, past_key_values=cache)
    with torch.no_grad():
        print(json.dumps([model(ids).logits.double().sum().item(), out.tolist(), len(cache.contents())]))
"""


# the second family's tokenizer and layers have tests of their own above; its whole pipeline is slow
@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """(root, the model's folder) after tokenizer, data, two arms with and two without LoRA."""
    base = tmp_path_factory.mktemp(request.param)
    root, folder = base / "root", base / "model"
    tokenizer = TOKENIZERS["byte level" if request.param == "gpt2" else "sentencepiece"]()
    host(request.param, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"text": " ".join(np.random.default_rng(i).choice(SENTENCES, 30 if i else 90))} for i in range(12)]
    (base / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(train, "QUICK", train.Settings(steps=4, batch=2, lane=2, warmup=2, log_every=2,
                                                     checkpoint_steps=2))
        patch.setattr(stages.signal, "signal", lambda *_: None)
        patch.setattr(add_memory, "milliseconds", lambda _: (1, 1))
        say = ["--root", str(root), "--quick"]
        prepare_data.main(["--tokenizer", str(folder), "--text", str(base / "text.jsonl"), *say])
        for arm in ("baseline", "with_ltm", "with_lora", "with_ltm_lora"):
            flags = [] if arm == "baseline" else [stages.arm_flag(arm)]
            add_memory.main([*flags, "--to", str(folder), *say])
            train.main([stages.arm_flag(arm), *say])
    return root, folder


def test_data_are_the_models_own(trained):
    root, _ = trained
    rows, meta = stages.load_split(root, "train")
    tokenizer = stages.load_tokenizer(root)
    assert meta["eot"] == tokenizer.pad_token_id != stages.EOT and meta["vocab_size"] == len(tokenizer)
    opened = stages.documents(rows, meta["eot"])
    assert len(opened) == meta["splits"]["train"]["documents"]
    counted = stages.characters_per_token(tokenizer)[np.concatenate(opened)].sum()
    assert counted == meta["splits"]["train"]["characters"]


def test_the_tokenizer_comes_back_where_another_ones_data_fail(trained, tmp_path, stage):
    """And stage 1 leaves it alone."""
    root, folder = trained
    there = root / "data" / "tokenizer"
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    other = TOKENIZERS["sentencepiece" if folder.parent.name.startswith("gpt2") else "byte level"]()
    other.save_pretrained(tmp_path / "other")
    say = "--root", root, "--quick"
    code, _, error = stage(prepare_data.main, "--tokenizer", tmp_path / "other", "--text", tmp_path / "none.txt", *say)
    assert code == 1 and "none.txt" in error
    code, out, _ = stage(download_models.main, *say)
    assert code == 0 and f"the tokenizer of {folder} is in" in out and "it stays" in out
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    code, _, _ = stage(prepare_data.main, "--tokenizer", tmp_path / "other", "--planted", *say)
    assert code == 2


def test_who_has_no_first_weights_is_told_of_the_model(trained, stage, tmp_path):
    """The command that makes them names what the others of the root stand on."""
    root, folder = trained
    aside = root / "trained" / "init_with_lora"
    aside.rename(tmp_path / "aside")
    code, _, error = stage(train.main, "--with-lora", "--root", root, "--quick")
    (tmp_path / "aside").rename(aside)
    assert code == 1 and f"add_memory.py --with-lora --to {folder} --root" in error


def test_a_package_that_is_not_there_is_named(trained, stage, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, error = stage(add_memory.main, "--with-lora", "--to", trained[1], "--root", trained[0], "--quick")
    assert code == 1 and error.strip().endswith("LoRA needs PEFT: pip install peft, then run the same command again")


def test_the_frozen_stays_and_the_rest_learns(trained):
    root, folder = trained
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    wanted = {f"backbone.trunk.{name}": x for name, x in theirs.base_model.state_dict().items()}
    for arm, learns in (("baseline", 0), ("with_ltm", 3), ("with_lora", 16), ("with_ltm_lora", 19)):
        before = stages.load_model(stages.arm_folder(root, 0, stages.init_name(arm))).state_dict()
        after = stages.load_model(root / "trained" / arm).state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert all("lora_" in name or name.startswith("memory.") for name in changed)
        if "llama" not in str(folder):
            assert len(changed) == learns, changed
        assert all(torch.equal(x, wanted[name.replace(".base_layer", "")]) for name, x in after.items()
                   if name.replace(".base_layer", "") in wanted)
        settings = json.loads((root / "trained" / arm / "manifest.json").read_text())["settings"]
        assert settings["to"] == str(folder) and settings["train_backbone"] is False


def test_where_nothing_learns_no_step_is_taken(trained, monkeypatch, stage, tmp_path):
    """A frozen model without a memory: the folder is that of a finished run, no number made up."""
    def step(_):
        raise AssertionError("a step that moves nothing")

    root, folder = trained
    root, took = shutil.copytree(root, tmp_path / "still"), train.Settings(steps=6, batch=2, lane=2)
    monkeypatch.setattr(train.Training, "step", step)
    monkeypatch.setattr(train, "QUICK", took)
    say = ["--baseline", "--root", root, "--quick"]
    code, said, _ = stage(train.main, *say, "--fresh")
    assert code == 0 and said.count("\n") == 1 and "train.py --with-ltm" in said
    assert f"nothing learns in {folder} without --train-backbone, so that no step is taken" in said
    arm = root / "trained" / "baseline"
    manifest, init = json.loads((arm / "manifest.json").read_text()), root / "trained" / "init"
    assert manifest["step"] == manifest["settings"]["steps"] == 6
    assert set(manifest["weights"].values()) == {6}
    assert stages.sha256(arm / "model.safetensors") in manifest["weights"]
    weights, before = (stages.load_model(one).state_dict() for one in (arm, init))
    assert all(torch.equal(x, before[name]) for name, x in weights.items())
    assert (arm / "history.jsonl").read_text() == ""
    assert "| training loss (nats a token) | nothing learns |" in (arm / "README.md").read_text()
    assert evaluation.find_arm(0, "baseline", evaluation.Place(root, True, "cpu")).step == 6
    code, said, _ = stage(train.main, *say, "--resume")
    assert code == 0 and "all 6 steps are done already; next: python train.py --with-ltm" in said


def test_the_backbone_learns_where_that_is_asked_for(trained, monkeypatch):
    root, folder = trained
    monkeypatch.setattr(train, "QUICK", train.Settings(steps=2, batch=2, lane=2, warmup=1, log_every=1))
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    shutil.copytree(root, root.with_name("whole"), dirs_exist_ok=True)
    say = ["--root", str(root.with_name("whole")), "--quick", "--fresh", "--train-backbone"]
    with torch.enable_grad():
        train.main(["--with-ltm", "--chained", *say])
    before = stages.load_model(root / "trained" / "init").state_dict()
    after = stages.load_model(root.with_name("whole") / "trained" / "with_ltm").state_dict()
    assert all(not torch.equal(x, after[name]) for name, x in before.items() if x.dim() > 1)


def test_the_first_weights_of_trained_arms_stay(trained, stage):
    """Another model's memory goes to a folder of its own."""
    root, _ = trained
    kept = (root / "trained/init/manifest.json").read_bytes()
    code, _, error = stage(add_memory.main, "--root", root, "--quick")
    assert code == 1 and "baseline, with_lora, with_ltm, with_ltm_lora started from" in error and "--root DIR" in error
    assert (root / "trained/init/manifest.json").read_bytes() == kept


def test_resumed_it_is_the_same(trained, monkeypatch):
    root, _ = trained
    monkeypatch.setattr(train, "QUICK", train.Settings(steps=4, batch=2, lane=2, warmup=2, log_every=2,
                                                       checkpoint_steps=2))
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    copy = shutil.copytree(root, root.with_name("resumed"), dirs_exist_ok=True)
    shutil.rmtree(copy / "trained" / "with_ltm_lora" / "checkpoints" / "step-000004")
    with torch.enable_grad():
        train.main(["--with-ltm-lora", "--resume", "--root", str(copy), "--quick"])
    digests = {stages.sha256(one / "trained" / "with_ltm_lora" / "model.safetensors") for one in (root, copy)}
    assert len(digests) == 1


def test_the_folder_alone_loads_and_generates(trained, tmp_path):
    root, _ = trained
    arms = ("with_ltm", "with_ltm_lora")
    for arm in arms:
        shutil.copytree(root / "trained" / arm, tmp_path / arm, ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "load.py").write_text(LOADED)
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-I", "load.py", *(str(tmp_path / arm) for arm in arms)], cwd=tmp_path,
                          env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cache_position" not in done.stderr              # transformers remarks on a forward that takes it
    for arm, line in zip(arms, done.stdout.splitlines()[-2:], strict=True):
        total, said, held = json.loads(line)
        model, ids = stages.load_model(root / "trained" / arm), torch.tensor([list(range(3, 43))])
        assert model(ids).logits.double().sum().item() == total and held > 0
        assert model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False).tolist() == said


def test_all_four_are_compared(trained, monkeypatch):
    root, _ = trained
    small = evaluation.QUICK
    monkeypatch.setattr(evaluation, "QUICK", dataclasses.replace(
        small, trials=2, forms=("pair",), distances=(160,), long_range=(160,), distractors=(0,), needles=(), hops=(1,),
        streamed=2, dialogues=2, bootstrap=50, repeats=1, shown=140))
    evaluation.main(["--root", str(root), "--quick"])
    results = json.loads((root / "results.json").read_text())
    arms = results["detail"]["arms"]
    assert list(arms) == ["baseline", "with_ltm", "with_lora", "with_ltm_lora"]
    learnt = {name: about["trained_parameters"] for name, about in arms.items()}
    assert learnt["baseline"] == 0 and learnt["with_ltm_lora"] == learnt["with_ltm"] + learnt["with_lora"]


# ------------------------------------------------------------------------------------ what is refused

def test_what_cannot_be_is_one_line(trained, tmp_path, stage):
    root, folder = trained
    say = ["--root", root, "--quick"]
    for main, flags, words in (
            (add_memory.main, ["--with-lora", *say], "add_memory.py --with-lora --to MODEL"),
            (add_memory.main, ["--to", tmp_path / "nothing", *say], "no memory can be put on"),
            (add_memory.main, ["--to", root / "trained" / "with_ltm", *say], "give the model itself"),
            (prepare_data.main, ["--tokenizer", tmp_path / "nothing", *say], "has no tokenizer")):
        code, _, said = stage(main, *flags)
        assert code == 1 and words in said and len(said.strip().splitlines()) == 1, said
    host("gpt2", vocabulary=50).save_pretrained(tmp_path / "small")
    code, _, said = stage(add_memory.main, "--to", tmp_path / "small", *say)
    assert code == 1 and "prepare_data.py --tokenizer" in said
    of_tokens = dict(vocab_size=len(stages.load_tokenizer(root)), num_key_value_heads=2)
    others = {"its memory off it must equal": transformers.GraniteConfig(**SIZES, **of_tokens, logits_scaling=2.0),
              "--window 8 or less": transformers.MistralConfig(**SIZES, **of_tokens, sliding_window=8)}
    for words, config in others.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
        code, _, said = stage(add_memory.main, "--to", tmp_path / config.model_type, *say)
        assert code == 1 and words in said and len(said.strip().splitlines()) == 1, said


# ------------------------------------------------------------------------------------ on a checkpoint of this project's

def test_on_a_checkpoint_of_ones_own_the_backbone_stays(make_root, tmp_path, monkeypatch):
    """The LTM on what train.py made: proved, trained for two steps, isolated and chained; not a bit of the rest moves."""
    monkeypatch.setattr(train, "QUICK", train.Settings(steps=2, batch=2, lane=2, warmup=1, log_every=1))
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)
    monkeypatch.setattr(add_memory, "milliseconds", lambda _: (1, 1))
    root, folder = make_root(), tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " + line * 40}) + "\n"
                                                 for i, line in enumerate(SENTENCES * 2)))
    say = ["--root", str(root), "--quick"]
    prepare_data.main(["--text", str(tmp_path / "text.jsonl"), *say])
    _, theirs = add_memory.make_models(add_memory.QUICK, 3)
    theirs.config.memory_enabled = False
    stages.save_model(theirs, stages.load_tokenizer(root), folder)
    add_memory.main(["--to", str(folder), *say])
    wanted = theirs.backbone.state_dict()
    with torch.enable_grad():
        for arm, flags in (("baseline", []), ("with_ltm", ["--chained", "0.5"])):
            train.main([stages.arm_flag(arm), *flags, *say])
    for name in ("init", "baseline", "with_ltm"):
        model = stages.load_model(root / "trained" / name)
        own = model.backbone.state_dict()
        assert all(torch.equal(own[key], x) for key, x in wanted.items())
        if name == "with_ltm":
            before = stages.load_model(root / "trained" / "init").memory.state_dict()
            assert all(not torch.equal(before[key], x) for key, x in model.memory.state_dict().items())
    with pytest.raises(stages.StageError, match="another arm"):
        add_memory.main(["--to", str(folder), "--with-lora", *say])
    with pytest.raises(stages.StageError, match="leave --window out"):
        add_memory.main(["--to", str(folder), "--window", "32", *say])


def test_in_bfloat16_it_generates(tmp_path):
    _, model = hosted("qwen3", "gru, window")
    model.save_pretrained(tmp_path)
    half = RevenaHosted.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = text(20, batch=1)
    out = half.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 24) and (half(ids).logits.exp().sum(-1) - 1).abs().max() < 1e-3
