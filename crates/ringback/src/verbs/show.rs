//! A job or a batch for people.

use super::wait::counts;
use super::{Context, job_path};
use crate::client::model::{Batch, Delivery, Job};
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{clean, json_text, out, raw, stdout_is_terminal, table, when};
use futures::StreamExt as _;
use ringback_service_runtime::redact_url;
use serde_json::value::RawValue;

/// Everything about a job.
pub(crate) fn job(job: &Job, deliveries: &[Delivery]) -> Result<(), CliError> {
    let style = Style::stdout();
    facts(job, style)?;
    timeline(job, style)?;
    webhooks(deliveries, style)?;
    files(job, style)?;
    if let Some(error) = &job.error {
        out(&format!("\n{}\n{}", style.bold("error"), style.red(&clean(error))))?;
    }
    match (&job.output, job.output_bytes) {
        (Some(value), _) => {
            out(&format!("\n{}", style.bold("output")))?;
            output(value)?;
        }
        (None, Some(bytes)) => {
            out(&format!("\n{}\n{bytes} bytes: `ringback get {} --output`", style.bold("output"), job.id))?;
        }
        (None, None) => {}
    }
    Ok(())
}

fn facts(job: &Job, style: Style) -> Result<(), CliError> {
    let mut rows = vec![("job", job.id.clone()), ("endpoint", job.endpoint.clone())];
    rows.push(("status", style.status_word(&job.status)));
    if job.run > 1 {
        rows.push(("run", job.run.to_string()));
    }
    if let Some(attempt) = job.attempt.filter(|&attempt| attempt > 1) {
        rows.push(("attempt", attempt.to_string()));
    }
    if let Some(at) = &job.submitted_at {
        rows.push(("submitted", at.clone()));
    }
    if let Some(ms) = job.delay_time_ms {
        rows.push(("waited", when::duration_ms(ms)));
    }
    if let Some(ms) = job.execution_time_ms {
        rows.push(("ran", when::duration_ms(ms)));
    }
    if let Some(worker) = &job.worker_id {
        rows.push(("worker", worker.clone()));
    }
    if let Some(batch) = &job.batch_id {
        rows.push(("batch", batch.clone()));
    }
    if let Some(client_ref) = &job.client_ref {
        rows.push(("client ref", clean(client_ref)));
    }
    for (name, value) in rows {
        out(&format!("{}  {value}", style.dim(&format!("{name:<10}"))))?;
    }
    Ok(())
}

fn timeline(job: &Job, style: Style) -> Result<(), CliError> {
    if job.history.is_empty() {
        return Ok(());
    }
    out(&format!("\n{}", style.bold("timeline (UTC)")))?;
    let mut before: Option<i64> = None;
    for entry in &job.history {
        let at = when::parse_rfc3339_ms(&entry.at);
        let since = match (before, at) {
            (Some(before), Some(at)) => {
                format!("+{}", when::duration_ms(u64::try_from(at - before).unwrap_or(0)))
            }
            _ => String::new(),
        };
        before = at.or(before);
        let mut line = format!(
            "  {}  {}  {}",
            when::clock(&entry.at),
            style.status_word(&format!("{:<11}", entry.status)),
            style.dim(&format!("{since:>10}")),
        );
        if entry.run > 1 || job.run > 1 {
            line.push_str(&format!("  run {}", entry.run));
        }
        if let Some(attempt) = entry.attempt.filter(|&attempt| attempt > 0 && entry.status == "IN_PROGRESS") {
            line.push_str(&format!("  attempt {attempt}"));
        }
        if let Some(reason) = &entry.reason {
            line.push_str(&format!("  {}", clean(reason)));
        }
        out(line.trim_end())?;
    }
    Ok(())
}

fn files(job: &Job, style: Style) -> Result<(), CliError> {
    if job.artifacts.is_empty() {
        return Ok(());
    }
    let hint = format!("ringback get {} --save DIR", job.id);
    out(&format!("\n{}  {}", style.bold("files"), style.dim(&hint)))?;
    for file in &job.artifacts {
        let (name, state) = (clean(&file.filename), clean(&file.state));
        out(&format!("  {name}  {} bytes  {state}", file.size_bytes))?;
    }
    Ok(())
}

fn webhooks(deliveries: &[Delivery], style: Style) -> Result<(), CliError> {
    if deliveries.is_empty() {
        return Ok(());
    }
    out(&format!("\n{}", style.bold("webhooks")))?;
    let rows: Vec<Vec<String>> = deliveries
        .iter()
        .map(|delivery| {
            let last = match (&delivery.last_error, delivery.last_status) {
                (Some(error), Some(status)) => format!("{status} {}", clean(error)),
                (Some(error), None) => clean(error),
                (None, Some(status)) => status.to_string(),
                (None, None) => String::new(),
            };
            let when = match (&delivery.delivered_at, &delivery.next_attempt_at) {
                (Some(at), _) => when::clock(at),
                (None, Some(at)) if delivery.state == "pending" => format!("next {}", when::clock(at)),
                _ => String::new(),
            };
            vec![
                delivery.event.clone(),
                delivery.state.clone(),
                delivery.attempts.to_string(),
                when,
                redact_url(&delivery.url),
                last,
            ]
        })
        .collect();
    table::print(
        &["  EVENT", "STATE", "TRIES", "AT", "URL", "LAST ANSWER"],
        &indent(rows),
        |column, text| match (column, text.trim()) {
            (1, "delivered") => style.green(text),
            (1, "dead") => style.red(text),
            (1, "pending") => style.yellow(text),
            _ => text.to_owned(),
        },
    )?;
    Ok(())
}

fn indent(mut rows: Vec<Vec<String>>) -> Vec<Vec<String>> {
    for cell in rows.iter_mut().filter_map(|row| row.first_mut()) {
        cell.insert_str(0, "  ");
    }
    rows
}

/// A job's output: laid out for a terminal, verbatim for a program.
pub(crate) fn output(value: &RawValue) -> Result<(), CliError> {
    if stdout_is_terminal() {
        out(&json_text::pretty(value.get(), Style::stdout()))?;
    } else {
        out(value.get())?;
    }
    Ok(())
}

/// The output of a job that has ended well, wherever it is kept.
pub(crate) async fn result(ctx: &Context, job: &Job) -> Result<(), CliError> {
    match &job.output {
        _ if job.status != "COMPLETED" => Ok(()),
        Some(value) => output(value),
        None if job.output_bytes.is_some() => whole_output(ctx, &job.id).await,
        None => Ok(()),
    }
}

/// A job's output, verbatim and of any size.
pub(crate) async fn whole_output(ctx: &Context, id: &str) -> Result<(), CliError> {
    let response = ctx.api.open(&format!("{}/output", job_path(id))).await?;
    let mut bytes = response.bytes_stream();
    while let Some(chunk) = bytes.next().await {
        raw(&chunk.map_err(|error| ctx.api.unreachable(&error))?)?;
    }
    raw(b"\n")?;
    Ok(())
}

/// How a waited-for job ended, and what to do about it; on standard error.
pub(crate) fn end_of_job(job: &Job) -> Exit {
    let style = Style::stderr();
    let Some(state) = job.state() else { return Exit::Error };
    let exit = Exit::of_job(state);
    if exit != Exit::Ok {
        let reason =
            job.error.as_deref().map(|error| format!(": {}", clean(first_line(error)))).unwrap_or_default();
        eprintln!("{} {} is {}{reason}", style.red("error:"), job.id, job.status);
        eprintln!(
            "  {} `ringback get {1}` shows its timeline, `ringback retry {1}` runs it again",
            style.dim("→"),
            job.id
        );
    }
    exit
}

/// RunPod's Python SDK reports exceptions as a JSON object in a string: its message is what a person wants to see.
fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or(error)
}

/// A batch.
pub(crate) fn batch(batch: &Batch, deliveries: &[Delivery]) -> Result<(), CliError> {
    let style = Style::stdout();
    out(&format!("{}  {}", style.dim("batch     "), batch.batch_id))?;
    out(&format!("{}  {}", style.dim("status    "), style.status_word(&batch.status)))?;
    out(&format!(
        "{}  {} of {} ended: {}",
        style.dim("jobs      "),
        batch.ended(),
        batch.total,
        counts(batch, style)
    ))?;
    if let Some(url) = &batch.result_url {
        out(&format!("{}  {url}", style.dim("results   ")))?;
    }
    webhooks(deliveries, style)
}

/// What a batch's end means for the exit code.
pub(crate) fn end_of_batch(batch: &Batch) -> Exit {
    match batch.status.as_str() {
        "CANCELLED" => Exit::JobCancelled,
        "COMPLETED" if batch.failed == 0 => Exit::Ok,
        "COMPLETED" | "FAILED" => Exit::JobFailed,
        _ => Exit::Ok,
    }
}
