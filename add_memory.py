"""Make the model that an arm starts from: GPT-70M, a 128-token window (STM), and a memory.

reads   data/tokenizer/            the GPT-2 tokenizer
writes  trained/init/              the weights that baseline and with_ltm start from, as a Hugging Face folder
        trained/init_with_NAME/    those of a further memory: the same backbone, byte for byte
        With --to MODEL the backbone is that model, a folder or a name on the hub: a checkpoint of
        train.py, or any causal language model of transformers (tried: GPT-2, Llama, Qwen3, GPT-NeoX).
        It stays as it is, in training too, unless train.py --train-backbone says otherwise.

    python add_memory.py                the LTM, seed 0
    python add_memory.py --with-gru     another memory
    python add_memory.py --seed 1       another initialisation, into trained/seed1/
    python add_memory.py --to trained/baseline --root frozen    the LTM on what train.py made
    python add_memory.py --to gpt2 --root mine --window 128     .. on GPT-2, which then sees 128 tokens
    python add_memory.py --quick        a small model of the same class, into quick/trained/

No GPT-2-style checkpoint of 70M is published, so GPT-70M starts from a seeded initialisation.
Before anything is written, the model is put to the proof: with its memory off it equals GPT-70M
bit for bit on 128 tokens; sequences share nothing; a memory starts empty; token by token it says
what it says of all tokens at once; no prediction depends on what comes after it. The LTM holds
256 items, first in first out.
"""

import argparse
import copy
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from models import GPT, SIZES, RevenaConfig
from stages import (ARMS, SPECIFIED, STUDY, StageError, about, arm_flag, arm_folder, command,
                    default_root, init_name, is_hosted, load_model, load_tokenizer, lock, model_class,
                    one_line, parser_of, read_json, run_stage, save_model, seed_number, write_manifest)


@dataclass(frozen=True)
class Settings:
    """The shape of the model; edit it here."""

    size: str = "70M"               # of models.SIZES
    window: int = 128               # STM: tokens that attention sees
    slots: int = 256                # LTM: items at most, first in first out
    surprisal_bits: float = 4.5     # LTM: a token above this is stored
    cosine: float = 0.8             # LTM: an item above this is retrieved


FULL = Settings()
QUICK = Settings(size="quick")
TOTAL = (65e6, 80e6)                # parameters that "70M" may mean
MEMORY_SEED = 1 << 32               # beyond every seed of a backbone: memories draw from generators of their own


def make_gpt(settings, seed, backbone=None):
    """GPT-70M with seeded weights, on the CPU; `backbone`: what of the config is another one's."""
    torch.manual_seed(seed)
    return GPT(RevenaConfig(**SIZES[settings.size], **(backbone or {}), stm_window=None, memory_enabled=False))


def of_the_memory(settings, arm):
    """What an arm's config says of its memory."""
    mine = about(arm)
    return dict(stm_window=settings.window, memory=mine.memory or "ltm", memory_settings=mine.settings,
                ltm_slots=settings.slots, ltm_surprisal_bits=settings.surprisal_bits, ltm_cosine=settings.cosine)


def make_models(settings, seed, arm="with_ltm"):
    """GPT-70M and the hybrid that an arm starts from, both on the CPU: the hybrid's backbone holds
    GPT-70M's weights.
    """
    mine = about(arm)
    gpt = make_gpt(settings, seed)
    if arm not in SPECIFIED:
        torch.manual_seed(MEMORY_SEED + seed)
    config = RevenaConfig(**SIZES[settings.size], **mine.backbone, **of_the_memory(settings, arm))
    hybrid = model_class(config.memory)(config)
    own = hybrid.backbone.state_dict()
    for name, weight in gpt.backbone.state_dict().items():
        if name != "rotary":
            part = tuple(map(slice, weight.shape))          # all of it, but where an arm's own is wider
            own[name][part] = weight
    hybrid.backbone.load_state_dict(own)
    if mine.backbone:
        gpt = GPT(RevenaConfig(**SIZES[settings.size], **mine.backbone, stm_window=None, memory_enabled=False))
        gpt.backbone.load_state_dict(own | {"rotary": gpt.backbone.rotary})
    return gpt.eval(), hybrid.eval()


# ------------------------------------------------------------ on a model that is trained already

FAMILIES = "GPT-2, Llama, Qwen3, GPT-NeoX"      # that were tried


def on_checkpoint(folder, settings, seed, arm):
    """make_models, but for a backbone that train.py has trained: a folder of this project's own."""
    mine = about(arm)
    if mine.lora or mine.backbone:
        raise StageError(f"{mine.label} is not for {folder}, a model of this project's own; take another arm: "
                         f"python add_memory.py --to {folder}")
    theirs = load_model(folder, made_by="python train.py")
    wanted = of_the_memory(settings, arm) | dict(memory_enabled=True)
    if theirs.config.stm_window != settings.window:
        raise StageError(f"{folder} has a window of {theirs.config.stm_window} tokens, not {settings.window}; "
                         f"set window to that at the top of add_memory.py and prepare_data.py")
    config = copy.deepcopy(theirs.config)
    config.update(wanted)
    torch.manual_seed(MEMORY_SEED + seed)
    hybrid = model_class(config.memory)(config)
    weights = theirs.backbone.state_dict()
    hybrid.backbone.load_state_dict(weights)
    config = copy.deepcopy(config)
    config.update(dict(stm_window=None, memory_enabled=False))
    gpt = GPT(config)
    gpt.backbone.load_state_dict(weights | {"rotary": gpt.backbone.rotary})
    return gpt.eval(), hybrid.eval()


def on_host(theirs, settings, args, eot):
    """The hybrid that has a model of transformers as its backbone; ValueError and others where it
    cannot.

    theirs: the model, AutoModelForCausalLM's. args: seed, arm and window, or None, of its attention.
    eot: opens its documents.
    """
    kind = model_class(None, hosted=True)
    if getattr(theirs.get_output_embeddings(), "bias", None) is not None:
        raise ValueError("its output has a bias, and a memory knows of none")
    own = getattr(theirs.config, "sliding_window", None)
    if own and (args.window or own + 1) > own:
        raise ValueError(f"some of its layers see {own} tokens: ask for --window {own} or less")
    config = kind.config_class.of(theirs.config, eot, attention_window=args.window,
                                  lora=about(args.arm).lora, **of_the_memory(settings, args.arm))
    torch.manual_seed(MEMORY_SEED + args.seed)
    hybrid = kind(config)
    hybrid.backbone.take(theirs)
    return hybrid.eval()


class Alone:
    """A model of transformers by itself, which says what it says as log-probabilities."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        output = self.model(tokens)
        output.logits = output.logits.float().log_softmax(-1)
        return output


def host_models(args, settings, tokenizer, root):
    """make_models for `--to MODEL`; raises StageError where it cannot be had, or takes no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = args.to
    try:
        kind = "revena" if is_own(name) else AutoConfig.from_pretrained(name).model_type
        if kind == "revena":
            if args.window:
                raise StageError(f"{name} has its sliding window already; leave --window out")
            return on_checkpoint(name, settings, args.seed, args.arm)
        theirs = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        check_tokenizer(name, theirs.config, tokenizer, root, args.quick)
        hybrid = on_host(theirs, settings, args, tokenizer.pad_token_id)
    except StageError:
        raise
    except Exception as error:                      # of the hub, or of a model that is built otherwise
        raise refusal(name, error) from None
    return Alone(theirs), hybrid


def refusal(name, error):
    """The StageError for a model that takes no memory."""
    if isinstance(error, ImportError):                      # of a package that only LoRA needs
        return StageError(f"{one_line(error)}, then run the same command again")
    return StageError(f"no memory can be put on {name} ({one_line(error).partition('; nothing')[0]}); families tried: "
                      f"{FAMILIES}; name such a one: python add_memory.py --to MODEL")


def is_own(folder):
    """Whether a folder is a checkpoint of train.py; raises StageError where it holds a model that
    has a memory of this project's already.
    """
    path = Path(folder) / "config.json"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if '"revena_hosted"' in text:
        raise StageError(f"{folder} is a memory on another model; give the model itself: "
                         f"python add_memory.py --to MODEL")
    return '"model_type": "revena"' in text


def check_tokenizer(name, config, tokenizer, root, quick):
    """Raise StageError where the data under root were not prepared with the model's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(name).get_vocab()
    except Exception:                               # a folder without one: then its size has to do
        own = tokenizer.get_vocab()
    if own != tokenizer.get_vocab() or len(tokenizer) > config.vocab_size:
        raise StageError(f"{root}/data/tokenizer is not the tokenizer of {name}; prepare the data with that: "
                         + command(f"prepare_data.py --tokenizer {shlex.quote(name)}", root, quick))


# ------------------------------------------------------------ proofs

def check(holds, what):
    """Raise StageError unless a proof holds."""
    if not holds:
        raise StageError(f"the hybrid failed a proof: {what}; nothing was written (is models.py changed?)")


def drawn(config, shape, seed):
    """Random tokens of a text, none of which opens a document."""
    text = torch.randint(0, config.vocab_size - 1, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(text == config.pad_token_id, config.vocab_size - 1, text)


@torch.no_grad()
def prove(gpt, hybrid):
    """Raise StageError unless the hybrid is what this script's docstring says of every memory.

    gpt: the backbone without a window or memory, called as the hybrid is.
    """
    config, window = hybrid.config, hybrid.config.stm_window
    seen = min(window, getattr(hybrid, "reach", None) or window)        # a host may see less than a row
    both = drawn(config, (2, 3 * window + 44), seed=1)
    text, long = both[:, :window], both[:1, window:]
    hybrid.config.memory_enabled = False
    check(torch.equal(gpt(text[:, :seen]).logits, hybrid(text[:, :seen]).logits),
          "with its memory off it must equal the model without one bit for bit")
    hybrid.config.memory_enabled = True
    together, alone = hybrid(text).logits, hybrid(text[1:]).logits
    check(torch.allclose(together[1], alone[0], atol=1e-4), "sequences must not share a memory")
    streamed = hybrid(text[:1], past_key_values=hybrid.new_cache()).logits
    check(torch.allclose(together[0], streamed[0], atol=1e-4), "token by token it must say what it says at once")

    changed, middle = long.clone(), long.size(1) // 2
    others = long[0, long[0] != long[0, middle]]
    changed[0, middle] = others[0]
    before, after = hybrid(long).logits[0, :middle], hybrid(changed).logits[0, :middle]
    check(torch.equal(before, after), f"changing token {middle} must change no prediction before it")


@torch.no_grad()
def prove_ltm(hybrid):
    """Raise StageError unless the LTM starts empty, and holds its slots' worth of items, first in
    first out.
    """
    slots, bits = hybrid.config.ltm_slots, hybrid.config.ltm_surprisal_bits
    # where everything surprises, token i becomes item i - 1, and 44 more than the slots overflow
    long = drawn(hybrid.config, (1, slots + 44), seed=2)
    cache = hybrid.new_cache()
    check(cache.contents() == [], "a memory must start empty")
    hybrid.config.ltm_surprisal_bits = -1.0
    hybrid(long, past_key_values=cache, logits_to_keep=1)
    hybrid.config.ltm_surprisal_bits = bits
    held = [item["token"] for item in cache.contents()]
    check(held == long[0, -slots:].tolist(), f"after {long.size(1)} surprising tokens it must hold the last {slots}")


@torch.no_grad()
def milliseconds(hybrid, repeats=5):
    """Median time of scoring 8 rows of 128 tokens on the CPU with the memory off and on, measured
    in turn.
    """
    rows = drawn(hybrid.config, (8, hybrid.config.stm_window), seed=2)
    times = {False: [], True: []}
    for _ in range(repeats + 1):
        for enabled in times:
            hybrid.config.memory_enabled = enabled
            start = time.perf_counter()
            hybrid.score(rows, rows.roll(-1, 1))
            times[enabled].append(1000 * (time.perf_counter() - start))
    return [sorted(taken[1:])[repeats // 2] for taken in times.values()]


# ------------------------------------------------------------ the stage

def parameters_by_group(model):
    """Parameters: {group: count}."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    if is_hosted(model):
        lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        found = {"the model itself": count(model.backbone) - lora, "LoRA": lora}
        return {name: number for name, number in found.items() if number} | {"memory": count(model.memory)}
    groups = {"token embedding (tied)": model.backbone.embed, "layers": model.backbone.blocks, "memory": model.memory}
    return {name: count(module) for name, module in groups.items()}


def report(hybrid, size, seed, arm):
    """Print what the model consists of; raises StageError where 70M are not 70M."""
    groups = parameters_by_group(hybrid)
    total = sum(groups.values())
    for name, count in groups.items():
        print(f"{count:>12,}  {name}")
    print(f"{total:>12,}  in all: {size}, {about(arm).label}, seed {seed}")
    if size.endswith("-70M") and not TOTAL[0] <= total <= TOTAL[1]:
        raise StageError(f"{total:,} parameters are not 70M; set SIZES in models.py back to between "
                         f"{TOTAL[0]:,.0f} and {TOTAL[1]:,.0f}")
    off, on = milliseconds(hybrid)
    print(f"the memory adds {groups['memory']:,} parameters ({groups['memory'] / total:.1%}) and {on - off:+.1f} ms to "
          f"the {off:.1f} ms of scoring 1,024 tokens on this CPU ({(on - off) / off:+.1%})")
    return total


def write_folder(hybrid, tokenizer, folder, **facts):
    """The model as a folder that is whole or absent."""
    aside = folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as held:
        lock(held, f"another add_memory.py is writing {folder}; let it end first")
        shutil.rmtree(aside, ignore_errors=True)            # of a run that was killed
        aside.mkdir()
        try:
            save_model(hybrid, tokenizer, aside)
            write_manifest(aside, **facts)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def check_room(folder, args):
    """Raise StageError where arms were trained from first weights of another model in that folder."""
    manifest = folder / "manifest.json"
    arms = sorted(path.parent.name for path in folder.parent.glob("*/manifest.json"))
    trained = [arm for arm in arms if not arm.startswith("init")]
    if not manifest.is_file() or not trained:
        return
    was = read_json(manifest, "python add_memory.py").get("to")
    if was != args.to:
        asked = f"--to {args.to} " if args.to else ""
        raise StageError(f"{folder} is what {', '.join(trained)} started from, on {was or 'a backbone of its own'}; "
                         f"take another folder: python add_memory.py {asked}--root DIR")


def parse(argv=None):
    parser = parser_of(__doc__)
    arms = parser.add_mutually_exclusive_group()
    for arm, its in ARMS.items():
        if arm != "baseline":               # it starts where with_ltm does
            arms.add_argument(arm_flag(arm), dest="arm", action="store_const", const=arm, help=its.label)
    arms.add_argument("--study", dest="arm", metavar="NAME", help="a control of the study with a backbone of its own",
                      choices=[arm for arm, its in STUDY.items() if its.backbone])
    parser.add_argument("--to", metavar="MODEL",
                        help="a model that is trained already: a folder, or a name on the hub")
    parser.add_argument("--window", type=window_size, metavar="N",
                        help="of --to: cut its attention to N tokens")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="S", help="of the initial weights (default 0)")
    args = parser.parse_args(argv)
    args.arm = args.arm or "with_ltm"
    if args.window and not args.to:
        parser.error("--window is that of another model's attention: it goes with --to")
    return args


def window_size(text):
    """An argparse type: a window of at least two tokens."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not 2 or more")
    return number


def main(argv=None):
    args = parse(argv)
    start = time.time()
    root, settings = default_root(args.root, args.quick), QUICK if args.quick else FULL
    tokenizer = load_tokenizer(root, args.quick)
    if about(args.arm).lora and not args.to:
        raise StageError(f"{about(args.arm).label} changes a model that is trained already; name it: "
                         + command(f"add_memory.py {arm_flag(args.arm)} --to MODEL", root, args.quick))
    facts = dict(size=settings.size)
    if args.to:
        gpt, hybrid = host_models(args, settings, tokenizer, root)
        facts = dict(to=args.to, attention_window=args.window)
    else:
        gpt, hybrid = make_models(settings, args.seed, args.arm)
    try:
        prove(gpt, hybrid)
        if hybrid.config.memory == "ltm":
            prove_ltm(hybrid)
    except Exception as error:
        if not args.to:
            raise
        raise refusal(args.to, error) from None
    print("proved: memory off = the model bit for bit; sequences share nothing; token by token = at once; "
          "nothing of the future is seen"
          + "; the LTM starts empty and is first in, first out" * (hybrid.config.memory == "ltm"))
    total = report(hybrid, args.to or f"RevenaHybridTiny-{settings.size}", args.seed, args.arm)
    folder = arm_folder(root, args.seed, init_name(args.arm))
    check_room(folder, args)
    write_folder(hybrid, tokenizer, folder, seed=args.seed, parameters=total, **facts)
    following = "train.py --baseline" if args.arm in SPECIFIED else f"train.py {arm_flag(args.arm)}"
    print(f"wrote {folder}/ in {time.time() - start:.0f} s; next: "
          + command(following, root, args.quick, args.seed or None))


if __name__ == "__main__":
    run_stage(main)
