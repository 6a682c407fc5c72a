//! From rows of numbers to a job's output.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use half::f16;
use ringback_inference::{EncodeInput, Encoded, Model, Task};
use serde_json::{Value, json};

use super::input::{Encoding, Request, Shape};

/// The output of an encoded request. `name` is what the model is called.
pub(super) fn render(model: &Model, name: &str, request: &Request, encoded: Encoded) -> Bytes {
    let out = match model.task() {
        Task::Embed => embeddings(name, request, &encoded),
        Task::Rerank => ranking(model, name, request, encoded),
        Task::Classify => labels(model, name, request, encoded),
    };
    out.into()
}

/// The list of models in OpenAI's shape.
pub(super) fn models(name: &str, started_s: i64) -> Bytes {
    let model = json!({"id": name, "object": "model", "created": started_s, "owned_by": "ringback"});
    json!({"object": "list", "data": [model]}).to_string().into()
}

fn usage(encoded: &Encoded) -> Value {
    let tokens = encoded.total_tokens();
    json!({"prompt_tokens": tokens, "total_tokens": tokens})
}

/// Which inputs were cut to the model's length; absent where none was.
fn truncated(encoded: &Encoded) -> String {
    let cut: Vec<usize> =
        encoded.truncated.iter().enumerate().filter_map(|(index, cut)| cut.then_some(index)).collect();
    if cut.is_empty() { String::new() } else { format!(",\"truncated\":{}", json!(cut)) }
}

// Written piece by piece: a thousand vectors as JSON values would take many times their memory.
fn embeddings(name: &str, request: &Request, encoded: &Encoded) -> Vec<u8> {
    let open_ai = request.shape == Shape::OpenAi;
    let mut out = match (open_ai, request.encoding) {
        (true, _) => format!("{{\"object\":\"list\",\"model\":{},\"data\":[", json!(name)),
        (false, encoding) => {
            let (encoding, dtype) = match encoding {
                Encoding::Float => ("float", "float32"),
                Encoding::Base64F32 => ("base64", "float32"),
                Encoding::Base64F16 => ("base64", "float16"),
            };
            format!(
                "{{\"model\":{},\"dimensions\":{},\"encoding\":\"{encoding}\",\"dtype\":\"{dtype}\",\"embeddings\":[",
                json!(name),
                encoded.width
            )
        }
    }
    .into_bytes();
    for (index, row) in encoded.rows().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        if open_ai {
            out.extend_from_slice(
                format!("{{\"object\":\"embedding\",\"index\":{index},\"embedding\":").as_bytes(),
            );
        }
        vector(request.encoding, row, &mut out);
        if open_ai {
            out.push(b'}');
        }
    }
    out.extend_from_slice(format!("],\"usage\":{}{}}}", usage(encoded), truncated(encoded)).as_bytes());
    out
}

fn vector(encoding: Encoding, row: &[f32], out: &mut Vec<u8>) {
    let bytes: Vec<u8> = match encoding {
        Encoding::Float => {
            // Writing numbers into memory cannot fail; engines refuse rows that are not finite.
            let _ = serde_json::to_writer(out, row);
            return;
        }
        Encoding::Base64F32 => row.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Encoding::Base64F16 => row.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
    };
    out.push(b'"');
    out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
    out.push(b'"');
}

/// Rows as scores, unless logits are asked for.
fn scores(model: &Model, request: &Request, encoded: &mut Encoded) {
    if !request.options.raw_scores {
        let width = encoded.width.max(1);
        encoded.values.chunks_exact_mut(width).for_each(|row| model.logits_to_scores(row));
    }
}

fn ranking(model: &Model, name: &str, request: &Request, mut encoded: Encoded) -> Vec<u8> {
    scores(model, request, &mut encoded);
    // A head with several labels gives the probability of the last as the score, as sentence-transformers does.
    let score = |row: &[f32]| row.last().copied().unwrap_or_default();
    let mut ranked: Vec<(usize, f32)> = encoded.rows().map(score).enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranked.truncate(request.options.top_n.unwrap_or(usize::MAX));
    let results: Vec<Value> = ranked
        .into_iter()
        .map(|(index, score)| {
            let mut result = json!({"index": index, "relevance_score": score});
            if request.options.return_documents
                && let Some(EncodeInput::Pair(_, document)) = request.inputs.get(index)
            {
                result["document"] = json!({"text": document});
            }
            result
        })
        .collect();
    listed(name, &encoded, &Value::from(results))
}

fn labels(model: &Model, name: &str, request: &Request, mut encoded: Encoded) -> Vec<u8> {
    scores(model, request, &mut encoded);
    let of_row = |row: &[f32]| {
        let mut labels: Vec<(&String, f32)> = model.labels().iter().zip(row.iter().copied()).collect();
        labels.sort_by(|a, b| b.1.total_cmp(&a.1));
        let labels: Vec<Value> =
            labels.into_iter().map(|(label, score)| json!({"label": label, "score": score})).collect();
        Value::from(labels)
    };
    let results: Vec<Value> = encoded.rows().map(of_row).collect();
    listed(name, &encoded, &Value::from(results))
}

fn listed(name: &str, encoded: &Encoded, results: &Value) -> Vec<u8> {
    format!(
        "{{\"model\":{},\"results\":{results},\"usage\":{}{}}}",
        json!(name),
        usage(encoded),
        truncated(encoded)
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::encoder::input::Options;

    fn request(shape: Shape, encoding: Encoding) -> Request {
        let inputs = vec![EncodeInput::Text("a".into()); 2];
        Request { inputs, field: "texts", shape, encoding, refuse_long: false, options: Options::default() }
    }

    fn encoded() -> Encoded {
        let values = vec![1.0, -0.5, 0.25, 0.1];
        Encoded { width: 2, values, tokens: vec![3, 4], truncated: vec![false, true], ..Encoded::default() }
    }

    #[test]
    fn vectors_are_numbers_or_little_endian_bytes() {
        let native = |encoding| -> Value {
            serde_json::from_slice(&embeddings("m", &request(Shape::Native, encoding), &encoded())).unwrap()
        };
        let float = native(Encoding::Float);
        assert_eq!(float["embeddings"], json!([[1.0, -0.5], [0.25, 0.1]]));
        assert_eq!((&float["usage"]["total_tokens"], &float["truncated"]), (&json!(7), &json!([1])));
        assert_eq!(native(Encoding::Base64F32)["embeddings"][0], "AACAPwAAAL8=");
        let half = native(Encoding::Base64F16);
        assert_eq!((&half["embeddings"][0], &half["dtype"]), (&json!("ADwAuA=="), &json!("float16")));
    }

    #[test]
    fn the_shape_of_open_ai() {
        let out = embeddings("m", &request(Shape::OpenAi, Encoding::Float), &encoded());
        let out: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(out["object"], "list");
        assert_eq!(out["data"][1], json!({"object": "embedding", "index": 1, "embedding": [0.25, 0.1]}));
        assert_eq!(out["usage"], json!({"prompt_tokens": 7, "total_tokens": 7}));
    }
}
