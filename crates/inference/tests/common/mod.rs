//! Model folders made by tests, the reference in Python, and comparisons.
#![allow(dead_code, reason = "each test binary uses a part")]

use ringback_inference::{
    ClassifierHead, EncodeInput, Encoder, Family, LayerNorm, Linear, ModelConfig, ProblemType, Task,
};
use ringback_test_support::tools;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// sha256 of the weights that tools/setup fetches.
pub(crate) const MINILM_SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";

/// The folder of all-MiniLM-L6-v2.
pub(crate) fn minilm() -> Option<PathBuf> {
    let path = tools::tool("models/all-MiniLM-L6-v2");
    tools::need(
        path.join("model.safetensors").exists().then_some(path),
        "all-MiniLM-L6-v2",
        "run `make model`",
    )
}

/// A shape small enough for any test.
pub(crate) fn small_config(family: Family, labels: &[&str]) -> ModelConfig {
    ModelConfig {
        family,
        hidden_size: 48,
        intermediate_size: 100,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        vocab_size: 40,
        max_position_embeddings: 70,
        type_vocab_size: if family == Family::Bert { 2 } else { 1 },
        layer_norm_eps: 1e-5,
        position_offset: if family == Family::Bert { 0 } else { 2 },
        labels: labels.iter().map(|label| (*label).to_owned()).collect(),
        problem_type: ProblemType::SingleLabel,
    }
}

/// Tensors by name, in the shape and order of a safetensors file.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The weights of an encoder under the names that transformers gives them.
pub(crate) fn tensors(encoder: &Encoder, prefix: &str) -> Tensors {
    let mut all = Tensors::new();
    let (config, weights) = (&encoder.config, &encoder.weights);
    let hidden = config.hidden_size;
    let mut put = |name: String, shape: Vec<usize>, values: &[f32]| {
        all.insert(name, (shape, values.to_vec()));
    };
    for (name, values) in [
        ("word", &weights.word_embeddings),
        ("position", &weights.position_embeddings),
        ("token_type", &weights.token_type_embeddings),
    ] {
        put(
            format!("{prefix}embeddings.{name}_embeddings.weight"),
            vec![values.len() / hidden, hidden],
            values,
        );
    }
    let mut norm = |name: String, part: &LayerNorm| {
        put(format!("{name}.weight"), vec![hidden], &part.gamma);
        put(format!("{name}.bias"), vec![hidden], &part.beta);
    };
    norm(format!("{prefix}embeddings.LayerNorm"), &weights.embedding_norm);
    for (index, layer) in weights.layers.iter().enumerate() {
        norm(format!("{prefix}encoder.layer.{index}.attention.output.LayerNorm"), &layer.attention_norm);
        norm(format!("{prefix}encoder.layer.{index}.output.LayerNorm"), &layer.output_norm);
    }
    let mut linear = |name: String, part: &Linear| {
        put(format!("{name}.weight"), vec![part.out_features, part.in_features], &part.weight);
        put(format!("{name}.bias"), vec![part.out_features], &part.bias);
    };
    for (index, layer) in weights.layers.iter().enumerate() {
        let at = format!("{prefix}encoder.layer.{index}");
        for (third, name) in ["query", "key", "value"].into_iter().enumerate() {
            let rows = third * hidden..(third + 1) * hidden;
            let part = Linear {
                out_features: hidden,
                in_features: hidden,
                weight: layer.qkv.weight[rows.start * hidden..rows.end * hidden].to_vec(),
                bias: layer.qkv.bias[rows].to_vec(),
            };
            linear(format!("{at}.attention.self.{name}"), &part);
        }
        linear(format!("{at}.attention.output.dense"), &layer.attention_output);
        linear(format!("{at}.intermediate.dense"), &layer.intermediate);
        linear(format!("{at}.output.dense"), &layer.output);
    }
    if let Some(ClassifierHead { dense, classifier }) = &weights.head {
        let names = match config.family {
            Family::Bert => [format!("{prefix}pooler.dense"), "classifier".to_owned()],
            Family::Roberta => ["classifier.dense".to_owned(), "classifier.out_proj".to_owned()],
        };
        let [first, second] = names;
        linear(first, dense);
        linear(second, classifier);
    }
    all
}

/// The bytes of a safetensors file, written without the library that reads it.
pub(crate) fn safetensors(all: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in all {
        let begin = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(data);
    file
}

/// config.json as transformers would write it.
pub(crate) fn config_json(config: &ModelConfig) -> Value {
    let labels: BTreeMap<String, &String> =
        config.labels.iter().enumerate().map(|(index, label)| (index.to_string(), label)).collect();
    json!({
        "model_type": if config.family == Family::Bert { "bert" } else { "xlm-roberta" },
        "architectures": [if config.family == Family::Bert { "BertModel" } else { "XLMRobertaModel" }],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "pad_token_id": if config.family == Family::Bert { 0 } else { 1 },
        "id2label": labels,
    })
}

/// A word-piece tokenizer of 40 tokens that pads and truncates, as files of real models do.
pub(crate) fn tokenizer_json() -> Value {
    let words = "[PAD] [UNK] [CLS] [SEP] [MASK] a man is eating food bread . , ? the girl carries baby what which query \
                 document dogs bark at night ##s ##ing ##ed run walk talk blue red green one two three four";
    let vocab: BTreeMap<&str, usize> =
        words.split_whitespace().enumerate().map(|(index, word)| (word, index)).collect();
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(|content| {
        json!({"id": vocab[content], "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

/// Writes a model's folder.
pub(crate) fn write_model(folder: &Path, encoder: &Encoder, prefix: &str) {
    fs::write(folder.join("config.json"), config_json(&encoder.config).to_string()).expect("config.json");
    fs::write(folder.join("tokenizer.json"), tokenizer_json().to_string()).expect("tokenizer.json");
    fs::write(folder.join("model.safetensors"), safetensors(&tensors(encoder, prefix))).expect("weights");
}

/// What the reference says about one input.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    pub(crate) ids: Vec<u32>,
    pub(crate) type_ids: Vec<u32>,
    pub(crate) row: Vec<f32>,
}

/// Asks onnxruntime and the Python package tokenizers.
pub(crate) fn reference(
    model: &Path,
    task: Task,
    max_seq_len: usize,
    inputs: &[EncodeInput],
) -> Option<Vec<Answer>> {
    let python = tools::python("venv-onnx")?;
    let inputs: Vec<Value> = inputs
        .iter()
        .map(|input| match input {
            EncodeInput::Text(text) => json!(text),
            EncodeInput::Pair(first, second) => json!([first, second]),
            EncodeInput::Tokens(_) => panic!("the reference takes texts"),
        })
        .collect();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference.py");
    let mut child = Command::new(python)
        .arg(script)
        .arg("golden")
        .arg(model)
        .args([task.name(), &max_seq_len.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the reference starts");
    child.stdin.take().expect("stdin").write_all(Value::from(inputs).to_string().as_bytes()).expect("inputs");
    let output = child.wait_with_output().expect("the reference ends");
    assert!(output.status.success(), "the reference failed: {:?}", output.status);
    Some(serde_json::from_slice(&output.stdout).expect("answers"))
}

/// The cosine of the angle between two rows.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
