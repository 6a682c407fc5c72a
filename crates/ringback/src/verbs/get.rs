//! `ringback get`: everything about one job or batch.

use super::{Context, Subject, batch_path, job_path, look_up, save, show};
use crate::client::connection::ServerArgs;
use crate::client::model::{Delivery, DeliveryList};
use crate::error::CliError;
use crate::exit::Exit;
use crate::ui::out;

const EXAMPLES: &str = "\
Examples:
  ringback get 01981c4e-5b0e-7c3a-9d55-2f6f0a6c1e11      status, timeline, webhooks, output
  ringback get $JOB --output > result.json               only the output, verbatim
  ringback get $JOB --save ./files                       the job's files, each checked
  ringback get $JOB --json | jq .history";

/// Show one job or batch: status, timeline, webhooks, output
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct GetArgs {
    /// Id of a job or a batch
    id: String,
    /// Print only the job's output, verbatim
    #[arg(short, long)]
    output: bool,
    /// Save the job's files into this folder; each is checked against its SHA-256
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    save: Option<std::path::PathBuf>,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// Runs the verb.
pub(crate) async fn run(ctx: &Context, args: &GetArgs) -> Result<Exit, CliError> {
    if args.output {
        show::whole_output(ctx, &args.id).await?;
        return Ok(Exit::Ok);
    }
    if let Some(folder) = &args.save {
        save::save(ctx, &args.id, folder).await?;
        return Ok(Exit::Ok);
    }
    match look_up(&ctx.api, &args.id).await? {
        Subject::Job(_, body) | Subject::Batch(_, body) if ctx.json => out(body.text.trim())?,
        Subject::Batch(batch, _) => {
            show::batch(&batch, &deliveries(ctx, &batch_path(&args.id)).await?)?;
        }
        Subject::Job(job, _) => {
            let deliveries = if job.deliveries.total() == 0 {
                Vec::new()
            } else {
                deliveries(ctx, &job_path(&args.id)).await?
            };
            show::job(&job, &deliveries)?;
        }
    }
    Ok(Exit::Ok)
}

async fn deliveries(ctx: &Context, path: &str) -> Result<Vec<Delivery>, CliError> {
    Ok(ctx.api.get(&format!("{path}/deliveries")).await?.read::<DeliveryList>()?.deliveries)
}
