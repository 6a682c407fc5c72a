//! What the operator chooses.

use crate::{error::CudaError, precision::Precision};
use ringback_inference::Encoder;
use std::path::PathBuf;

/// How to run a model on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Number of the GPU.
    pub ordinal: usize,
    /// Number format of weights and activations.
    pub precision: Precision,
    /// Most tokens of one batch; the workspace is made for it.
    pub max_batch_tokens: u32,
    /// Most sequences of one batch.
    pub max_batch_sequences: u32,
    /// Where compiled kernels are kept; without it they are compiled at each start.
    pub kernel_cache_dir: Option<PathBuf>,
    /// Most GPU memory that the engine may take.
    pub memory_limit_bytes: Option<u64>,
    /// Folders with libnvrtc and libcublasLt, looked into before the loader's path.
    pub library_dirs: Vec<PathBuf>,
    /// Whether small batches run as CUDA graphs.
    pub graphs: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            precision: Precision::default(),
            max_batch_tokens: 16_384,
            max_batch_sequences: 2_048,
            kernel_cache_dir: None,
            memory_limit_bytes: None,
            library_dirs: Vec::new(),
            graphs: true,
        }
    }
}

impl CudaOptions {
    /// Checks the numbers for this model.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`], naming the option and its limit.
    pub fn check(&self, encoder: &Encoder) -> Result<(), CudaError> {
        if !(1..=1 << 20).contains(&self.max_batch_tokens) {
            let found = self.max_batch_tokens.to_string();
            return Err(CudaError::Unsupported {
                field: "max_batch_tokens",
                found,
                limit: "it must be 1 to 1048576",
            });
        }
        if !(1..=1 << 16).contains(&self.max_batch_sequences) {
            let found = self.max_batch_sequences.to_string();
            return Err(CudaError::Unsupported {
                field: "max_batch_sequences",
                found,
                limit: "it must be 1 to 65536",
            });
        }
        if (self.max_batch_tokens as usize) < encoder.max_seq_len {
            let found = self.max_batch_tokens.to_string();
            return Err(CudaError::Unsupported {
                field: "max_batch_tokens",
                found,
                limit: "it must hold one sequence of the model's max_seq_len",
            });
        }
        Ok(())
    }
}
