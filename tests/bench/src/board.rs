//! What happened to each job: one slot per job, written without locks by generator and receiver.
//!
//! A job carries its slot number `n` in its input, so that a webhook finds its slot without a map. The id that the
//! server gave at submit and the id in the webhook are both kept and compared once all is over: a webhook may come
//! before the answer to the submit.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tokio::sync::Semaphore;
use uuid::Uuid;

const SEGMENT_SLOTS: usize = 1 << 16;
const SEGMENTS: usize = 4096;

/// One job. Times are nanoseconds since the start of the board; 0 means never.
#[derive(Default)]
pub struct Slot {
    sent_ns: AtomicU64,
    written_ns: AtomicU64,
    answered_ns: AtomicU64,
    arrived_ns: AtomicU64,
    arrivals: AtomicU32,
    submitted: [AtomicU64; 2],
    delivered: [AtomicU64; 2],
}

/// A slot read back.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// When the job was due to be sent (open loop) or was sent (closed loop).
    pub sent_ns: u64,
    /// When its bytes were handed to the connection.
    pub written_ns: u64,
    /// When the submit was answered 200. 0: refused, or its fate is unknown.
    pub answered_ns: u64,
    /// When its webhook came for the first time.
    pub arrived_ns: u64,
    /// How often its webhook came.
    pub arrivals: u32,
    /// The id in the answer.
    pub submitted: Uuid,
    /// The id in the webhook.
    pub delivered: Uuid,
}

/// All jobs of one bench process, over all phases.
pub struct Board {
    epoch: Instant,
    segments: Box<[OnceLock<Box<[Slot]>>]>,
    next: AtomicU64,
    received: AtomicU64,
    /// One permit per job that may still be sent: the backlog cap of the closed loop.
    pub backlog: Semaphore,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            segments: (0..SEGMENTS).map(|_| OnceLock::new()).collect(),
            next: AtomicU64::new(0),
            received: AtomicU64::new(0),
            backlog: Semaphore::new(0),
        }
    }
}

impl Board {
    /// Nanoseconds since the board was made, never 0.
    pub fn now_ns(&self) -> u64 {
        self.at_ns(Instant::now())
    }

    /// The same for an instant.
    pub fn at_ns(&self, instant: Instant) -> u64 {
        let ns = instant.saturating_duration_since(self.epoch).as_nanos();
        u64::try_from(ns).unwrap_or(u64::MAX).max(1)
    }

    /// Takes the next slot number.
    pub fn open(&self) -> u64 {
        let n = self.next.fetch_add(1, Relaxed);
        if let Some(segment) = self.segments.get(n as usize / SEGMENT_SLOTS) {
            segment.get_or_init(|| (0..SEGMENT_SLOTS).map(|_| Slot::default()).collect());
        }
        n
    }

    /// The number that the next job will get: the border between two phases.
    pub fn border(&self) -> u64 {
        self.next.load(Relaxed)
    }

    /// Webhooks that came for the first time, over all phases.
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    fn slot(&self, n: u64) -> Option<&Slot> {
        let n = usize::try_from(n).ok()?;
        self.segments.get(n / SEGMENT_SLOTS)?.get()?.get(n % SEGMENT_SLOTS)
    }

    /// Notes that the job is due and is now being written.
    pub fn sent(&self, n: u64, due_ns: u64, written_ns: u64) {
        if let Some(slot) = self.slot(n) {
            slot.sent_ns.store(due_ns, Relaxed);
            slot.written_ns.store(written_ns, Relaxed);
        }
    }

    /// Notes the 200 and the id in it.
    pub fn answered(&self, n: u64, id: Uuid) {
        if let Some(slot) = self.slot(n) {
            let (hi, lo) = id.as_u64_pair();
            slot.submitted[0].store(hi, Relaxed);
            slot.submitted[1].store(lo, Relaxed);
            slot.answered_ns.store(self.now_ns(), Relaxed);
        }
    }

    /// Notes a webhook. False if no such job was ever sent.
    pub fn arrived(&self, n: u64, id: Uuid, at_ns: u64) -> bool {
        let Some(slot) = self.slot(n).filter(|_| n < self.border()) else { return false };
        if slot.arrivals.fetch_add(1, Relaxed) == 0 {
            let (hi, lo) = id.as_u64_pair();
            slot.delivered[0].store(hi, Relaxed);
            slot.delivered[1].store(lo, Relaxed);
            slot.arrived_ns.store(at_ns, Relaxed);
            self.received.fetch_add(1, Relaxed);
            self.backlog.add_permits(1);
        }
        true
    }

    /// The jobs of a phase, by slot number.
    pub fn jobs(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = (u64, Job)> {
        range.filter_map(|n| {
            let slot = self.slot(n)?;
            let id =
                |pair: &[AtomicU64; 2]| Uuid::from_u64_pair(pair[0].load(Relaxed), pair[1].load(Relaxed));
            Some((
                n,
                Job {
                    sent_ns: slot.sent_ns.load(Relaxed),
                    written_ns: slot.written_ns.load(Relaxed),
                    answered_ns: slot.answered_ns.load(Relaxed),
                    arrived_ns: slot.arrived_ns.load(Relaxed),
                    arrivals: slot.arrivals.load(Relaxed),
                    submitted: id(&slot.submitted),
                    delivered: id(&slot.delivered),
                },
            ))
        })
    }

    /// Accepted jobs of a phase whose webhook has not come yet.
    pub fn missing(&self, range: std::ops::Range<u64>) -> u64 {
        self.jobs(range).filter(|(_, job)| job.answered_ns != 0 && job.arrivals == 0).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_arrival_is_counted_and_frees_no_second_place() {
        let board = Board::default();
        let n = board.open();
        let id = Uuid::now_v7();
        board.sent(n, 5, 6);
        assert!(board.arrived(n, id, 9), "a webhook may come before the answer to the submit");
        board.answered(n, id);
        assert!(board.arrived(n, id, 12));
        let (_, job) = board.jobs(0..1).next().unwrap();
        assert_eq!((job.arrivals, job.arrived_ns, job.submitted, job.delivered), (2, 9, id, id));
        assert_eq!((board.backlog.available_permits(), board.received()), (1, 1));
    }

    #[test]
    fn a_webhook_of_a_job_that_was_never_sent_is_a_stray() {
        let board = Board::default();
        assert!(!board.arrived(0, Uuid::now_v7(), 1));
        board.open();
        assert!(!board.arrived(1, Uuid::now_v7(), 1), "same segment, number not given out");
        assert!(!board.arrived(u64::MAX, Uuid::now_v7(), 1));
    }

    #[test]
    fn slots_reach_over_segments() {
        let board = Board::default();
        for _ in 0..SEGMENT_SLOTS + 3 {
            let n = board.open();
            board.sent(n, 1, 1);
            board.answered(n, Uuid::from_u128(u128::from(n) + 1));
        }
        assert_eq!(board.missing(0..board.border()), SEGMENT_SLOTS as u64 + 3);
        board.arrived(SEGMENT_SLOTS as u64, Uuid::nil(), 7);
        assert_eq!(board.missing(0..board.border()), SEGMENT_SLOTS as u64 + 2);
    }
}
