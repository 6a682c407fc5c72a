//! Generates the prost types from proto/ without protoc.

use std::{io, path::Path};

fn main() -> io::Result<()> {
    let root = Path::new("../../proto");
    let files = ["job", "worker", "tracker", "delivery", "artifact"]
        .map(|f| root.join(format!("ringback/v1/{f}.proto")));
    println!("cargo:rerun-if-changed=../../proto");
    let set = protox::compile(files, [root]).map_err(io::Error::other)?;
    prost_build::Config::new().bytes(["."]).compile_fds(set)
}
