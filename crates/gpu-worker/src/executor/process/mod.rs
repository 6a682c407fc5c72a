//! `process`: supervised children that are written as RunPod handlers.
//!
//! An endpoint has a fixed number of places. Each place keeps one child alive: starts it through the guard,
//! gives it jobs through the worker protocol, stops it when a job must end, and starts it anew when it ends.

mod breaker;
mod environment;
mod exit;
mod lines;
mod old;
mod place;
mod spawn;
mod supervise;
mod workdir;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ringback_worker_protocol::Hub;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{ExecEvent, JobKey, Work};
use place::Place;

pub(crate) use old::wait_for_old_children;

/// How an endpoint's children run.
#[derive(Clone, Debug)]
pub struct ProcessSettings {
    /// Endpoint name in the children's URLs and logs.
    pub endpoint: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Folder that relative paths of the handler mean.
    pub folder: PathBuf,
    /// Gives each child a folder of its own with links into [`ProcessSettings::folder`]. Needed where several
    /// children share a folder: SDK 1.7 keeps the list of its jobs in the working folder.
    pub private_folder: bool,
    /// Variables that the operator sets.
    pub env: BTreeMap<String, String>,
    /// Port of the first child's confirm handshake; its child finds the own one in `RINGBACK_CONFIRM_PORT`.
    pub first_port: Option<u16>,
    /// Names of the worker's own variables to pass on.
    pub pass_env: Vec<String>,
    /// Value of `CUDA_VISIBLE_DEVICES`, if the operator chose a device.
    pub visible_devices: Option<String>,
    /// Name of the device for the SDK's `gpu=`.
    pub device: String,
    /// Jobs at once, over all children.
    pub slots: usize,
    /// Jobs that one child may hold. Unset: what the first child asks for decides; only then do the others
    /// start, as many as the slots need.
    pub concurrency: Option<usize>,
    /// Time for an async handler to react to a stop before its process is ended.
    pub stop_grace: Duration,
    /// Time between SIGTERM and SIGKILL.
    pub kill_grace: Duration,
    /// Longest time from start to the first request.
    pub start_timeout: Duration,
    /// Niceness of the children, 0 to 19.
    pub nice: i32,
    /// Stops a child that is idle while its SDK spins.
    pub pause_idle: bool,
    /// Log text kept per job, in bytes.
    pub log_max_bytes: usize,
    /// Interval of the SDK's pings.
    pub ping_interval: Duration,
    /// Start of the children's worker ids.
    pub id_prefix: String,
    /// Folder for locks, status files and private folders.
    pub state_dir: PathBuf,
    /// Program that runs the guard when its first argument is [`crate::guard::VERB`].
    pub guard: PathBuf,
    /// Where the hub listens.
    pub base_url: String,
}

/// The children of one endpoint.
#[derive(Debug)]
pub struct ProcessPool {
    places: Vec<Arc<Place>>,
    slots: usize,
    ending: CancellationToken,
    tasks: JoinSet<()>,
}

impl ProcessPool {
    /// Starts the children. What they do comes through `events`.
    pub fn start(settings: ProcessSettings, hub: Hub, events: mpsc::UnboundedSender<ExecEvent>) -> Self {
        let ending = CancellationToken::new();
        let settings = Arc::new(settings);
        let slots = settings.slots.max(1);
        let asked = Arc::new(watch::Sender::new(settings.concurrency.unwrap_or(0)));
        let places: Vec<_> = (0..slots.div_ceil(settings.concurrency.unwrap_or(1).max(1)))
            .map(|number| {
                let (settings, asked) = (Arc::clone(&settings), Arc::clone(&asked));
                Arc::new(Place::new(number, settings, hub.clone(), events.clone(), ending.clone(), asked))
            })
            .collect();
        let mut tasks = JoinSet::new();
        for place in &places {
            tasks.spawn(supervise::run(Arc::clone(place)));
        }
        Self { places, slots, ending, tasks }
    }

    /// Jobs that would start at once.
    pub fn open_slots(&self) -> usize {
        let open: usize = self.places.iter().map(|place| place.open_slots()).sum();
        open.min(self.slots.saturating_sub(self.busy()))
    }

    /// Gives a job to a child that waits for one, else to one that will take it soon.
    ///
    /// # Errors
    /// The work comes back when no child can have it.
    pub fn assign(&self, work: Work) -> Result<(), Box<Work>> {
        let mut work = Box::new(work);
        if self.busy() >= self.slots {
            return Err(work);
        }
        for open_only in [true, false] {
            for place in &self.places {
                if open_only && place.open_slots() == 0 {
                    continue;
                }
                match place.assign(work) {
                    Ok(()) => return Ok(()),
                    Err(back) => work = back,
                }
            }
        }
        Err(work)
    }

    /// Stops an attempt: `Finished` with [`super::End::Stopped`] follows, and `Released` when its handler is
    /// really gone. Unknown attempts are ignored.
    pub fn stop(&self, key: JobKey) {
        for place in &self.places {
            place.stop(key);
        }
    }

    /// Jobs in the hands of children.
    pub fn busy(&self) -> usize {
        self.places.iter().map(|place| place.busy()).sum()
    }

    /// Why no child can take jobs, when the reason is a fault; starting up is none.
    pub fn trouble(&self) -> Option<String> {
        let used: Vec<_> = self.places.iter().filter(|place| place.is_needed()).collect();
        let troubles: Vec<_> = used.iter().filter_map(|place| place.trouble()).collect();
        if troubles.len() == used.len() { troubles.into_iter().next() } else { None }
    }

    /// Ends all children: SIGTERM, then SIGKILL after the grace. What they still hold is handed back.
    pub async fn end(&mut self) {
        self.ending.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}
