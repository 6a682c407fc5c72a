//! The only writer of job state: folds events through the domain, commits, announces.
