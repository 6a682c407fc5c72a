//! `[endpoints.executor.builtin.encoder]`: a text encoder inside the worker.

use super::problems::Problems;
use super::section::section;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

section! {
    /// A text encoder of the BERT family inside the worker, on a GPU or on the CPU. All jobs of the endpoint share its batches; give the endpoint many `slots` (unset: 256), for a waiting job costs next to nothing. docs/INFERENCE.md shows inputs and outputs.
    EncoderConfig {
        /// Folder with config.json, model.safetensors and tokenizer.json. `make model` fetches all-MiniLM-L6-v2 into .tools/models/.
        model: PathBuf = PathBuf::new(),
        /// "embed" (a vector per text), "rerank" (a score per document of a query) or "classify" (scores of labels).
        task: EncoderTask = EncoderTask::Embed,
        /// sha256 of model.safetensors in hexadecimal; another file is refused. Unset: any.
        sha256: Option<String> = None,
        /// "mean" or "cls", for embeddings. Unset: what the model's folder says, else mean.
        pooling: Option<EncoderPooling> = None,
        /// Whether vectors are scaled to length 1. Unset: what the model's folder says, else true.
        normalize: Option<bool> = None,
        /// Most tokens of one text, special tokens included. Unset: what the model's folder says, else all it has.
        max_seq_len: Option<u32> = None,
        /// Whether longer texts are cut (the output lists them under `truncated`) or refused; an input's own `truncate` goes first.
        truncate: bool = true,
        /// "cpu", "cuda:N" or "auto". Unset: as `worker.device` says.
        device: Option<String> = None,
        /// "fp32" (CPU), "fp16" or "bf16" (GPU). Unset: fp32 on the CPU, fp16 on a GPU.
        precision: Option<EncoderPrecision> = None,
        /// Threads of the CPU engine; 0 means one per core.
        threads: u32 = 0,
        /// Threads that turn texts into tokens; 0 means one per core.
        tokenizer_threads: u32 = 0,
        /// Most tokens of one batch; a GPU's memory is taken for it at the start. Unset: 4096 on the CPU, 16384 on a GPU.
        max_batch_tokens: Option<u32> = None,
        /// Most texts of one batch. Unset: 256 on the CPU, 2048 on a GPU.
        max_batch_sequences: Option<u32> = None,
        /// Most texts of one job.
        max_inputs: u32 = 10_000,
        /// Largest text, in bytes.
        max_input_bytes: u64 = 1024 * 1024,
        /// Most texts of all jobs that wait in front of the engine; jobs beyond wait for room.
        max_queued_inputs: u32 = 65_536,
        /// Most GPU memory that model and batches may take, in bytes. Unset: what is free.
        gpu_memory_limit_bytes: Option<u64> = None,
        /// Folders with libnvrtc and libcublasLt, looked into before the loader's own.
        cuda_library_dirs: Vec<PathBuf> = Vec::new(),
    }
}

/// What an encoder is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderTask {
    /// One vector per text.
    Embed,
    /// One score per document of a query.
    Rerank,
    /// Scores of labels per text.
    Classify,
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPooling {
    /// Their mean.
    Mean,
    /// The first one.
    Cls,
}

/// Number format of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPrecision {
    /// 32 bits, on the CPU.
    Fp32,
    /// 16 bits, on a GPU.
    Fp16,
    /// 16 bits with the range of 32, on a GPU.
    Bf16,
}

impl EncoderPrecision {
    /// Its word in the file.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        }
    }
}

impl EncoderConfig {
    pub(super) fn validate(&self, at: &str, p: &mut Problems) {
        if self.model.as_os_str().is_empty() {
            p.add(
                format!("{at}.model"),
                "is missing; `make model` fetches one into .tools/models/all-MiniLM-L6-v2",
            );
        }
        if self
            .sha256
            .as_deref()
            .is_some_and(|hash| hash.len() != 64 || !hash.chars().all(|c| c.is_ascii_hexdigit()))
        {
            p.add(format!("{at}.sha256"), "must be 64 hexadecimal digits");
        }
        for (key, value) in
            [("max_seq_len", self.max_seq_len), ("max_batch_sequences", self.max_batch_sequences)]
        {
            if let Some(value) = value {
                p.within(&format!("{at}.{key}"), u64::from(value), 1, 65_536);
            }
        }
        if let Some(tokens) = self.max_batch_tokens {
            p.within(&format!("{at}.max_batch_tokens"), u64::from(tokens), 1, 1 << 20);
        }
        p.within(&format!("{at}.threads"), u64::from(self.threads), 0, 1_024);
        p.within(&format!("{at}.tokenizer_threads"), u64::from(self.tokenizer_threads), 0, 1_024);
        p.within(&format!("{at}.max_queued_inputs"), u64::from(self.max_queued_inputs), 1, 1 << 24);
        p.within(
            &format!("{at}.max_inputs"),
            u64::from(self.max_inputs),
            1,
            u64::from(self.max_queued_inputs),
        );
        p.within(&format!("{at}.max_input_bytes"), self.max_input_bytes, 1, 64 * 1024 * 1024);
    }
}
