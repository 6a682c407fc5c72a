//! The thread that owns the engine.

use super::{Entry, ServiceHealth, Shared, finisher, request::EncodeError};
use crate::{
    batch::{Batch, Outputs},
    engine::{Engine, EngineError, FailureClass},
    observer::BatchReport,
};
use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{PoisonError, mpsc::Sender},
    time::{Duration, Instant},
};

/// An engine that does not work now is asked again so often: nobody sends it batches meanwhile.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// A batch that the engine has and whose rows are not collected.
struct Running {
    entries: Vec<Entry>,
    tokens: usize,
    number: u64,
    begun: Instant,
}

struct EngineThread<'a> {
    shared: &'a Shared,
    engine: Box<dyn Engine>,
    results: &'a Sender<finisher::Result>,
    running: VecDeque<Running>,
    batch: Batch,
    batches: u64,
}

pub(super) fn run(
    shared: &Shared,
    mut engine: Box<dyn Engine>,
    results: &Sender<finisher::Result>,
    warm: &Sender<Result<(), EngineError>>,
) {
    let warmed = guarded(|| engine.warm_up());
    let failed = warmed.is_err();
    let _ = warm.send(warmed);
    if failed {
        return;
    }
    let running = VecDeque::new();
    let thread = EngineThread { shared, engine, results, running, batch: Batch::new(), batches: 0 };
    // Engines are guarded call by call; should anything else give way, nobody is left waiting either.
    if catch_unwind(AssertUnwindSafe(|| thread.serve())).is_err() {
        let detail = "its thread panicked".to_owned();
        shared.close(ServiceHealth::Poisoned(EngineError::Poisoned { detail }));
    }
}

/// A panic in an engine leaves it in an unknown state: the process has to end after its jobs went back.
fn guarded<T>(call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        Err(EngineError::Poisoned { detail: format!("it panicked: {text}") })
    })
}

impl EngineThread<'_> {
    fn serve(mut self) {
        let depth = self.engine.pipeline_depth().max(1);
        loop {
            while self.running.len() < depth {
                // Waits only while there is nothing to collect either.
                match self.next_batch() {
                    Next::Batch(entries) => self.submit(entries),
                    Next::Nothing => break,
                    Next::Probe => self.probe(),
                    Next::Closed => return self.finish(),
                }
            }
            self.collect();
        }
    }

    /// Collects what was begun; the queue has been emptied by whoever closed the service.
    fn finish(&mut self) {
        while !self.running.is_empty() {
            self.collect();
        }
    }

    fn next_batch(&mut self) -> Next {
        loop {
            let popped = {
                let mut queue = self.shared.queue();
                loop {
                    if Shared::closed(&queue.health).is_some() {
                        return Next::Closed;
                    }
                    if !queue.batcher.is_empty() {
                        break;
                    }
                    if !self.running.is_empty() {
                        return Next::Nothing;
                    }
                    let changed = &self.shared.queue_changed;
                    if matches!(queue.health, ServiceHealth::Degraded(_)) {
                        let (woken, waited) =
                            changed.wait_timeout(queue, PROBE_EVERY).unwrap_or_else(PoisonError::into_inner);
                        if waited.timed_out() {
                            return Next::Probe;
                        }
                        queue = woken;
                    } else {
                        queue = changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    }
                }
                let popped = queue.batcher.pop(Instant::now(), |sequence| sequence.request.is_over());
                self.shared.tell(&queue);
                popped
            };
            self.fail(popped.expired, &EncodeError::DeadlineExceeded);
            if !popped.batch.is_empty() {
                return Next::Batch(popped.batch);
            }
        }
    }

    fn submit(&mut self, entries: Vec<Entry>) {
        self.batches += 1;
        let begun = Instant::now();
        self.fill(&entries);
        let (engine, batch) = (&mut self.engine, &self.batch);
        let tokens = batch.tokens();
        match guarded(|| engine.submit(batch)) {
            Ok(()) => self.running.push_back(Running { entries, tokens, number: self.batches, begun }),
            Err(error) => self.failed(entries, tokens, begun, error),
        }
    }

    fn fill(&mut self, entries: &[Entry]) {
        self.batch.clear();
        let offset = self.shared.model.encoder().config.position_offset;
        for entry in entries {
            self.batch.push(&entry.payload.text.ids, &entry.payload.text.type_ids, offset);
        }
    }

    fn collect(&mut self) {
        let Some(Running { entries, tokens, number, begun }) = self.running.pop_front() else { return };
        let mut outputs = Outputs::default();
        let engine = &mut self.engine;
        let collected = guarded(|| engine.collect(&mut outputs)).and_then(|()| rows_fit(&outputs, &entries));
        match collected {
            Ok(()) => self.deliver(entries, tokens, number, begun, outputs),
            Err(error) => self.failed(entries, tokens, begun, error),
        }
    }

    fn deliver(&mut self, entries: Vec<Entry>, tokens: usize, number: u64, begun: Instant, outputs: Outputs) {
        let inference = begun.elapsed();
        let sequences = entries.len();
        // Whatever was wrong has passed.
        self.set_health(ServiceHealth::Ready);
        self.shared.observer.batch(&BatchReport { sequences, tokens, inference, succeeded: true });
        let _ = self.results.send(finisher::Result::Rows { entries, outputs, number, begun, inference });
    }

    /// A batch failed: says so to whom it concerns, and finds out whether the engine still works.
    fn failed(&mut self, entries: Vec<Entry>, tokens: usize, begun: Instant, error: EngineError) {
        let report =
            BatchReport { sequences: entries.len(), tokens, inference: begun.elapsed(), succeeded: false };
        self.shared.observer.batch(&report);
        match error.class() {
            FailureClass::Poisoned => return self.poisoned(entries, error),
            FailureClass::Transient => self.fail(entries, &EncodeError::Engine(error)),
            FailureClass::Permanent if entries.len() == 1 => self.fail(entries, &EncodeError::Engine(error)),
            // One bad sequence must not cost its neighbours: find it by halves.
            FailureClass::Permanent => {
                self.finish();
                let mut first = entries;
                let second = first.split_off(first.len() / 2);
                for half in [first, second] {
                    if Shared::closed(&self.shared.queue().health).is_some() {
                        self.fail(half, &EncodeError::ShuttingDown);
                        continue;
                    }
                    self.submit(half);
                    self.finish();
                }
            }
        }
        if !self.running.is_empty() {
            return;
        }
        self.probe();
    }

    /// Finds out whether the engine works.
    fn probe(&mut self) {
        let engine = &mut self.engine;
        match guarded(|| engine.health()) {
            Ok(()) => self.set_health(ServiceHealth::Ready),
            Err(error) if error.class() == FailureClass::Poisoned => self.poisoned(Vec::new(), error),
            Err(error) => self.set_health(ServiceHealth::Degraded(error)),
        }
    }

    fn set_health(&self, health: ServiceHealth) {
        let mut queue = self.shared.queue();
        if Shared::closed(&queue.health).is_none() {
            queue.health = health;
        }
    }

    /// Nothing can work any more: everything that waits fails at once, and so does whatever comes.
    fn poisoned(&mut self, entries: Vec<Entry>, error: EngineError) {
        self.shared.close(ServiceHealth::Poisoned(error.clone()));
        let error = EncodeError::Engine(error);
        self.fail(entries, &error);
        for running in std::mem::take(&mut self.running) {
            self.fail(running.entries, &error);
        }
    }

    fn fail(&self, entries: Vec<Entry>, error: &EncodeError) {
        if !entries.is_empty() {
            let _ = self.results.send(finisher::Result::Failed { entries, error: error.clone() });
        }
    }
}

enum Next {
    Batch(Vec<Entry>),
    Nothing,
    Probe,
    Closed,
}

fn rows_fit(outputs: &Outputs, entries: &[Entry]) -> Result<(), EngineError> {
    let (width, rows) = (outputs.width, entries.len());
    if width > 0 && outputs.values.len() == width * rows {
        return Ok(());
    }
    let detail = format!("{} numbers came for {rows} sequences of {width}", outputs.values.len());
    Err(EngineError::Poisoned { detail })
}
