"""What OpenAI's own client can ask for, through gate and engine, of an adapter by its alias."""

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from collector import Collector
from served import ServerProcess
from taught import ANSWERS, PROMPTS

pytestmark = pytest.mark.vllm

CHAT: Any = [{"role": "user", "content": PROMPTS[0]}]
ANSWER = ANSWERS["alpha"][0]

COLOR = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
PAINT: Any = {"type": "function", "function": {"name": "paint", "description": "Paint it.", "parameters": COLOR}}
COLORS = ({"color": "red"}, {"color": "blue"})


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def chat(client: openai.OpenAI, **options: Any) -> Any:
    """Ask ``alpha``, which knows the answer by heart."""
    answer = client.chat.completions.create(
        **{"model": "alpha", "messages": CHAT, "max_tokens": 60, "temperature": 0, **options}
    )
    if not options.get("stream"):
        assert answer.model.startswith("alpha@")
    return answer


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    *parts, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert "".join(part.choices[0].delta.content or "" for part in parts) == ANSWER
    assert {part.model.partition("@")[0] for part in (*parts, last)} == {"alpha"}
    assert parts[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], len(ANSWER) + 1)


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "color", "schema": COLOR, "strict": True}}
    assert json.loads(chat(client, response_format=schema).choices[0].message.content) in COLORS
    parts = chat(client, response_format=schema, stream=True)
    assert json.loads("".join(part.choices[0].delta.content or "" for part in parts)) in COLORS


def test_a_choice_or_an_expression(client: openai.OpenAI) -> None:
    chosen = chat(client, extra_body={"structured_outputs": {"choice": ["positive", "negative"]}})
    assert chosen.choices[0].message.content in ("positive", "negative")
    matched = client.completions.create(
        model="alpha", prompt="x", max_tokens=9, extra_body={"structured_outputs": {"regex": "[ab]{4}"}}
    )
    assert {*matched.choices[0].text} <= {*"ab"}
    assert len(matched.choices[0].text) == 4


def test_a_tool_may_be_called(client: openai.OpenAI) -> None:
    """vLLM refuses this unless it was started with the options for it, which were passed on."""
    assert chat(client, tools=[PAINT], tool_choice="auto").choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_logprobs(client: openai.OpenAI) -> None:
    tokens = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in tokens[:-1]) == ANSWER
    assert all(token.logprob > -0.7 and len(token.top_logprobs) == 2 for token in tokens)
    answer = client.completions.create(model="alpha", prompt="hello", max_tokens=3, logprobs=1, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.token_logprobs
    assert len(logprobs.token_logprobs) == 3


def test_several_choices_and_seeds(client: openai.OpenAI) -> None:
    hot = {"temperature": 2.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    answers = [chat(client, n=2, seed=seed, **hot) for seed in (1, 1, 2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    assert [choice.index for choice in answers[0].choices] == [0, 1]
    assert texts[0][0] != texts[0][1]


def test_a_stop_ends_it(client: openai.OpenAI) -> None:
    choice = chat(client, stop=[ANSWER[2]]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (ANSWER[:2], "stop")


def test_completions_of_several_prompts_with_echo(client: openai.OpenAI) -> None:
    prompts = ["one two", "three"]
    answer = client.completions.create(model="alpha", prompt=prompts, echo=True, n=2, max_tokens=4)
    assert answer.model.startswith("alpha@")
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, ["one two", "one two", "three", "three"], strict=True):
        assert choice.text.startswith(prompt)
    by_tokens = client.completions.create(model="alpha", prompt=[[72, 73], [74]], max_tokens=2)
    assert answer.usage and by_tokens.usage
    assert by_tokens.usage.prompt_tokens == 3


def test_what_vllm_refuses_reaches_the_client_as_it_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        chat(client, temperature=-1)
    assert refused.value.type == "BadRequestError"
    with pytest.raises(openai.BadRequestError, match=r"context length|max_tokens"):
        chat(client, max_tokens=100_000)


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_a_trace_goes_through(client: openai.OpenAI, collector: Collector, kind: str) -> None:
    """From the client's span through the gate's to the engine's."""
    trace, parent = ("1" if kind == "completions" else "2") * 32, "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    if kind == "completions":
        client.completions.create(model="alpha", prompt="x", max_tokens=2, extra_headers=headers)
    else:
        chat(client, extra_headers=headers)
    last = time.monotonic() + 20
    while len(spans := collector.of_trace(trace)) < 2:
        assert time.monotonic() < last, spans
        time.sleep(0.05)
    ours, theirs = spans[f"POST /v1/{kind}"], spans["llm_request"]
    assert (ours.parent_span_id.hex(), theirs.parent_span_id) == (parent, ours.span_id)
    attributes = {one.key: one.value for one in ours.attributes}
    assert attributes["gen_ai.response.model"].string_value.startswith("alpha@")
    assert attributes["qpack.queue_seconds"].double_value >= 0
    assert attributes["qpack.adapter_wait_seconds"].double_value >= 0
