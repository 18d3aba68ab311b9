"""Training speed and memory of finetune.py beside a plain loop padded to the cutoff, in turn, in one run.

    python bench/train_throughput.py --data_path alpaca_en_demo.json       # LLaMA-Factory's data/alpaca_en_demo.json

The work: the file's first 64 records, cutoff 256, micro-batch 4, a step each, LoRA r 8 on q_proj and v_proj. The plain
loop is what Alpaca-LoRA and the original do: every record padded to 256, logits and loss over all positions by
transformers. Ours is finetune.py itself, its figures those of run.json. Each is a process of its own, so that its peak
memory can be told; they take turns. Prints one JSON line.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vicuna import data, model as models, prompt  # noqa: E402
from vicuna.errors import ArgumentParser, run  # noqa: E402

import torch  # noqa: E402

CUTOFF, MICRO_BATCH = 256, 4


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="records, at least 64")
    parser.add_argument("--model_path", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="base")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn; medians are printed")
    parser.add_argument("--plain", type=int, default=0, help="(internal) run the plain loop in so many bits, in this process")
    args = parser.parse_args()
    if args.plain:
        print(json.dumps(plain(args)))
        return

    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        records = data.read(args.data_path)[0][:64]
        (directory / "work.json").write_text(json.dumps([r._asdict() for r in records]))
        args.data_path = str(directory / "work.json")
        runs = {}
        for turn in range(args.rounds):
            for bits in (16, 8):
                runs.setdefault(f"plain_{bits}", []).append(run_plain(args, bits))
                runs.setdefault(f"ours_{bits}", []).append(run_ours(args, bits, directory / f"out-{turn}-{bits}"))
    result = {"bench": "train_throughput", "records": len(records), "rounds": args.rounds}
    for name, figures in runs.items():
        result[name] = {"records_per_second": round(median(f[0] for f in figures), 2),
                        "peak_gb": round(median(f[1] for f in figures) / 1e9, 2)}
    for bits in (16, 8):
        pairs = [(ours[0] / plain[0]) for ours, plain in zip(runs[f"ours_{bits}"], runs[f"plain_{bits}"])]
        result[f"speed_ratio_{bits}"] = round(median(pairs), 2)
        result[f"memory_ratio_{bits}"] = round(result[f"ours_{bits}"]["peak_gb"] / result[f"plain_{bits}"]["peak_gb"], 2)
    print(json.dumps({**result, "machine": machine()}))


def run_plain(args, bits):
    out = subprocess.run([sys.executable, __file__, "--data_path", args.data_path, "--model_path", args.model_path, "--plain", str(bits)],
                         capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def run_ours(args, bits, output):
    subprocess.run([sys.executable, str(ROOT / "finetune.py"), "--data_path", args.data_path, "--model_path", args.model_path,
                    "--output_path", str(output), "--bits", str(bits), "--test_size", "0", "--micro_batch_size", str(MICRO_BATCH),
                    "--batch_size", str(MICRO_BATCH), "--num_epochs", "1", "--warmup_steps", "0", "--cutoff_len", str(CUTOFF)],
                   capture_output=True, text=True, check=True)
    figures = json.loads((output / "run.json").read_text())["figures"]
    return figures["records_per_second"], figures["peak_memory_bytes"]


def plain(args):
    """The plain loop in `args.plain` bits: (records per second, peak bytes)."""
    base = Path(args.model_path)
    config, _ = models.load_config(base)
    tokenizer, _ = models.load_tokenizer(base, config)
    dtype = models.compute_dtype()
    model = models.attach_lora(models.load_base(base, config, args.plain, "cpu"), base, 8, 16, 0.05, ["q_proj", "v_proj"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    records = data.read(args.data_path)[0]
    ids, n_prompt = prompt.encode_examples(tokenizer, [prompt.alpaca(r.instruction, r.input) for r in records],
                                           [r.output for r in records], CUTOFF)
    start = time.monotonic()
    model.train()
    for first in range(0, len(ids), MICRO_BATCH):
        rows = list(zip(ids, n_prompt))[first:first + MICRO_BATCH]
        pad = [CUTOFF - len(row) for row, _ in rows]
        batch = {
            "input_ids": torch.tensor([row + [0] * p for (row, _), p in zip(rows, pad)]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * p for (row, _), p in zip(rows, pad)]),
            "labels": torch.tensor([[-100] * n + row[n:] + [-100] * p for (row, n), p in zip(rows, pad)]),
        }
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return len(ids) / (time.monotonic() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine():
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")), "CPU")
    isa = "AVX-512 BF16" if "avx512_bf16" in flags else "AVX-512" if "avx512f" in flags else "AVX2"
    return f"{os.cpu_count()} cores, {name}, {isa}, torch {torch.__version__}"


if __name__ == "__main__":
    run(main)
