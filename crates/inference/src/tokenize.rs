//! Texts to token ids, as `tokenizer.json` says, but never padded and truncated to the model's length.

use crate::{
    config::{Family, ModelConfig},
    encoder::Task,
    error::LoadError,
    folder,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};
use tokenizers::{EncodeInput as HfInput, PostProcessor, Tokenizer, TruncationParams, TruncationStrategy};

/// One thing to encode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncodeInput {
    /// A text.
    Text(String),
    /// Two texts in one sequence: query and document of a cross-encoder.
    Pair(String, String),
    /// Token ids that are used as they are: special tokens included, one segment, no truncation.
    Tokens(Vec<u32>),
}

impl EncodeInput {
    /// Size in bytes, for limits.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Pair(first, second) => first.len() + second.len(),
            Self::Tokens(ids) => ids.len() * size_of::<u32>(),
        }
    }
}

/// One sequence, ready for a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizedText {
    /// Token ids with special tokens.
    pub ids: Vec<u32>,
    /// Segment of each token.
    pub type_ids: Vec<u32>,
    /// Whether the text was longer than the model takes.
    pub truncated: bool,
}

/// Why a text has no tokens.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenizeError {
    /// The tokenizer refused the text, or failed on it.
    #[error("the tokenizer refused the text: {0}")]
    Refused(String),
    /// Nothing is left: the model's tokenizer adds no special tokens and the text has none of its own.
    #[error("the text has no tokens")]
    Empty,
    /// More ids than the model has positions.
    #[error("{found} token ids were given, the model takes at most {limit}")]
    TooLong {
        /// Ids given.
        found: usize,
        /// Most ids.
        limit: usize,
    },
    /// An id that the model has no embedding for.
    #[error("token id {found} at position {position} must be below {limit}")]
    UnknownId {
        /// Where.
        position: usize,
        /// The id.
        found: u32,
        /// Rows of the embeddings.
        limit: usize,
    },
}

/// The model's tokenizer. Cheap to share; all methods take `&self` and may run on many threads.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    family: Family,
    max_seq_len: usize,
    vocab_size: usize,
}

impl TextTokenizer {
    /// Reads tokenizer.json for a model of `vocab_size` embeddings and at most `max_seq_len` tokens.
    ///
    /// # Errors
    /// If the file cannot be used, or makes ids that the model does not have.
    pub fn open(
        path: &Path,
        family: Family,
        max_seq_len: usize,
        vocab_size: usize,
    ) -> Result<Self, LoadError> {
        let text = folder::bytes(path, folder::MOST_JSON_BYTES)?;
        let wrong = |detail: String| LoadError::Tokenizer { path: path.to_owned(), detail };
        serde_json::from_slice::<serde::de::IgnoredAny>(&text)
            .map_err(|error| wrong(format!("not a tokenizer: {error}")))?;
        // Some parts of the library's reader panic where others answer an error.
        let mut inner = catch_unwind(|| Tokenizer::from_bytes(&text))
            .map_err(|_| wrong("not a tokenizer: its parts do not fit together".to_owned()))?
            .map_err(|error| wrong(format!("not a tokenizer: {error}")))?;
        let highest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= vocab_size {
            return Err(LoadError::Vocabulary { path: path.to_owned(), highest, vocab_size });
        }
        let special = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(true));
        if max_seq_len <= special {
            let limit = format!("it must exceed the {special} special tokens that {} adds", path.display());
            return Err(LoadError::Limit { field: "max_seq_len", found: max_seq_len, limit });
        }
        inner.with_padding(None);
        let truncation = TruncationParams {
            max_length: max_seq_len,
            strategy: TruncationStrategy::LongestFirst,
            ..Default::default()
        };
        inner.with_truncation(Some(truncation)).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { inner, family, max_seq_len, vocab_size })
    }

    /// Refuses a file whose post-processor puts in what the model does not have: its ids and segments are not in the
    /// vocabulary. What it puts in depends on the length of the text alone.
    pub(crate) fn check(&self, path: &Path, config: &ModelConfig, task: Task) -> Result<(), LoadError> {
        let wrong = |detail: String| LoadError::Tokenizer { path: path.to_owned(), detail };
        let long = "a ".repeat(self.max_seq_len);
        for text in ["", "a", &long] {
            let input = match task {
                Task::Rerank => EncodeInput::Pair(text.to_owned(), text.to_owned()),
                Task::Embed | Task::Classify => EncodeInput::Text(text.to_owned()),
            };
            // A text that it refuses is refused by each request, with the reason.
            let Ok(tokens) = self.encode(&input) else { continue };
            let (found, limit) = (tokens.ids.len(), self.max_seq_len);
            if found > limit {
                return Err(wrong(format!("it makes {found} tokens where at most {limit} are asked for")));
            }
            let vocab_size = config.vocab_size;
            if let Some(highest) = tokens.ids.into_iter().max().filter(|id| *id as usize >= vocab_size) {
                return Err(LoadError::Vocabulary { path: path.to_owned(), highest, vocab_size });
            }
            let segments = config.type_vocab_size;
            if let Some(found) = tokens.type_ids.into_iter().max().filter(|id| *id as usize >= segments) {
                return Err(wrong(format!(
                    "it makes the segment {found}, but the model has embeddings for {segments} segments only"
                )));
            }
        }
        Ok(())
    }

    /// The tokens of one input.
    ///
    /// # Errors
    /// If the input cannot be used.
    pub fn encode(&self, input: &EncodeInput) -> Result<TokenizedText, TokenizeError> {
        let input: HfInput<'_> = match input {
            EncodeInput::Text(text) => text.as_str().into(),
            EncodeInput::Pair(first, second) => HfInput::Dual(first.as_str().into(), second.as_str().into()),
            EncodeInput::Tokens(ids) => return self.given(ids),
        };
        // Neither a text nor a file must end the thread, whatever the tokenizer's libraries make of them.
        let encoded = catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(input, true)))
            .map_err(|_| TokenizeError::Refused("it panicked".to_owned()))?;
        let encoding = encoded.map_err(|error| TokenizeError::Refused(error.to_string()))?;
        if encoding.is_empty() {
            return Err(TokenizeError::Empty);
        }
        let type_ids = match self.family {
            Family::Bert => encoding.get_type_ids().to_vec(),
            // RoBERTa has one segment, whatever the file says.
            Family::Roberta => vec![0; encoding.len()],
        };
        Ok(TokenizedText {
            ids: encoding.get_ids().to_vec(),
            type_ids,
            truncated: !encoding.get_overflowing().is_empty(),
        })
    }

    fn given(&self, ids: &[u32]) -> Result<TokenizedText, TokenizeError> {
        if ids.is_empty() {
            return Err(TokenizeError::Empty);
        }
        if ids.len() > self.max_seq_len {
            return Err(TokenizeError::TooLong { found: ids.len(), limit: self.max_seq_len });
        }
        if let Some(position) = ids.iter().position(|id| *id as usize >= self.vocab_size) {
            return Err(TokenizeError::UnknownId { position, found: ids[position], limit: self.vocab_size });
        }
        Ok(TokenizedText { ids: ids.to_vec(), type_ids: vec![0; ids.len()], truncated: false })
    }
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TextTokenizer")
            .field("max_seq_len", &self.max_seq_len)
            .finish_non_exhaustive()
    }
}
