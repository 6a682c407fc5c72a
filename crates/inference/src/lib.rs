//! Text encoders of the BERT family: embedding, cross-encoder reranking, sequence classification.
//!
//! - [`Model::open`] reads a folder (`config.json`, `model.safetensors`, `tokenizer.json`, and the files of
//!   sentence-transformers where present) into an [`Encoder`], the validated fp32 weights that every engine shares.
//! - An [`Engine`] runs one [`Batch`] of token sequences, laid out end to end without padding, into one row of
//!   [`Outputs`] per sequence. [`CpuEngine`] is the one without a GPU.
//! - A [`Batcher`] decides which entries share a batch: by tokens, across requests, without a wait timer.
//! - An [`EncoderService`] joins them: tokenizer threads, one thread that owns the engine, and an [`EncoderHandle`]
//!   whose futures need no runtime.
//!
//! The crate knows no network, no database and no metrics library: an [`Observer`] is told what happened.

mod batch;
mod batcher;
mod config;
mod cpu;
mod encoder;
mod engine;
mod error;
mod folder;
mod model;
mod observer;
mod priority;
mod sentence_transformers;
mod service;
mod tensors;
mod tokenize;
mod weights;

pub use batch::{Batch, Outputs};
pub use batcher::{BatchLimits, Batcher, Entry, Popped, Refusal};
pub use config::{Family, ModelConfig, ProblemType};
pub use cpu::{CpuEngine, CpuOptions};
pub use encoder::{Encoder, Pooling, Task};
pub use engine::{Engine, EngineError, EngineInfo, FailureClass};
pub use error::LoadError;
pub use model::{Model, OpenOptions};
pub use observer::{BatchReport, Observer, Outcome, Timings, Unobserved};
pub use service::{
    EncodeError, EncodeFuture, Encoded, EncoderHandle, EncoderService, ServiceHealth, ServiceOptions,
    StartError,
};
pub use tokenize::{EncodeInput, TextTokenizer, TokenizeError, TokenizedText};
pub use weights::{ClassifierHead, EncoderWeights, LayerNorm, LayerWeights, Linear};
