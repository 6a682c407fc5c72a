//! Ringback's command line and all-in-one.

fn main() {}
