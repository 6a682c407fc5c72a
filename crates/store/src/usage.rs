//! Quotas of projects: counted in the transaction of what they count, told once per period, enforced at submit.
//!
//! Projects without a quota cost nothing here: the registry, which every such transaction has at hand, knows who has
//! one.

use std::collections::BTreeMap;

use ringback_contracts::v1;
use ringback_domain::{
    ProjectId, TimestampMs,
    event::{EventType, event_key_of},
    usage::{EXCEEDED, Metric, Quota, percentage, warning},
    webhook::body::Body,
};
use sea_orm::{ConnectionTrait, Value};

use crate::{
    StoreError, WriteTx,
    events::{Audience, NewEvent, emit},
    sql::{self, get_u64},
};

/// Counters of former periods are kept this long.
const KEEP_MS: i64 = 400 * 86_400_000;

/// Why a submit is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverQuota {
    /// What is used up.
    pub metric: Metric,
    /// The quota.
    pub quota: Quota,
    /// How much of it.
    pub limit: u64,
    /// What is used already.
    pub used: u64,
    /// When counting begins anew.
    pub reset_at: TimestampMs,
    /// The database's clock.
    pub now: TimestampMs,
}

/// Usage of one metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What is counted.
    pub metric: Metric,
    /// In this period.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

/// What a project with a quota has used in the period of `now`.
///
/// # Errors
/// The database's.
pub async fn usage_of<C: ConnectionTrait>(
    conn: &C,
    project: ProjectId,
    quota: &Quota,
    now: TimestampMs,
) -> Result<Vec<Usage>, StoreError> {
    let (start, _) = quota.period.around(now);
    let mut all = Vec::new();
    for metric in Metric::ALL {
        let Some(limit) = quota.limit(metric) else { continue };
        let row = sql::query_one(
            conn,
            "SELECT used FROM usage_counters WHERE project_id = $1 AND metric = $2 AND period_start_ms = $3",
            [Value::from(project.0), Value::from(metric.as_str()), Value::from(start.0)],
        )
        .await?;
        let used = row.map_or(Ok(0), |row| get_u64(&row, 0, "usage_counters.used"))?;
        all.push(Usage { metric, used, limit });
    }
    Ok(all)
}

/// One counter while a transaction works on it; its row is locked.
struct Counter {
    project: ProjectId,
    metric: Metric,
    quota: Quota,
    limit: u64,
    start: TimestampMs,
    end: TimestampMs,
    used: u64,
    told: i64,
    before: (u64, i64),
    events: Vec<(EventType, u64)>,
}

impl Counter {
    async fn open(
        tx: &WriteTx,
        project: ProjectId,
        quota: &Quota,
        metric: Metric,
    ) -> Result<Option<Self>, StoreError> {
        let Some(limit) = quota.limit(metric) else { return Ok(None) };
        let (start, end) = quota.period.around(TimestampMs(tx.now_ms()));
        let key = [Value::from(project.0), Value::from(metric.as_str()), Value::from(start.0)];
        let made = sql::execute(
            tx.conn(),
            "INSERT INTO usage_counters (project_id, metric, period_start_ms, used, told) VALUES ($1, $2, $3, 0, 0) \
             ON CONFLICT (project_id, metric, period_start_ms) DO NOTHING",
            key.clone(),
        )
        .await?;
        if made > 0 {
            sql::execute(
                tx.conn(),
                "DELETE FROM usage_counters WHERE project_id = $1 AND metric = $2 AND period_start_ms < $3",
                [
                    Value::from(project.0),
                    Value::from(metric.as_str()),
                    Value::from(start.0.saturating_sub(KEEP_MS)),
                ],
            )
            .await?;
        }
        let lock = if tx.is_postgres() { " FOR UPDATE" } else { "" };
        let row = sql::query_one(
            tx.conn(),
            &format!(
                "SELECT used, told FROM usage_counters \
                 WHERE project_id = $1 AND metric = $2 AND period_start_ms = $3{lock}"
            ),
            key,
        )
        .await?
        .ok_or(StoreError::corrupt("usage_counters"))?;
        let (used, told) = (get_u64(&row, 0, "usage_counters.used")?, row.try_get_by_index(1)?);
        let quota = *quota;
        Ok(Some(Self {
            project,
            metric,
            quota,
            limit,
            start,
            end,
            used,
            told,
            before: (used, told),
            events: Vec::new(),
        }))
    }

    fn add(&mut self, n: u64) {
        self.used = self.used.saturating_add(n);
        if let Some((percent, told)) = warning(self.used, self.limit, self.told) {
            self.told = told;
            self.events.push((EventType::UsageLimitWarning, percent));
        }
    }

    fn exceeded(&mut self) {
        if self.told & EXCEEDED == 0 {
            self.told |= EXCEEDED;
            self.events.push((EventType::UsageLimitExceeded, 100));
        }
    }

    fn over(&self, now: TimestampMs) -> OverQuota {
        let (metric, quota, limit, used) = (self.metric, self.quota, self.limit, self.used);
        OverQuota { metric, quota, limit, used, reset_at: self.end, now }
    }

    /// Writes what changed; answers what webhooks are owed for it.
    async fn close(self, tx: &WriteTx, partitions: u16) -> Result<Vec<v1::Delivery>, StoreError> {
        if self.before != (self.used, self.told) {
            sql::execute(
                tx.conn(),
                "UPDATE usage_counters SET used = $4, told = $5 \
                 WHERE project_id = $1 AND metric = $2 AND period_start_ms = $3",
                [
                    Value::from(self.project.0),
                    Value::from(self.metric.as_str()),
                    Value::from(self.start.0),
                    sql::int(self.used),
                    Value::from(self.told),
                ],
            )
            .await?;
        }
        let mut deliveries = Vec::new();
        for (event, percent) in &self.events {
            let data = serde_json::json!({
                "metric": self.metric.as_str(),
                "current_usage": self.used,
                "limit": self.limit,
                "percentage": percentage(self.used, self.limit),
                "threshold": percent,
                "period": self.quota.period.as_str(),
                "reset_at": self.end.rfc3339(),
            });
            let subject = format!("{}:{}", self.metric.as_str(), self.start.0);
            let now_ms = u64::try_from(tx.now_ms()).unwrap_or(0);
            let event = NewEvent {
                id: event_key_of(now_ms, &format!("usage:{}:{subject}:{percent}", self.project)),
                project: self.project,
                names: (*event).into(),
                subject: &subject,
                endpoint: None,
                metadata: None,
                data: Body::of_json(data.to_string().into_bytes()),
                audience: Audience::Matching,
                traceparent: None,
            };
            deliveries.extend(emit(tx, partitions, event).await?);
        }
        Ok(deliveries)
    }
}

/// What a transaction counts for projects with a quota. Opened before anything else is locked, in the order of
/// projects and metrics, so that two transactions never wait for each other.
pub(crate) struct Counting {
    counters: BTreeMap<(ProjectId, Metric), Counter>,
    now: TimestampMs,
}

impl Counting {
    /// Counters of these projects' quotas.
    pub(crate) async fn open(
        tx: &WriteTx,
        projects: impl Iterator<Item = (ProjectId, Metric)>,
    ) -> Result<Self, StoreError> {
        let registry = tx.registry().await?;
        let mut wanted: Vec<(ProjectId, Metric)> = projects.collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut counters = BTreeMap::new();
        for (project, metric) in wanted {
            let Some(quota) = registry.quota(project) else { continue };
            if let Some(counter) = Counter::open(tx, project, quota, metric).await? {
                counters.insert((project, metric), counter);
            }
        }
        Ok(Self { counters, now: TimestampMs(tx.now_ms()) })
    }

    /// Takes `n` jobs, or says why not. Of tokens, only what is used up bars: nobody knows what a job will use.
    pub(crate) fn take_jobs(
        &mut self,
        project: ProjectId,
        n: u64,
        uses_tokens: bool,
    ) -> Result<(), OverQuota> {
        if uses_tokens
            && let Some(tokens) = self.counters.get_mut(&(project, Metric::Tokens))
            && tokens.used >= tokens.limit
        {
            tokens.exceeded();
            return Err(tokens.over(self.now));
        }
        let Some(jobs) = self.counters.get_mut(&(project, Metric::Jobs)) else { return Ok(()) };
        if jobs.used.saturating_add(n) > jobs.limit {
            jobs.exceeded();
            return Err(jobs.over(self.now));
        }
        jobs.add(n);
        Ok(())
    }

    fn use_tokens(&mut self, project: ProjectId, n: u64) {
        if let Some(tokens) = self.counters.get_mut(&(project, Metric::Tokens)) {
            tokens.add(n);
            if tokens.used >= tokens.limit {
                tokens.exceeded();
            }
        }
    }

    /// Writes all counters; answers what webhooks are owed.
    pub(crate) async fn close(self, tx: &WriteTx, partitions: u16) -> Result<Vec<v1::Delivery>, StoreError> {
        let mut deliveries = Vec::new();
        for counter in self.counters.into_values() {
            deliveries.extend(counter.close(tx, partitions).await?);
        }
        Ok(deliveries)
    }
}

/// Counts tokens that completions used; answers what webhooks are owed for it.
///
/// # Errors
/// The database's.
pub async fn count_tokens(
    tx: &WriteTx,
    partitions: u16,
    used: &BTreeMap<ProjectId, u64>,
) -> Result<Vec<v1::Delivery>, StoreError> {
    let mut counting = Counting::open(tx, used.keys().map(|project| (*project, Metric::Tokens))).await?;
    for (project, n) in used {
        counting.use_tokens(*project, *n);
    }
    counting.close(tx, partitions).await
}

/// Gives back the jobs of a batch that was never opened.
pub(crate) async fn give_back_jobs(
    tx: &WriteTx,
    project: ProjectId,
    n: u64,
    taken_at: TimestampMs,
) -> Result<(), StoreError> {
    let registry = tx.registry().await?;
    let Some(quota) = registry.quota(project).filter(|q| q.jobs.is_some()) else { return Ok(()) };
    let (start, _) = quota.period.around(taken_at);
    sql::execute(
        tx.conn(),
        "UPDATE usage_counters SET used = CASE WHEN used > $4 THEN used - $4 ELSE 0 END \
         WHERE project_id = $1 AND metric = $2 AND period_start_ms = $3",
        [Value::from(project.0), Value::from(Metric::Jobs.as_str()), Value::from(start.0), sql::int(n)],
    )
    .await
    .map(drop)
}

/// Writes the quota of a project; answers whether it changed.
pub(crate) async fn set_quota(
    tx: &WriteTx,
    project: ProjectId,
    quota: Option<&Quota>,
) -> Result<bool, StoreError> {
    let changed = match quota {
        None => {
            sql::execute(
                tx.conn(),
                "DELETE FROM project_quotas WHERE project_id = $1",
                [Value::from(project.0)],
            )
            .await?
        }
        Some(quota) => {
            sql::execute(
                tx.conn(),
                "INSERT INTO project_quotas (project_id, period, jobs, tokens) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (project_id) DO UPDATE SET period = excluded.period, jobs = excluded.jobs, \
                 tokens = excluded.tokens WHERE project_quotas.period <> excluded.period \
                 OR COALESCE(project_quotas.jobs, -1) <> COALESCE(excluded.jobs, -1) \
                 OR COALESCE(project_quotas.tokens, -1) <> COALESCE(excluded.tokens, -1)",
                [
                    Value::from(project.0),
                    Value::from(quota.period.as_str()),
                    sql::opt_int(quota.jobs),
                    sql::opt_int(quota.tokens),
                ],
            )
            .await?
        }
    };
    Ok(changed > 0)
}
