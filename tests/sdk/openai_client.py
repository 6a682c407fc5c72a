"""The official OpenAI client, sync and async, against an endpoint whose handler is tests/handlers/openai_chat.py.
Prints one line per case; ends with `all cases passed`. Environment: RINGBACK_TEST_URL, RINGBACK_TEST_KEY.
"""

import asyncio
import os
import time

import openai

BASE = os.environ["RINGBACK_TEST_URL"]
KEY = os.environ["RINGBACK_TEST_KEY"]
client = openai.OpenAI(base_url=f"{BASE}/v2/chat/openai/v1", api_key=KEY, timeout=240)


def ask(text, **more):
    return client.chat.completions.create(model="parrot-1", messages=[{"role": "user", "content": text}], **more)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def models():
    assert [model.id for model in client.models.list()] == ["parrot-1"]


def whole_answer():
    answer = ask("the quick brown ü \U0001f600")
    assert answer.choices[0].message.content == "the quick brown ü \U0001f600", answer
    assert answer.usage.total_tokens == 10
    # The job behind it.
    assert answer._request_id.startswith("sync-"), answer._request_id


def stream():
    pieces = [piece.choices[0] for piece in ask("one two three four", stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == "one two three four", pieces
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) == 6


def stream_comes_as_it_is_made():
    begun = time.monotonic()
    answer = iter(ask("wait:1.5 one two three four", stream=True))
    next(answer), next(answer)
    first = time.monotonic() - begun
    rest = list(answer)
    whole = time.monotonic() - begun
    assert len(rest) == 4 and whole - first >= 3, (first, whole)


def raised_error_is_told_once():
    error = raises(openai.InternalServerError, lambda: ask("fail"))
    assert "the parrot is dead" in str(error) and error.status_code == 500, error


def refusal_keeps_its_status():
    for stream in (False, True):
        error = raises(openai.BadRequestError, lambda: ask("refuse", stream=stream))
        assert error.type == "BadRequestError" and "it's too long: 9 > 8" in error.message, error
    assert raises(openai.NotFoundError, lambda: client.embeddings.create(model="m", input="x")).type == "NotFoundError"


def wrong_key():
    other = client.with_options(api_key="rb_nonsense")
    error = raises(openai.AuthenticationError, lambda: other.models.list())
    assert error.code == "invalid_api_key", error


def unknown_endpoint():
    other = openai.OpenAI(base_url=f"{BASE}/v2/nothing/openai/v1", api_key=KEY)
    assert "no endpoint `nothing`" in str(raises(openai.NotFoundError, lambda: other.models.list()))


def worker_lost_in_the_middle():
    flag = os.path.join(os.environ["RINGBACK_TEST_FOLDER"], "crashed")
    text = ""
    def read():
        nonlocal text
        for piece in ask(f"wait:0.2 crash-once:{flag} a b c d", stream=True):
            text += piece.choices[0].delta.content or ""
    error = raises(openai.APIError, read)
    # What was sent cannot be taken back: the stream ends with an error instead of beginning again.
    assert text.startswith("a") and "lost in the middle" in str(error), (text, error)
    # Without a stream nobody notices.
    os.remove(flag)
    assert ask(f"crash-once:{flag} a b c").choices[0].message.content == "a b c"


async def many_at_once():
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, timeout=240) as many:
        async def one(n):
            text = f"number {n}"
            answer = await many.chat.completions.create(
                model="parrot-1", messages=[{"role": "user", "content": text}], stream=n % 2 == 0
            )
            if n % 2 == 0:
                parts = [piece.choices[0].delta.content or "" async for piece in answer]
                return "".join(parts) == text
            return answer.choices[0].message.content == text

        assert all(await asyncio.gather(*(one(n) for n in range(16))))


CASES = [
    models,
    whole_answer,
    stream,
    stream_comes_as_it_is_made,
    raised_error_is_told_once,
    refusal_keeps_its_status,
    wrong_key,
    unknown_endpoint,
    worker_lost_in_the_middle,
    lambda: asyncio.run(many_at_once()),
]
for case in CASES:
    begun = time.monotonic()
    case()
    name = "many_at_once" if case.__name__ == "<lambda>" else case.__name__
    print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
print("all cases passed")
