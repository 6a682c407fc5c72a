//! The services of the all-in-one: started front to back, restarted one by one when they panic, drained in order.

use crate::error::CliError;
use crate::services::platform::{Platform, Sql};
use crate::services::roles;
use ringback_service_runtime::Shutdown;
use ringback_service_runtime::supervise::supervise;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::task::JoinSet;

/// Time for what the services behind still have to do once no more comes from the front.
const BACK_DRAIN: Duration = Duration::from_secs(20);

/// The broker was started just now, or is another's and may be away.
const NATS_WITHIN: Duration = Duration::from_secs(2);

/// Running services. The front (API, worker) drains first: what it hands over must find the back at work.
#[derive(Debug)]
pub(crate) struct Stages {
    front: JoinSet<()>,
    back: JoinSet<()>,
    end_back: Shutdown,
    ruined: Ruined,
}

/// Why this process cannot go on, where that is so.
type Ruined = Arc<OnceLock<String>>;

impl Stages {
    /// Starts all services; gives the API's address. A service that cannot start at all is an error here, a later
    /// failure restarts it.
    pub(crate) async fn start(
        platform: &mut Platform,
        sql: &Sql,
        shutdown: &Shutdown,
    ) -> Result<(Self, SocketAddr), CliError> {
        let (front_end, end_back) = (shutdown.child(), Shutdown::new());
        let first_api = roles::build_api(platform, sql, &front_end).await?;
        let address = first_api.local_addr();
        // A restarted API comes back where its clients know it.
        let mut config = (*platform.config).clone();
        config.server.listen = address;
        platform.config = Arc::new(config);

        make_streams(platform, sql).await;
        let (mut front, mut back) = (JoinSet::new(), JoinSet::new());
        let (p, s, end) = (platform.clone(), sql.clone(), end_back.clone());
        back.spawn(supervise("tracker", end_back.clone(), move || {
            roles::tracker(p.clone(), s.clone(), end.clone())
        }));
        let (p, s, end) = (platform.clone(), sql.clone(), end_back.clone());
        back.spawn(supervise("reconciler", end_back.clone(), move || {
            roles::reconciler(p.clone(), s.clone(), end.clone())
        }));
        let (p, s, end) = (platform.clone(), sql.clone(), end_back.clone());
        // A database inside of the data folder, which we hold locked, has no other user.
        let database = &platform.config.database;
        let alone = database.url.is_none() && database.url_env.is_none() && database.url_file.is_none();
        back.spawn(supervise("dispatcher", end_back.clone(), move || {
            roles::dispatcher(p.clone(), s.clone(), end.clone(), alone)
        }));
        let (p, s, end) = (platform.clone(), sql.clone(), front_end.clone());
        let mut first_api = Some(first_api);
        front.spawn(supervise("api", front_end.clone(), move || {
            let (p, s, end, first) = (p.clone(), s.clone(), end.clone(), first_api.take());
            async move {
                match first {
                    Some(app) => {
                        app.run().await;
                        Ok(())
                    }
                    None => roles::api(p, s, end).await,
                }
            }
        }));
        let ruined = Ruined::default();
        let (p, end, all, why) = (platform.clone(), front_end.clone(), shutdown.clone(), Arc::clone(&ruined));
        front.spawn(supervise("worker", front_end, move || {
            let (p, end, all, why) = (p.clone(), end.clone(), all.clone(), Arc::clone(&why));
            async move {
                let ended = roles::worker(p, end).await;
                // Started again in this process it would meet the same ruin.
                if let Err(CliError::Ruined(reason)) = &ended {
                    let _ = why.set(reason.clone());
                    all.trigger();
                }
                ended
            }
        }));
        Ok((Self { front, back, end_back, ruined }, address))
    }

    /// Returns when all services have drained.
    ///
    /// # Errors
    /// [`CliError::Ruined`] where that is why they ended.
    pub(crate) async fn drained(mut self) -> Result<(), CliError> {
        while self.front.join_next().await.is_some() {}
        self.end_back.trigger();
        let back = async { while self.back.join_next().await.is_some() {} };
        if tokio::time::timeout(BACK_DRAIN, back).await.is_err() {
            tracing::warn!(
                "some services did not drain in time; what they left is taken up at the next start"
            );
        }
        self.ruined.get().map_or(Ok(()), |reason| Err(CliError::Ruined(reason.clone())))
    }
}

/// The worker looks for its queues at once: with them there it need not ask twice. Without NATS it asks again later.
async fn make_streams(platform: &Platform, sql: &Sql) {
    let facts = sql.store.facts();
    if platform.bus.connected(NATS_WITHIN).await.is_ok()
        && let Err(error) = platform.bus.ensure_streams(u32::from(facts.shards), &facts.db_epoch).await
    {
        tracing::warn!(%error, "the work queue's streams cannot be made yet");
    }
}
