"""The chat templates in use: what is learned against TRL's training templates, and what a template may not drop."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qpack.data import IGNORED, Conversation, DataOptions, Dataset, Example, Rows, encode
from qpack.data.rows import Message, Tools
from qpack.errors import DataError

_trl = importlib.util.find_spec("trl")
assert _trl is not None and _trl.origin is not None
TEMPLATES = Path(_trl.origin).parent / "chat_templates"

STOPS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm": "<|user|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "muse": "<|eot|>",
    "phi3": "<|end|>",
}
"""The end token of each family; <|im_end|> of all others."""

IMAGES = ("idefics3", "llava_next", "smolvlm")
"""Their templates take no plain text as content."""

FAMILIES = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))

ASK: Message = {"role": "user", "content": "one?"}
ANSWER: Message = {"role": "assistant", "content": "ein"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(tmp_path)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    return loaded


def encode_one(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools | None = None
) -> Dataset[Example]:
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return encode(Rows([Conversation("a:1", messages, said, tools)], [1]), tokenizer, Path(), DataOptions(), 9999)


def learned(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in IMAGES])
def test_as_trl_s_training_template_but_for_what_a_server_writes(
    tokenizer: PreTrainedTokenizerBase, family: str
) -> None:
    """What TRL's marks hold besides: the words that open a turn, which stand in the prompt, and what follows its end.

    A prompt may end with a thought that the turn holds as well, empty (``opening``).
    """
    stop = next((token for name, token in STOPS.items() if family.startswith(name)), "<|im_end|>")
    tokenizer.add_special_tokens({"eos_token": stop})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    encoded = encode_one(tokenizer, [ASK, ANSWER])
    ours = learned(tokenizer, encoded.examples[0])
    assert "ein" in ours
    assert ours.endswith(stop)

    marked: Any = tokenizer.apply_chat_template(
        [ASK, ANSWER],
        chat_template=(TEMPLATES / f"{family}_training.jinja").read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    theirs = str(tokenizer.decode([token for token, mark in pairs if mark]))
    before, found, after = theirs.partition(ours)
    assert found
    assert after.strip() in ("", stop)
    prompt = str(tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True))
    (opening,) = encoded.openings or [""]
    assert prompt.removesuffix(opening).strip().endswith(before.strip())


def test_own_marks_are_obeyed_and_the_end_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}so, "
        "{% generation %}{{ m['content'] }}{% endgeneration %} indeed<|im_end|>{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (example,) = encode_one(tokenizer, [ASK, ANSWER, ASK, ANSWER]).examples
    assert learned(tokenizer, example) == "ein<|im_end|>ein<|im_end|>"


CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}


def test_tools_and_their_calls_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (TEMPLATES / "qwen2_5.jinja").read_text()
    messages = [ASK, CALL, {"role": "tool", "content": "2"}, ANSWER]
    (example,) = encode_one(tokenizer, messages, [TOOL]).examples
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'
    assert learned(tokenizer, example) == f"{call}ein<|im_end|>"
    assert '"name": "add", "parameters"' in str(tokenizer.decode(example["input_ids"]))


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([ASK, CALL], None, r"messages\[1\]\.tool_calls\[0\]: the chat template leaves it out"),
        ([ASK, ANSWER], [TOOL], "tools: the chat template leaves them out"),
        ([ASK, ANSWER | {"reasoning_content": "hm"}], None, r"messages\[1\]\.reasoning_content: the chat template "),
    ],
)
def test_what_a_template_drops_is_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools | None, message: str
) -> None:
    """The tiny model's template knows neither tools nor reasoning."""
    tokenizer.chat_template = str(tokenizer.chat_template).replace("message['content']", "(message['content'] or '')")
    with pytest.raises(DataError, match=f"^a:1: {message}"):
        encode_one(tokenizer, messages, tools)


def test_template_of_a_file_takes_the_place_of_the_tokenizer_s(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}>{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}")
    tokenizer.chat_template = None
    rows = Rows([Conversation("a:1", [ASK, ANSWER], [1])], [1])
    encoded = encode(rows, tokenizer, tmp_path, DataOptions(chat_template=path), 99)
    assert str(tokenizer.decode(encoded.examples[0]["input_ids"])) == "one?>ein<|im_end|>"
    assert encoded.template == path.read_text()
    with pytest.raises(DataError, match=r"nowhere\.jinja: no chat template: "):
        encode(rows, tokenizer, tmp_path, DataOptions(chat_template=tmp_path / "nowhere.jinja"), 99)
