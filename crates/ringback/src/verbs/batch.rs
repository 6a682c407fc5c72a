//! `ringback batch`: many jobs at once.

use super::submit::{Policy, PolicyArgs};
use super::wait::{self, Report, TimeoutArgs};
use super::{Context, batch_path, input, show};
use crate::client::connection::ServerArgs;
use crate::client::model::Batch;
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::out;
use crate::ui::style::Style;
use futures::StreamExt as _;
use serde::Serialize;
use serde_json::value::RawValue;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  ringback batch tts sentences.jsonl --wait --results out.jsonl
  printf '{\"input\": {\"n\": %d}}\\n' 1 2 3 | ringback batch echo - --wait
  jq -c '.texts[] | {text: .}' book.json | ringback batch tts - --raw --webhook https://example.com/hook

FILE holds JSON lines or one JSON array. Each item is {\"input\": ..., \"client_ref\"?: ..., \"webhook\"?: ...};
with --raw each item is the input itself.
Without --wait it prints the batch's id. Exit codes with --wait: 0 all completed, 10 some failed,
11 cancelled, 7 --timeout ran out.";

/// Submit many jobs at once
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct BatchArgs {
    /// Endpoint's name
    endpoint: String,
    /// JSON lines or a JSON array; - for standard input
    file: PathBuf,
    /// Take each item as the input itself
    #[arg(long)]
    raw: bool,
    /// Receiver of the end of each job
    #[arg(long, value_name = "URL")]
    webhook: Option<String>,
    /// Receiver of the batch's end: one body with the counts
    #[arg(long, value_name = "URL")]
    callback_url: Option<String>,
    /// When a job fails, cancel the rest of this batch
    #[arg(long)]
    cancel_rest: bool,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Submitting again with the same key and items gives the same batch
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Wait until all jobs have ended, with a progress bar
    #[arg(short, long)]
    wait: bool,
    /// Write the results as JSON lines in item order; - for standard output. Implies --wait
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

#[derive(Serialize)]
struct Request<'a> {
    endpoint: &'a str,
    items: Vec<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    callback_url: Option<&'a str>,
    on_failure: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<Policy>,
}

#[derive(Serialize)]
struct RawItem {
    input: Box<RawValue>,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &BatchArgs) -> Result<Exit, CliError> {
    let items = items(&input::read_source(&args.file)?, args.raw)?;
    let count = items.len();
    let request = Request {
        endpoint: &args.endpoint,
        items,
        webhook: args.webhook.as_deref(),
        callback_url: args.callback_url.as_deref(),
        on_failure: if args.cancel_rest { "cancel_rest" } else { "continue" },
        policy: args.policy.to_wire(),
    };
    let text = serde_json::to_string(&request)
        .map_err(|error| CliError::usage(format!("the batch cannot be written as JSON: {error}"), ""))?;
    let key = args.idempotency_key.as_deref().map(|key| ("idempotency-key", key));
    let accepted = ctx.api.post("/v1/batches", text, key.as_slice()).await?;
    let batch: Batch = accepted.read()?;
    let id = batch.batch_id;
    if !args.wait && args.results.is_none() {
        if ctx.json {
            out(accepted.text.trim())?;
            return Ok(Exit::Ok);
        }
        out(&id)?;
        ctx.note(&format!(
            "{} {count} jobs accepted; follow them with `ringback watch {id}`",
            Style::stderr().green("✓")
        ));
        return Ok(Exit::Ok);
    }
    ctx.note(&Style::stderr().dim(&format!("batch {id}, {count} jobs")));
    let (batch, body) = wait::batch(ctx, &id, args.timeout, Report::of_progress(ctx)).await?;
    if let Some(file) = &args.results {
        write_results(ctx, &id, file).await?;
    }
    // Standard output belongs to the results when they go there.
    if args.results.as_deref() != Some(Path::new("-")) {
        if ctx.json { out(body.text.trim())? } else { show::batch(&batch, &[])? }
    }
    Ok(show::end_of_batch(&batch))
}

/// The items of a file: a JSON array, or one JSON value per line.
fn items(text: &str, raw: bool) -> Result<Vec<Box<RawValue>>, CliError> {
    let shape = "write one {\"input\": ...} per line, or use --raw to send each item as the input itself";
    let values: Vec<(String, Box<RawValue>)> = if text.trim_start().starts_with('[') {
        let list: Vec<Box<RawValue>> = serde_json::from_str(text.trim())
            .map_err(|error| CliError::usage(format!("the file is not a JSON array: {error}"), shape))?;
        list.into_iter().enumerate().map(|(n, value)| (format!("item {}", n + 1), value)).collect()
    } else {
        text.lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(n, line)| {
                let at = format!("line {}", n + 1);
                input::json(line, &at).map(|value| (at, value))
            })
            .collect::<Result<_, _>>()?
    };
    if values.is_empty() {
        return Err(CliError::usage("the file holds no items", shape));
    }
    values.into_iter().map(|(at, value)| item(&at, value, raw, shape)).collect()
}

fn item(at: &str, value: Box<RawValue>, raw: bool, shape: &str) -> Result<Box<RawValue>, CliError> {
    if raw {
        return serde_json::value::to_raw_value(&RawItem { input: value })
            .map_err(|error| CliError::usage(format!("{at} cannot be written as JSON: {error}"), shape));
    }
    let members: Option<std::collections::BTreeMap<String, &RawValue>> =
        serde_json::from_str(value.get()).ok();
    match members {
        Some(members) if members.contains_key("input") => Ok(value),
        Some(_) => Err(CliError::usage(format!("{at} has no `input`"), shape)),
        None => Err(CliError::usage(format!("{at} is not a JSON object"), shape)),
    }
}

async fn write_results(ctx: &Context, id: &str, file: &Path) -> Result<(), CliError> {
    let response = ctx.api.open(&format!("{}/results", batch_path(id))).await?;
    let mut bytes = response.bytes_stream();
    let to_stdout = file == Path::new("-");
    let failed = |source| CliError::File { action: "write", path: file.to_owned(), source };
    let mut target = if to_stdout { None } else { Some(std::fs::File::create(file).map_err(failed)?) };
    while let Some(chunk) = bytes.next().await {
        let chunk = chunk.map_err(|error| ctx.api.unreachable(&error))?;
        match &mut target {
            Some(file) => file.write_all(&chunk).map_err(failed)?,
            None => crate::ui::raw(&chunk)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str, raw: bool) -> Result<Vec<String>, String> {
        items(text, raw)
            .map(|items| items.iter().map(|item| item.get().to_owned()).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn lines_and_arrays_keep_their_text() {
        let lines = "{\"input\": 1.0}\n\n{\"client_ref\":\"b\",\"input\":{}}\n";
        assert_eq!(texts(lines, false).unwrap(), ["{\"input\": 1.0}", "{\"client_ref\":\"b\",\"input\":{}}"]);
        assert_eq!(
            texts("[{\"input\":1},{\"input\":2}]", false).unwrap(),
            ["{\"input\":1}", "{\"input\":2}"]
        );
        assert_eq!(texts("1e400\n\"x\"", true).unwrap(), ["{\"input\":1e400}", "{\"input\":\"x\"}"]);
    }

    #[test]
    fn faults_name_their_line() {
        assert_eq!(texts("{\"input\":1}\n{\"text\":2}", false).unwrap_err(), "line 2 has no `input`");
        assert_eq!(texts("[1]", false).unwrap_err(), "item 1 is not a JSON object");
        assert!(texts("{\"input\":1}\n{oops}", false).unwrap_err().starts_with("line 2 is not JSON: "));
        assert_eq!(texts(" \n", false).unwrap_err(), "the file holds no items");
    }
}
