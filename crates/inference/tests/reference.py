#!/usr/bin/env python3
"""The same encoders computed by onnxruntime and tokenised by the Python package tokenizers.

    reference.py golden MODEL TASK MAX_SEQ_LEN   inputs as JSON on stdin; ids, type ids and rows as JSON on stdout
    reference.py speed MODEL THREADS SECONDS     shapes "8x128 ..." as JSON on stdin; tokens per CPU second on stdout

The graph is built here from config.json and model.safetensors with ONNX's own operators, so nothing is shared with the
engines but the weights. MODEL is a folder of the BERT or RoBERTa family; TASK is embed, rerank or classify. An input is
a text or a list of two texts. Rows of embed are mean-pooled and normalised, the others are raw logits.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the first with Gelu


def read_tensors(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    types = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class Graph:
    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def op(self, kind, *inputs, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name


def build(model, task):
    config = json.loads((model / "config.json").read_text())
    tensors = read_tensors(model / "model.safetensors")
    roberta = config["model_type"] != "bert"
    prefix = next((p for p in ("bert.", "roberta.") if f"{p}embeddings.word_embeddings.weight" in tensors), "")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head, eps = hidden // heads, config["layer_norm_eps"]
    graph = Graph()

    def weight(name):
        return tensors[name if name in tensors else prefix + name].astype(np.float32)

    def dense(value, name):
        product = graph.op("MatMul", value, graph.constant(weight(f"{name}.weight").T))
        return graph.op("Add", product, graph.constant(weight(f"{name}.bias")))

    def norm(value, name):
        gamma, beta = (graph.constant(weight(f"{name}.{part}")) for part in ("weight", "bias"))
        return graph.op("LayerNormalization", value, gamma, beta, axis=-1, epsilon=eps)

    def split(value, order):
        shape = graph.constant(np.array([0, 0, heads, head], np.int64))
        return graph.op("Transpose", graph.op("Reshape", value, shape), perm=order)

    def table(name, ids):
        return graph.op("Gather", graph.constant(weight(f"embeddings.{name}.weight")), ids)

    value = graph.op("Add", table("word_embeddings", "input_ids"), table("token_type_embeddings", "token_type_ids"))
    value = norm(graph.op("Add", value, table("position_embeddings", "position_ids")), "embeddings.LayerNorm")
    scale = graph.constant(np.array(1 / np.sqrt(head), np.float32))
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        query = split(dense(value, f"{at}.attention.self.query"), [0, 2, 1, 3])
        key = split(dense(value, f"{at}.attention.self.key"), [0, 2, 3, 1])
        values = split(dense(value, f"{at}.attention.self.value"), [0, 2, 1, 3])
        scores = graph.op("Mul", graph.op("MatMul", query, key), scale)
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
        joined = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]),
                          graph.constant(np.array([0, 0, hidden], np.int64)))
        value = norm(graph.op("Add", dense(joined, f"{at}.attention.output.dense"), value),
                     f"{at}.attention.output.LayerNorm")
        inner = graph.op("Gelu", dense(value, f"{at}.intermediate.dense"), approximate="none")
        value = norm(graph.op("Add", dense(inner, f"{at}.output.dense"), value), f"{at}.output.LayerNorm")
    if task == "embed":
        mean = graph.op("ReduceMean", value, graph.constant(np.array([1], np.int64)), keepdims=0)
        output = graph.op("LpNormalization", mean, axis=-1, p=2)
    else:
        first = graph.op("Gather", value, graph.constant(np.array(0, np.int64)), axis=1)
        names = ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
        output = dense(graph.op("Tanh", dense(first, names[0])), names[1])
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "s"])
              for name in ("input_ids", "token_type_ids", "position_ids")]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", None])]
    made = helper.make_graph(graph.nodes, "encoder", inputs, outputs, graph.constants)
    offset = config.get("pad_token_id", 1) + 1 if roberta else 0
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10), offset, roberta


def session(model, task, threads):
    made, offset, roberta = build(model, task)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Waiting in a loop would be counted as CPU time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, offset, roberta


def run(made, offset, ids, type_ids):
    ids = np.array(ids, np.int64)
    positions = np.broadcast_to(np.arange(offset, offset + ids.shape[1], dtype=np.int64), ids.shape)
    return made.run(None, {"input_ids": ids, "token_type_ids": np.array(type_ids, np.int64),
                           "position_ids": np.ascontiguousarray(positions)})[0]


def golden(model, task, max_seq_len):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_seq_len)
    made, offset, roberta = session(model, task, 1)
    answers = []
    for text in json.load(sys.stdin):
        encoded = tokenizer.encode(*text) if isinstance(text, list) else tokenizer.encode(text)
        type_ids = [0] * len(encoded.ids) if roberta else encoded.type_ids
        row = run(made, offset, [encoded.ids], [type_ids])[0]
        answers.append({"ids": encoded.ids, "type_ids": type_ids, "row": [float(value) for value in row]})
    json.dump(answers, sys.stdout)


def speed(model, threads, seconds):
    made, offset, _ = session(model, "embed", threads)
    answers = {}
    for shape in json.load(sys.stdin):
        count, length = map(int, shape.split("x"))
        # The formula of ringback-encode: the same tokens.
        ids = [[(row * 7919 + column * 104729) % 30000 + 500 for column in range(length)] for row in range(count)]
        types = [[0] * length for _ in range(count)]
        for _ in range(2):
            run(made, offset, ids, types)
        runs, begun = 0, time.process_time()
        while (spent := time.process_time() - begun) < seconds:
            run(made, offset, ids, types)
            runs += 1
        answers[shape] = runs * count * length / spent
    json.dump({"engine": f"onnxruntime {onnxruntime.__version__}", "tokens_per_cpu_second": answers}, sys.stdout)


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    if mode == "golden":
        golden(Path(folder), rest[0], int(rest[1]))
    else:
        speed(Path(folder), int(rest[0]), float(rest[1]))
