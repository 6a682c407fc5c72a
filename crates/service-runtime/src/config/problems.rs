//! What is wrong with a configuration: every problem at once, each with the key it concerns.

use std::fmt;

/// One contradiction or impossible value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key as written in the file, for example `endpoints[1].slots`.
    pub key: String,
    /// What is wrong and what to do.
    pub detail: String,
}

/// All problems found in one pass. Never empty inside an error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// The problems in the order of the file's sections.
    #[must_use]
    pub fn list(&self) -> &[Problem] {
        &self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, key: impl Into<String>, detail: impl Into<String>) {
        self.0.push(Problem { key: key.into(), detail: detail.into() });
    }

    pub(super) fn at_least(&mut self, key: &str, value: u64, min: u64) {
        if value < min {
            self.add(key, format!("is {value}, must be at least {min}"));
        }
    }

    pub(super) fn within(&mut self, key: &str, value: u64, min: u64, max: u64) {
        if value < min || value > max {
            self.add(key, format!("is {value}, must be between {min} and {max}"));
        }
    }

    /// At most one of several ways to give the same secret.
    pub(super) fn at_most_one(&mut self, key: &str, given: &[(&str, bool)]) {
        let named: Vec<&str> = given.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if named.len() > 1 {
            self.add(key, format!("gives {} at once; keep one", named.join(" and ")));
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}: {}", problem.key, problem.detail)?;
        }
        Ok(())
    }
}

/// Names from outside: `[A-Za-z0-9_-]{1,64}` (DESIGN 1).
pub(super) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

pub(super) const NAME_RULE: &str = "must be 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`";
