//! The kernels: their source, how it is specialised for a model, and how each is launched.

use crate::{error::CudaError, precision::Precision};
use ringback_inference::ModelConfig;

/// The source files, in the order in which they are compiled as one unit.
const FILES: [(&str, &str); 7] = [
    ("rows.cuh", include_str!("../kernels/rows.cuh")),
    ("embedding.cu", include_str!("../kernels/embedding.cu")),
    ("layer_norm.cu", include_str!("../kernels/layer_norm.cu")),
    ("activation.cu", include_str!("../kernels/activation.cu")),
    ("attention.cu", include_str!("../kernels/attention.cu")),
    ("pooling.cu", include_str!("../kernels/pooling.cu")),
    ("classifier.cu", include_str!("../kernels/classifier.cu")),
];

/// Queries per block of the attention kernel.
pub(crate) const QUERY_TILE: u32 = 64;
/// A tile of the attention's list is `text << TILE_BITS | tile`.
pub(crate) const TILE_BITS: u32 = 12;
/// An entry of the list that stands for nothing.
pub(crate) const NO_TILE: u32 = u32::MAX;
/// Rows per block of the kernels that give a row to each warp.
const ROWS_PER_BLOCK: u32 = 8;
/// Take the first row instead of the mean of all.
pub(crate) const POOL_FIRST: u32 = 1;
/// Divide by the length of the vector.
pub(crate) const POOL_NORMALISE: u32 = 2;

/// The kernels with what the emulator or the GPU puts before them.
pub(crate) fn source(platform: (&str, &str)) -> String {
    let mut text = String::new();
    for (name, part) in std::iter::once(platform).chain(FILES) {
        text.push_str(&format!("#line 1 \"{name}\"\n{part}\n"));
    }
    text
}

/// The source that NVRTC compiles.
pub(crate) fn gpu_source() -> String {
    source(("platform.cuh", include_str!("../kernels/platform.cuh")))
}

/// What the kernels are specialised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelShape {
    /// Width of a row.
    pub hidden: u32,
    /// Numbers per attention head.
    pub head_dim: u32,
    /// Width of a row between the two layers of the feed-forward network.
    pub intermediate: u32,
    /// Number format of rows and weights.
    pub precision: Precision,
}

impl KernelShape {
    /// The shape of a model, if the kernels can compute it.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`], naming field and limit.
    pub fn of(config: &ModelConfig, precision: Precision) -> Result<Self, CudaError> {
        let refuse = |field: &'static str, found: usize, limit: &'static str| {
            Err(CudaError::Unsupported { field, found: found.to_string(), limit })
        };
        let hidden = config.hidden_size;
        if hidden == 0 || hidden > 1024 || !hidden.is_multiple_of(64) {
            return refuse("hidden_size", hidden, "it must be a multiple of 64 and at most 1024");
        }
        let heads = config.num_attention_heads;
        let head_dim = hidden.checked_div(heads).unwrap_or(0);
        if ![32, 64].contains(&head_dim) || head_dim * heads != hidden {
            return refuse(
                "num_attention_heads",
                heads,
                "hidden_size / num_attention_heads must be 32 or 64",
            );
        }
        let intermediate = config.intermediate_size;
        if intermediate == 0 || intermediate > 65_536 || !intermediate.is_multiple_of(8) {
            return refuse("intermediate_size", intermediate, "it must be a multiple of 8 and at most 65536");
        }
        let positions = config.max_position_embeddings;
        if positions == 0 || positions > 1 << 16 {
            return refuse("max_position_embeddings", positions, "it must be at most 65536");
        }
        if config.type_vocab_size == 0 || config.type_vocab_size > 1 << 16 {
            return refuse("type_vocab_size", config.type_vocab_size, "it must be 1 to 65536");
        }
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Self {
            hidden: small(hidden),
            head_dim: small(head_dim),
            intermediate: small(intermediate),
            precision,
        })
    }

    /// Attention heads.
    pub(crate) fn heads(self) -> u32 {
        self.hidden / self.head_dim
    }

    /// The macros that specialise the source.
    pub(crate) fn defines(self) -> [String; 4] {
        [
            format!("-DHIDDEN={}", self.hidden),
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DINTERMEDIATE={}", self.intermediate),
            format!("-DPRECISION_BF16={}", u32::from(self.precision == Precision::Bf16)),
        ]
    }
}

/// One kernel of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    EmbedLayerNorm,
    ResidualLayerNorm,
    BiasGelu,
    Attention,
    Pool,
    Classify,
}

impl Kernel {
    pub(crate) const ALL: [Self; 6] = [
        Self::EmbedLayerNorm,
        Self::ResidualLayerNorm,
        Self::BiasGelu,
        Self::Attention,
        Self::Pool,
        Self::Classify,
    ];

    /// Its name in the source.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::EmbedLayerNorm => "embed_layer_norm",
            Self::ResidualLayerNorm => "residual_layer_norm",
            Self::BiasGelu => "bias_gelu",
            Self::Attention => "attention",
            Self::Pool => "pool",
            Self::Classify => "classify",
        }
    }

    /// Threads per block; the source relies on it.
    pub(crate) fn threads(self) -> u32 {
        match self {
            Self::Attention => 128,
            _ => 256,
        }
    }
}

/// Blocks of a kernel that gives a row to each warp.
pub(crate) fn blocks_of_rows(rows: u32) -> u32 {
    rows.div_ceil(ROWS_PER_BLOCK)
}

/// Blocks of the activation, which gives 8 values to each thread.
pub(crate) fn blocks_of_packs(rows: u32, width: u32) -> u32 {
    let packs = u64::from(rows) * u64::from(width / 8);
    u32::try_from(packs.div_ceil(256)).unwrap_or(u32::MAX)
}
