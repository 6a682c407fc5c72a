//! The service around an engine: shared batches, cancels, deadlines, and engines that fail, panic or are ruined.

mod common;

use common::{small_config, write_model};
use ringback_inference::{
    Batch, BatchReport, CpuEngine, CpuOptions, EncodeError, EncodeInput, Encoder, EncoderService, Engine,
    EngineError, EngineInfo, FailureClass, Family, Model, Observer, OpenOptions, Outcome, Outputs, Refusal,
    ServiceHealth, ServiceOptions, StartError, Task, Timings, Unobserved,
};
use std::{
    collections::VecDeque,
    future::Future,
    pin::pin,
    sync::{Arc, Condvar, Mutex, mpsc},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

/// Long enough for any machine; only a hang takes it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits on this thread: the futures need no runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let (mut future, begun) = (pin!(future), Instant::now());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        assert!(begun.elapsed() < PATIENCE, "nobody answered");
        thread::park_timeout(Duration::from_secs(1));
    }
}

fn model() -> Model {
    let folder = tempfile::tempdir().expect("a folder");
    let encoder = Encoder::random(small_config(Family::Bert, &["LABEL_0"]), Task::Embed, 3);
    write_model(folder.path(), &encoder, "");
    Model::open(folder.path(), Task::Embed, OpenOptions::default()).expect("the model")
}

fn text(text: &str) -> EncodeInput {
    EncodeInput::Text(text.to_owned())
}

/// Something for a batch to do besides giving rows.
type Health = Box<dyn FnMut() -> Result<(), EngineError> + Send>;
type Act = Box<dyn FnMut(&Batch) -> Result<(), EngineError> + Send>;

/// An engine whose rows tell the ids that were in the sequence, and that does `act` first.
struct Scripted {
    info: EngineInfo,
    depth: usize,
    submitted: VecDeque<Batch>,
    act: Act,
    health: Health,
    most_submitted: Arc<Mutex<usize>>,
}

impl Scripted {
    fn new(
        model: &Model,
        depth: usize,
        act: impl FnMut(&Batch) -> Result<(), EngineError> + Send + 'static,
    ) -> Self {
        let info = EngineInfo {
            kind: "cpu",
            device: "a script".to_owned(),
            precision: "fp32",
            max_batch_tokens: 4_096,
            max_batch_sequences: 64,
            max_seq_len: model.encoder().max_seq_len,
            output_width: model.encoder().output_width(),
        };
        Self {
            info,
            depth,
            submitted: VecDeque::new(),
            act: Box::new(act),
            health: Box::new(|| Ok(())),
            most_submitted: Arc::default(),
        }
    }
}

impl Engine for Scripted {
    fn info(&self) -> &EngineInfo {
        &self.info
    }
    fn warm_up(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
    fn pipeline_depth(&self) -> usize {
        self.depth
    }
    fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.submitted.push_back(batch.clone());
        let mut most = self.most_submitted.lock().expect("a count");
        *most = (*most).max(self.submitted.len());
        Ok(())
    }
    fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError> {
        let batch = self.submitted.pop_front().expect("something was submitted");
        (self.act)(&batch)?;
        outputs.width = self.info.output_width;
        for range in batch.ranges() {
            let sum: u32 = batch.input_ids[range].iter().sum();
            outputs.values.extend(std::iter::repeat_n(sum as f32, outputs.width));
        }
        Ok(())
    }
    fn health(&mut self) -> Result<(), EngineError> {
        (self.health)()
    }
}

fn start(model: &Model, engine: impl Engine + 'static, options: ServiceOptions) -> EncoderService {
    EncoderService::start(model.clone(), Box::new(engine), options, Arc::new(Unobserved)).expect("a service")
}

/// An engine that waits at each batch until it is let go, and the gate to let it.
fn gated(model: &Model) -> (Scripted, mpsc::Receiver<usize>, mpsc::Sender<()>) {
    let (begun, begins) = mpsc::channel();
    let (gate, opened) = mpsc::channel();
    let engine = Scripted::new(model, 1, move |batch| {
        let _ = begun.send(batch.sequences());
        let _ = opened.recv_timeout(PATIENCE);
        Ok(())
    });
    (engine, begins, gate)
}

#[test]
fn many_callers_share_batches_and_get_their_own_rows() {
    let model = model();
    let engine = CpuEngine::new(Arc::clone(model.encoder()), CpuOptions::default()).expect("an engine");
    let options = ServiceOptions { max_batch_tokens: 64, tokenizer_threads: 2, ..ServiceOptions::default() };
    let service = start(&model, engine, options);
    let words = ["a man is eating", "dogs bark", "what", "", "the girl carries the baby at night"];
    let alone: Vec<Vec<f32>> = words
        .iter()
        .map(|word| block_on(service.handle().encode(vec![text(word)], None)).expect("a row").values)
        .collect();
    thread::scope(|scope| {
        for caller in 0..8 {
            let (handle, alone) = (service.handle(), &alone);
            scope.spawn(move || {
                for round in 0..20 {
                    let inputs: Vec<usize> =
                        (0..1 + (caller * 7 + round) % 40).map(|index| index % words.len()).collect();
                    let texts = inputs.iter().map(|index| text(words[*index])).collect();
                    let encoded = block_on(handle.encode(texts, None)).expect("rows");
                    assert_eq!(encoded.rows().len(), inputs.len());
                    for (row, index) in encoded.rows().zip(&inputs) {
                        let off =
                            row.iter().zip(&alone[*index]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                        assert!(off < 1e-5, "{index}: off by {off}");
                    }
                    assert!(
                        encoded.timings.inference > Duration::ZERO
                            && encoded.timings.total >= encoded.timings.queue
                    );
                }
            });
        }
    });
    service.shutdown();
}

#[test]
fn a_request_larger_than_a_batch_comes_back_whole() {
    let model = model();
    let service = start(&model, Scripted::new(&model, 2, |_| Ok(())), ServiceOptions::default());
    let inputs = (0..1_000).map(|index| EncodeInput::Tokens(vec![index % 40, 1])).collect();
    let encoded = block_on(service.handle().encode(inputs, None)).expect("rows");
    for (index, row) in encoded.rows().enumerate() {
        assert_eq!(row[0], (index % 40 + 1) as f32);
    }
    assert_eq!(encoded.total_tokens(), 2_000);
}

#[test]
fn no_inputs_are_no_work_and_ready_at_once() {
    let model = model();
    let service = start(&model, Scripted::new(&model, 1, |_| Ok(())), ServiceOptions::default());
    let encoded = block_on(service.handle().encode(Vec::new(), None)).expect("nothing");
    assert_eq!((encoded.width, encoded.rows().len()), (48, 0));
}

#[test]
fn exactly_one_batch_is_prefetched() {
    let model = model();
    let engine = Scripted::new(&model, 2, |_| Ok(()));
    let most = Arc::clone(&engine.most_submitted);
    let options = ServiceOptions { max_batch_sequences: 1, ..ServiceOptions::default() };
    let service = start(&model, engine, options);
    block_on(service.handle().encode(vec![text("what"); 200], None)).expect("rows");
    assert_eq!(*most.lock().expect("a count"), 2);
}

#[test]
fn what_waits_is_cancelled_by_dropping_its_future() {
    let model = model();
    let (engine, begins, gate) = gated(&model);
    let service = start(&model, engine, ServiceOptions::default());
    let handle = service.handle();
    let first = handle.encode(vec![text("a man")], None);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1));
    drop(handle.encode(vec![text("the girl"); 5], None));
    let last = handle.encode(vec![text("dogs")], None);
    gate.send(()).expect("the engine waits");
    block_on(first).expect("the first row");
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1), "the cancelled five are not computed");
    gate.send(()).expect("the engine waits");
    block_on(last).expect("the last row");
    assert_eq!(handle.waiting(), 0);
}

#[test]
fn an_entry_past_its_deadline_is_not_computed() {
    let model = model();
    let (engine, begins, gate) = gated(&model);
    let service = start(&model, engine, ServiceOptions::default());
    let handle = service.handle();
    let first = handle.encode(vec![text("a man")], None);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1));
    let deadline = Instant::now() + Duration::from_millis(20);
    let late = handle.encode(vec![text("the girl")], Some(deadline));
    while Instant::now() <= deadline {
        thread::yield_now();
    }
    gate.send(()).expect("the engine waits");
    block_on(first).expect("the first row");
    assert_eq!(block_on(late), Err(EncodeError::DeadlineExceeded));
    assert!(begins.try_recv().is_err(), "nothing more was begun");
}

#[test]
fn a_full_queue_refuses_with_its_limit() {
    let model = model();
    let (engine, begins, gate) = gated(&model);
    let options = ServiceOptions { max_queued_inputs: 3, max_input_bytes: 10, ..ServiceOptions::default() };
    let service = start(&model, engine, options);
    let handle = service.handle();
    let first = handle.encode(vec![text("a man")], None);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1));
    let second = handle.encode(vec![text("dogs"); 3], None);
    let full = block_on(handle.encode(vec![text("dogs")], None)).expect_err("full");
    assert_eq!(full, EncodeError::Refused(Refusal::Full { unit: "inputs", queued: 3, limit: 3 }));
    assert_eq!(full.class(), FailureClass::Transient);
    let many = block_on(handle.encode(vec![text("dogs"); 4], None)).expect_err("too many");
    assert_eq!(many.class(), FailureClass::Permanent);
    let large = block_on(handle.encode(vec![text("a"), text("a long text")], None)).expect_err("too large");
    assert_eq!(large.to_string(), "input 1 has 11 bytes; at most 10 are allowed");
    gate.send(()).expect("the engine waits");
    block_on(first).expect("a row");
    gate.send(()).expect("the engine waits");
    block_on(second).expect("rows");
}

#[test]
fn token_ids_that_the_model_lacks_are_named() {
    let model = model();
    let service = start(&model, Scripted::new(&model, 1, |_| Ok(())), ServiceOptions::default());
    let inputs = vec![text("dogs"), EncodeInput::Tokens(vec![2, 40])];
    let error = block_on(service.handle().encode(inputs, None)).expect_err("id 40");
    assert_eq!(error.to_string(), "input 1: token id 40 at position 1 must be below 40");
    assert_eq!(service.handle().waiting(), 0, "the room of both is free again");
}

#[test]
fn one_bad_sequence_does_not_cost_its_neighbours() {
    let model = model();
    let (mut first, (entered, enters), (gate, opened)) = (true, mpsc::channel(), mpsc::channel::<()>());
    let engine = Scripted::new(&model, 1, move |batch| {
        if std::mem::take(&mut first) {
            let _ = entered.send(());
            let _ = opened.recv_timeout(PATIENCE);
        }
        match batch.ranges().position(|range| batch.input_ids[range].contains(&13)) {
            Some(sequence) => Err(EngineError::NotFinite { sequence }),
            None => Ok(()),
        }
    });
    let service = start(&model, engine, ServiceOptions::default());
    let handle = service.handle();
    let plug = handle.encode(vec![EncodeInput::Tokens(vec![1])], None);
    enters.recv_timeout(PATIENCE).expect("the first batch runs");
    let requests: Vec<_> =
        (10..20).map(|id| (id, handle.encode(vec![EncodeInput::Tokens(vec![id, 1])], None))).collect();
    gate.send(()).expect("the engine waits");
    block_on(plug).expect("a row");
    for (id, request) in requests {
        match block_on(request) {
            Ok(encoded) => assert_eq!(encoded.values[0], (id + 1) as f32),
            Err(error) => {
                assert_eq!(id, 13, "{error}");
                assert_eq!(error.class(), FailureClass::Permanent);
            }
        }
    }
    assert_eq!(handle.health(), ServiceHealth::Ready);
}

#[test]
fn a_passing_failure_leaves_the_service_working() {
    let model = model();
    let mut failed = false;
    let engine = Scripted::new(&model, 1, move |_| {
        if std::mem::replace(&mut failed, true) {
            Ok(())
        } else {
            Err(EngineError::Transient { detail: "busy".into() })
        }
    });
    let service = start(&model, engine, ServiceOptions::default());
    let error = block_on(service.handle().encode(vec![text("dogs")], None)).expect_err("busy");
    assert_eq!(error.class(), FailureClass::Transient);
    block_on(service.handle().encode(vec![text("dogs")], None)).expect("a row");
    assert_eq!(service.handle().health(), ServiceHealth::Ready);
}

#[test]
fn an_engine_that_is_away_for_a_while_comes_back_without_a_batch() {
    let model = model();
    let busy = || EngineError::Transient { detail: "another process has its memory".into() };
    let mut engine = Scripted::new(&model, 1, move |_| Err(busy()));
    let mut checks = 0;
    engine.health = Box::new(move || {
        checks += 1;
        if checks < 3 { Err(busy()) } else { Ok(()) }
    });
    let service = start(&model, engine, ServiceOptions::default());
    let handle = service.handle();
    block_on(handle.encode(vec![text("dogs")], None)).expect_err("busy");
    let since = Instant::now();
    let mut degraded = false;
    // Nobody sends anything: a worker whose engine is in trouble takes no jobs.
    while handle.health() != ServiceHealth::Ready || !degraded {
        degraded |= handle.health() == ServiceHealth::Degraded(busy());
        assert!(since.elapsed() < PATIENCE, "{:?}", handle.health());
        std::thread::yield_now();
    }
}

#[test]
fn a_batch_that_works_ends_the_trouble() {
    let model = model();
    let busy = || EngineError::Transient { detail: "busy".into() };
    let mut failed = false;
    let mut engine =
        Scripted::new(
            &model,
            1,
            move |_| {
                if std::mem::replace(&mut failed, true) { Ok(()) } else { Err(busy()) }
            },
        );
    engine.health = Box::new(move || Err(busy()));
    let service = start(&model, engine, ServiceOptions::default());
    block_on(service.handle().encode(vec![text("dogs")], None)).expect_err("busy");
    block_on(service.handle().encode(vec![text("dogs")], None)).expect("a row");
    assert_eq!(service.handle().health(), ServiceHealth::Ready);
}

/// Everything that waits fails, nothing hangs, and whatever comes later is told the same.
fn ruined(act: impl FnMut(&Batch) -> Result<(), EngineError> + Send + 'static, says: &str) {
    let model = model();
    let options = ServiceOptions { max_batch_sequences: 1, ..ServiceOptions::default() };
    let service = start(&model, Scripted::new(&model, 2, act), options);
    let handle = service.handle();
    let requests: Vec<_> = (0..50).map(|_| handle.encode(vec![text("dogs"); 3], None)).collect();
    for request in requests {
        let error = block_on(request).expect_err("ruined");
        assert_eq!(error.class(), FailureClass::Poisoned, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(matches!(handle.health(), ServiceHealth::Poisoned(_)));
    let later = block_on(handle.encode(vec![text("dogs")], None)).expect_err("ruined");
    assert_eq!(later.class(), FailureClass::Poisoned);
    service.shutdown();
}

#[test]
fn a_ruined_engine_fails_everything_with_its_reason() {
    ruined(|_| Err(EngineError::Poisoned { detail: "illegal address".to_owned() }), "illegal address");
}

#[test]
fn a_panicking_engine_fails_everything_with_its_reason() {
    ruined(|_| panic!("index out of bounds"), "index out of bounds");
}

#[test]
fn an_engine_that_does_not_warm_up_makes_no_service() {
    struct Cold(Scripted);
    impl Engine for Cold {
        fn info(&self) -> &EngineInfo {
            &self.0.info
        }
        fn warm_up(&mut self) -> Result<(), EngineError> {
            Err(EngineError::Transient { detail: "out of memory".to_owned() })
        }
        fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
            self.0.submit(batch)
        }
        fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError> {
            self.0.collect(outputs)
        }
        fn health(&mut self) -> Result<(), EngineError> {
            Ok(())
        }
    }
    let model = model();
    let engine = Box::new(Cold(Scripted::new(&model, 1, |_| Ok(()))));
    let failed = EncoderService::start(model, engine, ServiceOptions::default(), Arc::new(Unobserved));
    assert!(matches!(failed, Err(StartError::WarmUp(EngineError::Transient { .. }))));
}

#[test]
fn ending_the_service_fails_what_waits() {
    let model = model();
    let (engine, begins, gate) = gated(&model);
    let service = start(&model, engine, ServiceOptions::default());
    let handle = service.handle();
    let begun = handle.encode(vec![text("a man")], None);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1));
    let waiting = handle.encode(vec![text("dogs"); 40], None);
    let ending = thread::spawn(move || service.shutdown());
    assert_eq!(block_on(waiting), Err(EncodeError::ShuttingDown));
    gate.send(()).expect("the engine waits");
    ending.join().expect("the end");
    block_on(begun).expect("what the engine had begun is finished");
    assert_eq!(block_on(handle.encode(vec![text("dogs")], None)), Err(EncodeError::ShuttingDown));
}

#[derive(Default)]
struct Seen {
    batches: Mutex<Vec<(usize, usize)>>,
    requests: Mutex<Vec<(Outcome, usize)>>,
    inputs: Mutex<Vec<(usize, bool)>>,
}

impl Observer for Seen {
    fn batch(&self, report: &BatchReport) {
        self.batches.lock().expect("batches").push((report.sequences, report.tokens));
    }
    fn request(&self, outcome: Outcome, inputs: usize, _: &Timings) {
        self.requests.lock().expect("requests").push((outcome, inputs));
    }
    fn input(&self, tokens: usize, truncated: bool) {
        self.inputs.lock().expect("inputs").push((tokens, truncated));
    }
}

#[test]
fn the_observer_hears_of_inputs_batches_and_requests() {
    let model = model();
    let seen = Arc::new(Seen::default());
    let engine = Box::new(Scripted::new(&model, 1, |_| Ok(())));
    let observer = Arc::clone(&seen) as Arc<dyn Observer>;
    let service =
        EncoderService::start(model, engine, ServiceOptions::default(), observer).expect("a service");
    block_on(service.handle().encode(vec![text("dogs bark"), text(&"dogs ".repeat(90))], None))
        .expect("rows");
    service.shutdown();
    assert_eq!(*seen.batches.lock().expect("batches"), [(2, 4 + 70)]);
    assert_eq!(*seen.requests.lock().expect("requests"), [(Outcome::Succeeded, 2)]);
    assert_eq!(*seen.inputs.lock().expect("inputs"), [(4, false), (70, true)]);
}

/// What the gauges of a queue show: the last that was told.
#[derive(Default)]
struct Gauges {
    shown: Mutex<(usize, usize)>,
    highest: Mutex<(usize, usize)>,
}

impl Observer for Gauges {
    fn queue(&self, entries: usize, tokens: usize) {
        *self.shown.lock().expect("gauges") = (entries, tokens);
        let mut highest = self.highest.lock().expect("gauges");
        *highest = (highest.0.max(entries), highest.1.max(tokens));
    }
}

impl Gauges {
    fn become_zero(&self, when: &str) {
        let begun = Instant::now();
        while *self.shown.lock().expect("gauges") != (0, 0) {
            assert!(begun.elapsed() < PATIENCE, "{when}: {:?}", self.shown);
            thread::yield_now();
        }
    }
}

#[test]
fn an_idle_service_shows_an_empty_queue() {
    let model = model();
    let gauges = Arc::new(Gauges::default());
    let begin = |engine: Scripted| {
        let observer = Arc::clone(&gauges) as Arc<dyn Observer>;
        EncoderService::start(model.clone(), Box::new(engine), ServiceOptions::default(), observer)
            .expect("a service")
    };
    let (engine, begins, gate) = gated(&model);
    let service = begin(engine);
    let handle = service.handle();
    let burst: Vec<_> = (0..20).map(|_| handle.encode(vec![text("dogs bark"); 40], None)).collect();
    let letting = thread::spawn(move || {
        // As many batches as it takes, whatever the texts share.
        while begins.recv_timeout(PATIENCE).is_ok() && gate.send(()).is_ok() {}
    });
    burst.into_iter().for_each(|request| drop(block_on(request).expect("rows")));
    assert_eq!(*gauges.shown.lock().expect("gauges"), (0, 0), "after a burst");
    service.shutdown();
    letting.join().expect("the gate");

    let (engine, begins, gate) = gated(&model);
    let service = begin(engine);
    let handle = service.handle();
    *gauges.highest.lock().expect("gauges") = (0, 0);
    let plug = handle.encode(vec![text("a man")], None);
    assert_eq!(begins.recv_timeout(PATIENCE), Ok(1));
    let cancelled: Vec<_> = (0..5).map(|_| handle.encode(vec![text("the girl"); 40], None)).collect();
    let late = handle.encode(vec![text("dogs")], Some(Instant::now()));
    let begun = Instant::now();
    while gauges.highest.lock().expect("gauges").0 < 200 {
        assert!(begun.elapsed() < PATIENCE, "{:?}", gauges.highest);
        thread::yield_now();
    }
    drop(cancelled);
    gate.send(()).expect("the engine waits");
    block_on(plug).expect("a row");
    assert_eq!(block_on(late), Err(EncodeError::DeadlineExceeded));
    gauges.become_zero("after cancels");
    service.shutdown();

    for error in [
        EngineError::Transient { detail: "busy".into() },
        EngineError::NotFinite { sequence: 0 },
        EngineError::Poisoned { detail: "gone".into() },
    ] {
        let when = error.to_string();
        let service = begin(Scripted::new(&model, 2, move |_| Err(error.clone())));
        let handle = service.handle();
        let requests: Vec<_> = (0..50).map(|_| handle.encode(vec![text("dogs"); 3], None)).collect();
        requests.into_iter().for_each(|request| drop(block_on(request).expect_err(&when)));
        gauges.become_zero(&when);
        assert_eq!(handle.waiting(), 0, "{when}");
        service.shutdown();
        assert_eq!(*gauges.shown.lock().expect("gauges"), (0, 0), "{when}");
    }
}

#[test]
fn the_gauges_are_told_in_the_order_of_the_changes() {
    /// Tells of a filled queue late: only after the engine's thread could have told of an empty one.
    #[derive(Default)]
    struct Slow(Mutex<Vec<usize>>, Condvar);
    impl Observer for Slow {
        fn queue(&self, entries: usize, _: usize) {
            let mut told = self.0.lock().expect("what was told");
            if entries > 0 {
                // The queue is locked: nobody comes, and the time passes.
                told = self.1.wait_timeout(told, Duration::from_millis(200)).expect("what was told").0;
            }
            told.push(entries);
            self.1.notify_all();
        }
    }
    let model = model();
    let slow = Arc::new(Slow::default());
    let engine = Box::new(Scripted::new(&model, 1, |_| Ok(())));
    let observer = Arc::clone(&slow) as Arc<dyn Observer>;
    let service =
        EncoderService::start(model, engine, ServiceOptions::default(), observer).expect("a service");
    block_on(service.handle().encode(vec![text("dogs")], None)).expect("a row");
    assert_eq!(*slow.0.lock().expect("what was told"), [1, 0]);
}
