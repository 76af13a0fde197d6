"""A GPT-2 that Hugging Face's Trainer trains on the same rows: a model of somebody else's, for add_memory.py --to.

reads   ROOT/data/train.bin, ROOT/data/tokenizer
writes  ROOT/gpt2/      a folder as Trainer's users have it, tokenizer included

    python tests/trainer_gpt2.py                the size of GPT-70M, 10,000 steps of 8 rows
    python tests/trainer_gpt2.py --quick        small, under quick/, on any CPU

Layers, width, heads, rows, their order, batch, optimizer and learning rates are those of train.py --baseline; what is
GPT-2's own stays so: learned positions, biases, no gates, layer norms with weights. No dropout, as there is none here.
"""

import sys
from pathlib import Path

import torch
import transformers

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import train                                                                        # noqa: E402
from add_memory import FULL, QUICK                                                  # noqa: E402
from models import SIZES                                                            # noqa: E402
from stages import command, default_root, load_split, load_tokenizer, parser_of, run_stage      # noqa: E402


class InOrder(transformers.Trainer):
    """A Trainer that takes the rows as they come, and not shuffled."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments_of(settings, steps, folder, seed):
    """What Trainer is told; min_lr as train.py has it."""
    return transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=settings.batch, seed=seed,
        learning_rate=settings.lr, lr_scheduler_type="cosine_with_min_lr", warmup_steps=settings.warmup,
        lr_scheduler_kwargs={"min_lr": settings.min_lr}, weight_decay=settings.weight_decay, adam_beta1=settings.beta1,
        adam_beta2=settings.beta2, adam_epsilon=settings.eps, max_grad_norm=settings.clip,
        bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[],
        logging_steps=max(1, steps // 10))


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, metavar="N", help=f"optimizer steps (default {train.FULL.steps:,})")
    args = parser.parse_args(argv)
    root, settings = default_root(args.root, args.quick), train.QUICK if args.quick else train.FULL
    steps, size = args.steps or settings.steps, SIZES[(QUICK if args.quick else FULL).size]
    tokenizer = load_tokenizer(root, args.quick)
    rows, meta = load_split(root, "train", args.quick)
    eot = meta["eot"]
    order = train.plan_rows(rows, steps, settings, 0, eot=eot).rows.flatten()
    tokens = torch.from_numpy(rows.astype("int64"))
    data = [{"input_ids": tokens[i], "labels": tokens[i].masked_fill(tokens[i] == eot, -100)} for i in order.tolist()]
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=meta["vocab_size"], n_positions=rows.shape[1], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=eot, eos_token_id=eot, **size))
    folder = root / "gpt2"
    InOrder(model, arguments_of(settings, steps, folder, 0), train_dataset=data).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}/; next: " + command(f"add_memory.py --to {folder}", "DIR", args.quick)
          + f", with a copy of {root}/data in DIR")


if __name__ == "__main__":
    run_stage(main)
