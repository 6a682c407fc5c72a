//! What is known of a child's jobs and polls.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Instant;

use bytes::Bytes;

use crate::sdk::SdkVersion;

/// Ended jobs whose late messages are still recognised.
const REMEMBERED_ENDED: usize = 1024;

#[derive(Debug)]
pub(super) enum Phase {
    /// Waits for a take.
    Queued(Bytes),
    /// Stands in a reply that the connection has not taken yet.
    Replying(Bytes),
    /// The child has it since this moment.
    Held(Instant),
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) phase: Phase,
    /// Result posts that are being read.
    pub(super) posting: u32,
    /// A take proved the job lost while its result was being read: decide when the read ends.
    pub(super) lost_after_post: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) queue: VecDeque<String>,
    pub(super) jobs: HashMap<String, Job>,
    /// Jobs to stop, and when each was last told.
    pub(super) stops: Vec<(String, Option<Instant>)>,
    pub(super) ended: HashSet<String>,
    pub(super) ended_order: VecDeque<String>,
    /// Open takes: how many jobs each would accept, and when it arrived.
    pub(super) parked: Vec<(u64, usize, Instant)>,
    pub(super) next_park: u64,
    /// The last take that was answered 204, and its size.
    pub(super) last_empty: Option<(Instant, usize)>,
    pub(super) last_job_ended: Option<Instant>,
    pub(super) contacted: bool,
    pub(super) stop_poll_seen: bool,
    pub(super) wrong_key_told: bool,
    pub(super) sdk: Option<SdkVersion>,
    pub(super) draining: bool,
    pub(super) closed: bool,
}

impl State {
    pub(super) fn remember_ended(&mut self, job: &str) {
        if self.ended.insert(job.to_owned()) {
            self.ended_order.push_back(job.to_owned());
        }
        while self.ended_order.len() > REMEMBERED_ENDED {
            if let Some(old) = self.ended_order.pop_front() {
                self.ended.remove(&old);
            }
        }
    }

    pub(super) fn end(&mut self, job: &str) {
        if self.jobs.remove(job).is_some() {
            self.last_job_ended = Some(Instant::now());
        }
        self.stops.retain(|(id, _)| id != job);
        self.remember_ended(job);
    }
}
