# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""
Token ids of prompts and responses: the base's own chat template, with the memory where the context would stand.

Texts from outside — contexts, prompts, responses — are tokenised so that the names of control tokens in them stay
text: `<|im_end|>` in a context cannot close the user's turn. Only the template's own pieces hold control tokens.
"""

import re
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase


CONTEXT_MARK, CONTENT_MARK = "<<icae-context>>", "<<icae-content>>"
TOKENIZING = threading.Lock()  # whether control tokens are text is a switch in the tokenizer, which threads share
WRITTEN: dict[str, str] = {}  # by chat template, see `_template`
NEUTRAL = ("\n", "0", ".")  # texts whose tokens seldom join with those of a text behind them


def chat_pieces(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answer: bool = False) -> list[str]:
    """
    What the chat template puts around the texts of a conversation about a context: the piece before the context, the
    one between the context and the first message, and one behind each message.

    The last piece ends where the template shows an answer: behind empty thoughts, if a base reasons first, and in the
    channel of answers, if it has channels. With `answer`, the last message is a complete one of the assistant's. A
    base without a template gets blank lines.
    """
    if not messages or messages[0]["role"] != "user":
        raise ValueError(
            "Expected a conversation that starts with the user's message, behind which the context stands, got the "
            f"roles {[message['role'] for message in messages]}; put instructions into the user's message."
        )
    if tokenizer.chat_template is None:
        return ["", "\n\n", *["\n\n"] * (len(messages) - answer), *[""] * answer]
    pieces = _around(tokenizer, messages, add_generation_prompt=not answer)
    if messages[-1]["role"] != "assistant":
        *_, start, _ = _around(tokenizer, [*messages, {"role": "assistant"}], add_generation_prompt=False)
        if start.rstrip() != pieces[-1].rstrip():  # a blank before an answer (Llama 2) is a part of its first word
            pieces[-1] = start
    return pieces


def _around(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **how: Any) -> list[str]:
    """What a chat template writes around the context and around each message."""
    marked = [{"role": message["role"], "content": CONTENT_MARK} for message in messages]
    marked[0]["content"] = f"{CONTEXT_MARK}\n\n{CONTENT_MARK}"
    text = tokenizer.apply_chat_template(marked, tokenize=False, enable_thinking=False, **how)  # many know this switch
    before, _, rest = text.partition(CONTEXT_MARK)
    pieces = [before, *rest.split(CONTENT_MARK)]
    if len(pieces) != len(messages) + 2:
        raise ValueError(
            f"Expected a chat template that shows each of {len(messages)} messages once, got {text!r}; set "
            "`tokenizer.chat_template`, or None for a plain format."
        )
    return pieces


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, control_tokens: bool) -> list[list[int]]:
    """Token ids of texts, in which the names of control tokens are these tokens or text."""
    with TOKENIZING:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=not control_tokens)["input_ids"]


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts from outside: the names of control tokens in them stay text and control nothing."""

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenize(tokenizer, texts, control_tokens=False)

    # Tokens that the template writes are not all special (Qwen's `</think>`), and special ones can be pieces of the
    # vocabulary like others (Unigram's `</s>`): texts are cut behind the first letter of their names.
    template = _template(tokenizer)
    controls = {
        control: token.content
        for control, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content in template)
        and len(token.content.strip()) > 1
        and token.content != tokenizer.unk_token
    }

    def encode_cut(text: str) -> list[int]:
        cut = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in controls.values())
        first, *others = re.split(cut, text)
        rows = encode([first, *others])
        for neutral in NEUTRAL:  # in front, because some tokenizers put a blank before whatever they are given
            before, *behind = encode([neutral, *(neutral + other for other in others)])
            if tokenizer.decode(before) == neutral and all(row[: len(before)] == before for row in behind):
                rows[1:] = [row[len(before) :] for row in behind]
                break
        return [token for row in rows for token in row]

    rows = encode(texts)
    for index, text in enumerate(texts):
        if controls.keys() & set(rows[index]):
            rows[index] = [
                piece
                for token in encode_cut(text)
                # What becomes one of them only in the tokenizer's normal form is still there.
                for piece in (encode_cut(controls[token]) if token in controls else [token])
            ]
    return rows


def _is_read(tokenizer: PreTrainedTokenizerBase, key: str) -> bool:
    """Whether a chat template reads this field of a message."""
    return re.search(rf"\b{re.escape(key)}\b", str(tokenizer.chat_template)) is not None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template and what it writes for each role, whose names it may put together ("<|" + role + "|>")."""
    template = str(tokenizer.chat_template)
    if tokenizer.chat_template is not None and template not in WRITTEN:
        parts = [template]
        for role in ("system", "user", "assistant", "tool"):
            try:
                message = {"role": role, "content": CONTENT_MARK}
                parts += [tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)]
            except Exception:  # templates refuse what they do not know, each in its own way
                pass
        WRITTEN[template] = "".join(map(str, parts))
    return WRITTEN.get(template, "")


def encode_contexts(tokenizer: PreTrainedTokenizerBase, context: str | list[str]) -> list[list[int]]:
    """
    Token ids of the contexts of one row; all but the first have a blank line in front, if they are not empty.

    Raises:
        `ValueError`: if one is no text.
    """
    contexts = [context] if isinstance(context, str) else context
    for text in contexts:
        if not isinstance(text, str):
            raise ValueError(f"Expected a context as a text or a list of texts, got {text!r} for one.")
    first, *others = contexts
    return encode_plain(tokenizer, [first, *("\n\n" * bool(text) + text for text in others)])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of all that stands between the memory and the answer. A prompt is a text or a conversation."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise ValueError(f"Expected messages with a text as their content, got {message!r}.")
        # A template writes these as its own words, in which names of control tokens are control tokens.
        others = {key for key, value in message.items() if value} - {"role", "content"}
        role = message.get("role")
        plain = isinstance(role, str) and re.fullmatch(r"\w+", role)
        if not plain or any(_is_read(tokenizer, key) for key in others):
            raise ValueError(
                "Expected messages of a `role` in one word and a `content`, beside which the chat template reads "
                f"nothing, got {message!r}; put what else the model should read into the content."
            )
    if [message.get("role") for message in messages[-1:]] == ["assistant"]:
        raise ValueError(
            f"Expected a conversation that the assistant is to answer, got one that ends with its own "
            f"{messages[-1]['content'][:40]!r}; leave that out."
        )
    _, *pieces = chat_pieces(tokenizer, messages)
    control = tokenize(tokenizer, pieces, control_tokens=True)
    ids = list(control[0])
    for text, piece in zip(encode_plain(tokenizer, [m["content"] for m in messages]), control[1:], strict=True):
        ids += text + piece
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, end_token_ids: list[int]) -> list[int]:
    """Token ids of an answer and of what ends it: the chat template's token, if generation stops there."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    (behind,) = tokenize(tokenizer, chat_pieces(tokenizer, turns, answer=True)[-1:], control_tokens=True)
    end = behind[0] if behind and behind[0] in end_token_ids else end_token_ids[0]
    return [*encode_plain(tokenizer, [response])[0], end]
