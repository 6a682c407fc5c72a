//! From vectors of tokens to one row per sequence.

use super::gemm::{Finish, Packed, Product};
use crate::{
    batch::{Batch, Outputs},
    encoder::{Encoder, Pooling, Task},
};
use pulp::Arch;

/// The classifier, packed, with the memory it needs.
pub(super) struct Head {
    dense: Packed,
    classifier: Packed,
    first: Vec<f32>,
    pooled: Vec<f32>,
}

impl Head {
    /// None for embeddings.
    pub(super) fn new(encoder: &Encoder, lanes: usize) -> Option<Self> {
        let head = encoder.weights.head.as_ref().filter(|_| encoder.task != Task::Embed)?;
        let pack =
            |part: &crate::weights::Linear| Packed::new(&part.weight, &part.bias, part.in_features, lanes);
        Some(Self {
            dense: pack(&head.dense),
            classifier: pack(&head.classifier),
            first: Vec::new(),
            pooled: Vec::new(),
        })
    }

    /// `classifier(tanh(dense(first token)))` of every sequence.
    pub(super) fn run(&mut self, arch: Arch, batch: &Batch, hidden: &[f32], outputs: &mut Outputs) {
        let width = self.dense.k;
        self.first.clear();
        for range in batch.ranges() {
            self.first.extend_from_slice(&hidden[range.start * width..(range.start + 1) * width]);
        }
        self.pooled.clear();
        self.pooled.resize(self.first.len(), 0.0);
        let (a, c) = (&self.first, &mut self.pooled);
        arch.dispatch(Product { a, weights: &self.dense, c, finish: Finish::Store });
        self.pooled.iter_mut().for_each(|value| *value = value.tanh());
        let labels = self.classifier.n;
        outputs.width = labels;
        outputs.values.clear();
        outputs.values.resize(batch.sequences() * labels, 0.0);
        let (a, c) = (&self.pooled, &mut outputs.values);
        arch.dispatch(Product { a, weights: &self.classifier, c, finish: Finish::Store });
    }
}

/// The embedding of every sequence.
pub(super) fn embed(encoder: &Encoder, batch: &Batch, hidden: &[f32], outputs: &mut Outputs) {
    let width = encoder.config.hidden_size;
    outputs.width = width;
    outputs.values.clear();
    outputs.values.resize(batch.sequences() * width, 0.0);
    for (range, row) in batch.ranges().zip(outputs.values.chunks_exact_mut(width)) {
        match encoder.pooling {
            Pooling::Cls => row.copy_from_slice(&hidden[range.start * width..(range.start + 1) * width]),
            Pooling::Mean => {
                let scale = 1.0 / range.len() as f32;
                for token in hidden[range.start * width..range.end * width].chunks_exact(width) {
                    for (sum, value) in row.iter_mut().zip(token) {
                        *sum += value;
                    }
                }
                row.iter_mut().for_each(|sum| *sum *= scale);
            }
        }
        if encoder.normalize {
            let length = row.iter().map(|value| value * value).sum::<f32>().sqrt();
            // As torch.nn.functional.normalize: a vector of zeros stays one.
            let scale = 1.0 / length.max(1e-12);
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
}
