"""A served language model, reached by the chat completions of an OpenAI-compatible endpoint."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit


Message = dict[str, str]


@dataclass
class Reply:
    """A reply and the tokens that it took, as the endpoint counts them."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class ChatClient:
    """
    Asks one served model.

    Args:
        url (`str`): where the endpoint is, for example `https://api.openai.com/v1`.
        model (`str`): the model's name there.
        key_variable (`str`, *optional*):
            Environment variable with the API key, which goes nowhere but into requests to this endpoint.
        options (`dict`, *optional*): further fields of each request, for example `{"temperature": 0}`.
        attempts (`int`, *optional*, defaults to `6`):
            Requests for one reply at most: while the endpoint is busy (429), fails (5xx) or cannot be reached, the
            request is repeated after the seconds it asks for, or after 1, 2, 4, … seconds.
        wait (`Callable`, *optional*): how to wait some seconds.

    Raises:
        `ValueError`: the URL holds a password or is none, the variable is empty, or the endpoint refuses the request.
        `ConnectionError`: no reply after all attempts.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        options: dict[str, Any] | None = None,
        attempts: int = 6,
        wait: Callable[[float], None] = time.sleep,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.username or parts.query:
            raise ValueError(
                f"Expected the URL of an endpoint without key or password, such as http://localhost:8000/v1, got one "
                f"with the scheme {parts.scheme!r} and the host {parts.hostname!r}; name the variable that holds the "
                "key instead."
            )
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(f"Expected an API key in the environment variable {key_variable}, got none; set it.")
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.options, self.attempts, self.wait = options or {}, attempts, wait
        self.key = os.environ[key_variable] if key_variable else None

    def request(self, messages: list[Message]) -> dict[str, Any]:
        """What is sent."""
        return {"model": self.model, "messages": messages, **self.options}

    def reply(self, messages: list[Message]) -> Reply:
        """The model's reply to a conversation."""
        request = urllib.request.Request(
            self.url, json.dumps(self.request(messages)).encode(), {"Content-Type": "application/json"}
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")  # not to another host
        for attempt in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    answer = json.load(response)
                if answer.get("choices"):
                    usage = answer.get("usage") or {}
                    return Reply(
                        answer["choices"][0]["message"]["content"] or "",
                        usage.get("prompt_tokens", 0),
                        usage.get("completion_tokens", 0),
                    )
                problem, seconds = "a reply without `choices`", ""  # some gateways send errors like this
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    said = error.read().decode(errors="replace")
                    said = said.replace(self.key, "…") if self.key else said
                    raise ValueError(f"Expected a reply of {self.model}, got status {error.code}: {said}") from error
                problem, seconds = f"status {error.code}", error.headers.get("Retry-After", "")
            except (
                urllib.error.URLError,
                HTTPException,
                TimeoutError,
                ConnectionError,
                json.JSONDecodeError,
            ) as error:
                problem, seconds = str(error), ""
            if attempt + 1 < self.attempts:
                self.wait(float(seconds) if seconds.isdigit() else 2.0**attempt)
        raise ConnectionError(
            f"Expected a reply of {self.model} at {self.url}, got {problem} {self.attempts} times; run the command "
            "again later, it goes on from here."
        )
