//! `make demo` itself: its driver, its handler and its receiver against the program under test.

use ringback_test_support::files::Folder;
use ringback_test_support::tools;
use std::process::Command;

#[test]
fn a_batch_of_sentences_becomes_speech() {
    let Some(python) = tools::python("venv-demo") else { return };
    let folder = Folder::new("demo");
    let output = Command::new(python)
        .arg(tools::root().join("examples/demo/run.py"))
        .args(["--sentences", "12", "--refuse-first", "6", "--timeout", "150", "--ringback"])
        .arg(tools::ringback())
        .arg("--data")
        .arg(folder.path().join("demo"))
        .output()
        .expect("run the demo");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("12 sentences"), "{text}");
    assert!(text.contains("(2 refused once on purpose and sent again)"), "{text}");
}

/// The demo must not pass when nothing is synthesised: a program that is not Ringback makes it fail with a reason.
#[test]
fn a_broken_program_is_reported() {
    let Some(python) = tools::python("venv-demo") else { return };
    let folder = Folder::new("demo");
    let output = Command::new(python)
        .arg(tools::root().join("examples/demo/run.py"))
        .args(["--ringback", "/bin/false", "--data"])
        .arg(folder.path().join("demo"))
        .output()
        .expect("run the demo");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ringback ended with 1"));
}
