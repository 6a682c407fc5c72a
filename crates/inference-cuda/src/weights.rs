//! Where each weight lies in the one block of GPU memory that holds all of them.

use crate::{error::CudaError, precision::Precision};
use ringback_inference::{Encoder, LayerNorm, Linear};

/// Every tensor begins at a multiple of this: what cublasLt's fastest algorithms ask for.
const ALIGNMENT: u64 = 256;

/// A layer norm's parameters in fp32, as offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormAt {
    pub(crate) gamma: u64,
    pub(crate) beta: u64,
}

/// A linear layer: the weight in half precision, the bias in the format of its reader, as offsets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearAt {
    pub(crate) weight: u64,
    pub(crate) bias: u64,
}

/// One layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerAt {
    /// Its bias is in half precision: cublasLt adds it.
    pub(crate) qkv: LinearAt,
    pub(crate) attention_output: LinearAt,
    pub(crate) attention_norm: NormAt,
    pub(crate) intermediate: LinearAt,
    pub(crate) output: LinearAt,
    pub(crate) output_norm: NormAt,
}

/// The head of a classifier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadAt {
    pub(crate) dense: LinearAt,
    pub(crate) classifier: LinearAt,
    pub(crate) labels: u32,
}

/// All weights of a model, as offsets from the beginning of the block.
#[derive(Clone, Debug)]
pub(crate) struct WeightMap {
    pub(crate) word: u64,
    pub(crate) position: u64,
    pub(crate) token_type: u64,
    pub(crate) embedding_norm: NormAt,
    pub(crate) layers: Vec<LayerAt>,
    pub(crate) head: Option<HeadAt>,
    /// Length of the block.
    pub(crate) bytes: u64,
}

/// Takes the tensors in order. The first walk measures, the second writes: one list of tensors for both.
trait Sink {
    fn half(&mut self, name: &str, values: &[f32]) -> Result<u64, CudaError>;
    fn float(&mut self, name: &str, values: &[f32]) -> Result<u64, CudaError>;
}

struct Measure {
    next: u64,
}

impl Measure {
    fn take(&mut self, bytes: usize) -> u64 {
        let at = self.next;
        self.next = (at + bytes as u64).next_multiple_of(ALIGNMENT);
        at
    }
}

impl Sink for Measure {
    fn half(&mut self, _: &str, values: &[f32]) -> Result<u64, CudaError> {
        Ok(self.take(values.len() * 2))
    }

    fn float(&mut self, _: &str, values: &[f32]) -> Result<u64, CudaError> {
        Ok(self.take(values.len() * 4))
    }
}

struct Write<'a, F> {
    measure: Measure,
    precision: Precision,
    bytes: Vec<u8>,
    put: &'a mut F,
}

impl<F: FnMut(u64, &[u8]) -> Result<(), CudaError>> Sink for Write<'_, F> {
    fn half(&mut self, name: &str, values: &[f32]) -> Result<u64, CudaError> {
        self.bytes.clear();
        for value in values {
            self.bytes.extend(self.precision.encode(name, *value)?.to_ne_bytes());
        }
        let at = self.measure.take(self.bytes.len());
        (self.put)(at, &self.bytes)?;
        Ok(at)
    }

    fn float(&mut self, _: &str, values: &[f32]) -> Result<u64, CudaError> {
        self.bytes.clear();
        self.bytes.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
        let at = self.measure.take(self.bytes.len());
        (self.put)(at, &self.bytes)?;
        Ok(at)
    }
}

impl WeightMap {
    /// Where everything goes.
    pub(crate) fn of(encoder: &Encoder) -> Self {
        let mut measure = Measure { next: 0 };
        let mut map = walk(encoder, &mut measure).unwrap_or_else(|error| unreachable!("measuring: {error}"));
        map.bytes = measure.next;
        map
    }

    /// Hands out each tensor in its format, with its offset, in rising order.
    pub(crate) fn write(
        encoder: &Encoder,
        precision: Precision,
        mut put: impl FnMut(u64, &[u8]) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let measure = Measure { next: 0 };
        walk(encoder, &mut Write { measure, precision, bytes: Vec::new(), put: &mut put })?;
        Ok(())
    }
}

fn walk(encoder: &Encoder, sink: &mut impl Sink) -> Result<WeightMap, CudaError> {
    let weights = &encoder.weights;
    let word = sink.half("word_embeddings", &weights.word_embeddings)?;
    let position = sink.half("position_embeddings", &weights.position_embeddings)?;
    let token_type = sink.half("token_type_embeddings", &weights.token_type_embeddings)?;
    let embedding_norm = norm(&weights.embedding_norm, sink)?;
    let mut layers = Vec::with_capacity(weights.layers.len());
    for (number, layer) in weights.layers.iter().enumerate() {
        let name = |part: &str| format!("layer {number} {part}");
        layers.push(LayerAt {
            qkv: LinearAt {
                weight: sink.half(&name("qkv"), &layer.qkv.weight)?,
                bias: sink.half(&name("qkv bias"), &layer.qkv.bias)?,
            },
            attention_output: linear(&name("attention output"), &layer.attention_output, sink)?,
            attention_norm: norm(&layer.attention_norm, sink)?,
            intermediate: linear(&name("intermediate"), &layer.intermediate, sink)?,
            output: linear(&name("output"), &layer.output, sink)?,
            output_norm: norm(&layer.output_norm, sink)?,
        });
    }
    let head = match &weights.head {
        None => None,
        Some(head) => Some(HeadAt {
            dense: linear("head dense", &head.dense, sink)?,
            classifier: linear("head classifier", &head.classifier, sink)?,
            labels: u32::try_from(head.classifier.out_features).unwrap_or(u32::MAX),
        }),
    };
    Ok(WeightMap { word, position, token_type, embedding_norm, layers, head, bytes: 0 })
}

fn linear(name: &str, part: &Linear, sink: &mut impl Sink) -> Result<LinearAt, CudaError> {
    Ok(LinearAt { weight: sink.half(name, &part.weight)?, bias: sink.float(name, &part.bias)? })
}

fn norm(part: &LayerNorm, sink: &mut impl Sink) -> Result<NormAt, CudaError> {
    Ok(NormAt { gamma: sink.float("gamma", &part.gamma)?, beta: sink.float("beta", &part.beta)? })
}
