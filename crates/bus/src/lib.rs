//! NATS JetStream as Ringback uses it: subjects, streams, consumers, pulls, request/reply.
