//! What the engine asks of the GPU's memory, known before anything is taken.

use crate::{
    error::CudaError, forward::workspace_bytes, input::Shape, kernels::KernelShape, options::CudaOptions,
    weights::WeightMap,
};
use ringback_inference::Encoder;

/// Batches under way at once.
pub(crate) const DEPTH: usize = 2;
/// What cublasLt may use beside its operands; NVIDIA's advice for Hopper, plenty for older chips.
pub(crate) const GEMM_WORKSPACE_BYTES: u64 = 32 << 20;
/// For machine code, graphs and what the driver keeps per stream: measured by nobody yet, so generous.
const MARGIN_BYTES: u64 = 96 << 20;

/// The sizes of the engine's blocks of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) weights_bytes: u64,
    pub(crate) workspace_bytes: u64,
    /// Rows of the workspace.
    pub(crate) rows: u32,
    /// Numbers of one batch's input.
    pub(crate) input_words: usize,
    /// Numbers of one batch's output.
    pub(crate) output_floats: usize,
}

impl Plan {
    pub(crate) fn of(encoder: &Encoder, shape: KernelShape, options: &CudaOptions) -> Self {
        let (tokens, sequences) = (options.max_batch_tokens, options.max_batch_sequences);
        let (rows, outputs) = Shape::most_rows(tokens, sequences);
        Self {
            weights_bytes: WeightMap::of(encoder).bytes,
            workspace_bytes: workspace_bytes(shape, rows),
            rows,
            input_words: Shape::most_words(tokens, sequences),
            output_floats: outputs as usize * encoder.output_width(),
        }
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        let batch = 4 * (self.input_words + self.output_floats) as u64;
        self.weights_bytes + self.workspace_bytes + GEMM_WORKSPACE_BYTES + DEPTH as u64 * batch + MARGIN_BYTES
    }
}

/// GPU memory that an engine for this model takes with these options, beside the driver's own context.
///
/// # Errors
/// If the kernels cannot compute the model, or an option is out of range.
pub fn required_bytes(encoder: &Encoder, options: &CudaOptions) -> Result<u64, CudaError> {
    options.check(encoder)?;
    let shape = KernelShape::of(&encoder.config, options.precision)?;
    Ok(Plan::of(encoder, shape, options).total_bytes())
}

/// Admits an engine: it must fit into what is free now and into the operator's limit.
pub(crate) fn admit(required: u64, free: u64, limit: Option<u64>) -> Result<(), CudaError> {
    let (available, limit) = match limit {
        Some(limit) if limit < free => (limit, "memory_limit_bytes"),
        _ => (free, "what is free on the GPU"),
    };
    if required > available {
        return Err(CudaError::OutOfMemory { required, available, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_refused_in_words_before_anything_is_taken() {
        assert!(admit(100, 100, None).is_ok());
        let free = admit(500 << 20, 300 << 20, Some(400 << 20)).expect_err("more than is free").to_string();
        assert!(
            free.contains("500 MiB") && free.contains("300 MiB") && free.contains("free on the GPU"),
            "{free}"
        );
        let limit = admit(500 << 20, 900 << 20, Some(400 << 20)).expect_err("over the limit").to_string();
        assert!(limit.contains("400 MiB") && limit.contains("memory_limit_bytes"), "{limit}");
    }
}
