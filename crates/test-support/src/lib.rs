//! Harnesses for tests: real nats-server, real databases, real processes, a counting receiver. Development only.
