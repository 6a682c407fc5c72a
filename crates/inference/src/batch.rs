//! What goes into an engine and what comes out.

/// Token sequences laid out end to end, without padding ("varlen"). Sequence `i` is
/// `cu_seq_lens[i]..cu_seq_lens[i + 1]` of the three flat lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, each below [`crate::ModelConfig::vocab_size`].
    pub input_ids: Vec<u32>,
    /// Segment of each token: 0, or 1 for the second text of a pair. Below [`crate::ModelConfig::type_vocab_size`].
    pub token_type_ids: Vec<u32>,
    /// Row of the position table for each token: counted from [`crate::ModelConfig::position_offset`] in each sequence.
    pub position_ids: Vec<u32>,
    /// Sequences + 1 offsets, the first 0, the last the number of tokens, strictly rising.
    pub cu_seq_lens: Vec<u32>,
    /// Tokens of the longest sequence.
    pub max_seq_len: u32,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self { cu_seq_lens: vec![0], ..Self::default() }
    }

    /// Appends one sequence. `type_ids` is as long as `ids`; positions count from `position_offset`.
    ///
    /// # Panics
    /// If the lists differ in length or are empty: a sequence has at least one token. If the batch would have 2^32 tokens:
    /// [`crate::Batcher`] stops at `max_batch_tokens`, far below.
    pub fn push(&mut self, ids: &[u32], type_ids: &[u32], position_offset: u32) {
        assert!(!ids.is_empty() && ids.len() == type_ids.len(), "a sequence has one segment per token");
        let tokens = u32::try_from(ids.len()).expect("a sequence is shorter than 2^32 tokens");
        if self.cu_seq_lens.is_empty() {
            self.cu_seq_lens.push(0);
        }
        self.input_ids.extend_from_slice(ids);
        self.token_type_ids.extend_from_slice(type_ids);
        self.position_ids.extend(position_offset..position_offset + tokens);
        self.cu_seq_lens
            .push(u32::try_from(self.input_ids.len()).expect("a batch is shorter than 2^32 tokens"));
        self.max_seq_len = self.max_seq_len.max(tokens);
    }

    /// Forgets all sequences and keeps the memory.
    pub fn clear(&mut self) {
        self.input_ids.clear();
        self.token_type_ids.clear();
        self.position_ids.clear();
        self.cu_seq_lens.clear();
        self.cu_seq_lens.push(0);
        self.max_seq_len = 0;
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.cu_seq_lens.len().saturating_sub(1)
    }

    /// Start and end of each sequence in the flat lists.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = std::ops::Range<usize>> + '_ {
        self.cu_seq_lens.windows(2).map(|pair| pair[0] as usize..pair[1] as usize)
    }
}

/// One row per sequence of a batch, in its order: the pooled (and, where the model says so, L2-normalised) embedding,
/// or the raw logits of the classifier.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// Numbers per row: [`crate::Encoder::output_width`].
    pub width: usize,
    /// Rows end to end.
    pub values: Vec<f32>,
}

impl Outputs {
    /// The rows, in the order of the sequences.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.width.max(1))
    }
}
