//! `ringback submit`: one job.

use super::wait::{self, Report, TimeoutArgs};
use super::{Context, input, show};
use crate::client::connection::ServerArgs;
use crate::client::model::Job;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::style::Style;
use crate::ui::{out, when};
use serde::Serialize;
use serde_json::value::RawValue;

const EXAMPLES: &str = "\
Examples:
  ringback submit echo '{\"hello\": \"world\"}' --wait
  ringback submit tts @sentence.json --webhook https://example.com/hook
  jq -n '{seconds: 5}' | ringback submit sleep --wait --timeout 30s
  id=$(ringback submit echo '{}' --idempotency-key order-42)

Without --wait it prints the job's id; with --wait, the output. --json prints the whole job instead.
Exit codes: 0 accepted (with --wait: COMPLETED), 2 refused, 6 unreachable, 7 --timeout ran out,
10 FAILED, 11 CANCELLED, 12 TIMED_OUT.";

/// Submit one job
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct SubmitArgs {
    /// Endpoint's name
    endpoint: String,
    /// The input: JSON, @FILE, or - for standard input (also read when nothing is given)
    #[arg(conflicts_with = "input_flag")]
    input: Option<String>,
    /// The input, as an option
    #[arg(id = "input_flag", short, long = "input", value_name = "JSON|@FILE|-")]
    input_flag: Option<String>,
    /// Receiver of the job's end, as RunPod's `webhook`
    #[arg(long, value_name = "URL")]
    webhook: Option<String>,
    /// Receiver of every transition
    #[arg(long, value_name = "URL")]
    webhookv2: Option<String>,
    /// JSON object kept with the job
    #[arg(long, value_name = "JSON")]
    metadata: Option<String>,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Submitting again with the same key and input gives the same job, never a second one
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Wait until the job has ended and print its output
    #[arg(short, long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Limits of one job or of each job of a batch.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct PolicyArgs {
    /// Longest run of one attempt, for example 90s [default: the endpoint's]
    #[arg(long, value_name = "TIME", value_parser = when::parse_span_ms)]
    execution_timeout: Option<u64>,
    /// Longest life from submit to end, for example 1h [default: the endpoint's]
    #[arg(long, value_name = "TIME", value_parser = when::parse_span_ms)]
    ttl: Option<u64>,
    /// Run after jobs of normal priority
    #[arg(long)]
    low_priority: bool,
}

/// `policy` on the wire.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Policy {
    #[serde(skip_serializing_if = "Option::is_none")]
    execution_timeout: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    low_priority: bool,
}

impl PolicyArgs {
    /// `None` when nothing is asked.
    pub(crate) fn to_wire(&self) -> Option<Policy> {
        let asked = self.execution_timeout.is_some() || self.ttl.is_some() || self.low_priority;
        asked.then_some(Policy {
            execution_timeout: self.execution_timeout,
            ttl: self.ttl,
            low_priority: self.low_priority,
        })
    }
}

#[derive(Serialize)]
struct Request<'a> {
    endpoint: &'a str,
    input: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    webhookv2: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Policy>,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &SubmitArgs) -> Result<Exit, CliError> {
    let input = input::job_input(args.input.as_deref().or(args.input_flag.as_deref()))?;
    let metadata = args.metadata.as_deref().map(|text| input::json(text, "--metadata")).transpose()?;
    let request = Request {
        endpoint: &args.endpoint,
        input: &input,
        webhook: args.webhook.as_deref(),
        webhookv2: args.webhookv2.as_deref(),
        metadata,
        policy: args.policy.to_wire(),
    };
    let text = serde_json::to_string(&request)
        .map_err(|error| CliError::usage(format!("the job cannot be written as JSON: {error}"), ""))?;
    let key = args.idempotency_key.as_deref().map(|key| ("idempotency-key", key));
    let accepted = ctx.api.post("/v1/jobs", text, key.as_slice()).await?;
    let job: Job = accepted.read()?;
    if !args.wait {
        if ctx.json {
            out(accepted.text.trim())?;
            return Ok(Exit::Ok);
        }
        out(&job.id)?;
        ctx.note(&format!(
            "{} accepted; follow it with `ringback watch {}`",
            Style::stderr().green("✓"),
            job.id
        ));
        return Ok(Exit::Ok);
    }
    finish(ctx, &job.id, args.timeout).await
}

/// Waits for a job and prints its output, or with `--json` the whole job.
pub(crate) async fn finish(ctx: &Context, id: &str, timeout: TimeoutArgs) -> Result<Exit, CliError> {
    ctx.note(&Style::stderr().dim(&format!("job {id}")));
    let (job, body) = wait::job(ctx, id, timeout, Report::of_progress(ctx)).await?;
    if ctx.json {
        out(body.text.trim())?;
    } else {
        show::result(ctx, &job).await?;
    }
    Ok(if ctx.json { job.state().map_or(Exit::Error, Exit::of_job) } else { show::end_of_job(&job) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_runpods_and_absent_when_not_asked() {
        assert!(PolicyArgs::default().to_wire().is_none());
        let args = PolicyArgs { execution_timeout: Some(5000), ttl: None, low_priority: true };
        let wire = serde_json::to_string(&args.to_wire()).unwrap();
        assert_eq!(wire, r#"{"executionTimeout":5000,"lowPriority":true}"#);
    }
}
