//! The fabric over real nats-servers on loopback.

mod joining;
mod logs;
mod messages;
mod rotation;
mod starting;
mod support;
mod surviving;
