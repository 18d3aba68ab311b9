"""The Alpaca template, and text to ids and back. The one place that knows a template; training and inference share it.

A training example is  [bos] prompt response [eos].  Prompt and response are turned into ids apart, so the ids that
inference feeds are a prefix of the ids that were trained on, whatever the response begins with.
"""

# Taori et al., "Stanford Alpaca" (2023), the prompt its data was made for, word for word.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n",
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n", "\n\n### Response:\n",
)


def alpaca(instruction, input=""):
    """The prompt of a record as text. An input of blanks alone counts as none."""
    if input.strip():
        head, middle, tail = WITH_INPUT
        return head + instruction + middle + input + tail
    head, tail = WITHOUT_INPUT
    return head + instruction + tail


def encode_prompts(tokenizer, prompts):
    """Texts to lists of ids, as inference feeds them: with the beginning-of-text token if the tokenizer uses one."""
    return [_bos(tokenizer) + ids for ids in _ids(tokenizer, prompts)]


def encode_examples(tokenizer, prompts, responses, cutoff_len):
    """Prompts and responses to training examples.

    Gives two lists: ids of [bos] prompt response [eos], and how many of them are the prompt (the loss skips those).
    An example longer than `cutoff_len` tokens is cut there and so has no end token: a model must not learn to stop in
    the middle of a sentence. If the prompt alone fills `cutoff_len`, nothing of the response is left; the caller sees
    that by the lengths.
    """
    prompt_ids = encode_prompts(tokenizer, prompts)
    response_ids = _continuation_ids(tokenizer, responses)
    examples = [(p + r + [tokenizer.eos_token_id])[:cutoff_len] for p, r in zip(prompt_ids, response_ids)]
    return examples, [len(p) for p in prompt_ids]


def decode_response(tokenizer, prompt_ids, ids):
    """The text of the ids that follow a prompt. Decoded together with it: SentencePiece drops a text's first blank."""
    start = len(tokenizer.decode(prompt_ids, skip_special_tokens=True))
    return tokenizer.decode(list(prompt_ids) + list(ids), skip_special_tokens=True)[start:]


def _ids(tokenizer, texts):
    # split_special_tokens: "</s>" in somebody's data is four characters of text, never the end token.
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []


def _bos(tokenizer):
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _continuation_ids(tokenizer, texts):
    """Ids of texts that go on where a prompt has ended with a newline.

    SentencePiece sets a blank before a text's first word, which would be wrong here: "Yes" becomes "▁Yes". Behind a
    newline, which no piece of LLaMA's vocabulary contains, it does not. A byte-level BPE adds nothing, but merges a
    newline with a newline or blank that follows; there the text's own ids are taken.
    """
    newline = _ids(tokenizer, ["\n"])[0]
    behind = _ids(tokenizer, ["\n" + text for text in texts])
    alone = _ids(tokenizer, texts)
    adds_blank = len(newline) > 1
    return [b[len(newline):] if adds_blank and b[:len(newline)] == newline else a for a, b in zip(alone, behind)]
