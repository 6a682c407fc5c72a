//! Input from an argument, a file or standard input.

use crate::error::CliError;
use serde_json::value::RawValue;
use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};

/// Reads bytes from a file, or from standard input for `-`.
pub(crate) fn read_source(path: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().read_to_string(&mut text).map(|_| ())
    } else {
        std::fs::read_to_string(path).map(|read| text = read)
    };
    let name = if path == Path::new("-") { PathBuf::from("standard input") } else { path.to_owned() };
    read.map_err(|source| CliError::File { action: "read", path: name, source })?;
    Ok(text)
}

/// A job's input: JSON text, `@FILE`, `-`, or standard input when nothing is given and it is no terminal.
pub(crate) fn job_input(given: Option<&str>) -> Result<Box<RawValue>, CliError> {
    let (text, from) = match given {
        Some("-") => (read_source(Path::new("-"))?, "standard input".to_owned()),
        Some(text) => match text.strip_prefix('@') {
            Some(file) => (read_source(Path::new(file))?, file.to_owned()),
            None => (text.to_owned(), "the input".to_owned()),
        },
        None if std::io::stdin().is_terminal() => {
            return Err(CliError::usage(
                "no input is given",
                "write it as JSON, as @FILE, or pipe it in: ringback submit echo '{\"hello\": \"world\"}'",
            ));
        }
        None => (read_source(Path::new("-"))?, "standard input".to_owned()),
    };
    json(&text, &from)
}

/// Verbatim JSON; `from` names its place in the error.
pub(crate) fn json(text: &str, from: &str) -> Result<Box<RawValue>, CliError> {
    if text.trim().is_empty() {
        return Err(CliError::usage(
            format!("{from} is empty"),
            "a job needs a JSON value, for example '{}'",
        ));
    }
    serde_json::from_str::<Box<RawValue>>(text.trim()).map_err(|error| {
        CliError::usage(
            format!("{from} is not JSON: {error}"),
            "quote it for the shell: ringback submit echo '{\"text\": \"hello\"}'",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_stays_verbatim_and_its_faults_are_named() {
        assert_eq!(job_input(Some(" {\"b\":1.0, \"a\":1e400} ")).unwrap().get(), "{\"b\":1.0, \"a\":1e400}");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("in.json");
        std::fs::write(&file, "[1,2]\n").unwrap();
        assert_eq!(job_input(Some(&format!("@{}", file.display()))).unwrap().get(), "[1,2]");
        let error = job_input(Some("{text: hello}")).unwrap_err().to_string();
        assert!(error.starts_with("the input is not JSON: "), "{error}");
        let error = job_input(Some("@/nowhere/in.json")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/in.json: "), "{error}");
        assert!(job_input(Some("  ")).is_err());
    }
}
