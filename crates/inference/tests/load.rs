//! Folders that are wrong: each is refused with the file, the field or the tensor, and none makes the loader panic.

mod common;

use common::{
    MINILM_SHA256, Tensors, config_json, safetensors, small_config, tensors, tokenizer_json, write_model,
};
use proptest::prelude::*;
use ringback_inference::{Encoder, Family, LoadError, Model, OpenOptions, Pooling, Task};
use serde_json::{Value, json};
use std::{fs, path::Path};
use tempfile::TempDir;

fn encoder() -> Encoder {
    Encoder::random(small_config(Family::Bert, &["no", "yes"]), Task::Classify, 5)
}

/// A whole model whose files can then be damaged.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    write_model(folder.path(), &encoder(), "bert.");
    folder
}

fn open(folder: &Path) -> Result<Model, LoadError> {
    Model::open(folder, Task::Classify, OpenOptions::default())
}

fn error(folder: &Path) -> String {
    open(folder).expect_err("a refusal").to_string()
}

/// Changes one field of config.json.
fn with_config(field: &str, value: Value) -> TempDir {
    let folder = folder();
    let mut config = config_json(&encoder().config);
    config[field] = value;
    fs::write(folder.path().join("config.json"), config.to_string()).expect("config.json");
    folder
}

/// Changes the tensors.
fn with_tensors(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let folder = folder();
    let mut all = tensors(&encoder(), "bert.");
    change(&mut all);
    fs::write(folder.path().join("model.safetensors"), safetensors(&all)).expect("weights");
    folder
}

fn says(folder: &TempDir, parts: &[&str]) {
    let error = error(folder.path());
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn a_whole_folder_gives_back_its_weights() {
    let folder = folder();
    let model = open(folder.path()).expect("the model");
    assert_eq!(model.encoder().weights, encoder().weights);
    assert_eq!(model.labels(), ["no", "yes"]);
    assert_eq!(model.encoder().output_width(), 2);
    // Opened for embedding, the same file needs no head.
    let embed = Model::open(folder.path(), Task::Embed, OpenOptions::default()).expect("the model");
    assert_eq!((embed.encoder().output_width(), embed.encoder().weights.head.is_none()), (48, true));
}

#[test]
fn halves_are_read_as_singles() {
    let all = tensors(&encoder(), "bert.");
    for (dtype, narrow) in
        [("BF16", (|value: f32| (value.to_bits() >> 16) as u16) as fn(f32) -> u16), ("F16", |_| 0x3c00)]
    {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, (shape, values)) in &all {
            let begin = data.len();
            data.extend(values.iter().flat_map(|value| narrow(*value).to_le_bytes()));
            header.insert(
                name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}),
            );
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.extend(data);
        let folder = folder();
        fs::write(folder.path().join("model.safetensors"), file).expect("weights");
        let model = open(folder.path()).expect("the model");
        let (read, written) = (&model.encoder().weights.word_embeddings, &encoder().weights.word_embeddings);
        for (read, written) in read.iter().zip(written) {
            let expected = if dtype == "F16" { 1.0 } else { f32::from_bits(written.to_bits() >> 16 << 16) };
            assert_eq!(*read, expected);
        }
    }
}

#[test]
fn missing_files_are_named() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = folder();
        fs::remove_file(folder.path().join(name)).expect("the file");
        says(&folder, &[name, "is missing"]);
    }
    let gone = Path::new("/nonexistent/model");
    assert!(matches!(open(gone), Err(LoadError::NotAFolder { .. })));
}

#[test]
fn kinds_of_models_that_are_not_computed_are_named() {
    for (field, value, parts) in [
        ("model_type", json!("distilbert"), ["distilbert", "supported: bert"]),
        ("model_type", json!(null), ["absent", "supported: bert"]),
        ("hidden_act", json!("gelu_new"), ["gelu_new", "supported: gelu"]),
        ("hidden_act", json!("relu"), ["relu", "supported: gelu"]),
        ("position_embedding_type", json!("relative_key"), ["relative_key", "supported: absolute"]),
        (
            "architectures",
            json!(["BertForTokenClassification"]),
            ["BertForTokenClassification", "architectures"],
        ),
        ("is_decoder", json!(true), ["is_decoder", "supported: false"]),
        ("hidden_size", json!(null), ["hidden_size", "missing"]),
        ("hidden_size", json!(50), ["hidden_size 50", "num_attention_heads 4"]),
        ("hidden_size", json!("large"), ["config.json", "invalid type"]),
        ("num_hidden_layers", json!(0), ["num_hidden_layers is 0", "from 1"]),
        ("vocab_size", json!(99_999_999_999_u64), ["vocab_size is 99999999999", "to 16777216"]),
        ("layer_norm_eps", json!(-1.0), ["layer_norm_eps is -1", "from 0 to 1"]),
        ("id2label", json!({"0": "a", "2": "b"}), ["id2label", "without a gap"]),
        ("problem_type", json!("ranking"), ["problem_type", "ranking"]),
        ("max_position_embeddings", json!(1), ["max_position_embeddings is 1", "too few"]),
    ] {
        says(&with_config(field, value), &parts);
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let name = "bert.encoder.layer.1.attention.self.key.weight";
    says(&with_tensors(|all| drop(all.remove(name))), &["lacks the tensor", name]);
    let folder = with_tensors(|all| all.get_mut(name).expect("there").0 = vec![24, 96]);
    says(&folder, &[name, "[24, 96]", "[48, 48]"]);
    says(&with_tensors(|all| drop(all.remove("classifier.bias"))), &["lacks the tensor", "classifier.bias"]);
    says(
        &with_tensors(|all| all.get_mut(name).expect("there").1[7] = f32::NAN),
        &[name, "not finite", "position 7"],
    );
    says(&with_config("num_hidden_layers", json!(3)), &["bert.encoder.layer.2.attention.self.query.weight"]);
    says(
        &with_config("intermediate_size", json!(101)),
        &["intermediate.dense.weight", "[100, 48]", "[101, 48]"],
    );
}

#[test]
fn numbers_of_another_type_are_named() {
    let folder = folder();
    let path = folder.path().join("model.safetensors");
    let file = fs::read(&path).expect("weights");
    let size = u64::from_le_bytes(file[..8].try_into().expect("8 bytes")) as usize;
    let header = String::from_utf8(file[8..8 + size].to_vec()).expect("JSON").replace("\"F32\"", "\"I32\"");
    fs::write(&path, [&file[..8], header.as_bytes(), &file[8 + size..]].concat()).expect("weights");
    says(&folder, &["type I32", "supported: F32, F16, BF16"]);
}

#[test]
fn another_file_than_the_pinned_one_is_refused() {
    let folder = folder();
    let options = OpenOptions { expected_sha256: Some(MINILM_SHA256.to_owned()), ..OpenOptions::default() };
    let error = Model::open(folder.path(), Task::Classify, options).expect_err("a refusal");
    let LoadError::Hash { found, .. } = &error else { panic!("{error}") };
    assert!(error.to_string().contains(MINILM_SHA256));
    let options = OpenOptions { expected_sha256: Some(found.to_uppercase()), ..OpenOptions::default() };
    Model::open(folder.path(), Task::Classify, options).expect("the model");
}

#[test]
fn damaged_weights_are_refused() {
    let whole = safetensors(&tensors(&encoder(), "bert."));
    let huge = [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat();
    let long_header = [&200_000_000_u64.to_le_bytes()[..], &whole[8..]].concat();
    for (file, name) in [
        (Vec::new(), "empty"),
        (b"PK\x03\x04".to_vec(), "a zip file"),
        (whole[..7].to_vec(), "half a length"),
        (whole[..500].to_vec(), "half a header"),
        (whole[..whole.len() - 1].to_vec(), "a byte less"),
        ([&whole[..], b"x"].concat(), "a byte more"),
        (huge, "a header of 2^64 bytes"),
        (long_header, "a header of 200 MB"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n".to_vec(), "a pointer"),
    ] {
        let folder = folder();
        fs::write(folder.path().join("model.safetensors"), file).expect("weights");
        let error = open(folder.path()).expect_err(name);
        assert!(matches!(error, LoadError::Safetensors { .. }), "{name}: {error}");
    }
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    for (text, part) in [
        ("", "not a tokenizer"),
        ("{}", "not a tokenizer"),
        ("[1, 2", "not a tokenizer"),
        ("\u{0}\u{1}", "not a tokenizer"),
        ("{\"version\": \"1.0\", \"model\": {\"type\": \"Other\"}}", "not a tokenizer"),
    ] {
        let folder = folder();
        fs::write(folder.path().join("tokenizer.json"), text).expect("tokenizer.json");
        says(&folder, &["tokenizer.json", part]);
    }
    let folder = folder();
    let mut large = tokenizer_json();
    large["model"]["vocab"]["overflow"] = json!(40);
    fs::write(folder.path().join("tokenizer.json"), large.to_string()).expect("tokenizer.json");
    says(&folder, &["token ids up to 40", "40 tokens only"]);
    // What the post-processor puts in is in no vocabulary.
    let with = |part: &[&str], value: Value| {
        let mut tokenizer = tokenizer_json();
        let mut at = &mut tokenizer["post_processor"];
        for name in part {
            at = match name.parse::<usize>() {
                Ok(index) => &mut at[index],
                Err(_) => &mut at[*name],
            };
        }
        *at = value;
        let folder = self::folder();
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("tokenizer.json");
        folder
    };
    let beyond = with(&["special_tokens", "[CLS]", "ids"], json!([99]));
    says(&beyond, &["tokenizer.json", "token ids up to 99", "40 tokens only"]);
    let segment = with(&["single", "1", "Sequence", "type_id"], json!(2));
    says(&segment, &["tokenizer.json", "the segment 2", "2 segments only"]);
}

#[test]
fn what_sentence_transformers_wrote_is_honoured() {
    let folder = folder();
    let write = |name: &str, value: Value| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, value.to_string()).expect("a file");
    };
    let open = || Model::open(folder.path(), Task::Embed, OpenOptions::default());
    let modules = |pooling: &str| {
        json!([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
               {"idx": 1, "name": "1", "path": pooling, "type": "sentence_transformers.models.Pooling"}])
    };
    write("modules.json", modules("1_Pooling"));
    write(
        "1_Pooling/config.json",
        json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}),
    );
    write("sentence_bert_config.json", json!({"max_seq_length": 20}));
    let model = open().expect("the model");
    let encoder = model.encoder();
    assert_eq!((encoder.pooling, encoder.normalize, encoder.max_seq_len), (Pooling::Cls, false, 20));
    write("sentence_bert_config.json", json!({"max_seq_length": 2_000}));
    assert_eq!(open().expect("the model").encoder().max_seq_len, 70, "no more than there are positions");
    write("1_Pooling/config.json", json!({"pooling_mode_max_tokens": true}));
    assert!(open().expect_err("max").to_string().contains("pooling_mode is \"max\"; supported: mean, cls"));
    write("modules.json", modules("../elsewhere"));
    assert!(open().expect_err("outside").to_string().contains("leads out of the model's folder"));
    write("modules.json", json!([{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]));
    assert!(open().expect_err("dense").to_string().contains("sentence_transformers.models.Dense"));
}

#[test]
fn lengths_beyond_the_positions_are_refused() {
    let folder = folder();
    for (found, says) in [(71, "positions for 1 to 70 tokens"), (0, "1 to 70"), (3, "special tokens")] {
        let options = OpenOptions { max_seq_len: Some(found), ..OpenOptions::default() };
        let error = Model::open(folder.path(), Task::Classify, options).expect_err("a refusal").to_string();
        assert!(error.contains(says) && error.starts_with("max_seq_len is"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any damage to the header or the configuration is an error or a model, never a panic.
    #[test]
    fn damage_never_panics(place in 0_usize..4_000, byte in any::<u8>(), cut in 0_usize..40_000, which in 0..3) {
        let folder = folder();
        let name = ["model.safetensors", "config.json", "tokenizer.json"][which as usize];
        let path = folder.path().join(name);
        let mut file = fs::read(&path).expect("a file");
        let place = place % file.len();
        file[place] = byte;
        if cut < file.len() && cut % 2 == 0 {
            file.truncate(cut);
        }
        fs::write(&path, file).expect("a file");
        let _ = open(folder.path());
    }
}
