//! A batch as one list of numbers: a single copy brings it to the GPU.

use crate::kernels::{NO_TILE, QUERY_TILE, TILE_BITS};
use ringback_inference::Batch;

/// Most tokens of a batch that is run as a graph.
const SMALL_TOKENS: usize = 512;
/// Most sequences of a batch that is run as a graph.
const SMALL_SEQUENCES: usize = 32;
/// Sizes to which small batches are padded, so that few graphs serve all of them.
const SMALL_STEPS: [u32; 11] = [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512];

/// The size a batch is padded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Rows of all matrices. Rows behind the last token hold token 0 and go nowhere.
    pub(crate) tokens: u32,
    /// Rows of the output. Those behind the last sequence have no tokens and become zeros.
    pub(crate) sequences: u32,
    /// Entries of the attention's list.
    pub(crate) tiles: u32,
    /// Whether it is one of the few shapes that get a graph.
    pub(crate) small: bool,
}

/// Rows of a matrix for that many tokens: a multiple that tensor cores like, and few enough different ones that the
/// choice of an algorithm is made once and kept.
pub(crate) fn padded_tokens(tokens: u32) -> u32 {
    let step = match tokens {
        0..=256 => 16,
        257..=1024 => 64,
        _ => 128,
    };
    tokens.next_multiple_of(step)
}

/// Most entries of the attention's list.
pub(crate) fn most_tiles(tokens: u32, sequences: u32) -> u32 {
    // Each sequence may end in one tile that is not full.
    tokens / QUERY_TILE + sequences
}

impl Shape {
    pub(crate) fn of(batch: &Batch) -> Self {
        let (tokens, sequences) = (small(batch.tokens()), small(batch.sequences()));
        if batch.tokens() <= SMALL_TOKENS && batch.sequences() <= SMALL_SEQUENCES {
            let step = SMALL_STEPS.into_iter().find(|step| *step >= tokens);
            let tokens = step.unwrap_or(tokens);
            let sequences = sequences.next_power_of_two();
            return Self { tokens, sequences, tiles: most_tiles(tokens, sequences), small: true };
        }
        let tiles = batch.ranges().map(|range| small(range.len()).div_ceil(QUERY_TILE)).sum();
        Self { tokens: padded_tokens(tokens), sequences, tiles, small: false }
    }

    /// Position of the sequences' starts among the words; ids come first, then places.
    pub(crate) fn starts_at(self) -> usize {
        2 * self.tokens as usize
    }

    /// Position of the attention's list.
    pub(crate) fn tiles_at(self) -> usize {
        self.starts_at() + self.sequences as usize + 1
    }

    /// Numbers in all.
    pub(crate) fn words(self) -> usize {
        self.tiles_at() + self.tiles as usize
    }

    /// Most numbers that a batch within the limits takes.
    pub(crate) fn most_words(max_tokens: u32, max_sequences: u32) -> usize {
        let small = Self {
            tokens: SMALL_TOKENS as u32,
            sequences: SMALL_SEQUENCES as u32,
            tiles: most_tiles(SMALL_TOKENS as u32, SMALL_SEQUENCES as u32),
            small: true,
        };
        let tokens = padded_tokens(max_tokens);
        let large =
            Self { tokens, sequences: max_sequences, tiles: most_tiles(tokens, max_sequences), small: false };
        large.words().max(small.words())
    }

    /// Most rows of a matrix, and most rows of the output.
    pub(crate) fn most_rows(max_tokens: u32, max_sequences: u32) -> (u32, u32) {
        (padded_tokens(max_tokens).max(SMALL_TOKENS as u32), max_sequences.max(SMALL_SEQUENCES as u32))
    }
}

fn small(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Writes the batch, padded to `shape`, into the first [`Shape::words`] of `words`.
///
/// The batch has been checked against the model and the engine's limits.
pub(crate) fn pack(batch: &Batch, shape: Shape, words: &mut [u32]) {
    let tokens = batch.tokens();
    let (ids, rest) = words.split_at_mut(shape.tokens as usize);
    let (places, rest) = rest.split_at_mut(shape.tokens as usize);
    let (starts, rest) = rest.split_at_mut(shape.sequences as usize + 1);
    let tiles = &mut rest[..shape.tiles as usize];
    ids[..tokens].copy_from_slice(&batch.input_ids);
    ids[tokens..].fill(0);
    for (place, (position, kind)) in
        places.iter_mut().zip(batch.position_ids.iter().zip(&batch.token_type_ids))
    {
        *place = position | kind << 16;
    }
    places[tokens..].fill(0);
    let known = batch.cu_seq_lens.len();
    starts[..known].copy_from_slice(&batch.cu_seq_lens);
    starts[known..].fill(small(tokens));
    let mut next = 0;
    for (text, range) in batch.ranges().enumerate() {
        for tile in 0..small(range.len()).div_ceil(QUERY_TILE) {
            tiles[next] = small(text) << TILE_BITS | tile;
            next += 1;
        }
    }
    tiles[next..].fill(NO_TILE);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lengths: &[usize]) -> Batch {
        let mut batch = Batch::new();
        for (text, length) in lengths.iter().enumerate() {
            let ids: Vec<u32> = (0..*length).map(|n| (text * 1000 + n) as u32).collect();
            batch.push(&ids, &vec![(text % 2) as u32; *length], 2);
        }
        batch
    }

    #[test]
    fn every_batch_fits_the_words_and_rows_that_its_limits_promise() {
        for lengths in [
            vec![1],
            vec![512],
            vec![1; 32],
            vec![1; 33],
            vec![64; 40],
            vec![65; 40],
            vec![513],
            vec![1; 700],
        ] {
            let batch = batch(&lengths);
            let shape = Shape::of(&batch);
            let (tokens, sequences) = (batch.tokens() as u32, batch.sequences() as u32);
            assert!(shape.tokens >= tokens && shape.sequences >= sequences, "{lengths:?} {shape:?}");
            assert!(shape.words() <= Shape::most_words(tokens, sequences), "{lengths:?} {shape:?}");
            let (rows, outputs) = Shape::most_rows(tokens, sequences);
            assert!(shape.tokens <= rows && shape.sequences <= outputs, "{lengths:?} {shape:?}");
            // Does not panic: the list of tiles is long enough.
            pack(&batch, shape, &mut vec![7; shape.words()]);
        }
    }

    #[test]
    fn packing_lists_each_tile_once_and_pads_with_nothing() {
        let batch = batch(&[3, 130, 64]);
        let shape = Shape::of(&batch);
        assert_eq!((shape.tokens, shape.sequences, shape.small), (256, 4, true));
        let mut words = vec![0xdead_beef; shape.words()];
        pack(&batch, shape, &mut words);
        assert_eq!(&words[..5], &[0, 1, 2, 1000, 1001]);
        assert_eq!(words[197..256], [0; 59]);
        assert_eq!(&words[256..261], &[2, 3, 4, 2 | 1 << 16, 3 | 1 << 16]);
        assert_eq!(&words[shape.starts_at()..shape.tiles_at()], &[0, 3, 133, 197, 197]);
        let listed: Vec<(u32, u32)> = words[shape.tiles_at()..]
            .iter()
            .filter(|tile| **tile != NO_TILE)
            .map(|tile| (tile >> TILE_BITS, tile & ((1 << TILE_BITS) - 1)))
            .collect();
        assert_eq!(listed, [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]);
    }

    #[test]
    fn few_shapes_serve_all_small_batches() {
        let mut shapes = std::collections::HashSet::new();
        for tokens in 1..=SMALL_TOKENS {
            for texts in [1, 2, 3, 7, 20, 32] {
                if texts <= tokens {
                    let mut lengths = vec![1; texts];
                    lengths[0] += tokens - texts;
                    shapes.insert(Shape::of(&batch(&lengths)));
                }
            }
        }
        assert!(shapes.len() <= 66, "{}", shapes.len());
    }
}
