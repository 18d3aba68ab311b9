"""Counts the card's bytes of fine-tuning a LLaMA 7B, part by part, without a card.

    python bench/memory_7b.py                      # 8 bits, micro batch 4, cutoff 256
    python bench/memory_7b.py --bits 4 --size 13B

Weights, adapters, gradients and optimizer are counted from the shapes. Activations are measured: one decoder layer of
the real width runs forward on the CPU, and every tensor that autograd keeps for the backward pass is counted (by
storage, weights left out). With gradient checkpointing, which finetune.py turns on on a card, that is held for one
layer at a time, and of the others only their input. In 8 bits that takes the reentrant kind (a test looks after it):
bitsandbytes' int8 product keeps its input beside autograd. Prints a table and one JSON line.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vicuna import model as models  # noqa: E402
from vicuna.errors import ArgumentParser, run  # noqa: E402
from vicuna.loss import CHUNK  # noqa: E402

import torch  # noqa: E402
from peft import LoraConfig, inject_adapter_in_model  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding  # noqa: E402

SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # Touvron et al., arXiv:2302.13971, table 2
CONTEXT = 0.45e9  # what CUDA and its libraries take before the first tensor, about


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="7B", choices=SIZES, help="LLaMA's size")
    parser.add_argument("--bits", type=int, default=8, choices=(8, 4, 16), help="as in finetune.py")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="records at once")
    parser.add_argument("--cutoff_len", type=int, default=256, help="tokens a record")
    parser.add_argument("--lora_r", type=int, default=8, help="rank, on q_proj and v_proj")
    args = parser.parse_args()
    dim, inner, layers, heads = SIZES[args.size]
    config = LlamaConfig(hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=heads, vocab_size=32000, attn_implementation="sdpa")
    tokens = args.micro_batch_size * args.cutoff_len
    shapes = [(n_in, n_out) for name, n_in, n_out in models.linear_layers(models.skeleton(config)) if name != "lm_head"]
    n_linear, rows = sum(i * o for i, o in shapes), sum(o for _, o in shapes)
    per_weight = {8: 1, 4: 0.5 + 1 / 64 + 4 / 64 / 256, 16: 2}[args.bits]  # NF4: a scale byte per 64, a float per 256 of those
    n_lora = layers * 2 * args.lora_r * 2 * dim
    kept = layer_activations(config, args)
    parts = {
        "linear weights": n_linear * per_weight + (rows * 4 if args.bits == 8 else 0),
        "embedding, head, norms (16 bits)": (2 * 32000 * dim + (2 * layers + 1) * dim) * 2,
        "adapters (float32)": n_lora * 4,
        "their gradients": n_lora * 4,
        "Adam's two moments": n_lora * 8,
        "checkpoints: each layer's input": layers * tokens * dim * 2,
        "one layer's activations, recomputed": kept,
        "its linear layers' inputs, kept by the int8 product": tokens * (3 * dim + inner) * 2 if args.bits == 8 else 0,
        "one weight, dequantized, and its product": (2 * dim * inner * 2 if args.bits != 16 else 0) + 2 * tokens * inner * 2,
        f"logits of {CHUNK} positions, thrice": CHUNK * 32000 * (4 + 4 + 2),
        "head's gradient (float32)": tokens * dim * 4,
        "CUDA context (about)": CONTEXT,
    }
    total = sum(parts.values())
    for name, size in parts.items():
        print(f"| {name} | {size / 1e9:.2f} GB |")
    print(f"| **sum** | **{total / 1e9:.2f} GB** |")
    print(json.dumps({"bench": "memory_7b", "size": args.size, "bits": args.bits, "micro_batch_size": args.micro_batch_size,
                      "cutoff_len": args.cutoff_len, "gb": {name: round(size / 1e9, 3) for name, size in parts.items()},
                      "total_gb": round(total / 1e9, 2)}))


def layer_activations(config, args):
    """Bytes that one decoder layer with LoRA keeps for its backward pass, in bf16 (measured; weights left out)."""
    layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
    layer = inject_adapter_in_model(LoraConfig(r=args.lora_r, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]), layer)
    layer.train()
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = (tensor.untyped_storage().nbytes(), tensor)  # held, so that no storage is used twice
        return tensor
    x = torch.randn(args.micro_batch_size, args.cutoff_len, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(args.cutoff_len)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        layer(x, position_embeddings=positions, attention_mask=None)
    return sum(size for size, _ in kept.values())


if __name__ == "__main__":
    run(main)
