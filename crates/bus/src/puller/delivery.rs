//! A job message in a worker's hands, and the ways to let go of it.

use crate::connection::{Bus, millis};
use crate::error::BusError;
use crate::subjects::JobSubject;
use async_nats::{Client, Subject};
use bytes::Bytes;
use std::time::Duration;

/// An acknowledgement may wait this long for room in the client's buffer. A lost one is harmless: the message is
/// delivered again and its holder asks for a grant.
const PATIENCE: Duration = Duration::from_secs(5);

/// One delivered job message.
#[derive(Debug, Clone)]
pub struct JobDelivery {
    /// Which publish of which job.
    pub subject: JobSubject,
    /// Encoded `JobMessage`.
    pub payload: Bytes,
    /// Trace context of the job.
    pub traceparent: Option<String>,
    /// How often this message was delivered, from 1. Above 1 the holder asks for a grant before it runs the job.
    /// It may be too low after a crash of the server, so it is never the fence itself.
    pub num_delivered: u64,
    /// Its sequence in the stream.
    pub stream_sequence: u64,
    /// When it was stored, milliseconds since 1970 by the server's clock.
    pub stored_at_ms: i64,
    /// Lets go of the message.
    pub acker: Acker,
}

/// Acknowledges one message (cheap to clone). Nothing here waits for the server's answer.
#[derive(Debug, Clone)]
pub struct Acker {
    reply: Subject,
    client: Client,
}

/// Protocol of `$JS.ACK` replies, ADR-13 and the JetStream wire API.
impl Acker {
    pub(super) fn new(reply: Subject, client: Client) -> Self {
        Self { reply, client }
    }

    /// Done: the message leaves the queue. Call it after the tracker has committed the outcome.
    ///
    /// # Errors
    /// Transient; the message is delivered again then.
    pub async fn ack(&self) -> Result<(), BusError> {
        self.send(Bytes::from_static(b"+ACK")).await
    }

    /// Given back: delivered again at once, or after `delay`.
    ///
    /// # Errors
    /// Transient; the message is delivered again after the ack wait then.
    pub async fn nak(&self, delay: Option<Duration>) -> Result<(), BusError> {
        let payload = match delay {
            None => Bytes::from_static(b"-NAK"),
            Some(delay) => Bytes::from(format!("-NAK {{\"delay\": {}}}", delay.as_nanos())),
        };
        self.send(payload).await
    }

    /// Still at work: starts the ack wait anew. Send it every third of the ack wait.
    ///
    /// # Errors
    /// Transient.
    pub async fn in_progress(&self) -> Result<(), BusError> {
        self.send(Bytes::from_static(b"+WPI")).await
    }

    /// Never again: the message leaves the queue without having been done.
    ///
    /// # Errors
    /// Transient.
    pub async fn term(&self) -> Result<(), BusError> {
        self.send(Bytes::from_static(b"+TERM")).await
    }

    async fn send(&self, payload: Bytes) -> Result<(), BusError> {
        match tokio::time::timeout(PATIENCE, self.client.publish(self.reply.clone(), payload)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(BusError::Transient(error.to_string())),
            Err(_) => Err(BusError::Timeout { subject: "$JS.ACK".to_owned(), timeout_ms: millis(PATIENCE) }),
        }
    }
}

/// The numbers in a `$JS.ACK` reply subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AckInfo<'a> {
    pub(super) stream: &'a str,
    pub(super) consumer: &'a str,
    pub(super) num_delivered: u64,
    pub(super) stream_sequence: u64,
    pub(super) stored_at_ms: i64,
}

/// Both forms (ADR-15): `$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<ns>.<pending>`, and the same with
/// domain and account hash before the stream.
pub(super) fn parse_ack(reply: &str) -> Option<AckInfo<'_>> {
    let tokens: Vec<&str> = reply.strip_prefix("$JS.ACK.")?.split('.').collect();
    let tokens = match tokens.len() {
        7 => &tokens[..],
        9.. => &tokens[2..],
        _ => return None,
    };
    let stored_ns: i128 = tokens[5].parse().ok()?;
    Some(AckInfo {
        stream: tokens[0],
        consumer: tokens[1],
        num_delivered: tokens[2].parse().ok()?,
        stream_sequence: tokens[3].parse().ok()?,
        stored_at_ms: i64::try_from(stored_ns / 1_000_000).ok()?,
    })
}

impl Bus {
    /// Reads a message that a pull delivered; none when it is not one of ours.
    pub(super) fn read_delivery(&self, message: &async_nats::Message) -> Option<JobDelivery> {
        let reply = message.reply.as_ref()?;
        let ack = parse_ack(reply)?;
        Some(JobDelivery {
            subject: self.subjects.parse_job(&message.subject)?,
            traceparent: crate::connection::traceparent_of(message.headers.as_ref()),
            payload: message.payload.clone(),
            num_delivered: ack.num_delivered,
            stream_sequence: ack.stream_sequence,
            stored_at_ms: ack.stored_at_ms,
            acker: Acker::new(reply.clone(), self.client.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_ack_subject() {
        let old = parse_ack("$JS.ACK.RB_dev_JOBS_1.e9-hi.2.77.5.1700000000123456789.3").unwrap();
        assert_eq!((old.stream, old.consumer), ("RB_dev_JOBS_1", "e9-hi"));
        assert_eq!((old.num_delivered, old.stream_sequence, old.stored_at_ms), (2, 77, 1_700_000_000_123));
        let new = parse_ack("$JS.ACK._.hash.RB_dev_JOBS_1.e9-hi.2.77.5.1700000000123456789.3.token").unwrap();
        assert_eq!(new, old);
        for bad in ["", "$JS.ACK.a.b.1", "$JS.ACK.s.c.x.1.1.1.1", "other.s.c.1.1.1.1.1"] {
            assert_eq!(parse_ack(bad), None, "{bad}");
        }
    }
}
