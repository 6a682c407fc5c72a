//! Numbered predicates about jobs, shared by the property tests and by checks at run time.

use super::state::{Job, JobState};

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// J1: an ended run never changes; only another run may follow.
    EndedRunChanged,
    /// J2: `seq`, `run`, and within a run `publish`, `last_attempt` and `failures` never fall.
    CounterFell,
    /// J3: the live attempt is the newest one.
    LiveIsNotNewest,
    /// J4: a change of state raises `seq` by exactly one, and nothing else raises it.
    SeqOutOfStep,
    /// J5: the recorded attempt of an ended run was opened, or is the ungranted first one.
    UnknownAttemptRecorded,
}

/// Checks one job by itself.
pub fn check(job: &Job) -> Result<(), Violation> {
    if let Some(live) = job.state.live()
        && live.attempt != job.last_attempt
    {
        return Err(Violation::LiveIsNotNewest);
    }
    if let Some(attempt) = job.state.ended().and_then(|e| e.attempt)
        && attempt > job.last_attempt.max(1)
    {
        return Err(Violation::UnknownAttemptRecorded);
    }
    Ok(())
}

/// Checks a step from one committed job to the next.
pub fn check_step(before: &Job, after: &Job) -> Result<(), Violation> {
    check(after)?;
    let same_run = before.run == after.run;
    if before.status().is_terminal() && same_run && before.state != after.state {
        return Err(Violation::EndedRunChanged);
    }
    let fell_in_run = same_run
        && (after.publish < before.publish
            || after.last_attempt < before.last_attempt
            || after.failures < before.failures);
    if after.seq < before.seq || after.run < before.run || after.owed < before.owed || fell_in_run {
        return Err(Violation::CounterFell);
    }
    let changed =
        before.status() != after.status() || !same_run || moved_attempt(&before.state, &after.state);
    if after.seq != before.seq + u32::from(changed) {
        return Err(Violation::SeqOutOfStep);
    }
    Ok(())
}

fn moved_attempt(before: &JobState, after: &JobState) -> bool {
    match (before.live(), after.live()) {
        (Some(a), Some(b)) => a.attempt != b.attempt,
        (None | Some(_), None) | (None, Some(_)) => false,
    }
}
