"""What a completion request asks for, as far as it matters before the engine: model, size, and who asks.

vLLM checks the rest. What is counted here must be of exactly the type that is counted: pydantic would take the text
"1000" for the number.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.gate.limits import RequestLimits
from serve.gate.refusal import Refusal

_BYTES_PER_TOKEN = 4
"""About, of English text."""
_ASSUMED_OUTPUT = 256
"""Tokens of an answer that nobody has limited, or not to less."""


@dataclass(frozen=True, slots=True)
class Question:
    """The body of a request for completions."""

    body: Mapping[str, Any]
    model: str | None
    """As the client has named it; None is the base."""
    prompt_tokens: int
    """Of all prompts, estimated where they are given as text."""
    output_tokens: int
    """Of all answers, guessed."""
    sticky: str | None
    """The session or the user, where the client has named one."""

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.output_tokens

    @classmethod
    def parse(cls, raw: bytes, limits: RequestLimits, session: str | None) -> "Question":
        """Read a body; ``session`` is what the header x-session-id says.

        Raises:
            Refusal: 400, naming the field.
        """
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise Refusal(400, f"the body is not a JSON object but {type(body).__name__}")
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise Refusal(400, "model is not a string", "model")
        prompts, prompt_tokens = _prompts(body.get("prompt"))
        answers = max(_number(body, "n"), _number(body, "best_of"), 1) * prompts
        if answers > limits.max_choices:
            raise Refusal(400, f"{answers} answers were asked for: n times prompts may be {limits.max_choices}", "n")
        longest = max(_number(body, "max_tokens"), _number(body, "max_completion_tokens"))
        if limits.max_output_tokens is not None and longest > limits.max_output_tokens:
            field = "max_tokens" if _number(body, "max_tokens") == longest else "max_completion_tokens"
            raise Refusal(400, f"{field} {longest}: at most {limits.max_output_tokens} are allowed", field)
        prompt_tokens = prompt_tokens or 1 + len(raw) // _BYTES_PER_TOKEN
        output_tokens = answers * min(longest or _ASSUMED_OUTPUT, _ASSUMED_OUTPUT)
        named = (session, body.get("session_id"), body.get("user"))
        sticky = next((name for name in named if isinstance(name, str) and name), None)
        return cls(body, model, prompt_tokens, output_tokens, sticky)

    def for_model(self, model: str) -> bytes:
        """The same, asked of another model."""
        return json.dumps({**self.body, "model": model}).encode()

    def unstreamed(self, model: str) -> bytes:
        """The same, asked of another model, to be answered in one piece."""
        body = {name: value for name, value in self.body.items() if name not in ("stream", "stream_options")}
        return json.dumps({**body, "model": model}).encode()


def _number(body: Mapping[str, Any], field: str) -> int:
    value = body.get(field)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise Refusal(400, f"{field} is not a number of 0 or more", field)
    return value


def _prompts(prompt: Any) -> tuple[int, int]:
    """How many prompts there are, and their tokens where they are given as such, else 0."""
    if not isinstance(prompt, list) or not prompt:
        return 1, 0
    if all(isinstance(token, int) for token in prompt):
        return 1, len(prompt)
    return len(prompt), sum(len(tokens) for tokens in prompt if isinstance(tokens, list))
