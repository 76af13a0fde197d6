"""Make the model that an arm starts from: GPT-70M, a 128-token window (STM), and a memory.

reads   data/tokenizer/            the GPT-2 tokenizer
writes  trained/init/              the weights that baseline and with_ltm start from, as a Hugging Face folder
        trained/init_with_NAME/    those of a further memory: the same backbone, byte for byte

    python add_memory.py                the LTM, seed 0
    python add_memory.py --with-gru     another memory
    python add_memory.py --seed 1       another initialisation, into trained/seed1/
    python add_memory.py --quick        a small model of the same class, into quick/trained/

No GPT-2-style checkpoint of 70M is published, so GPT-70M starts from a seeded initialisation.
Before anything is written, the model is put to the proof: with its memory off it equals GPT-70M
bit for bit on 128 tokens; sequences share nothing; a memory starts empty; token by token it says
what it says of all tokens at once; no prediction depends on what comes after it. The LTM holds
256 items, first in first out.
"""

import os
import shutil
import time
from dataclasses import dataclass

import torch

from models import GPT, SIZES, RevenaConfig
from stages import (ARMS, EOT, SPECIFIED, STUDY, StageError, about, arm_flag, arm_folder, command,
                    default_root, init_name, load_tokenizer, model_class, parser_of, run_stage, save_model,
                    seed_number, write_manifest)


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


def make_models(settings, seed, arm="with_ltm"):
    """GPT-70M and the hybrid that an arm starts from, both on the CPU: the hybrid's backbone holds
    GPT-70M's weights.
    """
    mine = about(arm)
    gpt = make_gpt(settings, seed)
    if arm not in SPECIFIED:
        torch.manual_seed(MEMORY_SEED + seed)
    config = RevenaConfig(**SIZES[settings.size], **mine.backbone, stm_window=settings.window,
                          memory=mine.memory or "ltm", memory_settings=mine.settings, ltm_slots=settings.slots,
                          ltm_surprisal_bits=settings.surprisal_bits, ltm_cosine=settings.cosine)
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


# ------------------------------------------------------------ proofs

def check(holds, what):
    """Raise StageError unless a proof holds."""
    if not holds:
        raise StageError(f"the hybrid failed a proof: {what}; nothing was written (is models.py changed?)")


@torch.no_grad()
def prove(gpt, hybrid):
    """Raise StageError unless the hybrid is what this script's docstring says of every memory."""
    window, draw = hybrid.config.stm_window, torch.Generator().manual_seed(1)
    text = torch.randint(0, EOT, (2, window), generator=draw)
    hybrid.config.memory_enabled = False
    check(torch.equal(gpt(text).logits, hybrid(text).logits), "with its memory off it must equal GPT-70M bit for bit")
    hybrid.config.memory_enabled = True
    together, alone = hybrid(text).logits, hybrid(text[1:]).logits
    check(torch.allclose(together[1], alone[0], atol=1e-4), "sequences must not share a memory")
    streamed = hybrid(text[:1], past_key_values=hybrid.new_cache()).logits
    check(torch.allclose(together[0], streamed[0], atol=1e-4), "token by token it must say what it says at once")

    long = torch.randint(0, EOT, (1, 2 * window + 44), generator=draw)
    changed, middle = long.clone(), long.size(1) // 2
    changed[0, middle] = (changed[0, middle] + 1) % EOT
    before, after = hybrid(long).logits[0, :middle], hybrid(changed).logits[0, :middle]
    check(torch.equal(before, after), f"changing token {middle} must change no prediction before it")


@torch.no_grad()
def prove_ltm(hybrid):
    """Raise StageError unless the LTM starts empty, and holds its slots' worth of items, first in
    first out.
    """
    slots, draw = hybrid.config.ltm_slots, torch.Generator().manual_seed(2)
    # an untrained model is surprised by everything: token i becomes item i - 1, and 44 more than
    # the slots overflow
    long = torch.randint(0, EOT, (1, slots + 44), generator=draw)
    cache = hybrid.new_cache()
    check(cache.contents() == [], "a memory must start empty")
    hybrid(long, past_key_values=cache, logits_to_keep=1)
    held = [item["token"] for item in cache.contents()]
    check(held == long[0, -slots:].tolist(), f"after {long.size(1)} surprising tokens it must hold the last {slots}")


@torch.no_grad()
def milliseconds(hybrid, repeats=5):
    """Median time of scoring 8 rows of 128 tokens on the CPU with the memory off and on, measured
    in turn.
    """
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(0, EOT, (8, hybrid.config.stm_window), generator=draw)
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
    """Trainable parameters: {group: count}."""
    def count(module):
        return sum(p.numel() for p in module.parameters())

    groups = {"token embedding (tied)": model.backbone.embed, "layers": model.backbone.blocks, "memory": model.memory}
    return {name: count(module) for name, module in groups.items()}


def report(hybrid, size, seed, arm):
    """Print what the model consists of; raises StageError where 70M are not 70M."""
    groups = parameters_by_group(hybrid)
    total = sum(groups.values())
    for name, count in groups.items():
        print(f"{count:>12,}  {name}")
    print(f"{total:>12,}  in all: RevenaHybridTiny-{size}, {about(arm).label}, seed {seed}")
    if size == "70M" and not TOTAL[0] <= total <= TOTAL[1]:
        raise StageError(f"{total:,} parameters are not 70M; set SIZES in models.py back to between "
                         f"{TOTAL[0]:,.0f} and {TOTAL[1]:,.0f}")
    off, on = milliseconds(hybrid)
    print(f"the memory adds {groups['memory']:,} parameters ({groups['memory'] / total:.1%}) and {on - off:+.1f} ms to "
          f"the {off:.1f} ms of scoring 1,024 tokens on this CPU ({(on - off) / off:+.1%})")
    return total


def write_folder(hybrid, tokenizer, folder, **facts):
    """The model as a folder that is whole or absent."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)                # of a run that was killed
    aside.mkdir(parents=True)
    try:
        save_model(hybrid, tokenizer, aside)
        write_manifest(aside, **facts)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parse(argv=None):
    parser = parser_of(__doc__)
    arms = parser.add_mutually_exclusive_group()
    for arm, its in ARMS.items():
        if arm not in SPECIFIED:
            arms.add_argument(arm_flag(arm), dest="arm", action="store_const", const=arm, help=its.label)
    arms.add_argument("--study", dest="arm", metavar="NAME", help="a control of the study with a backbone of its own",
                      choices=[arm for arm, its in STUDY.items() if its.backbone])
    parser.add_argument("--seed", type=seed_number, default=0, metavar="S", help="of the initial weights (default 0)")
    args = parser.parse_args(argv)
    args.arm = args.arm or "with_ltm"
    return args


def main(argv=None):
    args = parse(argv)
    start = time.time()
    root, settings = default_root(args.root, args.quick), QUICK if args.quick else FULL
    tokenizer = load_tokenizer(root, args.quick)
    gpt, hybrid = make_models(settings, args.seed, args.arm)
    prove(gpt, hybrid)
    if hybrid.config.memory == "ltm":
        prove_ltm(hybrid)
    print("proved: memory off = GPT bit for bit; sequences share nothing; token by token = at once; nothing of the "
          "future is seen" + "; the LTM starts empty and is first in, first out" * (hybrid.config.memory == "ltm"))
    total = report(hybrid, settings.size, args.seed, args.arm)
    folder = arm_folder(root, args.seed, init_name(args.arm))
    write_folder(hybrid, tokenizer, folder, seed=args.seed, size=settings.size, parameters=total)
    following = "train.py --baseline" if args.arm in SPECIFIED else f"train.py {arm_flag(args.arm)}"
    print(f"wrote {folder}/ in {time.time() - start:.0f} s; next: "
          + command(following, root, args.quick, args.seed or None))


if __name__ == "__main__":
    run_stage(main)
