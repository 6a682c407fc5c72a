//! A model folder, loaded and checked.

use crate::{
    config::{ModelConfig, ProblemType},
    encoder::{Encoder, Pooling, Task},
    error::LoadError,
    folder, sentence_transformers, tensors,
    tokenize::TextTokenizer,
};
use std::{path::Path, sync::Arc};

/// Larger files of weights are refused: the largest encoders of the family have 2.3 GB.
const MOST_WEIGHT_BYTES: u64 = 8 << 30;

/// What the operator may set about a model.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// sha256 of model.safetensors in hexadecimal; another file is refused.
    pub expected_sha256: Option<String>,
    /// Most tokens of one sequence; default: what the folder says, else all positions.
    pub max_seq_len: Option<usize>,
    /// How to pool; default: what the folder says, else the mean.
    pub pooling: Option<Pooling>,
    /// Whether to scale vectors to length 1; default: what the folder says, else yes.
    pub normalize: Option<bool>,
}

/// A loaded model: the encoder for an engine and the tokenizer in front of it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Model {
    encoder: Arc<Encoder>,
    tokenizer: Arc<TextTokenizer>,
}

impl Model {
    /// Reads the folder at `path` for `task`.
    ///
    /// # Errors
    /// If a file or tensor is missing or does not fit, naming it.
    pub fn open(path: impl AsRef<Path>, task: Task, options: OpenOptions) -> Result<Self, LoadError> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Err(LoadError::NotAFolder { path: path.to_owned() });
        }
        let config = ModelConfig::read(&path.join("config.json"))?;
        let wishes = sentence_transformers::read(path)?;
        let positions = config.max_seq_len();
        let max_seq_len = match options.max_seq_len {
            Some(wanted) if (1..=positions).contains(&wanted) => wanted,
            Some(found) => {
                let limit = format!("the model has positions for 1 to {positions} tokens");
                return Err(LoadError::Limit { field: "max_seq_len", found, limit });
            }
            None => wishes.max_seq_len.unwrap_or(positions).clamp(1, positions),
        };
        let tokenizer_path = path.join("tokenizer.json");
        let tokenizer = TextTokenizer::open(&tokenizer_path, config.family, max_seq_len, config.vocab_size)?;
        tokenizer.check(&tokenizer_path, &config, task)?;
        let weights_path = path.join("model.safetensors");
        let bytes = folder::bytes(&weights_path, MOST_WEIGHT_BYTES)?;
        if let Some(expected) = &options.expected_sha256 {
            folder::check_sha256(&weights_path, &bytes, expected)?;
        }
        let weights = tensors::read(&weights_path, &bytes, &config, task)?;
        let encoder = Encoder {
            config,
            weights,
            task,
            pooling: options.pooling.or(wishes.pooling).unwrap_or(Pooling::Mean),
            normalize: options.normalize.or(wishes.normalize).unwrap_or(true),
            max_seq_len,
        };
        Ok(Self { encoder: Arc::new(encoder), tokenizer: Arc::new(tokenizer) })
    }

    /// What engines need.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<TextTokenizer> {
        &self.tokenizer
    }

    /// The task it was opened for.
    pub fn task(&self) -> Task {
        self.encoder.task
    }

    /// Names of the labels, in the order of a row of logits.
    pub fn labels(&self) -> &[String] {
        &self.encoder.config.labels
    }

    /// Turns a row of logits into what users read: for reranking a score from 0 to 1 (sigmoid), for classifying
    /// probabilities over the labels (softmax), or one per label (sigmoid) where several may hold. A regression's
    /// number stays as it is, and so does an embedding.
    pub fn logits_to_scores(&self, row: &mut [f32]) {
        let config = &self.encoder.config;
        match (self.encoder.task, config.problem_type) {
            (Task::Embed, _) | (Task::Classify, ProblemType::Regression) => {}
            (Task::Rerank, _) if row.len() == 1 => sigmoid(row),
            (Task::Classify, ProblemType::MultiLabel) => sigmoid(row),
            (Task::Classify, ProblemType::SingleLabel) if row.len() == 1 => sigmoid(row),
            (Task::Rerank, _) | (Task::Classify, ProblemType::SingleLabel) => softmax(row),
        }
    }
}

fn sigmoid(row: &mut [f32]) {
    for value in row {
        *value = 1.0 / (1.0 + (-*value).exp());
    }
}

fn softmax(row: &mut [f32]) {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in row.iter_mut() {
        *value = (*value - highest).exp();
        sum += *value;
    }
    for value in row {
        *value /= sum;
    }
}
