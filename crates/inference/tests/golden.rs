//! The CPU engine against onnxruntime, on the real all-MiniLM-L6-v2 and on small models made here.

mod common;

use common::{Answer, MINILM_SHA256, cosine, minilm, reference, small_config, write_model};
use ringback_inference::{
    Batch, CpuEngine, CpuOptions, EncodeInput, Encoder, Engine, Family, Model, OpenOptions, Outputs, Task,
};
use std::sync::Arc;

/// Tokenises like the reference, and answers the rows of the engine, in batches of many lengths.
fn rows(model: &Model, inputs: &[EncodeInput], answers: &[Answer], threads: usize) -> Vec<Vec<f32>> {
    let options = CpuOptions { threads, max_batch_tokens: 1_500, max_batch_sequences: 40 };
    let mut engine = CpuEngine::new(Arc::clone(model.encoder()), options).expect("an engine");
    let offset = model.encoder().config.position_offset;
    let (mut batch, mut outputs, mut rows) = (Batch::new(), Outputs::default(), Vec::new());
    let mut run = |batch: &mut Batch| {
        if batch.sequences() > 0 {
            engine.submit(batch).expect("a batch");
            engine.collect(&mut outputs).expect("rows");
            rows.extend(outputs.rows().map(<[f32]>::to_vec));
            batch.clear();
        }
    };
    for (input, answer) in inputs.iter().zip(answers) {
        let text = model.tokenizer().encode(input).expect("tokens");
        assert_eq!(text.ids, answer.ids, "{input:?}");
        assert_eq!(text.type_ids, answer.type_ids, "{input:?}");
        if batch.tokens() + text.ids.len() > 1_500 || batch.sequences() == 40 {
            run(&mut batch);
        }
        batch.push(&text.ids, &text.type_ids, offset);
    }
    run(&mut batch);
    rows
}

/// 200 texts: short and long, empty, many scripts, emoji, control characters, punctuation, numbers, broken words.
fn texts() -> Vec<String> {
    let mut all: Vec<String> = [
        "",
        " ",
        "\n\t\r",
        "\0",
        "a\0b\u{1}c\u{7f}d\u{200b}e\u{feff}f",
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "HELLO WORLD",
        "naïve café résumé Ångström",
        "e\u{301}\u{327}\u{308} combining",
        "中文句子没有空格",
        "これは日本語の文です。",
        "한국어 문장입니다.",
        "Это предложение на русском языке.",
        "هذه جملة باللغة العربية",
        "यह हिंदी में एक वाक्य है",
        "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🎉🎉🎉",
        "😀",
        "[CLS] [SEP] [MASK] [PAD] [UNK]",
        "[CLS][SEP]",
        "##ing ##s",
        "don't can't won't o'clock",
        "3.14159 -273.15 1e-9 0xdeadbeef 1,000,000",
        "https://example.com/a/b?c=d&e=f#g user@example.com",
        "fn main() { println!(\"{}\", 1 + 1); }",
        "SELECT * FROM jobs WHERE state = 'IN_QUEUE';",
        "…—–“”‘’«»¿¡§¶†‡•",
        "x",
        "pneumonoultramicroscopicsilicovolcanoconiosis",
        "\u{10ffff}\u{e000}\u{d7ff}",
        "½ ⅓ ² ³ ½½",
    ]
    .map(str::to_owned)
    .into();
    all.push("a".repeat(101));
    all.push("a".repeat(5_000));
    all.push("word ".repeat(509));
    all.push("word ".repeat(510));
    all.push("word ".repeat(511));
    all.push("word ".repeat(5_000));
    all.push("中".repeat(700));
    all.push("😀 ".repeat(300));
    all.push(".".repeat(600));
    let words = [
        "queue",
        "worker",
        "deliver",
        "embedding",
        "transformer",
        "callback",
        "the",
        "of",
        "and",
        "running",
        "signature",
        "Überraschung",
        "naïvely",
        "北京",
        "42",
        "GPU",
        "tokenization",
        "unbelievable",
        ",",
        "retry",
    ];
    let mut state = 12_345_u64;
    while all.len() < 200 {
        let length = 1 + all.len() * 7 % 60;
        let mut text = String::new();
        for _ in 0..length {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(words[(state >> 33) as usize % words.len()]);
            text.push(' ');
        }
        all.push(text);
    }
    all
}

#[test]
fn minilm_is_what_onnxruntime_computes() {
    let Some(folder) = minilm() else { return };
    let options = OpenOptions {
        expected_sha256: Some(MINILM_SHA256.to_owned()),
        max_seq_len: Some(512),
        ..OpenOptions::default()
    };
    let model = Model::open(&folder, Task::Embed, options).expect("the model");
    let inputs: Vec<EncodeInput> = texts().into_iter().map(EncodeInput::Text).collect();
    assert_eq!(inputs.len(), 200);
    let Some(answers) = reference(&folder, Task::Embed, 512, &inputs) else { return };
    assert!(answers.iter().any(|answer| answer.ids.len() == 512), "some text fills all positions");
    let rows = rows(&model, &inputs, &answers, 0);
    let mut worst = 1.0_f64;
    for ((input, answer), row) in inputs.iter().zip(&answers).zip(&rows) {
        let cosine = cosine(row, &answer.row);
        assert!(cosine >= 0.9999, "{input:?}: cosine {cosine}");
        let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-5, "{input:?}: length {length}");
        worst = worst.min(cosine);
    }
    println!("worst cosine of {}: {worst:.9}", rows.len());
    let near = cosine(&rows[5], &rows[6]);
    let far = cosine(&rows[5], &rows[7]);
    assert!((near - 0.75534).abs() < 1e-4 && (far + 0.10496).abs() < 1e-4, "{near} {far}");
}

#[test]
fn the_folder_of_minilm_is_read_as_sentence_transformers_would() {
    let Some(folder) = minilm() else { return };
    let model = Model::open(&folder, Task::Embed, OpenOptions::default()).expect("the model");
    // sentence_bert_config.json says 256, whatever tokenizer.json pads and truncates to.
    assert_eq!(model.encoder().max_seq_len, 256);
    assert!(model.encoder().normalize);
    let long = model.tokenizer().encode(&EncodeInput::Text("word ".repeat(400))).expect("tokens");
    assert_eq!((long.ids.len(), long.truncated), (256, true));
    let short = model.tokenizer().encode(&EncodeInput::Text("word".to_owned())).expect("tokens");
    assert_eq!((short.ids.len(), short.truncated), (3, false));
}

/// Small models of every kind: rows, not only their directions.
fn small_model(family: Family, task: Task, labels: &[&str], prefix: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let encoder = Encoder::random(small_config(family, labels), task, 7);
    write_model(folder.path(), &encoder, prefix);
    let model = Model::open(folder.path(), task, OpenOptions::default()).expect("the model");
    let texts = [
        "a man is eating food",
        "",
        "what?",
        "the girl carries the baby. dogs bark at night",
        "unknown words",
    ];
    let mut inputs: Vec<EncodeInput> = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        for other in texts.iter().skip(index) {
            inputs.push(match task {
                Task::Rerank => EncodeInput::Pair((*text).to_owned(), (*other).to_owned()),
                Task::Embed | Task::Classify => EncodeInput::Text(format!("{text} {other}")),
            });
        }
    }
    inputs.push(match task {
        Task::Rerank => EncodeInput::Pair("which query ".repeat(20), "the document . ".repeat(60)),
        Task::Embed | Task::Classify => EncodeInput::Text("blue red green ".repeat(60)),
    });
    let most = model.encoder().max_seq_len;
    let Some(answers) = reference(folder.path(), task, most, &inputs) else { return };
    assert_eq!(answers.last().expect("the long one").ids.len(), most);
    for threads in [1, 3] {
        let rows = rows(&model, &inputs, &answers, threads);
        for ((input, answer), row) in inputs.iter().zip(&answers).zip(&rows) {
            assert_eq!(row.len(), answer.row.len(), "{input:?}");
            let pairs = row.iter().zip(&answer.row);
            let off = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 2e-5, "{input:?}: off by {off}: {row:?} instead of {:?}", answer.row);
        }
    }
}

#[test]
fn a_cross_encoder_is_what_onnxruntime_computes() {
    small_model(Family::Bert, Task::Rerank, &["score"], "bert.");
}

#[test]
fn a_classifier_is_what_onnxruntime_computes() {
    small_model(Family::Bert, Task::Classify, &["sad", "glad", "neither"], "bert.");
}

#[test]
fn an_embedder_without_prefix_is_what_onnxruntime_computes() {
    small_model(Family::Bert, Task::Embed, &["LABEL_0"], "");
}

#[test]
fn roberta_counts_positions_from_its_offset() {
    small_model(Family::Roberta, Task::Rerank, &["score"], "roberta.");
    small_model(Family::Roberta, Task::Embed, &["LABEL_0"], "");
}
