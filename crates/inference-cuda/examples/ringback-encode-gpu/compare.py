"""Measures sentence-transformers: a JSON object on stdin, one on stdout."""

import json
import os
import sys
import time

# Whatever libraries print goes to stderr: stdout is for the answer.
answer_to = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from sentence_transformers import SentenceTransformer, models  # noqa: E402

given = json.load(sys.stdin)
device = f"cuda:{given['ordinal']}"
dtype = torch.float16 if given["precision"] == "fp16" else torch.bfloat16
transformer = models.Transformer(given["model"], max_seq_length=given["length"])
pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
model = SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device=device).to(dtype).eval()
texts, length, seconds = given["texts"], given["length"], given["seconds"]


def rate(step, tokens):
    """Tokens per second of a step, after a warm-up."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        step()
        steps += 1
    torch.cuda.synchronize()
    return steps * tokens / (time.perf_counter() - begun)


def best(measure):
    figures = []
    for batch in (32, 128, 512, 2048):
        if batch * length > 262144:
            break
        figures.append((measure(batch), batch))
    return max(figures)


def encode(batch):
    work = [texts[i % len(texts)] for i in range(max(4 * batch, 1024))]
    return rate(lambda: model.encode(work, batch_size=batch, show_progress_bar=False), len(work) * length)


def forward(batch):
    work = [texts[i % len(texts)] for i in range(batch)]
    features = {name: value.to(device) for name, value in model.tokenize(work).items() if torch.is_tensor(value)}
    with torch.inference_mode():
        return rate(lambda: model(dict(features)), batch * length)


encode_rate, encode_batch = best(encode)
forward_rate, forward_batch = best(forward)
rows = model.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True)
json.dump({
    "encode_tokens_s": encode_rate, "encode_batch": encode_batch,
    "forward_tokens_s": forward_rate, "forward_batch": forward_batch,
    "rows": [float(x) for row in rows for x in row],
}, answer_to)
answer_to.close()
