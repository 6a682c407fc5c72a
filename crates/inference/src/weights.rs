//! The weights on the host, in fp32 and in one layout for all engines.

use crate::config::ModelConfig;

/// `y = x · Wᵀ + b`. `weight` is row-major `[out_features][in_features]`, as PyTorch and safetensors store it.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// `out_features * in_features` numbers.
    pub weight: Vec<f32>,
    /// `out_features` numbers.
    pub bias: Vec<f32>,
}

/// Layer norm over the hidden size, with [`ModelConfig::layer_norm_eps`] beneath the root.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    /// Scale.
    pub gamma: Vec<f32>,
    /// Shift.
    pub beta: Vec<f32>,
}

/// One layer. H is the hidden size, I the intermediate size.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// Query, key and value, in this order, one above the other: `[3H][H]`. Head `h` of each takes the columns
    /// `h * head_size .. (h + 1) * head_size` of its third. The scale `1 / sqrt(head_size)` is not folded in.
    pub qkv: Linear,
    /// `[H][H]`, after the attention.
    pub attention_output: Linear,
    /// Applied to `attention_output + input`.
    pub attention_norm: LayerNorm,
    /// `[I][H]`, followed by GELU in its erf form.
    pub intermediate: Linear,
    /// `[H][I]`.
    pub output: Linear,
    /// Applied to `output + attention`.
    pub output_norm: LayerNorm,
}

/// `classifier(tanh(dense(first token)))`: BERT's pooler and classifier, or RoBERTa's classification head.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierHead {
    /// `[H][H]`, followed by tanh.
    pub dense: Linear,
    /// `[labels][H]`.
    pub classifier: Linear,
}

/// All weights of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderWeights {
    /// `[vocab_size][H]`.
    pub word_embeddings: Vec<f32>,
    /// `[max_position_embeddings][H]`.
    pub position_embeddings: Vec<f32>,
    /// `[type_vocab_size][H]`.
    pub token_type_embeddings: Vec<f32>,
    /// Applied to the sum of the three embeddings.
    pub embedding_norm: LayerNorm,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// For reranking and classifying; none for embeddings.
    pub head: Option<ClassifierHead>,
}

impl EncoderWeights {
    /// Random weights of a plausible size, the same for the same seed. With `labels` there is a head.
    pub fn random(config: &ModelConfig, labels: Option<usize>, seed: u64) -> Self {
        let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let norm = |random: &mut Random| LayerNorm {
            gamma: (0..hidden).map(|_| 1.0 + 0.1 * random.next()).collect(),
            beta: (0..hidden).map(|_| 0.1 * random.next()).collect(),
        };
        let mut weights = Self {
            word_embeddings: random.list(config.vocab_size * hidden, 0.1),
            position_embeddings: random.list(config.max_position_embeddings * hidden, 0.1),
            token_type_embeddings: random.list(config.type_vocab_size * hidden, 0.1),
            embedding_norm: norm(&mut random),
            layers: Vec::with_capacity(config.num_hidden_layers),
            head: None,
        };
        for _ in 0..config.num_hidden_layers {
            weights.layers.push(LayerWeights {
                qkv: random.linear(3 * hidden, hidden),
                attention_output: random.linear(hidden, hidden),
                attention_norm: norm(&mut random),
                intermediate: random.linear(intermediate, hidden),
                output: random.linear(hidden, intermediate),
                output_norm: norm(&mut random),
            });
        }
        weights.head = labels.map(|labels| ClassifierHead {
            dense: random.linear(hidden, hidden),
            classifier: random.linear(labels, hidden),
        });
        weights
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        let linear = |part: &Linear| part.weight.len() + part.bias.len();
        let norm = |part: &LayerNorm| part.gamma.len() + part.beta.len();
        let layers: usize = self
            .layers
            .iter()
            .map(|layer| {
                linear(&layer.qkv)
                    + linear(&layer.attention_output)
                    + norm(&layer.attention_norm)
                    + linear(&layer.intermediate)
                    + linear(&layer.output)
                    + norm(&layer.output_norm)
            })
            .sum();
        let head = self.head.as_ref().map_or(0, |head| linear(&head.dense) + linear(&head.classifier));
        self.word_embeddings.len()
            + self.position_embeddings.len()
            + self.token_type_embeddings.len()
            + norm(&self.embedding_norm)
            + layers
            + head
    }
}

/// A small generator (splitmix64): the crate needs no quality here, only the same numbers everywhere.
struct Random(u64);

impl Random {
    /// Uniform in -1..1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        let unit = (bits >> 40) as f32 / (1_u32 << 24) as f32;
        2.0 * unit - 1.0
    }

    fn list(&mut self, length: usize, scale: f32) -> Vec<f32> {
        (0..length).map(|_| scale * self.next()).collect()
    }

    fn linear(&mut self, out_features: usize, in_features: usize) -> Linear {
        // Keeps the variance of the input, so that deep models neither vanish nor overflow.
        let scale = (3.0 / in_features as f32).sqrt();
        Linear {
            out_features,
            in_features,
            weight: self.list(out_features * in_features, scale),
            bias: self.list(out_features, 0.1),
        }
    }
}
