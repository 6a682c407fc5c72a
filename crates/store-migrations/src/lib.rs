//! Schema of Ringback's SQL store, applied before a roll-out.
