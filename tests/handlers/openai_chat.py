"""A handler in the manner of RunPod's vLLM worker: an async generator that knows OpenAI's routes by
`input.openai_route` and `input.openai_input`, and collects its yields. Its "model" repeats the last message word by
word. Streams are raw text of server-sent events, cut where no event ends.

The last message may ask for more: `wait:SECONDS` between words, `fail` raises, `refuse` yields an error object as
vLLM does, `crash-once:FILE` ends the process after the first words unless FILE exists.
"""

import asyncio
import json
import os
import time

import runpod

MODEL = "parrot-1"


def frame(value):
    return f"data: {json.dumps(value)}\n\n"


def chunk(delta, finish_reason=None):
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def completion(words):
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": " ".join(words)}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)},
    }


async def chat(given):
    words, pause, crash = [], 0.0, None
    for word in given["messages"][-1]["content"].split():
        if word.startswith("wait:"):
            pause = float(word[5:])
        elif word.startswith("crash-once:"):
            crash = word[11:]
        elif word == "fail":
            raise ValueError("the parrot is dead")
        elif word == "refuse":
            # What vLLM says of a prompt that does not fit.
            error = {"message": "it's too long: 9 > 8", "type": "BadRequestError", "param": None, "code": 400}
            yield {"error": error}
            return
        else:
            words.append(word)
    if not given.get("stream"):
        await asyncio.sleep(pause * len(words))
        yield completion(words)
        return
    text = frame(chunk({"role": "assistant", "content": ""}))
    for number, word in enumerate(words):
        text += frame(chunk({"content": word if number == 0 else f" {word}"}))
        # Cut in the middle of the event; the rest comes with the next piece.
        cut = len(text) - 7
        yield text[:cut]
        text = text[cut:]
        await asyncio.sleep(pause)
        if crash and number == 1 and not os.path.exists(crash):
            open(crash, "w").close()
            os._exit(9)
    yield text + frame(chunk({}, "stop")) + "data: [DONE]\n\n"


async def handler(job):
    route, given = job["input"].get("openai_route"), job["input"].get("openai_input")
    if route == "/v1/models":
        yield {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "test"}]}
    elif route == "/v1/chat/completions":
        async for piece in chat(given):
            yield piece
    else:
        yield {"error": {"message": f"Invalid route {route}", "type": "NotFoundError", "code": 404}}


runpod.serverless.start(
    {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda now: 4}
)
