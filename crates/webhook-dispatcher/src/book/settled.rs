//! What a partition has lately done with. It answers the announcement that comes late and the row that SQL still
//! shows as pending because its outcome is on the way.

use std::collections::HashMap;

use super::ChainKey;

/// Chains remembered per generation; two generations are kept, so between one and two times as many.
const GENERATION: usize = 16_384;
/// What is known about the ended deliveries of a chain.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Settled {
    /// The highest number that has ended.
    highest: u32,
    /// Bit n: whether the number `highest - n` has ended.
    ended: u64,
    /// The highest number of an end of the job.
    last_terminal: u32,
    /// The receiver said that the target is gone.
    pub(crate) gone: bool,
}

impl Settled {
    /// Whether this very delivery has ended.
    pub(crate) fn has(&self, seq: u32) -> bool {
        self.highest.checked_sub(seq).is_some_and(|below| below < u64::BITS && self.ended >> below & 1 == 1)
    }

    fn set(&mut self, seq: u32) {
        match self.highest.checked_sub(seq) {
            Some(below) if below < u64::BITS => self.ended |= 1 << below,
            Some(_) => {}
            None => {
                self.ended = self.ended.checked_shl(seq - self.highest).unwrap_or(0) | 1;
                self.highest = seq;
            }
        }
    }

    fn clear(&mut self, seq: u32) {
        if let Some(below) = self.highest.checked_sub(seq).filter(|below| *below < u64::BITS) {
            self.ended &= !(1 << below);
        }
    }

    /// Whether an end of the job that comes after this number has been told.
    pub(crate) fn told_end_after(&self, seq: u32) -> bool {
        self.last_terminal > seq
    }
}

/// A bounded memory of chains, the latest ones.
#[derive(Debug, Default)]
pub(crate) struct SettledMemory {
    young: HashMap<ChainKey, Settled>,
    old: HashMap<ChainKey, Settled>,
    /// Which replay of a delivery has ended, for the few that were replayed.
    replayed: HashMap<(ChainKey, u32), u32>,
    replayed_old: HashMap<(ChainKey, u32), u32>,
}

impl SettledMemory {
    pub(crate) fn get(&self, key: &ChainKey) -> Option<&Settled> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Whether this life of a delivery has ended.
    pub(crate) fn has(&self, key: &ChainKey, seq: u32, replays: u32) -> bool {
        if replays == 0 {
            return self.get(key).is_some_and(|settled| settled.has(seq));
        }
        let life = (*key, seq);
        let ended = self.replayed.get(&life).or_else(|| self.replayed_old.get(&life));
        ended.is_some_and(|ended| *ended >= replays)
    }

    pub(crate) fn note(&mut self, key: ChainKey, seq: u32, terminal: bool, replays: u32) {
        if replays > 0 {
            if self.replayed.len() >= GENERATION {
                self.replayed_old = std::mem::take(&mut self.replayed);
            }
            let ended = self.replayed.entry((key, seq)).or_default();
            *ended = replays.max(*ended);
        }
        let settled = self.entry(key);
        settled.set(seq);
        if terminal {
            settled.last_terminal = settled.last_terminal.max(seq);
        }
    }

    /// This life of a delivery has not ended after all.
    pub(crate) fn forget(&mut self, key: &ChainKey, seq: u32, replays: u32) {
        if replays > 0 {
            self.replayed.remove(&(*key, seq));
            self.replayed_old.remove(&(*key, seq));
        }
        for memory in [&mut self.young, &mut self.old] {
            if let Some(settled) = memory.get_mut(key) {
                settled.clear(seq);
            }
        }
    }

    pub(crate) fn note_gone(&mut self, key: ChainKey) {
        self.entry(key).gone = true;
    }

    fn entry(&mut self, key: ChainKey) -> &mut Settled {
        if self.young.len() >= GENERATION && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        let before = self.old.get(&key).copied().unwrap_or_default();
        self.young.entry(key).or_insert(before)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn key(n: u128) -> ChainKey {
        ChainKey { owner: Uuid::from_u128(n), target: 0 }
    }

    #[test]
    fn numbers_are_exact_and_memory_is_bounded() {
        let mut memory = SettledMemory::default();
        memory.note(key(1), 3, true, 0);
        let settled = memory.get(&key(1)).unwrap();
        assert!(settled.has(3) && !settled.has(2));
        assert!(settled.told_end_after(2) && !settled.told_end_after(3));
        for n in 2..100_000 {
            memory.note(key(n), 1, false, 0);
        }
        assert!(memory.get(&key(1)).is_none());
        assert!(memory.young.len() + memory.old.len() <= 2 * GENERATION);
        assert!(memory.get(&key(99_999)).is_some_and(|s| s.has(1)));
    }

    #[test]
    fn many_numbers_of_one_chain_are_kept_in_any_order() {
        let mut memory = SettledMemory::default();
        for seq in [5, 1, 60, 2, 63] {
            memory.note(key(1), seq, false, 0);
        }
        let settled = memory.get(&key(1)).unwrap();
        let has: Vec<u32> = (0..70).filter(|&seq| settled.has(seq)).collect();
        assert_eq!(has, [1, 2, 5, 60, 63]);
        memory.note(key(1), 1_000, true, 0);
        let settled = memory.get(&key(1)).unwrap();
        assert!(settled.has(1_000) && !settled.has(63));
    }

    #[test]
    fn a_replay_is_another_life() {
        let mut memory = SettledMemory::default();
        memory.note(key(1), 3, true, 0);
        assert!(memory.has(&key(1), 3, 0) && !memory.has(&key(1), 3, 1));
        memory.note(key(1), 3, true, 2);
        assert!(memory.has(&key(1), 3, 1) && memory.has(&key(1), 3, 2) && !memory.has(&key(1), 3, 3));
    }

    #[test]
    fn an_old_chain_keeps_its_numbers_when_it_moves() {
        let mut memory = SettledMemory::default();
        memory.note(key(1), 1, false, 0);
        memory.note_gone(key(1));
        for n in 2..=u128::try_from(GENERATION).unwrap() + 1 {
            memory.note(key(n), 1, false, 0);
        }
        memory.note(key(1), 2, false, 0);
        let settled = memory.get(&key(1)).unwrap();
        assert!(settled.has(1) && settled.has(2) && settled.gone);
    }
}
