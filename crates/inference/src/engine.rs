//! The trait between batching and arithmetic.

use crate::batch::{Batch, Outputs};

/// What a failed call means for those who wait and for the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// This batch can never work; another one may.
    Permanent,
    /// The same batch may work later.
    Transient,
    /// The engine is ruined for the whole process: it has to end after its jobs went back.
    Poisoned,
}

/// Why an engine did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum EngineError {
    /// The batch itself is wrong (an id out of range, more tokens than the workspace holds).
    #[error("the batch was refused: {detail}")]
    Rejected {
        /// Field and limit.
        detail: String,
    },
    /// The numbers came out infinite or undefined for at least one sequence.
    #[error("the result of sequence {sequence} is not finite")]
    NotFinite {
        /// Index in the batch.
        sequence: usize,
    },
    /// Something passing, such as memory held by another process.
    #[error("the engine failed for now: {detail}")]
    Transient {
        /// What happened.
        detail: String,
    },
    /// The device or its context is ruined (a sticky error): no further call can succeed in this process.
    #[error("the engine is ruined: {detail}")]
    Poisoned {
        /// What happened.
        detail: String,
    },
}

impl EngineError {
    /// What the failure means.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::Rejected { .. } | Self::NotFinite { .. } => FailureClass::Permanent,
            Self::Transient { .. } => FailureClass::Transient,
            Self::Poisoned { .. } => FailureClass::Poisoned,
        }
    }
}

/// What an engine is and how much it takes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// `cpu` or `cuda`.
    pub kind: &'static str,
    /// The device in words, for logs and lists: processor or GPU, and what of it is used.
    pub device: String,
    /// Number format of the arithmetic: `fp32`, `fp16` or `bf16`.
    pub precision: &'static str,
    /// Most tokens of one batch.
    pub max_batch_tokens: usize,
    /// Most sequences of one batch.
    pub max_batch_sequences: usize,
    /// Most tokens of one sequence.
    pub max_seq_len: usize,
    /// Numbers per row of the outputs.
    pub output_width: usize,
}

/// Runs batches. Owned by one thread, which need not be the one that made it.
///
/// Batches are submitted and collected in the same order, at most [`Engine::pipeline_depth`] submitted and not yet
/// collected. An engine on a device starts the copy and the work in `submit` and waits in `collect`, so that the next
/// batch is made ready while this one runs; an engine on the CPU does all in `collect`.
pub trait Engine: Send {
    /// What this engine is.
    fn info(&self) -> &EngineInfo;

    /// Runs the largest allowed batch, so that want of memory shows at the start and not in service.
    ///
    /// # Errors
    /// If that batch does not run.
    fn warm_up(&mut self) -> Result<(), EngineError>;

    /// How many batches may be submitted before the first is collected; at least 1.
    fn pipeline_depth(&self) -> usize {
        1
    }

    /// Takes a batch. It is not kept: the caller may change it afterwards.
    ///
    /// # Errors
    /// If the batch is refused or could not be started; nothing is to be collected for it then.
    fn submit(&mut self, batch: &Batch) -> Result<(), EngineError>;

    /// Waits for the oldest submitted batch and writes its rows. After an error that batch is gone; later ones stay
    /// unless the error is [`FailureClass::Poisoned`].
    ///
    /// # Errors
    /// If the batch failed, or none was submitted.
    fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError>;

    /// Finds out whether the engine still works, by a short batch of its own or a question to the device. Called while
    /// nothing is submitted.
    ///
    /// # Errors
    /// If it does not.
    fn health(&mut self) -> Result<(), EngineError>;
}
