//! Carries a pinned nats-server and runs it.
