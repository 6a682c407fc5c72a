//! The classic POST that tells a receiver of a file.
//!
//! Its answer may take as long as the receiver's download, so it has a short deadline, and a time-out says nothing:
//! it is not sent again while the receiver may still be at it. Once the receiver has confirmed the file, it has
//! certainly been told.

use std::time::Duration;

use ringback_domain::ArtifactId;
use ringback_domain::artifact::{ArtifactState, FORMAT_NOTICE, NOTICE_DEADLINE_MS};
use ringback_domain::webhook::response::{Reason, TransportFault, Verdict};
use ringback_domain::webhook::schedule::SlowDown;
use ringback_store::artifacts::artifact_by_id;

use crate::book::{Flow, Owed, Tried};
use crate::shared::Shared;

/// What is known of a notice before it is sent.
pub(crate) enum Notice {
    /// The delivery is another one, or the file is to be told.
    Send,
    /// Nothing is to be sent any more.
    Over(Verdict, &'static str),
}

/// Whether a delivery is a notice.
pub(crate) fn is_one(owed: &Owed) -> bool {
    owed.format & FORMAT_NOTICE != 0
}

/// The deadline of a notice.
pub(crate) fn deadline(owed: &Owed) -> Option<Duration> {
    is_one(owed).then_some(Duration::from_millis(NOTICE_DEADLINE_MS))
}

/// Looks at the file before it is told.
///
/// # Errors
/// The database's, for people.
pub(crate) async fn before(shared: &Shared, owed: &Owed) -> Result<Notice, String> {
    if !is_one(owed) {
        return Ok(Notice::Send);
    }
    // The artefact owns its notice.
    let id = ArtifactId::from_uuid(owed.key.owner);
    let row = artifact_by_id(shared.store.read(), id).await.map_err(|error| format!("artefact: {error}"))?;
    let gone = Verdict::Dead(Reason::Transport(TransportFault::Body));
    Ok(match row.map(|row| row.state) {
        Some(ArtifactState::Confirmed) => Notice::Over(Verdict::Delivered, "confirmed by its receiver"),
        None | Some(ArtifactState::Expired) => Notice::Over(gone, "the file's time is over"),
        Some(ArtifactState::Ready | ArtifactState::Unconfirmed | ArtifactState::Uploading) => Notice::Send,
    })
}

/// A time-out of a notice: unknown until the receiver's time to confirm is over.
pub(crate) async fn after(shared: &Shared, owed: &Owed, tried: &mut Tried) {
    if !is_one(owed)
        || tried.verdict != Verdict::Retry(Reason::Transport(TransportFault::Timeout), SlowDown::No)
    {
        return;
    }
    // A slow answer says nothing against its host.
    tried.flow = Flow::Neutral;
    let id = ArtifactId::from_uuid(owed.key.owner);
    let row = artifact_by_id(shared.store.read(), id).await;
    let until_ms = row.ok().flatten().and_then(|row| row.wait_until_ms);
    let left_ms = until_ms.and_then(|until| u64::try_from(until - shared.clock.now_ms()).ok());
    if let Some(left_ms) = left_ms {
        let wait = SlowDown::For(left_ms);
        tried.verdict = Verdict::Retry(Reason::Transport(TransportFault::Timeout), wait);
        tried.detail = Some(format!(
            "no answer within {NOTICE_DEADLINE_MS} ms; unknown, the receiver may still be downloading"
        ));
    }
}
