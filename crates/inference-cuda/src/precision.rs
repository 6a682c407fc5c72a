//! Number formats of the arithmetic. Sums are always fp32.

use crate::error::CudaError;
use half::{bf16, f16};

/// Number format of weights and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 5 bits of exponent, 10 of fraction: cosine to fp32 of 0.999 and better. Numbers end at 65,504.
    #[default]
    Fp16,
    /// 8 bits of exponent, 7 of fraction: the range of fp32, for models whose activations leave that of fp16.
    Bf16,
}

impl Precision {
    /// The name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        }
    }

    /// The bits of a weight.
    ///
    /// # Errors
    /// [`CudaError::Overflow`] if the format cannot hold it.
    pub(crate) fn encode(self, name: &str, value: f32) -> Result<u16, CudaError> {
        let (bits, finite) = match self {
            Self::Fp16 => {
                let number = f16::from_f32(value);
                (number.to_bits(), number.is_finite())
            }
            Self::Bf16 => {
                let number = bf16::from_f32(value);
                (number.to_bits(), number.is_finite())
            }
        };
        if !finite {
            return Err(CudaError::Overflow { tensor: name.to_owned(), value, precision: self.name() });
        }
        Ok(bits)
    }

    /// The value of an encoded number.
    #[cfg(test)]
    pub(crate) fn decode(self, bits: u16) -> f32 {
        match self {
            Self::Fp16 => f16::from_bits(bits).to_f32(),
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = CudaError;

    fn from_str(text: &str) -> Result<Self, CudaError> {
        match text {
            "fp16" => Ok(Self::Fp16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(CudaError::Unsupported {
                field: "precision",
                found: text.to_owned(),
                limit: "it must be \"fp16\" or \"bf16\"",
            }),
        }
    }
}
