//! The rules for URLs that need no network.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ringback_domain::webhook::url::{UrlError, UrlPolicy, check_url};
use url::Url;

/// So many URLs are remembered; then it begins anew.
const PASSED_MAX: usize = 1024;

/// The rules, and what passed them lately: most webhooks go to few URLs, again and again. A verdict depends on nothing
/// but the text and the rules, so it never grows old; what a name resolves to is judged at each connection.
pub(crate) struct Judge {
    policy: UrlPolicy,
    passed: Mutex<HashMap<String, Url>>,
}

impl Judge {
    pub(crate) fn new(policy: UrlPolicy) -> Self {
        Self { policy, passed: Mutex::default() }
    }

    pub(crate) fn policy(&self) -> &UrlPolicy {
        &self.policy
    }

    pub(crate) fn check(&self, text: &str) -> Result<Url, UrlError> {
        if let Some(url) = self.passed().get(text) {
            return Ok(url.clone());
        }
        let url = check_url(text, &self.policy)?;
        let mut passed = self.passed();
        if passed.len() >= PASSED_MAX {
            passed.clear();
        }
        passed.insert(text.to_owned(), url.clone());
        Ok(url)
    }

    fn passed(&self) -> MutexGuard<'_, HashMap<String, Url>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_look_says_the_same_and_only_what_passed_is_remembered() {
        let judge = Judge::new(UrlPolicy::default());
        for text in ["https://a.example/x", "https://10.0.0.1/", "not a URL", "https://b.example/?y"] {
            let first = check_url(text, &UrlPolicy::default());
            assert_eq!(judge.check(text), first, "{text}");
            assert_eq!(judge.check(text), first, "{text}");
        }
        let mut remembered: Vec<String> = judge.passed().keys().cloned().collect();
        remembered.sort();
        assert_eq!(remembered, ["https://a.example/x", "https://b.example/?y"]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let judge = Judge::new(UrlPolicy::default());
        for n in 0..3 * PASSED_MAX {
            assert!(judge.check(&format!("https://a.example/{n}")).is_ok());
            assert!(judge.passed().len() <= PASSED_MAX);
        }
    }
}
