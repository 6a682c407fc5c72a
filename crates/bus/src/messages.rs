//! Looking at and deleting exact messages of a work queue. Never a wildcard purge: it could take a job that was
//! published a moment ago and that nobody asked to purge.

use crate::api::{MESSAGE_NOT_FOUND, SEQUENCE_NOT_FOUND};
use crate::connection::Bus;
use crate::error::BusError;
use crate::subjects::{JobSubject, Lane};
use async_nats::StatusCode;
use bytes::Bytes;
use ringback_domain::EndpointId;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;

/// One page of an endpoint's messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPage {
    /// The messages that are stored, in no particular order.
    pub jobs: Vec<JobSubject>,
    /// Where the next page starts; none after the last.
    pub next_offset: Option<u64>,
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    total: u64,
    state: PageState,
}

#[derive(Deserialize)]
struct PageState {
    #[serde(default)]
    subjects: Option<HashMap<String, u64>>,
}

impl Bus {
    /// Lists the messages of an endpoint that are stored (waiting or delivered but not acknowledged), one page.
    /// Start with offset 0. The server sorts nothing and keeps no cursor, so messages that come or go meanwhile may
    /// be missed: confirm with [`Bus::has_job`] before acting on an absence.
    ///
    /// # Errors
    /// Transient while JetStream is away; [`BusError::StreamMissing`].
    pub async fn list_jobs(
        &self,
        shard: u32,
        endpoint: EndpointId,
        offset: u64,
    ) -> Result<JobPage, BusError> {
        self.list_filtered(shard, &self.subjects.endpoint_jobs(shard, endpoint), offset).await
    }

    /// [`Bus::list_jobs`] for one lane.
    ///
    /// # Errors
    /// As [`Bus::list_jobs`].
    pub async fn list_lane_jobs(
        &self,
        shard: u32,
        endpoint: EndpointId,
        lane: Lane,
        offset: u64,
    ) -> Result<JobPage, BusError> {
        self.list_filtered(shard, &self.subjects.lane_jobs(shard, endpoint, lane), offset).await
    }

    /// [`Bus::list_jobs`] for a whole shard.
    ///
    /// # Errors
    /// As [`Bus::list_jobs`].
    pub async fn list_shard_jobs(&self, shard: u32, offset: u64) -> Result<JobPage, BusError> {
        self.list_filtered(shard, &self.subjects.shard_jobs(shard), offset).await
    }

    async fn list_filtered(&self, shard: u32, filter: &str, offset: u64) -> Result<JobPage, BusError> {
        let stream = self.subjects.stream(shard);
        let body = json!({"subjects_filter": filter, "offset": offset});
        let page = self
            .api::<Page>(&format!("STREAM.INFO.{stream}"), &body)
            .await?
            .map_err(|error| error.into_bus_error(&stream))?;
        let subjects = page.state.subjects.unwrap_or_default();
        let next = offset + subjects.len() as u64;
        let jobs = subjects.keys().filter_map(|subject| self.subjects.parse_job(subject)).collect();
        Ok(JobPage { jobs, next_offset: (!subjects.is_empty() && next < page.total).then_some(next) })
    }

    /// Whether the message of exactly this publish is stored.
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn has_job(&self, job: &JobSubject) -> Result<bool, BusError> {
        self.sequence_of(job).await.map(|found| found.is_some())
    }

    /// Deletes the message of exactly this publish; false if it was not there (done, cancelled, never stored). A
    /// worker that holds it hears nothing of this: it needs a stop order.
    ///
    /// # Errors
    /// Transient while JetStream is away.
    pub async fn delete_job(&self, job: &JobSubject) -> Result<bool, BusError> {
        let Some(sequence) = self.sequence_of(job).await? else { return Ok(false) };
        let stream = self.subjects.stream(job.shard);
        // A sequence is never reused, so nothing else can be hit even if the message went in the meantime.
        let body = json!({"seq": sequence, "no_erase": true});
        match self.api::<Value>(&format!("STREAM.MSG.DELETE.{stream}"), &body).await? {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.err_code, MESSAGE_NOT_FOUND | SEQUENCE_NOT_FOUND) => Ok(false),
            Err(error) if error.description.contains("no message found") => Ok(false),
            Err(error) => Err(error.into_bus_error(&stream)),
        }
    }

    async fn sequence_of(&self, job: &JobSubject) -> Result<Option<u64>, BusError> {
        let stream = self.subjects.stream(job.shard);
        let subject = self.subjects.job(job);
        let asked = format!("$JS.API.DIRECT.GET.{stream}.{subject}");
        let answer = match self.ask(asked, Bytes::new(), None, self.request_timeout).await {
            // Direct gets are answered by the stream itself: without it there is nobody.
            Err(BusError::NoResponders { .. }) => return Err(BusError::StreamMissing { stream }),
            other => other?,
        };
        if answer.status == Some(StatusCode::NOT_FOUND) {
            return Ok(None);
        }
        let sequence = answer
            .headers
            .as_ref()
            .and_then(|headers| headers.get("Nats-Sequence"))
            .and_then(|value| value.as_str().parse().ok());
        match sequence {
            Some(sequence) => Ok(Some(sequence)),
            None => Err(BusError::Transient(format!("unreadable answer for {subject}"))),
        }
    }
}
