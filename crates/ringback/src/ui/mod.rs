//! What a person sees: colours, tables, times, progress.

pub(crate) mod json_text;
pub(crate) mod progress;
pub(crate) mod style;
pub(crate) mod table;
pub(crate) mod when;

use std::io::{IsTerminal as _, Write as _};

/// Text from outside made harmless for a terminal: control characters but line ends and tabs are shown, not obeyed.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

/// Writes a line to standard output. A reader that has gone (`| head`) ends the program quietly.
pub(crate) fn out(line: &str) -> std::io::Result<()> {
    raw(line.as_bytes()).and_then(|()| raw(b"\n"))
}

/// Writes bytes to standard output.
pub(crate) fn raw(bytes: &[u8]) -> std::io::Result<()> {
    let written = std::io::stdout().lock().write_all(bytes);
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other,
    }
}

/// Whether a person reads standard output.
pub(crate) fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether a person reads standard error.
pub(crate) fn stderr_is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Columns of the terminal behind standard output; `None` where there is none.
pub(crate) fn columns() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_terminal_obeys_nothing_from_outside() {
        assert_eq!(super::clean("a\x1b[2Jb\tc\nd\r\x07"), "a\u{fffd}[2Jb\tc\nd\u{fffd}\u{fffd}");
    }
}
