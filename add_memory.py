"""Make the hybrid of GPT-70M: a 128-token window (STM) and a surprisal-routed memory of 256 items (LTM).

reads   data/tokenizer/            the GPT-2 tokenizer
writes  trained/init/              the weights that both arms start from, as a Hugging Face folder

    python add_memory.py            seed 0
    python add_memory.py --seed 1   another initialisation, into trained/seed1/init/
    python add_memory.py --quick    a small model of the same class, into quick/trained/init/

No GPT-2-style checkpoint of 70M is published, so GPT-70M starts from a seeded initialisation. Before anything is
written, the hybrid is put to the proof: LTM off it equals GPT-70M bit for bit on 128 tokens; its memory is empty at
each sequence start; it holds 256 items, first in first out; and no prediction depends on what comes after it.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch

from models import (EOT, GPT, SIZES, Memory, RevenaConfig, RevenaHybridTiny, StageError, arm_folder, command,
                    default_root, load_tokenizer, manifest_of, parameters_by_group, run_stage, save_model)

SIZE = "70M"                    # of models.SIZES
WINDOW = 128                    # STM: tokens that attention sees
SLOTS = 256                     # LTM: items at most, first in first out
SURPRISAL_BITS = 4.5            # LTM: a token above this is stored
COSINE = 0.8                    # LTM: an item above this is retrieved
TOTAL = (65e6, 75e6)            # parameters that "70M" may mean


def make_models(size, seed):
    """GPT-70M and the hybrid made of it, both on the CPU: the hybrid's backbone holds GPT-70M's weights."""
    torch.manual_seed(seed)
    gpt = GPT(RevenaConfig(**SIZES[size], stm_window=None, ltm_enabled=False))
    hybrid = RevenaHybridTiny(RevenaConfig(**SIZES[size], stm_window=WINDOW, ltm_slots=SLOTS,
                                           ltm_surprisal_bits=SURPRISAL_BITS, ltm_cosine=COSINE))
    tables = hybrid.backbone.rotary
    hybrid.backbone.load_state_dict(gpt.backbone.state_dict() | {"rotary": tables})
    return gpt.eval(), hybrid.eval()


@torch.no_grad()
def prove(gpt, hybrid):
    """Raise StageError unless the hybrid is what it says; the four proofs of this script's docstring, in its order."""
    def check(holds, what):
        if not holds:
            raise StageError(f"the hybrid failed a proof: {what}; nothing was written (is models.py changed?)")

    draw = torch.Generator().manual_seed(1)
    text = torch.randint(0, EOT, (2, WINDOW), generator=draw)
    hybrid.config.ltm_enabled = False
    check(torch.equal(gpt(text).logits, hybrid(text).logits), "with the LTM off it must equal GPT-70M bit for bit")
    hybrid.config.ltm_enabled = True
    together = hybrid(text).logits
    check(torch.allclose(together[1], hybrid(text[1:]).logits[0], atol=1e-4), "sequences must not share a memory")
    memory = Memory(hybrid)
    check(memory.contents() == [] and torch.allclose(hybrid(text[:1, :1], past_key_values=memory).logits[0, 0],
          hybrid.logits(hybrid.states(text[:1, :1]))[0, 0].log_softmax(-1), atol=1e-4), "a memory must start empty")

    # an untrained model is surprised by everything: token i becomes item i - 1, and 300 tokens overflow 256 slots
    long = torch.randint(0, EOT, (1, SLOTS + 44), generator=draw)
    memory = Memory(hybrid)
    hybrid(long, past_key_values=memory, logits_to_keep=1)
    held = [item["token"] for item in memory.contents()]
    check(held == long[0, -SLOTS:].tolist(), f"after {long.size(1)} surprising tokens it must hold the last {SLOTS}")

    changed, middle = long.clone(), long.size(1) // 2
    changed[0, middle] = (changed[0, middle] + 1) % EOT
    before, after = hybrid(long).logits[0, :middle], hybrid(changed).logits[0, :middle]
    check(torch.equal(before, after), f"changing token {middle} must change no prediction before it")


@torch.no_grad()
def milliseconds(hybrid, repeats=5):
    """Median time of scoring 8 rows of 128 tokens on the CPU with the LTM off and on, measured in turn."""
    rows = torch.randint(0, EOT, (8, WINDOW), generator=torch.Generator().manual_seed(2))
    times = {False: [], True: []}
    for _ in range(repeats + 1):
        for enabled in times:
            hybrid.config.ltm_enabled = enabled
            start = time.perf_counter()
            hybrid.score(rows, rows.roll(-1, 1))
            times[enabled].append(1000 * (time.perf_counter() - start))
    return [sorted(taken[1:])[repeats // 2] for taken in times.values()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder that holds data/ and trained/ (default: this one; quick/ with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default 0)")
    parser.add_argument("--quick", action="store_true", help="a small model of the same class")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2 ** 32:
        parser.error("--seed must be from 0 to 4294967295")
    start = time.time()
    root = default_root(args.root, args.quick)
    tokenizer = load_tokenizer(root, args.quick)
    size = "quick" if args.quick else SIZE
    gpt, hybrid = make_models(size, args.seed)

    groups = parameters_by_group(hybrid)
    total = sum(groups.values())
    for name, count in groups.items():
        print(f"{count:>12,}  {name}")
    print(f"{total:>12,}  in all: RevenaHybridTiny-{size}, seed {args.seed}")
    if size == "70M" and not TOTAL[0] <= total <= TOTAL[1]:
        raise StageError(f"{total:,} parameters are not 70M; set SIZES in models.py back to between "
                         f"{TOTAL[0]:,.0f} and {TOTAL[1]:,.0f}")
    prove(gpt, hybrid)
    off, on = milliseconds(hybrid)
    print("proved: LTM off = GPT bit for bit; memory empty at each start; FIFO exact; nothing of the future is seen")
    print(f"the LTM adds {groups['long-term memory']:,} parameters ({groups['long-term memory'] / total:.1%}) and "
          f"{on - off:+.1f} ms to the {off:.1f} ms of scoring 1,024 tokens on this CPU ({(on - off) / off:+.1%})")

    folder = arm_folder(root, args.seed, "init")
    aside = folder.with_name(".init.tmp")
    shutil.rmtree(aside, ignore_errors=True)             # of a run that was killed
    aside.mkdir(parents=True)
    try:
        save_model(hybrid, tokenizer, aside)
        manifest_of(aside, seed=args.seed, size=size, parameters=total)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"wrote {folder}/ in {time.time() - start:.0f} s; next: "
          + command("train.py --baseline", root, args.quick, args.seed or None))


if __name__ == "__main__":
    run_stage(main)
