"""Labels: exactly what the assistant says and its end token, for templates of every kind in use."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qpack.data import (
    IGNORED,
    Comparison,
    Conversation,
    DataOptions,
    Dataset,
    Document,
    Example,
    Rows,
    encode,
    encode_preferences,
)
from qpack.data.rows import Message
from qpack.errors import DataError
from qpack.training.batches import collate

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ein\n"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": " zwei ü"},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer: a token a byte, ChatML, <|im_start|> for BOS and <|im_end|> for EOS."""
    write_tokenizer(tmp_path)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path)
    return loaded


def encode_one(
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    messages: list[Message],
    max_length: int = 4096,
    options: DataOptions = DataOptions(),  # noqa: B008  # frozen
) -> Dataset[Example]:
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    rows: Rows[Conversation | Document] = Rows([Conversation("data.jsonl:1", messages, said)], [1])
    return encode(rows, tokenizer, base, options, max_length)


def text_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example["input_ids"]))


def learned(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The texts of the runs of learned tokens; a learned label is always its own token."""
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
    runs = itertools.groupby(example["labels"], key=lambda label: label != IGNORED)
    return [str(tokenizer.decode(list(run))) for is_learned, run in runs if is_learned]


def test_one_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    encoded = encode_one(tokenizer, tmp_path, TURNS[:2])
    (example,) = encoded.examples
    assert text_of(tokenizer, example) == "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\nein\n<|im_end|>"
    assert learned(tokenizer, example) == ["ein\n<|im_end|>"]
    assert encoded.truncated == 0


def test_turns_share_a_sequence(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (example,) = encode_one(tokenizer, tmp_path, TURNS).examples
    rendered = str(tokenizer.apply_chat_template(TURNS, tokenize=False))
    assert text_of(tokenizer, example) == rendered.removesuffix("\n")
    assert learned(tokenizer, example) == ["ein\n<|im_end|>", " zwei ü<|im_end|>"]


def test_labels_are_those_of_a_template_that_marks_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    expected: Any = tokenizer.apply_chat_template(
        TURNS, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encode_one(tokenizer, tmp_path, TURNS).examples
    length = len(example["input_ids"])  # the template's last line break is left out
    assert example["input_ids"] == expected["input_ids"][:length]
    assert [label != IGNORED for label in example["labels"]] == [bool(m) for m in expected["assistant_masks"][:length]]


def test_bos_is_the_template_s_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "<s>" + str(tokenizer.chat_template)
    (example,) = encode_one(tokenizer, tmp_path, TURNS).examples
    assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_missing_end_token_is_appended_to_every_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    first, second = encode_one(tokenizer, tmp_path, TURNS).examples
    assert text_of(tokenizer, first) == "user: one?\nassistant: ein\n\n<|im_end|>"
    assert learned(tokenizer, first) == ["ein\n\n<|im_end|>"]
    assert text_of(tokenizer, second) == "user: one?\nassistant: ein\n\nuser: two?\nassistant:  zwei ü\n<|im_end|>"
    assert learned(tokenizer, second) == [" zwei ü\n<|im_end|>"]


def test_generation_config_s_stop_token_ends_a_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<|pad|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, tokenizer.pad_token_id]}))
    (example,) = encode_one(tokenizer, tmp_path, TURNS).examples
    assert learned(tokenizer, example) == ["ein\n<|pad|>", " zwei ü<|pad|>"]


@pytest.mark.parametrize(
    ("template", "stop", "sequences"),
    [
        ("qwen2_5", "<|im_end|>", [["ein\n", " zwei ü"]]),
        # Qwen3 writes an empty thought in the last turn and leaves it out of earlier ones.
        ("qwen3", "<|im_end|>", [["<think>\n\n</think>\n\nein\n"], ["<think>\n\n</think>\n\n zwei ü"]]),
        ("llama3", "<|eot_id|>", [["ein", "zwei ü"]]),
        ("gemma", "<end_of_turn>", [["ein", "zwei ü"]]),
        ("phi3", "<|end|>", [["ein\n", " zwei ü"]]),
    ],
)
def test_templates_in_use(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, template: str, stop: str, sequences: list[list[str]]
) -> None:
    trl = importlib.util.find_spec("trl")
    assert trl is not None and trl.origin is not None
    tokenizer.chat_template = (Path(trl.origin).parent / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.add_special_tokens({"eos_token": stop})
    examples = encode_one(tokenizer, tmp_path, TURNS).examples
    assert [learned(tokenizer, example) for example in examples] == [
        [turn + stop for turn in turns] for turns in sequences
    ]


def test_thought_that_the_prompt_opens_and_the_data_lacks_is_told(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    encoded = encode_one(tokenizer, tmp_path, TURNS[:2])
    assert learned(tokenizer, encoded.examples[0]) == ["ein\n<|im_end|>"]
    assert encoded.openings == {"<think>\n": 1}


def test_prompt_that_the_turn_does_not_continue_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "{% for message", "{{ messages | length }}{% for message", 1
    )
    with pytest.raises(DataError, match=r"^data\.jsonl:1: messages\[1\]: the chat template does not render the"):
        encode_one(tokenizer, tmp_path, TURNS)


def test_answer_with_an_end_token_in_it_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = [TURNS[0], {"role": "assistant", "content": "say <|im_end|>"}]
    with pytest.raises(DataError, match=r"^data\.jsonl:1: messages\[1\]: holds the end token '<\|im_end\|>' itself$"):
        encode_one(tokenizer, tmp_path, messages)


def test_conversation_that_the_template_rejects_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"^data\.jsonl:1: the chat template refuses the conversation: no system role$"):
        encode_one(tokenizer, tmp_path, TURNS)


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    whole = encode_one(tokenizer, tmp_path, TURNS).examples[0]
    length = len(whole["input_ids"]) - 2
    encoded = encode_one(tokenizer, tmp_path, TURNS, max_length=length)
    assert encoded.truncated == 1
    assert encoded.examples[0]["input_ids"] == whole["input_ids"][:length]
    assert encoded.examples[0]["labels"] == whole["labels"][:length]


def test_truncation_of_everything_learned_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl:1: nothing left to learn: max_length 20 cuts the \d+ tokens"):
        encode_one(tokenizer, tmp_path, TURNS, max_length=20)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("chat_template", "the tokenizer has no chat template"), ("eos_token", "the tokenizer has no eos_token")],
)
def test_tokenizer_that_lacks_something_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, attribute: str, message: str
) -> None:
    setattr(tokenizer, attribute, None)
    with pytest.raises(DataError, match=message):
        encode_one(tokenizer, tmp_path, TURNS)


def test_padding_is_masked_and_eos_is_not() -> None:
    batch = collate(
        [
            Example(input_ids=[5, 0], labels=[IGNORED, 0], origin="a:1"),
            Example(input_ids=[6, 7, 0], labels=[6, 7, 0], origin="a:2"),
        ]
    )
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 0, 0], [6, 7, 0]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert torch.equal(batch["labels"], torch.tensor([[IGNORED, 0, IGNORED], [6, 7, 0]]))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int = 4096) -> Dataset[Example]:
    rows: Rows[Conversation | Document] = Rows([Document("a.txt", text)], [1])
    return encode(rows, tokenizer, Path(), DataOptions(), max_length)


def test_text_is_learned_whole_with_one_bos_and_an_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    (bare,) = encode_text(tokenizer, "ab").examples
    assert bare["input_ids"] == [tokenizer.convert_tokens_to_ids("a"), tokenizer.convert_tokens_to_ids("b"), eos]
    backend: Any = tokenizer
    backend._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    for text in ("ab", "<|im_start|>ab", "<|im_start|>ab<|im_end|>"):
        (example,) = encode_text(tokenizer, text).examples
        assert example["input_ids"] == [bos, *bare["input_ids"]]
        assert example["labels"] == [IGNORED, *bare["input_ids"]]


@pytest.mark.parametrize(("length", "windows"), [(7, [8]), (8, [8, 2]), (14, [8, 8]), (15, [8, 8, 2])])
def test_long_text_is_cut_into_windows(tokenizer: PreTrainedTokenizerBase, length: int, windows: list[int]) -> None:
    """Every token but the first is predicted once; ``length`` is without the EOS."""
    encoded = encode_text(tokenizer, "x" * length, max_length=8)
    assert [len(example["input_ids"]) for example in encoded.examples] == windows
    predicted = [label for example in encoded.examples for label in example["labels"] if label != IGNORED]
    assert len(predicted) == length
    assert predicted[-1] == tokenizer.eos_token_id
    assert encoded.windows == (len(windows) if len(windows) > 1 else 0)


def test_eos_is_learned_where_it_is_the_pad_token_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    examples = [
        encode_one(tokenizer, tmp_path, TURNS[:2]).examples[0],
        encode_one(tokenizer, tmp_path, TURNS).examples[0],
    ]
    batch = collate(examples)
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 3
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]


def test_what_is_cut_off_gets_no_eos(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    length = len(encode_one(tokenizer, tmp_path, TURNS[:2]).examples[0]["input_ids"])
    (example,) = encode_one(tokenizer, tmp_path, TURNS[:2], max_length=length - 1).examples
    assert learned(tokenizer, example) == ["ein\n"]


def test_all_of_a_conversation_is_learned_if_asked(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (example,) = encode_one(tokenizer, tmp_path, TURNS, options=DataOptions(loss="all")).examples
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


def test_weight_repeats_the_examples(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows: Rows[Conversation | Document] = Rows([Document("a:1", "a"), Document("a:2", "b")], [2, 1])
    encoded = encode(rows, tokenizer, tmp_path, DataOptions(), 8)
    assert [example["origin"] for example in encoded.examples] == ["a:1", "a:1", "a:2"]


def test_row_that_cannot_be_encoded_is_skipped(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    bad = [TURNS[0], {"role": "assistant", "content": "<|im_end|>"}]
    rows: Rows[Conversation | Document] = Rows(
        [Conversation("a:1", bad, [1]), Conversation("a:2", TURNS, [1, 3])], [1, 1]
    )
    encoded = encode(rows, tokenizer, tmp_path, DataOptions(on_bad_row="skip"), 4096)
    assert [example["origin"] for example in encoded.examples] == ["a:2"]
    assert [str(row) for row in encoded.skipped] == ["a:1: messages[1]: holds the end token '<|im_end|>' itself"]


def test_preference_shares_its_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = Comparison("a:1", TURNS[:1], [TURNS[1]], [TURNS[3]])
    encoded = encode_preferences(Rows([row], [1]), tokenizer, tmp_path, DataOptions(), 4096)
    (pair,) = encoded.examples
    assert learned(tokenizer, pair["chosen"]) == ["ein\n<|im_end|>"]
    assert learned(tokenizer, pair["rejected"]) == [" zwei ü<|im_end|>"]
    with pytest.raises(DataError, match=r"^loss: expected 'assistant' for preferences"):
        encode_preferences(Rows([row], [1]), tokenizer, tmp_path, DataOptions(loss="all"), 4096)
    length = len(pair["chosen"]["input_ids"])
    alike = Comparison("a:1", TURNS[:1], [TURNS[1]], [{"role": "assistant", "content": "ein\nund"}])
    with pytest.raises(DataError, match=r"^a:1: chosen and rejected are the same within max_length \d+$"):
        encode_preferences(Rows([alike], [1]), tokenizer, tmp_path, DataOptions(), length - 1)
