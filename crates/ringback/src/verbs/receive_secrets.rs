//! Where the secrets of received webhooks come from: flags, files, the environment. They are printed nowhere.

use crate::error::CliError;
use ringback_service_runtime::Redacted;
use std::path::PathBuf;

/// The variable; several secrets stand on lines of their own.
const VARIABLE: &str = "RINGBACK_WEBHOOK_SECRET";

/// Secrets of senders.
#[derive(Debug, clap::Args)]
pub(crate) struct SecretArgs {
    /// A sender's secret, `whsec_…` or any text; repeat it for several or for a rotation. Other users of this machine
    /// can read arguments: prefer --secret-file or the variable RINGBACK_WEBHOOK_SECRET (one secret per line)
    #[arg(long, value_name = "SECRET", value_parser = redacted)]
    secret: Vec<Redacted<String>>,
    /// File with one secret per line; repeatable
    #[arg(long, value_name = "FILE")]
    secret_file: Vec<PathBuf>,
}

fn redacted(text: &str) -> Result<Redacted<String>, std::convert::Infallible> {
    Ok(Redacted::new(text.to_owned()))
}

impl SecretArgs {
    /// All secrets: flags, files, and the variable only where neither is given.
    pub(crate) fn read(&self) -> Result<Vec<String>, CliError> {
        let mut all: Vec<String> = self.secret.iter().map(|secret| secret.expose().clone()).collect();
        for path in &self.secret_file {
            let text = std::fs::read_to_string(path).map_err(|source| CliError::File {
                action: "read",
                path: path.clone(),
                source,
            })?;
            let before = all.len();
            all.extend(lines(&text));
            if all.len() == before {
                return Err(CliError::usage(
                    format!("{} holds no secret", path.display()),
                    "write one secret per line",
                ));
            }
        }
        if all.is_empty()
            && let Ok(text) = std::env::var(VARIABLE)
        {
            all.extend(lines(&text));
        }
        Ok(all)
    }
}

/// A secret may be any text, but for spaces around it and line ends.
fn lines(text: &str) -> impl Iterator<Item = String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned)
}
