//! CUDA graphs of small batches: all of a batch's copies, kernels and products started by one call.

use crate::input::Shape;
use std::collections::HashMap;

/// What a graph was recorded for: its addresses are those of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GraphKey {
    pub(crate) slot: usize,
    pub(crate) shape: Shape,
}

/// What is known of a shape.
enum Entry<G> {
    /// Run once without a graph: algorithms are chosen and code is loaded, neither of which may happen in a recording.
    Seen,
    Recorded(G),
}

/// What to do with a batch.
pub(crate) enum Choice<'a, G> {
    /// Run it step by step.
    Direct,
    /// Record it, hand the graph to [`Graphs::insert`], and launch that.
    Record,
    /// Launch this.
    Launch(&'a G),
}

/// Graphs by shape; the one that was used longest ago gives way.
pub(crate) struct Graphs<G> {
    most: usize,
    clock: u64,
    entries: HashMap<GraphKey, (u64, Entry<G>)>,
}

impl<G> Graphs<G> {
    /// Keeps at most `most` entries; none for 0.
    pub(crate) fn new(most: usize) -> Self {
        Self { most, clock: 0, entries: HashMap::new() }
    }

    /// What to do with a batch of this shape: the first is run step by step, the second recorded.
    pub(crate) fn choose(&mut self, key: GraphKey) -> Choice<'_, G> {
        if self.most == 0 || !key.shape.small {
            return Choice::Direct;
        }
        self.clock += 1;
        if !self.entries.contains_key(&key) {
            self.make_room();
            self.entries.insert(key, (self.clock, Entry::Seen));
            return Choice::Direct;
        }
        match self.entries.get_mut(&key) {
            Some((used, Entry::Recorded(graph))) => {
                *used = self.clock;
                Choice::Launch(graph)
            }
            _ => Choice::Record,
        }
    }

    /// Keeps a graph.
    pub(crate) fn insert(&mut self, key: GraphKey, graph: G) {
        if !self.entries.contains_key(&key) {
            self.make_room();
        }
        self.entries.insert(key, (self.clock, Entry::Recorded(graph)));
    }

    /// Gives up graphs for good: recording does not work on this driver.
    pub(crate) fn disable(&mut self) {
        self.most = 0;
        self.entries.clear();
    }

    fn make_room(&mut self) {
        if self.entries.len() < self.most {
            return;
        }
        let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
        if let Some(key) = oldest {
            self.entries.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tokens: u32, slot: usize) -> GraphKey {
        GraphKey { slot, shape: Shape { tokens, sequences: 1, tiles: 1, small: true } }
    }

    fn told<G>(choice: &Choice<'_, G>) -> &'static str {
        match choice {
            Choice::Direct => "direct",
            Choice::Record => "record",
            Choice::Launch(_) => "launch",
        }
    }

    #[test]
    fn a_shape_is_run_then_recorded_then_launched_and_the_oldest_gives_way() {
        let mut graphs = Graphs::new(2);
        assert_eq!(told(&graphs.choose(key(16, 0))), "direct");
        assert_eq!(told(&graphs.choose(key(16, 0))), "record");
        graphs.insert(key(16, 0), 'a');
        assert_eq!(told(&graphs.choose(key(16, 0))), "launch");
        assert_eq!(told(&graphs.choose(key(16, 1))), "direct", "another slot has other addresses");
        assert_eq!(told(&graphs.choose(key(16, 0))), "launch");
        assert_eq!(told(&graphs.choose(key(32, 0))), "direct");
        assert_eq!(told(&graphs.choose(key(16, 0))), "launch", "the one in use stays");
        assert_eq!(told(&graphs.choose(key(16, 1))), "direct", "the oldest went");
        graphs.disable();
        assert_eq!(told(&graphs.choose(key(16, 0))), "direct");
        assert_eq!(told(&graphs.choose(key(16, 0))), "direct");
    }

    #[test]
    fn large_batches_get_no_graph() {
        let mut graphs = Graphs::<char>::new(2);
        let large =
            GraphKey { slot: 0, shape: Shape { tokens: 4096, sequences: 32, tiles: 64, small: false } };
        for _ in 0..3 {
            assert_eq!(told(&graphs.choose(large)), "direct");
        }
    }
}
