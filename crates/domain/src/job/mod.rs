//! The job state machine.
//!
//! ```text
//!            submitted
//!                │
//!                ▼   started / granted
//!           IN_QUEUE ─────────────────▶ IN_PROGRESS(attempt)
//!             ▲ │ ▲                      │  │  │
//!             │ │ └── handed back, lost,─┘  │  │ first success of any attempt of the run
//!     retry   │ │     retried failure       │  ▼
//!    (run+1)  │ │ ttl, cancel               │ COMPLETED
//!             │ ▼                           ▼
//!             └─ CANCELLED · TIMED_OUT · FAILED
//! ```
//!
//! [`apply`] is the only place that decides. It takes a job, one event and the time, and answers with the next
//! job and the effects its caller carries out after the commit; it never fails for reasons of infrastructure,
//! so each [`Rejection`] is a fact about the job. P2: a run reaches one terminal state. P3: what counts is
//! fenced by run, attempt and nonce.

mod effect;
mod event;
mod fold;
mod invariants;
mod rejection;
mod state;
mod transition;

pub use effect::{AttemptEnd, Effect};
pub use event::{CancelReason, EventKind, JobEvent};
pub use fold::{Grant, decide_grant, expand};
pub use invariants::{Violation, check, check_step};
pub use rejection::Rejection;
pub use state::{EndReason, Ended, Job, JobState, Live};
pub use transition::{Applied, apply, submit};
