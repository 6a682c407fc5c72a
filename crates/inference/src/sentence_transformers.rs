//! The files that sentence-transformers puts beside a model: which modules follow it, how it pools, how long texts may be.

use crate::{encoder::Pooling, error::LoadError, folder};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// What the folder says about embeddings; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    pub(crate) pooling: Option<Pooling>,
    pub(crate) normalize: Option<bool>,
    pub(crate) max_seq_len: Option<usize>,
}

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct PoolingFile {
    pooling_mode: Option<String>,
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

#[derive(Deserialize)]
struct TransformerFile {
    max_seq_length: Option<usize>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    model_max_length: Option<f64>,
}

/// Reads what is there.
pub(crate) fn read(model: &Path) -> Result<Wishes, LoadError> {
    let mut wishes = Wishes::default();
    let modules_path = model.join("modules.json");
    if let Some(modules) = folder::optional_json::<Vec<Module>>(&modules_path)? {
        wishes.normalize = Some(false);
        for module in modules {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Pooling" => wishes.pooling = Some(pooling(&inside(model, &modules_path, &module.path)?)?),
                "Normalize" => wishes.normalize = Some(true),
                _ => {
                    return Err(LoadError::Unsupported {
                        path: modules_path,
                        field: "type",
                        found: module.kind,
                        supported: "Transformer, Pooling, Normalize",
                    });
                }
            }
        }
    } else {
        // Older copies of such a model carry the pooling alone.
        let path = model.join("1_Pooling/config.json");
        if path.exists() {
            wishes.pooling = Some(pooling(&model.join("1_Pooling"))?);
        }
    }
    if let Some(file) = folder::optional_json::<TransformerFile>(&model.join("sentence_bert_config.json"))? {
        wishes.max_seq_len = file.max_seq_length;
    }
    if wishes.max_seq_len.is_none()
        && let Some(file) = folder::optional_json::<TokenizerConfig>(&model.join("tokenizer_config.json"))?
    {
        // Tokenizers without a limit write 1e30 here.
        wishes.max_seq_len =
            file.model_max_length.filter(|length| (1.0..1e9).contains(length)).map(|length| length as usize);
    }
    Ok(wishes)
}

/// The folder of a module, which must lie inside the model's.
fn inside(model: &Path, modules: &Path, path: &str) -> Result<PathBuf, LoadError> {
    let relative = Path::new(path);
    if relative
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir))
    {
        return Ok(model.join(relative));
    }
    let detail = format!("the module path {path:?} leads out of the model's folder");
    Err(LoadError::Config { path: modules.to_owned(), detail })
}

fn pooling(module: &Path) -> Result<Pooling, LoadError> {
    let path = module.join("config.json");
    let file: PoolingFile = folder::json(&path)?;
    let mut modes: Vec<String> = file.pooling_mode.into_iter().collect();
    for (set, name) in [
        (file.pooling_mode_cls_token, "cls"),
        (file.pooling_mode_mean_tokens, "mean"),
        (file.pooling_mode_max_tokens, "max"),
        (file.pooling_mode_mean_sqrt_len_tokens, "mean_sqrt_len_tokens"),
        (file.pooling_mode_weightedmean_tokens, "weightedmean"),
        (file.pooling_mode_lasttoken, "lasttoken"),
    ] {
        if set && !modes.iter().any(|mode| mode == name) {
            modes.push(name.to_owned());
        }
    }
    match modes.as_slice() {
        [mode] if mode == "mean" => Ok(Pooling::Mean),
        [mode] if mode == "cls" => Ok(Pooling::Cls),
        _ => Err(LoadError::Unsupported {
            path,
            field: "pooling_mode",
            found: modes.join("+"),
            supported: "mean, cls (one of them)",
        }),
    }
}
