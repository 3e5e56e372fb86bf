//! The fabric over real nats-servers on loopback.

mod copies;
mod joining;
mod leaving;
mod logs;
mod messages;
mod rotation;
mod starting;
mod support;
mod surviving;
