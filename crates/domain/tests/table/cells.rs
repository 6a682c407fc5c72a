//! What an event did, as a short text; and the checks that hold at every point of the product.

use ringback_domain::job::{Applied, Effect, Job, JobState, Rejection, apply, check_step};

use super::product::Case;

/// Applies one case and writes down what happened.
pub(crate) fn cell(job: &Job, case: &Case) -> String {
    let mut job = job.clone();
    if case.without_ttl {
        job.ttl_ms = None;
        job.ttl_at = None;
    }
    match apply(&job, &case.what, case.now, &case.policy) {
        Ok(Applied::Unchanged) => "same".to_owned(),
        Ok(Applied::Renewed { next, effects }) => {
            check_step(&job, &next).unwrap();
            assert_eq!((next.seq, next.owed), (job.seq, job.owed));
            assert_eq!(delivered(&effects), 0, "nothing is owed without a transition");
            with_effects("renewed".to_owned(), &effects)
        }
        Ok(Applied::Changed { next, effects }) => {
            check_step(&job, &next).unwrap();
            assert_eq!(next.seq, job.seq + 1);
            let owed = next.scopes.iter().filter(|s| s.wants(next.status())).count();
            assert_eq!(delivered(&effects), owed, "P4: one delivery per transition and target");
            assert_eq!(next.owed as usize, job.owed as usize + owed, "P5");
            with_effects(state(&next), &effects)
        }
        Err(why) => format!("no: {}", rejection(&why)),
    }
}

fn state(job: &Job) -> String {
    match &job.state {
        JobState::InProgress(live) => format!("{}({})", job.status(), live.attempt),
        JobState::InQueue
        | JobState::Completed(_)
        | JobState::Failed(_)
        | JobState::Cancelled(_)
        | JobState::TimedOut(_) => job.status().to_string(),
    }
}

fn delivered(effects: &[Effect]) -> usize {
    effects.iter().filter(|e| matches!(e, Effect::Deliver { .. })).count()
}

fn with_effects(mut text: String, effects: &[Effect]) -> String {
    for effect in effects {
        let word = match effect {
            Effect::Deliver { .. } => continue,
            Effect::RecordResult { .. } => "result".to_owned(),
            Effect::CloseAttempt(end) => format!("close({} {})", end.attempt, end.reason.as_str()),
            Effect::CountInBatch { .. } => "count".to_owned(),
            Effect::Publish { publish, must_ask, .. } => {
                format!("publish({publish}{})", if *must_ask { " ask" } else { "" })
            }
            Effect::DropMessage { publish, .. } => format!("drop({publish})"),
            Effect::Stop { attempt, reason, .. } => format!("stop({attempt} {})", reason.as_str()),
        };
        text.push(' ');
        text.push_str(&word);
    }
    text
}

fn rejection(why: &Rejection) -> &'static str {
    match why {
        Rejection::AlreadyTerminal { .. } => "ended",
        Rejection::StaleRun { .. } => "other run",
        Rejection::StaleAttempt { .. } => "closed attempt",
        Rejection::NeverGranted { .. } => "never granted",
        Rejection::NotYet { .. } => "too early",
        Rejection::StaleMessage { .. } => "not the newest message",
        Rejection::NotAllowed { .. } => "not possible",
    }
}
