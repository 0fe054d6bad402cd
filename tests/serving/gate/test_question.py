"""Bodies that nobody would send: whatever they hold, they are understood or refused by field."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve.gate.limits import RequestLimits
from serve.gate.question import Question
from serve.gate.refusal import Refusal

FIELDS = ["model", "prompt", "messages", "n", "best_of", "max_tokens", "max_completion_tokens", "user", "session_id"]

texts = st.sampled_from(["", "a", "é", "\ud800", "9"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(FIELDS), values))
@example({"model": "\ud800", "prompt": [[1, 2], "x", None], "n": 10**400})
def test_any_object_is_understood_or_refused(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    try:
        question = Question.parse(raw, RequestLimits(max_output_tokens=64), None)
    except Refusal as refusal:
        assert refusal.status == 400
        assert json.loads(refusal.body)["error"]["param"] in FIELDS
        return
    assert question.prompt_tokens >= 1 and 0 <= question.output_tokens <= 16 * 256
    assert repr(json.loads(question.for_model("a@b"))) == repr({**json.loads(raw), "model": "a@b"})


@given(st.binary(max_size=200))
def test_any_bytes_are_understood_or_refused(raw: bytes) -> None:
    try:
        Question.parse(raw, RequestLimits(), None)
    except Refusal as refusal:
        assert refusal.status == 400


@pytest.mark.parametrize(
    ("body", "prompt_tokens", "output_tokens"),
    [
        ({"prompt": [1] * 50, "max_tokens": 10}, 50, 10),
        ({"prompt": [[1] * 50, [2] * 30], "max_tokens": 10}, 80, 20),
        ({"prompt": "x" * 384, "n": 2, "max_completion_tokens": 5}, 110, 10),
        ({"messages": [{"role": "user", "content": "x" * 360}]}, 104, 256),
        ({"prompt": [1] * 50, "max_tokens": 100000}, 50, 256),
    ],
)
def test_what_a_request_will_take(body: dict[str, Any], prompt_tokens: int, output_tokens: int) -> None:
    """Ids are counted, bytes of text divided by four; nobody is billed in advance for an answer without end."""
    question = Question.parse(json.dumps(body).encode(), RequestLimits(), None)
    assert abs(question.prompt_tokens - prompt_tokens) <= 2
    assert question.output_tokens == output_tokens


def test_the_session_comes_before_the_user() -> None:
    def sticky(session: str | None, **body: Any) -> str | None:
        return Question.parse(json.dumps(body).encode(), RequestLimits(), session).sticky

    assert sticky("header", session_id="body", user="me") == "header"
    assert sticky(None, session_id="body", user="me") == "body"
    assert sticky("", session_id=5, user="me") == "me"
    assert sticky(None, user="") is None
