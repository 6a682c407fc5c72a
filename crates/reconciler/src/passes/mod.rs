//! One file per pass. Each looks for one kind of deviation, repairs it, and reports what it found; running it twice,
//! or in two replicas at once, does no harm.

pub(crate) mod artifacts;
pub(crate) mod batches;
pub(crate) mod counters;
pub(crate) mod deliveries;
pub(crate) mod due;
pub(crate) mod identity;
pub(crate) mod orphans;
pub(crate) mod retention;
pub(crate) mod streams;
pub(crate) mod workers;
