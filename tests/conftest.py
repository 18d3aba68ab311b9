"""What the tests share: the scripts called in this process, small models made on the spot, the embedded base."""
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests promise, they promise of a machine without a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing by more, and threads that spin stall a busy machine

from vicuna import errors  # noqa: E402

import sentencepiece  # noqa: E402
import torch  # noqa: E402
from sentencepiece import sentencepiece_model_pb2  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

BASE = ROOT / "models" / "smollm2-135m-instruct"
# The real LLaMA tokenizer is not ours to ship; where it is at hand (tokenizer.model of any LLaMA 1 or 2), it is tested.
LLAMA_TOKENIZER = Path(os.environ.get("LLAMA_TOKENIZER", ROOT.parent / "shared" / "data" / "llama_tokenizer.model"))
TEXT = [
    "Chinese and English: 中文和英文，混在一起。", "日本語も少しあります。", "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1", "        deep    blanks    in    between", "请把下面的句子翻译成英文。", "我很喜欢吃苹果。", "What is 12 + 30?", "List three fruits.",
]


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def finetune(monkeypatch):
    """finetune(*argv): runs finetune.py's body as its `__main__` does, in this process (an import takes seconds)."""
    import finetune as script

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, argv)])
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                errors.run(script.main)
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else (print(stop.code, file=sys.stderr), 1)[1]
        return Result(status or 0, out.getvalue(), err.getvalue())
    return call


def clean_env(**more):
    """The environment for a script of its own, without what a run with --wandb in this process left in it."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}, **more}


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """A small SentencePiece model of LLaMA's kind: BPE, byte fallback, text as it is, a blank before the first word."""
    file = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    with open(file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT * 20), model_writer=out, vocab_size=420, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=1.0,
            allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    # As in LLaMA's file, runs of blanks come early but have the lowest score.
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    runs = [piece for piece in proto.pieces if set(piece.piece) == {"▁"} and len(piece.piece) > 1]
    assert len(runs) >= 2
    for piece in runs:
        piece.score = -1e9
    file.write_bytes(proto.SerializeToString())
    return file


def make_llama(directory, tokenizer_model, seed=0, **config):
    """A random 2-layer LLaMA in bf16 with grouped heads and LLaMA's `tokenizer.model`, as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(Path(tokenizer_model).read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    values = dict(vocab_size=pieces.vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**values, **config})).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory, sentencepiece_model):
    """The directory of a small random LLaMA."""
    return make_llama(tmp_path_factory.mktemp("llama") / "tiny-llama", sentencepiece_model)


@pytest.fixture(scope="session")
def base():
    assert (BASE / "SHA256SUMS").exists(), "the embedded base is missing: python tools/get_base.py"
    return BASE


RECORDS = [{"instruction": f"Say {word}.", "input": "" if k % 2 else f"number {k}", "output": f"{word}!"}
           for k, word in enumerate("one two three four five six seven eight nine ten 十一 十二".split())]


@pytest.fixture
def data_file(tmp_path):
    """Twelve good records in a JSON file."""
    file = tmp_path / "records.json"
    file.write_text(json.dumps(RECORDS, ensure_ascii=False), "utf-8")
    return file
