"""vicuna/prompt.py: the template's words, ids that inference and training agree on, text that comes back."""
import pytest
import sentencepiece
from conftest import LLAMA_TOKENIZER, make_llama
from vicuna import prompt
from vicuna.model import load_config, load_tokenizer

QUESTIONS = [
    ("Name a fruit.", ""), ("翻译成英文。", "今天天气很好。"), ("日本語で答えてください。", "元気ですか"),
    ("Explain this code.", "def f(x):\n    return  x\n"), ("  blanks before and after  ", " \n in the input too \t"),
    ("Why   do    blanks     count?", "if x:\n        y = 1\n            z"), ("😀 emoji 👩‍👩‍👧", "🇨🇳"), ("Is </s> or <|im_end|> the end?", "<s> <unk> <|endoftext|>"),
]
ANSWERS = [
    "An apple.", "The weather is nice today. 今天", "元気です。", "    indented\n\tcode()\n", "  leading and trailing blanks  ",
    "\nA newline first", "\n\n  both", "😀👍🏽", "</s> is text here, and so is <|im_end|> and <s>", "１２３ ½ ﬁ é", "x", " ",
]


def load(directory):
    return load_tokenizer(directory, load_config(directory)[0])[0]


@pytest.fixture(params=["smollm2", "sentencepiece", "llama"])
def tokenizer(request, tmp_path):
    if request.param == "smollm2":
        return load(request.getfixturevalue("base"))
    if request.param == "sentencepiece":
        return load(request.getfixturevalue("llama"))
    if not LLAMA_TOKENIZER.is_file():
        pytest.skip("set LLAMA_TOKENIZER to a LLaMA's tokenizer.model to test with the real one")
    return load(make_llama(tmp_path / "real-vocabulary", LLAMA_TOKENIZER))


def test_the_template_is_alpacas():
    assert prompt.alpaca("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert prompt.alpaca("Add.") == prompt.alpaca("Add.", " \n") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n")
    assert "{input}" in prompt.alpaca("{input}", "{instruction}") and "{instruction}" in prompt.alpaca("x", "{instruction}")


def test_inference_feeds_a_prefix_of_the_training_ids_and_the_text_comes_back(tokenizer):
    for question in QUESTIONS:
        text = prompt.alpaca(*question)
        fed = prompt.encode_prompts(tokenizer, [text])[0]
        for answer in ANSWERS:
            (ids,), (n_prompt,) = prompt.encode_examples(tokenizer, [text], [answer], 4096)
            assert ids[:n_prompt] == fed, (question, answer)
            assert ids[-1] == tokenizer.eos_token_id
            # the ids between are the text and no special token
            assert tokenizer.decode(ids, skip_special_tokens=True) == text + answer, (question, answer)
            assert prompt.decode_response(tokenizer, fed, ids[n_prompt:]) == answer
            assert tokenizer.eos_token_id not in ids[:-1] or tokenizer.bos_token_id == tokenizer.eos_token_id


def test_with_sentencepiece_the_ids_are_those_of_the_whole_text(llama):
    """The independent reference is the sentencepiece package itself, on prompt and answer as one text."""
    tokenizer = load(llama)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    for question in QUESTIONS:
        for answer in ANSWERS:
            text = prompt.alpaca(*question)
            (ids,), _ = prompt.encode_examples(tokenizer, [text], [answer], 4096)
            assert ids == [1] + pieces.encode(text + answer) + [2], (question, answer)


def test_real_llama_ids_are_sentencepieces(tmp_path):
    if not LLAMA_TOKENIZER.is_file():
        pytest.skip("set LLAMA_TOKENIZER to a LLaMA's tokenizer.model to test with the real one")
    tokenizer = load(make_llama(tmp_path / "real", LLAMA_TOKENIZER))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA_TOKENIZER))
    texts = [prompt.alpaca(*question) for question in QUESTIONS for _ in ANSWERS]
    answers = ANSWERS * len(QUESTIONS)
    ids, _ = prompt.encode_examples(tokenizer, texts, answers, 4096)
    assert ids == [[1] + pieces.encode(text + answer) + [2] for text, answer in zip(texts, answers)]


def test_a_cut_response_has_no_end_token(tokenizer):
    text = prompt.alpaca("Count.", "")
    (whole,), (n_prompt,) = prompt.encode_examples(tokenizer, [text], ["one two three four five six seven"], 4096)
    (exact,), _ = prompt.encode_examples(tokenizer, [text], ["one two three four five six seven"], len(whole))
    assert exact == whole and whole[-1] == tokenizer.eos_token_id
    (cut,), (n,) = prompt.encode_examples(tokenizer, [text], ["one two three four five six seven"], len(whole) - 1)
    assert cut == whole[:-1] and cut[-1] != tokenizer.eos_token_id and n == n_prompt
