"""The official OpenAI client against the endpoint `embed`, a built-in encoder with all-MiniLM-L6-v2. Prints one line
per case; ends with `all cases passed`. Environment: RINGBACK_TEST_URL, RINGBACK_TEST_KEY.
"""

import asyncio
import os

import openai

BASE = os.environ["RINGBACK_TEST_URL"]
KEY = os.environ["RINGBACK_TEST_KEY"]
client = openai.OpenAI(base_url=f"{BASE}/v2/embed/openai/v1", api_key=KEY, timeout=240)
TEXTS = ["A man is eating food.", "A man is eating a piece of bread."]


def cosine(a, b):
    dot = lambda x, y: sum(p * q for p, q in zip(x, y))
    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def models():
    assert [model.id for model in client.models.list()] == ["all-MiniLM-L6-v2"]


def base64_is_the_default_of_the_client():
    answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS, user="someone")
    assert [item.index for item in answer.data] == [0, 1] and len(answer.data[0].embedding) == 384
    assert abs(cosine(answer.data[0].embedding, answer.data[1].embedding) - 0.75534) < 1e-3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 10, answer.usage
    assert answer.model == "all-MiniLM-L6-v2"


def floats_are_the_same():
    one = client.embeddings.create(model="m", input=TEXTS[0], encoding_format="float").data[0].embedding
    other = client.embeddings.create(model="m", input=TEXTS[0]).data[0].embedding
    assert cosine(one, other) > 0.99999


def refusals():
    for given, part in [
        ({"input": []}, "`input` is empty"),
        ({"input": [[1, 2, 3]]}, "token ids of another tokenizer"),
        ({"input": "x", "dimensions": 12}, "`dimensions` is 12"),
    ]:
        try:
            client.embeddings.create(model="m", **given)
        except openai.BadRequestError as error:
            assert part in error.message and error.type == "invalid_request_error", error
        else:
            raise AssertionError(given)
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    except openai.NotFoundError as error:
        assert "/v1/embeddings" in error.message, error
    else:
        raise AssertionError("an encoder does not chat")


def many_at_once():
    async def run():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=KEY, timeout=240) as many:
            answers = await asyncio.gather(
                *(many.embeddings.create(model="m", input=f"text {n}") for n in range(64))
            )
        assert len({tuple(answer.data[0].embedding[:8]) for answer in answers}) == 64

    asyncio.run(run())


for case in [models, base64_is_the_default_of_the_client, floats_are_the_same, refusals, many_at_once]:
    case()
    print(case.__name__, flush=True)
print("all cases passed")
