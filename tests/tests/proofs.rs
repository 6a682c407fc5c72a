//! docs/PROOFS.md names tests that exist.

use ringback_test_support::tools::root;
use std::path::PathBuf;

/// `a_{b,c}::d` means two.
fn spelt_out(text: &str) -> Vec<String> {
    let (Some(open), Some(close)) = (text.find('{'), text.find('}')) else { return vec![text.to_owned()] };
    let words = text[open + 1..close].split(',');
    words.flat_map(|word| spelt_out(&format!("{}{word}{}", &text[..open], &text[close + 1..]))).collect()
}

fn file_of(name: &str) -> PathBuf {
    let path = match name.split_once('/') {
        Some(("tests", rest)) => format!("tests/tests/{rest}"),
        Some(("dispatcher", rest)) => format!("crates/webhook-dispatcher/tests/{rest}"),
        _ => format!("crates/{name}"),
    };
    root().join(path).with_extension("rs")
}

#[test]
fn every_named_test_exists() {
    let text = std::fs::read_to_string(root().join("docs/PROOFS.md")).expect("the document");
    let rows = text.lines().filter(|line| line.starts_with('|'));
    let mut found = 0;
    for row in rows {
        // The last cell names the tests, in backticks.
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        for name in cell.split('`').skip(1).step_by(2).filter(|name| name.contains('/')).flat_map(spelt_out) {
            let (file, test) = name.split_once("::").unwrap_or((&name, ""));
            let source = std::fs::read_to_string(file_of(file)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let test = test.rsplit("::").next().unwrap_or_default();
            let there = [format!("fn {test}("), format!("    {test}: "), format!("    {test},")];
            assert!(test.is_empty() || there.iter().any(|t| source.contains(t)), "there is no {name}");
            found += 1;
        }
    }
    assert!(found > 50, "only {found} names were read");
}
