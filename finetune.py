"""Fine-tunes a LLaMA on instructions: the base in 8 bits, a LoRA beside it, one 11 GB card or none.

    bash finetune.sh                                                        # the embedded base on the sample
    .venv/bin/python finetune.py --data_path merge.json --test_size 2000    # LLaMA 7B on your own data, one card
    TOT_CUDA="0,1,2,3" DATA_PATH=merge.json bash finetune.sh                # four cards, the batch split among them

Data: records {"instruction", "input" (optional), "output"} in JSON or JSON Lines. What comes out, in --output_path:
adapter_config.json + adapter_model.safetensors (a PEFT adapter), the tokenizer, checkpoint-N/ of the same,
run.json (settings, versions, hashes, figures) and loss.png.
"""
import argparse
import errno
import gc
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from vicuna.errors import ArgumentParser, UserError, run

try:
    from vicuna import data, model as models, prompt, report  # first: vicuna quiets what other packages say at import
    from vicuna.loss import mean_loss, use_label_loss

    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
except ModuleNotFoundError as error:
    sys.exit(print(f"error: this Python has no {error.name}; bash setup.sh makes one that has: .venv/bin/python finetune.py",
                   file=sys.stderr) or 2)

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
QUESTIONS = 5  # held-out questions answered before and after
PROBE = 50     # with nothing held out, so many training records stand in


def arguments():
    parser = ArgumentParser(description=__doc__)
    group = parser.add_argument_group("what and where")
    group.add_argument("--data_path", default="merge.json", help="a file, several joined by commas, or a directory")
    group.add_argument("--output_path", default="lora-Vicuna", help="directory for the adapter")
    group.add_argument("--model_path", default="huggyllama/llama-7b", help="base: a directory or a hub id")
    group.add_argument("--test_size", type=int, default=200, help="records held out to measure the loss on; 0: none")
    group.add_argument("--overwrite_output_dir", action="store_true", help="replace another run's result in --output_path")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases (WANDB_MODE=offline: to a file)")

    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_r", type=int, default=8, help="rank")
    group.add_argument("--lora_alpha", type=float, default=16, help="the update is scaled by alpha / r")
    group.add_argument("--lora_dropout", type=float, default=0.05, help="share of inputs dropped, 0 to below 1")
    group.add_argument("--lora_target_modules", default="q_proj,v_proj", help="linear layers, joined by commas")

    group = parser.add_argument_group("training")
    group.add_argument("--bits", type=int, default=8, choices=(8, 4, 16), help="base weights: int8, NF4, or 16 bits")
    group.add_argument("--micro_batch_size", type=int, default=4, help="records a card works on at once")
    group.add_argument("--batch_size", type=int, default=128, help="records a step, over all cards")
    group.add_argument("--num_epochs", type=float, default=3, help="times through the data")
    group.add_argument("--max_steps", type=int, default=-1, help="steps; if above 0 it counts instead of --num_epochs")
    group.add_argument("--learning_rate", type=float, default=3e-4, help="peak; then linearly to 0")
    group.add_argument("--warmup_steps", type=int, default=100, help="steps over which the rate rises to its peak")
    group.add_argument("--cutoff_len", type=int, default=256, help="tokens a record, template included")
    group.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=None,
                       help="keep less, compute twice; default: on a card yes, on a CPU no")
    group.add_argument("--seed", type=int, default=42, help="for the split, the order, the LoRA's start and dropout")

    group = parser.add_argument_group("while it runs")
    group.add_argument("--eval_steps", type=int, default=200, help="steps between two evaluations")
    group.add_argument("--save_steps", type=int, default=200, help="steps between two checkpoints")
    group.add_argument("--save_total_limit", type=int, default=30, help="checkpoints kept, the best among them")
    group.add_argument("--logging_steps", type=int, default=20, help="steps between two lines of progress")
    return parser.parse_args()


def main():
    args = arguments()
    try:
        finetune(args)
    except torch.OutOfMemoryError:
        raise UserError("the card's memory is full; a smaller --micro_batch_size, --cutoff_len or --bits needs less") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) \
            or "PytorchStreamWriter" in str(error)
        if not full:
            raise
        raise UserError(f"--output_path {args.output_path}: the disk is full ({error}); make room and run this again") from None


def finetune(args):
    """The whole task, step by step."""
    args.lora_target_modules = [name.strip() for name in args.lora_target_modules.split(",") if name.strip()]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"

    # 1. Check everything that can be checked before anything is written or a large file is read.
    check_numbers(args)
    records, sources = data.read(args.data_path)
    say(data.report_records(sources))
    base = models.find_base(args.model_path)
    config, mended = models.load_config(base)
    tokenizer, mended_tokenizer = models.load_tokenizer(base, config)
    skeleton = models.skeleton(config)
    models.check_targets(skeleton, args.lora_target_modules)
    template = len(prompt.encode_prompts(tokenizer, [prompt.alpaca("", "")])[0])
    if args.cutoff_len <= template:
        raise UserError(f"--cutoff_len {args.cutoff_len}: the template alone has {template} tokens; 256 is usual")
    dataset, lengths = data.encode(records, tokenizer, args.cutoff_len, progress=say)
    train, held_out = data.split(dataset, args.test_size, args.seed)

    say(data.report_lengths(lengths, args.cutoff_len))
    for line in mended + mended_tokenizer:
        say(f"Base      mended in memory: {line}")
    if args.cutoff_len > config.max_position_embeddings:
        say(f"          --cutoff_len {args.cutoff_len} is more than the {config.max_position_embeddings} positions the "
            "base was trained for")
    accumulation, steps = fit_to_data(args, len(train))

    settings = {key: value for key, value in sorted(vars(args).items())
                if key not in ("output_path", "overwrite_output_dir", "wandb")}
    identity = {"settings": settings, "processes": WORLD_SIZE,
                "data": {source.path: source.sha256 for source in sources}, "base": models.fingerprint(base),
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    output = Path(args.output_path).absolute()
    check_output(output, identity, args.overwrite_output_dir)
    check_room(output, skeleton, args, steps)
    if args.wandb and RANK == 0:
        check_wandb()

    # 2. Load the base in its bits, attach the LoRA. With several processes, they meet in TrainingArguments.
    evaluate = "steps" if len(held_out) else "no"
    if args.wandb:
        os.environ.setdefault("WANDB_PROJECT", "chinese-vicuna")
        os.environ.setdefault("WANDB_DIR", str(output))
    training = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=accumulation, num_train_epochs=args.num_epochs, max_steps=args.max_steps,
        learning_rate=args.learning_rate, lr_scheduler_type="linear", warmup_steps=args.warmup_steps, optim="adamw_torch",
        bf16=models.compute_dtype() == torch.bfloat16, fp16=models.compute_dtype() == torch.float16,
        use_cpu=not cuda, dataloader_pin_memory=cuda, ddp_backend="gloo" if WORLD_SIZE > 1 and not cuda else None,
        ddp_find_unused_parameters=False, remove_unused_columns=False, label_names=["labels"],
        eval_strategy=evaluate, eval_steps=args.eval_steps,
        save_strategy="steps", save_steps=args.save_steps, save_total_limit=args.save_total_limit,
        load_best_model_at_end=evaluate == "steps", metric_for_best_model="loss", greater_is_better=False,
        logging_steps=args.logging_steps, disable_tqdm=True, seed=args.seed, data_seed=args.seed,
        report_to=["wandb"] if args.wandb else [], run_name=output.name)
    training._n_gpu = min(training.n_gpu, 1)  # one process, one card: several cards are torchrun's (finetune.sh's) business
    set_seed(args.seed)
    base_model = models.load_base(base, config, args.bits, device)
    use_label_loss(base_model)
    checkpointing = cuda if args.gradient_checkpointing is None else args.gradient_checkpointing
    if checkpointing:
        # bitsandbytes' int8 product keeps its input by itself, not by autograd; only the reentrant kind lets that go.
        base_model.gradient_checkpointing_enable({"use_reentrant": args.bits == 8})
        if args.bits == 8:
            base_model.enable_input_require_grads()
    model = models.attach_lora(base_model, args.model_path, args.lora_r, args.lora_alpha, args.lora_dropout,
                               args.lora_target_modules)
    n_lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and shutil.which("nvidia-smi"):
        say("          torch cannot use the card that is here (an old driver, or torch's CPU build): training on the CPU")
    dtype = str(models.compute_dtype()).removeprefix("torch.")
    say(f"Base      {args.model_path}: {skeleton.num_parameters():,} parameters in {args.bits} bits, {dtype}, "
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}{f' x {WORLD_SIZE}' if WORLD_SIZE > 1 else ''}")
    say(f"LoRA      r {args.lora_r}, alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g} on "
        f"{', '.join(args.lora_target_modules)}: {n_lora:,} parameters")
    say(f"Training  {len(train):,} records, {len(held_out):,} held out; {steps:,} steps of {args.batch_size} records "
        f"({args.micro_batch_size} at once), rate {args.learning_rate:g}")

    # 3. What the base says before: the loss on held-out records, and a few answers.
    probe, probe_name = (held_out, "held-out") if len(held_out) else (train.select(range(min(PROBE, len(train)))), "training")
    questions = [records[k]._asdict() for k in probe["record"][:QUESTIONS]]
    loss_before = mean_loss(model, probe, args.micro_batch_size, RANK, WORLD_SIZE)
    if not math.isfinite(loss_before):
        raise UserError(f"{args.model_path}: gives a loss of {loss_before} on the data; its weights are damaged"
                        + (", or overflow in float16: try --bits 4" if dtype == "float16" else ""))
    before = answer(model, tokenizer, questions)
    say(f"          {probe_name} loss of the base: {loss_before:.4f}")

    # 4. Train. The best of the evaluated checkpoints is kept.
    set_aside = None
    with training.main_process_first(local=False):
        if RANK == 0:
            set_aside = open_output(output, identity)
    progress = report.Progress(args.batch_size, show=RANK == 0)
    trainer = LabelTrainer(
        model=model, args=training, train_dataset=train, eval_dataset=held_out if len(held_out) else None,
        data_collator=lambda examples: data.collate(examples, multiple=8 if cuda else 1), processing_class=tokenizer,
        callbacks=[progress])
    trainer.remove_callback(PrinterCallback)
    start = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - start
    model.eval()
    loss_trained = mean_loss(model, probe, args.micro_batch_size, RANK, WORLD_SIZE)
    if RANK != 0:
        return
    models.save_adapter(model, tokenizer, output)
    trained = models.adapter_weights(model)

    # 5. Proof: what lies on the disk, loaded into a fresh base, is what was trained.
    records_seen = trainer.state.epoch * len(train)
    best_step = int(trainer.state.best_model_checkpoint.rpartition("-")[2]) if trainer.state.best_model_checkpoint else steps
    memory, of_what = report.peak_memory()
    del trainer, model, base_model
    gc.collect()
    torch.cuda.empty_cache()
    say("Proof     loading the saved adapter into a fresh base ...")
    loss_after, after = prove(output, trained, loss_trained, base, config, tokenizer, args, device, probe, questions)
    say(f"          its weights are not zero, its {probe_name} loss is the trained one: {loss_after:.4f} (step {best_step})")

    # 6. What it learned.
    rows = [{"instruction": q["instruction"], "input": q["input"], "expected": q["output"], "before": b, "after": a}
            for q, b, a in zip(questions, before, after)]
    figures = {"loss_before": loss_before, "loss_after": loss_after, "loss_on": probe_name, "steps": steps,
               "best_step": best_step, "train_records": len(train), "held_out_records": len(held_out),
               "cut": lengths.cut, "too_long": lengths.too_long, "seconds": round(seconds, 2),
               "records_per_second": round(records_seen / seconds, 3), "peak_memory_bytes": memory, "peak_memory_of": of_what}
    report.plot_loss(progress.history, probe_name, loss_before, loss_after, output / "loss.png")
    write_json(output / "run.json", {**identity, "output_path": args.output_path, "finished": True,
                                     "dropped": {source.path: dict(source.dropped) for source in sources},
                                     "figures": figures, "answers": rows, "history": progress.history})
    if set_aside:
        shutil.rmtree(set_aside, ignore_errors=True)
    say(report.learned(probe_name, loss_before, loss_after, rows))
    say(f"\nTrained in {report.clock(seconds)}, {figures['records_per_second']:.1f} records/s with evaluations, peak "
        f"{memory / 1e9:.2f} GB ({of_what}). Adapter, run.json and loss.png are in {args.output_path}")
    if not loss_after < loss_before:
        say("It learned nothing: the loss did not fall. A higher --learning_rate or more --num_epochs may help.")


class LabelTrainer(Trainer):
    """The Hugging Face Trainer with the order of `vicuna.data.GroupedByLength` and the evaluation of `vicuna.loss`: a
    mean over tokens, the same before, during and after."""

    def _get_train_sampler(self, train_dataset=None):
        return data.GroupedByLength(self.train_dataset["length"][:], self.args.per_device_train_batch_size, self.args.seed)

    def _determine_best_metric(self, metrics, trial):
        """The best among the steps that are saved: one that was only evaluated cannot be kept."""
        return self.control.should_save and super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir, exist_ok=True)
        models.save_adapter(self.model, self.processing_class, output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        loss = mean_loss(self.model, eval_dataset or self.eval_dataset, self.args.per_device_train_batch_size,
                         RANK, WORLD_SIZE)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# --- checks ---------------------------------------------------------------------------------------------------------

def check_numbers(args):
    """UserError for a flag whose number makes no sense."""
    def need(flag, good, what):
        if not good:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be {what}")

    for flag in ("lora_r", "micro_batch_size", "batch_size", "cutoff_len", "eval_steps", "save_steps", "save_total_limit",
                 "logging_steps"):
        need(flag, getattr(args, flag) >= 1, "1 or more")
    for flag in ("learning_rate", "lora_alpha", "num_epochs"):
        need(flag, getattr(args, flag) > 0 and math.isfinite(getattr(args, flag)), "a number above 0")
    for flag in ("test_size", "warmup_steps"):
        need(flag, getattr(args, flag) >= 0, "0 or more")
    need("lora_dropout", 0 <= args.lora_dropout < 1, "from 0 to below 1")
    need("seed", 0 <= args.seed < 2**32, f"from 0 to {2**32 - 1}")
    need("max_steps", args.max_steps == -1 or args.max_steps >= 1, "1 or more, or -1 for --num_epochs")
    if args.batch_size % args.micro_batch_size:
        raise UserError(f"--batch_size {args.batch_size}: must be a multiple of --micro_batch_size {args.micro_batch_size}")
    if args.test_size and args.save_steps % args.eval_steps:
        raise UserError(f"--save_steps {args.save_steps}: must be a multiple of --eval_steps {args.eval_steps}, since the "
                        "best checkpoint is chosen among the evaluated ones")


def fit_to_data(args, n_train):
    """Fits batch, warm-up and evaluation to a small data set, and says so. Gives (accumulation steps, all steps)."""
    at_once = args.micro_batch_size * WORLD_SIZE
    if args.batch_size > n_train:
        fitting = max(n_train // at_once, 1) * at_once
        say(f"          --batch_size {args.batch_size} is more than the {n_train} training records: {fitting} is used")
        args.batch_size = fitting
    if args.batch_size % at_once:
        fitting = max(args.batch_size // at_once, 1) * at_once
        say(f"          --batch_size {args.batch_size} is no multiple of {args.micro_batch_size} records x {WORLD_SIZE} "
            f"processes: {fitting} is used")
        args.batch_size = fitting
    accumulation = args.batch_size // at_once
    a_epoch = math.ceil(math.ceil(n_train / at_once) / accumulation)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_epochs * a_epoch)
    if args.warmup_steps >= steps:
        fitting = steps // 10
        say(f"          --warmup_steps {args.warmup_steps} is not less than the {steps} steps of this run: {fitting} is used")
        args.warmup_steps = fitting
    if args.test_size and args.eval_steps > steps:
        say(f"          --eval_steps {args.eval_steps} is more than the {steps} steps of this run: {steps} is used")
        args.eval_steps = args.save_steps = steps
    return accumulation, steps


def check_room(output, skeleton, args, steps):
    """UserError if the disk has no room for the adapter and the checkpoints that will be kept."""
    n_lora = sum(args.lora_r * (n_in + n_out) for _, n_in, n_out in models.linear_layers(skeleton, args.lora_target_modules))
    checkpoints = min(args.save_total_limit + 1, steps // args.save_steps + 1)
    # A checkpoint: float32 weights and Adam's two moments, the tokenizer, the states. The last one: for rename's sake.
    need = (checkpoints + 1) * (n_lora * 12 + 8_000_000)
    place = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(f"{place}: {free / 1e6:,.0f} MB free on the disk, {checkpoints} checkpoints of this run need "
                        f"{need / 1e6:,.0f} MB; make room, or give a smaller --save_total_limit")


def check_wandb():
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    import wandb
    try:
        wandb.login()
    except (wandb.errors.Error, OSError) as error:
        raise UserError(f"--wandb: {error}; `wandb login` once, or WANDB_MODE=offline") from None


# --- the output directory -------------------------------------------------------------------------------------------

def check_output(output, identity, overwrite):
    """UserError if `output` cannot be written, or holds what must not be lost. The same run may be done again."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_path {output}: is a file; give a directory")
    if output.is_dir() and any(output.iterdir()):
        old = read_run(output)
        if old is None:
            raise UserError(f"--output_path {output}: holds files that are no run of finetune.py; give another")
        if not overwrite and {key: old.get(key) for key in identity} != json.loads(json.dumps(identity)):
            raise UserError(f"--output_path {output}: holds another run's result; give another path, or "
                            "--overwrite_output_dir to replace it")
    place = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY \
            or place.as_posix().startswith(("/proc/", "/sys/")) or place.as_posix() in ("/proc", "/sys"):
        raise UserError(f"--output_path {output}: {place} cannot be written to; give another path")


def open_output(output, identity):
    """Makes `output` with a run.json. Gives the directory in which an earlier run there is kept until this one is done,
    or None if `output` held none.

    If two earlier ones are there, both not finished, the one that had come further is kept.
    """
    aside = output.with_name(f".{output.name}.set-aside")
    replaces = output.is_dir() and any(output.iterdir())
    try:
        if replaces:
            if aside.exists() and reached(aside) > reached(output):
                shutil.rmtree(output)
            else:
                shutil.rmtree(aside, ignore_errors=True)
                output.rename(aside)
            say(f"          the earlier run in {output} is kept in {aside.name} until this one is done")
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "run.json", {**identity, "finished": False})
    except OSError as error:
        raise UserError(f"--output_path {output}: cannot be written to: {error.strerror}") from None
    return aside if replaces else None


def reached(output):
    """How far the run in `output` came: its newest checkpoint's step, or infinity if it is finished."""
    if (read_run(output) or {}).get("finished"):
        return math.inf
    return max((int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-*[0-9]")), default=0)


def read_run(output):
    try:
        run_json = json.loads((output / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return run_json if isinstance(run_json, dict) else None


def write_json(file, values):
    beside = file.with_name("." + file.name)
    beside.write_text(json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n", "utf-8")
    os.replace(beside, file)


# --- proof ----------------------------------------------------------------------------------------------------------

def prove(output, trained, loss_trained, base, config, tokenizer, args, device, probe, questions):
    """Loads the adapter from the disk into a fresh base; exits with status 1 if it is not what was trained.

    `trained`: the trained weights, {name: tensor}; `loss_trained`: their loss on `probe`.
    Gives (the loaded adapter's loss on `probe`, its answers to `questions`).
    """
    try:
        model = models.load_adapter(use_label_loss(models.load_base(base, config, args.bits, device)), output)
    except UserError as error:
        sys.exit(f"FAILED: what was saved is not what was trained: {error}")
    for name, tensor in models.adapter_weights(model).items():
        if not torch.equal(tensor, trained[name]):
            sys.exit(f"FAILED: what was saved is not what was trained: tensor {name} in {output} is another one")
    loss = mean_loss(model, probe, args.micro_batch_size)
    if not abs(loss - loss_trained) <= 1e-3 * max(1, abs(loss_trained)):
        sys.exit(f"FAILED: the adapter saved in {output} has a loss of {loss:.4f}, the trained model {loss_trained:.4f}: "
                 "what was saved is not what was trained")
    return loss, answer(model, tokenizer, questions)


@torch.no_grad()
def answer(model, tokenizer, questions, max_new_tokens=48):
    """Greedy answers to records' questions, all in one batch. Gives a list of texts."""
    model.eval()
    prompts = prompt.encode_prompts(tokenizer, [prompt.alpaca(q["instruction"], q["input"]) for q in questions])
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    return [prompt.decode_response(tokenizer, p, row[longest:].tolist()).strip() for p, row in zip(prompts, out)]


def say(text):
    if RANK == 0:
        print(text, flush=True)


if __name__ == "__main__":
    run(main)
