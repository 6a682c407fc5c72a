//! Pure heart of Ringback: ids, the job state machine, policies, webhook bodies and signatures. No I/O, no clock, no randomness.
