//! Why the GPU engine does not start. What goes wrong later is an [`EngineError`].

use cudarc::driver::{DriverError, sys::CUresult};
use ringback_inference::EngineError;
use std::path::PathBuf;

/// Why the GPU cannot be used, or not for this model.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library is missing, or there is no GPU.
    #[error("the GPU cannot be used: {}", reasons.join("; "))]
    Unavailable {
        /// Each thing that is missing, and what to do.
        reasons: Vec<String>,
    },
    /// There are fewer GPUs.
    #[error("there is no GPU {ordinal}: this host has {count}")]
    NoSuchDevice {
        /// Number asked for.
        ordinal: usize,
        /// GPUs of this host.
        count: usize,
    },
    /// The kernels need instructions that this GPU lacks.
    #[error("GPU {ordinal} ({name}) has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed")]
    TooOld {
        /// Its number.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Compute capability, major part.
        major: i32,
        /// Minor part.
        minor: i32,
    },
    /// The kernels do not compute a model of this shape.
    #[error("{field} is {found}; {limit}")]
    Unsupported {
        /// The field of the model's or the engine's configuration.
        field: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        limit: &'static str,
    },
    /// A weight is outside of what the number format holds.
    #[error("{tensor} holds {value}, which {precision} cannot hold; use bf16")]
    Overflow {
        /// The weight's name.
        tensor: String,
        /// The number.
        value: f32,
        /// The format.
        precision: &'static str,
    },
    /// Model and workspace do not fit into the GPU's memory.
    #[error(
        "model and workspace need {} MiB of GPU memory, {} MiB may be used ({limit}); lower max_batch_tokens or free the GPU",
        mib(*.required), mib(*.available)
    )]
    OutOfMemory {
        /// Bytes needed.
        required: u64,
        /// Bytes that may be used.
        available: u64,
        /// What sets that limit.
        limit: &'static str,
    },
    /// NVRTC did not compile the kernels.
    #[error("the kernels cannot be compiled for {arch}: {detail}")]
    Compile {
        /// The GPU's architecture.
        arch: String,
        /// What the compiler said.
        detail: String,
    },
    /// The driver refused a call while the engine was made.
    #[error("{call}: the driver says {detail}")]
    Driver {
        /// What was done.
        call: &'static str,
        /// Its code.
        detail: String,
        /// Whether the context is ruined.
        poisoned: bool,
    },
    /// cublasLt refused a call.
    #[error("{call}: cublasLt says {detail}")]
    Cublas {
        /// What was done.
        call: &'static str,
        /// Its code.
        detail: String,
        /// Whether the same call would be refused again.
        lasting: bool,
    },
    /// The folder for compiled kernels cannot be used.
    #[error("the kernel cache {path} cannot be used: {source}")]
    Cache {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

impl CudaError {
    pub(crate) fn driver(call: &'static str, error: DriverError) -> Self {
        Self::Driver { call, detail: format!("{:?}", error.0), poisoned: is_sticky(error.0) }
    }
}

/// What a driver's error means for the engine that runs.
pub(crate) fn engine_error(call: &'static str, error: DriverError) -> EngineError {
    let detail = format!("{call}: the driver says {:?}", error.0);
    if is_sticky(error.0) {
        EngineError::Poisoned { detail }
    } else if is_lasting(error.0) {
        EngineError::Rejected { detail }
    } else {
        EngineError::Transient { detail }
    }
}

impl From<CudaError> for EngineError {
    fn from(error: CudaError) -> Self {
        let detail = error.to_string();
        match error {
            CudaError::Driver { poisoned: true, .. } => Self::Poisoned { detail },
            CudaError::Cublas { lasting: true, .. } => Self::Rejected { detail },
            _ => Self::Transient { detail },
        }
    }
}

/// Whether every later call of this process will fail too. Errors of the hardware and of kernels stay in the context;
/// so does whatever this list does not know, because a worker that restarts is better than one that fails for ever.
/// What leaves the context whole, and would be refused again: handed back, the job would come again for ever.
fn is_lasting(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_INVALID_VALUE
            | CUresult::CUDA_ERROR_NOT_SUPPORTED
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    )
}

fn is_sticky(code: CUresult) -> bool {
    !matches!(
        code,
        CUresult::CUDA_ERROR_OUT_OF_MEMORY
            | CUresult::CUDA_ERROR_INVALID_VALUE
            | CUresult::CUDA_ERROR_NOT_READY
            | CUresult::CUDA_ERROR_NOT_SUPPORTED
            | CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            | CUresult::CUDA_ERROR_OPERATING_SYSTEM
            | CUresult::CUDA_ERROR_NO_DEVICE
            | CUresult::CUDA_ERROR_INVALID_DEVICE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            | CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            | CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED
            | CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
            | CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringback_inference::FailureClass;

    #[test]
    fn errors_that_ruin_the_context_are_told_from_those_that_pass() {
        for (code, class) in [
            (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, FailureClass::Poisoned),
            (CUresult::CUDA_ERROR_LAUNCH_FAILED, FailureClass::Poisoned),
            (CUresult::CUDA_ERROR_ECC_UNCORRECTABLE, FailureClass::Poisoned),
            (CUresult::CUDA_ERROR_UNKNOWN, FailureClass::Poisoned),
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, FailureClass::Transient),
        ] {
            assert_eq!(engine_error("a test", DriverError(code)).class(), class, "{code:?}");
            let made = CudaError::driver("a test", DriverError(code));
            assert_eq!(EngineError::from(made).class(), class, "{code:?}");
        }
    }

    #[test]
    fn what_would_be_refused_again_is_not_tried_again() {
        for code in [CUresult::CUDA_ERROR_INVALID_VALUE, CUresult::CUDA_ERROR_NOT_SUPPORTED] {
            assert_eq!(
                engine_error("a test", DriverError(code)).class(),
                FailureClass::Permanent,
                "{code:?}"
            );
        }
        for (lasting, class) in [(true, FailureClass::Permanent), (false, FailureClass::Transient)] {
            let error = CudaError::Cublas { call: "a test", detail: String::new(), lasting };
            assert_eq!(EngineError::from(error).class(), class);
        }
    }
}
