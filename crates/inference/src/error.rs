//! Why a model could not be loaded. Every case is permanent: the folder or the configuration has to change.

use std::path::PathBuf;

/// Why [`crate::Model::open`] refused a folder.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The path is not a folder.
    #[error("{path} is not a folder with a model (config.json, model.safetensors, tokenizer.json)")]
    NotAFolder {
        /// What was given.
        path: PathBuf,
    },
    /// A file of the folder does not exist.
    #[error("{path} is missing")]
    MissingFile {
        /// The file looked for.
        path: PathBuf,
    },
    /// A file could not be read.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not say what is needed.
    #[error("{path}: {detail}")]
    Config {
        /// The file.
        path: PathBuf,
        /// Field and reason.
        detail: String,
    },
    /// The model is of a kind that no engine here computes.
    #[error("{path}: {field} is {found:?}; supported: {supported}")]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// Its field.
        field: &'static str,
        /// What it holds.
        found: String,
        /// What it may hold.
        supported: &'static str,
    },
    /// The weights are not those that were pinned.
    #[error("{path} has sha256 {found}, expected {expected}")]
    Hash {
        /// The file.
        path: PathBuf,
        /// The digest asked for.
        expected: String,
        /// The digest of the file.
        found: String,
    },
    /// The weights file is no safetensors file, or a damaged one.
    #[error("{path} is not a valid safetensors file: {detail}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A tensor that the model needs is not there.
    #[error("{path} lacks the tensor {name:?}")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The name looked for, with the prefix that the file uses.
        name: String,
    },
    /// A tensor has not the shape that config.json implies.
    #[error("{path}: tensor {name:?} has shape {found:?}, config.json implies {expected:?}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape implied.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor has a type of number that is not read.
    #[error("{path}: tensor {name:?} is of type {found}; supported: F32, F16, BF16")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// A weight is infinite or not a number.
    #[error("{path}: tensor {name:?} holds a number that is not finite, at position {position}")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Position in row-major order.
        position: usize,
    },
    /// tokenizer.json cannot be used.
    #[error("{path}: {detail}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The tokenizer makes ids that the embedding table does not have.
    #[error(
        "{path} makes token ids up to {highest}, but the model has embeddings for {vocab_size} tokens only"
    )]
    Vocabulary {
        /// The tokenizer's file.
        path: PathBuf,
        /// Its highest id.
        highest: u32,
        /// Rows of the word embeddings.
        vocab_size: usize,
    },
    /// A number given by the caller is outside of what the model allows.
    #[error("{field} is {found}; {limit}")]
    Limit {
        /// The option.
        field: &'static str,
        /// Its value.
        found: usize,
        /// What is allowed.
        limit: String,
    },
}
