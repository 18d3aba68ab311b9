"""Instruction records: read and check files, report on them, turn them into training examples, batch them.

A file holds records {"instruction": text, "input": text (may be absent), "output": text}, as a JSON array or one JSON
object after the other (JSON Lines), plain or gzipped, whatever its name ends in.
"""
import gzip
import hashlib
import json
import re
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from vicuna import prompt
from vicuna.errors import UserError

IGNORE = -100  # the label of a position that does not count, as in torch and transformers
SHAPE = 'expected {"instruction": "...", "input": "..." (optional), "output": "..."}'
FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # what is read of a directory


class Record(NamedTuple):
    instruction: str
    input: str
    output: str


@dataclass
class Source:
    """What one file gave: its hash, how many records it holds, and how many of them were dropped, by reason."""
    path: str
    sha256: str
    records: int = 0
    dropped: Counter = field(default_factory=Counter)


# --- read -----------------------------------------------------------------------------------------------------------

def read(data_path):
    """Reads one file, several joined by commas, or a directory. Gives (list of Record, list of Source).

    Dropped and counted: records with an empty output, without any question, with half a character, and exact
    duplicates (one of each is kept, so that no held-out record is a training record as well).
    UserError: file and line or record of what is not as it should be.
    """
    records, sources, seen = [], [], set()
    for path in _files(data_path):
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        source = Source(str(path), hashlib.sha256(raw).hexdigest())
        for value, number, line in _values(path, raw):
            source.records += 1
            record = _record(value, f"{path}: record {number} (line {line})")
            reason = _why_dropped(record, seen)
            if reason:
                source.dropped[reason] += 1
            else:
                seen.add(record)
                records.append(record)
        if not source.records:
            raise UserError(f"{path}: holds no records, {SHAPE}")
        sources.append(source)
    if not records:
        why = sum((source.dropped for source in sources), Counter())
        raise UserError(f"{data_path}: nothing to train on, every record was dropped: {_counts(why)}")
    return records, sources


def _files(data_path):
    path = Path(data_path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(FILE_ENDINGS) and f.is_file())
        if not files:
            raise UserError(f"{path}: no file in it ends in {', '.join(FILE_ENDINGS)}")
        return files
    if path.is_file() or "," not in data_path:
        files = [path]
    else:
        files = [Path(part.strip()) for part in data_path.split(",") if part.strip()]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such data file (--data_path)")
    return files


# Numbers stay as they are written (3.10 is not 3.1), since a record's scalars are taken as text.
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)
_BLANKS = re.compile(r"[ \t\r\n]*")


def _values(path, raw):
    """Yields (value, its number from 1, its line from 1) of a JSON array or of JSON values one after the other."""
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"{path}: damaged gzip file; fetch it again") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text; save the file as UTF-8") from None

    def fail(message, position):
        error = json.JSONDecodeError(message, text, position)
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}")

    position = _BLANKS.match(text).end()
    is_array = text.startswith("[", position)
    if is_array:
        position = _BLANKS.match(text, position + 1).end()
        if text.startswith("]", position):
            return
    number, line, counted_to = 0, 1, 0
    while position < len(text):
        line += text.count("\n", counted_to, position)
        counted_to = position
        try:
            value, position = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            fail(error.msg, error.pos)
        except RecursionError:
            fail("nested too deeply", position)
        number += 1
        yield value, number, line
        position = _BLANKS.match(text, position).end()
        if is_array:
            if text.startswith("]", position):
                position = _BLANKS.match(text, position + 1).end()
                if position < len(text):
                    fail("extra text behind the array", position)
                return
            if position < len(text) and not text.startswith(",", position):
                fail("Expecting ',' or ']'", position)
            position = _BLANKS.match(text, position + 1).end()
    if is_array:
        fail("the array is not closed", len(text))


def _record(value, where):
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "no object"
        raise UserError(f"{where}: is {kind}, {SHAPE}")
    for name in ("instruction", "output"):
        if name not in value:
            nested = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict) and name in v[0]]
            hint = f'; write each entry of its "{nested[0]}" as a record of its own' if nested else ""
            keys = ", ".join(list(value)[:8]) or "nothing"
            raise UserError(f'{where}: has no "{name}", it holds {keys}; {SHAPE}{hint}')
    for name in Record._fields:
        if isinstance(value.get(name), (list, dict)):
            kind = "a list" if isinstance(value[name], list) else "an object"
            raise UserError(f'{where}: "{name}" is {kind}, expected text')
    return Record(*(_text(value.get(name)) for name in Record._fields))


def _text(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value


def _why_dropped(record, seen):
    if not record.output.strip():
        return "empty output"
    if not (record.instruction.strip() or record.input.strip()):
        return "no instruction and no input"
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        return r"half a character (a lone \ud83d or the like)"
    if record in seen:
        return "duplicate"
    return None


# --- examples -------------------------------------------------------------------------------------------------------

@dataclass
class Lengths:
    """Token lengths of all records' whole examples before the cut, and what the cut did."""
    tokens: list
    cut: int = 0
    too_long: int = 0  # the prompt alone fills cutoff_len: dropped


_FEATURES = Features({"input_ids": List(Value("int32")), "n_prompt": Value("int32"), "length": Value("int32"),
                      "record": Value("int32")})


def encode(records, tokenizer, cutoff_len, progress=None):
    """Records to examples. Gives (Dataset, Lengths). `progress(line)` is told how far it is, every 100,000 records.

    Columns: `input_ids` (at most cutoff_len), `n_prompt` (how many of them the loss skips), `length`, and `record`
    (the index in `records`). A record whose prompt alone fills cutoff_len is left out.
    """
    lengths, parts = Lengths([]), []
    unlimited, begin = 1 << 30, time.monotonic()
    for start in range(0, len(records), 1000):  # a thousand at a time: the tokenizer runs them in parallel
        if progress and start and start % 100_000 == 0:
            rate = start / (time.monotonic() - begin)
            progress(f"          {start:,} of {len(records):,} tokenized, {rate:,.0f} records/s, "
                     f"{(len(records) - start) / rate:.0f} s left")
        batch = records[start:start + 1000]
        ids, n_prompt = prompt.encode_examples(
            tokenizer, [prompt.alpaca(r.instruction, r.input) for r in batch], [r.output for r in batch], unlimited)
        lengths.tokens += map(len, ids)
        lengths.cut += sum(len(i) > cutoff_len > n for i, n in zip(ids, n_prompt))
        kept = [k for k, n in enumerate(n_prompt) if n < cutoff_len]
        lengths.too_long += len(batch) - len(kept)
        parts.append(Dataset.from_dict({
            "input_ids": [ids[k][:cutoff_len] for k in kept],
            "n_prompt": [n_prompt[k] for k in kept],
            "length": [min(len(ids[k]), cutoff_len) for k in kept],
            "record": [start + k for k in kept],
        }, features=_FEATURES))
    dataset = concatenate_datasets(parts)
    if not len(dataset):
        raise UserError(f"every record's prompt alone fills --cutoff_len {cutoff_len}; the shortest record has "
                        f"{min(lengths.tokens)} tokens")
    return dataset, lengths


def split(dataset, test_size, seed):
    """(train, held-out) datasets; `test_size` records are held out, drawn with `seed`; none if it is 0."""
    if test_size >= len(dataset):
        raise UserError(f"--test_size {test_size} is not less than the {len(dataset)} records there are to use; "
                        "give a smaller one")
    if test_size == 0:
        return dataset, dataset.select([])
    parts = dataset.train_test_split(test_size=test_size, seed=seed)
    return parts["train"], parts["test"]


def collate(examples, multiple=1):
    """Examples to a batch: input_ids and labels, (batch, longest) int64, padded on the right to the longest.

    Labels are IGNORE over the prompt and the padding. There is no attention mask: in a causal model no token looks to
    its right, so padding there changes nothing.
    """
    longest = max(example["length"] for example in examples)
    longest += -longest % multiple
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    for row, example in enumerate(examples):
        ids, n = torch.tensor(example["input_ids"]), example["n_prompt"]
        input_ids[row, :len(ids)] = ids
        labels[row, n:len(ids)] = ids[n:]
    return {"input_ids": input_ids, "labels": labels}


class GroupedByLength(torch.utils.data.Sampler):
    """Random order in which each micro-batch holds records of nearly the same length, so that little is padding.

    The data is shuffled, sorted by length within stretches of 50 micro-batches, and cut into micro-batches, whose order
    is shuffled again: a step's micro-batches are of all lengths, unlike with transformers' group_by_length, which sorts
    over whole steps. Order depends on seed and epoch alone.
    """

    def __init__(self, lengths, micro_batch_size, seed):
        self.lengths, self.size, self.seed, self.epoch = lengths, micro_batch_size, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        stretch = 50 * self.size
        for start in range(0, len(order), stretch):
            order[start:start + stretch] = sorted(order[start:start + stretch], key=self.lengths.__getitem__)
        batches = [order[k:k + self.size] for k in range(0, len(order), self.size)]
        rest = batches.pop() if len(batches[-1]) < self.size else []  # an incomplete one may only come last
        for k in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[k]
        yield from rest


# --- report ---------------------------------------------------------------------------------------------------------

def report_records(sources):
    """Records per file, dropped ones and why, as lines of text."""
    lines = []
    for source in sources:
        lines.append(f"Data      {source.path}: {source.records:,} records")
        if source.dropped:
            lines.append(f"          dropped: {_counts(source.dropped)}")
    return "\n".join(lines)


def report_lengths(lengths, cutoff_len):
    """How long the records are in tokens, with a small histogram, and what the cut does, as lines of text."""
    lines = []
    tokens = sorted(lengths.tokens)
    lines.append(f"          tokens a record: shortest {tokens[0]}, middle {tokens[len(tokens) // 2]}, longest {tokens[-1]}")
    top = max(cutoff_len, 4)
    edges = [top * k // 4 for k in range(5)]
    bins = Counter(min(-(-4 * t // top), 5) for t in tokens)  # 1..4: quarters of cutoff_len; 5: longer
    most = max(bins.values())
    for k in range(1, 6):
        label = f"{edges[k - 1] + 1}-{edges[k]}" if k < 5 else f"over {cutoff_len}"
        if bins[k] or k < 5:
            lines.append(f"          {label:>10}  {bins[k]:>7,}  {'#' * -(-30 * bins[k] // most)}")
    if lengths.cut:
        lines.append(f"          {lengths.cut:,} answers are cut at --cutoff_len {cutoff_len} (and get no end token)")
    if lengths.too_long:
        lines.append(f"          {lengths.too_long:,} dropped: the prompt alone fills --cutoff_len {cutoff_len}")
    return "\n".join(lines)


def _counts(counter):
    return ", ".join(f"{count:,} {reason}" for reason, count in counter.most_common())
