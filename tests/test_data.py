"""vicuna/data.py: every form a file may come in gives the same records; what is wrong is named with its place."""
import gzip
import json
import re

import pytest
from conftest import RECORDS

from vicuna import data, prompt
from vicuna.errors import UserError
from vicuna.model import load_config, load_tokenizer

GOOD = [data.Record("Add.", "1 2", "3"), data.Record("翻译。", "", "苹果 😀"), data.Record("No input.", "", "right")]
DICTS = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "翻译。", "input": "", "output": "苹果 😀"},
         {"instruction": "No input.", "output": "right"}]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("name, text", [
    ("array.json", json.dumps(DICTS, ensure_ascii=False)),
    ("escaped.json", json.dumps(DICTS, ensure_ascii=True, indent=4)),
    ("lines.json", "\n".join(json.dumps(d) for d in DICTS)),
    ("array.jsonl", json.dumps(DICTS)),
    ("blank-lines.txt", "\n\n" + "\r\n\r\n".join(json.dumps(d, ensure_ascii=False) for d in DICTS) + "\n\n"),
    ("objects-over-lines.jsonl", "\n".join(json.dumps(d, indent=2) for d in DICTS)),
    ("bom.json", "\ufeff" + json.dumps(DICTS)),
])
def test_forms_of_a_file(tmp_path, name, text):
    records, (source,) = data.read(write(tmp_path / name, text))
    assert records == GOOD and source.records == 3 and not source.dropped
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert data.read(str(zipped))[0] == GOOD


def test_several_files_and_a_directory(tmp_path):
    for k, d in enumerate(DICTS):
        write(tmp_path / f"{k}.json", json.dumps([d]))
    write(tmp_path / "notes.txt", "not data")
    assert data.read(str(tmp_path))[0] == GOOD
    records, sources = data.read(f"{tmp_path}/2.json, {tmp_path}/0.json")
    assert records == [GOOD[2], GOOD[0]] and [s.records for s in sources] == [1, 1]
    both = write(tmp_path / "a,b.json", json.dumps(DICTS))
    assert data.read(both)[0] == GOOD


def test_scalars_are_taken_as_text_as_they_are_written(tmp_path):
    file = write(tmp_path / "f.json", '[{"instruction": 3.10, "input": null, "output": 1e5},'
                                      ' {"instruction": true, "input": false, "output": 12345678901234567890}]')
    assert data.read(file)[0] == [data.Record("3.10", "", "1e5"), data.Record("true", "false", "12345678901234567890")]


def test_dropped_records_are_counted_by_reason(tmp_path):
    rows = DICTS + [DICTS[0], {"instruction": "x", "output": " \n"}, {"instruction": "x", "output": ""},
                    {"instruction": "", "output": "y"}, {"instruction": "half", "output": "\ud83d"}]
    records, (source,) = data.read(write(tmp_path / "f.json", json.dumps(rows)))
    assert records == GOOD and source.records == 8
    assert dict(source.dropped) == {"duplicate": 1, "empty output": 2, "no instruction and no input": 1,
                                    r"half a character (a lone \ud83d or the like)": 1}


@pytest.mark.parametrize("text, message", [
    ("", "holds no records"), (" \n", "holds no records"), ("[]", "holds no records"),
    ("hello", "not JSON: Expecting value at line 1, column 1"),
    ('[{"instruction": "a", "output": "b"},\n {"instruction": "a" "output": "b"}]', "line 2, column 22"),
    ('[{"instruction": "a", "output": "b"}', "not JSON: the array is not closed"),
    ('[{"instruction": "a", "output": "b"},]', "not JSON"),
    ('[{"instruction": "a", "output": "b"}] []', "extra text behind the array at line 1, column 39"),
    ('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output', "line 2, column 22"),
    ('[[1, 2]]', "record 1 (line 1): is a list, expected {"), ('{"instruction": "a", "output": "b"}\n7', "record 2 (line 2): is no object"),
    ('[{"output": "b"}]', 'record 1 (line 1): has no "instruction", it holds output'),
    ('[{"instruction": "a", "output": "b"},\n\n{"instruction": "a"}]', 'record 2 (line 3): has no "output"'),
    ('[{"instruction": ["a"], "output": "b"}]', 'record 1 (line 1): "instruction" is a list, expected text'),
    ('[{"instruction": "a", "input": {}, "output": "b"}]', '"input" is an object'),
    ('[{"instruction": "a", "output": ""}]', "nothing to train on, every record was dropped: 1 empty output"),
    ('[' * 100_000, "nested too deeply"),
    ('{"id": "seed_0", "instruction": "a", "instances": [{"input": "", "output": "b"}]}',
     'has no "output", it holds id, instruction, instances; expected {"instruction": "...", "input": "..." (optional), '
     '"output": "..."}; write each entry of its "instances" as a record of its own'),
])
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, message):
    file = write(tmp_path / "f.json", text)
    with pytest.raises(UserError) as error:
        data.read(file)
    assert message in str(error.value) and str(error.value).startswith(file)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[\n{"instruction": "\xff\xfe"}]')
    with pytest.raises(UserError, match="a.json: line 2: not UTF-8"):
        data.read(str(tmp_path / "a.json"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"[]" * 100)[:-9])
    with pytest.raises(UserError, match="b.json.gz: damaged gzip"):
        data.read(str(tmp_path / "b.json.gz"))
    with pytest.raises(UserError, match="missing.json: no such data file"):
        data.read(str(tmp_path / "missing.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it ends in .json"):
        data.read(str(tmp_path / "empty"))


def test_examples_and_their_batch(llama):
    tokenizer = load_tokenizer(llama, load_config(llama)[0])[0]
    records = [data.Record(**{"input": "", **r}) for r in RECORDS]
    dataset, lengths = data.encode(records, tokenizer, 4096)
    assert len(dataset) == 12 and lengths.tokens == dataset["length"][:] and lengths.cut == lengths.too_long == 0
    prompts = [prompt.encode_prompts(tokenizer, [prompt.alpaca(r.instruction, r.input)])[0] for r in records[:2]]
    batch = data.collate([dataset[0], dataset[1]], multiple=8)
    assert batch["input_ids"].shape == batch["labels"].shape and batch["input_ids"].shape[1] % 8 == 0
    for row, (ids, fed) in enumerate(zip(dataset["input_ids"][:2], prompts)):
        n = len(ids)
        assert batch["input_ids"][row, :n].tolist() == ids
        # the loss covers the response and the end token, nothing else
        assert batch["labels"][row].tolist() == [-100] * len(fed) + ids[len(fed):] + [-100] * (batch["labels"].shape[1] - n)
        assert batch["labels"][row, n - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[len(fed):-1]).strip() == records[row].output


def test_cutoff(llama):
    tokenizer = load_tokenizer(llama, load_config(llama)[0])[0]
    records = [data.Record("a", "", "b"), data.Record("a", "", "c" * 50), data.Record("d" * 500, "", "e")]
    whole = data.encode(records, tokenizer, 4096)[1].tokens
    dataset, lengths = data.encode(records, tokenizer, whole[0] + 3)
    assert lengths.tokens == whole and lengths.cut == 1 and lengths.too_long == 1
    assert dataset["length"][:] == [whole[0], whole[0] + 3] and dataset["record"][:] == [0, 1]
    report = data.report_lengths(lengths, whole[0] + 3)
    assert "1 answers are cut at" in report and "1 dropped: the prompt alone fills" in report
    assert sum(int(n) for n in re.findall(r"(\d+)  #", report)) == 3


def test_split_is_a_partition_and_repeats(llama):
    tokenizer = load_tokenizer(llama, load_config(llama)[0])[0]
    dataset, _ = data.encode([data.Record(**{"input": "", **r}) for r in RECORDS], tokenizer, 4096)
    train, held_out = data.split(dataset, 5, seed=42)
    assert len(train) == 7 and len(held_out) == 5
    assert sorted(train["record"][:] + held_out["record"][:]) == list(range(12))
    assert data.split(dataset, 5, seed=42)[1]["record"][:] == held_out["record"][:]
    assert data.split(dataset, 5, seed=43)[1]["record"][:] != held_out["record"][:]
    with pytest.raises(UserError, match="--test_size 12 is not less than the 12 records"):
        data.split(dataset, 12, seed=42)


def test_order_is_random_with_equal_lengths_together():
    lengths = [10 * (k % 7) + 5 for k in range(203)]
    order = data.GroupedByLength(lengths, 4, seed=1)
    first = list(order)
    assert sorted(first) == list(range(203)) and len(order) == 203 and list(order) == first
    batches = [[lengths[k] for k in first[start:start + 4]] for start in range(0, 203, 4)]
    assert sum(max(b) - min(b) for b in batches) / len(batches) < 4  # 51 batches, 7 lengths 10 apart
    means = [sum(b) / len(b) for b in batches]
    assert sum(means[:25]) / 25 == pytest.approx(sum(means[25:]) / len(means[25:]), abs=15)
    order.set_epoch(1)
    assert list(order) != first and sorted(order) == list(range(203))
    assert list(data.GroupedByLength(lengths, 4, seed=2)) != first
    assert sorted(data.GroupedByLength([1, 2, 3], 4, seed=2)) == [0, 1, 2]
