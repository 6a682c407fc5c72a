//! The spool's own thread: file writes and syncs never block the runtime, and one sync serves all outcomes
//! that wait for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::{Spool, SpoolError};

/// How long a failed write waits before it is tried again.
const RETRY: Duration = Duration::from_secs(1);

enum Command {
    Append(u64, Vec<u8>),
    Done(u64),
}

#[derive(Debug, Default)]
struct Gauges {
    bytes: AtomicU64,
    depth: AtomicU64,
    failing: AtomicBool,
}

/// Hands outcomes to the spool's thread. The thread ends with this value, after writing what it was given.
#[derive(Debug)]
pub(crate) struct SpoolWriter {
    commands: Option<mpsc::Sender<Command>>,
    gauges: Arc<Gauges>,
    thread: Option<std::thread::JoinHandle<()>>,
    max_bytes: u64,
}

impl SpoolWriter {
    pub(crate) fn start(spool: Spool, max_bytes: u64) -> Result<Self, SpoolError> {
        let gauges = Arc::new(Gauges::default());
        note(&gauges, &spool);
        let (commands, receiver) = mpsc::channel();
        let shared = Arc::clone(&gauges);
        let folder = spool.folder.clone();
        let thread = std::thread::Builder::new()
            .name("spool".to_owned())
            .spawn(move || run(spool, &receiver, &shared))
            .map_err(SpoolError::io(&folder))?;
        Ok(Self { commands: Some(commands), gauges, thread: Some(thread), max_bytes })
    }

    /// Has the outcome written and synced soon.
    pub(crate) fn append(&self, id: u64, payload: Vec<u8>) {
        // Counted at once, so that fetching stops before the disk is full and not after.
        self.gauges.bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
        self.send(Command::Append(id, payload));
    }

    /// The tracker has it.
    pub(crate) fn done(&self, id: u64) {
        self.send(Command::Done(id));
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // The thread ends only after this sender.
            let _ = commands.send(command);
        }
    }

    /// True when no more jobs may be fetched: the spool is full, or the disk refuses writes.
    pub(crate) fn is_full(&self) -> bool {
        self.gauges.bytes.load(Ordering::Relaxed) >= self.max_bytes
            || self.gauges.failing.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.gauges.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn depth(&self) -> u64 {
        self.gauges.depth.load(Ordering::Relaxed)
    }
}

impl Drop for SpoolWriter {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was already reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn note(gauges: &Gauges, spool: &Spool) {
    gauges.bytes.store(spool.bytes(), Ordering::Relaxed);
    gauges.depth.store(spool.depth() as u64, Ordering::Relaxed);
}

fn run(mut spool: Spool, commands: &mpsc::Receiver<Command>, gauges: &Gauges) {
    while let Ok(first) = commands.recv() {
        let mut group = vec![first];
        group.extend(commands.try_iter());
        // What is done before it was written needs no record.
        let done: std::collections::HashSet<u64> = group
            .iter()
            .filter_map(|command| match command {
                Command::Done(id) => Some(*id),
                Command::Append(..) => None,
            })
            .collect();
        group.retain(|command| !matches!(command, Command::Append(id, _) if done.contains(id)));
        for command in group {
            persist(&mut spool, &command, gauges);
        }
        retry(gauges, || spool.sync());
        ringback_service_runtime::fault::point("worker.spool.after");
        note(gauges, &spool);
    }
}

fn persist(spool: &mut Spool, command: &Command, gauges: &Gauges) {
    retry(gauges, || match command {
        Command::Append(id, payload) => spool.append(*id, payload),
        Command::Done(id) => spool.done(*id),
    });
}

/// Tries until it works. Meanwhile no more jobs are fetched; the outcomes also wait in memory and still go
/// to the tracker.
fn retry(gauges: &Gauges, mut write: impl FnMut() -> Result<(), SpoolError>) {
    while let Err(error) = write() {
        gauges.failing.store(true, Ordering::Relaxed);
        tracing::error!(%error, "the spool cannot be written; fetching stops until it can");
        std::thread::sleep(RETRY);
    }
    gauges.failing.store(false, Ordering::Relaxed);
}
