//! A model as engines see it: shape, weights, and what to do with the last layer.

use crate::{batch::Batch, config::ModelConfig, engine::EngineError, weights::EncoderWeights};
use serde::{Deserialize, Serialize};

/// What a model is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// One vector per text.
    Embed,
    /// One score per pair of query and document, from a cross-encoder.
    Rerank,
    /// One score per label and text.
    Classify,
}

impl Task {
    /// The name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Rerank => "rerank",
            Self::Classify => "classify",
        }
    }
}

/// How the vectors of a sequence become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// The first token's vector.
    Cls,
}

/// Everything an engine needs, shared by `Arc`. The fields are for engines to read; [`crate::Model::open`] makes sure
/// that they fit together.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// The shape.
    pub config: ModelConfig,
    /// The weights in fp32.
    pub weights: EncoderWeights,
    /// What is asked for. [`Task::Embed`] pools; the others apply [`EncoderWeights::head`] to the first token.
    pub task: Task,
    /// How to pool, for [`Task::Embed`].
    pub pooling: Pooling,
    /// Whether to scale the pooled vector to length 1, for [`Task::Embed`].
    pub normalize: bool,
    /// Most tokens of one sequence, special tokens included.
    pub max_seq_len: usize,
}

impl Encoder {
    /// An encoder with random weights (the same for the same seed), for tests and benches of engines.
    pub fn random(config: ModelConfig, task: Task, seed: u64) -> Self {
        let labels = match task {
            Task::Embed => None,
            Task::Rerank | Task::Classify => Some(config.labels.len()),
        };
        let weights = EncoderWeights::random(&config, labels, seed);
        let max_seq_len = config.max_seq_len();
        Self { config, weights, task, pooling: Pooling::Mean, normalize: true, max_seq_len }
    }

    /// Numbers per row of the outputs: the hidden size for embeddings, else the number of labels.
    pub fn output_width(&self) -> usize {
        match (self.task, &self.weights.head) {
            (Task::Rerank | Task::Classify, Some(head)) => head.classifier.out_features,
            (Task::Embed, _) | (_, None) => self.config.hidden_size,
        }
    }

    /// Checks a batch before an engine touches it: lists of equal length, ids in range, lengths allowed.
    ///
    /// # Errors
    /// [`EngineError::Rejected`], naming the field and the limit.
    pub fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        let refuse = |detail: String| Err(EngineError::Rejected { detail });
        let tokens = batch.tokens();
        for (name, found) in
            [("token_type_ids", batch.token_type_ids.len()), ("position_ids", batch.position_ids.len())]
        {
            if found != tokens {
                return refuse(format!("{name} has {found} entries, input_ids {tokens}"));
            }
        }
        if batch.sequences() == 0 || batch.cu_seq_lens[0] != 0 {
            return refuse("cu_seq_lens must begin with 0 and hold at least one sequence".to_owned());
        }
        if batch.cu_seq_lens.last().is_none_or(|last| *last as usize != tokens) {
            return refuse(format!("cu_seq_lens must end with the number of tokens, {tokens}"));
        }
        for (index, pair) in batch.cu_seq_lens.windows(2).enumerate() {
            let length = pair[1].saturating_sub(pair[0]) as usize;
            if length == 0 || length > self.max_seq_len || length > batch.max_seq_len as usize {
                let most = self.max_seq_len.min(batch.max_seq_len as usize);
                return refuse(format!("sequence {index} has {length} tokens, 1 to {most} are allowed"));
            }
        }
        for (name, ids, limit) in [
            ("input_ids", &batch.input_ids, self.config.vocab_size),
            ("token_type_ids", &batch.token_type_ids, self.config.type_vocab_size),
            ("position_ids", &batch.position_ids, self.config.max_position_embeddings),
        ] {
            if let Some(position) = ids.iter().position(|id| *id as usize >= limit) {
                return refuse(format!("{name}[{position}] is {}, it must be below {limit}", ids[position]));
            }
        }
        Ok(())
    }
}
