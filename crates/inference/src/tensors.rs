//! `model.safetensors`: every tensor that the model needs, with the shape that config.json implies, in fp32.

use crate::{
    config::{Family, ModelConfig},
    encoder::Task,
    error::LoadError,
    weights::{ClassifierHead, EncoderWeights, LayerNorm, LayerWeights, Linear},
};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// Reads the weights of `config` for `task` out of the bytes of a safetensors file.
pub(crate) fn read(
    path: &Path,
    bytes: &[u8],
    config: &ModelConfig,
    task: Task,
) -> Result<EncoderWeights, LoadError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| LoadError::Safetensors { path: path.to_owned(), detail: error.to_string() })?;
    let family = match config.family {
        Family::Bert => "bert.",
        Family::Roberta => "roberta.",
    };
    // A bare encoder has no prefix; one saved with a head has its family's.
    let prefixed = format!("{family}embeddings.word_embeddings.weight");
    let prefix = if file.names().contains(&prefixed.as_str()) { family } else { "" };
    Reader { path, file, prefix }.all(config, task)
}

struct Reader<'a> {
    path: &'a Path,
    file: SafeTensors<'a>,
    prefix: &'a str,
}

impl Reader<'_> {
    fn all(&self, config: &ModelConfig, task: Task) -> Result<EncoderWeights, LoadError> {
        let hidden = config.hidden_size;
        let table = |name: &str, rows| self.encoder(&format!("embeddings.{name}.weight"), &[rows, hidden]);
        Ok(EncoderWeights {
            word_embeddings: table("word_embeddings", config.vocab_size)?,
            position_embeddings: table("position_embeddings", config.max_position_embeddings)?,
            token_type_embeddings: table("token_type_embeddings", config.type_vocab_size)?,
            embedding_norm: self.norm("embeddings.LayerNorm", hidden)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| self.layer(index, config))
                .collect::<Result<_, _>>()?,
            head: match task {
                Task::Embed => None,
                Task::Rerank | Task::Classify => Some(self.head(config)?),
            },
        })
    }

    fn layer(&self, index: usize, config: &ModelConfig) -> Result<LayerWeights, LoadError> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let at = |part: &str| format!("encoder.layer.{index}.{part}");
        let mut qkv =
            Linear { out_features: 3 * hidden, in_features: hidden, weight: Vec::new(), bias: Vec::new() };
        for part in ["query", "key", "value"] {
            let third = self.linear(&at(&format!("attention.self.{part}")), hidden, hidden)?;
            qkv.weight.extend(third.weight);
            qkv.bias.extend(third.bias);
        }
        Ok(LayerWeights {
            qkv,
            attention_output: self.linear(&at("attention.output.dense"), hidden, hidden)?,
            attention_norm: self.norm(&at("attention.output.LayerNorm"), hidden)?,
            intermediate: self.linear(&at("intermediate.dense"), intermediate, hidden)?,
            output: self.linear(&at("output.dense"), hidden, intermediate)?,
            output_norm: self.norm(&at("output.LayerNorm"), hidden)?,
        })
    }

    fn head(&self, config: &ModelConfig) -> Result<ClassifierHead, LoadError> {
        let (hidden, labels) = (config.hidden_size, config.labels.len());
        let outer = |name: &str, rows| self.linear_named(name, rows, hidden);
        Ok(match config.family {
            Family::Bert => ClassifierHead {
                dense: self.linear("pooler.dense", hidden, hidden)?,
                classifier: outer("classifier", labels)?,
            },
            Family::Roberta => ClassifierHead {
                dense: outer("classifier.dense", hidden)?,
                classifier: outer("classifier.out_proj", labels)?,
            },
        })
    }

    fn linear(&self, name: &str, rows: usize, columns: usize) -> Result<Linear, LoadError> {
        self.linear_named(&format!("{}{name}", self.prefix), rows, columns)
    }

    fn linear_named(&self, name: &str, rows: usize, columns: usize) -> Result<Linear, LoadError> {
        Ok(Linear {
            out_features: rows,
            in_features: columns,
            weight: self.tensor(&format!("{name}.weight"), &[rows, columns])?,
            bias: self.tensor(&format!("{name}.bias"), &[rows])?,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<LayerNorm, LoadError> {
        // Checkpoints converted from TensorFlow call them gamma and beta.
        let old = format!("{}{name}.gamma", self.prefix);
        let (gamma, beta) =
            if self.file.names().contains(&old.as_str()) { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(LayerNorm {
            gamma: self.encoder(&format!("{name}.{gamma}"), &[width])?,
            beta: self.encoder(&format!("{name}.{beta}"), &[width])?,
        })
    }

    fn encoder(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        self.tensor(&format!("{}{name}", self.prefix), shape)
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let Ok(view) = self.file.tensor(name) else {
            return Err(LoadError::MissingTensor { path: self.path.to_owned(), name: name.to_owned() });
        };
        if view.shape() != shape {
            return Err(LoadError::Shape {
                path: self.path.to_owned(),
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: view.shape().to_vec(),
            });
        }
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::F16 => {
                data.as_chunks().0.iter().map(|bytes| f16_to_f32(u16::from_le_bytes(*bytes))).collect()
            }
            Dtype::BF16 => {
                let wide = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                data.as_chunks().0.iter().map(wide).collect()
            }
            other => {
                return Err(LoadError::Dtype {
                    path: self.path.to_owned(),
                    name: name.to_owned(),
                    found: format!("{other:?}"),
                });
            }
        };
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(position) => {
                Err(LoadError::NotFinite { path: self.path.to_owned(), name: name.to_owned(), position })
            }
        }
    }
}

/// IEEE half precision to single, exactly.
fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let fraction = u32::from(bits) & 0x3ff;
    let magnitude = match exponent {
        // A subnormal half is a normal single: fraction times 2^-24, which is exact.
        0 => return f32::from_bits(sign | (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits()),
        0x1f => 0x7f80_0000 | (fraction << 13),
        _ => ((exponent + 112) << 23) | (fraction << 13),
    };
    f32::from_bits(sign | magnitude)
}

#[cfg(test)]
mod tests {
    use super::f16_to_f32;

    #[test]
    fn halves_become_singles_exactly() {
        for (bits, value) in [
            (0x0000_u16, 0.0_f32),
            (0x8000, -0.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555e-5),
            (0x0400, 6.103_515_6e-5),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_95),
            (0x7bff, 65504.0),
        ] {
            assert_eq!(f16_to_f32(bits).to_bits(), value.to_bits(), "{bits:#06x}");
        }
        assert_eq!(f16_to_f32(0x7c00), f32::INFINITY);
        assert!(f16_to_f32(0x7e00).is_nan());
    }
}
