//! The fabric over real nats-servers on loopback.

mod joining;
mod logs;
mod messages;
mod starting;
mod support;
mod surviving;
