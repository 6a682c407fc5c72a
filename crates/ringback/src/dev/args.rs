//! The arguments of `ringback dev`.

use super::endpoint::EndpointSpec;
use std::net::SocketAddr;
use std::path::PathBuf;
use url::Url;

const EXAMPLES: &str = "\
Examples:
  ringback dev
  ringback dev --endpoint 'tts=process:python3 -u handler.py,slots=2,timeout=60'
  ringback dev --endpoint fast=builtin:echo --endpoint slow=builtin:sleep,slots=4
  ringback dev --config ringback.toml --listen 127.0.0.1:9000
  ringback dev --database postgres://me@localhost/ringback

Without --endpoint and without endpoints in --config it serves `echo` (returns its input) and `sleep`
(waits input.seconds). Everything lies in the data folder; delete it to start anew.
Ctrl-C drains: running jobs end or are handed back. A second Ctrl-C ends at once; nothing accepted is lost.";

/// Start everything on this machine: broker, database, services and a worker
#[derive(Debug, Default, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct DevArgs {
    /// Address of the HTTP API [default: 127.0.0.1:8080]
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Allow --listen to reach beyond this machine; receivers on loopback are refused then
    #[arg(long)]
    pub(crate) listen_public: bool,
    /// Base of the links we make [default: http://LISTEN]
    #[arg(long, value_name = "URL")]
    pub(crate) public_url: Option<Url>,
    /// Data folder [default: ./ringback-data]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// API key with all rights [default: random at first start, kept in the data folder]
    #[arg(long, value_name = "KEY", env = "RINGBACK_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Secret that signs webhooks: whsec_ and base64 [default: random at first start, kept encrypted]
    #[arg(long, value_name = "SECRET", env = "RINGBACK_WEBHOOK_SECRET", hide_env_values = true)]
    pub(crate) webhook_secret: Option<String>,
    /// sqlite:PATH or postgres://... [default: SQLite in the data folder]
    #[arg(long, value_name = "URL", env = "RINGBACK_DATABASE_URL", hide_env_values = true)]
    pub(crate) database: Option<String>,
    /// Configuration file; the flags here win over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// An endpoint: NAME=process:CMD, NAME=builtin:echo|sleep or NAME=builtin:encoder,model=FOLDER,task=embed; `,slots=N,timeout=TIME` may follow. Repeatable
    #[arg(long = "endpoint", value_name = "SPEC", value_parser = EndpointSpec::parse)]
    pub(crate) endpoints: Vec<EndpointSpec>,
    /// More log lines: -v what the services do, -vv everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}
