//! Reads the hand-written table.

/// One line: an event in some variants, in some situations, does one thing.
pub(crate) struct Rule {
    pub(crate) line: usize,
    event: &'static str,
    variants: Vec<&'static str>,
    situations: Vec<&'static str>,
    pub(crate) what: &'static str,
}

impl Rule {
    pub(crate) fn matches(&self, event: &str, variant: &str, situation: &str) -> bool {
        self.event == event && self.variants.contains(&variant) && self.situations.contains(&situation)
    }
}

pub(crate) fn read() -> Vec<Rule> {
    include_str!("rules.txt")
        .lines()
        .enumerate()
        .filter(|(_, text)| !text.trim().is_empty() && !text.starts_with('#'))
        .map(|(n, text)| {
            let parts: Vec<&str> = text.split('|').map(str::trim).collect();
            let [event, variants, situations, what] = parts[..] else { panic!("line {}: `{text}`", n + 1) };
            let list = |words: &'static str| words.split(',').map(str::trim).collect();
            Rule { line: n + 1, event, variants: list(variants), situations: list(situations), what }
        })
        .collect()
}
