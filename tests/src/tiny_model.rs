//! A model folder with a few weights whose effect is plain: words are "good" or "bad", attention is the mean.

use serde_json::{Map, Value, json};
use std::path::Path;

const HIDDEN: usize = 4;
const WORDS: [(&str, [f32; HIDDEN]); 6] = [
    ("[UNK]", [0.0; HIDDEN]),
    ("[CLS]", [0.0; HIDDEN]),
    ("[SEP]", [0.0; HIDDEN]),
    ("good", [4.0, -4.0, 0.0, 0.0]),
    ("bad", [-4.0, 4.0, 0.0, 0.0]),
    ("what", [0.0, 0.0, 1.0, -1.0]),
];

/// Writes a BERT with one layer and a classifier that has these labels with these rows of weights.
///
/// # Panics
/// If the folder cannot be written.
pub fn write(folder: &Path, labels: &[(&str, [f32; HIDDEN])]) {
    std::fs::create_dir_all(folder).expect("a folder");
    let ids: Map<String, Value> =
        labels.iter().enumerate().map(|(id, (label, _))| (id.to_string(), json!(label))).collect();
    let config = json!({
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_act": "gelu",
        "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 1,
        "vocab_size": WORDS.len(), "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "id2label": ids,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("config.json");
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).expect("tokenizer.json");
    std::fs::write(folder.join("model.safetensors"), weights(labels)).expect("model.safetensors");
}

fn tokenizer() -> Value {
    let vocab: Map<String, Value> =
        WORDS.iter().enumerate().map(|(id, (word, _))| ((*word).to_owned(), json!(id))).collect();
    let added: Vec<Value> = (0..3)
        .map(|id| {
            json!({"id": id, "content": WORDS[id].0, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let special = |id: &str, kind: u8| json!({"SpecialToken": {"id": id, "type_id": kind}});
    let sequence = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    let single = [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)];
    let pair =
        [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0), sequence("B", 1), special("[SEP]", 1)];
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "decoder": null,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {
            "[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]},
            "[SEP]": {"id": "[SEP]", "ids": [2], "tokens": ["[SEP]"]},
        }},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
}

fn weights(labels: &[(&str, [f32; HIDDEN])]) -> Vec<u8> {
    let zeros = |n: usize| vec![0.0_f32; n];
    let identity: Vec<f32> =
        (0..HIDDEN * HIDDEN).map(|i| if i % (HIDDEN + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let square = [HIDDEN, HIDDEN];
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = vec![
        (
            "bert.embeddings.word_embeddings.weight".into(),
            vec![WORDS.len(), HIDDEN],
            WORDS.iter().flat_map(|(_, row)| *row).collect(),
        ),
        ("bert.embeddings.position_embeddings.weight".into(), vec![64, HIDDEN], zeros(64 * HIDDEN)),
        ("bert.embeddings.token_type_embeddings.weight".into(), vec![2, HIDDEN], zeros(2 * HIDDEN)),
        (
            "classifier.weight".into(),
            vec![labels.len(), HIDDEN],
            labels.iter().flat_map(|(_, row)| *row).collect(),
        ),
        ("classifier.bias".into(), vec![labels.len()], zeros(labels.len())),
        ("bert.pooler.dense.weight".into(), square.to_vec(), identity.clone()),
        ("bert.pooler.dense.bias".into(), vec![HIDDEN], zeros(HIDDEN)),
    ];
    for norm in [
        "embeddings.LayerNorm",
        "encoder.layer.0.attention.output.LayerNorm",
        "encoder.layer.0.output.LayerNorm",
    ] {
        tensors.push((format!("bert.{norm}.weight"), vec![HIDDEN], vec![1.0; HIDDEN]));
        tensors.push((format!("bert.{norm}.bias"), vec![HIDDEN], zeros(HIDDEN)));
    }
    // Queries and keys of zero make all words equal to each other: attention is the mean of the values.
    for (name, weight) in [
        ("attention.self.query", zeros(HIDDEN * HIDDEN)),
        ("attention.self.key", zeros(HIDDEN * HIDDEN)),
        ("attention.self.value", identity.clone()),
        ("attention.output.dense", identity),
        ("intermediate.dense", zeros(HIDDEN * HIDDEN)),
        ("output.dense", zeros(HIDDEN * HIDDEN)),
    ] {
        tensors.push((format!("bert.encoder.layer.0.{name}.weight"), square.to_vec(), weight));
        tensors.push((format!("bert.encoder.layer.0.{name}.bias"), vec![HIDDEN], zeros(HIDDEN)));
    }
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]}));
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}
