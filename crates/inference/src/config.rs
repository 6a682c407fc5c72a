//! `config.json` of a model folder, checked.

use crate::{error::LoadError, folder};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// A number beyond this in config.json is a mistake, not a model.
const MOST: usize = 1 << 24;

/// How a family names its tensors, counts its positions and builds its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `bert`: positions from 0, head from the pooler.
    Bert,
    /// `roberta`, `xlm-roberta`, `camembert`: positions from `pad_token_id + 1`, own classification head.
    Roberta,
}

/// How the logits of several labels are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemType {
    /// One of the labels holds: softmax over the logits.
    SingleLabel,
    /// Each label holds or not: sigmoid of each logit.
    MultiLabel,
    /// A number, not a probability.
    Regression,
}

/// The shape of a model of the BERT family.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Naming of tensors and counting of positions.
    pub family: Family,
    /// H: numbers per token.
    pub hidden_size: usize,
    /// I: numbers per token inside the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads; a divisor of the hidden size.
    pub num_attention_heads: usize,
    /// Rows of the word embeddings.
    pub vocab_size: usize,
    /// Rows of the position embeddings.
    pub max_position_embeddings: usize,
    /// Rows of the segment embeddings.
    pub type_vocab_size: usize,
    /// Beneath the root of every layer norm.
    pub layer_norm_eps: f32,
    /// Position id of a sequence's first token: 0 for BERT, `pad_token_id + 1` for RoBERTa.
    pub position_offset: u32,
    /// Names of the labels, by index of the logit. One, `LABEL_0`, where the model names none.
    pub labels: Vec<String>,
    /// How the logits are to be read.
    pub problem_type: ProblemType,
}

/// The fields that are read, as transformers writes them. The others do not change the result of an encoder.
#[derive(Deserialize)]
struct Fields {
    model_type: Option<String>,
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
    pad_token_id: Option<u32>,
    is_decoder: Option<bool>,
    add_cross_attention: Option<bool>,
    problem_type: Option<String>,
    id2label: Option<BTreeMap<String, Value>>,
}

impl ModelConfig {
    /// Numbers per head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Most tokens of one sequence that the position table allows.
    pub fn max_seq_len(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.position_offset as usize)
    }

    /// Reads and checks a config.json.
    ///
    /// # Errors
    /// If a field is missing or out of range, or the model is of a kind that is not computed here.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let fields: Fields = folder::json(path)?;
        let wrong = |detail: String| LoadError::Config { path: path.to_owned(), detail };
        let unsupported = |field, found: &str, supported| LoadError::Unsupported {
            path: path.to_owned(),
            field,
            found: found.to_owned(),
            supported,
        };
        let family = match fields.model_type.as_deref() {
            Some("bert") => Family::Bert,
            Some("roberta" | "xlm-roberta" | "camembert") => Family::Roberta,
            other => {
                let supported = "bert, roberta, xlm-roberta, camembert";
                return Err(unsupported("model_type", other.unwrap_or("absent"), supported));
            }
        };
        if let Some(name) = fields.architectures.iter().find(|name| !is_encoder(name)) {
            let supported = "…Model, …ForMaskedLM, …ForSequenceClassification of the BERT family";
            return Err(unsupported("architectures", name, supported));
        }
        match fields.hidden_act.as_deref() {
            None | Some("gelu") => {}
            Some(other) => return Err(unsupported("hidden_act", other, "gelu (its erf form)")),
        }
        match fields.position_embedding_type.as_deref() {
            None | Some("absolute") => {}
            Some(other) => return Err(unsupported("position_embedding_type", other, "absolute")),
        }
        for (field, value) in
            [("is_decoder", fields.is_decoder), ("add_cross_attention", fields.add_cross_attention)]
        {
            if value == Some(true) {
                return Err(unsupported(field, "true", "false"));
            }
        }
        let number = |field: &str, value: Option<usize>, least: usize| match value {
            Some(value) if (least..=MOST).contains(&value) => Ok(value),
            Some(value) => Err(wrong(format!("{field} is {value}, it must be from {least} to {MOST}"))),
            None => Err(wrong(format!("{field} is missing"))),
        };
        let eps = fields.layer_norm_eps.unwrap_or(1e-12);
        if !(eps.is_finite() && (0.0..1.0).contains(&eps)) {
            return Err(wrong(format!("layer_norm_eps is {eps}, it must be from 0 to 1")));
        }
        let position_offset = match family {
            Family::Bert => 0,
            Family::Roberta => fields.pad_token_id.unwrap_or(1).saturating_add(1),
        };
        let (labels, problem_type) = labels(&fields).map_err(wrong)?;
        let config = Self {
            family,
            hidden_size: number("hidden_size", fields.hidden_size, 1)?,
            intermediate_size: number("intermediate_size", fields.intermediate_size, 1)?,
            num_hidden_layers: number("num_hidden_layers", fields.num_hidden_layers, 1)?,
            num_attention_heads: number("num_attention_heads", fields.num_attention_heads, 1)?,
            vocab_size: number("vocab_size", fields.vocab_size, 1)?,
            max_position_embeddings: number("max_position_embeddings", fields.max_position_embeddings, 1)?,
            type_vocab_size: number("type_vocab_size", fields.type_vocab_size, 1)?,
            layer_norm_eps: eps as f32,
            position_offset,
            labels,
            problem_type,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
            return Err(wrong(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )));
        }
        if config.max_seq_len() < 2 {
            let positions = config.max_position_embeddings;
            return Err(wrong(format!(
                "max_position_embeddings is {positions}, too few for positions from {position_offset}"
            )));
        }
        Ok(config)
    }
}

fn is_encoder(architecture: &str) -> bool {
    let family = ["Bert", "Roberta", "XLMRoberta", "Camembert"];
    let kind = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"];
    family.iter().any(|name| architecture.strip_prefix(name).is_some_and(|rest| kind.contains(&rest)))
}

/// The labels in the order of the logits: id2label must number them from 0 without a gap.
fn labels(fields: &Fields) -> Result<(Vec<String>, ProblemType), String> {
    let mut labels = vec!["LABEL_0".to_owned()];
    if let Some(named) = &fields.id2label {
        let mut numbered = BTreeMap::new();
        for (id, label) in named {
            let id: usize =
                id.parse().map_err(|_| format!("id2label has the key {id:?}, a number is needed"))?;
            let label = match label {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            numbered.insert(id, label);
        }
        if numbered.is_empty() || numbered.keys().copied().ne(0..numbered.len()) {
            return Err("id2label must number its labels from 0 without a gap".to_owned());
        }
        labels = numbered.into_values().collect();
    }
    let problem_type = match fields.problem_type.as_deref() {
        Some("multi_label_classification") => ProblemType::MultiLabel,
        Some("regression") => ProblemType::Regression,
        None | Some("single_label_classification") => ProblemType::SingleLabel,
        Some(other) => {
            return Err(format!(
                "problem_type is {other:?}; supported: single_label_classification, multi_label_classification, regression"
            ));
        }
    };
    Ok((labels, problem_type))
}
